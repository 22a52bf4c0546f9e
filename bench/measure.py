"""How things are timed: interleaved rounds, every rival checked before it is timed, the roof measured beside them.

Each function returns a result: a dict that JSON holds and `show` turns into a table.
"""

import ctypes
import gc
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import hta_fused as hta
from hta_fused.couplings import Coupling
from hta_fused.paper.report import markdown
from hta_fused.train.report import processor

from . import rivals, workloads
from .rivals import Step
from .workloads import Workload

OURS, GUARDED = "CoupledOptimizer.step", "CoupledOptimizer.step, skipping non-finite steps"


def middle(values: Iterable[float]) -> tuple[float, float]:
    """The median, and the spread: half the interquartile distance."""
    low, median, high = statistics.quantiles(values, n=4)
    return median, (high - low) / 2


class Times(dict[str, tuple[float, float]]):
    """Of each step the median seconds of all rounds, and their spread. Compare steps by `over`: a machine's bandwidth changes
    between rounds, and hardly within one."""

    def __init__(self, rounds: dict[str, list[float]]):
        super().__init__({name: middle(values) for name, values in rounds.items()})
        self.rounds = rounds

    def over(self, a: str, b: str) -> tuple[float, float]:
        """The median, and the spread, of single rounds' ratios."""
        return middle(x / y for x, y in zip(self.rounds[a], self.rounds[b], strict=True))

    def all_over(self, base: str) -> dict[str, tuple[float, float]]:
        return {name: self.over(name, base) for name in self.rounds}


def on_gpu() -> bool:
    """Whether what is made without naming a device, and so what is measured, is on a GPU."""
    return torch.get_default_device().type == "cuda"


def machine() -> dict[str, Any]:
    """What every result carries."""
    return {
        "processor": torch.cuda.get_device_name() if on_gpu() else processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "backend": hta.backends(),
        "date": date.today().isoformat(),
    }


def seconds_of(step: Callable[[], Any], repeats: int, gpu: bool) -> float:
    """The time of one of `repeats` steps; on a GPU, between events on its stream; elsewhere, as it says itself."""
    if isinstance(step, Elsewhere):
        return step.seconds(repeats)
    if not gpu:
        start = time.perf_counter()
        for _ in range(repeats):
            step()
        return (time.perf_counter() - start) / repeats
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(repeats):
        step()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / repeats


def measure(
    steps: dict[str, Callable[[], Any]],
    rounds: int,
    before: dict[str, Callable[[], Any]] | None = None,
    gpu: bool | None = None,
) -> Times:
    """Each step's seconds over interleaved rounds.

    A step shorter than a millisecond is repeated within a round until it is not. `before` runs untimed, and so does each
    step itself once before its turn, unless it is long: none pays for the caches and sleeping threads of the last one.
    `gpu` says who does the work; by default where tensors are made.
    """
    gpu = on_gpu() if gpu is None else gpu
    repeats, long = {}, {}
    for name, step in steps.items():
        step()
        once = seconds_of(step, 1, gpu)
        long[name] = once > 0.1
        repeats[name] = max(1, min(1000, round(1e-3 / max(once, 1e-7))))
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            if before and name in before:
                before[name]()
            if not long[name]:
                step()
            times[name].append(seconds_of(step, repeats[name], gpu))
    return Times(times)


