"""Tracks the minimisers of equation (3) as L falls, by quasi-Newton steps: for problems of few variables.

    H(x₁, …, x_m; L) = Σ_j f(x_j) + L·Σ_j ‖(x_j − θ̃) where copy j is anchored‖² + (1/L)·Σ_{i<j} ‖x_i − x_j‖²

Copy j is free on one of m blocks of variables and anchored on the others; m = 2 gives equation (3). L = ∞ stands for the
decoupled problems (2), L = 0 for f itself. `track` follows one path with scipy's correctors; `track_many` follows
thousands at once in torch. Knows nothing of networks; imports torch and, in `track`, scipy.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

METHODS = ("BFGS", "L-BFGS-B")
SUSPICIOUS = 5.0  # a move so many times the median of those before it may be a jump, and is looked into
_FINEST = 1 / 64  # of the distance between two given values of L, in adaptive steps


@dataclass(frozen=True)
class PathPoint:
    """One point of a path.

    Attributes:
        L: the homotopy parameter.
        x: the copies, float64 [m, n]; at L = 0 all are equal.
        value: Σ_j f(x_j) plus the quadratic terms; at L = 0, f(x).
        evaluations: of f and its gradient, spent on this point.
        converged: the corrector reached a stationary point.
        jumped: the copies moved much further than before: the path ended there, or another was met.
    """

    L: float
    x: np.ndarray
    value: float
    evaluations: int
    converged: bool
    jumped: bool


@dataclass(frozen=True)
class PathResult:
    """A tracked path.

    Attributes:
        x, f: the last point's mean copy, float64 [n], and f there.
        per_L: every point, in order.
        evaluations: of f and its gradient in all.
        success: the path was followed to the last L without a jump.
        message: why it stopped, or where it jumped.
    """

    x: np.ndarray
    f: float
    per_L: list[PathPoint]
    evaluations: int
    success: bool
    message: str

    @property
    def jumps(self) -> list[float]:
        """The values of L at which the path jumped."""
        return [point.L for point in self.per_L if point.jumped]


# ---------------------------------------------------------------------------------------------------------- the homotopy


@dataclass
class Homotopy:
    """The quadratic terms of H for m copies of n variables, and coordinates in which they are well conditioned.

    Attributes:
        anchored: [m, n], 1 where a copy feels the anchor.
        anchor: [n].
        curvature: what f's second derivatives are thought to be; only the correctors' speed depends on it.
    """

    anchored: np.ndarray
    anchor: np.ndarray
    curvature: float = 1.0

    @classmethod
    def of(cls, n: int, anchor: Any, blocks: Any, copies: int) -> "Homotopy":
        if copies < 2 or (blocks is None and n < copies):
            raise ValueError(f"copies must be from 2 to the number of variables ({n}), got {copies}")
        if blocks is None:
            blocks = np.arange(n) * copies // n
        blocks = np.asarray(blocks)
        if blocks.shape != (n,) or not np.isin(blocks, np.arange(copies)).all():
            raise ValueError(
                f"blocks must hold a number from 0 to {copies - 1} for each of {n} variables, got {blocks}"
            )
        if isinstance(anchor, Tensor):
            anchor = anchor.detach().cpu().numpy()
        anchor = np.asarray(anchor, dtype=np.float64)
        if anchor.shape not in ((), (n,)) or not np.isfinite(anchor).all():
            raise ValueError(f"anchor must be a finite number or {n} of them, got shape {anchor.shape}")
        # As for networks: copy 0 is anchored on block 0 and free on block 1, copy 1 the other way round.
        free = (np.arange(copies) + 1) % copies
        return cls((blocks[None, :] != free[:, None]).astype(np.float64), np.broadcast_to(anchor, (n,)).copy())

    @property
    def shape(self) -> tuple[int, int]:
        return self.anchored.shape[0], self.anchored.shape[1]

    def stage(self, L: float) -> "Stage":
        """H at one value of L, over coordinates z: the copies are base + z·embedding."""
        m, n = self.shape
        if L == 0:
            return Stage(self, L, np.eye(n), np.zeros(n), 1)
        if math.isinf(L):
            rows = np.flatnonzero(self.anchored.ravel() == 0)
            embedding = np.zeros((len(rows), m * n))
            embedding[np.arange(len(rows)), rows] = 1
            return Stage(self, L, embedding, (self.anchored * self.anchor).ravel(), m)
        # Per variable an m×m Hessian; its inverse root makes all directions equally stiff, whatever L is.
        embedding = np.zeros((m, n, m, n))
        coupling = 2 / L * (m * np.eye(m) - np.ones((m, m)))
        for i in range(n):
            values, vectors = np.linalg.eigh(2 * L * np.diag(self.anchored[:, i]) + coupling)
            roots = 1 / np.sqrt(np.maximum(values, 0) + self.curvature)
            embedding[:, i, :, i] = (vectors * roots) @ vectors.T
        return Stage(self, L, embedding.reshape(m * n, m * n), np.zeros(m * n), m)


@dataclass
class Stage:
    """H at one L. Arrays may be NumPy's or torch's, with any number of leading dimensions."""

    homotopy: Homotopy
    L: float
    embedding: Any  # [d, copies · n]
    base: Any  # [copies · n]
    copies: int
    anchored: Any = field(init=False)
    anchor: Any = field(init=False)

    def __post_init__(self) -> None:
        self.anchored, self.anchor = self.homotopy.anchored, self.homotopy.anchor

    def to(self, like: Tensor) -> "Stage":
        """The same over tensors such as `like`."""
        for name in ("embedding", "base", "anchored", "anchor"):
            setattr(self, name, torch.as_tensor(getattr(self, name)).to(like))
        return self

    def expand(self, z: Any) -> Any:
        """The copies, [..., copies, n], at coordinates [..., d]."""
        return (self.base + z @ self.embedding).reshape(*z.shape[:-1], self.copies, len(self.anchor))

    def reduce(self, copies: np.ndarray) -> np.ndarray:
        """The coordinates [..., d] of copies [..., m, n] (their mean's where there is one copy; the free ones' at ∞)."""
        if self.copies == 1:
            return copies.mean(-2)
        flat = copies.reshape(*copies.shape[:-2], len(self.base)) - self.base
        if math.isinf(self.L):
            return flat @ self.embedding.T
        return np.linalg.solve(self.embedding, flat.reshape(-1, flat.shape[-1]).T).T.reshape(flat.shape)

    def quadratic(self, x: Any) -> tuple[Any, Any]:
        """The quadratic terms and their gradient at copies [..., m, n]."""
        if self.L == 0 or math.isinf(self.L):
            return 0.0, 0.0
        pulled, spread = (x - self.anchor) * self.anchored, x - x.mean(axis=-2, keepdims=True)
        m = self.copies  # Σ_{i<j} |x_i − x_j|² is m times the spread about the mean, which keeps its digits
        value = self.L * (pulled * pulled).sum((-2, -1)) + m / self.L * (spread * spread).sum((-2, -1))
        return value, 2 * self.L * pulled + 2 * m / self.L * spread


def check_Ls(Ls: Sequence[float]) -> list[float]:
    """The values of L as a list; raises the error owed for one that is empty or does not fall."""
    values = [float(L) for L in Ls]
    if not values:
        raise ValueError("Ls must hold at least one value of L")
    for L in values:
        if not L >= 0:
            raise ValueError(f"Ls must be in [0, ∞], got {L}")
    for before, after in itertools.pairwise(values):
        if not after < before:
            raise ValueError(f"Ls must fall, got {before} and then {after}")
    return values


# -------------------------------------------------------------------------------------------------------------- one path


def _value(f: Callable[[Tensor], Any], point: Tensor) -> Tensor:
    """f at a point that requires a gradient; raises the error owed for what is no function to minimise."""
    result = f(point)
    if not isinstance(result, Tensor):
        raise ValueError(f"f must return a scalar tensor, got {type(result).__name__}")
    if result.numel() != 1:
        raise ValueError(f"f must return a scalar tensor, got shape {tuple(result.shape)}")
    if not result.requires_grad:
        raise ValueError("f has no gradient: what it returns does not depend on its argument through torch")
    return result


class Objective:
    """f with its gradient, in NumPy, counted and checked."""

    def __init__(self, f: Any):
        self.f = f
        self.evaluations = 0

    def __call__(self, x: np.ndarray) -> tuple[float, np.ndarray]:
        self.evaluations += 1
        if isinstance(self.f, tuple):
            value, gradient = np.asarray(self.f[0](x)), np.asarray(self.f[1](x), dtype=np.float64)
            if value.ndim and value.size != 1:
                raise ValueError(f"f must return a number, got shape {value.shape}")
            if gradient.shape != x.shape:
                raise ValueError(f"f's gradient must have shape {x.shape}, got {gradient.shape}")
            return float(value.reshape(())), gradient
        point = torch.tensor(x, requires_grad=True, device="cpu")
        result = _value(self.f, point)
        (slope,) = torch.autograd.grad(result.reshape(()), point, allow_unused=True)
        if slope is None:
            raise ValueError("f has no gradient: what it returns does not depend on its argument")
        return float(result.detach()), slope.numpy()


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
        predictor: "secant" starts each corrector from the line through the last two points (in log L).
        adaptive: choose the steps between the first and the last of `Ls`: halved after a failure or a jump, half as
            long again after a success.
        tolerance: of the gradient's largest element, in coordinates in which H's quadratic terms are well conditioned.
        curvature: what f's second derivatives are thought to be; only the speed depends on it.

    Returns:
        A PathResult; a jump of the path is in it, and makes `success` False.

    Raises:
        ValueError: f does not return a scalar, has no gradient or is not finite at x0; Ls is empty or does not fall;
            x0, anchor or blocks of a wrong shape; an unknown method or predictor.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if predictor not in (None, "secant"):
        raise ValueError(f"predictor must be None or 'secant', got {predictor!r}")
    values = check_Ls(Ls)
    start = np.asarray(x0.detach().cpu() if isinstance(x0, Tensor) else x0, dtype=np.float64)
    n = start.shape[-1] if start.ndim else 0
    if start.ndim not in (1, 2) or n < 1 or (start.ndim == 2 and start.shape[0] != copies):
        raise ValueError(f"x0 must have shape [n] or [{copies}, n], got {list(start.shape)}")
    homotopy = Homotopy.of(n, anchor, blocks, copies)
    homotopy.curvature = curvature
    objective = Objective(f)
    x = np.broadcast_to(start, (copies, n)).copy()
    if not math.isfinite(objective(x[0])[0]):
        raise ValueError(f"f must be finite at x0, got {objective(x[0])[0]}")

    def correct(L: float, x: np.ndarray) -> PathPoint:
        return _correct(objective, homotopy, L, x, method, tolerance)

    points: list[PathPoint] = []
    position, step, message = 0.0, 1.0, ""
    while position <= len(values) - 1:
        L = _between(values, position)
        guess = _secant(points, L) if predictor else None
        point = correct(L, x if guess is None else guess)
        if point.converged and _jumped(points, point, correct):
            point = replace(point, jumped=True)
        if adaptive and points and step > _FINEST and (point.jumped or not point.converged):
            position -= step / 2
            step /= 2
            continue
        points.append(point)
        x = point.x
        if not point.converged:
            message = f"the corrector did not converge at L = {L:.6g}"
            break
        if position == len(values) - 1:
            break
        step = min(1.5 * step, len(values) - 1 - position) if adaptive else 1.0
        # Where L is infinite there is nothing in between.
        whole = math.isinf(values[int(position)])
        step = 1.0 if whole else step
        position = min(position + step, len(values) - 1)
    final = x.mean(0)
    jumps = [point.L for point in points if point.jumped]
    if not message:
        message = f"followed to L = {points[-1].L:.6g}"
        if jumps:
            message += ", but the path jumped at L = " + ", ".join(f"{L:.6g}" for L in jumps)
    success = points[-1].converged and not jumps
    return PathResult(final, objective(final)[0], points, objective.evaluations, success, message)


def _between(values: list[float], position: float) -> float:
    """L at a real-valued position in the list: geometric between two values, linear down to 0."""
    i = min(int(position), len(values) - 1)
    part = position - i
    if part == 0:
        return values[i]
    upper, lower = values[i], values[i + 1]
    return upper ** (1 - part) * lower**part if lower > 0 else upper * (1 - part)


def _secant(points: list[PathPoint], L: float) -> np.ndarray | None:
    if len(points) < 2 or L == 0 or math.isinf(points[-2].L):
        return None
    before, last = points[-2], points[-1]
    factor = math.log(L / last.L) / math.log(last.L / before.L)
    return last.x + factor * (last.x - before.x)


def _correct(
    objective: Objective,
    homotopy: Homotopy,
    L: float,
    x: np.ndarray,
    method: str,
    tolerance: float,
) -> PathPoint:
    """The minimiser of H at L that the corrector finds from x."""
    from scipy.optimize import minimize

    stage = homotopy.stage(L)
    before = objective.evaluations

    def h(z: np.ndarray) -> tuple[float, np.ndarray]:
        copies = stage.expand(z)
        value, gradient = stage.quadratic(copies)
        parts = [objective(copy) for copy in copies]
        gradient = np.stack([g for _, g in parts]) + gradient
        return sum(v for v, _ in parts) + value, stage.embedding @ gradient.ravel()

    options = {"gtol": tolerance} | (
        {"ftol": 0.0, "maxiter": 10_000, "maxfun": 100_000} if method == "L-BFGS-B" else {}
    )
    with np.errstate(all="ignore"):  # a step into infinity is taken back
        found = minimize(h, stage.reduce(x), jac=True, method=method, options=options)
    z, (value, gradient) = found.x, h(found.x)
    # f's own rounding ends a line search at half the digits; steps that look at the gradient alone go on.
    for _ in range(40):
        if np.abs(gradient).max(initial=0.0) <= tolerance:
            break
        trial = z - found.hess_inv @ gradient
        trial_value, trial_gradient = h(trial)
        no_worse = trial_value <= value + 1e-10 * (1 + abs(value))  # else it is on its way to a saddle or a maximum
        if not (no_worse and np.abs(trial_gradient).max() < 0.9 * np.abs(gradient).max()):
            break
        z, value, gradient = trial, trial_value, trial_gradient
    copies = np.broadcast_to(stage.expand(z), homotopy.shape).copy()
    converged = bool(
        np.isfinite(value) and np.abs(gradient).max(initial=0.0) <= max(tolerance, 1e-6 * max(1.0, abs(value)))
    )
    return PathPoint(L, copies, float(value), objective.evaluations - before, converged, False)


def _jumped(points: list[PathPoint], point: PathPoint, correct: Callable[[float, np.ndarray], PathPoint]) -> bool:
    """Whether the path broke off before `point`: a move out of proportion, which no smaller steps in L divide."""
    if not points or not _suspicious(points, point.x, point.L):
        return False
    before, after = points[-1], point
    for _ in range(6):
        whole = np.linalg.norm(after.x - before.x)
        middle = correct(math.sqrt(before.L * after.L) if after.L > 0 else before.L / 10, before.x)
        after = correct(after.L, middle.x)
        first, second = np.linalg.norm(middle.x - before.x), np.linalg.norm(after.x - middle.x)
        if max(first, second) < 0.8 * whole:
            return False
        before, after = (before, middle) if first > second else (middle, after)
    return True


def _suspicious(points: list[PathPoint], x: np.ndarray, L: float) -> bool:
    finite = [point for point in points if not math.isinf(point.L)]
    if len(finite) < 3:
        return False
    steps = [math.log(a.L / b.L) for a, b in itertools.pairwise(finite)]
    moves = [np.linalg.norm(b.x - a.x) / s for (a, b), s in zip(itertools.pairwise(finite), steps, strict=True)]
    step = math.log(finite[-1].L / L) if L > 0 else steps[-1]
    distance = np.linalg.norm(x - finite[-1].x)
    visible = distance > 0.05 * (1 + np.linalg.norm(x) / math.sqrt(len(x)))
    return bool(visible and distance / step > SUSPICIOUS * np.median(moves[-5:]))


# ------------------------------------------------------------------------------------------------------------ many paths


@dataclass(frozen=True)
class ManyResult:
    """The ends of many paths, on x0's device.

    Attributes:
        x, f: [B, n] and [B], as in PathResult.
        evaluations, steps: int64 [B], of f and its gradient, and of the quasi-Newton method.
        success: bool [B], every corrector of a path converged; jumps are not looked for.
    """

    x: Tensor
    f: Tensor
    evaluations: Tensor
    steps: Tensor
    success: Tensor


def track_many(
    f: Callable[[Tensor], Tensor],
    x0: Tensor,
    Ls: Sequence[float],
    anchor: Any = 0.0,
    *,
    copies: int = 2,
    blocks: Any = None,
    tolerance: float = 1e-6,
    curvature: float = 1.0,
    progress: Callable[[Sequence[float]], Any] = iter,
) -> ManyResult:
    """`track` from many starts at once: a batched BFGS in torch, on x0's device.

    Args:
        f: a function of a 1-D tensor that returns a scalar, of operations that torch.func.vmap can batch.
        x0: where all copies start, float64 [B, n], or each one's start, [B, m, n].
        Ls, anchor, copies, blocks, curvature: as in `track`. Ls = [0] minimises f itself.
        anchor: as in `track`, or one for each start, [B, n].
        tolerance: of the gradient's largest element.
        progress: wraps the list of Ls for display, as tqdm does.

    Raises:
        ValueError: as `track`.
    """
    values = check_Ls(Ls)
    if not isinstance(x0, Tensor) or x0.dim() not in (2, 3) or not x0.is_floating_point():
        raise ValueError(
            f"x0 must be a float tensor of shape [B, n] or [B, {copies}, n], got {getattr(x0, 'shape', x0)}"
        )
    if x0.dim() == 3 and x0.shape[1] != copies:
        raise ValueError(f"x0 must have shape [B, n] or [B, {copies}, n], got {list(x0.shape)}")
    count, n = x0.shape[0], x0.shape[-1]
    own = anchor.to(x0) if isinstance(anchor, Tensor) and anchor.dim() == 2 else None
    if own is not None and own.shape != (count, n):
        raise ValueError(f"anchor must have shape [n] or {[count, n]}, got {list(own.shape)}")
    # An anchor for each start: the variables are moved so that it is 0.
    offset = torch.zeros_like(x0[:, :1]) if own is None else own
    homotopy = Homotopy.of(n, 0.0 if own is not None else anchor, blocks, copies)
    homotopy.curvature = curvature
    x = (x0 if x0.dim() == 3 else x0[:, None].expand(count, copies, n)) - offset[:, None]

    both = torch.func.vmap(torch.func.vmap(torch.func.grad_and_value(f)))
    evaluations = torch.zeros(count, dtype=torch.int64, device=x0.device)
    steps, success = torch.zeros_like(evaluations), torch.ones(count, dtype=torch.bool, device=x0.device)
    for point in x0.reshape(-1, n)[:1]:  # none, where there are no starts
        if not _value(f, point.detach().clone().requires_grad_()).isfinite():
            raise ValueError("f must be finite at x0")
    for L in progress(values):
        stage = homotopy.stage(L)
        z = torch.as_tensor(stage.reduce(x.cpu().numpy())).to(x0)
        stage = stage.to(x0)

        def h(z: Tensor, rows: Tensor, stage: Stage = stage) -> tuple[Tensor, Tensor]:
            copies_ = stage.expand(z)
            gradient, value = both(copies_ + offset[rows, None])
            more, slope = stage.quadratic(copies_)
            return value.sum(-1) + more, (gradient + slope).flatten(1) @ stage.embedding.T

        z, used, taken, converged = minimise_many(h, z, tolerance)
        steps += taken
        x = stage.expand(z).expand(count, copies, n)
        evaluations += used * stage.copies
        success &= converged
    final = x.mean(1) + (offset if own is not None else 0.0)
    return ManyResult(final, torch.func.vmap(f)(final), evaluations + 1, steps, success)


def minimise_many(
    h: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], z: Tensor, tolerance: float, limit: int = 500
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Minimises one function from many starts, by BFGS with a weak-Wolfe line search, each start for itself.

    Args:
        h: h(z [B', d], rows [B']) returns values [B'] and gradients [B', d]; rows are the starts' numbers.
        z: [B, d].
        tolerance: of the gradient's largest element.

    Returns:
        z [B, d], evaluations [B], steps [B] (at most `limit`), converged [B].
    """
    count, d = z.shape
    z = z.clone()
    rows = torch.arange(count, device=z.device)
    value, gradient = h(z, rows)
    evaluations = torch.ones(count, dtype=torch.int64, device=z.device)
    steps, converged = torch.zeros_like(evaluations), torch.zeros(count, dtype=torch.bool, device=z.device)
    inverse = torch.eye(d, dtype=z.dtype, device=z.device).expand(count, d, d).clone()
    fresh = torch.ones(count, dtype=torch.bool, device=z.device)  # the inverse Hessian is still the unit matrix
    for _ in range(limit):
        small = gradient.abs().amax(1, keepdim=True).squeeze(1) <= tolerance if d else torch.ones_like(converged[rows])
        converged[rows[small]] = True
        keep = ~small
        rows, value, gradient, inverse, fresh = (t[keep] for t in (rows, value, gradient, inverse, fresh))
        if not len(rows):
            break
        here = z[rows]
        direction = -(inverse @ gradient[..., None]).squeeze(-1)
        slope = (direction * gradient).sum(1)
        uphill = ~(slope < 0)
        inverse[uphill] = torch.eye(d, dtype=z.dtype, device=z.device)
        fresh |= uphill
        direction = torch.where(uphill[:, None], -gradient, direction)
        slope = (direction * gradient).sum(1)
        # As scipy's: the first step is about one unit long.
        length = torch.where(fresh, (1.01 / gradient.norm(dim=1)).clamp(max=1.0), torch.ones_like(slope))
        new_value, new_gradient, length, used, found = _search(h, here, rows, direction, value, slope, length)
        evaluations[rows] += used
        steps[rows] += 1
        move = length[:, None] * direction
        z[rows] = here + move
        change = new_gradient - gradient
        inverse, curved = _bfgs(inverse, move, change)
        fresh = fresh & ~curved
        # Where rounding leaves no better point, that start has come to its end.
        rows_done = rows[~found]
        converged[rows_done] = gradient[~found].abs().amax(1) <= 1e-4
        rows, value, gradient, inverse, fresh = (t[found] for t in (rows, new_value, new_gradient, inverse, fresh))
    return z, evaluations, steps, converged


