"""The coupled step over buffers in formats of their own: its bytes, instructions, time, and a training step's memory.

A step's floor is its bytes; where it takes longer than they do, it is its arithmetic that is waited for.
"""

import gc
import multiprocessing
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hta_fused as hta
from hta_fused.kernels import BACKENDS
from hta_fused.kernels.formats import TILE
from hta_fused.train.vgg import VGG

from . import instructions, measure, rivals, workloads

FULL, LOW, SPLIT, SPLIT_16, SPLIT_8 = (
    "float32",
    "bfloat16 gradients and copies, float32 masters",
    "split masters",
    "split masters, bfloat16 states and anchor",
    "split masters, 8-bit states, bfloat16 anchor",
)
FORMATS: dict[str, dict[str, Any]] = {
    FULL: {},
    LOW: {"compute_dtype": torch.bfloat16},
    SPLIT: {"compute_dtype": torch.bfloat16, "master_format": "split"},
    SPLIT_16: {"compute_dtype": torch.bfloat16, "master_format": "split", "anchor_format": "bfloat16", "state_format": "bfloat16"},
    SPLIT_8: {"compute_dtype": torch.bfloat16, "master_format": "split", "anchor_format": "bfloat16", "state_format": "8bit"},
}  # fmt: skip
COMPILED = "torch.compile"
SMALL, LARGE = 4, 12  # tiles of the buffers whose instructions are counted


def optimizer_of(
    model: nn.Module, copies: int, proposal: str, formats: dict[str, Any], partition: Any = "auto"
) -> hta.CoupledOptimizer:
    """Copies of a model in these formats, coupled by homotopy."""
    options = {k: v for k, v in formats.items() if k != "state_format"}
    replicas = hta.Replicas(model, copies, partition, **options)
    return hta.CoupledOptimizer(
        replicas, rivals.PROPOSALS[proposal], hta.Homotopy(0.01), skip_nonfinite=False,
        state_format=formats.get("state_format", "full"),
    )  # fmt: skip


