"""Proposals: what each copy would do by itself. Numbers for the kernels; imports checks.py only.

A proposal is a settings object. It says which kernel does it, how many buffers a copy needs, what numbers the kernel is
given at a step, and the step size that the coupling's proximal map is to take. To add one: its equations in
csrc/arithmetic.h, their twins in kernels/reference.py and kernels/triton.py, and a class here.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch

from .checks import field_types, number, shown


@dataclass(frozen=True)
class SGD:
    """torch.optim.SGD, from zeroed momentum buffers.

    Args:
        lr: learning rate, not negative.
        momentum: μ, 0 ≤ μ < 1.
        weight_decay: added to the gradient as weight_decay·x.
        nesterov: Nesterov's momentum; needs momentum.
        maximize: climb instead of descend.

    Raises:
        ValueError: a setting outside its range.
    """

    lr: float
    momentum: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False
    maximize: bool = False
    kernel: ClassVar[int] = 0
    all_buffers: ClassVar[tuple[str, ...]] = ("momentum_buffer",)
    torch_optimizer: ClassVar[Callable[..., torch.optim.Optimizer]] = torch.optim.SGD

    def __post_init__(self) -> None:
        field_types(self)
        _check_range("lr", self.lr)
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {self.momentum}")
        _check_range("weight_decay", self.weight_decay)
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs a momentum, got momentum=0")

    @property
    def buffers(self) -> tuple[str, ...]:
        """The names of a copy's buffers, as torch's own state_dict has them."""
        return self.all_buffers if self.momentum else ()

    @property
    def step_size(self) -> float:
        """γ = lr/(1 − μ), how far a constant gradient moves a copy in the long run.

        Only with this γ do the coupled step's stationary points lie on the path of H itself.
        """
        return float(self.lr) / (1 - self.momentum)

    def numbers(self, step: int) -> list[float]:
        """csrc/arithmetic.h's Sgd::Numbers at step number `step`, the first being 1."""
        lr = float(self.lr)
        lr_grad, lr_momentum = (lr, lr * self.momentum) if self.nesterov or self.momentum == 0 else (0.0, lr)
        return [-1.0 if self.maximize else 1.0, self.weight_decay, lr_grad, lr_momentum, self.momentum, 0.0, 0.0, 0.0]

    def frozen_numbers(self, explicit: bool) -> list[float]:
        """The numbers for a parameter that only the coupling moves: it proposes itself, and its buffer stays. An explicit
        coupling, which comes as a gradient, moves it by γ times that, and the buffer with it."""
        return [
            0.0,
            0.0,
            self.step_size if explicit else 0.0,
            0.0,
            float(self.momentum > 0 and not explicit),
            0.0,
            0.0,
            0.0,
        ]


@dataclass(frozen=True)
class AdamW:
    """torch.optim.AdamW, from zeroed buffers.

    The coupling's proximal map is applied to AdamW's proposal with γ = lr, as AdamW itself decouples weight decay: its
    stationary points are those of AdamW's own metric, not of H.

    Args:
        lr: learning rate, not negative.
        betas: decay rates of the gradient's and its square's averages, each in [0, 1).
        eps: added to the square root, positive: a parameter without a gradient would be 0/0.
        weight_decay: each step takes lr·weight_decay of a copy away.
        maximize: climb instead of descend.

    Raises:
        ValueError: a setting outside its range.
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 1e-2
    maximize: bool = False
    kernel: ClassVar[int] = 1
    all_buffers: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")
    torch_optimizer: ClassVar[Callable[..., torch.optim.Optimizer]] = torch.optim.AdamW

    def __post_init__(self) -> None:
        field_types(self)
        if not isinstance(self.betas, tuple | list):
            raise TypeError(f"betas must be two numbers in [0, 1), got {shown(self.betas)}")
        object.__setattr__(self, "betas", tuple(number("betas", beta) for beta in self.betas))
        _check_range("lr", self.lr)
        if not 0 < self.eps < math.inf:
            raise ValueError(f"eps must be positive and finite, got {self.eps}")
        _check_range("weight_decay", self.weight_decay)
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be two numbers in [0, 1), got {self.betas}")

    @property
    def buffers(self) -> tuple[str, ...]:
        """The names of a copy's buffers, as torch's own state_dict has them."""
        return self.all_buffers

    @property
    def step_size(self) -> float:
        """γ = lr."""
        return float(self.lr)

    def numbers(self, step: int) -> list[float]:
        """csrc/arithmetic.h's AdamW::Numbers at step number `step`, the first being 1."""
        lr, (beta_mean, beta_square) = float(self.lr), self.betas
        corrected_lr = lr / (1 - beta_mean**step)
        root = 1 / math.sqrt(1 - beta_square**step)
        return [-1.0 if self.maximize else 1.0, 1 - lr * self.weight_decay, 1 - beta_mean, beta_square, 1 - beta_square,
                corrected_lr, root, self.eps]  # fmt: skip

    def frozen_numbers(self, explicit: bool) -> list[float]:
        """As SGD's."""
        return [0.0, 1.0, float(explicit), 1.0, 0.0, self.step_size if explicit else 0.0, 0.0, 1.0]


Proposal = SGD | AdamW
KINDS = (SGD, AdamW)  # for isinstance, which the compiler of torch 2.10 does not follow into a union
BY_NAME = {kind.__name__: kind for kind in KINDS}


def _check_range(name: str, value: float) -> None:
    if isinstance(value, torch.Tensor) and torch.compiler.is_compiling():
        return  # the op that makes the rules will look
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} must be finite and not negative, got {value}")