def _search(h, here, rows, direction, value, slope, length):
    """A step length of each row that satisfies the weak Wolfe conditions, by bisection (Lewis and Overton).

    Returns:
        Values, gradients and lengths there, evaluations used, and whether a lower value was found at all.
    """
    low, high = torch.zeros_like(length), torch.full_like(length, math.inf)
    best_value, best_length = value.clone(), torch.zeros_like(length)
    best_gradient = torch.zeros_like(here)
    used = torch.zeros_like(rows)
    open_ = torch.arange(len(rows), device=rows.device)
    for _ in range(40):
        t = length[open_]
        trial, gradient = h(here[open_] + t[:, None] * direction[open_], rows[open_])
        used[open_] += 1
        start, down = value[open_], slope[open_]
        along = (gradient * direction[open_]).sum(1)
        enough = trial <= start + 1e-4 * t * down  # False for NaN
        # Where only rounding is left of the values, the slopes still tell (Hager and Zhang's approximate condition).
        enough |= (trial <= start + 1e-13 * (1 + start.abs())) & (along <= 0.9998 * -down)
        flat = along >= 0.9 * down
        took = open_[enough]
        best_value[took], best_length[took], best_gradient[took] = trial[enough], t[enough], gradient[enough]
        high[open_[~enough]] = t[~enough]
        low[took] = t[enough]
        open_ = open_[~(enough & flat)]
        if not len(open_):
            break
        bounded = high[open_].isfinite()
        length[open_] = torch.where(bounded, 0.5 * (low[open_] + high[open_]), 2 * length[open_])
        open_ = open_[(high[open_] - low[open_] > 1e-14) & (length[open_] < 1e10)]
        if not len(open_):
            break
    found = best_length > 0
    return best_value, best_gradient, best_length, used, found


def _bfgs(inverse, move, change):
    """The updated inverse Hessians, and where the curvature was positive (elsewhere nothing changes)."""
    curvature = (move * change).sum(1)
    curved = curvature > 1e-14 * move.norm(dim=1) * change.norm(dim=1)
    rho = torch.where(curved, 1 / curvature, torch.zeros_like(curvature))[:, None]
    d = move.shape[1]
    unit = torch.eye(d, dtype=move.dtype, device=move.device)
    left = unit - rho[..., None] * move[:, :, None] * change[:, None, :]
    updated = left @ inverse @ left.transpose(1, 2) + rho[..., None] * move[:, :, None] * move[:, None, :]
    return torch.where(curved[:, None, None], updated, inverse), curved
