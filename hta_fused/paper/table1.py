"""Table 1: from how many starts the global minimum of equation (33) is found, and what the paper's claim rests on.

Every method is given its evaluations of f and its gradient; the rivals get as many as the homotopy with the tangent
predictor takes.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import problems
from ..extras import needs
from ..path import Objective, track_many
from ..pictures import OURS, THEIRS
from .report import Row, markdown, progress, pyplot, save_csv, save_figure, say

HIT = 1e-8  # a minimum below it counts as the global one, which is 0
# Starting points per axis: the paper's for n = 2, 4 and 6. It names n = 8 as well, without a grid or figures.
GRIDS = {2: range(6), 4: range(6), 6: range(3, 7), 8: range(4, 6)}
REGION = 10.0  # the paper's |x_i| < 10, where the rivals look
LINEAR = (math.inf, *(10 - 0.5 * i for i in range(20)), 0.0)
SENTENCE = (*(round(0.9 - 0.1 * i, 1) for i in range(9)), 0.0)  # the paper's 0.9 to 0.1, then f itself
SCHEDULES = {
    "linear 10, 9.5, … 0.5": LINEAR,
    "geometric 100 … 0.01": (math.inf, *np.geomspace(100, 0.01, 13).tolist(), 0.0),
    "short 1, 0.1": (math.inf, 1.0, 0.1, 0.0),
}


def run(out: Path, quick: bool) -> None:
    """Table 1 of the paper, then what its claim rests on."""
    dimensions = (2,) if quick else (2, 4, 6, 8)
    sample = 16 if quick else 512
    generator = torch.Generator().manual_seed(0)
    rows = list(one_start())
    save_csv(out / "table1-one-start.csv", rows)
    say(markdown(rows) + "\n")
    rows = []
    for row in itertools.chain(
        as_printed(dimensions, 16 if quick else None, sample // 4),
        anchors_and_schedules(dimensions, sample, generator),
        moved_minimum(dimensions[:3], sample // 8, 2 if quick else 8, generator),
        other_problems(2 if quick else 4, sample // 2, generator),
        no_lucky_anchor(dimensions[:3], sample // 2, generator),
    ):
        rows.append(row)
        hits = f"{row['hits']} of {row['points']}, {row['evaluations']:.0f} evaluations a start"
        say(f"{row['part']} · {title(row)}: {hits}")
    save_csv(out / "table1.csv", rows)
    say("\n" + markdown(rows) + "\n")
    save_figure(out / "table1.png", picture(rows))


# ----------------------------------------------------------------------------------------------------- the table's parts


def one_start() -> Iterator[Row]:
    """The paper's sentence: n = 4, from [5, 4, 5, 5], L from 0.9 to 0.1; 8 steps by quasi-Newton, 14 by the homotopy.

    The minimum found is the one that BFGS leads to from the mean of the copies at the last L.
    """
    with needs("paper"):
        from scipy.optimize import minimize

    f, tolerance = problems.chow, 1e-3  # at which quasi-Newton takes the paper's 8 steps
    start = torch.tensor([[5.0, 4.0, 5.0, 5.0]], dtype=torch.float64)

    def row(method: str, Ls: str, anchor: str, first: int, steps: int, evaluations: int, end: np.ndarray) -> Row:
        least = minimize(Objective(f), end, jac=True, method="BFGS").fun
        about = {"method": method, "L": Ls, "anchor": anchor, "tolerance": tolerance}
        counts = {"steps": steps, "of them at the first L": first, "evaluations": evaluations}
        return about | counts | {"f": float(f(torch.as_tensor(end))), "global": bool(least < HIT)}

    found = minimize(Objective(f), start[0].numpy(), jac=True, method="BFGS", options={"gtol": tolerance})
    yield row("quasi-Newton", "", "", found.nit, found.nit, found.nfev, found.x)
    chosen = {"0.9, 0.8, … 0.1": SENTENCE[:-1], "0.9, 0.8, … 0.1, 0": SENTENCE, "0.9, 0.1": (0.9, 0.1)}
    for (anchor, at), predictor in itertools.product({"0": 0.0, "the start": start}.items(), (None, "tangent")):
        for name, Ls in chosen.items():
            ends = [track_many(f, start, L, at, predictor=predictor, tolerance=tolerance) for L in (Ls[:1], Ls)]
            first, steps, evaluations = int(ends[0].steps), int(ends[1].steps), int(ends[1].evaluations)
            yield row(HOMOTOPIES[predictor], name, anchor, first, steps, evaluations, ends[1].x[0].numpy())


def as_printed(dimensions: Iterable[int], limit: int | None, sample: int) -> Iterator[Row]:
    """The paper's rows, and the rivals from a sample of the starts."""
    for n in dimensions:
        points = starts(n, limit)
        found = quasi_newton(problems.chow, points, f"n = {n}")
        yield entry("Table 1", "chow", points, "quasi-Newton", "", found)
        for predictor, method in HOMOTOPIES.items():
            found = homotopy(problems.chow, points, LINEAR, 0.0, f"n = {n}", predictor)
            yield entry("Table 1", "chow", points, method, "0", found)
        points, budget = starts(n, sample), found["evaluations"]
        for method, rival in RIVALS.items():
            yield entry("Table 1", "chow", points, method, "", rival(problems.chow, points, budget))


