"""The pictures of the paper's small experiments. Imports matplotlib when called, nothing of the package."""

from pathlib import Path
from typing import Any


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def hit_rates(rows: list[dict[str, Any]], path: Path) -> None:
    """The share of starts that reached the global minimum, a bar for each row, a panel for each part of the table."""
    plt = _pyplot()
    parts = list(dict.fromkeys(row["part"] for row in rows))
    heights = [sum(row["part"] == part for row in rows) for part in parts]
    figure, axes = plt.subplots(len(parts), 1, figsize=(10, 0.24 * sum(heights) + 0.9 * len(parts)), squeeze=False,
                                gridspec_kw={"height_ratios": heights}, layout="constrained")  # fmt: skip
    for axis, part in zip(axes[:, 0], parts, strict=True):
        mine = [row for row in rows if row["part"] == part]
        names = [
            f"{r['problem']}, n = {r['n']}: {r['method']}" + (f", anchor {r['anchor']}" if r["anchor"] else "")
            for r in mine
        ]
        colors = ["#9aa3ad" if r["method"].startswith("quasi") else "#1b7f5c" for r in mine]
        bars = axis.barh(range(len(mine)), [r["hit_rate"] for r in mine], color=colors)
        axis.bar_label(bars, [f"{r['hits']} of {r['points']}" for r in mine], padding=3, fontsize=7)
        axis.set_yticks(range(len(mine)), names, fontsize=7)
        axis.set(xlim=(0, 1.15), ylim=(len(mine) - 0.4, -0.6), title=part)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1, 0].set_xlabel("share of the starts from which the global minimum was found (f < 1e-8)")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _heights(f, low: float, high: float, count: int = 161):
    import numpy as np
    import torch

    axis = torch.linspace(low, high, count, dtype=torch.float64)
    points = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1).view(-1, 2)
    return axis.numpy(), np.asarray(torch.func.vmap(f)(points).view(count, count))


BOX = (-3.0, 6.0)


def surface(f, paths: list[tuple[tuple[float, ...], Any]], path: Path) -> None:
    """A function of two variables as a surface and as contours, with the tracked paths of θ and η from several starts."""
    import numpy as np

    plt = _pyplot()
    axis, heights = _heights(f, *BOX)
    figure = plt.figure(figsize=(13, 5.5), layout="constrained")
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
    figure.savefig(path, dpi=110)
    plt.close(figure)


def falling(f, paths: list[tuple[tuple[float, ...], Any]], path: Path) -> None:
    """L falling: θ and η on the contours, a frame for each value of L."""
    plt = _pyplot()
    from matplotlib.animation import FuncAnimation, PillowWriter

    axis, heights = _heights(f, *BOX)
    figure, axes = plt.subplots(figsize=(5.2, 5), layout="constrained")
    axes.contour(axis, axis, heights, levels=25, cmap="viridis", linewidths=0.7)
    axes.set(xlabel="x₁", ylabel="x₂", xlim=BOX, ylim=BOX, aspect="equal")
    marks = [(axes.plot([], [], "o", color="C3")[0], axes.plot([], [], "s", color="C0")[0], axes.plot([], [], "k-", lw=0.8)[0])
             for _ in paths]  # fmt: skip
    frames = len(paths[0][1].per_L)

    def draw(frame: int) -> list[Any]:
        axes.set_title(f"L = {paths[0][1].per_L[frame].L:.3g}   (θ red, η blue)")
        for (theta, eta, line), (_, result) in zip(marks, paths, strict=True):
            (a, b), (c, d) = result.per_L[min(frame, len(result.per_L) - 1)].x
            theta.set_data([a], [b])
            eta.set_data([c], [d])
            line.set_data([a, c], [b, d])
        return []

    animation = FuncAnimation(figure, draw, frames=[*range(frames), *[frames - 1] * 6])
    animation.save(path, writer=PillowWriter(fps=6), dpi=80)
    plt.close(figure)


def convergence(rows: list[dict[str, Any]], path: Path) -> None:
    """The theorems' quantities against the number of steps, on log axes; a line per seed."""
    plt = _pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    titles = {"3.2": "theorem 3.2: g(θ̄ₙ, L̄ₙ) − g(θ*, 0), logistic regression",
              "3.1": "theorem 3.1: Σγ‖∇g‖²/Σγ, a small network, L fixed"}  # fmt: skip
    for axis, (theorem, title) in zip(axes, titles.items(), strict=True):
        for color, mode in enumerate(("explicit", "implicit")):
            mine = [row for row in rows if (row["theorem"], row["mode"]) == (theorem, mode)]
            for number, seed in enumerate(dict.fromkeys(row["seed"] for row in mine)):
                line = [row for row in mine if row["seed"] == seed]
                axis.loglog([r["n"] for r in line], [r["value"] for r in line], color=f"C{color}", alpha=0.6,
                            label=None if number else f"{mode} steps")  # fmt: skip
        axis.set(xlabel="steps", title=title)
        axis.grid(alpha=0.3, which="both")
        axis.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def quadratic_path(rows: list[dict[str, Any]], path: Path) -> None:
    """How far the tracked and the trained minimisers lie from the exact one, and how far the copies are apart."""
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(7, 4.4), layout="constrained")
    L = [row["L"] for row in rows]
    axis.loglog(L, [row["distance"] for row in rows], "k-", label="‖θ − η‖ of the exact path")
    axis.loglog(L, [max(row["trained"], 1e-17) for row in rows], "s-", label="error, trained by HomotopySGD")
    axis.loglog(L, [max(row["tracked"], 1e-17) for row in rows], "o-", label="error, tracked by BFGS")
    axis.invert_xaxis()
    axis.set(xlabel="L, falling", title="The path of a quadratic")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)
