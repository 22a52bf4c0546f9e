"""The coefficient tables: weighted means, exact at both ends, the solution of the proximal problem for any m."""

import math

import pytest
import torch

from hta_fused import tables


@pytest.mark.parametrize("L", [0.0, 1e-6, 0.01, 1.0, 1e6, 1e308, math.inf])
@pytest.mark.parametrize("lr", [1e-8, 0.1, 1e3])
def test_rows_are_weighted_means(L, lr):
    table = tables.implicit(L, lr)
    assert table.shape == (3, 2, 3)
    assert table.dtype == torch.float64
    assert (table >= 0).all()
    assert torch.allclose(table.sum(-1), torch.ones(3, 2, dtype=torch.float64), rtol=0, atol=1e-14)


def test_L_zero_is_the_merge():
    assert torch.equal(tables.implicit(0.0, 0.1), torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64).expand(3, 2, 3))


def test_L_infinite_decouples():
    proposal = [[1.0, 0, 0], [0, 1.0, 0]]
    expected = [proposal, [[0, 0, 1.0], [0, 1.0, 0]], [[1.0, 0, 0], [0, 0, 1.0]]]
    assert tables.implicit(math.inf, 0.1).tolist() == expected


@pytest.mark.parametrize("m", [2, 3, 5])
@pytest.mark.parametrize("L", [1e-6, 0.01, 1.0, 100.0])
def test_tables_minimise_the_proximal_problem_for_m_copies(m, L):
    lr = float(torch.rand(())) + 0.01
    anchored = (torch.rand(4, m) < 0.5).tolist()
    a, anchor = torch.randn(m, dtype=torch.float64), torch.randn((), dtype=torch.float64)
    result = tables.implicit(L, lr, anchored) @ torch.cat([a, anchor[None]])
    for row, x in zip(anchored, result, strict=True):
        pull = torch.tensor(row, dtype=torch.float64)
        gradient = (x - a) / lr + 2 * L * pull * (x - anchor) + 2 / L * (m * x - x.sum())
        scale = float((x - a).abs().max() / lr + 2 / L * x.abs().max() + 2 * L * torch.stack([*x, anchor]).abs().max())
        assert gradient.abs().max() < 1e-13 * scale


def test_the_tables_keep_their_digits_in_float32():
    for L in (1e-6, 1e-3, 1.0, 100.0):
        table = tables.implicit(L, 0.05)
        x = torch.randn(1000, 3)
        error = (x @ table.float().view(6, 3).T).double() - x.double() @ table.view(6, 3).T
        assert error.abs().max() < 1e-6


@pytest.mark.parametrize(("L", "lr", "name"), [(-1, 0.1, "L"), (math.nan, 0.1, "L"), (1, 0, "lr"), (1, math.inf, "lr")])
def test_bad_settings_are_named(L, lr, name):
    with pytest.raises(ValueError, match=f"^{name} must"):
        tables.implicit(L, lr)


def test_a_learning_rate_of_zero_on_the_way_changes_nothing():
    """Schedulers pass through 0; the optimizer then leaves the copies where they are."""
    hyper, table = tables.step_coefficients(0.01, 0.0, 0.9)
    assert hyper[:2] == [0.0, 0.0]
    assert table[1] == [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]
