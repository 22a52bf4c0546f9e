"""Which block each trainable element of a model belongs to.

A `Partition` gives each element of a flat buffer a label: 0 coupled only, b ≥ 1 for block b, on which one copy is free
and the others are anchored (couplings.free_block; for two copies label 1 is anchored in θ, label 2 in η). Long runs of
one label cost nothing: a code for each tile of 1024 elements says it. Tiles that mix labels keep a byte an element, or
draw labels by a hash of (seed, element), which costs nothing either and can be drawn anew at every step.
"""

import copy
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from .checks import choice, number, shown, whole
from .kernels.reference import HASHED, TILE, expand
from .layout import Layout, owners_of, trainable

Part = str | Callable[[str], bool]

_CONVOLUTION = nn.modules.conv._ConvNd
_NO_LAYER = (_CONVOLUTION, nn.Embedding, nn.EmbeddingBag, nn.LayerNorm, nn.RMSNorm)  # though they may hold 2-D weights


class Partition:
    """The label of each element of a flat buffer. Make one with the class methods; they take the model it is for.

    `part` restricts a partition to a part of the model, and labels the rest 0: "conv" (convolutions), "classifier"
    (nn.Linear), or a function of the parameter's name that returns a bool.

    `name` is the class method's that made it ("random_units" for units), or "labels"; `why` is what `auto` decided by.
    """

    def __init__(self, labels: Tensor, layout: Layout | None = None, *, blocks: int | None = None):
        """From one label an element: uint8 [N], in the buffer's order; blocks: how many there are (default: the largest
        label, at least 2)."""
        if not isinstance(labels, Tensor) or labels.dtype != torch.uint8 or labels.dim() != 1:
            got = f"{labels.dtype} of shape {tuple(labels.shape)}" if isinstance(labels, Tensor) else shown(labels)
            raise TypeError(f"labels must be a 1-D uint8 tensor, got {got}")
        if layout is not None and not isinstance(layout, Layout):
            raise TypeError(f"layout must be a Layout, got {shown(layout)}")
        if blocks is not None:
            blocks = whole("blocks", blocks, 1, 255)
        if layout is not None and labels.numel() != layout.numel:
            raise ValueError(
                f"labels must be one for each of the layout's {layout.numel} elements, got {labels.numel()}"
            )
        largest = int(labels.amax()) if labels.numel() else 0
        if blocks is not None and largest > blocks:
            raise ValueError(f"labels must be at most {blocks}, the number of blocks, got {largest}")
        self.blocks = max(2, largest) if blocks is None else blocks
        self.numel = labels.numel()
        self.layout = layout
        self.seed: Tensor | None = None  # of the hashed labels
        self.name, self.why = "labels", ""
        missing = -self.numel % TILE
        tiles = torch.cat([labels, labels[-1:].expand(missing)]).view(-1, TILE)
        low = tiles.amin(1) if len(tiles) else tiles.new_empty(0)
        mixed = (low != tiles.amax(1)) if len(tiles) else low.bool()
        code = torch.where(mixed, -mixed.cumsum(0), low.long())
        self.codes = torch.stack([torch.zeros_like(code), code], 1).int().contiguous()
        self.labels: Tensor | None = tiles[mixed].contiguous() if mixed.any() else None

    # ------------------------------------------------------------------------------------------------------ makers

    @classmethod
    def auto(cls, model: nn.Module, part: Part | None = None, *, blocks: int = 2) -> "Partition":
        """The one that fits the model: `conv_blocks` where at least a quarter of the weight layers (convolutions and
        fully connected layers, see `layer_blocks`) are convolutions; else `layer_blocks` where there is a fully connected
        layer for each block; else `random`. With a `part`, its layers alone count."""
        whole("blocks", blocks, 1, 255)
        if not _owners(model, part, lambda owner, p: p.dim() >= 2):
            raise ValueError(
                _found_no("auto", "weight of two or more dimensions", part) + "; give labels by name instead"
            )
        convolutions = len(_owners(model, part, _is_kernel))
        layers = len(_owners(model, part, _is_matrix))
        if convolutions and 3 * convolutions >= layers:
            result = cls.conv_blocks(model, part, blocks=blocks)
        else:
            result = (cls.layer_blocks if layers >= blocks else cls.random)(model, part, blocks=blocks)
        result.why = f"convolutions: {convolutions}, fully connected layers: {layers}, blocks: {blocks}"
        return result

    @classmethod
    def conv_blocks(cls, model: nn.Module, part: Part | None = None, *, blocks: int = 2) -> "Partition":
        """The paper's §2.1: each convolution kernel's output channels in `blocks` runs, one after the other."""

        def label(name: str, owner: nn.Module, p: Tensor) -> Tensor | None:
            if not _is_kernel(owner, p):
                return None
            channels = _output_units(owner, p)
            return _runs(int(channels.amax()) + 1 if channels.numel() else 0, blocks)[channels]

        return cls._label(model, label, part, "conv_blocks", "convolution", blocks)

    @classmethod
    def layer_blocks(cls, model: nn.Module, part: Part | None = None, *, blocks: int = 2) -> "Partition":
        """The paper's §2.2: the weights of the fully connected layers in `blocks` runs of layers, as the model has them.

        A layer is each module that itself holds a trainable 2-D parameter: nn.Linear, but also Hugging Face's Conv1D,
        nn.MultiheadAttention, an LSTM, a linear layer of your own. Not convolutions, embeddings and normalisations; nor a
        layer whose weight is tied to another's before it. (Tables that a module holds as a bare 2-D parameter count.)
        """
        whole("blocks", blocks, 1, 255)
        layers = _owners(model, part, _is_matrix)
        block = dict(zip(layers, _runs(len(layers), blocks), strict=True))

        def label(name: str, owner: nn.Module, p: Tensor) -> Tensor | None:
            return block.get(id(owner)) if _is_matrix(owner, p) else None

        return cls._label(model, label, part, "layer_blocks", "fully connected layer", blocks)

    @classmethod
    def none(cls, model: nn.Module, part: Part | None = None, *, blocks: int = 2) -> "Partition":
        """No blocks: all parameters are coupled and none is anchored."""
        return cls._label(model, lambda name, owner, p: None, part, "none", None, blocks)

    conv_halves, layer_halves = conv_blocks, layer_blocks  # the paper's cases, two blocks

    @classmethod
    def random(
        cls, model: nn.Module, part: Part | None = None, *, p: float | None = None, by: str = "element", seed: int = 0,
        blocks: int = 2,
    ) -> "Partition":  # fmt: skip
        """Each weight ("element") or each output unit with all its weights ("unit", as dropout does) draws its block.

        Args:
            p: the probability of block 1, the others sharing the rest; by default all are equally likely.
            by: "element" or "unit".
            seed: of the draw; the same on every machine.
            blocks: how many there are.
        """
        whole("blocks", blocks, 1, 255)
        p = 1 / blocks if p is None else number("p", p)
        if not 0 <= p <= 1:
            raise ValueError(f"p must be a probability, got {p}")
        choice("by", by, "element", "unit")
        generator = torch.Generator().manual_seed(_seed(seed))

        def label(name: str, owner: nn.Module, w: Tensor) -> Tensor | None:
            if w.dim() < 2:
                return None
            if by == "element":
                drawn = torch.rand(w.shape, generator=generator, device="cpu")
            else:
                units = _output_units(owner, w)
                count = int(units.amax()) + 1 if units.numel() else 0
                drawn = torch.rand(count, generator=generator, device="cpu")[units]
            others = 2 + ((drawn - p) / (1 - p) * (blocks - 1)).clamp(0, max(0, blocks - 2)).byte()
            return torch.where(drawn < p, 1, others).byte() if blocks > 1 else torch.ones_like(drawn).byte()

        maker = "random" if by == "element" else "random_units"
        return cls._label(model, label, part, maker, "weight of two or more dimensions", blocks)

    @classmethod
    def hashed(cls, model: nn.Module, part: Part | None = None, *, seed: int = 0, blocks: int = 2) -> "Partition":
        """Like `random` by element, all blocks equally likely, from a hash of (seed, element) inside the kernels: no
        memory, the same on every backend, and drawn anew by `resample`. (The coupling with dropout, θ̃ = 0.)"""
        whole("blocks", blocks, 1, 255)
        result = cls._label(model, lambda name, owner, p: torch.tensor(255) if p.dim() >= 2 else None, part, "hashed",
                            "weight of two or more dimensions", 255)  # fmt: skip
        result.blocks = int(blocks)
        result.codes[result.codes[:, 1] == 255, 1] = HASHED
        result.seed = torch.tensor([_seed(seed)], dtype=torch.int64, device="cpu")
        return result

    @classmethod
    def own(cls, model: nn.Module, labels: Mapping[str, Tensor | int], *, blocks: int = 2) -> "Partition":
        """Labels of your own: for each parameter's name a number, or a uint8 tensor that broadcasts to its shape.

        Parameters that are not named get label 0.
        """
        known = trainable(model)
        if not isinstance(labels, Mapping):
            raise TypeError(f"labels must map parameters' names to labels, got {shown(labels)}")
        for name, value in labels.items():
            if name not in known:
                raise ValueError(
                    f"labels name {shown(name)}, which is no trainable parameter; there are {', '.join(known)}"
                )
            if not isinstance(value, Tensor):
                whole(f"labels of {name!r}", value, 0, 255)
            elif value.is_complex() or (value.byte() != value).any():
                raise ValueError(f"labels of {name!r} must be whole numbers from 0 to 255, got others in {value.dtype}")

        def label(name: str, owner: nn.Module, p: Tensor) -> Tensor | None:
            return torch.as_tensor(labels[name], dtype=torch.uint8) if name in labels else None

        return cls._label(model, label, None, "own", None, blocks)

    @classmethod
    def make(
        cls, model: nn.Module, spec: "str | Partition | Mapping[str, Tensor | int]", blocks: int = 2
    ) -> "Partition":
        """What `Replicas` takes as `partition`: a Partition, labels by name, or one of the names in `BY_NAME`."""
        if isinstance(spec, Partition):
            if spec.layout != Layout.of(model):
                raise ValueError("partition was made for another model: names, shapes or memory formats differ")
            return spec
        if isinstance(spec, Mapping):
            return cls.own(model, spec, blocks=blocks)
        if not isinstance(spec, str) or spec not in BY_NAME:
            raise ValueError(f"partition must be one of {', '.join(BY_NAME)}, got {shown(spec)}")
        return BY_NAME[spec](model, blocks=blocks)

    @classmethod
    def _label(
        cls,
        model: nn.Module,
        label: Callable[[str, nn.Module, Tensor], Tensor | None],
        part: Part | None,
        maker: str,
        wanted: str | None,
        blocks: int,
    ) -> "Partition":
        """Asks `label` for each trainable parameter; None is 0 throughout. `wanted` names what there must be one of."""
        whole("blocks", blocks, 1, 255)
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
            raise ValueError(_found_no(maker, wanted, part))
        result = cls(flat, layout, blocks=blocks)
        result.name = maker
        return result

    # ------------------------------------------------------------------------------------------------------- uses

    def resample(self, seed: int | None = None) -> None:
        """Draws hashed labels anew: with the next seed, or a given one. In place, so that a captured graph follows."""
        if self.seed is None:
            raise ValueError("resample is for hashed labels; this Partition has none")
        self.seed.add_(1) if seed is None else self.seed.fill_(_seed(seed))

    def with_own_seed(self) -> "Partition":
        """This partition, whose hashed labels are drawn anew for whoever holds it alone."""
        if self.seed is None:
            return self
        own = copy.copy(self)
        own.seed = self.seed.clone()
        return own

    def check_hashed(self, copies: int) -> None:
        """Raises where labels are hashed among other blocks than copies: kernels draw a block for each copy."""
        if self.seed is not None and self.blocks != copies:
            raise ValueError(
                f"partition must have as many hashed blocks as there are copies, {copies}, got {self.blocks}"
            )

    def flat(self) -> Tensor:
        """One label an element, uint8 [numel], in the buffer's order."""
        return expand(self.codes, self.labels, self.seed, self.numel, self.blocks, self.codes.device)[1].byte()

    def by_name(self) -> dict[str, Tensor]:
        """The labels as tensors of the parameters' shapes."""
        layout = self._named()
        return dict(zip(layout.names, layout.views(self.flat()), strict=True))

    def anchored(self, copies: int | None = None) -> tuple[int, ...]:
        """How many elements each copy has anchored: those of the blocks on which another one is free
        (couplings.free_block). By default there are as many copies as blocks."""
        copies = self.blocks if copies is None else whole("copies", copies, self.blocks, 255)
        totals = [sum(column) for column in zip(*self._counts(), strict=True)]
        free = [1 + (j + 1) % copies for j in range(copies)]
        return tuple(sum(n for b, n in enumerate(totals) if b not in (0, f)) for f in free)

    def digest(self) -> Tensor:
        """What tells this partition from others, the same on every machine: int64 [1], on the CPU, a hash of the layout,
        the blocks and the labels. Hashed labels' seed is a state of its own and is not part of it."""
        layout = self.layout and [self.layout.names, self.layout.shapes, self.layout.strides, self.layout.offsets]
        digest = hashlib.sha256(json.dumps([layout, self.numel, self.blocks]).encode())
        digest.update(self.codes[:, 1].cpu().numpy().astype("<i4").tobytes())
        if self.labels is not None:
            digest.update(self.labels.cpu().numpy().tobytes())
        number = int.from_bytes(digest.digest()[:8], "little", signed=True)
        return torch.tensor([number], dtype=torch.int64, device="cpu")

    def to(self, device: torch.device | str) -> "Partition":
        """This partition with its tensors on a device."""
        if self.codes.device == torch.device(device):
            return self
        moved = copy.copy(self)
        moved.codes = self.codes.to(device)
        moved.labels = None if self.labels is None else self.labels.to(device)
        moved.seed = None if self.seed is None else self.seed.to(device)
        return moved

    def describe(self) -> None:
        """Prints a table: tensor, shape, and how many of its elements have each label. Then what made the partition, and
        how many elements each copy has anchored."""
        print(self.table())

    def table(self) -> str:
        """What `describe` prints."""
        layout, counts = self._named(), self._counts()
        shapes = ["×".join(map(str, shape)) or "scalar" for shape in layout.shapes]
        totals = [sum(row[b] for row in counts) for b in range(self.blocks + 1)]
        table = [["tensor", "shape", "0 coupled", *(f"block {b}" for b in range(1, self.blocks + 1))]]
        for name, shape, row in zip([*layout.names, "total"], [*shapes, ""], [*counts, totals], strict=True):
            table.append([name, shape, *(f"{n:,}" for n in row)])
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = [
            "  ".join(
                cell.ljust(w) if c < 2 else cell.rjust(w) for c, (cell, w) in enumerate(zip(row, widths, strict=True))
            )
            for row in table
        ]
        lines.append(f"partition: {self.name}" + (f", chosen by auto ({self.why})" if self.why else ""))
        anchored = ", ".join(f"{n:,} in copy {j}" for j, n in enumerate(self.anchored()))
        return "\n".join([*lines, f"anchored of {sum(totals):,} elements: {anchored}"])

    def _counts(self) -> list[list[int]]:
        """How many elements of each tensor have each label; the padding between tensors does not count."""
        tensors = [self.flat()] if self.layout is None else self.by_name().values()
        return [torch.bincount(labels.flatten().long(), minlength=self.blocks + 1).tolist() for labels in tensors]

    def _named(self) -> Layout:
        if self.layout is None:
            raise ValueError("this Partition was made from bare labels and knows no parameters")
        return self.layout

    def __repr__(self) -> str:
        mixed = 0 if self.labels is None else len(self.labels)
        return f"Partition({self.name}, {self.numel:,} elements, {len(self.codes):,} tiles, {mixed:,} of them mixed)"


