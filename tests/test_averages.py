"""Averages of weights: what they are, where they are shown, their bits after a stop."""

import json
from dataclasses import replace

import pytest
import stress
import torch

from hta_fused.train import Job, Run, Trainer, cli, data
from hta_fused.train.run import batches_of, evaluate


def rows_of(out):
    """The metrics, without what the clock did."""
    return stress.results(out)["metrics.jsonl"]


def flat(net: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten().double() for p in net.parameters()])


def test_the_averages_are_those_of_steps_and_of_the_last_epochs():
    settings = replace(stress.TINY, method="sgd", ema=0.9, swa=0.5, epochs=4)
    run = Run(settings, Job("SGD", "sgd", 4, 0), batches_of(data.synthetic(), settings, 0))
    steps, ends = [], []
    for epoch in range(4):
        assert run.train_epoch(lambda: steps.append(flat(run.phase.networks[0])))
        row = run.end_epoch(1.0)
        ends.append(steps[-1])
        assert {"test_loss_ema", "test_accuracy_ema"} <= row.keys()
        assert ("test_loss_swa" in row) == ("test_accuracy_swa" in row) == (epoch >= 2)
    ema = steps[0]
    for weights in steps[1:]:
        ema = 0.9 * ema + 0.1 * weights
    networks = run.averages.networks
    assert torch.allclose(flat(networks["ema"]), ema, atol=1e-6)
    assert torch.allclose(flat(networks["swa"]), (ends[2] + ends[3]) / 2, atol=1e-6)
    assert row["test_loss_swa"] == evaluate(networks["swa"], run.batches, settings)[0]
    statistics = networks["swa"].features[1].running_mean.clone()
    torch.optim.swa_utils.update_bn((images for images, _ in run.batches.unaugmented("train")), networks["swa"])
    assert torch.equal(statistics, networks["swa"].features[1].running_mean)
    assert not torch.allclose(statistics, run.phase.networks[0].features[1].running_mean)


@pytest.fixture(scope="module")
def averaging(tmp_path_factory):
    settings = replace(
        stress.TINY, method="compare", epochs=5, ema=0.9, swa=0.4, out=tmp_path_factory.mktemp("runs") / "averaging"
    )
    lines = []
    assert Trainer(settings, report=lines.append).train()
    return settings, lines[-1]


def test_averages_are_rows_and_networks_of_their_own(averaging, capsys):
    settings, table = averaging
    rows = [row for row in rows_of(settings.out) if row["run"] == "HTA"]
    assert ["test_loss_ema" in row for row in rows] == [False, False, True, True, True]  # merged after two epochs
    assert ["test_loss_swa" in row for row in rows] == [False, False, False, True, True]
    runs = json.loads((settings.out / "summary.json").read_text())["runs"]
    labels = ("SGD", "SGD, equal work", "HTA")
    assert list(runs) == [label + average for label in labels for average in ("", " + EMA", " + SWA")]
    assert all(line in table for line in ("| SGD, equal work + SWA ", "| HTA + EMA "))
    assert runs["HTA + SWA"]["work"] == runs["HTA"]["work"] == 7
    for average in ("ema", "swa"):
        assert runs[f"HTA + {average.upper()}"]["accuracies"] == [rows[-1][f"test_accuracy_{average}"]]
        cli.main(["--evaluate", str(settings.out / f"hta-seed0-{average}.pt")])
        assert f"test loss {rows[-1][f'test_loss_{average}']:.4f}" in capsys.readouterr().out


def test_averages_leave_the_training_as_it_is(averaging, tmp_path):
    settings, _ = averaging
    assert Trainer(replace(settings, ema=0.0, swa=0.0, out=tmp_path / "run"), report=stress.silent).train()
    without = rows_of(tmp_path / "run")
    assert [
        {key: row[key] for key in plain} for row, plain in zip(rows_of(settings.out), without, strict=True)
    ] == without


# Batches, of which an epoch has four: SGD takes 20 and 28, HTA 8 and 12; a SWA begins at 12, 36 and 60.
@pytest.mark.parametrize("after", [45, 58, 66])
def test_averages_go_on_with_the_same_bits(averaging, tmp_path, after):
    settings = replace(averaging[0], out=tmp_path / "run")
    asked = iter(i == after for i in range(10**6))
    assert not Trainer(settings, stop=lambda: next(asked), report=stress.silent).train()
    assert Trainer.resume(settings.out, report=stress.silent).train()
    first, second = stress.results(averaging[0].out), stress.results(settings.out)
    assert first.keys() == second.keys()
    for name in first:
        assert stress.same(first[name], second[name]), name
