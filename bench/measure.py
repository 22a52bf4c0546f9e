"""How things are timed: interleaved rounds, every rival checked before it is timed, the roof measured beside them.

Each function returns a result: a dict that JSON holds and `show` turns into a table.
"""

import ctypes
import gc
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader, TensorDataset

import hta_fused as hta
from hta_fused.train.report import processor
from hta_fused.train.vgg import VGG

from . import rivals, workloads
from .rivals import MOMENTUM, WEIGHT_DECAY, Step
from .workloads import Workload

OURS, GUARDED = "HomotopySGD.step", "HomotopySGD.step, skipping non-finite steps"
Times = dict[str, tuple[float, float]]  # name: seconds, spread


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
    """The time of one of `repeats` steps; on a GPU, between events on its stream."""
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
    """Median seconds of each step and half its interquartile distance, over interleaved rounds.

    A step shorter than a millisecond is repeated within a round until it is not. `before` runs untimed.
    `gpu` says who does the work; by default where tensors are made.
    """
    gpu = on_gpu() if gpu is None else gpu
    repeats = {}
    for name, step in steps.items():
        step()
        once = seconds_of(step, 1, gpu)
        repeats[name] = max(1, min(1000, round(1e-3 / max(once, 1e-7))))
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            if before and name in before:
                before[name]()
            times[name].append(seconds_of(step, repeats[name], gpu))
    result = {}
    for name, values in times.items():
        low, middle, high = statistics.quantiles(values, n=4)
        result[name] = (middle, (high - low) / 2)
    return result


def tie(times: Times, a: str, b: str) -> bool:
    """Whether two times differ by less than their spread."""
    return abs(times[a][0] - times[b][0]) < max(times[a][1], times[b][1])


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


ROOFS = ("triad, streaming stores", "triad, in place", "copy, device to device")


