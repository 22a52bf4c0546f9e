"""The implicit step's map written out: what each label does to the proposals. Documentation in numbers; the kernels use
the four numbers a copy that `couplings.Homotopy` returns, which multiply out to this."""

import math

import torch

from .checks import number, whole
from .couplings import Homotopy
from .kernels.reference import MAX_COPIES


def implicit(L: float, lr: float, copies: int = 2) -> torch.Tensor:
    """The proximal map of equation (3)'s quadratic terms, as one table per label.

    With γ = lr (of SGD with momentum μ: lr/(1 − μ)), copy j's new value x_j minimises Σ_j (x_j − a_j)²/(2γ)
    + Σ_{j anchored} L·(x_j − θ̃)² + Σ_{i<j} (x_i − x_j)²/L. Every row is non-negative and sums to 1, so the step is stable
    for every γ and L. L = 0 gives the mean of the proposals (the merge), L = ∞ the decoupled problems of equation (2).

    Args:
        L: the homotopy parameter, 0 ≤ L ≤ ∞.
        lr: the step size γ > 0.
        copies: m.

    Returns:
        float64 tensor [m + 1, m, m + 1] on the CPU, for m = 2 [3, 2, 3]: (label, copy, (θ, η, θ̃)).

    Raises:
        ValueError: L is negative or NaN, or lr is not a positive finite number.
    """
    lr, copies = number("lr", lr), whole("copies", copies, 1, MAX_COPIES)
    if not 0 < lr < math.inf:
        raise ValueError(f"lr must be positive and finite, got {lr}")
    read, keep, share, pull, _ = Homotopy(L).rules(copies, lr)[:, :copies].unbind(-1)
    own = torch.diag_embed(keep) + share[:, :, None] * read[:, None, :]
    return torch.cat([own, pull[:, :, None]], -1)
