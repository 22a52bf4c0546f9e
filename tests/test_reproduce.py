"""The paper's trained experiments: their commands at the quick scale, what is resumed, and the numbers in their tables."""

import csv
import math
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace

import pytest
import torch

from hta_fused.paper import cli, networks, runs, smalldata
from hta_fused.train import Settings, machine

PLAIN = networks.QUICK.settings


def read(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(
    ("experiment", "methods"), [("table2", 3), ("table3", 3), ("figure2", 3), ("dropout", 6), ("formats", 5)]
)
def test_a_command_leaves_table_epochs_and_picture(tmp_path, capsys, experiment, methods):
    cli.main([experiment, "--scale", "quick", "--out", str(tmp_path)])
    table, epochs = read(tmp_path / f"{experiment}.csv"), read(tmp_path / f"{experiment}-epochs.csv")
    assert len(table) == methods
    assert (tmp_path / f"{experiment}.png").stat().st_size > 5000
    assert "synthetic, 256 training images" in capsys.readouterr().out
    for row in table:  # the table says what the epochs do, and the work is that of all copies
        mine = [e for e in epochs if e["method"] == row["method"]]
        assert int(row["work"]) == sum(int(e["copies"]) for e in mine)
        said = float(row["accuracy, %"]) if experiment == "table3" else 100 - float(row["error, %"])
        assert said == pytest.approx(float(mine[-1]["test_accuracy"]), abs=0.006)


@pytest.mark.parametrize(
    ("scale", "gpu", "warns"), [("full", False, True), ("full", True, False), ("cpu", False, False)]
)
def test_the_full_scale_says_that_it_takes_long_without_a_gpu(tmp_path, monkeypatch, capsys, scale, gpu, warns):
    begun = []
    monkeypatch.setitem(cli.TRAINED, "table2", (lambda out, scale: begun.append(scale.name), networks.SCALES))
    monkeypatch.setattr(cli.machine, "check", lambda settings: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    cli.main(["table2", "--scale", scale, "--seeds", "2", "--out", str(tmp_path)])
    line = "hta-reproduce: --scale full is for a GPU, and will take very long on this CPU (300 epochs a run, 2 seeds); see --scale cpu\n"
    assert capsys.readouterr().err == (line if warns else "")
    assert begun == [scale]


def test_figure3_goes_on_with_what_table3_has_trained_and_other_settings_are_refused(tmp_path, monkeypatch, capsys):
    cli.main(["table3", "--scale", "quick", "--out", str(tmp_path)])
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "runs").glob("*/checkpoint.pt")}
    assert before
    cli.main(["figure3", "--scale", "quick", "--out", str(tmp_path)])
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "runs").glob("*/checkpoint.pt")} == before
    assert read(tmp_path / "figure3-epochs.csv") == read(tmp_path / "table3-epochs.csv")
    other = replace(networks.QUICK, settings=replace(PLAIN, lr=0.01))
    with pytest.raises(ValueError, match=r"holds another run, whose lr is 0.05, not 0.01: choose another --out"):
        networks.figure3(tmp_path, other)


def test_a_run_that_was_cut_goes_on_to_the_same_end(tmp_path):
    settings = {"SGD": replace(PLAIN, method="sgd")}
    whole = runs.train(tmp_path / "whole", settings, range(1))
    cut = replace(settings["SGD"], seed=0, seeds=1, threads=1, out=tmp_path / "cut" / "runs" / "sgd-seed0")
    batches = 0

    def stop():
        nonlocal batches
        batches += 1
        return batches == 6

    assert not runs.Trainer(cut, stop=stop, report=lambda _: None).train()
    again = runs.train(tmp_path / "cut", settings, range(1))
    keys = ("epoch", "train_loss", "test_loss", "test_accuracy")
    assert [[row[k] for k in keys] for row in again["SGD"].seeds[0]] == [
        [row[k] for k in keys] for row in whole["SGD"].seeds[0]
    ]


def test_the_rivals_do_the_same_work():
    for scale in networks.SCALES.values():
        for name, settings in networks.of_models(scale, ("vgg11",)).items():
            apart = settings.L_schedule.epochs * (settings.copies - 1) if settings.method == "hta" else 0
            assert (settings.epochs + apart == scale.settings.epochs) == (name[1] == networks.SGD)
    for scale in smalldata.SCALES.values():
        of = smalldata.methods(scale.settings, 0.1, 0.2)
        work = {name: s.epochs + (s.L_schedule.epochs if s.method == "hta" else 0) for name, s in of.items()}
        assert work.pop("SGD") == scale.settings.epochs
        assert len(set(work.values())) == 1, work
        assert of[smalldata.PARALLEL].batch_size == 2 * of[smalldata.BASE].batch_size
        assert of[smalldata.PARALLEL].lr == 0.2
        assert {s.lr for name, s in of.items() if name != smalldata.PARALLEL} == {0.1}