def over_base(result: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """Times over the base's, and their spread; of a result that holds no rounds' ratios, those of the medians."""
    base = result["times"][result["base"]][0]
    return result.get("ratios") or {
        name: (time / base, spread / base) for name, (time, spread) in result["times"].items()
    }


def memory_and_calls(step: Step) -> tuple[int, int]:
    """Peak extra memory of a step in bytes, and how many ops it calls from Python."""
    step()  # what is made once is no part of a step
    if on_gpu():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        extra = torch.cuda.max_memory_allocated() - held
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        step()
    now = peak = 0
    for event in prof.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    wrappers = ("Optimizer.", "[memory]", "ProfilerStep", "Torch-Compiled")

    def from_python(event: Any) -> bool:
        parent = event.cpu_parent
        return not event.name.startswith(wrappers) and (parent is None or parent.name.startswith(wrappers))

    return extra if on_gpu() else peak, sum(from_python(event) for event in prof.events())


# ------------------------------------------------------------------------------------------------------------- the roof


TRIADS = ("triad, streaming stores", "triad, in place", "triad, in place, prefetched")
COPY, ADD, MIX = "copy, device to device", "triad, torch.add(out=)", "the step's streams, no arithmetic"
ROOFS = (*TRIADS, COPY, ADD)  # the fastest of them is the roof


def roofs(load: Workload) -> dict[str, Callable[[], Any]]:
    """What moves as many bytes as the workload's buffers hold as fast as the machine can: on a GPU a copy and a
    triad; on the CPU triads, and the reads and writes of the step itself, over its own buffers, if all are of one dtype."""
    total = max(12, sum(t.nbytes for part in load.streams for t in part))
    if on_gpu():
        a, b = torch.randn(2, total // 8)
        x, y, z = torch.randn(3, total // 12)
        return {COPY: partial(b.copy_, a), ADD: partial(torch.add, x, y, alpha=0.5, out=z)}
    library = plain_loops()
    if load.problem.low is not None:
        return triads(library, total // 12)
    written, read = ([row for t in part for row in (t if t.dim() > 1 else [t])] for part in load.streams)
    words = written[0].nbytes // 4
    pointers = [(ctypes.c_void_p * len(part))(*(row.data_ptr() for row in part)) for part in (written, read)]

    def mix() -> None:
        library.mix(
            pointers[0], len(written), pointers[1], len(read), ctypes.c_int64(words), torch.get_num_threads(), 0
        )

    return {**triads(library, total // 12), MIX: mix}


def rest() -> None:
    """Until torch's threads, which spin for some 4 ms in hope of more work, leave the cores to others."""
    time.sleep(0.01)


def plain_loops() -> ctypes.CDLL:
    """triad.cpp, built for this machine."""
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "triad.so"
        source, compiler = Path(__file__).with_name("triad.cpp"), os.environ.get("CXX", "c++")
        flags = ["-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-pthread"]
        subprocess.run([compiler, *flags, str(source), "-o", str(library)], check=True)
        return ctypes.CDLL(str(library))


def triads(library: ctypes.CDLL, elements: int) -> dict[str, Callable[[], None]]:
    """A STREAM-like triad on torch's number of threads, over three arrays of `elements` float32 each."""
    a, b, c = (torch.randn(elements) for _ in range(3))

    def run(a: Tensor, kind: int) -> None:
        pointers = [ctypes.c_void_p(t.data_ptr()) for t in (a, b, c)]
        library.triad(*pointers, ctypes.c_float(1e-9), ctypes.c_int64(elements), torch.get_num_threads(), kind)

    return {TRIADS[0]: lambda: run(a, 1), TRIADS[1]: lambda: run(b, 0), TRIADS[2]: lambda: run(b, 2)}


# --------------------------------------------------------------------------------------------------------- the rivals


def contenders(make: Callable[..., Workload], names: Iterable[str] | None = None) -> tuple[Workload, dict, dict]:
    """Our step and the rivals' over the same buffers, each checked against ours from the same start.

    Args:
        names: of the rivals, `rivals.FLOOR` apart, which is always there; by default all.

    Returns:
        The workload, the steps by name, and what must run (untimed) before some of them.
    """
    load = make()
    optimizer, problem = load.optimizer, load.problem
    written, gradients = load.streams[0], optimizer.replicas.grads
    buffers = [*written, gradients]
    start = [b.clone() for b in buffers]

    def reset(coupling: Coupling) -> None:
        for buffer, saved in zip(buffers, start, strict=True):
            buffer.copy_(saved)
        load.rewind()
        optimizer.coupling = problem.coupling = coupling

    def checked(coupling: Coupling, makers: dict[str, Callable[[rivals.Problem], Step]]) -> dict[str, Step]:
        """The steps of the rivals that are wanted, after each has left what ours leaves."""
        makers = {name: rival for name, rival in makers.items() if names is None or name in (rivals.FLOOR, *names)}
        if not makers:
            return {}
        reset(coupling)
        optimizer.step()
        ours = [b.clone() for b in written]
        steps = {}
        for name, rival in makers.items():
            reset(coupling)
            steps[name] = rival(problem)
            steps[name]()
            agree(name, written, ours)
        return steps

    coupling = optimizer.coupling
    steps: dict[str, Step] = {OURS: optimizer.step, **checked(coupling, rivals.COUPLED)}
    before: dict[str, Callable[[], Any]] = {}
    if load.copies > 1:
        # The naive way is the explicit mode. It needs an L at which that does not diverge; its time does not depend on L.
        steps |= checked(hta.Explicit(10.0), {rivals.NAIVE: rivals.over_masters(rivals.autograd)})
        before[rivals.NAIVE] = partial(gradients.copy_, start[-1])  # backward() has added the penalty's to them
    floors = dict(rivals.FLOORS)
    if load.copies == 1:
        del floors[rivals.FLOOR_IN_ONE]  # the same
    steps |= checked(hta.Toward(0.0), floors)  # no coupling at all
    reset(coupling)
    return load, steps, before


def _elements(n: int) -> str:
    return f"{n / 1e6:.1f} million elements" if n >= 1_000_000 else f"{n:,} elements"


def agree(name: str, theirs: list[Tensor], ours: list[Tensor], tolerance: float = 2e-5) -> None:
    """Raises unless a rival left what we left."""
    for a, b in zip(theirs, ours, strict=True):
        error = float((a - b).abs().max() / b.abs().max().clamp(min=1e-30)) if b.numel() else 0.0
        if not error < tolerance:
            raise AssertionError(f"{name} and hta_fused disagree by {error:.2g}")


def step(
    make: Callable[..., Workload],
    rounds: int,
    *,
    roof: bool = True,
    details: bool = True,
    names: Iterable[str] | None = None,
    more: dict[str, Callable[[], Any]] | None = None,
) -> dict[str, Any]:
    """CoupledOptimizer.step and every rival on one workload, and whatever else is to be timed in the same rounds."""
    gc.collect()  # the last workload's buffers
    load, steps, before = contenders(make, names)
    optimizer, copies = load.optimizer, load.copies

    def guarded() -> None:
        optimizer.skip_nonfinite = True
        optimizer.step()
        optimizer.skip_nonfinite = False

    steps = {OURS: steps.pop(OURS), GUARDED: guarded, **steps}
    extra = {name: memory_and_calls(s) for name, s in steps.items()} if details else {}
    n, tensors = load.elements, len(optimizer.replicas.layout.names)
    if roof:
        own = roofs(load)
        steps |= own
        before |= dict.fromkeys(own, rest)
    times = measure({**steps, **(more or {})}, rounds, before)
    anchor, grads, ours = optimizer.replicas.anchor, optimizer.replicas.grads, load.bytes_per_element
    guard = copies * grads.element_size()  # each gradient is read once more
    per_element = {OURS: ours, GUARDED: ours + guard, MIX: load.moved, **dict.fromkeys(ROOFS, load.held)}
    if load.problem.low is None:
        as_plain = load.moved - (0 if anchor is None else anchor.element_size())
        per_element |= dict.fromkeys(rivals.FLOORS, as_plain)
    per_element = {name: b for name, b in per_element.items() if name in times}
    title = f"{load.name}: {_elements(n)} in {tensors} tensor{'s' * (tensors != 1)}"
    result: dict[str, Any] = {
        "title": f"{title}, {copies} cop{'ies' if copies > 1 else 'y'}, {type(load.problem.proposal).__name__}",
        "base": OURS,
        "elements": n,
        "times": times,
        "ratios": times.all_over(OURS),
        "bytes": per_element,
        "bandwidth": {name: b * n / times[name][0] for name, b in per_element.items()},
    }
    if roof:
        best = max(set(ROOFS) & set(times), key=lambda name: result["bandwidth"][name])
        result["roof"] = {name: b / per_element[best] * times.over(best, name)[0] for name, b in per_element.items()}
    if extra:
        result["memory"] = {name: m for name, (m, _) in extra.items()}
        result["calls"] = {name: c for name, (_, c) in extra.items()}
    # Every rival that does what ours does must not be faster by more than the spread.
    rival_names = [r for r in (*rivals.COUPLED, rivals.NAIVE) if r in times]
    result["beaten_by"] = [name for name in rival_names if sum(result["ratios"][name]) < 1]
    return result


FLAT = 15_000_576  # elements: VGG16's
# What the step of any number of copies is held to: ahead of all that do the same, and near those that do less.
WANTED = {"roof": 0.95, rivals.FLOOR: 1.1, "torch.compile": 1.0, "torch._foreach_*": 1.0}


def ratio_claims(result: dict[str, Any], bounds: dict[str, float]) -> dict[str, Any]:
    """The result with claims: what a rival's time must be at least of ours, or, for the floor, ours at most of its."""
    over = {name: ratio for name, (ratio, _) in result["ratios"].items()}
    claims = result.setdefault("claims", [])
    for name, bound in bounds.items():
        if name in rivals.FLOORS:
            claims.append(claim(f"ours over {name}", 1 / over[name], bound, "at most"))
        elif name == "roof":
            claims.append(claim("bandwidth over the roof's", result["roof"][OURS], bound, "at least"))
        else:
            claims.append(claim(f"{name} over ours", over[name], bound, "at least"))
    return result


def claim(what: str, value: float, bound: float, kind: str) -> dict[str, Any]:
    met = value >= bound if kind == "at least" else value <= bound
    return {"what": what, "value": value, "wanted": f"{kind} {bound:g}", "met": met}


# -------------------------------------------------------------------------------------------------------------- scaling


def fitted_exponent(sizes: list[int], seconds: list[float]) -> float:
    """The slope of log(time) against log(size)."""
    x, y = torch.tensor(sizes).double().log(), torch.tensor(seconds).double().log()
    x, y = x - x.mean(), y - y.mean()
    return float((x * y).sum() / (x * x).sum())


def last_level_cache() -> float:
    """Bytes of the largest cache; 64 MB where Linux does not tell."""
    sizes = [p.read_text().strip() for p in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(s[:-1]) * {"K": 1024, "M": 1024**2}[s[-1]] for s in sizes), default=64 * 1024**2)


def against_size(sizes: list[int], rounds: int) -> dict[str, Any]:
    """Time against N, and the exponent where the step's seven buffers no longer fit the largest cache."""
    ours, floor = [], []
    for n in sizes:
        result = step(lambda n=n: workloads.flat(n), rounds, roof=False, details=False, names=())
        ours.append(result["times"][OURS][0])
        floor.append(result["times"][rivals.FLOOR][0])
    large = [i for i, n in enumerate(sizes) if 28 * n > last_level_cache()]
    result = {"title": "Time against size", "sizes": sizes, OURS: ours, rivals.FLOOR: floor}
    if len(large) > 1:
        exponent = fitted_exponent([sizes[i] for i in large], [ours[i] for i in large])
        result["exponent"] = exponent
        result["claims"] = [claim("|exponent - 1| beyond the cache", abs(exponent - 1), 0.03, "at most")]
    return result


def against_tensors(counts: list[int], elements: int, rounds: int) -> dict[str, Any]:
    """Time against the number of tensors that hold the same number of elements."""
    series: dict[str, list[float]] = {}
    for count in counts:
        shapes = [torch.Size([elements // count])] * count
        names = ("eager, in place", "torch._foreach_*")
        result = step(
            lambda shapes=shapes: workloads.of_shapes("", shapes), rounds, roof=False, details=False, names=names
        )
        for name, (seconds, _) in result["times"].items():
            series.setdefault(name, []).append(seconds)
    return {"title": f"Time against the number of tensors, {elements:,} elements in all", "counts": counts, **series}


def against_threads(elements: int, rounds: int) -> dict[str, Any]:
    """Time against threads."""
    had = torch.get_num_threads()
    counts = list(range(1, had + 1))
    series: dict[str, list[float]] = {}
    try:
        for count in counts:
            torch.set_num_threads(count)
            result = step(lambda: workloads.flat(elements), rounds, roof=False, details=False, names=())
            for name in (OURS, rivals.FLOOR):
                series.setdefault(name, []).append(result["times"][name][0])
    finally:
        torch.set_num_threads(had)
    return {"title": f"Time against threads, {elements:,} elements", "threads": counts, **series}


# --------------------------------------------------------------------------------------------------------------- copies


class Elsewhere:
    """The step of a version in another checkout, in a process of its own: builds its flat workload of two copies, and
    steps as often as it is told to. Use it as a context."""

    PROGRAM = """
import sys, time, torch
torch.set_num_threads(int(sys.argv[2]))
import hta_fused
from bench.workloads import flat
step = flat(int(sys.argv[1])).optimizer.step
print(hta_fused.__version__, hta_fused.__file__, flush=True)
for line in sys.stdin:
    step()
    start = time.perf_counter()
    for _ in range(int(line)):
        step()
    print(time.perf_counter() - start, flush=True)
"""

    @staticmethod
    def serves(checkout: Path) -> bool:
        """Whether a folder looks like a checkout."""
        return all((checkout / part / "__init__.py").is_file() for part in ("hta_fused", "bench"))

    def __init__(self, checkout: Path, elements: int):
        self.checkout, self.elements = checkout.resolve(), elements

    def __enter__(self) -> "Elsewhere":
        command = [sys.executable, "-c", self.PROGRAM, str(self.elements), str(torch.get_num_threads())]
        environment = {**os.environ, "PYTHONPATH": str(self.checkout)}
        self.process = subprocess.Popen(
            command, cwd=self.checkout, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        version, _, file = self._line().partition(" ")
        if not Path(file).is_relative_to(self.checkout):
            self.process.communicate()
            raise ValueError(f"--against must be a checkout of hta_fused, but {self.checkout} led to {file}")
        self.name = f"version {version} in {self.checkout.name}"
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate()

    def _line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline().strip()
        if not line:
            raise ValueError(f"--against: the version in {self.checkout} stopped with status {self.process.wait()}")
        return line

    def seconds(self, repeats: int) -> float:
        """The time of one of `repeats` steps."""
        assert self.process.stdin is not None
        rest()
        print(repeats, file=self.process.stdin, flush=True)
        seconds = float(self._line()) / repeats
        rest()
        return seconds

    def __call__(self) -> None:
        """Nothing: it is only ever timed, and warms up by itself."""


def copies(
    m: int, proposal: str, elements: int, rounds: int, other: Elsewhere | None = None, claims: bool = True
) -> dict[str, Any]:
    """The step of m copies of a flat buffer beside all that does the same, and beside `other`."""
    make = partial(workloads.flat, elements, copies=m, proposal=proposal)
    result = step(make, rounds, names=rivals.COUPLED, more={other.name: other} if other else None)
    if claims:
        ratio_claims(result, WANTED)
        if other:
            ratio = result["ratios"][other.name][0]
            result["claims"].append(claim(f"ours over {other.name}", 1 / ratio, 1.02, "at most"))
    return result


def against_copies(counts: list[int], proposal: str, elements: int, rounds: int) -> dict[str, Any]:
    """Time per copy against the number of copies, in the same rounds."""
    gc.collect()
    steps: dict[str, Callable[[], Any]] = {}
    for m in counts:
        load = workloads.flat(elements, copies=m, proposal=proposal)
        steps |= {f"{OURS} {m}": load.optimizer.step, f"{rivals.FLOOR} {m}": rivals.FLOORS[rivals.FLOOR](load.problem)}
    times = measure(steps, rounds)
    series = {name: [times[f"{name} {m}"][0] / m for m in counts] for name in (OURS, rivals.FLOOR)}
    result = {"title": f"Time per copy, {_elements(elements)}, {proposal}", "copies": counts, **series}
    if {2, 8} <= set(counts):
        ratio = times.over(f"{OURS} 8", f"{OURS} 2")[0] / 4
        result["claims"] = [claim("time per copy, 8 copies over 2", ratio, 1.0, "at most")]
    return result


def label_kinds(proposal: str, elements: int, rounds: int) -> dict[str, Any]:
    """What labels of one's own cost two copies, in the same rounds."""
    gc.collect()
    kinds = {"structural": "structural", "a byte an element": "random", "hashed": "hashed"}
    loads = {name: workloads.flat(elements, labels=kind, proposal=proposal) for name, kind in kinds.items()}
    times = measure({name: load.optimizer.step for name, load in loads.items()}, rounds)
    bytes_ = {name: load.bytes_per_element for name, load in loads.items()}
    over = times.all_over("structural")
    return {
        "title": f"Kinds of labels, two copies, {_elements(elements)}, {proposal}",
        "base": "structural",
        "times": times,
        "ratios": over,
        "bytes": bytes_,
        "bandwidth": {name: b * elements / times[name][0] for name, b in bytes_.items()},
        "claims": [claim(f"{name} over structural", over[name][0], 1.15, "at most") for name in list(kinds)[1:]],
    }


def penalty(elements: int, rounds: int) -> dict[str, Any]:
    """The gradient-only op beside autograd on the penalty's definition."""
    theta, eta, anchor = (torch.randn(elements) for _ in range(3))
    labels = hta.Partition((torch.arange(elements) * 3 // elements).byte())
    in_theta, in_eta = ((labels.flat() == k).float() for k in (1, 2))
    theta.requires_grad_()
    eta.requires_grad_()
    grad_theta, grad_eta = torch.zeros(elements), torch.zeros(elements)

    def accumulate() -> None:
        hta.homotopy_penalty_accumulate_(grad_theta, grad_eta, theta, eta, anchor, labels, 0.1)

    def definition() -> Tensor:
        pulled = ((theta - anchor) ** 2 * in_theta).sum() + ((eta - anchor) ** 2 * in_eta).sum()
        return 0.1 * pulled + ((theta - eta) ** 2).sum() / 0.1

    def ours() -> Tensor:
        return hta.homotopy_penalty(theta, eta, anchor, labels, 0.1)

    agree(
        "autograd",
        list(torch.autograd.grad(definition(), [theta, eta])),
        list(torch.autograd.grad(ours(), [theta, eta])),
    )
    steps = {
        "homotopy_penalty_accumulate_": accumulate,
        "homotopy_penalty, backward": lambda: torch.autograd.grad(ours(), [theta, eta]),
        "autograd on the definition": lambda: torch.autograd.grad(definition(), [theta, eta]),
    }
    times = measure(steps, rounds)
    return {
        "title": f"The penalty and its gradients, {elements:,} elements",
        "base": "homotopy_penalty, backward",
        "times": times,
        "ratios": times.all_over("homotopy_penalty, backward"),
        "bytes": {"homotopy_penalty_accumulate_": 28.0},
        "bandwidth": {"homotopy_penalty_accumulate_": 28.0 * elements / times["homotopy_penalty_accumulate_"][0]},
    }


# ---------------------------------------------------------------------------------------------------------------- tables


PEAK = "peak of a step, MB"  # a column
AXES = ("sizes", "counts", "threads", "copies", "Gbit/s")


def show(result: dict[str, Any]) -> str:
    """A result as Markdown."""
    lines = [f"### {result['title']}", ""]
    if "times" in result:
        times, over = result["times"], over_base(result)
        columns: dict[str, tuple[str, Callable[[Any], str]]] = {
            "bytes": ("bytes/element", lambda v: f"{v:.2f}"),
            "bandwidth": ("GB/s", lambda v: f"{v / 1e9:.1f}"),
            "roof": ("of the roof", lambda v: f"{v:.2f}"),
            "memory": ("extra memory, MB", lambda v: f"{v / 1e6:.1f}"),
            "calls": ("calls", str),
            "images_per_second": ("images/s per copy", lambda v: f"{v:.0f}"),
            "sent": ("MB sent a step", lambda v: f"{v / 1e6:.3f}"),
            "sent_epoch": ("an epoch", lambda v: f"{v / 1e6:.1f}"),
            "cpu": ("CPU, ms", lambda v: f"{1e3 * v:.4g}"),
            "waiting": ("waiting", lambda v: f"{100 * v:.1f} %"),
            "modelled": ("model, ms", lambda v: f"{1e3 * v:.4g}"),
            "model_error": ("its error", lambda v: f"{100 * v:+.1f} %"),
        }
        columns = {key: column for key, column in columns.items() if key in result}
        lines.append("| | ms | × ours | " + "".join(f"{head} | " for head, _ in columns.values()))
        lines.append("| --- | ---: | ---: | " + "---: | " * len(columns))
        for name, (seconds, spread) in times.items():
            ratio = "1" if name == result["base"] else "{:.2f} ± {:.2f}".format(*over[name])
            cells = [f"{1e3 * seconds:.4g} ± {1e3 * spread:.2g}", ratio]
            cells += [form(result[key][name]) if name in result[key] else "" for key, (_, form) in columns.items()]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        if "update_share" in result:
            lines += ["", f"The update takes {100 * result['update_share']:.1f} % of HTA's step."]
    elif "rows" in result:
        lines.append(markdown(result["rows"]))
    else:
        axis = next(key for key in AXES if key in result)
        series = [k for k, v in result.items() if isinstance(v, list) and k not in (axis, "claims")]
        lines += [f"| {axis} | " + " | ".join(f"{s}, ms" for s in series) + " |", "| ---: |" + " ---: |" * len(series)]
        for i, x in enumerate(result[axis]):
            lines.append(f"| {x:,} | " + " | ".join(f"{1e3 * result[s][i]:.4g}" for s in series) + " |")
    claims = result.get("claims", [])
    lines += [
        "",
        *(f"- {note}" for note in result.get("notes", [])),
        *(f"- {c['what']}: {c['value']:.3g} (wanted: {c['wanted']}{'' if c['met'] else '; NOT MET'})" for c in claims),
    ]
    if result.get("beaten_by"):
        lines.append(f"- slower than {', '.join(result['beaten_by'])}")
    return "\n".join([*lines, ""])