def roofs(total: int) -> dict[str, Callable[[], None]]:
    """What moves `total` bytes as fast as the machine can: a copy on a GPU, two triads on the CPU."""
    if on_gpu():
        a, b = torch.randn(2, total // 8)
        return {ROOFS[2]: lambda: b.copy_(a)}
    return triads(total // 12)


def triads(elements: int) -> dict[str, Callable[[], None]]:
    """The triad of triad.cpp on torch's number of threads, over three arrays of `elements` float32 each."""
    library = Path(tempfile.mkdtemp()) / "triad.so"
    source = Path(__file__).with_name("triad.cpp")
    compiler = os.environ.get("CXX", "c++")
    subprocess.run([compiler, "-O3", "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    triad = ctypes.CDLL(str(library)).triad
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads)
    a, b, c = (torch.randn(elements) for _ in range(3))
    bounds = [elements * i // threads // 1024 * 1024 for i in range(threads)] + [elements]

    def run(a: Tensor, b: Tensor, c: Tensor, stream: int) -> None:
        def part(i: int) -> None:
            pointers = [ctypes.c_void_p(t.data_ptr()) for t in (a, b, c)]
            triad(*pointers, ctypes.c_float(1e-3), ctypes.c_int64(bounds[i]), ctypes.c_int64(bounds[i + 1]), stream)

        list(pool.map(part, range(threads)))

    return {ROOFS[0]: lambda: run(a, b, c, 1), ROOFS[1]: lambda: run(b, b, c, 0)}


# --------------------------------------------------------------------------------------------------------- the rivals


def contenders(make: Callable[..., Workload], names: Iterable[str] | None = None) -> tuple[Workload, dict, dict]:
    """Our step and every rival's over the same buffers, each checked against ours from the same start.

    Returns:
        The workload, the steps by name, and what must run (untimed) before some of them.
    """
    load = make()
    optimizer, problem = load.optimizer, load.problem
    buffers = [*load.flat, *optimizer.replicas.grads]
    start = [b.clone() for b in buffers]

    def reset() -> None:
        for buffer, saved in zip(buffers, start, strict=True):
            buffer.copy_(saved)

    optimizer.step()
    implicit = [b.clone() for b in load.flat]
    steps: dict[str, Step] = {OURS: optimizer.step}
    for name, rival in rivals.IMPLICIT.items():
        if names is not None and name not in names:
            continue
        reset()
        steps[name] = rival(problem)
        steps[name]()
        agree(name, load.flat, implicit)
    before: dict[str, Step] = {}
    if names is None or rivals.NAIVE in names:
        # The naive way is the explicit mode. It needs an L at which that does not diverge; its time does not depend on L.
        reset()
        problem.L, optimizer.param_groups[0]["mode"], optimizer.L = 10.0, "explicit", 10.0
        optimizer.step()
        explicit = [b.clone() for b in load.flat]
        reset()
        steps[rivals.NAIVE] = rivals.autograd_and_sgd(problem)
        steps[rivals.NAIVE]()
        agree(rivals.NAIVE, load.flat, explicit)
        problem.L, optimizer.param_groups[0]["mode"], optimizer.L = 0.01, "implicit", 0.01
        gradients = start[4:]

        def fresh_gradients() -> None:  # backward() has added the penalty's to them
            for buffer, saved in zip(optimizer.replicas.grads, gradients, strict=True):
                buffer.copy_(saved)

        before[rivals.NAIVE] = fresh_gradients
    reset()
    steps[rivals.FLOOR] = rivals.two_plain_sgds(problem)
    if names is None:
        steps[rivals.FLOOR_IN_ONE] = rivals.one_plain_sgd(problem)
    return load, steps, before


def _elements(n: int) -> str:
    return f"{n / 1e6:.1f} million elements" if n >= 1_000_000 else f"{n:,} elements"


def agree(name: str, theirs: list[Tensor], ours: list[Tensor]) -> None:
    """Raises unless a rival left what we left."""
    for a, b in zip(theirs, ours, strict=True):
        error = float((a - b).abs().max() / b.abs().max().clamp(min=1e-30)) if b.numel() else 0.0
        if not error < 2e-5:
            raise AssertionError(f"{name} and hta_fused disagree by {error:.2g}")


def step(
    make: Callable[..., Workload], rounds: int, *, roof: bool = True, details: bool = True, names=None
) -> dict[str, Any]:
    """HomotopySGD.step and every rival on one workload."""
    gc.collect()  # the last workload's buffers
    load, steps, before = contenders(make, names)
    optimizer = load.optimizer

    def guarded() -> None:
        optimizer.skip_nonfinite = True
        optimizer.step()
        optimizer.skip_nonfinite = False

    steps = {OURS: steps.pop(OURS), GUARDED: guarded, **steps}
    extra = {name: memory_and_calls(s) for name, s in steps.items()} if details else {}
    size = load.problem.theta[0].element_size()
    n, tensors = load.elements, len(optimizer.replicas.layout.names)
    if roof:
        steps |= roofs(max(12, 7 * size * n))  # as much memory as the step's seven buffers
    times = measure(steps, rounds, before)
    per_element = {OURS: load.bytes_per_element, GUARDED: load.bytes_per_element + 2 * size, rivals.FLOOR: 10.0 * size}
    if rivals.FLOOR_IN_ONE in times:
        per_element[rivals.FLOOR_IN_ONE] = 10.0 * size
    per_element |= {name: 7.0 * size for name in times if name in ROOFS}
    result: dict[str, Any] = {
        "title": f"{load.name}: {_elements(n)} in {tensors} tensor{'s' * (tensors != 1)}",
        "base": OURS,
        "elements": n,
        "times": times,
        "bytes": per_element,
        "bandwidth": {name: b * n / times[name][0] for name, b in per_element.items()},
    }
    if roof:
        best = max(v for name, v in result["bandwidth"].items() if name in ROOFS)
        result["roof"] = {name: v / best for name, v in result["bandwidth"].items()}
    if extra:
        result["memory"] = {name: m for name, (m, _) in extra.items()}
        result["calls"] = {name: c for name, (_, c) in extra.items()}
    # Every rival that does what ours does must not be faster by more than the spread.
    rival_names = [r for r in (*rivals.IMPLICIT, rivals.NAIVE) if r in times]
    result["beaten_by"] = [r for r in rival_names if times[r][0] < times[OURS][0] and not tie(times, r, OURS)]
    return result


def ratio_claims(result: dict[str, Any], bounds: dict[str, float]) -> None:
    """Adds claims: what a rival's time must be at least of ours, or, for the floor, ours at most of its."""
    times, base = result["times"], result["times"][OURS][0]
    claims = result.setdefault("claims", [])
    for name, bound in bounds.items():
        if name in (rivals.FLOOR, rivals.FLOOR_IN_ONE):
            claims.append(claim(f"ours over {name}", base / times[name][0], bound, "at most"))
        elif name == "roof":
            claims.append(claim("bandwidth over the roof's", result["roof"][OURS], bound, "at least"))
        else:
            claims.append(claim(f"{name} over ours", times[name][0] / base, bound, "at least"))


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


# -------------------------------------------------------------------------------------------------------------- training


def training(
    name: str, precision: str, rounds: int, batch: int = 128, width: float = 1.0, usual: bool = True
) -> dict[str, Any]:
    """A training step of HTA (both copies) beside plain SGD's and the usual script's, and the update's share in it."""
    torch.manual_seed(0)
    bf16 = precision == "bf16"
    layout = torch.channels_last if bf16 else torch.contiguous_format
    images = torch.randn(batch, 3, 32, 32).to(memory_format=layout)
    classes = torch.randint(10, (batch,))

    def loss(net: torch.nn.Module) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            return F.cross_entropy(net(images), classes)

    def network() -> VGG:
        return VGG(name, width=width).to(memory_format=layout)  # type: ignore[call-overload]  # torch's stubs lack it

    plain = network()
    sgd = torch.optim.SGD(plain.parameters(), 1e-3, MOMENTUM, weight_decay=WEIGHT_DECAY, fused=True)
    replicas = hta.Replicas(network())
    homotopy = hta.HomotopySGD(replicas, 1e-3, MOMENTUM, WEIGHT_DECAY, L=0.01)

    def sgd_step() -> None:
        sgd.zero_grad()
        loss(plain).backward()
        sgd.step()

    def hta_step() -> None:
        homotopy.zero_grad()
        replicas.backward(loss)
        homotopy.step()

    script = VGG(name, width=width)
    script_sgd = torch.optim.SGD(script.parameters(), 1e-3, MOMENTUM, weight_decay=WEIGHT_DECAY)
    dataset = TensorDataset(torch.randn(4 * batch, 3, 32, 32), torch.randint(10, (4 * batch,)))
    loader = DataLoader(dataset, batch, shuffle=True)
    stream = iter(loader)

    def usual_step() -> None:
        nonlocal stream
        try:
            x, y = next(stream)
        except StopIteration:
            stream = iter(loader)
            x, y = next(stream)
        script_sgd.zero_grad()
        F.cross_entropy(script(x), y).backward()
        script_sgd.step()

    both, one, usual_name = "HTA, both copies", "SGD(fused=True)", "the usual script (DataLoader, float32)"
    steps = {both: hta_step, one: sgd_step, **({usual_name: usual_step} if usual else {})}
    times = measure({**steps, "the update alone (HomotopySGD.step)": homotopy.step}, rounds)
    ratio = times[both][0] / times[one][0]
    return {
        "title": f"Training {name.upper()}{f' at width {width:g}' if width != 1 else ''}, batch {batch}, "
        + ("bf16, channels-last" if bf16 else "float32"),
        "base": both,
        "times": times,
        "images_per_second": {n: (2 if n == both else 1) * batch / times[n][0] for n in steps},
        "update_share": times["the update alone (HomotopySGD.step)"][0] / times[both][0],
        "claims": [
            claim("HTA's step over SGD's", ratio, 2.02, "at most"),
            claim("images/s per copy over SGD's", 2 / ratio, 0.95, "at least"),
        ],
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
        "bytes": {"homotopy_penalty_accumulate_": 28.0},
        "bandwidth": {"homotopy_penalty_accumulate_": 28.0 * elements / times["homotopy_penalty_accumulate_"][0]},
    }


# ---------------------------------------------------------------------------------------------------------------- tables


def show(result: dict[str, Any]) -> str:
    """A result as Markdown."""
    lines = [f"### {result['title']}", ""]
    if "times" in result:
        times, base = result["times"], result["times"][result["base"]][0]
        columns: dict[str, tuple[str, Callable[[Any], str]]] = {
            "bytes": ("bytes/element", lambda v: f"{v:.2f}"),
            "bandwidth": ("GB/s", lambda v: f"{v / 1e9:.1f}"),
            "roof": ("of the roof", lambda v: f"{v:.2f}"),
            "memory": ("extra memory, MB", lambda v: f"{v / 1e6:.1f}"),
            "calls": ("calls", str),
            "images_per_second": ("images/s per copy", lambda v: f"{v:.0f}"),
        }
        columns = {key: column for key, column in columns.items() if key in result}
        lines.append("| | ms | × ours | " + "".join(f"{head} | " for head, _ in columns.values()))
        lines.append("| --- | ---: | ---: | " + "---: | " * len(columns))
        for name, (seconds, spread) in times.items():
            ratio = (
                "1"
                if name == result["base"]
                else "tie"
                if tie(times, name, result["base"])
                else f"{seconds / base:.2f}"
            )
            cells = [f"{1e3 * seconds:.4g} ± {1e3 * spread:.2g}", ratio]
            cells += [form(result[key][name]) if name in result[key] else "" for key, (_, form) in columns.items()]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        if "update_share" in result:
            lines += ["", f"The update takes {100 * result['update_share']:.1f} % of HTA's step."]
    else:
        axis = next(key for key in ("sizes", "counts", "threads") if key in result)
        series = [k for k, v in result.items() if isinstance(v, list) and k not in (axis, "claims")]
        lines += [f"| {axis} | " + " | ".join(f"{s}, ms" for s in series) + " |", "| ---: |" + " ---: |" * len(series)]
        for i, x in enumerate(result[axis]):
            lines.append(f"| {x:,} | " + " | ".join(f"{1e3 * result[s][i]:.4g}" for s in series) + " |")
    claims = result.get("claims", [])
    lines += [
        "",
        *(f"- {c['what']}: {c['value']:.3g} (wanted: {c['wanted']}{'' if c['met'] else '; NOT MET'})" for c in claims),
    ]
    if result.get("beaten_by"):
        lines.append(f"- slower than {', '.join(result['beaten_by'])}")
    return "\n".join([*lines, ""])


HEADLINE = {  # what the step is held to, on VGG16's list and on one flat buffer
    "vgg16": {"eager, in place": 5.0, "torch._foreach_*": 4.0, "torch.compile": 1.15, rivals.FLOOR: 1.12},
    "flat": {"roof": 0.95, "eager, in place": 7.5, rivals.NAIVE: 10.0, "torch.compile": 1.0},
}
FLAT = 15_000_576


def headline_flat(rounds: int) -> dict[str, Any]:
    result = step(lambda: workloads.flat(FLAT), rounds)
    ratio_claims(result, HEADLINE["flat"])
    result["claims"].append(claim("bytes per element", result["bytes"][OURS], 44.2, "at most"))
    return result


def headline_model(name: str, rounds: int) -> dict[str, Any]:
    result = step(lambda: workloads.model(name), rounds)
    ratio_claims(result, HEADLINE.get(name, {}))
    return result
