"""`track`: the path from one start, by scipy's quasi-Newton methods."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from ..extras import needs
from .arclength import Curve, Fold
from .corrector import Corrector
from .homotopy import QuadraticTerms, check_Ls
from .objective import Objective, as_float64, check_positive, differentiating, one_value

METHODS = ("BFGS", "L-BFGS-B")
PREDICTORS = (None, "secant", "tangent")
CONTINUATIONS = ("natural", "arclength")
SUSPICIOUS = 5.0  # a move so many times the median of those before it may be a jump, and is looked into
_FINEST = 1 / 64  # of the distance between two given values of L, in adaptive steps


@dataclass(frozen=True)
class PathPoint:
    """One point of a path.

    Attributes:
        L: the homotopy parameter.
        x: the copies, float64 [m, n]; at L = 0 all are equal.
        value: Σ_j f(x_j) plus the quadratic terms; at L = 0, f(x).
        evaluations: of f and its gradient, spent on this point and on the way to it; a Hessian-vector product counts
            as two.
        steps: corrector steps (quasi-Newton iterations) taken to this point.
        converged: the corrector reached a stationary point.
        jumped: the copies moved much further than before: the path ended there, or another was met.
        minimum: the smallest eigenvalue of H's Hessian is positive; looked at by arclength continuation alone.
    """

    L: float
    x: np.ndarray
    value: float
    evaluations: int
    steps: int
    converged: bool
    jumped: bool
    minimum: bool | None = None


@dataclass(frozen=True)
class PathResult:
    """A tracked path.

    Attributes:
        x, f: the last point's mean copy, float64 [n], and f there.
        per_L: every point, in order.
        evaluations, steps: as in PathPoint, in all: those of points given up and of looks into jumps too.
        success: the path was followed to the last L without a jump.
        message: why it stopped, or where it jumped or turned.
        folds: where L turned, by arclength continuation.
    """

    x: np.ndarray
    f: float
    per_L: list[PathPoint]
    evaluations: int
    steps: int
    success: bool
    message: str
    folds: list[Fold] = field(default_factory=list)

    @property
    def jumps(self) -> list[float]:
        """The values of L at which the path jumped."""
        return [point.L for point in self.per_L if point.jumped]


@differentiating
def track(
    f: Any,
    x0: Any,
    Ls: Sequence[float],
    anchor: Any = 0.0,
    method: str = "BFGS",
    *,
    copies: int = 2,
    blocks: Any = None,
    predictor: str | None = None,
    continuation: str = "natural",
    adaptive: bool = False,
    tolerance: float = 1e-8,
    curvature: float = 1.0,
) -> PathResult:
    """Follows a minimiser of H as L falls, each corrected from the one before.

    Args:
        f: a function of a 1-D float64 tensor that returns a scalar tensor, or a pair of NumPy functions (f, gradient).
        x0: where all copies start, [n], or each one's start, [m, n].
        Ls: falling values of L, 0 ≤ L ≤ ∞; begin with math.inf for the decoupled problems (2), end with 0 for f.
        anchor: θ̃, a number or [n].
        method: the corrector, scipy's "BFGS" or "L-BFGS-B".
        copies: m, at least 2.
        blocks: for each variable the number of its block, 0 to m − 1; by default m runs of equal length.
        predictor: "secant" starts each corrector from the line through the last two points (in log L); "tangent" from
            the path's tangent (corrector.py), and with the inverse Hessian of the last one. It needs BFGS, and f of
            operations that torch.func can differentiate twice and batch.
        continuation: "natural" corrects at one L after the other, and jumps where the minimum ends in a fold.
            "arclength" goes through the fold, where L turns (arclength.py): from the first finite L to the last above
            0, in steps of its own, by Newton's method with dense Hessians; ∞ before and 0 after it are natural. It
            takes a curve back to the first L for its end: the minimum does not lead to the last.
        adaptive: choose the steps between the first and the last of `Ls`: halved after a failure or a jump, half as
            long again after a success.
        tolerance: of the gradient's largest element, in coordinates in which H's quadratic terms are well conditioned.
        curvature: what f's second derivatives are thought to be; only the speed depends on it.

    Returns:
        A PathResult; a jump of the path is in it, and makes `success` False.

    Raises:
        TypeError: f is no function; x0, anchor, blocks or Ls hold something else than real numbers; copies is no whole one.
        ValueError: f does not return a real scalar, has no gradient or is not finite at x0; Ls is empty, does not fall or
            goes beyond what float64 holds; x0, anchor or blocks of a wrong shape; an unknown method, predictor or
            continuation, or those that do not go together.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if predictor not in PREDICTORS:
        raise ValueError(f"predictor must be one of None, 'secant', 'tangent', got {predictor!r}")
    if predictor == "tangent" and method != "BFGS":
        raise ValueError(
            f"predictor 'tangent' needs method 'BFGS', whose inverse Hessian it takes along, got {method!r}"
        )
    if continuation not in CONTINUATIONS:
        raise ValueError(f"continuation must be one of {', '.join(CONTINUATIONS)}, got {continuation!r}")
    check_positive("tolerance", tolerance)
    check_positive("curvature", curvature)
    values = check_Ls(Ls)
    if continuation == "arclength":
        if predictor is not None or adaptive:
            raise ValueError(
                "continuation 'arclength' has a predictor and steps of its own: "
                f"predictor must be None and adaptive False, got {predictor!r} and {adaptive}"
            )
        if sum(0 < L < math.inf for L in values) < 2:
            raise ValueError(f"Ls must hold two finite values above 0 for continuation 'arclength', got {values}")
    for name, chosen in (("predictor 'tangent'", predictor), ("continuation 'arclength'", continuation)):
        if chosen in ("tangent", "arclength") and isinstance(f, tuple):
            raise ValueError(f"{name} needs f as a function of a tensor, got a pair of NumPy functions")
    start = as_float64("x0", x0).cpu().numpy()
    n = start.shape[-1] if start.ndim else 0
    if start.ndim not in (1, 2) or n < 1 or (start.ndim == 2 and start.shape[0] != copies):
        raise ValueError(f"x0 must have shape [n] or [{copies}, n], got {list(start.shape)}")
    terms = QuadraticTerms.of(n, anchor, blocks, copies, curvature)
    terms.check_range(values)
    objective = Objective(f)
    x = np.broadcast_to(start, (copies, n)).copy()
    for point in x if start.ndim == 2 else x[:1]:
        value, _ = objective(point)
        if not math.isfinite(value):
            raise ValueError(f"f must be finite at x0, got {value}")

    cold = _Cold(objective, terms, method, tolerance, predictor)
    if continuation == "arclength":
        return _along_the_curve(Curve(one_value(f), terms), cold, x, values)
    steered = _Steered(f, cold) if predictor == "tangent" else cold
    points: list[PathPoint] = []
    position, step, message = 0.0, 1.0, ""
    while position <= len(values) - 1:
        L = _between(values, position)
        point = steered(L, steered.guess(points, L)) if points else steered.begin(L, x)
        if isinstance(steered, _Steered) and points and (not point.converged or _suspicious(points, point.x, L)):
            point = steered.begin(L, points[-1].x)  # near a fold the tangent leads out of the valley before it ends
        if point.converged and _jumped(points, point, cold):
            point = replace(point, jumped=True)
        apart = points and math.isinf(points[-1].L)  # between ∞ and the next value there is nothing
        if adaptive and points and not apart and step > _FINEST and (point.jumped or not point.converged):
            position -= step / 2
            step /= 2
            continue
        points.append(point)
        if not point.converged:
            message = f"the corrector did not converge at L = {L:.6g}"
            break
        if position == len(values) - 1:
            break
        step = min(1.5 * step, len(values) - 1 - position) if adaptive and not math.isinf(L) else 1.0
        position = min(position + step, len(values) - 1)
    final = points[-1].x.mean(0)
    jumps = [f"{point.L:.6g}" for point in points if point.jumped]
    if not message:
        message = f"followed to L = {points[-1].L:.6g}"
        if jumps:
            message += f", but the path jumped at L = {', '.join(jumps)}"
    value, _ = objective(final)
    success = points[-1].converged and not jumps
    spent, steps = objective.evaluations, cold.steps
    if isinstance(steered, _Steered):
        spent, steps = spent + steered.evaluations, steps + steered.steps
    return PathResult(final, value, points, spent, steps, success, message)


