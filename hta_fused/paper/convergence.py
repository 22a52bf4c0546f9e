"""Theorems 3.2 and 3.1 in numbers: logistic regression with L falling, and a small network at a fixed L."""

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..ops import homotopy_penalty, homotopy_step_
from ..optim import HomotopySGD
from ..path import Objective
from ..pictures import OURS, RIVAL, name_ends
from ..replicas import Replicas
from .report import Row, markdown, progress, pyplot, save_csv, save_figure, say

MODES = ("explicit", "implicit")
TITLES = {
    "3.2": "theorem 3.2: g(θ̄ₙ, L̄ₙ) − g(θ*, 0), logistic regression",
    "3.1": "theorem 3.1: Σγ‖∇g‖²/Σγ, a small network, L fixed",
}


def run(out: Path, quick: bool) -> None:
    """Both theorems, with explicit and with implicit steps."""
    rows = convex(2 if quick else 8, 200 if quick else 30_000) + nonconvex(1 if quick else 4, 20 if quick else 2000)
    save_csv(out / "convergence.csv", rows)
    say(markdown([summary(rows, theorem, mode) for theorem, mode in itertools.product(TITLES, MODES)]))
    save_figure(out / "convergence.png", picture(rows))


def cancer() -> tuple[Tensor, Tensor]:
    """scikit-learn's breast cancer data: 569 cases, 30 standardised features and a constant; labels ±1."""
    from sklearn.datasets import load_breast_cancer

    data = load_breast_cancer()
    x = torch.as_tensor((data.data - data.data.mean(0)) / data.data.std(0))
    return torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1), torch.as_tensor(2.0 * data.target - 1)


def marks(first: int, steps: int) -> set[int]:
    """The steps, evenly spaced in log n, after which a value is noted."""
    return {round(float(n)) for n in np.geomspace(first, steps, 25)}


def convex(seeds: int, steps: int) -> list[Row]:
    """Theorem 3.2: the ergodic mean's gap g(θ̄_n, L̄_n) − g(θ*, 0) under γ_k = c/k and L_k falling to 0.

    All seeds go through the op as one flat vector. f is the regularised logistic loss, g is H.
    """
    from scipy.optimize import minimize

    x, y = cancer()
    d, weight = x.shape[1], 0.01

    def f(w: Tensor) -> Tensor:  # of each row
        return torch.nn.functional.softplus(-y * (w @ x.T)).mean(-1) + weight / 2 * w.square().sum(-1)

    best = minimize(Objective(f), np.zeros(d), jac=True, method="BFGS", options={"gtol": 1e-10}).fun
    in_block_1 = torch.arange(d) < d // 2
    labels = torch.where(in_block_1, 1, 2).byte().repeat(seeds)
    rows, noted = [], marks(10, steps)
    for mode in MODES:
        generator = torch.Generator().manual_seed(0)
        copies = torch.zeros(2, seeds, d, dtype=torch.float64)
        means = torch.zeros_like(copies)
        mean_L = total = 0.0
        for k in progress(range(1, steps + 1), mode):
            lr, L = 10.0 / (k + 50), 4.0 / math.sqrt(k)  # lr·4/L < 2 at every k: the explicit steps are stable
            batch = torch.randint(len(x), (seeds, 32), generator=generator)
            grads = []
            for w in copies:
                margin = y[batch] * torch.einsum("sbd,sd->sb", x[batch], w)
                grads.append(-torch.einsum("sb,sbd->sd", y[batch] * torch.sigmoid(-margin), x[batch]) / 32 + weight * w)
            theta, eta, grad_theta, grad_eta = (t.view(-1) for t in (*copies, *grads))
            homotopy_step_(theta, eta, grad_theta, grad_eta, None, None, None, labels, L=L, lr=lr, mode=mode)
            total += lr
            mean_L += (L - mean_L) * lr / total
            means += (copies - means) * lr / total
            if k in noted:
                theta, eta = means
                penalty = mean_L * ((theta * in_block_1).square().sum(1) + (eta * ~in_block_1).square().sum(1))
                penalty += (theta - eta).square().sum(1) / mean_L
                gap = f(theta) + f(eta) + penalty - 2 * best
                for seed, value in enumerate(gap.tolist()):
                    row = {"theorem": "3.2", "mode": mode, "seed": seed, "n": k}
                    rows.append(row | {"value": value, "L": mean_L, "weight": total})
    return rows


