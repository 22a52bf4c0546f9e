"""Couplings: what pulls the copies together. Each returns rules, numbers for the kernels; imports checks.py only.

With a_j the proposals, θ̃ the anchor and s = Σ_i read_i·a_i, a step leaves

    x_j = keep_j·a_j + share_j·s + pull_j·θ̃

and a centre, if there is one (mostly the anchor, moving), c = keep·c + share·s + pull·θ̃. A rule is these four numbers,
and `anchored`: 1 where the copy's distance to θ̃ counts in the statistics. There is one for each label and copy; the
centre's stands last. A coupling whose gradient goes through the proposal instead
(`explicit`) has pull_j·(x_j − θ̃) + share_j·Σ_i read_i·(x_j − x_i) added to the loss's gradient.

Label 0 means coupled only; label b ≥ 1 marks block b, on which one copy is free and the others may be anchored.
To add a coupling: a class here, about ten lines, and its test. No kernel knows of it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any, ClassVar

import torch
from torch import Tensor

from .checks import choice, field_types, shown

Row = tuple[float, float, float, float, float]  # read, keep, share, pull, anchored
INDEPENDENT: Row = (0.0, 1.0, 0.0, 0.0, 0.0)
FIXED = INDEPENDENT  # the centre's, where it does not move
LARGEST = torch.finfo(torch.float32).max ** 0.5  # number that kernels take in float32


def free_block(copy: int, copies: int) -> int:
    """The block (label) on which a copy is free: for two copies 2 for θ and 1 for η."""
    return 1 + (copy + 1) % copies


@dataclass(frozen=True)
class Coupling:
    """What every coupling has: a period. Each `every`-th step couples; between, the copies are independent, as long as all
    are finite (0·∞ is NaN). A coupling that acts by the step size couples as strongly then as in `every` steps."""

    every: int = field(default=1, kw_only=True)
    moves_anchor: ClassVar[bool] = False
    buffers: ClassVar[tuple[str, ...]] = ()  # a copy's own, besides the proposal's

    def __new__(cls, *_: Any, **__: Any) -> "Coupling":
        # Without this the compiler of torch 2.10 and 2.11 takes `every`, which is first, for what comes by position.
        return object.__new__(cls)

    @property
    def explicit(self) -> bool:
        """Whether its gradient goes through the proposal, momentum and all."""
        return getattr(self, "mode", "implicit") == "explicit"

    def __post_init__(self) -> None:
        field_types(self)
        if isinstance(self.every, bool) or not (isinstance(self.every, Integral) and 1 <= self.every < 2**63):
            raise ValueError(f"every must be a whole number of steps, at least 1, got {shown(self.every)}"[:200])
        object.__setattr__(self, "every", int(self.every))
        choice("mode", getattr(self, "mode", "implicit"), "implicit", "explicit")

    def rules(self, copies: int, step_size: float, step: int = 1) -> Tensor:
        """The rules at step number `step`, the first being 1: float64 [copies + 1 labels, copies + 1, 5] on the CPU."""
        if step % self.every:
            return _table(copies, lambda label, copy: INDEPENDENT, FIXED)
        return self._rules(copies, step_size * self.every)

    def _rules(self, copies: int, step_size: float) -> Tensor:
        raise NotImplementedError


def _table(copies: int, rule: Callable[[int, int], Row], anchor: Row) -> Tensor:
    rows = [[rule(label, copy) for copy in range(copies)] + [anchor] for label in range(copies + 1)]
    return torch.tensor(rows, dtype=torch.float64, device="cpu")


def _check(name: str, value: float, low: float, high: float, closed: bool = True) -> None:
    if not (low <= value <= high if closed else low < value < high):
        brackets = "[]" if closed else "()"
        raise ValueError(
            f"{name} must be in {brackets[0]}{low:g}, {high:g}{brackets[1]}, got {value}".replace("inf", "∞")
        )


@dataclass(frozen=True)
class Homotopy(Coupling):
    """Equation (3)'s quadratic terms by their proximal map: stable for every learning rate and L.

    With γ the proposal's step size, the new copies minimise Σ_j ‖x_j − a_j‖²/(2γ) + Σ_{j anchored} L‖x_j − θ̃‖²
    + Σ_{i<j} ‖x_i − x_j‖²/L. Their solution is a weighted mean. L = 0 merges the copies, L = ∞ decouples them.

    Args:
        L: the homotopy parameter, 0 ≤ L ≤ ∞.
    """

    L: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.L >= 0:
            raise ValueError(f"L must be in [0, ∞], got {self.L}")

    def _rules(self, copies: int, step_size: float) -> Tensor:
        m, L, tables = copies, float(self.L), []
        for label in range(m + 1):
            anchored = [label != 0 and label != free_block(j, m) for j in range(m)]
            pull = 2 * step_size * L if step_size > 0 else 0.0  # 0·∞ is 0: no step, no pull
            if math.isinf(pull) or math.isinf(L):  # the decoupled problems: the anchor itself, or the proposal itself
                held = [a and pull > 0 for a in anchored]
                tables.append([(0.0, 1.0 - h, 0.0, float(h), float(a)) for h, a in zip(held, anchored, strict=True)])
                continue
            if L == 0:  # all copies become the mean, to the bit
                tables.append([(1 / m, 0.0, 1.0, 0.0, float(felt)) for felt in anchored])
                continue
            q, r = L / (L + 2 * step_size), 2 * step_size / (L + 2 * step_size)
            alpha = [pull if a else 0.0 for a in anchored]
            weight = [1 / (q * (1 + a) + m * r) for a in alpha]
            total = sum(w * (1 + a) for w, a in zip(weight, alpha, strict=True)) / m
            to_anchor = sum(w * a for w, a in zip(weight, alpha, strict=True)) / total
            tables.append([(w, w * q, w * r / total, w * (q * a + r * to_anchor), float(felt))
                           for w, a, felt in zip(weight, alpha, anchored, strict=True)])  # fmt: skip
        return _table(m, lambda label, copy: tables[label][copy], FIXED)


@dataclass(frozen=True)
class Explicit(Coupling):
    """The paper's equation (7): the gradients of (3)'s quadratic terms join the loss's, momentum and all.

    Diverges where lr·2m/L exceeds the proposal's stability bound (2(1 + μ) for heavy ball).

    Args:
        L: the homotopy parameter, 0 < L < ∞.
    """

    L: float = 0.01
    mode: ClassVar[str] = "explicit"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.L < math.inf:
            raise ValueError(f"L must be positive and finite in explicit mode, got {self.L}; Homotopy takes 0 and ∞")

    def rules(self, copies: int, step_size: float, step: int = 1) -> Tensor:
        strength = 0 if step % self.every else self.every
        L = float(self.L)

        def rule(label: int, copy: int) -> Row:
            anchored = float(label != 0 and label != free_block(copy, copies))
            return (1.0, 1.0, strength * 2 / L, strength * 2 * L * anchored, anchored)

        return _table(copies, rule, FIXED)


@dataclass(frozen=True)
class EMA(Coupling):
    """An exponential moving average of the copies' mean, kept in the anchor (mean teacher, Polyak averaging).

    The copies do not feel it. θ̃ ← decay·θ̃ + (1 − decay)·mean_j a_j; Tarvainen and Valpola 2017 for one copy.

    Args:
        decay: of the average, for one coupling step, in [0, 1].
    """

    decay: float = 0.999
    moves_anchor: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        _check("decay", self.decay, 0, 1)

    def _rules(self, copies: int, step_size: float) -> Tensor:
        row = (1 / copies, 1.0, 0.0, 0.0, 1.0)
        return _table(copies, lambda label, copy: row, (0.0, self.decay, 1 - self.decay, 0.0, 0.0))


@dataclass(frozen=True)
class Lookahead(Coupling):
    """Zhang et al. 2019: every `every` steps the slow weights (the anchor) go part of the way to the mean of the fast
    ones (the copies), which start again from there.

    θ̃ ← θ̃ + alpha·(mean_j a_j − θ̃); x_j ← θ̃.

    Args:
        alpha: the slow weights' step, in [0, 1].
    """

    alpha: float = 0.5
    every: int = field(default=5, kw_only=True)
    moves_anchor: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        _check("alpha", self.alpha, 0, 1)

    def _rules(self, copies: int, step_size: float) -> Tensor:
        row = (self.alpha / copies, 0.0, 1.0, 1 - self.alpha, 1.0)
        return _table(copies, lambda label, copy: row, (0.0, 1 - self.alpha, 1.0, 0.0, 0.0))


@dataclass(frozen=True)
class Elastic(Coupling):
    """Elastic averaging, EASGD (Zhang, Choromanska, LeCun 2015): the copies and the anchor, their centre, pull at each other.

    x_j ← a_j − alpha·(a_j − θ̃); θ̃ ← θ̃ + alpha·Σ_j (a_j − θ̃).

    Args:
        alpha: the paper's ηρ, in [0, 1], and at most 1/copies.
        mode: "implicit" pulls at the proposals, stable for every learning rate; "explicit", the paper's own, at the
            copies before their gradient step, through the momentum if there is one. At a learning rate of 0, or one so small
            that alpha/lr is beyond float32's arithmetic, no gradient can pull, and the centre stays too.
    """

    alpha: float = 0.1
    mode: str = "implicit"
    moves_anchor: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        _check("alpha", self.alpha, 0, 1)

    def _rules(self, copies: int, step_size: float) -> Tensor:
        alpha = self.alpha
        if alpha * copies > 1 + 1e-12:
            raise ValueError(f"alpha must be at most 1/copies = {1 / copies:.3g}, got {alpha}")
        row, centre = (1.0, 1 - alpha, 0.0, alpha, 1.0), (0.0, 1 - copies * alpha, alpha, 0.0, 0.0)
        if self.explicit:
            pull = alpha / step_size * self.every if step_size else math.inf
            if pull > LARGEST:
                pull, centre = 0.0, FIXED
            row = (1.0, 1.0, 0.0, pull, 1.0)
        return _table(copies, lambda label, copy: row, centre)


@dataclass(frozen=True)
class Parle(Coupling):
    """Parle (Chaudhari et al. 2017): each copy explores around a point of its own; every `every` steps the points move
    to where their copies were on average, and toward each other.

    With y_j the copies, x_j their points, z_j their averages:
    y_j ← (a_j + (γ/scope)·x_j)/(1 + γ/scope); z_j ← decay·z_j + (1 − decay)·y_j; and every `every` steps
    x_j ← x_j − eta·(x_j − z_j) − (eta/rho)·(x_j − mean_i x_i); y_j ← x_j. (The paper's pull to x_j is a gradient step, ours
    its proximal map: they differ by O(γ²).)

    Args:
        scope: the paper's γ, the width of the local entropy, positive.
        rho: how weakly the points are tied, positive.
        eta: the points' step, positive, and eta + eta/rho at most 1.
        decay: of the averages, the paper's α, in [0, 1).
    """

    scope: float = 100.0
    rho: float = 1.0
    eta: float = 0.5
    decay: float = 0.75
    every: int = field(default=25, kw_only=True)
    buffers: ClassVar[tuple[str, ...]] = ("point", "average")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("scope", "rho"):
            _check(name, getattr(self, name), 0, math.inf, closed=False)
        if not 0 < self.eta <= 1 / (1 + 1 / self.rho):
            raise ValueError(f"eta must be in (0, rho/(1 + rho) = {self.rho / (1 + self.rho):.3g}], got {self.eta}")
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {self.decay}")

    def rules(self, copies: int, step_size: float, step: int = 1) -> Tensor:
        """One copy's rules: s is its proposal, the anchor its point, the centre its average."""
        pull = step_size / self.scope / (1 + step_size / self.scope)
        average = (0.0, self.decay, (1 - self.decay) * (1 - pull), (1 - self.decay) * pull, 0.0)
        return _table(1, lambda label, copy: (1.0, 1 - pull, 0.0, pull, 1.0), average)

    def move_points(self, copies: Tensor, points: Tensor, averages: Tensor, together: Tensor) -> None:
        """What happens every `every` steps, in place on [m, N] buffers; together: the mean of all points, [N]."""
        tie = self.eta / self.rho
        points.mul_(1 - self.eta - tie).add_(averages, alpha=self.eta).add_(together, alpha=tie)
        copies.copy_(points)
        averages.copy_(points)


