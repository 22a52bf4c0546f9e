"""Pseudo-arclength continuation: H's stationary points as a curve in (x, log L), which goes on where L turns back.

Keller 1977. Every step solves with H's dense Hessian, which near a fold is singular, bordered by the curve's tangent, with
which it is not; so it is for few variables.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ..extras import needs
from .homotopy import QuadraticTerms

_LONGEST, _SHORTEST = 0.25, 1e-7  # of steps along the curve


@dataclass(frozen=True)
class Fold:
    """A point at which L turns back and a minimum meets another stationary point.

    Attributes:
        L: the homotopy parameter.
        x: the copies, float64 [m, n].
    """

    L: float
    x: np.ndarray


@dataclass
class Curve:
    """The curve of stationary points.

    Attributes:
        f: a function of a 1-D tensor that torch.func can batch and differentiate twice.
        evaluations, steps: of f and its gradient, a Hessian as 2·n of them; Newton steps.
    """

    f: Callable[[Any], Any]
    terms: QuadraticTerms
    evaluations: int = 0
    steps: int = 0
    folds: list[Fold] = field(default_factory=list)

    def derivatives(self, y: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
        """H, its gradient by x, [d], and the gradient's derivatives, [d, d + 1], at y = (x, log L), d = m·n."""
        (m, n), L = self.terms.shape, math.exp(y[-1])
        x, stage = y[:-1].reshape(m, n), self.terms.at(L)
        point = torch.as_tensor(x)
        gradient, value = torch.func.vmap(torch.func.grad_and_value(self.f))(point)
        hessians = torch.func.vmap(torch.func.hessian(self.f))(point)
        self.evaluations += m * (1 + 2 * n)
        penalty, pull = stage.value_and_gradient(x)
        quadratic = stage.product(np.eye(m * n).reshape(m * n, m, n)).reshape(m * n, m * n)
        hessian = torch.block_diag(*hessians).numpy() + quadratic
        by_log_L = L * stage.mixed_derivative(x).reshape(-1, 1)
        return float(value.sum()) + penalty, (gradient.numpy() + pull).ravel(), np.hstack([hessian, by_log_L])

    def is_minimum(self, x: np.ndarray, L: float) -> bool:
        """Whether the smallest eigenvalue of H's Hessian at copies [m, n] is positive."""
        if 0 < L < math.inf:
            hessian = self.derivatives(np.append(x.ravel(), math.log(L)))[2][:, :-1]
        else:  # of f itself, or over the free variables alone
            point = torch.as_tensor(x[:1] if L == 0 else x)
            embedding = self.terms.at(L).embedding
            hessian = (
                embedding @ torch.block_diag(*torch.func.vmap(torch.func.hessian(self.f))(point)).numpy() @ embedding.T
            )
            self.evaluations += 2 * point.numel()
        return bool(np.linalg.eigvalsh(hessian)[0] > 0)

    def newton(self, y: np.ndarray, row: np.ndarray) -> np.ndarray | None:
        """The curve's point in the plane through y that is normal to `row`, [d + 1], where Newton finds it."""
        for _ in range(8):
            _, gradient, jacobian = self.derivatives(y)
            if not (np.isfinite(gradient).all() and np.isfinite(jacobian).all()):
                return None
            move = np.linalg.lstsq(np.vstack([jacobian, row]), -np.append(gradient, 0.0))[0]
            y, self.steps = y + move, self.steps + 1
            if np.linalg.norm(move) <= 1e-10 * (1 + np.linalg.norm(y)):
                return y
            if abs(move[-1]) > 1:
                return None
        return None

    def tangent(self, y: np.ndarray, like: np.ndarray) -> np.ndarray:
        """The curve's unit tangent, [d + 1], that points along `like`."""
        direction = np.linalg.svd(self.derivatives(y)[2])[2][-1]
        return direction if direction @ like > 0 else -direction

    def follow(self, y: np.ndarray, end: float, limit: int = 2000) -> Iterator[np.ndarray]:
        """The points after y, in the direction in which L falls first, to L = `end` or until L is back where it began.

        The folds between them are kept in `folds`.
        """
        top, down = y[-1], -np.eye(len(y))[-1]
        tangent, length = self.tangent(y, down), _LONGEST / 4
        while limit > 0 and length > _SHORTEST and y[-1] <= top:
            predicted = y + length * tangent
            ahead = self.newton(predicted, tangent)
            # Far from where it was looked for, or after a sharp bend, it may be another curve's.
            if ahead is None or np.linalg.norm(ahead - predicted) > 0.2 * length:
                length /= 2
                continue
            turned = self.tangent(ahead, tangent)
            if turned @ tangent < 0.9:
                length /= 2
                continue
            if turned[-1] * tangent[-1] < 0:
                self._locate_fold(y, tangent, length)
            if ahead[-1] <= math.log(end):
                last = self.newton(np.append(ahead[:-1], math.log(end)), down)
                if last is not None:
                    yield last
                return
            yield ahead
            limit -= 1
            y, tangent, length = ahead, turned, min(1.3 * length, _LONGEST)

    def _locate_fold(self, y: np.ndarray, tangent: np.ndarray, length: float) -> None:
        """Finds where, at most `length` ahead of y, the tangent has no part in L."""
        with needs("path"):
            from scipy.optimize import brentq

        def turning(part: float) -> float:
            there = self.newton(y + part * tangent, tangent)
            return math.nan if there is None else float(self.tangent(there, tangent)[-1])

        at = self.newton(y + brentq(turning, 0.0, length, xtol=1e-12) * tangent, tangent)
        if at is not None:
            self.folds.append(Fold(math.exp(at[-1]), at[:-1].reshape(self.terms.shape)))
