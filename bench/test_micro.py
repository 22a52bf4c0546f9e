"""Microbenchmarks for pytest-benchmark: `pytest bench/ --benchmark-json FILE`. `hta-bench` is the one for people."""

import pytest
import torch
from hta_fused_bench import rivals, workloads

import hta_fused as hta

SIZES = (1_000, 100_000, 10_000_000)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("proposal", list(rivals.PROPOSALS))
@pytest.mark.parametrize("rival", ["ours", *rivals.COUPLED, rivals.NAIVE, rivals.FLOOR])
def test_step(benchmark, rival, proposal, n):
    load = workloads.flat(n, proposal=proposal)
    makers = {**rivals.COUPLED, rivals.NAIVE: rivals.autograd, **rivals.FLOORS}
    if rival == rivals.NAIVE:
        load.problem.coupling = hta.Explicit(10.0)
    benchmark(load.optimizer.step if rival == "ours" else makers[rival](load.problem))


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("copies", [1, 4, 8])
def test_copies(benchmark, copies, n):
    benchmark(workloads.flat(n, copies=copies).optimizer.step)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("labels", ["structural", "random", "hashed"])
@pytest.mark.parametrize("anchor", [True, False])
def test_labels_and_anchors(benchmark, n, labels, anchor):
    benchmark(workloads.flat(n, labels=labels, anchor=anchor).optimizer.step)


@pytest.mark.parametrize("n", SIZES)
def test_penalty(benchmark, n):
    theta, eta = (torch.randn(n, requires_grad=True) for _ in range(2))
    benchmark(lambda: torch.autograd.grad(hta.homotopy_penalty(theta, eta, None, None, 0.1), [theta, eta]))