def _is_kernel(owner: nn.Module, p: Tensor) -> bool:
    return isinstance(owner, _CONVOLUTION) and p.dim() >= 3


def _output_units(owner: nn.Module, p: Tensor) -> Tensor:
    """The number of the output unit that each element of a weight is of, in a shape that broadcasts to the weight's."""
    more = [1] * (p.dim() - 2)
    if _is_kernel(owner, p) and owner.transposed:  # [inputs, outputs of a group, …]
        inputs, own = p.shape[:2]
        of_group = torch.arange(inputs, device="cpu") // max(1, inputs // int(owner.groups))  # type: ignore[arg-type]
        return (of_group[:, None] * own + torch.arange(own, device="cpu")).view(inputs, own, *more)
    return torch.arange(len(p), device="cpu").view(len(p), 1, *more)


def _is_matrix(owner: nn.Module, p: Tensor) -> bool:
    return p.dim() == 2 and not isinstance(owner, _NO_LAYER)


def _owners(model: nn.Module, part: Part | None, wanted: Callable[[nn.Module, Tensor], bool]) -> list[int]:
    """The ids of the modules that are first to hold a wanted trainable parameter of the part, in the model's order."""
    parameters, owners, inside = trainable(model), owners_of(model), _part(model, part)
    named = [(owners[id(p)], p) for name, p in parameters.items() if inside(name) and p.numel()]
    return list(dict.fromkeys(id(owner) for owner, p in named if wanted(owner, p)))