def _between(values: list[float], position: float) -> float:
    """L at a real-valued position in the list: geometric between two values, linear down to 0."""
    i = min(int(position), len(values) - 1)
    part = position - i
    if part == 0:
        return values[i]
    upper, lower = values[i], values[i + 1]
    return upper ** (1 - part) * lower**part if lower > 0 else upper * (1 - part)


class _Cold:
    """scipy's minimiser as a corrector: it begins with no curvature at every L."""

    def __init__(
        self, objective: Objective, terms: QuadraticTerms, method: str, tolerance: float, predictor: str | None
    ):
        self.objective, self.terms, self.method, self.tolerance = objective, terms, method, tolerance
        self.predictor, self.steps = predictor, 0
        self.begin: Callable[[float, np.ndarray], PathPoint] = self
        self.found: Any = None  # scipy's last result

    def guess(self, points: list[PathPoint], L: float) -> np.ndarray:
        """The last copies; with the secant, where there is one, those at L on the line through the last two points."""
        if self.predictor != "secant" or len(points) < 2 or L == 0 or math.isinf(points[-2].L):
            return points[-1].x
        before, last = points[-2], points[-1]
        factor = math.log(L / last.L) / math.log(last.L / before.L)
        return last.x + factor * (last.x - before.x)

    def __call__(self, L: float, x: np.ndarray) -> PathPoint:
        """The minimiser of H at L that the corrector finds from x."""
        with needs("path"):
            from scipy.optimize import minimize

        stage, objective, tolerance = self.terms.at(L), self.objective, self.tolerance
        before, began = objective.evaluations, math.nan  # H's value at x, once it is known

        def h(z: np.ndarray) -> tuple[float, np.ndarray]:
            nonlocal began
            copies = stage.expand(z)
            value, gradient = stage.value_and_gradient(copies)
            parts = [objective(copy) for copy in copies]
            gradient = np.stack([g for _, g in parts]) + gradient
            value += sum(v for v, _ in parts)
            began = value if math.isnan(began) else began
            return value, stage.embedding @ gradient.ravel()

        options = {"gtol": tolerance}
        if self.method == "L-BFGS-B":
            options |= {"ftol": 0.0, "maxiter": 10_000, "maxfun": 100_000}
        with np.errstate(all="ignore"):  # a step into infinity is taken back
            found = minimize(h, stage.reduce(x), jac=True, method=self.method, options=options)
        z, steps, (value, gradient) = found.x, found.nit, h(found.x)
        # f's own rounding ends a line search at half the digits; steps that look at the gradient alone go on.
        for _ in range(40):
            if np.abs(gradient).max(initial=0.0) <= tolerance:
                break
            trial = z - found.hess_inv @ gradient
            trial_value, trial_gradient = h(trial)
            no_worse = trial_value <= value + 1e-10 * (1 + abs(value))  # else it is on its way to a saddle or a maximum
            if not (no_worse and np.abs(trial_gradient).max() < 0.9 * np.abs(gradient).max()):
                break
            z, value, gradient, steps = trial, trial_value, trial_gradient, steps + 1
        self.steps += steps
        self.found = found
        copies = np.broadcast_to(stage.expand(z), self.terms.shape).copy()
        largest = float(np.abs(gradient).max(initial=0.0))
        return PathPoint(
            L,
            copies,
            float(value),
            objective.evaluations - before,
            steps,
            _stationary(value, began, largest, tolerance),
            False,
        )


