"""A batched BFGS in torch: one function minimised from many starts, each of which goes its own way."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Minima(NamedTuple):
    """What was found from B starts in d coordinates.

    Attributes:
        z, value, gradient: [B, d], [B] and [B, d].
        inverse: [B, d, d], the inverse Hessians as far as BFGS learnt them.
        evaluations, steps, converged: [B].
    """

    z: Tensor
    value: Tensor
    gradient: Tensor
    inverse: Tensor
    evaluations: Tensor
    steps: Tensor
    converged: Tensor


def minimise_many(
    h: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    z: Tensor,
    tolerance: float,
    limit: int = 500,
    inverse: Tensor | None = None,
) -> Minima:
    """Minimises one function from many starts, by BFGS with a weak-Wolfe line search, each start for itself.

    Args:
        h: h(z [B', d], rows [B']) returns values [B'] and gradients [B', d]; rows are the starts' numbers.
        z: [B, d].
        tolerance: of the gradient's largest element.
        limit: of steps.
        inverse: the inverse Hessians to begin with, [B, d, d]; without it the unit matrix, and a first step about one
            unit long.
    """
    count, d = z.shape
    z = z.clone()
    rows = torch.arange(count, device=z.device)
    values, gradients = h(z, rows)
    value, gradient = values, gradients
    values, gradients = values.clone(), gradients.clone()
    evaluations = torch.ones(count, dtype=torch.int64, device=z.device)
    steps, converged = torch.zeros_like(evaluations), torch.zeros(count, dtype=torch.bool, device=z.device)
    # Whether a start's inverse Hessian is still the unit matrix.
    fresh = torch.full((count,), inverse is None, dtype=torch.bool, device=z.device)
    inverses = (torch.eye(d).to(z).expand(count, d, d) if inverse is None else inverse).clone()
    for _ in range(limit):
        small = (gradient.abs() <= tolerance).all(1)
        converged[rows[small]] = True
        rows, value, gradient, fresh = (t[~small] for t in (rows, value, gradient, fresh))
        if not len(rows):
            break
        here, inverse = z[rows], inverses[rows]
        direction = -(inverse @ gradient[..., None]).squeeze(-1)
        slope = (direction * gradient).sum(1)
        uphill = ~(slope < 0)
        inverse[uphill] = torch.eye(d, dtype=z.dtype, device=z.device)
        fresh |= uphill
        direction = torch.where(uphill[:, None], -gradient, direction)
        slope = (direction * gradient).sum(1)
        # As scipy's: the first step is about one unit long.
        length = torch.where(fresh, (1.01 / gradient.norm(dim=1)).clamp(max=1.0), torch.ones_like(slope))
        new_value, new_gradient, length, used, found, lost = _search(h, here, rows, direction, value, slope, length)
        evaluations[rows] += used
        steps[rows] += 1
        move = length[:, None] * direction
        z[rows] = here + move
        inverses[rows], curved = update(inverse, move, new_gradient - gradient)
        fresh = fresh & ~curved
        # Where rounding leaves no better point, that start has come to its end.
        converged[rows[~found]] = gradient[~found].abs().amax(1) <= 1e-4
        converged[rows[lost]] = False
        found = found & ~lost
        rows, value, gradient, fresh = (t[found] for t in (rows, new_value, new_gradient, fresh))
        values[rows], gradients[rows] = value, gradient
    return Minima(z, values, gradients, inverses, evaluations, steps, converged)


def _search(h, here, rows, direction, value, slope, length):
    """A step length of each row that satisfies the weak Wolfe conditions, by bisection (Lewis and Overton).

    Returns:
        Values, gradients and lengths there, evaluations used, whether a lower value was found at all, and whether there
        is no end to how far it falls.
    """
    low, high = torch.zeros_like(length), torch.full_like(length, math.inf)
    best_value, best_length = value.clone(), torch.zeros_like(length)
    best_gradient = torch.zeros_like(here)
    used = torch.zeros_like(rows)
    searching, satisfied = torch.arange(len(rows), device=rows.device), torch.zeros_like(rows, dtype=torch.bool)
    for _ in range(40):
        t = length[searching]
        trial, gradient = h(here[searching] + t[:, None] * direction[searching], rows[searching])
        used[searching] += 1
        start, down = value[searching], slope[searching]
        along = (gradient * direction[searching]).sum(1)
        enough = trial <= start + 1e-4 * t * down  # False for NaN
        # Where only rounding is left of the values, the slopes still tell (Hager and Zhang's approximate condition).
        enough |= (trial <= start + 1e-13 * (1 + start.abs())) & (along <= 0.9998 * -down)
        flat = along >= 0.9 * down
        took = searching[enough]
        best_value[took], best_length[took], best_gradient[took] = trial[enough], t[enough], gradient[enough]
        high[searching[~enough]] = t[~enough]
        low[took] = t[enough]
        satisfied[searching[enough & flat]] = True
        searching = searching[~(enough & flat)]
        bounded = high[searching].isfinite()
        length[searching] = torch.where(bounded, 0.5 * (low[searching] + high[searching]), 2 * length[searching])
        searching = searching[(high[searching] - low[searching] > 1e-14) & (length[searching] < 1e10)]
        if not len(searching):
            break
    lost = high.isinf() & ~satisfied
    return best_value, best_gradient, best_length, used, best_length > 0, lost


def update(inverse, move, change):
    """BFGS's inverse Hessians [B, d, d] after moves and changes of the gradient [B, d].

    Returns:
        The inverse Hessians, and where the curvature was positive; elsewhere nothing changes.
    """
    curvature = (move * change).sum(1)
    curved = curvature > 1e-14 * move.norm(dim=1) * change.norm(dim=1)
    rho = torch.where(curved, 1 / curvature, torch.zeros_like(curvature))[:, None]
    d = move.shape[1]
    unit = torch.eye(d, dtype=move.dtype, device=move.device)
    left = unit - rho[..., None] * move[:, :, None] * change[:, None, :]
    updated = left @ inverse @ left.transpose(1, 2) + rho[..., None] * move[:, :, None] * move[:, None, :]
    return torch.where(curved[:, None, None], updated, inverse), curved