def _found_no(maker: str, wanted: str, part: Part | None) -> str:
    return f"partition {maker!r} found no {wanted} in the model" + (f" part {part!r}" if part else "")


def _part(model: nn.Module, part: Part | None) -> Callable[[str], bool]:
    if part is None:
        return lambda name: True
    if callable(part):
        return part
    kinds: dict[str, type] = {"conv": _CONVOLUTION, "classifier": nn.Linear}
    if not isinstance(part, str) or part not in kinds:
        raise ValueError(f"part must be one of {', '.join(kinds)}, or a function of a name, got {shown(part)}")
    owners = owners_of(model)
    inside: Iterable[str] = {n for n, p in trainable(model).items() if isinstance(owners[id(p)], kinds[part])}
    return lambda name: name in inside


def _seed(seed: int) -> int:
    return whole("seed", seed, -(2**63), 2**63 - 1)


def _runs(count: int, blocks: int) -> Tensor:
    """Labels of `count` things in `blocks` runs, whose lengths differ by at most one, the later the longer."""
    things = torch.arange(count, device="cpu")
    return (1 + ((things + 1) * blocks - 1) // max(1, count)).byte()


BY_NAME: dict[str, Callable[..., Partition]] = {
    "auto": Partition.auto,
    "conv_blocks": Partition.conv_blocks,
    "layer_blocks": Partition.layer_blocks,
    "random": Partition.random,
    "random_units": partial(Partition.random, by="unit"),
    "hashed": Partition.hashed,
    "none": Partition.none,
    "conv_halves": Partition.conv_blocks,  # the paper's names, of two blocks
    "layer_halves": Partition.layer_blocks,
}
