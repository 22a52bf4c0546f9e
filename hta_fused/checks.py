"""Checks of settings at the boundary: one line that names the argument, what was wanted and what came. Imports torch only."""

from collections.abc import Callable
from dataclasses import fields
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor


def shown(value: Any) -> str:
    """A value in a message of one line: itself if it is a number, a string or None, else its type."""
    plain = value is None or isinstance(value, str | Real | complex)
    return repr(value) if plain else f"a {type(value).__name__}"


def number(name: str, value: Any) -> float:
    """A real number, or a tensor of one, as a float.

    Raises:
        TypeError: it is none (a bool is none).
        ValueError: no float is so large.
    """
    if isinstance(value, Tensor) and value.numel() == 1 and not (value.is_complex() or value.dtype == torch.bool):
        return float(value)
    if isinstance(value, bool) or not isinstance(value, float | int | Real):
        raise TypeError(f"{name} must be a number, got {shown(value)}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} must be finite, got a whole number beyond float64") from None


def whole(name: str, value: Any, low: int, high: int, what: str = "a whole number") -> int:
    """A whole number in a range, as an int.

    Raises:
        TypeError: it is not whole (a bool is not).
        ValueError: it is outside.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be {what}, got {shown(value)}")
    if not low <= int(value) <= high:
        limits = f"from {low} to {high}" if high < 2**31 else f"at least {low}" if low > -(2**31) else "in 64 bits"
        raise ValueError(f"{name} must be {what} {limits}, got {value}"[:300])
    return int(value)


def flag(name: str, value: Any) -> None:
    """Raises TypeError where a value is not True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {shown(value)}")


def choice(name: str, value: Any, *of: str) -> str:
    """One of some strings, as a str.

    Raises:
        ValueError: it is none of them.
    """
    if not isinstance(value, str) or value not in of:
        wanted = (" or " if len(of) == 2 else ", ").join(map(repr, of))
        raise ValueError(f"{name} must be {wanted}, got {shown(value)}")
    return str(value)


def plain(value: Any) -> Any:
    """A setting, or a tuple or list of some, with Python's own numbers and strings for NumPy's: these are among them by
    isinstance, but torch.load with weights_only refuses what holds them."""
    if type(value) in (tuple, list):
        return type(value)(map(plain, value))
    if isinstance(value, bool):
        return value
    kinds: tuple[tuple[type, Callable[[Any], Any]], ...] = ((str, str), (Integral, int), (Real, float))
    return next((own(value) for kind, own in kinds if isinstance(value, kind)), value)


def field_types(settings: Any) -> None:
    """Checks the numbers and flags among a settings object's fields; NumPy's numbers and strings become Python's, as does a
    tensor of one number (but lr, which may change in place)."""
    for f in fields(settings):
        value = getattr(settings, f.name)
        if f.type is float:
            checked = number(f.name, value)
            if f.name != "lr" if isinstance(value, Tensor) else type(value) not in (float, int):
                object.__setattr__(settings, f.name, checked)
        elif f.type is str and type(value) is not str:
            object.__setattr__(settings, f.name, plain(value))
        elif f.type is bool:
            flag(f.name, value)


def concrete(tensor: Tensor) -> bool:
    """Whether a tensor has values that Python may look at: neither the compiler's nor a fake one."""
    return not (torch.compiler.is_compiling() or hasattr(tensor, "fake_mode") or tensor.is_meta or fakes())


def fakes() -> bool:
    """Whether a FakeTensorMode is on."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None
