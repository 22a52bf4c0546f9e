"""Measures every speed that the README states, each against its rivals in the same run.

    python bench/bench.py [flat] [list] [overhead] [throughput] [--rounds N] [--out FILE.json]

flat: one buffer of 15 million float32 elements, beside a triad. list: VGG16's own parameters. overhead: a training step
of HTA against plain SGD's. throughput: images/s of VGG11 and VGG16 at full width. Rounds are interleaved; figures are
medians, with half the distance between the quartiles. Results go to a table and, with --out, to a JSON.
"""

import argparse
import ctypes
import json
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

import rivals
import torch
import torch.nn.functional as F
from rivals import LR, MOMENTUM, WEIGHT_DECAY, Problem
from torch import Tensor

import hta_fused as hta
from hta_fused.ops import kernels
from hta_fused.trainer import in_layout, processor, write_json
from hta_fused.vgg import VGG

Times = dict[str, tuple[float, float]]  # name: seconds, spread
ELEMENTS = 15_000_576  # VGG16's size, in whole tiles that divide by three


def measure(steps: dict[str, Callable[[], Any]], rounds: int) -> Times:
    """Median time of each step and half its interquartile distance, over interleaved rounds."""
    for step in steps.values():
        step()
        step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - start)
    result = {}
    for name, values in times.items():
        low, middle, high = statistics.quantiles(values, n=4)
        result[name] = (middle, (high - low) / 2)
    return result


# ------------------------------------------------------------------------------------------------------------ problems


def problem(thetas: Iterable[Tensor], labels: list[int], L: float = 0.01) -> Problem:
    """Random gradients and momenta around given values of θ; η and θ̃ close by."""
    torch.manual_seed(1)
    theta = [t.detach().clone() for t in thetas]

    def near(scale: float) -> list[Tensor]:
        return [t + scale * torch.randn_like(t) for t in theta]

    def noise(scale: float) -> list[Tensor]:
        return [scale * torch.randn_like(t) for t in theta]

    return Problem(theta, near(1e-3), (noise(1e-3), noise(1e-3)), (noise(1e-3), noise(1e-3)), near(1e-2), labels, L)


def check(name: str, step: Callable[[], None], state: list[Tensor], ours: list[Tensor]) -> None:
    """Raises unless a rival's step does what ours does."""
    step()
    for a, b in zip(state, ours, strict=True):
        error = (
            float((a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-30)) if b.numel() else 0.0
        )
        if not error < 1e-5:
            raise AssertionError(f"{name} and hta_fused disagree by {error:.2g}")


def rival_steps(
    make: Callable[[float], Problem], ours: Callable[[Problem, str], list[Tensor]]
) -> dict[str, Callable[[], None]]:
    """Every rival's step over buffers of its own, checked against ours."""
    steps: dict[str, Callable[[], None]] = {}
    implicit = ours(make(0.01), "implicit")
    for name, rival in (
        ("eager, in place", rivals.eager),
        ("torch._foreach_*", rivals.foreach),
        ("torch.compile", rivals.compiled),
    ):
        p = make(0.01)
        step = rival(p)
        check(name, step, p.state(), implicit)
        steps[name] = step
    # The naive way is the explicit mode, and needs an L at which that does not diverge; its time does not depend on it.
    p = make(10.0)
    step = rivals.autograd_and_sgd(p)
    grads = [[g.clone() for g in row] for row in p.grads]
    check("autograd + SGD", step, p.state(), ours(make(10.0), "explicit"))
    for row, saved in zip(p.grads, grads, strict=True):
        for g, s in zip(row, saved, strict=True):
            g.copy_(s)
    steps["autograd on (3) + SGD"] = step
    steps["two plain SGD(fused=True), no homotopy"] = rivals.two_plain_sgds(make(0.01))
    return steps


def flat_problem(L: float = 0.01) -> Problem:
    third = ELEMENTS // 3
    torch.manual_seed(0)
    return problem((0.1 * torch.randn(third) for _ in range(3)), [0, 1, 2], L)


def flat_buffers(p: Problem) -> list[Tensor]:
    """θ, η, g_θ, g_η, v_θ, v_η, θ̃, each as one buffer."""
    return [torch.cat(row) for row in (p.theta, p.eta, *p.grads, *p.momenta, p.anchor)]


def flat_ours(p: Problem, mode: str) -> list[Tensor]:
    theta, eta, g_theta, g_eta, v_theta, v_eta, anchor = flat_buffers(p)
    settings: Any = dict(L=p.L, lr=LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, mode=mode)
    hta.homotopy_step_(theta, eta, g_theta, g_eta, v_theta, v_eta, anchor, flat_labels(), **settings)
    return [third for changed in (theta, eta, v_theta, v_eta) for third in changed.chunk(3)]


