"""What is timed: the parameter lists of real models, and flat sizes, with the buffers of a coupled step over them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import hta_fused as hta
from hta_fused.train.vgg import CONFIGURATIONS, VGG

from .rivals import PROPOSALS, STEP, Problem


def _vgg(name: str) -> list[torch.Size]:
    with torch.device("meta"):
        return [p.shape for p in VGG(name).parameters()]


def _resnet50() -> list[torch.Size]:
    """torchvision's ResNet-50: 161 tensors, 25.6 million elements."""
    shapes: list[tuple[int, ...]] = []

    def conv(inputs: int, outputs: int, kernel: int) -> None:
        shapes.extend([(outputs, inputs, kernel, kernel), (outputs,), (outputs,)])  # its batch norm with it

    conv(3, 64, 7)
    channels = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            conv(channels, width, 1)
            conv(width, width, 3)
            conv(width, 4 * width, 1)
            if block == 0:
                conv(channels, 4 * width, 1)
            channels = 4 * width
    shapes.extend([(1000, channels), (1000,)])
    return [torch.Size(s) for s in shapes]


def _transformer() -> list[torch.Size]:
    """GPT-2 small: 148 tensors, 124 million elements."""
    d = 768
    block: list[tuple[int, ...]] = [(d,), (d,), (3 * d, d), (3 * d,), (d, d), (d,), (d,), (d,)]
    block += [(4 * d, d), (4 * d,), (d, 4 * d), (d,)]
    return [torch.Size(s) for s in [(50257, d), (1024, d), *12 * block, (d,), (d,)]]


MODELS: dict[str, Callable[[], list[torch.Size]]] = {
    **{name: (lambda name=name: _vgg(name)) for name in CONFIGURATIONS},  # type: ignore[misc]
    "resnet50": _resnet50,
    "transformer-124m": _transformer,
}


def streams_of(optimizer: hta.CoupledOptimizer) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """The flat buffers, [copies, N] or [N], that a step changes, those that it only reads, and those that it only writes."""
    replicas, masters = optimizer.replicas, optimizer.replicas.masters
    changed = [masters.rows, masters.corrections, *optimizer._buffers.values(), *optimizer._scales.values()]

    def there(buffers: list[Tensor | None]) -> list[Tensor]:
        return [t for t in buffers if t is not None]

    return there(changed), there([replicas.grads, replicas.anchor]), there([masters.low])


def moved(optimizer: hta.CoupledOptimizer) -> float:
    """Bytes for each element of a copy that pass where every stream is read or written, and those that change both."""
    changed, read, written = streams_of(optimizer)
    return sum(t.nbytes for t in [*changed, *changed, *read, *written]) / optimizer.replicas.layout.numel


@dataclass
class Workload:
    """Our optimizer over a list of tensors, and the same memory as the rivals see it."""

    name: str
    optimizer: hta.CoupledOptimizer
    problem: Problem

    @property
    def copies(self) -> int:
        return len(self.problem.copies)

    @property
    def elements(self) -> int:
        """Of one copy."""
        return sum(t.numel() for t in self.problem.copies[0])

    @property
    def streams(self) -> tuple[list[Tensor], list[Tensor]]:
        """The flat buffers that a step changes, and those that it only reads."""
        return streams_of(self.optimizer)[:2]

    @property
    def held(self) -> float:
        """Bytes of all streams for each element of a copy; those in low precision, written only, too."""
        return sum(t.nbytes for part in streams_of(self.optimizer) for t in part) / self._padded

    @property
    def moved(self) -> float:
        """As the function of this name."""
        return moved(self.optimizer)

    @property
    def _padded(self) -> int:
        return self.optimizer.replicas.layout.numel

    @property
    def bytes_per_element(self) -> float:
        """What our step has to move for each element of all copies, guard left out: see csrc/args.h."""
        labels = self.optimizer.replicas.partition.labels
        mixed = 0.0 if labels is None else labels.numel() / self.elements
        per_tile = 8 / 1024 + 24 / (16 * 1024)  # a code read for each tile, three sums written for each chunk
        return self.moved + mixed + per_tile

    def rewind(self) -> None:
        """The next step is rivals.STEP again."""
        self.optimizer._set_steps(STEP - 1)


