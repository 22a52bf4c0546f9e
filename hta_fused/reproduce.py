"""hta-reproduce: the paper's small experiments, each a table in the terminal, a CSV and a picture.

    hta-reproduce table1       hits of the global minimum: quasi-Newton and homotopy, and what the claim rests on
    hta-reproduce figure1      the surface for n = 2, the tracked paths of θ and η on it, and L falling (GIF)
    hta-reproduce convergence  theorem 3.2 (logistic regression) and theorem 3.1 (a small network) in numbers
    hta-reproduce path         a quadratic's path: exact, tracked, and trained by HomotopySGD

Everything is seeded. Imports the rest of the package; nothing imports it but its tests.
"""

import argparse
import csv
import itertools
import math
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import plots, problems
from .ops import homotopy_penalty, homotopy_step_
from .optim import HomotopySGD
from .path import QuadraticTerms, exact_minimiser, random_quadratic, track, track_many
from .replicas import Replicas
from .trainer import save_atomically

Row = dict[str, Any]

HIT = 1e-8  # a minimum below it counts as the global one, which is 0
# Starting points per axis: the paper's for n = 2, 4 and 6. It names n = 8 as well, without a grid or figures.
GRIDS = {2: range(6), 4: range(6), 6: range(3, 7), 8: range(4, 6)}
LINEAR = (math.inf, *(10 - 0.5 * i for i in range(20)), 0.0)
SCHEDULES = {
    "linear 10, 9.5, … 0.5": LINEAR,
    "geometric 100 … 0.01": (math.inf, *np.geomspace(100, 0.01, 13).tolist(), 0.0),
    "short 1, 0.1": (math.inf, 1.0, 0.1, 0.0),
}


def starts(n: int, limit: int | None = None, seed: int = 0) -> Tensor:
    """The starting points, [points, n]; a random sample of them if there are more than `limit`."""
    points = torch.tensor(list(itertools.product(GRIDS[n], repeat=n)), dtype=torch.float64)
    if limit is None or len(points) <= limit:
        return points
    return points[torch.randperm(len(points), generator=torch.Generator().manual_seed(seed))[:limit]]


def progress(items: Iterable[Any], what: str) -> Iterable[Any]:
    from tqdm import tqdm

    return tqdm(items, desc=what, leave=False, disable=not sys.stderr.isatty())


# --------------------------------------------------------------------------------------------------------------- table 1


def quasi_newton(f: problems.Function, points: Tensor, what: str) -> Row:
    """scipy's BFGS from every point."""
    from scipy.optimize import minimize

    from .path import Objective

    hits, steps, evaluations = 0, [], []
    for point in progress(points.numpy(), what):
        found = minimize(Objective(f), point, jac=True, method="BFGS")
        hits += bool(found.fun < HIT)
        steps.append(found.nit)
        evaluations.append(found.nfev)
    return {"hits": hits, "steps": float(np.mean(steps)), "evaluations": float(np.mean(evaluations))}


def homotopy(f: problems.Function, points: Tensor, Ls: Iterable[float], anchor: Any, what: str) -> Row:
    """The homotopy from every point."""
    result = track_many(f, points, list(Ls), anchor, progress=lambda values: progress(values, what))
    return {
        "hits": int((result.f < HIT).sum()),
        "steps": result.steps.double().mean().item(),
        "evaluations": result.evaluations.double().mean().item(),
    }


def joined(results: list[Row]) -> Row:
    """The results of equally many starts on several problems as one."""
    means = {key: float(np.mean([result[key] for result in results])) for key in ("steps", "evaluations")}
    return {"hits": sum(result["hits"] for result in results), **means}


def multistart(f: problems.Function, anchors: Tensor, box: Tensor, searches: int, generator: torch.Generator) -> Row:
    """The decoupled problems (2) minimised globally as far as `searches` random starts go, then tracked."""
    count, n = anchors.shape
    second = torch.arange(n) * 2 // n == 1
    copies = anchors[:, None].repeat(1, 2, 1)  # copy 0 is free on the second block, copy 1 on the first
    value = torch.full((count, 2), math.inf, dtype=torch.float64)
    evaluations, steps = torch.zeros(count, dtype=torch.int64), torch.zeros(count, dtype=torch.int64)
    for _ in range(searches):
        start = box.min() + (box.max() - box.min()) * torch.rand(count, n, generator=generator, dtype=torch.float64)
        found = track_many(f, start, [math.inf], anchors)
        free = 2 * found.x - anchors  # a variable is free in one copy and at the anchor in the other: undo their mean
        for copy, block in enumerate((second, ~second)):
            candidate = torch.where(block, free, anchors)
            here = torch.func.vmap(f)(candidate)
            better = here < value[:, copy]
            copies[better, copy], value[better, copy] = candidate[better], here[better]
        evaluations += found.evaluations + 2
        steps += found.steps
    end = track_many(f, copies, [L for L in LINEAR if math.inf > L], anchors)
    return {
        "hits": int((end.f < HIT).sum()),
        "steps": (steps + end.steps).double().mean().item(),
        "evaluations": (evaluations + end.evaluations).double().mean().item(),
    }


