"""f, the function to minimise: its value, its gradient, and the errors owed for what is no such function."""

import math
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from ..checks import number, shown

F = TypeVar("F", bound=Callable[..., Any])


def differentiating(call: F) -> F:
    """A function that differentiates, also where its caller has switched that off."""
    return torch.inference_mode(False)(torch.enable_grad()(call))


def as_float64(name: str, value: Any) -> Tensor:
    """Real numbers as a float64 tensor of its own, detached, on the device where they are.

    Raises:
        TypeError: they are none, or a tensor that is not strided and in memory.
    """
    if not isinstance(value, Tensor):
        with suppress(TypeError, ValueError, RuntimeError):  # lists of several lengths, for one
            array = np.asarray(value)
            if array.dtype.kind in "iuf":
                return torch.from_numpy(array.astype(np.float64))
    else:
        in_memory = value.layout == torch.strided and not (value.is_nested or value.is_meta)
        if in_memory and not (value.is_complex() or value.dtype == torch.bool):
            return value.detach().to(torch.float64, copy=True)
    about = [str(getattr(value, what)) for what in ("dtype", "layout", "device") if hasattr(value, what)]
    raise TypeError(f"{name} must hold real numbers, got {', '.join([shown(value), *about])}")


def scalar_value(f: Callable[[Tensor], Any], point: Tensor) -> Tensor:
    """f at a point that requires a gradient.

    Raises:
        ValueError: f does not return a real scalar tensor, or one without a gradient.
    """
    result = f(point)
    if not isinstance(result, Tensor):
        raise ValueError(f"f must return a scalar tensor, got {type(result).__name__}")
    if result.numel() != 1:
        raise ValueError(f"f must return a scalar tensor, got shape {tuple(result.shape)}")
    if result.is_complex():
        raise ValueError(f"f must return a real number, got {result.dtype}")
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

    Raises:
        TypeError: it is neither.
    """

    def __init__(self, f: Any):
        pair = isinstance(f, tuple) and len(f) == 2 and all(map(callable, f))
        if not (pair or callable(f)):
            raise TypeError(f"f must be a function, or a tuple of two (f, gradient), got {shown(f)}")
        self.f = f
        self.evaluations = 0

    @differentiating
    def __call__(self, x: np.ndarray) -> tuple[float, np.ndarray]:
        self.evaluations += 1
        if isinstance(self.f, tuple):
            value, gradient = as_float64("f's value", self.f[0](x)), as_float64("f's gradient", self.f[1](x)).numpy()
            if value.numel() != 1:
                raise ValueError(f"f must return a number, got shape {tuple(value.shape)}")
            if gradient.shape != x.shape:
                raise ValueError(f"f's gradient must have shape {x.shape}, got {gradient.shape}")
            return float(value), gradient
        point = torch.tensor(x, requires_grad=True, device="cpu")
        result = scalar_value(self.f, point)
        (slope,) = torch.autograd.grad(result.reshape(()), point, allow_unused=True)
        if slope is None:
            raise ValueError("f has no gradient: what it returns does not depend on its argument")
        return float(result.detach()), slope.numpy()