@dataclass(frozen=True)
class Toward(Coupling):
    """A pull toward a fixed anchor, (strength/2)·‖x_j − θ̃‖²: L2-SP (Li et al. 2018).

    x_j ← (a_j + γ·strength·θ̃)/(1 + γ·strength).

    Args:
        strength: finite, not negative.
        mode: "implicit", the proximal map, stable for every strength; "explicit": strength·(x_j − θ̃) joins the gradient.
    """

    strength: float = 0.01
    mode: str = "implicit"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check("strength", self.strength, 0, 1e300)

    def _rules(self, copies: int, step_size: float) -> Tensor:
        if self.explicit:
            return _table(copies, lambda label, copy: (0.0, 1.0, 0.0, self.strength * self.every, 1.0), FIXED)
        pull = step_size * self.strength / (1 + step_size * self.strength)
        return _table(copies, lambda label, copy: (0.0, 1 - pull, 0.0, pull, 1.0), FIXED)


@dataclass(frozen=True)
class Average(Coupling):
    """Local SGD: every `every` steps the copies are replaced by their mean (McMahan et al. 2017, Stich 2019).

    With `toward`, the anchor holds the last mean and pulls at the copies in between: FedProx (Li et al. 2020).

    Args:
        toward: FedProx's μ, finite, not negative; 0 leaves the anchor alone.
    """

    toward: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check("toward", self.toward, 0, 1e300)

    @property
    def moves_anchor(self) -> bool:  # type: ignore[override]
        return self.toward > 0

    def rules(self, copies: int, step_size: float, step: int = 1) -> Tensor:
        if step % self.every:
            return Toward(self.toward).rules(copies, step_size)
        row = (1 / copies, 0.0, 1.0, 0.0, 1.0)
        return _table(copies, lambda label, copy: row, (0.0, 0.0, 1.0, 0.0, 0.0) if self.moves_anchor else FIXED)


BY_NAME = {c.__name__: c for c in (Homotopy, Explicit, EMA, Lookahead, Elastic, Parle, Toward, Average)}