def nonconvex(seeds: int, steps: int) -> list[Row]:
    """Theorem 3.1: the weighted mean Σγ_k‖∇g(θ_k)‖²/Σγ_k at a fixed L, for a small network, against K."""
    x, y = cancer()
    x, classes, L = x[:, :-1].float(), (y > 0).long(), 0.5
    rows, noted = [], marks(1, steps)
    for mode, seed in itertools.product(MODES, range(seeds)):
        torch.manual_seed(seed)
        network = nn.Sequential(nn.Linear(30, 16), nn.Tanh(), nn.Linear(16, 2))
        replicas = Replicas(network, partition="layer_halves")
        optimizer = HomotopySGD(replicas, 0.1, L=L, mode=mode)

        def loss(copy: nn.Module, batch: Tensor | slice = slice(None)) -> Tensor:
            return nn.functional.cross_entropy(copy(x[batch]), classes[batch])

        weighted = total = 0.0
        for k in progress(range(1, steps + 1), f"{mode}, seed {seed}"):
            lr = 0.2 / (1 + k) ** 0.6  # Σγ_k diverges, Σγ_k² does not
            optimizer.param_groups[0]["lr"] = lr
            optimizer.zero_grad()
            replicas.backward(loss)
            theta, eta = (row.clone().requires_grad_() for row in replicas.params)
            penalty = homotopy_penalty(theta, eta, replicas.anchor, replicas.partition, L)
            gradient = torch.stack(torch.autograd.grad(penalty, (theta, eta))) + replicas.grads
            weighted += lr * gradient.double().square().sum().item()
            total += lr
            batch = torch.randint(len(x), (32,))
            optimizer.zero_grad()
            replicas.backward(lambda copy, batch=batch: loss(copy, batch))
            optimizer.step()
            if k in noted:
                row = {"theorem": "3.1", "mode": mode, "seed": seed, "n": k}
                rows.append(row | {"value": weighted / total, "L": L, "weight": total})
    return rows


def slope(rows: list[Row]) -> float:
    """The slope of log(value) against log(n) over the last decade of n, all seeds together."""
    last = max(row["n"] for row in rows)
    chosen = [row for row in rows if row["n"] >= last / 10]
    return float(np.polyfit(np.log([r["n"] for r in chosen]), np.log([max(r["value"], 1e-300) for r in chosen]), 1)[0])


def summary(rows: list[Row], theorem: str, mode: str) -> Row:
    """How far a theorem's quantity falls. What both proofs bound is the value times Σγ."""
    rows = [row for row in rows if (row["theorem"], row["mode"]) == (theorem, mode)]
    first, last = rows[0]["n"], rows[-1]["n"]
    third = max(row["n"] for row in rows if 3 * row["n"] <= last)
    value = {n: np.mean([row["value"] for row in rows if row["n"] == n]) for n in (first, third, last)}
    weight = {row["n"]: row["weight"] for row in rows}
    return {
        "theorem": theorem,
        "steps": mode,
        "first n": first,
        "value": value[first],
        "last n": last,
        "value there": value[last],
        "slope over the last decade": round(slope(rows), 3),
        "value × Σγ at a third of it": value[third] * weight[third],
        "and there": value[last] * weight[last],
    }


def picture(rows: list[Row]) -> Any:
    """The theorems' quantities against the number of steps, on log axes; a line per seed."""
    figure, axes = pyplot().subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for axis, (theorem, title) in zip(axes, TITLES.items(), strict=True):
        ends: list[tuple[float, float, str, str]] = []
        for mode, color, style in zip(MODES, (RIVAL, OURS), ("-", "--"), strict=True):  # they lie on each other
            of_mode = [row for row in rows if (row["theorem"], row["mode"]) == (theorem, mode)]
            for seed in dict.fromkeys(row["seed"] for row in of_mode):
                n, values = zip(*((row["n"], row["value"]) for row in of_mode if row["seed"] == seed), strict=True)
                axis.loglog(n, values, style, color=color, linewidth=1.2)
            ends.append((values[-1], n[-1], f"{mode} steps", color))
        axis.set(xlabel="steps", title=title)
        axis.grid(alpha=0.3)
        name_ends(axis, ends)
    return figure
