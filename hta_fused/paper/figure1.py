"""Figure 1: equation (33)'s surface for n = 2, the paths of θ and η on it from several starts, and L falling."""

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import problems
from ..extras import needs
from ..path import Fold, PathResult, track
from ..pictures import ETA, THETA
from .report import Row, progress, pyplot, save_animation, save_csv, save_figure, say

SMOOTH, FOLDED = (0.0, 2.0), (5.0, 5.0)  # the starts that the still picture follows
STARTS = (SMOOTH, (0.0, 5.0), (5.0, 0.0), FOLDED, (4.0, 3.0))
BOX = (-3.0, 6.0)  # what of each axis is drawn

Paths = dict[tuple[float, ...], PathResult]


def run(out: Path, quick: bool) -> None:
    """Tracks and draws the paths."""
    Ls = [math.inf, *np.geomspace(1000, 0.05, 9 if quick else 61).tolist(), 0.0]
    paths: Paths = {}
    folds: dict[tuple[float, ...], list[Fold | None]] = {}
    rows: list[Row] = []
    for start in progress((SMOOTH, FOLDED) if quick else STARTS, "paths"):
        result = paths[start] = track(problems.chow, np.array(start), Ls, 0.0)
        for point in result.per_L:
            theta, eta = point.x
            rows.append(
                {"start": str(start), "L": point.L}
                | {"theta_1": theta[0], "theta_2": theta[1], "eta_1": eta[0], "eta_2": eta[1]}
                | {"H": point.value, "evaluations": point.evaluations, "jumped": point.jumped}
            )
        say(f"from {start}: {result.message}; f = {result.f:.3g}, {result.evaluations} evaluations")
        folds[start] = folds_of(start, result, Ls)
        for fold in filter(None, folds[start]):
            say(f"    a fold at L = {fold.L:.4f}")
    save_csv(out / "figure1.csv", rows)
    save_figure(out / "figure1.png", surface(paths, folds))
    save_animation(out / "figure1.gif", *falling(list(paths.values())))


def folds_of(start: tuple[float, ...], result: PathResult, Ls: list[float]) -> list[Fold | None]:
    """For each jump of a path the fold before it, by arclength continuation from L = ∞ and then from the jump before."""
    found: list[Fold | None] = []
    for since in [math.inf, *result.jumps[:-1]] if result.jumps else []:
        later = [math.inf, *(L for L in Ls if since > L)]
        folds = track(problems.chow, np.array(start), later, 0.0, continuation="arclength").folds
        found.append(folds[0] if folds else None)
    return found


def surface(paths: Paths, folds: dict[tuple[float, ...], list[Fold | None]]) -> Any:
    """f as a surface; on its contours a path that is one, and one that ends in folds and jumps."""
    axis, heights = _heights()
    figure = pyplot().figure(figsize=(15, 5.2), layout="constrained")
    left = figure.add_subplot(1, 3, 1, projection="3d")
    left.plot_surface(*np.meshgrid(axis, axis), heights, cmap="Greys", rstride=2, cstride=2, linewidth=0, alpha=0.9)
    left.set(xlabel="x₁", ylabel="x₂", zlabel="f", title="f, equation (33), n = 2")
    for number, start in enumerate((SMOOTH, FOLDED), 2):
        panel = figure.add_subplot(1, 3, number)
        panel.contour(axis, axis, heights, levels=18, colors="0.8", linewidths=0.6)
        _path(panel, paths[start], folds[start])
        panel.plot(*start, "k+", markersize=11)
        panel.annotate(f"start {start[0]:g}, {start[1]:g}", start, (0, 8), textcoords="offset points", ha="center")
        what = "two folds (crosses), and a jump at each" if start == FOLDED else "one path"
        panel.set(xlabel="x₁", ylabel="x₂", title=f"from ({start[0]:g}, {start[1]:g}): {what}", aspect="equal")
        panel.set(xlim=(-1, 6), ylim=(-1, 6))
    return figure


def _path(panel: Any, result: PathResult, folds: list[Fold | None]) -> None:
    """θ and η as L falls: a line while it is one path, a dotted arrow where it jumps from a fold."""
    points = result.per_L
    cuts = [i for i, point in enumerate(points) if point.jumped]
    for copy, (name, color, place) in enumerate((("θ", THETA, (-14, 8)), ("η", ETA, (-12, -15)))):
        x = np.array([point.x[copy] for point in points])
        for first, last in itertools.pairwise([0, *cuts, len(points)]):
            panel.plot(*x[first:last].T, "o-", color=color, markersize=2.5, linewidth=1.6)
        for cut, fold in zip(cuts, folds, strict=True):
            if np.linalg.norm(x[cut] - x[cut - 1]) < 0.2:  # the other copy jumps
                continue
            end = x[cut - 1] if fold is None else fold.x[copy]
            arrow = {"arrowstyle": "->", "linestyle": ":", "color": color, "linewidth": 1.4, "shrinkA": 0}
            panel.annotate("", x[cut], end, arrowprops=arrow)
            if fold is None:
                continue
            panel.plot(*end, "X", color=color, markersize=9, markeredgecolor="black", zorder=5)
            if copy or np.linalg.norm(points[cut].x[1] - points[cut - 1].x[1]) < 0.2:  # one label for both
                text = f"fold, L = {fold.L:.3g}"
                panel.annotate(text, end, (9, 6), textcoords="offset points", color=color)
        panel.annotate(f"{name}, L = ∞", x[0], place, textcoords="offset points", color=color, weight="bold")
    panel.plot(*result.x, "k*", markersize=13, zorder=6)
    panel.annotate("both, L = 0", result.x, (-6, 11), textcoords="offset points", weight="bold")


def falling(paths: list[PathResult]) -> tuple[Any, Any]:
    """θ and η on the contours, a frame for each value of L: the figure and its animation."""
    with needs("paper"):
        from matplotlib.animation import FuncAnimation

    axis, heights = _heights()
    figure, axes = pyplot().subplots(figsize=(5.2, 5), layout="constrained")
    axes.contour(axis, axis, heights, levels=18, colors="0.8", linewidths=0.6)
    axes.set(xlabel="x₁", ylabel="x₂", xlim=BOX, ylim=BOX, aspect="equal")
    # Of each path θ, η and the line between them.
    marks = [axes.plot([], [], "o", [], [], "o", [], [], "k-", linewidth=0.8) for _ in paths]
    for theta, eta, _ in marks:
        theta.set_color(THETA)
        eta.set_color(ETA)
    frames = len(paths[0].per_L)

    def draw(frame: int) -> list[Any]:
        axes.set_title(f"L = {paths[0].per_L[frame].L:.3g}   (θ red, η blue)")
        for (theta, eta, line), result in zip(marks, paths, strict=True):
            (a, b), (c, d) = result.per_L[min(frame, len(result.per_L) - 1)].x
            theta.set_data([a], [b])
            eta.set_data([c], [d])
            line.set_data([a, c], [b, d])
        return []

    return figure, FuncAnimation(figure, draw, frames=[*range(frames), *[frames - 1] * 6])


def _heights() -> tuple[np.ndarray, np.ndarray]:
    """One axis of the box, and f over both."""
    axis = torch.linspace(*BOX, 161, dtype=torch.float64)
    points = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1)
    return axis.numpy(), torch.func.vmap(torch.func.vmap(problems.chow))(points).numpy()
