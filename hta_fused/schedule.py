"""Schedules of the homotopy parameter L: functions of the epoch, joined by `+`; and what sets them. Imports
checks.py, couplings.py and proposals.py.

L = decoupled(2) + linear(0.01, 0.005, step=0.001, epochs_per_value=4) + merged()
L(0)      # inf
L.epochs  # 27
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from . import couplings, proposals
from .checks import number, shown, whole


@dataclass(frozen=True)
class Schedule:
    """One value of L for each epoch; the last one holds for ever after."""

    values: tuple[float, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.values, tuple | list) or not self.values:
            raise ValueError("values must hold at least one L, in a tuple")
        object.__setattr__(self, "values", tuple(number("L", L) for L in self.values))
        for L in self.values:
            if not L >= 0:
                raise ValueError(f"L must be in [0, ∞], got {L}")

    def __call__(self, epoch: int) -> float:
        return self.values[min(whole("epoch", epoch, 0, 2**63 - 1), self.epochs - 1)]

    def __add__(self, later: "Schedule") -> "Schedule":
        if not isinstance(later, Schedule):
            return NotImplemented
        return Schedule(self.values + later.values)

    @property
    def epochs(self) -> int:
        """The length of the schedule in epochs."""
        return len(self.values)


class CouplingScheduler:
    """Sets a coupling's settings, L for example, from functions of the epoch, as torch's schedulers set the learning rate.

    Call `step()` after each epoch (or whatever the functions count). It writes param_groups, so that a wrapper of the
    optimizer which shows these, and hides the rest, will do.

    Args:
        optimizer: a CoupledOptimizer, or a wrapper of one.
        settings: for each name of a setting in param_groups, a function of the epoch: a Schedule, or your own.

    Raises:
        TypeError: something without param_groups, or a setting that is no function.
        ValueError: a name that the coupling does not have. A value outside its range raises at the optimizer's next step.
    """

    def __init__(self, optimizer: Any, **settings: Callable[[int], float]):
        groups = getattr(optimizer, "param_groups", None)
        if not isinstance(groups, list):
            raise TypeError(f"optimizer must have param_groups, got {shown(optimizer)}")
        if not settings:
            raise ValueError("settings must name at least one, such as L=schedule.linear(…), got none")
        for name, function in settings.items():
            if not callable(function):
                raise TypeError(f"{name} must be a function of the epoch, got {shown(function)}")
        self.optimizer = optimizer
        self.settings = settings
        self._go_to(0)

    def step(self) -> None:
        """Goes on to the next epoch."""
        self._go_to(self.epoch + 1)

    def state_dict(self) -> dict[str, Any]:
        """Which epoch it is; the functions are not saved."""
        return {"epoch": self.epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse of `state_dict`; sets that epoch's values."""
        if not isinstance(state_dict, Mapping) or "epoch" not in state_dict:
            raise ValueError(f"state_dict must be a CouplingScheduler's, with an epoch, got {shown(state_dict)}")
        self._go_to(whole("epoch", state_dict["epoch"], 0, 2**63 - 1))

    def get_last_value(self) -> dict[str, float]:
        """What is set now, by name."""
        return self._values(self.epoch)

    def _values(self, epoch: int) -> dict[str, float]:
        counts = ("every",)  # of steps
        return {
            name: whole(name, function(epoch), 1, 2**63 - 1) if name in counts else number(name, function(epoch))
            for name, function in self.settings.items()
        }

    def _go_to(self, epoch: int) -> None:
        groups, values = self.optimizer.param_groups, self._values(epoch)
        for name in values:  # the coupling may be another one by now
            if any(name not in _coupling_settings(group) for group in groups):
                coupling = next((group["coupling"] for group in groups if "coupling" in group), "none")
                raise ValueError(f"{name} must be a setting of the optimizer's coupling, which is {coupling}")
        self.epoch = epoch
        for group in groups:
            group.update(values)


def _coupling_settings(group: Mapping[str, Any]) -> set[str]:
    """The names of a group's settings that are its coupling's; of one that is not ours, all but the proposals' and torch's."""
    if "coupling" not in group:
        return set()
    of = couplings.BY_NAME.get(group["coupling"])
    if of is not None:
        return {f.name for f in fields(of)} & group.keys()
    others = {f.name for proposal in proposals.BY_NAME.values() for f in fields(proposal)}
    return group.keys() - others - {"params", "coupling", "steps", "dampening", "initial_lr"}


def constant(L: float, epochs: int = 1) -> Schedule:
    """The same L for `epochs` epochs."""
    return Schedule((number("L", L),) * _count("epochs", epochs))


def linear(start: float, stop: float, step: float, epochs_per_value: int = 1) -> Schedule:
    """start, start − step, … down to stop, each for `epochs_per_value` epochs; the paper's is (0.01, 0.005, 0.001, 4)."""
    start, stop, step = number("start", start), number("stop", stop), number("step", step)
    if not math.inf > start >= stop >= 0:
        raise ValueError(f"start and stop must satisfy ∞ > start ≥ stop ≥ 0, got {start} and {stop}")
    if not step > 0 or math.isinf((start - stop) / step):
        raise ValueError(f"step must be positive, and not vanish beside start − stop, got {step}")
    count = math.floor((start - stop) / step * (1 + 1e-12) + 1e-9) + 1
    # Rounding to twelve digits gives 0.007, not 0.006999999999999999, and 0 where the steps end there.
    values = [float(f"{L:.12g}") if 1e-12 * start < L else 0.0 for L in (start - i * step for i in range(count))]
    return _held(values, epochs_per_value)


def geometric(start: float, stop: float, factor: float, epochs_per_value: int = 1) -> Schedule:
    """start, start·factor, … while not below stop, each for `epochs_per_value` epochs."""
    start, stop, factor = number("start", start), number("stop", stop), number("factor", factor)
    if not math.inf > start >= stop > 0:
        raise ValueError(f"start and stop must satisfy ∞ > start ≥ stop > 0, got {start} and {stop}")
    if not 0 < factor < 1:
        raise ValueError(f"factor must be between 0 and 1, got {factor}")
    first, down = math.log(start), math.log(factor)
    count = math.floor((math.log(stop) - first) / down + 1e-9) + 1
    # factor**i may underflow where start·factor**i does not.
    values = [start * factor**i if i * down > -700 else math.exp(first + i * down) for i in range(count)]
    return _held(values, epochs_per_value)


def decoupled(epochs: int) -> Schedule:
    """L = ∞: the low-dimensional problems of equation (2), which know nothing of each other."""
    return constant(math.inf, epochs)


def merged(epochs: int = 1) -> Schedule:
    """L = 0: the two copies are one."""
    return constant(0.0, epochs)


def _held(values: list[float], epochs_per_value: int) -> Schedule:
    return Schedule(tuple(L for L in values for _ in range(_count("epochs_per_value", epochs_per_value))))


def _count(name: str, count: int) -> int:
    return whole(name, count, 1, 10**9)
