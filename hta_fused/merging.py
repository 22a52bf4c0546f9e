"""What becomes of all that copies hold beside their trained parameters, buffers and frozen parameters, when they are merged.
Imports distributed.py."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.optim.swa_utils import update_bn

from .distributed import Processes

_POWER_ITERATIONS = 100  # for a spectral norm to a hundredth or so; torch's own begins with 15
# Which torch keeps to itself: where it has no class of that name any more, nothing is one.
_SPECTRAL, _ORTHOGONAL = (getattr(parametrizations, name, ()) for name in ("_SpectralNorm", "_Orthogonal"))

Beside = list[dict[str, Tensor]]


def beside(copies: Iterable[nn.Module], trained: set[int], processes: Processes | None) -> Beside:
    """Of each copy the parameters and buffers of which there is a mean, by kind and name, without the trained ones (by id).

    Raises:
        ValueError: not all copies have them, in the same shapes.
    """
    found = [{name: held for name, held in _meanable(net).items() if id(held) not in trained} for net in copies]
    shapes = [{name: tuple(held.shape) for name, held in of.items()} for of in found]
    if processes:
        processes.agree(shapes[0])
    for number, theirs in enumerate(shapes):
        for name in (n for n in shapes[0] | theirs if shapes[0].get(n) != theirs.get(n)):
            was = f"{shapes[0].get(name)} in copy 0, {theirs.get(name)} in copy {number}"
            raise ValueError(f"{name} must be the same in all copies, got {was}")
    return found


def take_means(merged: nn.Module, found: Beside, processes: Processes | None) -> None:
    """Puts the means of what `beside` found into a copy of copy 0, or what serves where a mean is none.

    Raises:
        ValueError: orthogonal parametrizations with other bases.
    """
    norms, own, differ = _spectral_norms(merged), _meanable(merged), set()
    vectors = {id(vector) for of, *_ in norms for vector in of}
    bases = {id(getattr(module, "base", None)) for module in merged.modules() if isinstance(module, _ORTHOGONAL)}
    for name, held in found[0].items():
        rows = list(processes.gather(held)) if processes else [of[name] for of in found]
        if held.dtype == torch.complex32:  # with which torch does next to nothing
            rows = [row.to(torch.complex64) for row in rows]
        if all(torch.equal(rows[0], other) for other in rows[1:]):
            continue  # a mask's mean may overflow
        if id(own[name]) in bases:
            raise ValueError(f"{name} must be the same in all copies, as orthogonal bases have no mean, got several")
        differ.add(id(own[name]))
        own[name].copy_(rows[0] if id(own[name]) in vectors else _mean(rows))
    for of, module, iterate in norms:
        if not differ.isdisjoint(map(id, of)):
            training, module.training = module.training, True
            for _ in range(_POWER_ITERATIONS):
                iterate()
            module.training = training


def estimate_statistics(merged: nn.Module, loader: Iterable[Any], device: torch.device) -> None:
    """Batch-norm statistics anew, over batches of inputs (or tuples that start with them).

    Raises:
        ValueError: there is no batch, which would leave statistics of nothing.
    """
    batches = iter(loader)
    first = list(islice(batches, 1))
    if not first:
        raise ValueError("loader must give at least one batch, got none")
    update_bn(chain(first, batches), merged, device=device)


def _meanable(net: nn.Module) -> dict[str, Tensor]:
    named: dict[str, Tensor] = {f"parameter {name!r}": held for name, held in net.named_parameters()}
    named |= {f"buffer {name!r}": held for name, held in net.named_buffers()}
    return {name: held for name, held in named.items() if held.is_floating_point() or held.is_complex()}


def _mean(rows: Sequence[Tensor]) -> Tensor:
    wide = torch.promote_types(rows[0].dtype, torch.half)  # of eight bits there is no sum
    return torch.stack([row.to(wide) for row in rows]).mean(0)


def _spectral_norms(net: nn.Module) -> list[tuple[list[Tensor], nn.Module, Callable[[], Any]]]:
    """Of each spectral_norm, torch's present and former: its singular vectors, the module whose `training` says whether a
    call iterates for them, and the call."""
    found: list[tuple[list[Tensor], nn.Module, Callable[[], Any]]] = []
    for module in net.modules():
        if isinstance(module, ParametrizationList):
            found += [([*norm.buffers()], norm, module) for norm in module if isinstance(norm, _SPECTRAL)]
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, SpectralNorm):
                vectors = [getattr(module, f"{hook.name}_{side}") for side in "uv"]
                found.append((vectors, module, partial(hook, module, None)))
    return found
