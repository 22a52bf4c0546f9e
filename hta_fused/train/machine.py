"""Whether this machine can do what the settings ask, what it is fastest in, and what it says when it cannot.

Knows the networks' sizes; imports settings.py and vgg.py.
"""

import os
from typing import Any, Literal

import torch

from .settings import Settings
from .vgg import parameter_count


def check(settings: Settings, processes: int | None = None) -> None:
    """Refuses threads, a device, or a network that are not to be had here.

    Args:
        processes: how many train here, a copy in each; None for one process with all copies.

    Raises:
        ValueError: beginning with the setting's name.
    """
    if processes is None:
        check_alone(settings)
    cores = os.cpu_count() or 1
    if settings.threads > cores:
        raise ValueError(f"threads must be at most {cores}, this machine's cores, got {settings.threads}")
    kind, _, number = settings.device.partition(":")
    if kind == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"device must be cpu or auto where torch sees no CUDA device, got {settings.device!r}")
        if int(number or 0) >= torch.cuda.device_count():
            last = torch.cuda.device_count() - 1
            raise ValueError(f"device must be from cuda:0 to cuda:{last}, got {settings.device!r}")
    on_gpu = settings.torch_device.type == "cuda"
    if on_gpu and processes and processes > torch.cuda.device_count():
        raise ValueError(
            f"device must be cpu where torchrun starts {processes} processes and torch sees {torch.cuda.device_count()} "
            f"CUDA devices, got {settings.device!r}"
        )
    here = None if processes is None else 1 if on_gpu else processes
    count, there = parameter_count(settings.model, settings.batch_norm, settings.width), 0
    needed = memory(settings, here)
    if on_gpu:
        there = torch.cuda.get_device_properties(settings.torch_device).total_memory
    elif hasattr(os, "sysconf"):
        there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if there and needed > there:
        raise ValueError(
            f"width must leave a network that fits in memory, got {settings.width:g}: {settings.model} has {count:.3g} "
            f"parameters and needs over {needed / 2**30:.3g} GiB, where {there / 2**30:.3g} GiB are"
        )


def check_alone(settings: Settings) -> None:
    """Refuses what takes several processes."""
    if settings.method == "ddp":
        raise ValueError(
            "method must be sgd in one process, with a batch_size of all processes' images, got 'ddp', which is for torchrun"
        )


def fastest_precision() -> Literal["fp32", "bf16"]:
    """In which networks train faster on this processor: bfloat16 where it multiplies in it, else float32, several times.

    A torch that cannot say what the processor can counts as one that cannot.
    """
    can: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return "bf16" if can.get("avx512_bf16") or can.get("amx_bf16") else "fp32"


def memory(settings: Settings, copies: int | None = None) -> int:
    """Bytes that parameters, gradients, momenta, the anchor and averages take, of some or of all copies; activations and images come on
    top."""
    one = 3 + bool(settings.ema) + bool(settings.swa)
    apart = 3 * (copies or settings.copies) + (4 if settings.coupling == "diloco" else 1)
    tensors = max(one, apart) if settings.trains_copies else one
    return 4 * tensors * parameter_count(settings.model, settings.batch_norm, settings.width)
