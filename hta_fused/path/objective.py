"""f, the function to minimise: its value, its gradient, and the errors owed for what is no such function."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..checks import number


def scalar_value(f: Callable[[Tensor], Any], point: Tensor) -> Tensor:
    """f at a point that requires a gradient.

    Raises:
        ValueError: f does not return a scalar tensor, or one without a gradient.
    """
    result = f(point)
    if not isinstance(result, Tensor):
        raise ValueError(f"f must return a scalar tensor, got {type(result).__name__}")
    if result.numel() != 1:
        raise ValueError(f"f must return a scalar tensor, got shape {tuple(result.shape)}")
    if not result.requires_grad:
        raise ValueError("f has no gradient: what it returns does not depend on its argument through torch")
    return result


def one_value(f: Callable[[Tensor], Any]) -> Callable[[Tensor], Tensor]:
    """f as torch.func differentiates it: its one value, of whatever shape, as a scalar."""
    return lambda x: f(x).reshape(())


def check_positive(name: str, value: Any) -> None:
    """Raises where a setting is no positive finite number."""
    if not 0 < number(name, value) < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {value}")


class Objective:
    """f with its gradient, in NumPy, counted and checked.

    Args:
        f: a function of a 1-D float64 tensor that returns a scalar tensor, or a pair of NumPy functions (f, gradient).
    """

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
        result = scalar_value(self.f, point)
        (slope,) = torch.autograd.grad(result.reshape(()), point, allow_unused=True)
        if slope is None:
            raise ValueError("f has no gradient: what it returns does not depend on its argument")
        return float(result.detach()), slope.numpy()