class _Steered:
    """The batched corrector for one path: it follows the tangent and keeps its curvature."""

    def __init__(self, f: Any, cold: _Cold):
        offset = torch.zeros(1, cold.terms.shape[1], dtype=torch.float64)
        self.cold, self.corrector = cold, Corrector(f, cold.terms, offset, cold.tolerance)
        self.counted = 0
        self.value = 0.0  # H's, at the last point

    @property
    def evaluations(self) -> int:
        return int(self.corrector.evaluations)

    @property
    def steps(self) -> int:
        return int(self.corrector.steps)

    def begin(self, L: float, x: np.ndarray) -> PathPoint:
        """The minimiser that scipy's BFGS finds from x, whose inverse Hessian is taken over."""
        point = self.cold(L, x)
        self.value = point.value
        inverse = as_float64("hess_inv", self.cold.found.hess_inv)[None]  # scipy's first one is of integers
        self.corrector.learn(self.cold.terms.at(L).to(inverse), inverse)
        return point

    def guess(self, points: list[PathPoint], L: float) -> np.ndarray:
        """The copies at L on the tangent at the last point."""
        last = points[-1]
        return self.corrector.predict(torch.as_tensor(last.x)[None], last.L, L)[0].numpy()

    def __call__(self, L: float, x: np.ndarray) -> PathPoint:
        """The minimiser of H at L that the corrector finds from x."""
        copies, found = self.corrector(torch.as_tensor(x)[None], L, warm=True)
        value, largest = float(found.value), float(found.gradient.abs().max())
        converged = _stationary(value, self.value, largest, self.corrector.tolerance)
        self.value = value
        spent, self.counted = self.evaluations - self.counted, self.evaluations
        return PathPoint(L, copies[0].numpy().copy(), value, spent, int(found.steps), converged, False)


