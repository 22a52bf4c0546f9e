"""The coefficient tables of the implicit step: what each label does to a pair of SGD proposals.

A table [copy, (copies…, anchor)] turns the proposals a_θ, a_η and the anchor θ̃ into the new θ, η. Eighteen numbers on
the host; the ops know nothing else about homotopy. Imports torch only.
"""

import math
from collections.abc import Sequence

import torch

# Which copies feel the anchor under labels 0 (neither), 1 (block 1: θ) and 2 (block 2: η).
ANCHORED = ((False, False), (True, False), (False, True))


def implicit(L: float, lr: float, anchored: Sequence[Sequence[bool]] = ANCHORED) -> torch.Tensor:
    """The proximal map of equation (3)'s quadratic terms, as one table per label.

    With γ = lr, copy j's new value x_j minimises Σ_j |x_j − a_j|²/(2γ) + Σ_{j anchored} L|x_j − θ̃|²
    + Σ_{i<j} |x_i − x_j|²/L. Every row is non-negative and sums to 1, so the step is stable for every γ and L. L = 0
    gives the mean of the proposals (the merge), L = ∞ the decoupled problems of equation (2).

    Args:
        L: the homotopy parameter, 0 ≤ L ≤ ∞.
        lr: the learning rate γ > 0.
        anchored: for each label, which of the m copies feel the anchor; the default is the paper's m = 2.

    Returns:
        float64 tensor [labels, m, m + 1] on the CPU, for m = 2 [3, 2, 3]: (label, copy, (θ, η, θ̃)).

    Raises:
        ValueError: L is negative or NaN, or lr is not a positive finite number.
    """
    check_L(L, "implicit")
    check_hyper(lr, 0.0, 0.0, False)
    return torch.tensor([_table(float(L), float(lr), row) for row in anchored], dtype=torch.float64, device="cpu")


def check_L(L: float, mode: str) -> None:
    """Raises the error that every public function owes for an L that `mode` cannot take."""
    if mode == "implicit":
        if not L >= 0:
            raise ValueError(f"L must be in [0, ∞], got {L}")
    elif mode == "explicit":
        if not 0 < L < math.inf:
            raise ValueError(f"L must be positive and finite in explicit mode, got {L}; mode='implicit' takes 0 and ∞")
    else:
        raise ValueError(f"mode must be 'implicit' or 'explicit', got {mode!r}")


def check_hyper(lr: float, momentum: float, weight_decay: float, nesterov: bool) -> None:
    """Raises the error owed for SGD settings out of range."""
    if not 0 < lr < math.inf:
        raise ValueError(f"lr must be positive and finite, got {lr}")
    if not 0 <= momentum < math.inf:
        raise ValueError(f"momentum must not be negative, got {momentum}")
    if not 0 <= weight_decay < math.inf:
        raise ValueError(f"weight_decay must not be negative, got {weight_decay}")
    if nesterov and momentum == 0:
        raise ValueError("nesterov needs a momentum, got momentum=0")


def _table(L: float, lr: float, anchored: Sequence[bool]) -> list[list[float]]:
    """One label's table. Unlike `implicit` it takes lr = 0, which a scheduler may pass through."""
    m = len(anchored)
    pull = 2 * lr * L if lr > 0 else 0.0  # 0·∞ is 0: no step, no pull
    if math.isinf(pull) or math.isinf(L):  # the decoupled problems: the anchor itself, or the proposal itself
        return [[float(i == (m if anchored[j] and pull else j)) for i in range(m + 1)] for j in range(m)]
    q, r = (0.0, 1.0) if L == 0 else (L / (L + 2 * lr), 2 * lr / (L + 2 * lr))
    alpha = [pull if anchored[j] else 0.0 for j in range(m)]
    weight = [1 / (q * (1 + alpha[j]) + m * r) for j in range(m)]
    total = sum(weight[j] * (1 + alpha[j]) for j in range(m)) / m
    to_anchor = sum(weight[j] * alpha[j] for j in range(m))
    return [
        [weight[j] * (q * (i == j) + r * weight[i] / total) for i in range(m)]
        + [weight[j] * (q * alpha[j] + r * to_anchor / total)]
        for j in range(m)
    ]


def step_coefficients(
    L: float,
    lr: float,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    mode: str = "implicit",
) -> tuple[list[float], list[list[list[float]]]]:
    """The step op's numbers for one parameter group: its row of `hyper` (as csrc/homotopy.h lists it) and its tables."""
    lr_grad, lr_momentum = (lr, lr * momentum) if nesterov or momentum == 0 else (0.0, lr)
    if mode == "implicit":
        pull, couple = 0.0, 0.0
        tables = [_table(L, lr, row) for row in ANCHORED]
    else:
        pull, couple = 2 * L, 2 / L
        tables = [[[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]] for _ in ANCHORED]
    return [lr_grad, lr_momentum, momentum, weight_decay, pull, couple], tables
