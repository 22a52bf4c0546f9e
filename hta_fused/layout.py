"""Where a model's trainable parameters lie in one flat buffer. Imports checks.py and the kernels' tile size only."""

from dataclasses import dataclass
from itertools import accumulate
from math import prod

import torch
from torch import Tensor, nn

from .checks import shown
from .kernels.formats import TILE

_APART = 192  # bytes: three cache lines


@dataclass(frozen=True)
class Layout:
    """Where each trainable parameter of a model lies in a flat buffer. Each starts at a tile of its own."""

    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    strides: tuple[tuple[int, ...], ...]
    offsets: tuple[int, ...]
    numel: int  # the padding included

    @classmethod
    def of(cls, model: nn.Module) -> "Layout":
        """The layout of a model's parameters that require gradients; a tied parameter lies there once.

        Memory formats are kept: a channels-last kernel is laid out in channels-last order.
        """
        for name, parameter in trainable(model).items():
            check_dense(f"model's parameter {name!r}", parameter)
        dense = {name: torch.empty_like(p, device="meta") for name, p in trainable(model).items()}  # in p's own order
        return cls.of_shapes([(name, p.shape, p.stride()) for name, p in dense.items()])

    @classmethod
    def of_shapes(cls, parameters: list[tuple[str, torch.Size, tuple[int, ...]]]) -> "Layout":
        """The layout of parameters of these names, shapes and strides."""
        sizes = [-(-prod(shape) // TILE) * TILE for _, shape, _ in parameters]
        names, shapes, strides = zip(*parameters, strict=True) if parameters else ((), (), ())
        return cls(names, shapes, strides, tuple(accumulate([0, *sizes[:-1]])), sum(sizes))

    def views(self, flat: Tensor) -> list[Tensor]:
        """The parameters' shapes over a flat buffer of `numel` elements, in the order of `names`."""
        return [
            flat[offset : offset + prod(shape)].as_strided(shape, stride)
            for offset, shape, stride in zip(self.offsets, self.shapes, self.strides, strict=True)
        ]

    def tensors(self, flat: Tensor) -> list[Tensor]:
        """`views`, each with a storage of its own over the same memory, so that what saves or compares storages
        (torch.save, safetensors) sees no more than that; it moves no version counter but its own."""
        # DLPack may give dimensions of one element other strides.
        return [torch.from_dlpack(v).as_strided(v.shape, v.stride()) for v in self.views(flat.detach())]

    def rows(self, count: int, like: Tensor, dtype: torch.dtype | None = None, number: int = 0) -> Tensor:
        """[count, numel] of zeros whose rows, and those of buffers of other numbers, start at different places in a page.

        Kernels walk many rows at once. Would all start alike, they would fall into the same few lines of the cache.
        """
        size = torch.empty(0, dtype=dtype or like.dtype).element_size()
        gap = _APART // size
        start = number * count * gap
        room = torch.zeros(start + count * (self.numel + gap), dtype=dtype or like.dtype, device=like.device)
        return room.as_strided((count, self.numel), (self.numel + gap, 1), start)

    def tiles(self, index: int) -> slice:
        """The tiles that parameter number `index` fills."""
        start = self.offsets[index] // TILE
        return slice(start, start - (-prod(self.shapes[index]) // TILE))


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require gradients, by name; a tied one once, under its first name."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {shown(model)}")
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def check_dense(what: str, parameter: Tensor, error: type[Exception] = TypeError) -> None:
    """Raises where a parameter's elements do not all lie in memory."""
    if parameter.layout != torch.strided:
        raise error(f"{what} must be dense, got one of {parameter.layout}")


def owners_of(model: nn.Module) -> dict[int, nn.Module]:
    """The first module that holds each parameter, by the parameter's id."""
    owners: dict[int, nn.Module] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), module)
    return owners