def _along_the_curve(curve: Curve, cold: _Cold, x: np.ndarray, values: list[float]) -> PathResult:
    """The path by arclength continuation; its natural ends by `cold`."""
    points: list[PathPoint] = []
    counted = 0

    def add(point: PathPoint) -> None:
        nonlocal counted
        point = replace(point, minimum=curve.is_minimum(point.x, point.L))
        counted, spent = curve.evaluations, curve.evaluations - counted
        points.append(replace(point, evaluations=point.evaluations + spent))

    for L in values:
        add(cold(L, points[-1].x if points else x))
        if not points[-1].converged or not math.isinf(L):
            break
    top, end = points[-1].L, min(L for L in values if L > 0)
    message = "" if points[-1].converged else f"the corrector did not converge at L = {top:.6g}"
    if not message:
        steps = curve.steps
        for y in curve.follow(np.append(points[-1].x.ravel(), math.log(top)), end):
            value, L = curve.derivatives(y)[0], end if math.isclose(math.exp(y[-1]), end) else math.exp(y[-1])
            add(PathPoint(L, y[:-1].reshape(x.shape), value, 0, curve.steps - steps, True, False))
            steps = curve.steps
        last = points[-1]
        reached = end >= last.L
        if reached and last.minimum and values[-1] == 0:
            point = cold(0.0, last.x)
            rises = [i for i, (a, b) in enumerate(itertools.pairwise(points), 1) if a.L <= b.L]
            falling = points[rises[-1] if rises else 0 :]  # since the last fold
            add(replace(point, jumped=point.converged and _jumped(falling, point, cold)))
        message = f"followed to L = {points[-1].L:.6g}"
        if points[-1].jumped:
            message += ", but the path jumped there"
        if curve.folds:
            message += f" through {'a fold' if len(curve.folds) == 1 else 'folds'} at L = "
            message += ", ".join(f"{fold.L:.6g}" for fold in curve.folds)
        if not reached:
            message += f", and not to L = {end:.6g}" + (": the curve came back" if top < last.L else "")
        if not last.minimum:
            message += "; what is there is no minimum"
    final = points[-1].x.mean(0)
    value, _ = cold.objective(final)
    success = values[-1] >= points[-1].L and points[-1].converged and bool(points[-1].minimum) and not points[-1].jumped
    spent = cold.objective.evaluations + curve.evaluations
    return PathResult(final, value, points, spent, cold.steps + curve.steps, success, message, curve.folds)


def _stationary(value: float, began: float, gradient: float, tolerance: float) -> bool:
    """Whether H's gradient, by its largest element, is as small as the tolerance or rounding allow. Rounding is that of the
    value, but not of one that ran away from where the corrector began."""
    size = min(abs(value), 1 + abs(began))
    return bool(math.isfinite(value) and gradient <= max(tolerance, 1e-6 * max(1.0, size)))


def _jumped(points: list[PathPoint], point: PathPoint, correct: Callable[[float, np.ndarray], PathPoint]) -> bool:
    """Whether the path broke off before `point`: a move out of proportion, which no smaller steps in L divide."""
    if not points or not _suspicious(points, point.x, point.L):
        return False
    before, after = points[-1], point
    whole = np.linalg.norm(after.x - before.x)
    for _ in range(6):
        middle = correct(math.sqrt(before.L * after.L) if after.L > 0 else before.L / 10, before.x)
        after = correct(after.L, middle.x)
        first, second = np.linalg.norm(middle.x - before.x), np.linalg.norm(after.x - middle.x)
        before, after = (before, middle) if first > second else (middle, after)
    # A path's largest part in 64 is small. A jump's may end in a nearer valley than the whole step did.
    return bool(max(first, second) > 0.25 * whole)


def _suspicious(points: list[PathPoint], x: np.ndarray, L: float) -> bool:
    """Whether the move to x is visible, and out of proportion to those before it (per step of log L)."""
    finite = [point for point in points if not math.isinf(point.L)]
    if not finite:
        return False
    distance = np.linalg.norm(x - finite[-1].x)
    size = 1 + np.linalg.norm(x) / math.sqrt(len(x))
    if len(finite) < 3:  # too few to say what is in proportion
        return bool(distance > 0.5 * size)
    steps = [math.log(a.L / b.L) for a, b in itertools.pairwise(finite)]
    moves = [np.linalg.norm(b.x - a.x) / s for (a, b), s in zip(itertools.pairwise(finite), steps, strict=True)]
    step = math.log(finite[-1].L / L) if L > 0 else steps[-1]
    return bool(distance > 0.05 * size and distance / step > SUSPICIOUS * np.median(moves[-5:]))
