"""Where copies and their anchor start: the other copies of a model, and a point in its layout. Imports checks.py, layout.py.

`fresh`, here and there, is a function that returns a module like the model, drawn anew.
"""

import copy
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .checks import shown
from .kernels.reference import DTYPES
from .layout import Layout, trainable

Fresh = Callable[[], nn.Module]


def others(model: nn.Module, count: int, start: str | Sequence[nn.Module], fresh: Fresh) -> list[nn.Module]:
    """`count` further copies of a model; `start` is Replicas' argument.

    Raises:
        ValueError: an unknown name, another number of modules, or one that does not match the model or shares
            parameters with it.
        TypeError: something else than modules.
    """
    found: list[Any]
    if isinstance(start, str):
        if start not in ("copy", "independent"):
            raise ValueError(f"start must be 'copy', 'independent' or a list of modules, got {start!r}")
        for name, parameter in trainable(model).items():
            if count and start == "copy" and (parameter._backward_hooks or parameter._post_accumulate_grad_hooks):
                warnings.warn(
                    f"the hooks of parameter {name!r} are copy 0's alone: deep copies have none", stacklevel=4
                )
        found = [copied(model) if start == "copy" else fresh() for _ in range(count)]
        name = "start" if start == "copy" else "factory's module"
        names = [name] * count
    elif isinstance(start, Sequence):
        found, names = [*start], [f"start[{i}]" for i in range(len(start))]
    else:
        raise TypeError(f"start must be 'copy', 'independent' or a list of modules, got {shown(start)}")
    if len(found) != count:
        raise ValueError(f"start must hold {count} modules, one for each copy but the model, got {len(found)}")
    taken = {id(p) for p in trainable(model).values()}
    for name, other in zip(names, found, strict=True):
        check_like(name, other, model)
        held = {id(p) for p in trainable(other).values()}
        if not taken.isdisjoint(held):
            raise ValueError(f"{name} must be a module of its own, got parameters of the model or another copy")
        taken |= held
    return found


def check_like(name: str, other: nn.Module, model: nn.Module) -> None:
    """Raises where a module's trainable parameters are not like the model's."""
    if not isinstance(other, nn.Module):
        raise TypeError(f"{name} must be a torch.nn.Module, got {shown(other)}")
    wanted, got = ({name: (p.shape, p.dtype, p.device) for name, p in trainable(net).items()} for net in (model, other))
    if wanted != got:
        raise ValueError(f"{name}'s trainable parameters do not match the model's in name and shape, dtype and device")


def anchor_of(
    anchor: str | Tensor | Mapping[str, Tensor], model: nn.Module, layout: Layout, fresh: Fresh
) -> Tensor | None:
    """The anchor as a flat tensor in a layout, or None for zero; `anchor` is Replicas' argument.

    Raises:
        ValueError: an unknown name, entries that are missing, or a shape that is not the layout's.
        TypeError: another dtype, or entries that are no real tensors.
    """
    like = next(iter(trainable(model).values())).detach()
    source: Mapping[str, Tensor]
    if isinstance(anchor, Tensor):
        if anchor.shape != (layout.numel,):
            raise ValueError(f"anchor has shape {tuple(anchor.shape)}, but the layout has ({layout.numel},)")
        if anchor.dtype not in DTYPES:
            raise TypeError(f"anchor must be float16, bfloat16, float32 or float64, got {anchor.dtype}")
        flat, given = like.new_zeros(layout.numel), anchor.detach().to(like).contiguous()
        for mine, theirs in zip(layout.views(flat), layout.views(given), strict=True):
            mine.copy_(theirs)  # and not what lies between the parameters, to which the copies would be pulled
        return flat
    if isinstance(anchor, Mapping):
        source = anchor
    elif anchor == "zero":
        return None
    elif anchor == "init":
        source = trainable(model)
    elif anchor == "random":
        drawn = fresh()
        check_like("factory's module", drawn, model)
        source = trainable(drawn)
    else:
        raise ValueError(f"anchor must be 'init', 'zero', 'random', a tensor or a state_dict, got {shown(anchor)}")
    flat = like.new_zeros(layout.numel)
    for name, view in zip(layout.names, layout.views(flat), strict=True):
        if name not in source:
            raise ValueError(f"anchor has no entry {name!r}")
        if not isinstance(source[name], Tensor) or source[name].is_complex():
            raise TypeError(f"anchor's {name!r} must be a real tensor, got {shown(source[name])}")
        if source[name].shape != view.shape:
            raise ValueError(
                f"anchor's {name!r} has shape {tuple(source[name].shape)}, but the model's has {tuple(view.shape)}"
            )
        view.copy_(source[name].detach())
    return flat


def copied(module: nn.Module) -> nn.Module:
    """A deep copy, also of modules that keep what they computed last: the `weight` of pruning and of weight_norm."""
    kept = (t for m in module.modules() for t in vars(m).values() if isinstance(t, Tensor) and not t.is_leaf)
    return copy.deepcopy(module, {id(t): t.detach().clone() for t in kept})


def reinitialised(model: nn.Module) -> nn.Module:
    """A deep copy whose trainable parameters are drawn anew, by the model's own `reset_parameters` or by its submodules'.
    What is frozen stays as it is, and so do the buffers of modules all of whose parameters are.

    Raises:
        ValueError: a trainable parameter belongs to a module that cannot reset itself, or does not reset it.
    """
    fresh = copied(model)
    with torch.no_grad():
        for parameter in trainable(fresh).values():
            parameter.fill_(math.nan)  # which is left where nothing is drawn
    if callable(getattr(fresh, "reset_parameters", None)):
        fresh.reset_parameters()  # type: ignore[operator]
    else:
        for name, module in fresh.named_modules():
            if callable(getattr(module, "reset_parameters", None)):
                module.reset_parameters()
            elif any(p.requires_grad for p in module.parameters(recurse=False)):
                raise ValueError(
                    f"module {name or 'model'!r} ({type(module).__name__}) holds parameters but has no reset_parameters(); "
                    "pass factory=, a function that returns a fresh model"
                )
    for name, parameter in trainable(fresh).items():
        if not parameter.is_meta and parameter.isnan().any():
            raise ValueError(
                f"parameter {name!r} is not drawn anew by reset_parameters(); pass factory=, a function that returns a fresh model"
            )
    return _keep_frozen(fresh, model)


@torch.no_grad()
def _keep_frozen(fresh: nn.Module, model: nn.Module) -> nn.Module:
    """Gives a module drawn anew the model's frozen part back: a pretrained backbone, say."""
    for new, old in zip(fresh.modules(), model.modules(), strict=True):
        pairs = list(zip(new.parameters(recurse=False), old.parameters(recurse=False), strict=True))
        frozen: list[tuple[Tensor, Tensor]] = [(ours, theirs) for ours, theirs in pairs if not theirs.requires_grad]
        if pairs and len(frozen) == len(pairs):
            frozen += zip(new.buffers(recurse=False), old.buffers(recurse=False), strict=True)
        for ours, theirs in frozen:
            ours.copy_(theirs)
    return fresh
