"""A quadratic's path from L = 1000 to 1e-6: exact, tracked, and trained by HomotopySGD."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..optim import HomotopySGD
from ..path import QuadraticTerms, exact_minimiser, random_quadratic, track
from ..pictures import OURS, RIVAL, name_ends
from ..replicas import Replicas
from .report import Row, markdown, progress, pyplot, save_csv, save_figure, say


class Quadratic(nn.Module):
    """f(x) = ½·xᵀAx − bᵀx, as a network without inputs, and as a function of x."""

    def __init__(self, A: np.ndarray, b: np.ndarray):
        super().__init__()
        self.A, self.b = torch.as_tensor(A), torch.as_tensor(b)
        self.x = nn.Parameter(torch.zeros_like(self.b))

    def forward(self, x: Tensor | None = None) -> Tensor:
        x = self.x if x is None else x
        return 0.5 * x @ self.A @ x - self.b @ x


def run(out: Path, quick: bool) -> None:
    """The path in 28 values of L."""
    rows = paths(8, np.geomspace(1e3, 1e-6, 4 if quick else 28).tolist())
    save_csv(out / "path.csv", rows)
    say(markdown([{k: f"{v:.3g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows]))
    save_figure(out / "path.png", picture(rows))


def paths(n: int, Ls: list[float], seed: int = 0) -> list[Row]:
    """For each L, how far the tracked and the trained minimisers of H lie from the exact one."""
    A, b, anchor = random_quadratic(n, seed)
    network = Quadratic(A, b)
    terms = QuadraticTerms.of(n, anchor, None, 2)
    tracked = track(network, np.zeros(n), Ls, anchor, tolerance=1e-10)

    labels = torch.as_tensor(1 + np.arange(n) * 2 // n).byte()
    replicas = Replicas(network, partition={"x": labels}, anchor={"x": torch.as_tensor(anchor)})
    optimizer = HomotopySGD(replicas, 1.0 / np.linalg.eigvalsh(A)[-1], L=Ls[0])
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
        exact = exact_minimiser(A, b, terms, point.L)
        trained = replicas.params[:, :n].numpy()
        errors = {"tracked": np.abs(point.x - exact).max(), "trained": np.abs(trained - exact).max()}
        spent = {"evaluations": point.evaluations, "steps": steps}
        rows.append({"L": point.L} | errors | spent | {"distance": np.linalg.norm(exact[0] - exact[1])})
    return rows


def picture(rows: list[Row]) -> Any:
    """How far the tracked and the trained minimisers lie from the exact one, and how far the copies are apart."""
    figure, axis = pyplot().subplots(figsize=(7, 4.4), layout="constrained")
    L = [row["L"] for row in rows]
    lines = {
        "‖θ − η‖, exact": ([row["distance"] for row in rows], "black"),
        "error of BFGS": ([max(row["tracked"], 1e-17) for row in rows], RIVAL),
        "error of HomotopySGD": ([max(row["trained"], 1e-17) for row in rows], OURS),
    }
    for y, color in lines.values():
        axis.loglog(L, y, "o-", color=color, markersize=4)
    axis.invert_xaxis()
    axis.set(xlabel="L, falling", title="The path of a quadratic: how far from the exact minimiser")
    axis.grid(alpha=0.3)
    name_ends(axis, [(y[-1], L[-1], name, color) for name, (y, color) in lines.items()])
    return figure
