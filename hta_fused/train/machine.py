"""Whether this machine can do what the settings ask. Knows the networks' sizes; imports settings.py and vgg.py."""

import os

import torch

from .settings import Settings
from .vgg import parameter_count


def check(settings: Settings) -> None:
    """Refuses threads, a device, or a network that are not to be had here.

    Raises:
        ValueError: beginning with the setting's name.
    """
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
    count, needed, there = parameter_count(settings.model, settings.batch_norm, settings.width), memory(settings), 0
    if settings.torch_device.type == "cuda":
        there = torch.cuda.get_device_properties(settings.torch_device).total_memory
    elif hasattr(os, "sysconf"):
        there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if there and needed > there:
        raise ValueError(
            f"width must leave a network that fits in memory, got {settings.width:g}: {settings.model} has {count:.3g} "
            f"parameters and needs over {needed / 2**30:.3g} GiB, where {there / 2**30:.3g} GiB are"
        )


def memory(settings: Settings) -> int:
    """Bytes that parameters, gradients, momenta and the anchor take; activations and images come on top."""
    tensors = 3 if settings.method == "sgd" else 3 * settings.copies + 1
    return 4 * tensors * parameter_count(settings.model, settings.batch_norm, settings.width)
