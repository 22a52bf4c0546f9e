"""Figure 1: equation (33)'s surface for n = 2, the paths of θ and η on it from several starts, and L falling."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import problems
from ..extras import needs
from ..path import PathResult, track
from .report import progress, pyplot, save_animation, save_csv, save_figure, say

STARTS = ((0.0, 5.0), (5.0, 0.0), (5.0, 5.0), (4.0, 3.0))
BOX = (-3.0, 6.0)  # what of each axis is drawn

Paths = list[tuple[tuple[float, ...], PathResult]]


def run(out: Path, quick: bool) -> None:
    """Tracks and draws the paths."""
    Ls = [math.inf, *np.geomspace(10, 0.05, 6 if quick else 40).tolist(), 0.0]
    paths: Paths = []
    rows = []
    for start in progress(STARTS[: 1 if quick else 4], "paths"):
        result = track(problems.chow, np.array(start), Ls, 0.0)
        paths.append((start, result))
        for point in result.per_L:
            theta, eta = point.x
            rows.append(
                {"start": str(start), "L": point.L}
                | {"theta_1": theta[0], "theta_2": theta[1], "eta_1": eta[0], "eta_2": eta[1]}
                | {"H": point.value, "evaluations": point.evaluations, "jumped": point.jumped}
            )
        say(f"from {start}: {result.message}; f = {result.f:.3g}, {result.evaluations} evaluations")
        if result.jumps:
            say(f"    by arclength: {track(problems.chow, np.array(start), Ls, 0.0, continuation='arclength').message}")
    save_csv(out / "figure1.csv", rows)
    save_figure(out / "figure1.png", surface(paths))
    save_animation(out / "figure1.gif", *falling(paths))


def surface(paths: Paths) -> Any:
    """f as a surface and as contours, with the tracked paths of θ and η."""
    axis, heights = _heights()
    figure = pyplot().figure(figsize=(13, 5.5), layout="constrained")
    left = figure.add_subplot(1, 2, 1, projection="3d")
    left.plot_surface(*np.meshgrid(axis, axis), heights, cmap="viridis", rstride=2, cstride=2, linewidth=0, alpha=0.9)
    left.set(xlabel="x₁", ylabel="x₂", zlabel="f", title="f, equation (33), n = 2")
    right = figure.add_subplot(1, 2, 2)
    right.contour(axis, axis, heights, levels=25, cmap="viridis", linewidths=0.7)
    for number, (start, result) in enumerate(paths):
        theta, eta = (np.array([point.x[copy] for point in result.per_L]) for copy in (0, 1))
        right.plot(*theta.T, "o-", color="C3", markersize=3, linewidth=1, label=None if number else "θ")
        right.plot(*eta.T, "s-", color="C0", markersize=3, linewidth=1, label=None if number else "η")
        right.plot(*start, "k+", markersize=11, label=None if number else "starts")
    right.plot(*paths[0][1].x, "k*", markersize=14, label="where θ and η meet")
    right.set(xlabel="x₁", ylabel="x₂", title="θ and η from L = ∞ to L = 0, θ̃ = 0", xlim=BOX, ylim=BOX, aspect="equal")
    right.legend(loc="upper left", bbox_to_anchor=(1.01, 1))
    return figure


def falling(paths: Paths) -> tuple[Any, Any]:
    """θ and η on the contours, a frame for each value of L: the figure and its animation."""
    with needs("paper"):
        from matplotlib.animation import FuncAnimation

    axis, heights = _heights()
    figure, axes = pyplot().subplots(figsize=(5.2, 5), layout="constrained")
    axes.contour(axis, axis, heights, levels=25, cmap="viridis", linewidths=0.7)
    axes.set(xlabel="x₁", ylabel="x₂", xlim=BOX, ylim=BOX, aspect="equal")
    # Of each path θ, η and the line between them.
    marks = [axes.plot([], [], "oC3", [], [], "sC0", [], [], "k-", linewidth=0.8) for _ in paths]
    frames = len(paths[0][1].per_L)

    def draw(frame: int) -> list[Any]:
        axes.set_title(f"L = {paths[0][1].per_L[frame].L:.3g}   (θ red, η blue)")
        for (theta, eta, line), (_, result) in zip(marks, paths, strict=True):
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
