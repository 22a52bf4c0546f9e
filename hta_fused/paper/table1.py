"""Table 1: from how many starts the global minimum of equation (33) is found, and what the paper's claim rests on."""

import itertools
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import problems
from ..path import Objective, track_many
from .report import Row, markdown, progress, pyplot, save_csv, save_figure, say

HIT = 1e-8  # a minimum below it counts as the global one, which is 0
# Starting points per axis: the paper's for n = 2, 4 and 6. It names n = 8 as well, without a grid or figures.
GRIDS = {2: range(6), 4: range(6), 6: range(3, 7), 8: range(4, 6)}
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
    rows = []
    for row in itertools.chain(
        as_printed(dimensions, 16 if quick else None),
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


def as_printed(dimensions: Iterable[int], limit: int | None) -> Iterator[Row]:
    """The paper's rows."""
    for n in dimensions:
        points = starts(n, limit)
        found = quasi_newton(problems.chow, points, f"n = {n}")
        yield entry("Table 1", "chow", points, "quasi-Newton", "", found)
        found = homotopy(problems.chow, points, LINEAR, 0.0, f"n = {n}")
        yield entry("Table 1", "chow", points, "homotopy", "0", found)


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
    """The global minimum moved at random, so that the anchor 0 has no special place."""
    for n in dimensions:
        points = starts(n, sample)
        by_quasi_newton, by_homotopy = [], []
        for _ in range(shifts):
            moved = problems.shifted(problems.chow, 10 * torch.rand(n, generator=generator, dtype=torch.float64) - 5)
            by_quasi_newton.append(quasi_newton(moved, points, "moved"))
            by_homotopy.append(homotopy(moved, points, LINEAR, 0.0, "moved"))
        problem, every_start = f"chow, {shifts} shifts in [-5, 5]", points.repeat(shifts, 1)
        yield entry("Moved minimum", problem, every_start, "quasi-Newton", "", pooled(by_quasi_newton))
        yield entry("Moved minimum", problem, every_start, "homotopy", "0", pooled(by_homotopy))


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
        found = multistart_quasi_newton(problems.chow, points, found["evaluations"], generator)
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
    from scipy.optimize import minimize

    found = [minimize(Objective(f), point, jac=True, method="BFGS") for point in progress(points.numpy(), caption)]
    return {
        "hits": sum(bool(one.fun < HIT) for one in found),
        "steps": float(np.mean([one.nit for one in found])),
        "evaluations": float(np.mean([one.nfev for one in found])),
    }


def homotopy(f: problems.Function, points: Tensor, Ls: Iterable[float], anchor: Any, caption: str) -> Row:
    """The homotopy from every point."""
    found = track_many(f, points, list(Ls), anchor, progress=lambda values: progress(values, caption))
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
        found = track_many(f, random_points(anchors, box, generator), [math.inf], anchors)
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


def multistart_quasi_newton(f: problems.Function, points: Tensor, budget: float, generator: torch.Generator) -> Row:
    """Quasi-Newton from the point and from random ones, until about `budget` evaluations are spent; the best counts."""
    best = torch.full((len(points),), math.inf, dtype=torch.float64)
    evaluations, steps = torch.zeros(len(points), dtype=torch.int64), torch.zeros(len(points), dtype=torch.int64)
    start = points
    while evaluations.double().mean() < budget:
        found = track_many(f, start, [0.0])
        best = torch.minimum(best, found.f)
        evaluations += found.evaluations
        steps += found.steps
        start = random_points(points, points, generator)
    return counted(best, steps, evaluations)


def random_points(like: Tensor, box: Tensor, generator: torch.Generator) -> Tensor:
    """Uniform in the cube that holds `box`'s points."""
    low, high = box.min(), box.max()
    return low + (high - low) * torch.rand(like.shape, generator=generator, dtype=torch.float64)


def counted(f: Tensor, steps: Tensor, evaluations: Tensor) -> Row:
    """The hits among the paths' ends, and the means of what was spent."""
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
        colors = ["#9aa3ad" if row["method"].startswith("quasi") else "#1b7f5c" for row in group]
        bars = axis.barh(range(len(group)), [row["hit_rate"] for row in group], color=colors)
        axis.bar_label(bars, [f"{row['hits']} of {row['points']}" for row in group], padding=3, fontsize=7)
        axis.set_yticks(range(len(group)), [title(row) for row in group], fontsize=7)
        axis.set(xlim=(0, 1.15), ylim=(len(group) - 0.4, -0.6), title=part)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1, 0].set_xlabel("share of the starts from which the global minimum was found (f < 1e-8)")
    return figure
