"""Stage 2: the step's bandwidth beside a copy's and a triad's, its DRAM bytes, and its rivals."""

import gc
from functools import partial
from itertools import product
from typing import Any

import torch

import hta_fused as hta
from hta_fused.train.graphs import WARM_UP, Graphed

from .. import measure, rivals, workloads
from ..measure import OURS
from ..rivals import Step
from .counters import dram
from .session import Part, Result, Session, default_device

GRADIENTS = {"float32": None, "bfloat16": torch.bfloat16}
SHARE_OF_THE_ROOF = 0.92
MODEL = {rivals.NAIVE: 20.0, "torch._foreach_*": 5.0, "torch.compile": 1.3}  # what rivals are to take of our time


def parts(session: Session) -> dict[str, Part]:
    counts = (2, 1, 4, 8)
    cases = [(p, g, m) for g, p, m in product(GRADIENTS, rivals.PROPOSALS, counts)]
    if session.rehearsal:
        cases = [("SGD", "float32", 2), ("AdamW", "bfloat16", 2)]
    first = {"VGG16's tensors, SGD, float32, m = 2": partial(model, session)}
    flat_ = {f"one buffer, {p}, {g} gradients, m = {m}": partial(flat, session, p, g, m) for p, g, m in cases}
    counted = {f"DRAM bytes, {b}": partial(dram, session, b) for b in session.backends}
    pair = next(iter(flat_))
    return {**first, pair: flat_.pop(pair), **counted, **flat_}


def model(session: Session) -> Result:
    """On a list of tensors, where rivals pay for each."""
    make = partial(workloads.model, "vgg16")
    if session.rehearsal:
        make = partial(workloads.of_shapes, "two tensors", [torch.Size([16, 8, 3, 3]), torch.Size([16])])
    return timed(session, make, MODEL)


def flat(session: Session, proposal: str, gradients: str, m: int) -> Result:
    make = partial(workloads.flat, 5000 if session.rehearsal else measure.FLAT, copies=m, proposal=proposal,
                   compute_dtype=GRADIENTS[gradients])  # fmt: skip
    return timed(session, make, {"roof": SHARE_OF_THE_ROOF})


def timed(session: Session, make: Any, bounds: dict[str, float]) -> Result:
    """Our step beside all rivals, and in the same rounds each backend's kernels by themselves."""
    with default_device(session.device):
        kernels = {_of(name): replayed(name, make().optimizer) for name in session.backends}
        # A rehearsal does not wait for a compiler.
        names = [
            name for name in (*rivals.COUPLED, rivals.NAIVE) if not (session.rehearsal and name == "torch.compile")
        ]
        result = measure.step(make, 3 if session.rehearsal else 30, names=names, details=False, more=kernels)
        load_bytes, n = result["bytes"][OURS], result["elements"]
        for name in kernels:
            result["bandwidth"][name] = load_bytes * n / result["times"][name][0]
        gc.collect()
    measure.ratio_claims(
        result, {name: bound for name, bound in bounds.items() if name == "roof" or name in result["times"]}
    )
    print(measure.show(result), flush=True)
    return {"measured": result, "rows": rows(result, session.backends), **session.judged(result["claims"])}


def _of(backend: str) -> str:
    return f"{OURS}, {backend}'s kernels"


def replayed(backend: str, optimizer: hta.CoupledOptimizer) -> Step:
    """A backend's step without the host's part in it: a CUDA graph, captured while the backend was chosen; the step as
    it is where there is no GPU."""
    if not measure.on_gpu():
        return optimizer.step

    def refuse(reason: str) -> None:
        raise RuntimeError(f"{backend}: {reason}")

    optimizer.capturable = True
    step = partial(Graphed(torch.device("cuda"), refuse), optimizer.step)
    hta.use_backend(backend)
    try:
        for _ in range(WARM_UP + 1):
            step()
    finally:
        hta.use_backend(None)
    return step


def rows(result: Result, backends: list[str]) -> dict[str, Result]:
    """The page's line: ours, the roof, and each rival's time over ours."""
    times, ours = result["times"], result["times"][OURS][0]
    roof = max(v for name, v in result["bandwidth"].items() if name in measure.ROOFS)
    row = {
        "ms": f"{1e3 * ours:.3g}",
        "GB/s": f"{result['bandwidth'][OURS] / 1e9:.0f}",
        **{f"of the roof, {b}": f"{result['bandwidth'][_of(b)] / roof:.2f}" for b in backends},
    }  # fmt: skip
    short = {"torch._foreach_*": "foreach", "torch.compile": "compile", rivals.NAIVE: "autograd",
             rivals.FLOOR: "uncoupled torch.optim"}  # fmt: skip
    row |= {f"{short[name]} ×": f"{times[name][0] / ours:.2f}" for name in short if name in times}
    return {"": row}
