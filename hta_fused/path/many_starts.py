"""`track_many`: the paths from many starts at once, batched in torch on the device of the starts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..checks import shown
from .corrector import Corrector
from .homotopy import QuadraticTerms, check_Ls
from .objective import as_float64, check_positive, differentiating, one_value, scalar_value


@dataclass(frozen=True)
class ManyResult:
    """The ends of many paths, on x0's device.

    Attributes:
        x, f: [B, n] and [B], as in PathResult.
        evaluations, steps: int64 [B], as in PathResult.
        success: bool [B], every corrector of a path converged; jumps are not looked for.
    """

    x: Tensor
    f: Tensor
    evaluations: Tensor
    steps: Tensor
    success: Tensor


@differentiating
def track_many(
    f: Callable[[Tensor], Tensor],
    x0: Tensor,
    Ls: Sequence[float],
    anchor: Any = 0.0,
    *,
    copies: int = 2,
    blocks: Any = None,
    predictor: str | None = None,
    tolerance: float = 1e-6,
    curvature: float = 1.0,
    progress: Callable[[Sequence[float]], Any] = iter,
) -> ManyResult:
    """`track` from many starts at once: a batched BFGS in torch, on x0's device.

    Args:
        f: a function of a 1-D tensor that returns a scalar, of operations that torch.func.vmap can batch.
        x0: where all copies start, [B, n], or each one's start, [B, m, n]; computed with in float64.
        Ls, copies, blocks, curvature: as in `track`. Ls = [0] minimises f itself.
        anchor: as in `track`, or one for each start, [B, n].
        predictor: None, or "tangent" as in `track`.
        tolerance: of the gradient's largest element.
        progress: wraps the list of Ls for display, as tqdm does.

    Raises:
        TypeError, ValueError: as `track`.
    """
    if predictor not in (None, "tangent"):
        raise ValueError(f"predictor must be None or 'tangent', got {predictor!r}")
    if not callable(f):
        raise TypeError(f"f must be a function of a tensor, got {shown(f)}")
    values = check_Ls(Ls)
    if not isinstance(x0, Tensor) or x0.dim() not in (2, 3) or not x0.is_floating_point():
        got = f"shape {list(x0.shape)} of {x0.dtype}" if isinstance(x0, Tensor) else shown(x0)
        raise ValueError(f"x0 must be a float tensor of shape [B, n] or [B, {copies}, n], got {got}")
    if x0.dim() == 3 and x0.shape[1] != copies:
        raise ValueError(f"x0 must have shape [B, n] or [B, {copies}, n], got {list(x0.shape)}")
    check_positive("tolerance", tolerance)
    check_positive("curvature", curvature)
    x0, anchor = as_float64("x0", x0), as_float64("anchor", anchor)  # the tolerances are float64's
    count, n = x0.shape[0], x0.shape[-1]
    offset = torch.zeros_like(x0[:, :1])
    if anchor.dim() == 2:  # one for each start: the variables are moved so that it is 0
        if anchor.shape != (count, n):
            raise ValueError(f"anchor must have shape [n] or {[count, n]}, got {list(anchor.shape)}")
        if not anchor.isfinite().all():
            raise ValueError("anchor must be finite, got inf or NaN")
        offset, anchor = anchor.to(x0), 0.0
    terms = QuadraticTerms.of(n, anchor, blocks, copies, curvature)
    terms.check_range(values)
    x = (x0 if x0.dim() == 3 else x0[:, None].expand(count, copies, n)) - offset[:, None]

    for point in x0.reshape(-1, n)[:1]:  # none, where there are no starts
        scalar_value(f, point.detach().clone().requires_grad_())  # raises for what is no function of this kind
    if count and not torch.func.vmap(one_value(f))(x0.reshape(-1, n)).isfinite().all():
        raise ValueError("f must be finite at x0")
    correct = Corrector(f, terms, offset, tolerance)
    success = torch.ones(count, dtype=torch.bool, device=x0.device)
    before = None
    for L in progress(values):
        if before is not None and predictor:
            x = correct.predict(x, before, L)
        x, found = correct(x, L, warm=predictor is not None)
        success &= found.converged
        before = L
    final = x.mean(1) + offset
    values_there = torch.func.vmap(one_value(f))(final) if count else final.new_zeros(0)
    return ManyResult(final, values_there, correct.evaluations + 1, correct.steps, success)