def anchors_and_schedules(dimensions: Iterable[int], sample: int, generator: torch.Generator) -> Iterator[Row]:
    """Other anchors than 0, and other values of L."""
    for n in dimensions:
        points = starts(n, sample)
        random = 6 * torch.rand(points.shape, generator=generator, dtype=torch.float64)
        anchors = {"0": 0.0, "the start": points, "random in [0, 6]": random}
        for (name, anchor), (schedule, Ls) in itertools.product(anchors.items(), SCHEDULES.items()):
            found = homotopy(problems.chow, points, Ls, anchor, f"n = {n}, anchor {name}")
            yield entry("Anchors and schedules", "chow", points, f"homotopy, L {schedule}", name, found)


def moved_minimum(dimensions: Iterable[int], sample: int, shifts: int, generator: torch.Generator) -> Iterator[Row]:
    """The global minimum moved at random, so that the anchor 0 has no special place; the rivals from fewer starts."""
    few = max(1, sample // 4)
    for n in dimensions:
        points = starts(n, sample)
        by_method: dict[str, list[Row]] = {name: [] for name in ("quasi-Newton", *HOMOTOPIES.values(), *RIVALS)}
        for _ in range(shifts):
            moved = problems.shifted(problems.chow, 10 * torch.rand(n, generator=generator, dtype=torch.float64) - 5)
            by_method["quasi-Newton"].append(quasi_newton(moved, points, "moved"))
            for predictor, method in HOMOTOPIES.items():
                found = homotopy(moved, points, LINEAR, 0.0, "moved", predictor)
                by_method[method].append(found)
            for method, rival in RIVALS.items():
                by_method[method].append(rival(moved, points[:few], found["evaluations"]))
        problem = f"chow, {shifts} shifts in [-5, 5]"
        for method, all_found in by_method.items():
            anchor = "0" if method in HOMOTOPIES.values() else ""
            every_start = points[: few if method in RIVALS else None].repeat(shifts, 1)
            yield entry("Moved minimum", problem, every_start, method, anchor, pooled(all_found))


def other_problems(n: int, sample: int, generator: torch.Generator) -> Iterator[Row]:
    """Other test functions, as they are (minimiser 0, the anchor) and moved."""
    for name, half in (("ackley", 32.0), ("rastrigin", 5.12), ("griewank", 600.0)):
        f = getattr(problems, name)
        points = half * (2 * torch.rand(sample, n, generator=generator, dtype=torch.float64) - 1)
        shift = half * (torch.rand(n, generator=generator, dtype=torch.float64) - 0.5)
        for problem, g in ((name, f), (f"{name}, moved", problems.shifted(f, shift))):
            yield entry("Other problems", problem, points, "quasi-Newton", "", quasi_newton(g, points, problem))
            found = homotopy(g, points, LINEAR, 0.0, problem)
            yield entry("Other problems", problem, points, "homotopy", "0", found)


def no_lucky_anchor(dimensions: Iterable[int], sample: int, generator: torch.Generator) -> Iterator[Row]:
    """Anchors at the starts and the decoupled problems searched at random, against as much random search in f itself."""
    for n in dimensions:
        points = starts(n, sample)
        found = multistart_homotopy(problems.chow, points, points, 10, generator)
        method = "(2) from 10 random starts, then homotopy"
        yield entry("No lucky anchor", "chow", points, method, "the start", found)
        low, high = float(points.min()), float(points.max())
        found = multistart_quasi_newton(problems.chow, points, found["evaluations"], generator, low, high)
        method = "quasi-Newton, random starts, equal evaluations"
        yield entry("No lucky anchor", "chow", points, method, "", found)


def starts(n: int, limit: int | None = None, seed: int = 0) -> Tensor:
    """The starting points, [points, n]; a random sample of them if there are more than `limit`."""
    points = torch.tensor(list(itertools.product(GRIDS[n], repeat=n)), dtype=torch.float64)
    if limit is None or len(points) <= limit:
        return points
    return points[torch.randperm(len(points), generator=torch.Generator().manual_seed(seed))[:limit]]


def entry(part: str, problem: str, points: Tensor, method: str, anchor: str, found: Row) -> Row:
    """A row of the table."""
    count, n = points.shape
    row = {"part": part, "problem": problem, "n": n, "points": count, "method": method, "anchor": anchor}
    return row | {"hit_rate": round(found["hits"] / count, 4)} | found


def title(row: Row) -> str:
    """What a row is about."""
    anchor = f", anchor {row['anchor']}" if row["anchor"] else ""
    return f"{row['problem']}, n = {row['n']}: {row['method']}{anchor}"


# ------------------------------------------------------------------------------------------------------------ the methods


def quasi_newton(f: problems.Function, points: Tensor, caption: str) -> Row:
    """scipy's BFGS from every point."""
    with needs("paper"):
        from scipy.optimize import minimize

    found = [minimize(Objective(f), point, jac=True, method="BFGS") for point in progress(points.numpy(), caption)]
    return {
        "hits": sum(bool(one.fun < HIT) for one in found),
        "steps": float(np.mean([one.nit for one in found])),
        "evaluations": float(np.mean([one.nfev for one in found])),
    }


def homotopy(
    f: problems.Function,
    points: Tensor,
    Ls: Iterable[float],
    anchor: Any,
    caption: str,
    predictor: str | None = None,
) -> Row:
    """The homotopy from every point."""
    found = track_many(
        f, points, list(Ls), anchor, predictor=predictor, progress=lambda values: progress(values, caption)
    )
    return counted(found.f, found.steps, found.evaluations)


def multistart_homotopy(
    f: problems.Function, anchors: Tensor, box: Tensor, searches: int, generator: torch.Generator
) -> Row:
    """The decoupled problems (2) minimised globally as far as `searches` random starts go, then tracked."""
    count, n = anchors.shape
    in_block_2 = torch.arange(n) * 2 // n == 1
    copies = anchors[:, None].repeat(1, 2, 1)  # copy 0 is free on block 2, copy 1 on block 1
    value = torch.full((count, 2), math.inf, dtype=torch.float64)
    evaluations, steps = torch.zeros(count, dtype=torch.int64), torch.zeros(count, dtype=torch.int64)
    for _ in range(searches):
        tried = random_points(anchors, float(box.min()), float(box.max()), generator)
        found = track_many(f, tried, [math.inf], anchors)
        proposed = (
            2 * found.x - anchors
        )  # each variable is free in one copy, at the anchor in the other: undo their mean
        for copy, free in enumerate((in_block_2, ~in_block_2)):
            candidate = torch.where(free, proposed, anchors)
            candidate_value = torch.func.vmap(f)(candidate)
            better = candidate_value < value[:, copy]
            copies[better, copy], value[better, copy] = candidate[better], candidate_value[better]
        evaluations += found.evaluations + 2
        steps += found.steps
    end = track_many(f, copies, LINEAR[1:], anchors)
    return counted(end.f, steps + end.steps, evaluations + end.evaluations)


def multistart_quasi_newton(
    f: problems.Function, points: Tensor, budget: float, generator: torch.Generator, low: float, high: float
) -> Row:
    """Quasi-Newton from the point and from random ones, until about `budget` evaluations are spent; the best counts."""
    best = torch.full((len(points),), math.inf, dtype=torch.float64)
    evaluations, steps = torch.zeros(len(points), dtype=torch.int64), torch.zeros(len(points), dtype=torch.int64)
    start = points
    while evaluations.double().mean() < budget:
        found = track_many(f, start, [0.0])
        best = torch.minimum(best, found.f)
        evaluations += found.evaluations
        steps += found.steps
        start = random_points(points, low, high, generator)
    return counted(best, steps, evaluations)


class Spent(Exception):
    """A budget has no evaluation left."""


class Budget:
    """f and its gradient in NumPy, together one evaluation; the best point is kept, and too many raise Spent."""

    def __init__(self, f: problems.Function, evaluations: float):
        self.objective, self.allowed = Objective(f), evaluations
        self.best, self.best_x = math.inf, np.zeros(0)
        self.x, self.last = np.zeros(0), (math.inf, np.zeros(0))

    def both(self, x: np.ndarray) -> tuple[float, np.ndarray]:
        if not np.array_equal(x, self.x):
            if self.objective.evaluations >= self.allowed:
                raise Spent
            self.x, self.last = x.copy(), self.objective(x)
            if self.last[0] < self.best:
                self.best, self.best_x = self.last[0], x.copy()
        return self.last

    def value(self, x: np.ndarray) -> float:
        return self.both(x)[0]

    def gradient(self, x: np.ndarray) -> np.ndarray:
        return self.both(x)[1]


def rival(search: Callable[[Budget, np.ndarray, int], Any]) -> Callable[[problems.Function, Tensor, float], Row]:
    """One of scipy's global searches as a method: from every point until the budget is spent.

    8 evaluations a variable, about what quasi-Newton takes, are kept for BFGS from the best point, without which a
    search that knows no gradients finds no minimum to within HIT. With what BFGS leaves of them the search begins again.
    """

    def method(f: problems.Function, points: Tensor, budget: float) -> Row:
        with needs("paper"):
            from scipy.optimize import minimize

        hits, evaluations = 0, []
        for seed, point in enumerate(progress(points.numpy(), search.__name__)):
            spent = Budget(f, budget - 8 * len(point))
            with suppress(Spent):
                search(spent, point, seed)
            spent.allowed = budget
            with suppress(Spent):
                minimize(spent.both, spent.best_x, jac=True, method="BFGS")
                search(spent, spent.best_x, seed)
            hits += spent.best < HIT
            evaluations.append(spent.objective.evaluations)
        return {"hits": hits, "steps": math.nan, "evaluations": float(np.mean(evaluations))}

    return method


def basin_hopping(f: Budget, start: np.ndarray, seed: int) -> None:
    """BFGS, and hops as long as a valley of (33) is wide, 4; scipy's default, 0.5, finds fewer."""
    with needs("paper"):
        from scipy.optimize import basinhopping

    local = {"method": "BFGS", "jac": True}
    basinhopping(f.both, start, niter=10**6, stepsize=4.0, minimizer_kwargs=local, rng=seed)


def annealing(f: Budget, start: np.ndarray, seed: int) -> None:
    """From the start, with gradients in its local searches."""
    with needs("paper"):
        from scipy.optimize import dual_annealing

    local = {"method": "L-BFGS-B", "jac": f.gradient, "bounds": [(-REGION, REGION)] * len(start)}
    dual_annealing(f.value, [(-REGION, REGION)] * len(start), minimizer_kwargs=local, x0=start, rng=seed)


def evolution(f: Budget, start: np.ndarray, seed: int) -> None:
    """With the start in its first population."""
    with needs("paper"):
        from scipy.optimize import differential_evolution

    bounds = [(-REGION, REGION)] * len(start)
    differential_evolution(f.value, bounds, popsize=5, polish=False, x0=start, tol=0, maxiter=10**6, rng=seed)


def random_search(f: problems.Function, points: Tensor, budget: float) -> Row:
    """Multistart BFGS over the region."""
    return multistart_quasi_newton(f, points, budget, torch.Generator().manual_seed(1), -REGION, REGION)


HOMOTOPIES = {None: "homotopy", "tangent": "homotopy, tangent predictor"}
RIVALS = {
    "multistart quasi-Newton": random_search,
    "basinhopping": rival(basin_hopping),
    "dual_annealing": rival(annealing),
    "differential_evolution": rival(evolution),
}


def random_points(like: Tensor, low: float, high: float, generator: torch.Generator) -> Tensor:
    """Uniform in a cube."""
    return low + (high - low) * torch.rand(like.shape, generator=generator, dtype=torch.float64)


def counted(f: Tensor, steps: Tensor, evaluations: Tensor) -> Row:
    """The hits among the ends, and the means of what was spent."""
    means = {"steps": steps.double().mean().item(), "evaluations": evaluations.double().mean().item()}
    return {"hits": int((f < HIT).sum())} | means


def pooled(found: list[Row]) -> Row:
    """The results of equally many starts on several problems as one."""
    means = {key: float(np.mean([row[key] for row in found])) for key in ("steps", "evaluations")}
    return {"hits": sum(row["hits"] for row in found)} | means


def picture(rows: list[Row]) -> Any:
    """The share of starts that reached the global minimum, a bar for each row, a panel for each part of the table."""
    parts = [(part, list(group)) for part, group in itertools.groupby(rows, lambda row: row["part"])]
    heights = [len(group) for _, group in parts]
    figure, axes = pyplot().subplots(
        len(parts),
        figsize=(10, 0.24 * sum(heights) + 0.9 * len(parts)),
        height_ratios=heights,
        squeeze=False,
        layout="constrained",
    )
    for axis, (part, group) in zip(axes[:, 0], parts, strict=True):
        colors = [OURS if "homotopy" in row["method"] else THEIRS for row in group]
        bars = axis.barh(range(len(group)), [row["hit_rate"] for row in group], color=colors)
        axis.bar_label(bars, [f"{row['hits']} of {row['points']}" for row in group], padding=3, fontsize=7)
        axis.set_yticks(range(len(group)), [title(row) for row in group], fontsize=7)
        axis.set(xlim=(0, 1.15), ylim=(len(group) - 0.4, -0.6), title=part)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1, 0].set_xlabel("share of the starts from which the global minimum was found (f < 1e-8)")
    return figure
