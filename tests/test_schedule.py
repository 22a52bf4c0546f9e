"""Schedules of L: the values, how they join, what they refuse."""

import itertools
import math

import pytest
import torch

import hta_fused as hta
from hta_fused import schedule


def test_the_papers_schedule():
    L = schedule.linear(0.01, 0.005, 0.001, 4)
    assert L.epochs == 24
    assert L.values[::4] == (0.01, 0.009, 0.008, 0.007, 0.006, 0.005)
    assert [L(0), L(3), L(4), L(23), L(1000)] == [0.01, 0.01, 0.009, 0.005, 0.005]


def test_geometric_halves():
    assert schedule.geometric(1.0, 0.125, 0.5, 2).values == (1, 1, 0.5, 0.5, 0.25, 0.25, 0.125, 0.125)


@pytest.mark.parametrize(
    ("start", "stop", "factor"),
    [(1e200, 1e-200, 0.5), (1.7e308, 1e-300, 0.75), (1e-200, 1e-300, 1e-3), (3.0, 0.1, 0.9)],
)
def test_geometric_falls_evenly_from_the_largest_numbers_to_the_smallest(start, stop, factor):
    values = schedule.geometric(start, stop, factor).values
    assert values[0] == start
    assert stop * (1 - 1e-9) <= values[-1] < stop / factor
    assert [b / a for a, b in itertools.pairwise(values)] == pytest.approx([factor] * (len(values) - 1), rel=1e-12)


def test_schedules_join():
    L = schedule.decoupled(2) + schedule.constant(0.1, 3) + schedule.merged()
    assert L.values == (math.inf, math.inf, 0.1, 0.1, 0.1, 0.0)
    assert L(99) == 0


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: schedule.linear(0.005, 0.01, 0.001), "start"),
        (lambda: schedule.linear(0.01, 0.005, 0), "step"),
        (lambda: schedule.linear(0.01, 0.005, 0.001, 0), "epochs_per_value"),
        (lambda: schedule.linear(math.inf, 0.005, 0.001), "start"),
        (lambda: schedule.geometric(1.0, 0.0, 0.5), "stop"),
        (lambda: schedule.geometric(1.0, 0.1, 1.5), "factor"),
        (lambda: schedule.constant(-1.0), "L"),
        (lambda: schedule.constant(math.nan), "L"),
        (lambda: schedule.merged(0), "epochs"),
        (lambda: schedule.constant(1.0)(-1), "epoch"),
        (lambda: schedule.Schedule(()), "values"),
    ],
)
def test_nonsense_is_named(make, name):
    with pytest.raises(ValueError, match=name):
        make()


class Mine(hta.Toward):
    """Of one's own."""


@pytest.mark.parametrize("coupling", [hta.Toward(), Mine()])
@pytest.mark.parametrize(
    "name", ["params", "eps", "lr", "weight_decay", "steps", "coupling", "L", "betas", "initial_lr"]
)
def test_a_coupling_scheduler_takes_what_the_coupling_has(coupling, name):
    optimizer = hta.CoupledOptimizer(hta.Replicas(torch.nn.Linear(2, 2), 2, {}), hta.AdamW(0.1), coupling)
    optimizer.state_dict()  # puts steps there
    optimizer.param_groups[0]["initial_lr"] = 0.1
    before = dict(optimizer.param_groups[0])
    with pytest.raises(ValueError, match=f"{name} must be a setting of the optimizer's coupling, which is "):
        hta.CouplingScheduler(optimizer, **{name: lambda epoch: 0.5})
    assert before.keys() == optimizer.param_groups[0].keys()
    assert all(value is before[key] for key, value in optimizer.param_groups[0].items())
    hta.CouplingScheduler(optimizer, strength=lambda epoch: 0.5)
    assert optimizer.coupling.strength == 0.5


def test_a_coupling_scheduler_sets_periods():
    optimizer = hta.CoupledOptimizer(hta.Replicas(torch.nn.Linear(2, 2), 2, {}), hta.SGD(0.1), hta.Average())
    scheduler = hta.CouplingScheduler(optimizer, every=lambda epoch: 4 - epoch)
    optimizer.step()
    assert optimizer.coupling.every == 4
    scheduler.step()
    assert optimizer.coupling.every == 3