def flat(elements: int, copies: int, proposal: str, formats: dict[str, Any]) -> hta.CoupledOptimizer:
    """The optimizer of one tensor, cut into a block for each copy, with gradients."""
    model = nn.ParameterList([0.05 * torch.randn(copies, elements // copies)])
    optimizer = optimizer_of(model, copies, proposal, formats, {"0": torch.arange(1, copies + 1).byte()[:, None]})
    optimizer.replicas.grads.normal_(std=1e-3)
    optimizer.step()
    return optimizer


def table(counts: list[int], proposals: list[str]) -> dict[str, Any]:
    """Bytes that a step moves for each element, by format, proposal and number of copies."""
    rows = []
    for name, formats in FORMATS.items():
        row: dict[str, Any] = {"format": name}
        for proposal in proposals:
            for m in counts:
                optimizer = optimizer_of(nn.Linear(256, 64, bias=False), m, proposal, formats)
                row[f"{proposal}, m = {m}"] = f"{workloads.moved(optimizer):.2f}"
        rows.append(row)
    return {"title": "Bytes an element, by format, proposal and copies", "rows": rows}


def countable() -> bool:
    """Whether there is an extension whose instructions can be counted."""
    return hta.backends()["cpu"].startswith("available") and instructions.available()


def per_element(name: str, proposal: str, copies: int, isa: str) -> float:
    """Instructions of a step for each element of each copy, by one of HTA_ISA's instruction sets.

    What the op executes whatever its size drops out: two sizes are counted, and their difference divided.
    """
    code = f"from {__package__} import formats; formats._traced({name!r}, {proposal!r}, {copies})"
    small, large = instructions.counted(code, 2, HTA_ISA=isa)
    return (large - small) / ((LARGE - SMALL) * TILE * copies)


def _traced(name: str, proposal: str, copies: int) -> None:
    ops, calls = BACKENDS["cpu"].ops, []
    op = ops.step_

    def noted(*arguments: Any) -> None:  # the op alone: what Python does around it takes longer than to count
        op(*arguments)
        calls.append(partial(op, *arguments))

    ops.step_ = noted
    for tiles in (SMALL, LARGE):
        flat(tiles * TILE, copies, proposal, FORMATS[name])
    instructions.traced(calls)


def counts(copies: int, proposals: list[str]) -> dict[str, Any]:
    """Instructions for each element of each copy, with AVX2 and with the CPU's widest registers."""
    widest = hta.backends()["cpu"].removeprefix("available (").removesuffix(")")
    rows = []
    for name in FORMATS:
        row: dict[str, Any] = {"format": name}
        for proposal in proposals:
            for isa in dict.fromkeys(("avx2" if widest == "avx512" else widest, widest)):
                row[f"{proposal}, {isa}"] = f"{per_element(name, proposal, copies, isa):.2f}"
        rows.append(row)
    return {"title": f"Instructions for each element of each of {copies} copies", "rows": rows}


def steps(copies: int, proposal: str, elements: int, rounds: int) -> dict[str, Any]:
    """The step in every format, and torch.compile of the same update over float32 and over float32 masters."""
    gc.collect()
    times: dict[str, Callable[[], Any]] = {}
    bytes_: dict[str, float] = {}
    for name, formats in FORMATS.items():
        optimizer = flat(elements, copies, proposal, formats)
        times[name], bytes_[name] = optimizer.step, workloads.moved(optimizer)
    for name, compute_dtype in ((FULL, None), (LOW, torch.bfloat16)):
        load = workloads.flat(elements, copies=copies, proposal=proposal, compute_dtype=compute_dtype)
        times[f"{COMPILED}: {name}"] = rivals.compiled(load.problem)
        bytes_[f"{COMPILED}: {name}"] = load.moved
    taken = measure.measure(times, rounds)
    return {
        "title": f"Formats, {copies} copies, {elements / 1e6:.1f} M elements, {proposal}",
        "base": FULL,
        "times": taken,
        "ratios": taken.all_over(FULL),
        "bytes": bytes_,
        "bandwidth": {name: bytes_[name] * elements / taken[name][0] for name in times},
    }


# -------------------------------------------------------------------------------------------------------------- memory


class Transformer(nn.Module):
    """GPT-2 small, 124 M: torch's own layers, the embedding tied to the head."""

    def __init__(self, words: int = 50257, width: int = 768, layers: int = 12, length: int = 1024):
        super().__init__()
        self.embedding, self.places = nn.Embedding(words, width), nn.Embedding(length, width)
        layer = nn.TransformerEncoderLayer(
            width, width // 64, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length, dtype=self.places.weight.dtype)
        hidden = self.embedding(x) + self.places.weight[:length]
        return F.linear(self.layers(hidden, mask, is_causal=True), self.embedding.weight)


def _vgg16() -> tuple[nn.Module, Tensor, Tensor]:
    return VGG("vgg16"), torch.randn(8, 3, 32, 32), torch.randint(10, (8,))


def _transformer() -> tuple[nn.Module, Tensor, Tensor]:
    return Transformer(), torch.randint(50257, (1, 16)), torch.randint(50257, (1, 16))


# Few images and words, so that what is kept, and not what passes through, is most of the memory.
TASKS: dict[str, Callable[[], tuple[nn.Module, Tensor, Tensor]]] = {"vgg16": _vgg16, "transformer-124m": _transformer}


def _held(peak: bool) -> int:
    """Bytes of memory that this process holds, or has held at most. (getrusage's counts the parent's too.)"""
    line = re.search(
        rf"^{'VmHWM' if peak else 'VmRSS'}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE
    )
    assert line is not None
    return 1024 * int(line[1])


def _peak(task: str, copies: int, proposal: str, formats: dict[str, Any], answer: Any) -> None:
    """Sends the most memory that a whole training step held, and what of it lies in flat buffers; in a process of its own."""
    before = _held(peak=False)
    model, x, y = TASKS[task]()
    optimizer = optimizer_of(model, copies, proposal, formats)
    replicas = optimizer.replicas
    dtype = replicas.compute_dtype or torch.float32
    x = x.to(dtype) if x.is_floating_point() else x

    def loss(net: nn.Module) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            return F.cross_entropy(net(x).flatten(0, -2).float(), y.flatten())

    for _ in range(2):
        Path("/proc/self/clear_refs").write_text("5")  # begins the peak anew: to make the copies takes more than a step
        optimizer.zero_grad()
        replicas.backward(loss)
        optimizer.step()
    flat = [t for part in workloads.streams_of(optimizer) for t in part]
    answer.send((_held(peak=True) - before, sum(t.nbytes for t in flat)))


def memory(task: str, copies: int, proposal: str) -> dict[str, Any]:
    """Peak memory of a whole training step in each format, each measured in a process of its own."""
    rows = []
    for name, formats in FORMATS.items():
        mine, theirs = multiprocessing.get_context("spawn").Pipe()
        process = multiprocessing.get_context("spawn").Process(
            target=partial(_peak, task, copies, proposal, formats, theirs)
        )
        process.start()
        theirs.close()
        try:
            peak, flat = mine.recv()
        except EOFError:
            raise RuntimeError(f"the process that measured {task} ended with exit code {process.exitcode}") from None
        finally:
            process.join()
        rows.append(
            {
                "format": name,
                measure.PEAK: f"{peak / 1e6:.0f}",
                "buffers of all copies, MB": f"{flat / 1e6:.0f}",
            }
        )
    return {"title": f"Memory, {task}, {copies} copies, {proposal}", "rows": rows}
