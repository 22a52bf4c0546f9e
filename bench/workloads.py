"""What is timed: the parameter lists of real models, and flat sizes, with the buffers of a coupled step over them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import hta_fused as hta
from hta_fused.train.vgg import CONFIGURATIONS, VGG

from .rivals import LR, MOMENTUM, WEIGHT_DECAY, Problem


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


@dataclass
class Workload:
    """Our optimizer over a list of tensors, and the same memory as the rivals see it."""

    name: str
    optimizer: hta.HomotopySGD
    problem: Problem

    @property
    def elements(self) -> int:
        return sum(t.numel() for t in self.problem.theta)

    @property
    def bytes_per_element(self) -> float:
        """What our step has to move for each element, guard left out: see csrc/homotopy.h."""
        size = self.problem.theta[0].element_size()
        labels = self.optimizer.replicas.partition.labels
        mixed = 0.0 if labels is None else labels.numel() / self.elements
        per_tile = 8 / 1024 + 24 / (16 * 1024)  # a code read for each tile, three sums written for each chunk
        return (11 if self.problem.anchor is not None else 10) * size + mixed + per_tile

    @property
    def flat(self) -> list[Tensor]:
        """Our flat buffers that a step changes."""
        return [*self.optimizer.replicas.params, *self.optimizer._momentum]


def of_shapes(
    name: str,
    shapes: list[torch.Size],
    *,
    anchor: bool = True,
    labels: str = "structural",
    dtype: torch.dtype = torch.float32,
    L: float = 0.01,
    mode: str = "implicit",
) -> Workload:
    """Tensors of the given shapes; those of two or more dimensions are half block 1, half block 2, or random.

    Rivals get views of the same buffers, a half-and-half tensor as two: no rival has to look structural labels up.
    """
    torch.manual_seed(0)
    model = nn.ParameterList(0.05 * torch.randn(shape, dtype=dtype) for shape in shapes)
    only_vectors = all(len(shape) < 2 for shape in shapes)
    large = {str(i): p for i, p in enumerate(model) if p.dim() >= 2 or only_vectors}
    if labels == "structural":
        halves = {name: (1 + (torch.arange(len(p)) >= len(p) // 2).byte()) for name, p in large.items()}
        by_name = {name: half.view(-1, *[1] * (large[name].dim() - 1)) for name, half in halves.items()}
    else:
        by_name = {name: torch.randint(0, 3, p.shape, dtype=torch.uint8) for name, p in large.items()}
    replicas = hta.Replicas(model, by_name, "init" if anchor else "zero")
    optimizer = hta.HomotopySGD(replicas, LR, MOMENTUM, WEIGHT_DECAY, L=L, mode=mode, skip_nonfinite=False)
    noise = [(replicas.params[1], 1e-3), *((row, 1e-3) for row in (*replicas.grads, *optimizer._momentum))]
    if replicas.anchor is not None:
        noise.append((replicas.anchor, 1e-2))
    for flat, scale in noise:
        for view in replicas.layout.views(flat):  # the padding stays 0
            view.add_(torch.randn_like(view), alpha=scale)

    def wholes(flat: Tensor) -> list[Tensor]:
        return replicas.layout.views(flat)

    def pieces(flat: Tensor) -> list[Tensor]:
        result = []
        for i, view in enumerate(wholes(flat)):
            whole = labels == "random" or str(i) not in large
            result += [view] if whole else [view[: len(view) // 2], view[len(view) // 2 :]]
        return result

    def lists(
        cut: Callable[[Tensor], list[Tensor]], kinds: list[int | Tensor], whole: Problem | None = None
    ) -> Problem:
        (theta, eta), grads, momenta = replicas.params, replicas.grads, optimizer._momentum
        anchors = None if replicas.anchor is None else cut(replicas.anchor)
        both = [(cut(row[0]), cut(row[1])) for row in (grads, momenta)]
        return Problem(cut(theta), cut(eta), both[0], both[1], anchors, kinds, L, whole)

    kinds: list[int | Tensor] = []
    for i in range(len(shapes)):
        if str(i) not in large:
            kinds.append(0)
        elif labels == "random":
            kinds.append(by_name[str(i)])
        else:
            kinds += [1, 2]
    problem = lists(pieces, kinds, lists(wholes, [0] * len(shapes)))
    return Workload(name, optimizer, problem)


def model(name: str, **options) -> Workload:
    """One of MODELS."""
    return of_shapes(name, MODELS[name](), **options)


def flat(elements: int, **options) -> Workload:
    """One tensor."""
    return of_shapes("one buffer", [torch.Size([elements])], **options)