def plain_multistart(f: problems.Function, points: Tensor, budget: float, generator: torch.Generator) -> Row:
    """Quasi-Newton from the point and from random ones, until about `budget` evaluations are spent; the best counts."""
    low, high = points.min(), points.max()
    best = torch.full((len(points),), math.inf, dtype=torch.float64)
    evaluations = torch.zeros(len(points), dtype=torch.int64)
    steps = torch.zeros_like(evaluations)
    start = points
    while evaluations.double().mean() < budget:
        found = track_many(f, start, [0.0])
        best = torch.minimum(best, found.f)
        evaluations += found.evaluations
        steps += found.steps
        start = low + (high - low) * torch.rand(points.shape, generator=generator, dtype=torch.float64)
    return {
        "hits": int((best < HIT).sum()),
        "steps": steps.double().mean().item(),
        "evaluations": evaluations.double().mean().item(),
    }


def table1(out: Path, quick: bool) -> None:
    """Table 1 of the paper, then what its claim rests on."""
    rows: list[Row] = []

    def add(part: str, problem: str, n: int, points: Tensor, method: str, anchor: str, result: Row) -> None:
        row = {"part": part, "problem": problem, "n": n, "points": len(points), "method": method, "anchor": anchor}
        rows.append({**row, "hit_rate": round(result["hits"] / len(points), 4), **result})
        say(f"{part} · {problem}, n = {n}: {method}{f', anchor {anchor}' if anchor else ''}: {result['hits']} of "
            f"{len(points)}, {result['evaluations']:.0f} evaluations a start")  # fmt: skip

    limit = 16 if quick else None
    dimensions = (2,) if quick else (2, 4, 6, 8)
    for n in dimensions:
        points = starts(n, limit)
        add("Table 1", "chow", n, points, "quasi-Newton", "", quasi_newton(problems.chow, points, f"n = {n}"))
        found = homotopy(problems.chow, points, LINEAR, 0.0, f"n = {n}")
        add("Table 1", "chow", n, points, "homotopy", "0", found)

    sample = 16 if quick else 512
    generator = torch.Generator().manual_seed(0)
    for n in dimensions:
        points = starts(n, sample)
        random = 6 * torch.rand(points.shape, generator=generator, dtype=torch.float64)
        anchors = {"0": 0.0, "the start": points, "random in [0, 6]": random}
        for (name, anchor), (title, Ls) in itertools.product(anchors.items(), SCHEDULES.items()):
            found = homotopy(problems.chow, points, Ls, anchor, f"n = {n}, anchor {name}")
            add("Anchors and schedules", "chow", n, points, f"homotopy, L {title}", name, found)

    for n in dimensions[:3]:
        points = starts(n, sample // 8)
        plain, tracked = [], []
        for _ in range(2 if quick else 8):
            moved = problems.shifted(problems.chow, 10 * torch.rand(n, generator=generator, dtype=torch.float64) - 5)
            plain.append(quasi_newton(moved, points, "moved"))
            tracked.append(homotopy(moved, points, LINEAR, 0.0, "moved"))
        all_ = points.repeat(len(plain), 1)
        add("Moved minimum", "chow, 8 shifts in [-5, 5]", n, all_, "quasi-Newton", "", joined(plain))
        add("Moved minimum", "chow, 8 shifts in [-5, 5]", n, all_, "homotopy", "0", joined(tracked))

    n = 2 if quick else 4
    for name, half in (("ackley", 32.0), ("rastrigin", 5.12), ("griewank", 600.0)):
        f = getattr(problems, name)
        points = half * (2 * torch.rand(sample // 2, n, generator=generator, dtype=torch.float64) - 1)
        shift = half * (torch.rand(n, generator=generator, dtype=torch.float64) - 0.5)
        for title, g in ((name, f), (f"{name}, moved", problems.shifted(f, shift))):
            add("Other problems", title, n, points, "quasi-Newton", "", quasi_newton(g, points, title))
            add("Other problems", title, n, points, "homotopy", "0", homotopy(g, points, LINEAR, 0.0, title))

    for n in dimensions[:3]:
        points = starts(n, sample // 2)
        found = multistart(problems.chow, points, points, 10, generator)
        add("No lucky anchor", "chow", n, points, "(2) from 10 random starts, then homotopy", "the start", found)
        spent = plain_multistart(problems.chow, points, found["evaluations"], generator)
        add("No lucky anchor", "chow", n, points, "quasi-Newton, random starts, equal evaluations", "", spent)

    write_csv(out / "table1.csv", rows)
    say("\n" + markdown(rows) + "\n")
    save_atomically(out / "table1.png", lambda path: plots.hit_rates(rows, path))


# -------------------------------------------------------------------------------------------------------------- figure 1


def figure1(out: Path, quick: bool) -> None:
    """The surface for n = 2, with the paths of θ and η from several starts."""
    Ls = [math.inf, *np.geomspace(10, 0.05, 6 if quick else 40).tolist(), 0.0]
    chosen = [(0.0, 5.0), (5.0, 0.0), (5.0, 5.0), (4.0, 3.0)][: 1 if quick else 4]
    paths, rows = [], []
    for start in progress(chosen, "paths"):
        result = track(problems.chow, np.array(start), Ls, 0.0, predictor=None)
        paths.append((start, result))
        for point in result.per_L:
            rows.append({
                "start": str(start), "L": point.L, "theta_1": point.x[0, 0], "theta_2": point.x[0, 1],
                "eta_1": point.x[1, 0], "eta_2": point.x[1, 1], "H": point.value, "evaluations": point.evaluations,
                "jumped": point.jumped,
            })  # fmt: skip
        say(f"from {start}: {result.message}; f = {result.f:.3g}, {result.evaluations} evaluations")
    write_csv(out / "figure1.csv", rows)
    save_atomically(out / "figure1.png", lambda path: plots.surface(problems.chow, paths, path))
    save_atomically(out / "figure1.gif", lambda path: plots.falling(problems.chow, paths, path))


# ----------------------------------------------------------------------------------------------------------- convergence


def cancer() -> tuple[Tensor, Tensor]:
    """scikit-learn's breast cancer data: 569 cases, 30 standardised features and a constant; labels ±1."""
    from sklearn.datasets import load_breast_cancer

    data = load_breast_cancer()
    x = torch.as_tensor((data.data - data.data.mean(0)) / data.data.std(0))
    return torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1), torch.as_tensor(2.0 * data.target - 1)


def convex(seeds: int, steps: int) -> list[Row]:
    """Theorem 3.2: the ergodic mean's gap g(θ̄_n, L̄_n) − g(θ*, 0) under γ_k = c/k and L_k falling to 0.

    All seeds go through the op as one flat vector. f is the regularised logistic loss, g is H.
    """
    from scipy.optimize import minimize

    x, y = cancer()
    d, weight = x.shape[1], 0.01

    def f(w: Tensor) -> Tensor:  # of each row
        return torch.nn.functional.softplus(-y * (w @ x.T)).mean(-1) + weight / 2 * w.square().sum(-1)

    def objective(w: np.ndarray) -> tuple[float, np.ndarray]:
        point = torch.tensor(w, requires_grad=True)
        value = f(point)
        value.backward()
        return value.item(), point.grad.numpy()  # type: ignore[union-attr]

    best = minimize(objective, np.zeros(d), jac=True, method="BFGS", options={"gtol": 1e-10}).fun
    labels = (1 + (torch.arange(d) >= d // 2).byte()).repeat(seeds)
    pulled = [torch.arange(d) < d // 2, torch.arange(d) >= d // 2]
    rows = []
    marks = sorted({round(float(m)) for m in np.geomspace(10, steps, 25)})
    for mode in ("explicit", "implicit"):
        generator = torch.Generator().manual_seed(0)
        theta, eta = (torch.zeros(seeds, d, dtype=torch.float64) for _ in range(2))
        means = [torch.zeros_like(theta), torch.zeros_like(eta)]
        mean_L = total = 0.0
        for k in progress(range(1, steps + 1), mode):
            lr, L = 10.0 / (k + 50), 4.0 / math.sqrt(k)  # lr·4/L < 2 at every k: the explicit steps are stable
            batch = torch.randint(len(x), (seeds, 32), generator=generator)
            grads = []
            for w in (theta, eta):
                margin = y[batch] * torch.einsum("sbd,sd->sb", x[batch], w)
                grads.append(-torch.einsum("sb,sbd->sd", y[batch] * torch.sigmoid(-margin), x[batch]) / 32 + weight * w)
            homotopy_step_(theta.view(-1), eta.view(-1), grads[0].reshape(-1), grads[1].reshape(-1), None, None, None,
                           labels, L=L, lr=lr, mode=mode)  # fmt: skip
            total += lr
            mean_L += (L - mean_L) * lr / total
            for mean, w in zip(means, (theta, eta), strict=True):
                mean += (w - mean) * lr / total
            if k in marks:
                quadratic = mean_L * sum((m * p).square().sum(1) for m, p in zip(means, pulled, strict=True))
                quadratic = quadratic + (means[0] - means[1]).square().sum(1) / mean_L
                gap = f(means[0]) + f(means[1]) + quadratic - 2 * best
                for seed in range(seeds):
                    rows.append({"theorem": "3.2", "mode": mode, "seed": seed, "n": k, "value": gap[seed].item(),
                                 "L": mean_L, "weight": total})  # fmt: skip
    return rows


def nonconvex(seeds: int, steps: int) -> list[Row]:
    """Theorem 3.1: the weighted mean Σγ_k‖∇g(θ_k)‖²/Σγ_k at a fixed L, for a small network, against K."""
    x, y = cancer()
    x, classes, L = x[:, :-1].float(), (y > 0).long(), 0.5
    rows = []
    marks = sorted({round(float(m)) for m in np.geomspace(1, steps, 25)})
    for mode in ("explicit", "implicit"):
        for seed in progress(range(seeds), mode):
            torch.manual_seed(seed)
            net = nn.Sequential(nn.Linear(30, 16), nn.Tanh(), nn.Linear(16, 2))
            replicas = Replicas(net, "layer_halves")
            optimizer = HomotopySGD(replicas, 0.1, L=L, mode=mode)
            weighted = total = 0.0
            for k in range(1, steps + 1):
                lr = 0.2 / (1 + k) ** 0.6  # Σγ_k diverges, Σγ_k² does not
                optimizer.param_groups[0]["lr"] = lr
                optimizer.zero_grad()
                replicas.backward(lambda copy: nn.functional.cross_entropy(copy(x), classes))
                copies = [row.clone().requires_grad_() for row in replicas.params]
                penalty = homotopy_penalty(copies[0], copies[1], replicas.anchor, replicas.partition, L)
                gradient = torch.stack(torch.autograd.grad(penalty, copies)) + replicas.grads
                weighted += lr * gradient.double().square().sum().item()
                total += lr
                batch = torch.randint(len(x), (32,))
                optimizer.zero_grad()
                replicas.backward(lambda copy, batch=batch: nn.functional.cross_entropy(copy(x[batch]), classes[batch]))
                optimizer.step()
                if k in marks:
                    rows.append({"theorem": "3.1", "mode": mode, "seed": seed, "n": k, "value": weighted / total, "L": L,
                                 "weight": total})  # fmt: skip
    return rows


def slope(rows: list[Row]) -> float:
    """The slope of log(value) against log(n) over the last decade of n, all seeds together."""
    last = max(row["n"] for row in rows)
    chosen = [row for row in rows if row["n"] >= last / 10]
    return float(np.polyfit(np.log([r["n"] for r in chosen]), np.log([max(r["value"], 1e-300) for r in chosen]), 1)[0])


def convergence(out: Path, quick: bool) -> None:
    """The two theorems in numbers."""
    rows = convex(2 if quick else 8, 200 if quick else 30_000) + nonconvex(1 if quick else 4, 20 if quick else 2000)
    write_csv(out / "convergence.csv", rows)
    table = []
    for theorem, mode in itertools.product(("3.2", "3.1"), ("explicit", "implicit")):
        mine = [row for row in rows if (row["theorem"], row["mode"]) == (theorem, mode)]
        last, third = mine[-1]["n"], max(row["n"] for row in mine if 3 * row["n"] <= mine[-1]["n"])
        value = {n: np.mean([r["value"] for r in mine if r["n"] == n]) for n in (mine[0]["n"], third, last)}
        weight = {row["n"]: row["weight"] for row in mine}
        # What both proofs bound is the value times Σγ.
        table.append({"theorem": theorem, "steps": mode, "first n": mine[0]["n"], "value": value[mine[0]["n"]],
                      "last n": last, "value there": value[last], "slope over the last decade": round(slope(mine), 3),
                      "value × Σγ at a third of it": value[third] * weight[third],
                      "and there": value[last] * weight[last]})  # fmt: skip
    say(markdown(table))
    save_atomically(out / "convergence.png", lambda path: plots.convergence(rows, path))


# ------------------------------------------------------------------------------------------------------- the path itself


class Quadratic(nn.Module):
    """f(x) = ½·xᵀAx − bᵀx, as a network without inputs."""

    def __init__(self, A: Tensor, b: Tensor, x: Tensor):
        super().__init__()
        self.A, self.b, self.x = A, b, nn.Parameter(x.clone())

    def forward(self) -> Tensor:
        return 0.5 * self.x @ self.A @ self.x - self.b @ self.x


def quadratic_paths(n: int, Ls: list[float], seed: int = 0) -> list[Row]:
    """For each L, how far the tracked and the trained minimisers of H lie from the exact one."""
    A, b, anchor = random_quadratic(n, seed)
    At, bt = torch.as_tensor(A), torch.as_tensor(b)
    terms = QuadraticTerms.of(n, anchor, None, 2)
    tracked = track(lambda x: 0.5 * x @ At @ x - bt @ x, np.zeros(n), Ls, anchor, tolerance=1e-10)

    net = Quadratic(At, bt, torch.zeros(n, dtype=torch.float64))
    blocks = {"x": torch.as_tensor(1 + (np.arange(n) * 2 // n)).byte()}
    replicas = Replicas(net, blocks, {"x": torch.as_tensor(anchor)})
    lr = 1.0 / np.linalg.eigvalsh(A)[-1]
    optimizer = HomotopySGD(replicas, lr, L=Ls[0])
    rows = []
    for point in progress(tracked.per_L, "trained"):
        optimizer.L = point.L
        steps, moved = 0, math.inf
        while moved >= 1e-12 and steps < 20_000:
            before = replicas.params.clone()
            optimizer.zero_grad()
            replicas.backward(lambda copy: copy())
            optimizer.step()
            steps, moved = steps + 1, float((replicas.params - before).abs().max())
        wanted = exact_minimiser(A, b, terms, point.L)
        found = replicas.params[:, :n].numpy()
        rows.append({"L": point.L, "tracked": np.abs(point.x - wanted).max(), "trained": np.abs(found - wanted).max(),
                     "evaluations": point.evaluations, "steps": steps,
                     "distance": np.linalg.norm(wanted[0] - wanted[1])})  # fmt: skip
    return rows


def path(out: Path, quick: bool) -> None:
    """A quadratic's path from L = 1000 to 1e-6."""
    rows = quadratic_paths(8, np.geomspace(1e3, 1e-6, 4 if quick else 28).tolist())
    write_csv(out / "path.csv", rows)
    say(markdown([{k: f"{v:.3g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows]))
    save_atomically(out / "path.png", lambda path: plots.quadratic_path(rows, path))


# ----------------------------------------------------------------------------------------------------------------- files


def say(text: str) -> None:
    from tqdm import tqdm

    tqdm.write(text, file=sys.stdout)


def write_csv(path: Path, rows: list[Row]) -> None:
    def write(beside: Path) -> None:
        with open(beside, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)

    save_atomically(path, write)


def markdown(rows: list[Row]) -> str:
    """The rows as a Markdown table."""
    heads = list(rows[0])
    lines = [f"| {' | '.join(heads)} |", "|" + " --- |" * len(heads)]
    for row in rows:
        cells = (f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values())
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


WHAT: dict[str, Callable[[Path, bool], None]] = {
    "table1": table1,
    "figure1": figure1,
    "convergence": convergence,
    "path": path,
}


def main(argv: list[str] | None = None) -> None:
    """The entry point of `hta-reproduce`."""
    parser = argparse.ArgumentParser(
        "hta-reproduce", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=WHAT, metavar="WHAT", help=f"one of {', '.join(WHAT)}")
    parser.add_argument("--out", type=Path, required=True, help="the folder for the CSV and the pictures")
    parser.add_argument("--quick", action="store_true", help="a few points and steps: shows that everything runs")
    options = parser.parse_args(argv)
    try:
        import matplotlib  # noqa: F401
        import scipy  # noqa: F401
        import sklearn  # noqa: F401
        import tqdm  # noqa: F401
    except ImportError as error:
        sys.exit(f"hta-reproduce needs {error.name}: pip install 'hta_fused[train]'")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        WHAT[options.what](options.out, options.quick)
    except OSError as error:
        sys.exit(f"hta-reproduce: {error}")
    print(f"{options.out}: " + ", ".join(sorted(p.name for p in options.out.iterdir())))


if __name__ == "__main__":
    main()
