"""The paper's experiments: what they find, and what their command leaves."""

import csv

import numpy as np
import pytest

from hta_fused import problems
from hta_fused.paper import cli, convergence, quadratic, table1


def test_the_homotopy_finds_what_quasi_newton_misses():
    """Table 1, n = 2: 24 and 36 of 36."""
    points = table1.starts(2)
    found = table1.quasi_newton(problems.chow, points, "")
    assert found["hits"] == 24
    assert table1.homotopy(problems.chow, points, table1.LINEAR, 0.0, "")["hits"] == 36
    assert found["evaluations"] > found["steps"] > 1


def test_the_tracked_and_the_trained_path_are_the_exact_one():
    rows = quadratic.paths(8, np.geomspace(1e3, 1e-6, 7).tolist())
    assert max(row["tracked"] for row in rows) < 1e-8
    assert max(row["trained"] for row in rows) < 1e-5
    distances = [row["distance"] for row in rows]
    assert distances == sorted(distances, reverse=True)  # the copies meet


@pytest.mark.parametrize("experiment", list(cli.EXPERIMENTS))
def test_every_command_leaves_a_table_a_csv_and_a_picture(tmp_path, capsys, experiment):
    cli.main([experiment, "--quick", "--out", str(tmp_path)])
    assert capsys.readouterr().out.strip()
    with open(tmp_path / f"{experiment}.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert rows
    assert (tmp_path / f"{experiment}.png").read_bytes()[:4] == b"\x89PNG"
    if experiment == "figure1":
        assert (tmp_path / "figure1.gif").read_bytes()[:4] == b"GIF8"
        assert float(rows[-1]["L"]) == 0


def test_theorem_quantities_fall():
    for rows in (convergence.convex(2, 300), convergence.nonconvex(1, 60)):
        for mode in ("explicit", "implicit"):
            values = [row["value"] for row in rows if row["mode"] == mode and row["seed"] == 0]
            assert 0 < values[-1] < values[0]
    assert convergence.slope([{"n": n, "value": 3 / n} for n in (10, 100, 1000)]) == pytest.approx(-1)