def test_smalldata_pairs_its_seeds(tmp_path, capsys):
    cli.main(["smalldata", "--scale", "quick", "--out", str(tmp_path)])
    rows = {row["method"]: row for row in read(tmp_path / "smalldata.csv")}
    assert {smalldata.BASE, smalldata.EMA, smalldata.SWA, smalldata.PARALLEL} < set(rows)
    assert float(rows[smalldata.BASE]["minus equal work"]) == 0
    for row in rows.values():
        gap = float(row["accuracy, %"]) - float(rows[smalldata.BASE]["accuracy, %"])
        assert float(row["minus equal work"]) == pytest.approx(gap, abs=1e-9)
    assert (tmp_path / "smalldata.png").stat().st_size > 5000
    assert "; taken: " in capsys.readouterr().out


def test_an_interval_is_students():
    mean, half = runs.interval([1.0, 2.0, 4.0])
    assert mean == pytest.approx(7 / 3)
    assert half == pytest.approx(4.302653 * math.sqrt(7 / 3 / 3), rel=1e-6)
    assert math.isnan(runs.interval([1.0])[1])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["table2", "--scale", "huge", "--out", "x"], "--scale must be one of quick, cpu, full"),
        (["table2", "--data-dir", "nowhere", "--out", "x"], "CIFAR-10 is not in nowhere"),
        (["dropout", "--device", "tpu", "--out", "x"], "--device must be auto, cpu, cuda or cuda:N"),
        (["table2", "--scale", "quick", "--device", "cuda:99", "--out", "x"], "--device must be "),
        (["table3", "--quick", "--out", "x"], "--quick is another command's flag: see --help"),
        (["smalldata", "--images", "0", "--out", "x"], "--images must be from 1 to 49999, got 0"),
        (["map", "--quick", "--out", ""], "--out must be a path, got ''"),
        (["table2", "--scale", "quick", "--out", ""], "--out must be a path, got ''"),
        (["table2", "--scale", "quick", "--out", "a\0b"], r"--out must be a path, got 'a\x00b'"),
        (["table2", "--data-dir", "", "--out", "x"], "--data-dir must be a path, got ''"),
    ],
)
def test_nonsense_is_answered_in_a_line(tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        cli.main(flags)
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            BrokenProcessPool("A process was terminated abruptly"),
            "a run's process has ended, killed or for want of memory",
        ),
        (MemoryError(), "no memory left"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), "no memory left"),
        (torch.OutOfMemoryError("CUDA out of memory"), "no memory left"),
        (RuntimeError("a bug"), None),
    ],
    ids=["killed", "Python's", "the CPU's", "the GPU's", "a bug"],
)
@pytest.mark.parametrize("argv", [["table2", "--scale", "quick"], ["map", "--quick"]])
def test_memory_that_runs_out_is_said_in_a_line(tmp_path, monkeypatch, capsys, argv, error, said):
    def fails(*_):
        raise error

    monkeypatch.setitem(cli.TRAINED, "table2", (fails, networks.SCALES))
    monkeypatch.setitem(cli.SMALL, "map", fails)
    if said is None:  # keeps its traceback
        with pytest.raises(RuntimeError, match="a bug"):
            cli.main([*argv, "--out", str(tmp_path)])
        return
    with pytest.raises(SystemExit, match="1"):
        cli.main([*argv, "--out", str(tmp_path)])
    assert capsys.readouterr().err == f"hta-reproduce: {said}; the same command goes on\n"


def test_a_best_epoch_is_chosen_among_those_tested():
    curve = runs.Curve([[{"test_accuracy": a, "copies": 1} for a in (50.0, None, 70.0, 60.0)]])
    assert (curve.best(), curve.last(), curve.work) == ([70.0], [60.0], 4)
    worse = runs.Curve([[{"test_accuracy": 50.0, "copies": 1}]])
    assert networks.improvement(worse, curve) == pytest.approx(20.0)


@pytest.mark.parametrize(
    ("can", "precision"), [({"avx512_bf16": True}, "bf16"), ({"amx_bf16": True}, "bf16"), ({"avx2": True}, "fp32"), ({}, "fp32")]
)  # fmt: skip
def test_what_a_processor_is_fastest_in(monkeypatch, can, precision):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: can, raising=False)
    assert machine.fastest_precision() == precision
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # an earlier torch
    assert machine.fastest_precision() == "fp32"


def test_a_caption_says_the_precision_and_the_number_of_seeds():
    one = runs.settings_in_words(
        replace(networks.CPU, settings=replace(networks.CPU.settings, precision="fp32"), seeds=1)
    )
    assert one.endswith("batch 64, fp32, 1 seed")
    assert runs.settings_in_words(networks.FULL).endswith("batch 128, fp32, 5 seeds")


def test_equal_work_counts_every_copy():
    four = networks.methods(PLAIN, copies=4)
    assert four[networks.EQUAL_WORK].epochs == PLAIN.epochs + 3 * PLAIN.L_schedule.epochs
    assert isinstance(four[networks.HTA], Settings)


@pytest.mark.parametrize("scale", ["quick", "cpu", "full"])
@pytest.mark.parametrize("name", cli.TRAINED)
def test_every_experiments_settings_can_be_made_at_every_scale(name, scale, monkeypatch, tmp_path):
    asked = []

    class Asked(Exception):
        pass

    def stop(out, methods, seeds):
        asked.append(methods)
        raise Asked

    monkeypatch.setattr(networks, "train", stop)
    monkeypatch.setattr(smalldata, "train", stop)
    run, scales = cli.TRAINED[name]
    with pytest.raises(Asked):
        run(tmp_path, scales[scale])
    assert asked[0]
