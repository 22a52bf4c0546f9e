"""Launches each kernel of a backend, in each of its shapes (Triton's in some), once: what compute-sanitizer watches.

python -m bench.gpu.launches BACKEND DEVICE
"""

import sys
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

import hta_fused as hta
from hta_fused import kernels, ops
from hta_fused.couplings import Coupling
from hta_fused.kernels.reference import HASHED, PROPOSE, SHARE
from hta_fused.rules import rules_of
from hta_fused.train import data

from .session import LEFT_OUT, default_device

F32, F64, F16, BF16 = torch.float32, torch.float64, torch.float16, torch.bfloat16


@dataclass(frozen=True)
class Shapes:
    """What the kernels are launched over: all combinations."""

    copies: tuple[int, ...] = (1, 2, 3, 5, 9)  # a pair's kernel, four, eight, and row by row
    labels: tuple[str, ...] = ("structural", "bytes", "hashed")
    guards: tuple[bool, ...] = (False, True)  # against gradients that are not finite
    dtypes: tuple[tuple[torch.dtype, torch.dtype | None], ...] = (  # of the copies, and of low gradients
        (F32, None), (F64, None), (F32, BF16), (BF16, None), (F32, F16), (F16, None),
    )  # fmt: skip


ALL = Shapes()
# Triton compiles a kernel for each combination, for seconds.
FEW = Shapes((2, 9), ("bytes", "hashed"), (True,), ((F32, None), (F32, BF16)))
PROPOSALS: tuple[hta.SGD | hta.AdamW, ...] = (hta.SGD(0.1, 0.9, 1e-3), hta.AdamW(0.01, weight_decay=0.1))
COUPLINGS: tuple[Coupling, ...] = (hta.Homotopy(0.05), hta.Explicit(0.5), hta.Elastic(0.05))
SIZE = 16 * 1024 + 1025  # more than one chunk, and an end within a tile


def labels_of(kind: str, m: int) -> Tensor | hta.Partition:
    runs = (torch.arange(SIZE) // 2500 % (m + 1)).byte()  # tiles of one label, and mixed ones between
    if kind == "bytes":
        return runs
    partition = hta.Partition(runs, blocks=m)
    if kind == "hashed":  # every second tile, beside tiles of one label and tiles of bytes
        partition.codes[::2, 1] = HASHED
        partition.seed = torch.tensor([7])
    return partition


def steps(shapes: Shapes, dtype: torch.dtype, low: torch.dtype | None) -> None:
    """Whole steps."""
    for m, proposal, coupling, kind in product(shapes.copies, PROPOSALS, COUPLINGS, shapes.labels):
        copies, states = torch.randn(m, SIZE).to(dtype), [torch.rand(m, SIZE).to(dtype) for _ in proposal.buffers]
        more = {} if low is None else {"low": torch.zeros(m, SIZE, dtype=low)}
        for guard in shapes.guards:
            hta.coupled_step_(
                copies, torch.randn(m, SIZE).to(low or dtype), states, torch.randn(SIZE).to(dtype), labels_of(kind, m),
                proposal=proposal, coupling=coupling, step=3, skip_nonfinite=guard, **more,
            )  # fmt: skip
        if not copies.isfinite().all():
            raise AssertionError(f"{m} copies, {proposal}, {coupling}, labels {kind}: not finite")


def phases(shapes: Shapes) -> None:
    """A step cut at its sum, as one copy for each process does it."""
    for m, proposal, kind in product(shapes.copies, PROPOSALS, shapes.labels):
        copies, grads, sums = torch.randn(m, SIZE), torch.randn(m, SIZE), torch.zeros(SIZE)
        states = [torch.rand(m, SIZE) for _ in proposal.buffers]
        anchor, stats = torch.randn(SIZE), torch.zeros(4, dtype=torch.float64)
        pattern = ops._pattern(labels_of(kind, m), copies[0], m)
        rules = rules_of(proposal, COUPLINGS[0], m, 3)[None].to(anchor)
        for phase in (PROPOSE, SHARE):
            given = ([grads], states) if phase == PROPOSE else ([], [])
            kernels.kernels(copies).step_([copies], *given, [], anchor, None, sums, *pattern, rules, None, None, stats,
                                          proposal.kernel, False, False, phase, [], [], None)  # fmt: skip


def penalties(shapes: Shapes) -> None:
    for m, kind, dtype in product(shapes.copies, shapes.labels, (F32, F64)):
        copies, anchor = torch.randn(m, SIZE, dtype=dtype), torch.randn(SIZE, dtype=dtype)
        pattern = ops._pattern(labels_of(kind, m), copies[0], m)
        rules = rules_of(hta.SGD(1.0), hta.Explicit(0.3), m)[None].to(anchor)
        kernel = kernels.kernels(anchor)
        kernel.penalty([copies], anchor, *pattern, rules)
        kernel.penalty_accumulate_([torch.zeros_like(copies)], [copies], anchor, *pattern, rules)


def batches(device: str, low: bool) -> None:
    images = data.synthetic(50, 8)
    for dtype in (F32, BF16, F16)[: 3 if low else 1]:
        for layout in (torch.contiguous_format, torch.channels_last):
            for _ in data.Batches(images, 32, 0, device, layout, dtype).epoch(0):
                pass


def main(backend: str, device: str) -> None:
    state = hta.backends()[backend]
    if not state.startswith("available"):
        print(f"{backend}: {state}")
        sys.exit(LEFT_OUT)
    hta.use_backend(backend)
    torch.manual_seed(0)
    shapes = FEW if backend == "triton" else ALL
    low = device != "cpu"  # the CPU's kernels take none
    with default_device(device):
        for dtype, grads in shapes.dtypes if low else shapes.dtypes[:2]:
            steps(shapes, dtype, grads)
        phases(shapes)
        penalties(shapes)
    batches(device, low)
    if device != "cpu":
        torch.cuda.synchronize()
    print(f"{backend}: every kernel launched")


if __name__ == "__main__":
    main(*sys.argv[1:])