def flat_labels() -> hta.Partition:
    return hta.Partition((torch.arange(ELEMENTS) // (ELEMENTS // 3)).byte())


# VGG16's parameters, a half-and-half kernel as two views: what a careful user would keep lists of.
def vgg16_problem(L: float = 0.01) -> Problem:
    torch.manual_seed(0)
    model = VGG("vgg16")
    return split(problem(model.parameters(), [0] * len(list(model.parameters())), L))


def split(p: Problem) -> Problem:
    def halves(tensors: list[Tensor]) -> list[Tensor]:
        return [half for t in tensors for half in (t.chunk(2) if t.dim() == 4 else (t,))]

    labels = [label for t in p.theta for label in ((1, 2) if t.dim() == 4 else (0,))]
    return Problem(halves(p.theta), halves(p.eta), (halves(p.grads[0]), halves(p.grads[1])),
                   (halves(p.momenta[0]), halves(p.momenta[1])), halves(p.anchor), labels, p.L, (p.theta, p.eta))  # fmt: skip


def homotopy_sgd(p: Problem, mode: str, skip_nonfinite: bool) -> hta.HomotopySGD:
    """Our optimizer on VGG16, holding a (split) problem's values."""
    replicas = hta.Replicas(VGG("vgg16"), anchor="zero")
    optimizer = hta.HomotopySGD(replicas, LR, MOMENTUM, WEIGHT_DECAY, L=p.L, mode=mode, skip_nonfinite=skip_nonfinite)
    replicas.anchor = torch.zeros(replicas.layout.numel)
    rows = [(replicas.params[0], p.theta), (replicas.params[1], p.eta), (replicas.anchor, p.anchor)]
    rows += [(replicas.grads[i], p.grads[i]) for i in (0, 1)] + [(optimizer._momentum[i], p.momenta[i]) for i in (0, 1)]
    for flat, values in rows:
        for view, value in zip(halves_of(replicas, flat), values, strict=True):
            view.copy_(value)
    return optimizer


def halves_of(replicas: hta.Replicas, flat: Tensor) -> list[Tensor]:
    return [half for v in replicas.layout.views(flat) for half in (v.chunk(2) if v.dim() == 4 else (v,))]


def list_ours(p: Problem, mode: str) -> list[Tensor]:
    optimizer = homotopy_sgd(p, mode, True)
    optimizer.step()
    r = optimizer.replicas
    return [view for flat in (*r.params, *optimizer._momentum) for view in halves_of(r, flat)]


# ---------------------------------------------------------------------------------------------------------- benchmarks


def triads(elements: int) -> dict[str, Callable[[], None]]:
    """The triad of triad.cpp on torch's number of threads, over three arrays that hold as much as the step's seven."""
    folder = tempfile.mkdtemp()
    library = Path(folder) / "triad.so"
    source = Path(__file__).with_name("triad.cpp")
    subprocess.run(
        [os.environ.get("CXX", "c++"), "-O3", "-shared", "-fPIC", str(source), "-o", str(library)], check=True
    )
    triad = ctypes.CDLL(str(library)).triad
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads)
    arrays = [torch.randn(elements) for _ in range(3)]
    bounds = [elements * i // threads // 1024 * 1024 for i in range(threads)] + [elements]

    def run(a: Tensor, b: Tensor, c: Tensor, stream: int) -> None:
        def part(i: int) -> None:
            pointers = [ctypes.c_void_p(t.data_ptr()) for t in (a, b, c)]
            triad(*pointers, ctypes.c_float(1e-3), ctypes.c_int64(bounds[i]), ctypes.c_int64(bounds[i + 1]), stream)

        list(pool.map(part, range(threads)))

    a, b, c = arrays
    return {"triad, streaming stores": lambda: run(a, b, c, 1), "triad, in place": lambda: run(b, b, c, 0)}


def bench_flat(rounds: int) -> dict[str, Any]:
    """One buffer, an anchor, three structural labels."""
    steps = rival_steps(flat_problem, flat_ours)
    codes = flat_labels()
    stats = torch.zeros(4, dtype=torch.float64)
    hyper, tables = torch.ops.hta_fused.coefficients(0.01, LR, MOMENTUM, WEIGHT_DECAY, False, "implicit")

    def ours(with_anchor: bool = True, guard: bool = False, random: bool = False) -> Callable[[], None]:
        *b, anchor = flat_buffers(flat_problem())
        labels = torch.randint(0, 3, (ELEMENTS,), dtype=torch.uint8) if random else codes.labels
        pattern = (anchor if with_anchor else None, None if random else codes.codes, labels)
        op = kernels(b[0]).step_
        return lambda: op(*b, *pattern, hyper, tables, None, None, stats, guard)

    theta, eta, grad_theta, grad_eta, _, _, anchor = flat_buffers(flat_problem())

    def penalty() -> None:
        hta.homotopy_penalty_accumulate_(grad_theta, grad_eta, theta, eta, anchor, codes, 0.01)

    steps = {
        "homotopy_step_": ours(),
        "homotopy_step_, skipping non-finite steps": ours(guard=True),
        "homotopy_step_, anchor 0": ours(with_anchor=False),
        "homotopy_step_, random labels": ours(random=True),
        **steps,
        "homotopy_penalty_accumulate_": penalty,
        **triads(ELEMENTS * 7 // 3),
    }
    times = measure(steps, rounds)
    tiles = 8 / 1024 + 24 / (16 * 1024)  # a code per tile, read; three sums per chunk, written
    per_element = {
        "homotopy_step_": 44 + tiles,
        "homotopy_step_, skipping non-finite steps": 52 + tiles,
        "homotopy_step_, anchor 0": 40 + tiles,
        "homotopy_step_, random labels": 45 + tiles,
        "homotopy_penalty_accumulate_": 28 + tiles,
        "two plain SGD(fused=True), no homotopy": 40,
        "triad, streaming stores": 12 * 7 / 3,
        "triad, in place": 12 * 7 / 3,
    }
    bandwidth = {name: b * ELEMENTS / times[name][0] for name, b in per_element.items()}
    roof = max(bandwidth[name] for name in bandwidth if name.startswith("triad"))
    base = times["homotopy_step_"][0]
    return {
        "title": f"One buffer of {ELEMENTS / 1e6:.1f} million float32 elements, anchor, structural labels",
        "base": "homotopy_step_",
        "times": times,
        "bytes": per_element,
        "bandwidth": bandwidth,
        "claims": [
            claim("bandwidth over the triad's", bandwidth["homotopy_step_"] / roof, 0.95, "at least"),
            claim("eager over ours", times["eager, in place"][0] / base, 7.5, "at least"),
            claim("autograd + SGD over ours", times["autograd on (3) + SGD"][0] / base, 10, "at least"),
            claim("torch.compile over ours", times["torch.compile"][0] / base, 1, "at least"),
            claim("bytes per element", per_element["homotopy_step_"], 44.2, "at most"),
        ],
    }


def bench_list(rounds: int) -> dict[str, Any]:
    """VGG16's parameters as a model has them."""
    steps: dict[str, Callable[[], None]] = rival_steps(vgg16_problem, list_ours)
    steps = {
        "HomotopySGD.step": homotopy_sgd(vgg16_problem(), "implicit", False).step,
        "HomotopySGD.step, skipping non-finite steps": homotopy_sgd(vgg16_problem(), "implicit", True).step,
        **steps,
    }
    times = measure(steps, rounds)
    base = times["HomotopySGD.step"][0]
    return {
        "title": "VGG16's list of tensors (15.2 million float32 elements), anchor, halves of the kernels",
        "base": "HomotopySGD.step",
        "times": times,
        "claims": [
            claim("eager over ours", times["eager, in place"][0] / base, 5, "at least"),
            claim("torch._foreach_* over ours", times["torch._foreach_*"][0] / base, 4, "at least"),
            claim("torch.compile over ours", times["torch.compile"][0] / base, 1.15, "at least"),
            claim(
                "ours over two plain SGDs", base / times["two plain SGD(fused=True), no homotopy"][0], 1.12, "at most"
            ),
        ],
    }


def training_steps(name: str, bf16: bool, batch: int) -> tuple[Callable[[], None], Callable[[], None]]:
    """One training step of plain SGD, and one of HTA on both copies, over the same images."""
    torch.manual_seed(0)
    layout = torch.channels_last if bf16 else torch.contiguous_format
    images = torch.randn(batch, 3, 32, 32).to(memory_format=layout)
    classes = torch.randint(10, (batch,))

    def loss(net: torch.nn.Module) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            return F.cross_entropy(net(images), classes)

    plain = in_layout(VGG(name), layout)
    sgd = torch.optim.SGD(plain.parameters(), 1e-3, MOMENTUM, weight_decay=WEIGHT_DECAY, fused=True)
    replicas = hta.Replicas(in_layout(VGG(name), layout))
    homotopy = hta.HomotopySGD(replicas, 1e-3, MOMENTUM, WEIGHT_DECAY, L=0.01)

    def sgd_step() -> None:
        sgd.zero_grad()
        loss(plain).backward()
        sgd.step()

    def hta_step() -> None:
        homotopy.zero_grad()
        replicas.backward(loss)
        homotopy.step()

    return sgd_step, hta_step


def bench_training(name: str, bf16: bool, rounds: int, batch: int = 128) -> dict[str, Any]:
    """HTA's training step over plain SGD's, and what it means in images/s for each copy."""
    sgd, homotopy = training_steps(name, bf16, batch)
    times = measure({"HTA, both copies": homotopy, "SGD(fused=True)": sgd}, rounds)
    ratio = times["HTA, both copies"][0] / times["SGD(fused=True)"][0]
    return {
        "title": f"Training step of {name.upper()}, batch {batch}, {'bf16, channels-last' if bf16 else 'float32'}",
        "base": "HTA, both copies",
        "times": times,
        "images_per_second": {
            "HTA, both copies": 2 * batch / times["HTA, both copies"][0],
            "SGD(fused=True)": batch / times["SGD(fused=True)"][0],
        },
        "claims": [
            claim("HTA's step over SGD's", ratio, 2.02, "at most"),
            claim("images/s per copy over SGD's", 2 / ratio, 0.95, "at least"),
        ],
    }


def claim(what: str, value: float, bound: float, kind: str) -> dict[str, Any]:
    met = value >= bound if kind == "at least" else value <= bound
    return {"what": what, "value": value, "wanted": f"{kind} {bound:g}", "met": met}


# -------------------------------------------------------------------------------------------------------------- output


def show(result: dict[str, Any]) -> str:
    """A result as Markdown."""
    times, base = result["times"], result["times"][result["base"]][0]
    more = {k: result[k] for k in ("bytes", "bandwidth", "images_per_second") if k in result}
    heads = {"bytes": "bytes/element", "bandwidth": "GB/s", "images_per_second": "images/s per copy"}
    lines = [f"### {result['title']}", "", "| | ms | × ours | " + "".join(f"{heads[k]} | " for k in more)]
    lines.append("| --- | ---: | ---: | " + "---: | " * len(more))
    for name, (seconds, spread) in times.items():
        cells = [
            f"{1e3 * seconds:.2f} ± {1e3 * spread:.2f}",
            "tie" if _tie(times, name, result["base"]) else f"{seconds / base:.2f}",
        ]
        for key, values in more.items():
            value = values.get(name)
            cells.append("" if value is None else f"{value / 1e9:.1f}" if key == "bandwidth" else f"{value:.4g}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += [
        "",
        *(
            f"- {c['what']}: {c['value']:.3g} (wanted: {c['wanted']}{'' if c['met'] else '; NOT MET'})"
            for c in result["claims"]
        ),
        "",
    ]
    return "\n".join(lines)


def _tie(times: Times, name: str, base: str) -> bool:
    return name != base and abs(times[name][0] - times[base][0]) < max(times[name][1], times[base][1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ("flat", "list", "overhead", "throughput")
    parser.add_argument("what", nargs="*", help=f"any of {', '.join(names)}; default: flat list overhead")
    parser.add_argument("--rounds", type=int, default=30, help="interleaved rounds (throughput takes 200)")
    parser.add_argument("--out", type=Path, help="also write a JSON")
    options = parser.parse_args()
    chosen = options.what or names[:3]
    for name in chosen:
        if name not in names:
            parser.error(f"what must be among {', '.join(names)}, got {name!r}")
    if options.rounds < 2:
        parser.error(f"--rounds must be at least 2, got {options.rounds}")

    machine = {"processor": processor(), "threads": torch.get_num_threads(), "torch": torch.__version__,
               "python": platform.python_version(), "backend": hta.backends()["cpu"], "date": date.today().isoformat()}  # fmt: skip
    print(
        f"{machine['processor']}, {machine['threads']} threads, torch {machine['torch']}, {machine['date']}\n",
        flush=True,
    )
    plan: list[Callable[[], dict[str, Any]]] = []
    for name in chosen:
        if name == "flat":
            plan.append(lambda: bench_flat(options.rounds))
        elif name == "list":
            plan.append(lambda: bench_list(options.rounds))
        elif name == "overhead":
            plan += [
                lambda: bench_training("vgg11", False, options.rounds),
                lambda: bench_training("vgg11", True, options.rounds),
            ]
        else:
            plan += [lambda: bench_training("vgg11", True, 200), lambda: bench_training("vgg16", True, 200)]
    results = []
    for run in plan:
        results.append(run())
        print(show(results[-1]), flush=True)
    if options.out:
        write_json(options.out, {"machine": machine, "results": json.loads(json.dumps(results))})


if __name__ == "__main__":
    main()
