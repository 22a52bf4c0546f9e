"""The paper's experiments: what they find, and what their command leaves."""

import csv
import os

import numpy as np
import pytest
import torch

from hta_fused import problems
from hta_fused.paper import cli, convergence, quadratic, table1


def test_the_homotopy_finds_what_quasi_newton_misses():
    """Table 1, n = 2: 24 and 36 of 36."""
    points = table1.starts(2)
    found = table1.quasi_newton(problems.chow, points, "")
    assert found["hits"] == 24
    assert table1.homotopy(problems.chow, points, table1.LINEAR, 0.0, "")["hits"] == 36
    assert found["evaluations"] > found["steps"] > 1


def test_the_papers_sentence_about_one_start():
    """[5, 4, 5, 5]: quasi-Newton takes the paper's 8 steps and misses the global minimum, the homotopy finds it.

    The paper's 14 steps are nearly those from L = 0.8 to 0.1 (12); the first minimiser takes 15 more.
    """
    rows = list(table1.one_start())
    plain = rows[0]
    assert (plain["method"], plain["steps"], plain["global"]) == ("quasi-Newton", 8, False)
    assert plain["f"] == pytest.approx(3.1096, abs=1e-4)
    found = {(row["method"], row["L"], row["anchor"]): row for row in rows[1:]}
    cold, steered = (found[method, "0.9, 0.8, … 0.1", "0"] for method in table1.HOMOTOPIES.values())
    assert cold["global"]
    assert steered["global"]
    assert steered["steps"] - steered["of them at the first L"] <= 14
    assert steered["steps"] <= 30 < 60 < cold["steps"]
    assert steered["evaluations"] < 0.7 * cold["evaluations"]
    assert not any(row["global"] for row in rows if row["anchor"] == "the start")


@pytest.mark.parametrize("method", list(table1.RIVALS))
@pytest.mark.parametrize("moved", [False, True])
def test_the_rivals_keep_to_their_budget_and_find_the_minimum_from_most_starts(method, moved):
    points = table1.starts(2, 6)
    shift = torch.tensor([3.0, -4.0], dtype=torch.float64)
    f = problems.shifted(problems.chow, shift) if moved else problems.chow
    found = table1.RIVALS[method](f, points, 250)
    assert 3 <= found["hits"] <= 6
    # Multistart ends a run that it began, all the others keep to the number.
    assert 150 < found["evaluations"] <= 250 + 30 * method.startswith("multistart")


def test_a_budget_counts_a_point_once_and_ends():
    budget = table1.Budget(problems.chow, 3)
    x = np.array([1.0, 2.0])
    assert budget.value(x) == budget.both(x)[0] > 0
    assert budget.gradient(x).shape == (2,)
    assert budget.objective.evaluations == 1
    assert budget.value(np.ones(2)) < 1e-30
    budget.value(x)
    with pytest.raises(table1.Spent):
        budget.value(np.zeros(2))
    assert budget.best < 1e-30
    assert (budget.best_x == 1).all()


def test_the_tracked_and_the_trained_path_are_the_exact_one():
    rows = quadratic.paths(8, np.geomspace(1e3, 1e-6, 7).tolist())
    assert max(row["tracked"] for row in rows) < 1e-8
    assert max(row["trained"] for row in rows) < 1e-5
    distances = [row["distance"] for row in rows]
    assert distances == sorted(distances, reverse=True)  # the copies meet


@pytest.mark.parametrize("experiment", list(cli.SMALL))
def test_every_command_leaves_a_table_a_csv_and_a_picture(tmp_path, capsys, experiment):
    cli.main([experiment, "--quick", "--out", str(tmp_path)])
    assert capsys.readouterr().out.strip()
    with open(tmp_path / f"{experiment}.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert rows
    assert (tmp_path / f"{experiment}.png").read_bytes()[:4] == b"\x89PNG"
    if experiment == "table1":
        methods = {row["method"] for row in rows}
        assert {"quasi-Newton", *table1.HOMOTOPIES.values(), *table1.RIVALS} <= methods
        assert (tmp_path / "table1-one-start.csv").read_text(encoding="utf-8").count("\n") == 14
    if experiment == "figure1":
        assert (tmp_path / "figure1.gif").read_bytes()[:4] == b"GIF8"
        assert float(rows[-1]["L"]) == 0


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "EXPERIMENT is missing"),
        (
            ["tabel1", "--out", "x"],
            "EXPERIMENT must be one of table1, figure1, convergence, path, map, table2, table3, figure2",
        ),
        (["table1"], "--out is missing"),
        (["table1", "--outt", "x", "--out", "x"], "unknown flag --outt: did you mean --out?"),
        (["table1", "--out", __file__], f"--out {__file__} is a file, not a folder"),
        (["table1", "--out", f"{__file__}/x"], f"{__file__} is a file, not a folder"),
        (["table1", "--out", "/proc/nowhere"], "/proc/nowhere"),
    ],
)
def test_nonsense_is_answered_in_a_line_before_any_work(tmp_path, monkeypatch, capsys, argv, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(table1, "starts", None)  # whoever begins fails
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    error = capsys.readouterr().err
    assert stop.value.code in (1, 2)
    assert error.startswith("hta-reproduce: ")
    assert error.count("\n") == 1
    assert message in error
    assert not any(tmp_path.iterdir())


def test_a_folder_that_may_not_be_written_to_is_refused_before_any_work(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    with pytest.raises(SystemExit):
        cli.main(["table1", "--out", str(tmp_path / "new")])
    assert f"--out {tmp_path / 'new'}: {tmp_path} may not be written to" in capsys.readouterr().err


def test_theorem_quantities_fall():
    for rows in (convergence.convex(2, 300), convergence.nonconvex(1, 60)):
        for mode in ("explicit", "implicit"):
            values = [row["value"] for row in rows if row["mode"] == mode and row["seed"] == 0]
            assert 0 < values[-1] < values[0]
    assert convergence.slope([{"n": n, "value": 3 / n} for n in (10, 100, 1000)]) == pytest.approx(-1)
