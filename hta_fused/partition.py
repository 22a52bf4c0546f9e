"""Which of the two blocks each trainable element of a model belongs to, and where it lies in a flat buffer.

A `Layout` lays a model's trainable parameters out in one flat buffer; a `Partition` gives each of its elements a label:
0 coupled only, 1 anchored in θ (block 1), 2 anchored in η (block 2). Long runs of one label cost nothing: a code for
each tile of 1024 elements says it, and only tiles that mix labels keep a byte an element. Imports reference.py for the
size of a tile.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from .reference import TILE, expand

Part = str | Callable[[str], bool]


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
        names, shapes, strides, offsets, end = [], [], [], [], 0
        for name, parameter in trainable(model).items():
            names.append(name)
            shapes.append(parameter.shape)
            strides.append(torch.empty_like(parameter, device="meta").stride())  # dense, in the parameter's own order
            offsets.append(end)
            end += -(-parameter.numel() // TILE) * TILE
        return cls(tuple(names), tuple(shapes), tuple(strides), tuple(offsets), end)

    def views(self, flat: Tensor) -> list[Tensor]:
        """The parameters' shapes over a flat buffer of `numel` elements, in the order of `names`."""
        return [
            flat[offset : offset + prod(shape)].as_strided(shape, stride)
            for offset, shape, stride in zip(self.offsets, self.shapes, self.strides, strict=True)
        ]

    def tiles(self, index: int) -> slice:
        """The tiles that parameter number `index` fills."""
        start = self.offsets[index] // TILE
        return slice(start, start - (-prod(self.shapes[index]) // TILE))


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require gradients, by name; a tied one once, under its first name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


class Partition:
    """The label of each element of a flat buffer. Make one with the class methods; they take the model it is for.

    `part` restricts a partition to a part of the model, and labels the rest 0: "conv" (convolutions), "classifier"
    (fully connected layers), or a function of the parameter's name that returns a bool.
    """

    def __init__(self, labels: Tensor, layout: Layout | None = None):
        """From one label an element: uint8 [N], in the buffer's order."""
        if labels.dtype != torch.uint8 or labels.dim() != 1:
            raise TypeError(f"labels must be a 1-D uint8 tensor, got {labels.dtype} of shape {tuple(labels.shape)}")
        if labels.numel() and labels.amax() > 2:
            raise ValueError(f"labels must be 0, 1 or 2, got {int(labels.amax())}")
        self.numel = labels.numel()
        self.layout = layout
        missing = -self.numel % TILE
        tiles = torch.cat([labels, labels[-1:].expand(missing)]).view(-1, TILE)
        low = tiles.amin(1) if len(tiles) else tiles.new_empty(0)
        mixed = (low != tiles.amax(1)) if len(tiles) else low.bool()
        code = torch.where(mixed, -mixed.cumsum(0), low.long())
        self.codes = torch.stack([torch.zeros_like(code), code], 1).int().contiguous()
        self.labels: Tensor | None = tiles[mixed].contiguous() if mixed.any() else None

    # ------------------------------------------------------------------------------------------------------ makers

    @classmethod
    def conv_halves(cls, model: nn.Module, part: Part | None = None) -> "Partition":
        """The paper's §2.1: each convolution kernel's first half of output channels is block 1, the rest block 2."""

        def label(name: str, owner: nn.Module, p: Tensor) -> Tensor | None:
            if not isinstance(owner, nn.modules.conv._ConvNd) or p.dim() < 3:
                return None
            channel_dim = 1 if owner.transposed else 0
            channels = p.shape[channel_dim]
            shape = [channels if d == channel_dim else 1 for d in range(p.dim())]
            return (1 + (torch.arange(channels, device="cpu") >= channels // 2).byte()).view(shape)

        return cls._label(model, label, part, "conv_halves", "convolution")

    @classmethod
    def layer_halves(cls, model: nn.Module, part: Part | None = None) -> "Partition":
        """The paper's §2.2: the weights of the first half of the fully connected layers are block 1, the rest block 2."""
        layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
        first = {id(m) for m in layers[: len(layers) // 2]}

        def label(name: str, owner: nn.Module, p: Tensor) -> Tensor | None:
            if not isinstance(owner, nn.Linear) or p.dim() < 2:
                return None
            return torch.tensor(1 if id(owner) in first else 2, dtype=torch.uint8, device="cpu")

        return cls._label(model, label, part, "layer_halves", "fully connected layer")

    @classmethod
    def random(
        cls, model: nn.Module, part: Part | None = None, *, p: float = 0.5, by: str = "element", seed: int = 0
    ) -> "Partition":
        """Each weight ("element") or each output unit with all its weights ("unit", as dropout does) draws its block.

        Args:
            p: the probability of block 1.
            by: "element" or "unit".
            seed: of the draw; the same on every machine.
        """
        if not 0 <= p <= 1:
            raise ValueError(f"p must be a probability, got {p}")
        if by not in ("element", "unit"):
            raise ValueError(f"by must be 'element' or 'unit', got {by!r}")
        generator = torch.Generator().manual_seed(seed)

        def label(name: str, owner: nn.Module, w: Tensor) -> Tensor | None:
            if w.dim() < 2:
                return None
            shape = w.shape if by == "element" else (len(w), *[1] * (w.dim() - 1))
            return 2 - (torch.rand(shape, generator=generator, device="cpu") < p).byte()

        return cls._label(model, label, part, "random", "weight of two or more dimensions")

    @classmethod
    def own(cls, model: nn.Module, labels: Mapping[str, Tensor | int]) -> "Partition":
        """Labels of your own: for each parameter's name a number, or a uint8 tensor that broadcasts to its shape.

        Parameters that are not named get label 0.
        """
        known = trainable(model)
        for name in labels:
            if name not in known:
                raise ValueError(f"labels name {name!r}, which is no trainable parameter; there are {', '.join(known)}")

        def label(name: str, owner: nn.Module, p: Tensor) -> Tensor | None:
            return torch.as_tensor(labels[name], dtype=torch.uint8) if name in labels else None

        return cls._label(model, label, None, "own", None)

    @classmethod
    def make(cls, model: nn.Module, spec: "str | Partition | Mapping[str, Tensor | int]") -> "Partition":
        """What `Replicas` takes as `partition`: a Partition, labels by name, or one of the names in `BY_NAME`."""
        if isinstance(spec, Partition):
            if spec.layout != Layout.of(model):
                raise ValueError("partition was made for another model: names, shapes or memory formats differ")
            return spec
        if isinstance(spec, Mapping):
            return cls.own(model, spec)
        if spec not in BY_NAME:
            raise ValueError(f"partition must be one of {', '.join(BY_NAME)}, got {spec!r}")
        return BY_NAME[spec](model)

    @classmethod
    def _label(
        cls,
        model: nn.Module,
        label: Callable[[str, nn.Module, Tensor], Tensor | None],
        part: Part | None,
        maker: str,
        wanted: str | None,
    ) -> "Partition":
        """Asks `label` for each trainable parameter; None is 0 throughout. `wanted` names what there must be one of."""
        layout = Layout.of(model)
        inside = _part(model, part)
        flat = torch.zeros(layout.numel, dtype=torch.uint8, device="cpu")
        parameters, owners, found = trainable(model), owners_of(model), False
        for i, (name, view) in enumerate(zip(layout.names, layout.views(flat), strict=True)):
            parameter = parameters[name]
            labels = label(name, owners[id(parameter)], parameter.detach()) if inside(name) else None
            if labels is None or not view.numel():
                continue
            found = True
            try:
                view.copy_(labels.expand(view.shape))
            except RuntimeError:
                raise ValueError(
                    f"labels of {name!r} have shape {tuple(labels.shape)}, which does not broadcast to {tuple(view.shape)}"
                ) from None
            end = layout.offsets[i] + view.numel()
            flat[end : layout.tiles(i).stop * TILE] = flat[end - 1]  # so that a tile's padding does not mix it
        if wanted and not found:
            raise ValueError(
                f"partition {maker!r} found no {wanted} in the model" + (f" part {part!r}" if part else "")
            )
        return cls(flat, layout)

    # ------------------------------------------------------------------------------------------------------- uses

    def flat(self) -> Tensor:
        """One label an element, uint8 [numel], in the buffer's order."""
        return expand(self.codes, self.labels, torch.empty(self.numel, device=self.codes.device))[1].byte()

    def by_name(self) -> dict[str, Tensor]:
        """The labels as tensors of the parameters' shapes."""
        layout = self._named()
        return dict(zip(layout.names, layout.views(self.flat()), strict=True))

    def to(self, device: torch.device | str) -> "Partition":
        """This partition with its tensors on a device."""
        if self.codes.device == torch.device(device):
            return self
        moved = object.__new__(Partition)
        moved.numel, moved.layout = self.numel, self.layout
        moved.codes = self.codes.to(device)
        moved.labels = None if self.labels is None else self.labels.to(device)
        return moved

    def describe(self) -> None:
        """Prints a table: tensor, shape, and how many of its elements have each label."""
        print(self.table())

    def table(self) -> str:
        """What `describe` prints."""
        rows = [
            (
                name,
                "×".join(map(str, labels.shape)) or "scalar",
                *torch.bincount(labels.flatten(), minlength=3).tolist(),
            )
            for name, labels in self.by_name().items()
        ]
        rows.append(("total", "", *(sum(row[c] for row in rows) for c in (2, 3, 4))))
        table = [("tensor", "shape", "0 coupled", "1 anchored in θ", "2 anchored in η")]
        table += [(name, shape, *(f"{c:,}" for c in counts)) for name, shape, *counts in rows]
        widths = [max(len(row[c]) for row in table) for c in range(5)]
        return "\n".join(
            "  ".join(
                cell.ljust(w) if c < 2 else cell.rjust(w) for c, (cell, w) in enumerate(zip(row, widths, strict=True))
            )
            for row in table
        )

    def _named(self) -> Layout:
        if self.layout is None:
            raise ValueError("this Partition was made from bare labels and knows no parameters")
        return self.layout

    def __repr__(self) -> str:
        mixed = 0 if self.labels is None else len(self.labels)
        return f"Partition({self.numel:,} elements, {len(self.codes):,} tiles, {mixed:,} of them mixed)"


def owners_of(model: nn.Module) -> dict[int, nn.Module]:
    """The first module that holds each parameter, by the parameter's id."""
    owners: dict[int, nn.Module] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), module)
    return owners


def _part(model: nn.Module, part: Part | None) -> Callable[[str], bool]:
    if part is None:
        return lambda name: True
    if callable(part):
        return part
    kinds: dict[str, type] = {"conv": nn.modules.conv._ConvNd, "classifier": nn.Linear}
    if part not in kinds:
        raise ValueError(f"part must be one of {', '.join(kinds)}, or a function of a name, got {part!r}")
    owners = owners_of(model)
    inside: Iterable[str] = {n for n, p in trainable(model).items() if isinstance(owners[id(p)], kinds[part])}
    return lambda name: name in inside


BY_NAME: dict[str, Callable[..., Partition]] = {
    "conv_halves": Partition.conv_halves,
    "layer_halves": Partition.layer_halves,
    "random": Partition.random,
    "random_units": lambda model, part=None, **options: Partition.random(model, part, by="unit", **options),
}