def of_shapes(
    name: str,
    shapes: list[torch.Size],
    *,
    copies: int = 2,
    proposal: str = "SGD",
    anchor: bool = True,
    labels: str = "structural",
    dtype: torch.dtype = torch.float32,
    compute_dtype: torch.dtype | None = None,
) -> Workload:
    """Tensors of the given shapes in m coupled copies; those of two or more dimensions are cut into m blocks
    ("structural"), or their elements have labels of their own ("random" bytes, or "hashed"). With a `compute_dtype` the
    gradients are in it, and the step writes copies in it too.

    Rivals get views of the same buffers, a tensor of m blocks as m: no rival has to look structural labels up. One copy
    has nothing to be coupled to, and is pulled to the anchor.
    """
    torch.manual_seed(0)
    model = nn.ParameterList(0.05 * torch.randn(shape, dtype=dtype) for shape in shapes)
    only_vectors = all(len(shape) < 2 for shape in shapes)
    large = {str(i): p for i, p in enumerate(model) if p.dim() >= 2 or only_vectors}
    partition: hta.Partition | dict[str, Tensor]
    if labels == "hashed":
        partition = hta.Partition.hashed(model, blocks=copies)
        by_name = partition.by_name()
    elif labels == "random":
        by_name = partition = {
            name: torch.randint(0, copies + 1, p.shape, dtype=torch.uint8) for name, p in large.items()
        }
    else:
        blocks = {name: torch.arange(len(p)) * copies // max(1, len(p)) + 1 for name, p in large.items()}
        partition = {name: b.byte().view(-1, *[1] * (large[name].dim() - 1)) for name, b in blocks.items()}
    replicas = hta.Replicas(model, copies, partition, "init" if anchor else "zero", compute_dtype=compute_dtype)
    coupling = hta.Homotopy(0.01) if copies > 1 else hta.Toward(0.01)
    optimizer = hta.CoupledOptimizer(replicas, PROPOSALS[proposal], coupling, skip_nonfinite=False)
    states = [row for name, buffer in optimizer._buffers.items() if name != "exp_avg_sq" for row in buffer]
    noise = [*replicas.params[1:], *replicas.grads, *states, *([] if replicas.anchor is None else [replicas.anchor])]
    for flat in noise:
        for view in replicas.layout.views(flat):  # the padding stays 0
            view.add_(torch.randn_like(view), alpha=1e-2 if flat is replicas.anchor else 1e-3)
    for flat in optimizer._buffers.get("exp_avg_sq", ()):
        for view in replicas.layout.views(flat):
            view.fill_(1e-6)

    # The rivals' own: what is written to ours by others counts as a change of the parameters.
    low = None if replicas.low is None else torch.empty_like(replicas.low)
    replicas.written()

    def wholes(flat: Tensor) -> list[Tensor]:
        return replicas.layout.views(flat)

    kinds: list[int | Tensor] = []
    cuts: list[list[int]] = []  # the lengths of each tensor's pieces
    for i, shape in enumerate(shapes):
        if str(i) in large and labels == "structural":
            own, lengths = blocks[str(i)].unique_consecutive(return_counts=True)
            kinds += own.tolist()
            cuts.append(lengths.tolist())
        else:
            kinds.append(by_name[str(i)] if str(i) in large else 0)
            cuts.append(list(shape[:1]))

    def pieces(flat: Tensor) -> list[Tensor]:
        return [piece for view, lengths in zip(wholes(flat), cuts, strict=True) for piece in view.split(lengths)]

    def lists(
        cut: Callable[[Tensor], list[Tensor]], kinds: list[int | Tensor], whole: Problem | None = None
    ) -> Problem:
        rows = [[cut(row) for row in buffer] for buffer in (replicas.params, replicas.grads)]
        states = {name: [cut(row) for row in buffer] for name, buffer in optimizer._buffers.items()}
        anchors = None if replicas.anchor is None else cut(replicas.anchor)
        cut_low = None if low is None else [cut(row) for row in low]
        return Problem(PROPOSALS[proposal], coupling, rows[0], rows[1], states, anchors, kinds, whole, cut_low)

    load = Workload(name, optimizer, lists(pieces, kinds, lists(wholes, [0] * len(shapes))))
    load.rewind()
    return load


def model(name: str, **options) -> Workload:
    """One of MODELS."""
    return of_shapes(name, MODELS[name](), **options)


def flat(elements: int, **options) -> Workload:
    """One tensor."""
    shape = [1, elements] if options.get("labels") == "hashed" else [elements]  # only matrices are hashed
    return of_shapes("one buffer", [torch.Size(shape)], **options)
