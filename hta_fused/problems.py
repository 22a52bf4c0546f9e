"""Test functions with many local minima, for path tracking. All are 0 at their only global minimiser.

Each takes a 1-D float tensor of at least 2 elements and returns a scalar tensor; torch.func.vmap makes them batched.
Imports torch only.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

Function = Callable[[Tensor], Tensor]

CHOW_MINIMISER = 1.0  # in every coordinate


def chow(x: Tensor) -> Tensor:
    """Equation (33) of the paper, term by term, with the y, k and A of its equation (34).

    f(x) = (π/n)·{k·sin²(π·y₁) + Σ_{i<n} (y_i − A)²·[1 + k·sin²(π·y_{i+1})] + (y_n − A)²}, y_i = 1 + (x_i − 1)/4,
    k = 10, A = 1
    """
    y = 1 + (x - 1) / 4
    waves = torch.sin(math.pi * y).square()
    wells = (y - 1).square()
    return math.pi / len(x) * (10 * waves[0] + (wells[:-1] * (1 + 10 * waves[1:])).sum() + wells[-1])


def ackley(x: Tensor) -> Tensor:
    """Ackley's function; minimiser 0, usual domain [−32, 32]ⁿ. Its gradient jumps there."""
    radius = (x.square().mean() + 1e-300).sqrt()  # whose derivative is finite at 0
    return -20 * torch.exp(-0.2 * radius) - torch.exp(torch.cos(2 * math.pi * x).mean()) + 20 + math.e


def rastrigin(x: Tensor) -> Tensor:
    """Rastrigin's function; minimiser 0, usual domain [−5.12, 5.12]ⁿ."""
    return 10 * len(x) + (x.square() - 10 * torch.cos(2 * math.pi * x)).sum()


def griewank(x: Tensor) -> Tensor:
    """Griewank's function; minimiser 0, usual domain [−600, 600]ⁿ."""
    index = torch.arange(1, len(x) + 1, dtype=x.dtype, device=x.device)
    return x.square().sum() / 4000 - torch.cos(x / index.sqrt()).prod() + 1


def shifted(f: Function, shift: Tensor) -> Function:
    """f moved by `shift`: its minimiser lies there further."""
    return lambda x: f(x - shift)
