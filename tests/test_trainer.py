"""The trainer: its files, its bits after being killed, its command line."""

import json
import math
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import stress
import torch

from hta_fused.files import as_json, save_atomically, write_json
from hta_fused.train import PAPER, Job, Run, Settings, Trainer, cli, data, machine
from hta_fused.train.run import batches_of, evaluate
from hta_fused.train.vgg import CONFIGURATIONS, VGG, parameter_count

# Two epochs apart, one merged; a second or two.
# On the CPU, where the same run gives the same bits; test_gpu.py trains on a GPU.
TINY = Settings(
    dataset="synthetic", width=0.125, epochs=3, L_stop=0.009, batch_size=128, seeds=1, threads=1, device="cpu"
)
FLAGS = [
    "--dataset",
    "synthetic",
    "--device",
    "cpu",
    "--width",
    "0.125",
    "--epochs",
    "3",
    "--L-stop",
    "0.009",
    "--batch-size",
    "128",
    "--seeds",
    "1",
    "--threads",
    "1",
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "whole"
    lines = []
    assert Trainer(replace(TINY, out=out, seeds=2), report=lines.append).train()
    return out, lines


def metrics(out: Path) -> list[dict]:
    """What the run measured, without what the clock did."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("seconds", "images_per_second")} for row in rows]


def test_a_comparison_leaves_its_files(finished):
    out, lines = finished
    names = {p.name for p in out.iterdir() if p.is_file()}
    models = {f"{run}-seed{s}.pt" for run in ("sgd", "sgd-equal-work", "hta") for s in (0, 1)}
    assert names == {
        "config.json",
        "metrics.jsonl",
        "summary.json",
        "curves.png",
        "checkpoint.pt",
        "checkpoint.previous.pt",
        ".lock",
        *models,
    }
    rows = metrics(out)
    assert len(rows) == 2 * (3 + 5 + 3)
    apart = [row for row in rows if row["run"] == "HTA" and row["seed"] == 1]
    assert [row["L"] for row in apart] == [0.01, 0.009, 0.0]
    assert [row["copies"] for row in apart] == [2, 2, 1]
    assert apart[0]["distance"] > 0
    assert {"test_accuracy_0", "test_accuracy_1", "test_accuracy", "train_loss", "train_loss_1", "lr"} <= set(apart[0])
    summary = json.loads((out / "summary.json").read_text())
    assert [run["work"] for run in summary["runs"].values()] == [3, 5, 5]
    assert summary["runs"]["HTA"]["accuracy_deviation"] is not None
    assert (out / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert re.search(r"\| HTA +\| +3 \| +5 \|", lines[-1])
    assert Settings.from_json(json.loads((out / "config.json").read_text())) == replace(TINY, out=out, seeds=2)


def test_sgd_learns_something(finished):
    rows = [row for row in metrics(finished[0]) if row["run"] == "SGD, equal work"]
    assert rows[4]["train_loss"] < rows[0]["train_loss"]


def test_exported_state_dict_is_a_plain_vggs(finished, capsys):
    out, _ = finished
    state = torch.load(out / "hta-seed1.pt", weights_only=True)
    VGG("vgg11", batch_norm=True, width=0.125).load_state_dict(state)
    last = [row for row in metrics(out) if row["run"] == "HTA" and row["seed"] == 1][-1]
    cli.main(["--evaluate", str(out / "hta-seed1.pt")])
    assert f"test accuracy {last['test_accuracy']:.2f}%, test loss {last['test_loss']:.4f}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "changes",
    [
        dict(precision="bf16", memory_format="contiguous"),
        dict(decoupled=1, partition="random_units", anchor="zero", start="independent", epochs=4),
        dict(
            schedule="geometric",
            L_step=0.5,
            L_start=1.0,
            L_stop=0.5,
            part="classifier",
            partition="layer_halves",
            anchor="random",
        ),
        dict(mode="explicit", L_start=0.5, L_stop=0.5, lr=0.01, lr_schedule="one-cycle", batch_norm=False),
        dict(schedule="constant", epochs_per_L=3, lr_schedule="halve"),  # merged only at the very end
    ],
)
def test_every_setting_trains(tmp_path, changes):
    settings = replace(TINY, method="hta", out=tmp_path / "run", **changes)
    assert Trainer(settings, report=lambda _: None).train()
    rows = metrics(tmp_path / "run")
    assert len(rows) == settings.epochs
    assert all(math.isfinite(row["test_loss"]) for row in rows)
    if changes.get("decoupled"):
        assert rows[0]["L"] == "inf"


@pytest.mark.parametrize("name", ["run", "z\udcff"])
def test_tensorboard_is_written_to_where_it_is_installed(tmp_path, monkeypatch, name):
    written, closed, said = [], [], []

    class SummaryWriter:
        def __init__(self, folder):
            assert folder == str(tmp_path / name / "tensorboard")
            folder.encode()  # as the real one does

        def add_scalar(self, *what):
            written.append(what)

        def close(self):
            closed.append(True)

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=SummaryWriter))
    settings = replace(TINY, method="sgd", epochs=1, out=tmp_path / name)
    Trainer(settings, report=said.append).train()
    row = metrics(tmp_path / name)[0]
    wanted = name == "run"
    assert (("sgd-seed0/test_accuracy", row["test_accuracy"], 1) in written) is wanted
    assert bool(closed) is wanted
    assert any(line.startswith("nothing is written for TensorBoard") for line in said) is not wanted


def test_networks_that_are_gone_are_said_to_be(tmp_path):
    out, said = tmp_path / "run", []
    assert Trainer(replace(TINY, epochs=1, method="sgd", seeds=2, out=out), report=lambda _: None).train()
    for seed, left in ((1, "and sgd-seed0.pt holds a trained network"), (0, "curves.png shows every epoch.")):
        (out / f"sgd-seed{seed}.pt").unlink()
        assert Trainer.resume(out, report=said.append).train()
        assert f"sgd-seed{seed}.pt is gone: nothing else holds the network of a run that has ended" in said
        assert left in " ".join(said[-1].split())


# ------------------------------------------------------------------------------------------------- stopped and resumed


def start(out: Path, *flags: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "hta_fused.train", *flags]
    return subprocess.Popen([*command, "--out", str(out)] if "--resume" not in flags else command,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)  # fmt: skip


def wait_for(path: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not path.exists() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)


def same_results(a: Path, b: Path) -> None:
    first, second = stress.results(a), stress.results(b)
    assert first.keys() == second.keys()
    for name in first:
        assert stress.same(first[name], second[name]), name


def test_killed_at_random_moments_and_resumed_ends_with_the_same_bits(tmp_path, seed):
    """Real processes, SIGKILL. The moments are spread over the whole run, its first write and its last included."""
    flags = [*FLAGS, "--epochs", "4", "--seed", "5"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    began = time.monotonic()
    process = start(whole, *flags)
    wait_for(whole / "checkpoint.pt", process)
    first_checkpoint = time.monotonic()
    assert process.wait(120) == 0
    length = time.monotonic() - first_checkpoint
    assert first_checkpoint - began < 100

    moments = random.Random(seed)
    process = start(broken, *flags)
    for _ in range(4):
        wait_for(broken / "checkpoint.pt", process)
        time.sleep(moments.uniform(0, length / 3))
        process.kill()
        process.communicate()
        assert torch.load(broken / "checkpoint.pt", weights_only=True)["settings"]["seed"] == 5
        process = start(broken, "--resume", str(broken))
        time.sleep(moments.uniform(2, 4))  # importing torch, loading
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    same_results(whole, broken)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_says_how_to_go_on(tmp_path, number, capsys):
    flags = [*FLAGS, "--method", "hta", "--batch-size", "16"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    process = start(broken, *flags)
    wait_for(broken / "checkpoint.pt", process)
    time.sleep(random.uniform(0, 0.3))
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number, output
    assert f"stopped by {number.name}; everything so far is saved" in output
    assert f"hta-train --resume {broken}" in output
    assert "Traceback" not in output
    cli.main(["--resume", str(broken)])
    cli.main([*flags, "--out", str(whole)])
    same_results(whole, broken)


def test_stopping_in_the_middle_of_an_epoch_keeps_its_place(tmp_path):
    settings = replace(TINY, method="hta", batch_size=16)
    whole, broken = replace(settings, out=tmp_path / "whole"), replace(settings, out=tmp_path / "broken")
    Trainer(whole, report=lambda _: None).train()
    asked = iter(i == 45 for i in range(10**6))  # 32 batches an epoch: the 14th of the second
    assert not Trainer(broken, stop=lambda: next(asked), report=lambda _: None).train()
    state = torch.load(broken.out / "checkpoint.pt", weights_only=True)["run"]
    assert (state["epoch"], state["batch"]) == (1, 14)
    assert Trainer.resume(broken.out, report=lambda _: None).train()
    same_results(whole.out, broken.out)


def test_a_trainer_that_has_let_go_of_its_folder_does_not_go_on(tmp_path):
    """Another may have taken it, and gone further."""
    settings = replace(TINY, method="sgd", out=tmp_path / "run")
    stopped = Trainer(settings, stop=lambda: True, report=lambda _: None)
    assert not stopped.train()
    other = Trainer.resume(str(settings.out), report=lambda _: None)
    for begun in (True, False):
        with pytest.raises(RuntimeError, match=r"train\(\) has let go of .*run: Trainer.resume goes on"):
            stopped.train()
        if begun:
            assert other.train()
            before = (settings.out / "checkpoint.pt").read_bytes()
    with pytest.raises(RuntimeError, match="has let go of"):
        other.train()
    assert (settings.out / "checkpoint.pt").read_bytes() == before
    assert len(metrics(settings.out)) == 3


@pytest.mark.parametrize("out", ["", None, 3, "a\0b"])
def test_resuming_what_is_no_path_is_refused(out, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="out must be a path, got "):
        Trainer.resume(out)


def test_settings_of_numpys_types_are_pythons_and_a_run_of_them_goes_on(tmp_path):
    numpys = dict(
        lr=np.float64(0.05), momentum=np.float32(0.5), width=np.float16(0.0625), epochs=np.int64(3), copies=np.uint8(2),
        method=np.str_("hta"), lr_schedule=np.str_("cosine"), device=np.str_("cpu"), L_step=1,
    )  # fmt: skip
    settings = replace(
        TINY, **numpys, L_start=np.float64(0.01), data_dir=np.str_("data"), out=np.str_(tmp_path / "run")
    )
    plain = {int, float, bool, str, type(None), type(Path())}
    assert {type(value) for value in vars(settings).values()} <= plain
    assert all(getattr(settings, name) == value for name, value in numpys.items())
    asked = iter(i == 5 for i in range(10**6))
    assert not Trainer(settings, stop=lambda: next(asked), report=lambda _: None).train()
    assert Trainer.resume(settings.out, report=lambda _: None).train()


@pytest.mark.parametrize("content", [b'{"runs":', b"", b"\xff", b"[" * 200_000, b"[]", b'{"runs": {}}', None])
def test_a_summary_that_is_none_is_written_anew(finished, tmp_path, content):
    out, lines = tmp_path / "run", []
    shutil.copytree(finished[0], out)
    whole = json.loads((out / "summary.json").read_text())
    (out / "summary.json").write_bytes(json.dumps({"runs": whole["runs"]}).encode() if content is None else content)
    assert Trainer.resume(out, report=lines.append).train()
    assert lines[-1].splitlines()[:6] == finished[1][-1].splitlines()[:6]  # the table
    assert json.loads((out / "summary.json").read_text())["runs"] == whole["runs"]


@pytest.mark.parametrize("content", ["[" * 200_000, '{"lr":', '{"lr": [[]]}'])
def test_a_record_that_is_none_is_refused_in_a_line(finished, tmp_path, content):
    out = tmp_path / "run"
    shutil.copytree(finished[0], out)
    (out / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config\.json.*put it back or delete it") as refused:
        Trainer.resume(out)
    assert "\n" not in str(refused.value)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file.json"
    write_json(path, {"a": 1})

    def fail(partial):
        partial.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        save_atomically(path, fail)
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["file.json"]


def test_resuming_on_other_images_is_refused(tmp_path, monkeypatch):
    settings = replace(TINY, method="sgd", epochs=1, out=tmp_path / "run")
    Trainer(settings, report=lambda _: None).train()
    monkeypatch.setattr(data, "synthetic", data.digits)
    with pytest.raises(ValueError, match="not those that .* was trained on"):
        Trainer.resume(settings.out)


def test_a_run_goes_on_with_the_threads_it_was_begun_with(tmp_path):
    before = torch.get_num_threads()
    try:
        settings = replace(TINY, method="sgd", epochs=1, threads=2, out=tmp_path / "run")
        Trainer(settings, stop=lambda: True, report=lambda _: None).train()
        torch.set_num_threads(1)
        said = []
        trainer = Trainer.resume(settings.out, report=said.append)
        assert torch.get_num_threads() == 2
        trainer.train()
    finally:
        torch.set_num_threads(before)


def test_a_run_goes_on_in_the_memory_format_it_was_begun_with(tmp_path, monkeypatch):
    """On another device "auto" may stand for another one, in which a partition's blocks would be other elements."""
    settings = replace(TINY, method="hta", out=tmp_path / "run")
    whole = replace(settings, out=tmp_path / "whole")
    Trainer(whole, report=lambda _: None).train()
    asked = iter(i == 5 for i in range(10**6))
    Trainer(settings, stop=lambda: next(asked), report=lambda _: None).train()
    monkeypatch.setattr(Settings, "chosen_format", property(lambda s: s.memory_format.replace("auto", "contiguous")))
    assert Trainer.resume(settings.out, report=lambda _: None).train()
    same_results(whole.out, settings.out)


def test_other_machines_are_named(tmp_path, monkeypatch):
    settings = replace(TINY, method="sgd", epochs=1, out=tmp_path / "run")
    Trainer(settings, stop=lambda: True, report=lambda _: None).train()
    monkeypatch.setattr(torch, "__version__", "1.0")
    said = []
    Trainer.resume(settings.out, report=said.append)
    assert any("going on with 1.0: the bits may differ" in line for line in said)


def test_steps_that_were_skipped_are_in_the_row(tmp_path, monkeypatch):
    """Of a gradient that is NaN for some batches: those steps are skipped, and the epoch says how many."""
    settings = replace(TINY, method="hta", out=tmp_path / "run")
    whole, calls = Run.loss, iter(range(10**6))

    def broken(self, net, batch):
        loss = whole(self, net, batch)
        return loss * math.nan if next(calls) in (0, 2, 9) else loss  # two copies: the first two steps, and the fifth

    monkeypatch.setattr(Run, "loss", broken)
    Trainer(settings, report=lambda _: None).train()
    assert [row["skipped"] for row in metrics(settings.out)] == [2, 1, 0]
    assert metrics(settings.out)[0]["train_loss"] == "nan"


def test_a_resumed_epoch_counts_the_skipped_steps_of_both_its_parts(tmp_path, monkeypatch):
    settings = replace(TINY, method="hta", out=tmp_path / "run")
    whole = Run.loss
    monkeypatch.setattr(Run, "loss", lambda self, *of: whole(self, *of) * (math.nan if self.batch in (0, 2) else 1.0))
    asked = iter(i == 5 for i in range(10**6))  # 4 batches an epoch: after the second of the second
    assert not Trainer(settings, stop=lambda: next(asked), report=lambda _: None).train()
    with pytest.raises(FloatingPointError):
        Trainer.resume(settings.out, report=lambda _: None).train()
    assert [row["skipped"] for row in metrics(settings.out)][:2] == [2, 2]


@pytest.mark.parametrize("epochs", [1, 2, 5])
@pytest.mark.parametrize("every", [1, 10])
def test_a_run_that_ends_in_nan_has_diverged(tmp_path, monkeypatch, epochs, every):
    settings = replace(TINY, method="sgd", epochs=epochs, evaluate_every=every, out=tmp_path / "run")
    loss = Run.loss
    monkeypatch.setattr(
        Run, "loss", lambda self, *of: loss(self, *of) * (math.nan if self.epoch >= epochs - 2 else 1.0)
    )
    with pytest.raises(FloatingPointError, match="SGD seed 0 diverged: its loss is not finite at its end; lower --lr"):
        Trainer(settings, report=lambda _: None).train()
    with pytest.raises(FloatingPointError, match="is not finite at its end"):
        Trainer.resume(settings.out, report=lambda _: None).train()
    assert not list(settings.out.glob("sgd*.pt"))


@pytest.mark.parametrize("every", [1, 10])
def test_an_infinite_last_test_loss_is_no_end(tmp_path, monkeypatch, every):
    settings = replace(TINY, method="sgd", epochs=4, evaluate_every=every, out=tmp_path / "run")
    tested = iter([(1.0, 10.0)] * (3 if every == 1 else 0) + [(math.inf, 10.0)])
    monkeypatch.setattr("hta_fused.train.run.evaluate", lambda *_: next(tested))
    with pytest.raises(FloatingPointError, match="is not finite at its end"):
        Trainer(settings, report=lambda _: None).train()
    assert not list(settings.out.glob("sgd*.pt"))


def test_epochs_without_a_test_count_by_their_training_loss(tmp_path, monkeypatch):
    settings = replace(TINY, method="sgd", epochs=9, evaluate_every=10, out=tmp_path / "run")
    loss = Run.loss
    monkeypatch.setattr(Run, "loss", lambda self, *of: loss(self, *of) * (math.nan if self.epoch > 0 else 1.0))
    with pytest.raises(FloatingPointError, match="has not been finite for 3 epochs"):
        Trainer(settings, report=lambda _: None).train()
    assert len(metrics(settings.out)) == 4


def test_a_last_epoch_whose_spoilt_step_was_skipped_is_an_end(tmp_path, monkeypatch):
    """The network that is exported is sound."""
    settings = replace(TINY, method="hta", schedule="constant", epochs_per_L=3, out=tmp_path / "run")
    loss = Run.loss
    monkeypatch.setattr(
        Run, "loss", lambda self, *of: loss(self, *of) * (math.nan if self.epoch == 2 and self.batch == 1 else 1.0)
    )
    assert Trainer(settings, report=lambda _: None).train()
    assert metrics(settings.out)[-1]["train_loss"] == "nan"
    assert all(t.isfinite().all() for t in torch.load(settings.out / "hta-seed0.pt", weights_only=True).values())


@pytest.mark.parametrize("batches", ["own", "shared"])
def test_own_batches_are_each_copys_own(batches):
    settings = replace(TINY, batches=batches, copies=3)
    images = data.synthetic()
    run = Run(settings, Job("HTA", "hta", 3, 0), batches_of(images, settings, 0))
    run.start_epoch()
    orders = [stream._order.tolist() for stream in run.streams]
    assert len({tuple(order) for order in orders}) == (3 if batches == "own" else 1)
    assert all(sorted(order) == list(range(512)) for order in orders)


def run_of(settings: Settings, method: str = "sgd") -> Run:
    return Run(settings, Job(method, method, settings.epochs, 0), batches_of(data.synthetic(), settings, 0))


def test_label_smoothing_is_in_the_training_loss_and_not_in_the_test_loss():
    run = run_of(replace(TINY, label_smoothing=0.1))
    net, images, labels = run.phase.networks[0].eval(), *next(run.batches.unaugmented("test"))
    log = net(images).log_softmax(1)
    right = log.gather(1, labels[:, None])[:, 0]
    assert torch.allclose(run.loss(net, (images, labels)), -(0.9 * right + 0.1 * log.mean(1)).mean())
    assert evaluate(net, run.batches, run.settings)[0] == pytest.approx(-float(right.detach().mean()), rel=1e-5)


@torch.no_grad()
def test_tta_takes_the_mean_logits_of_both_views():
    run = run_of(replace(TINY, tta=True))
    net = run.phase.networks[0].eval()
    images, labels = (torch.cat(parts) for parts in zip(*run.batches.unaugmented("test"), strict=True))
    mean = (net(images) + net(images.flip(-1))) / 2
    loss, accuracy = evaluate(net, run.batches, run.settings)
    assert loss == pytest.approx(float(torch.nn.functional.cross_entropy(mean, labels)), rel=1e-5)
    assert accuracy == pytest.approx(float(100 * (mean.argmax(1) == labels).float().mean()))
    plain = evaluate(net, run.batches, TINY)
    assert plain[0] != loss
    run.batches.images.flip = False
    assert evaluate(net, run.batches, run.settings) == plain


def test_side_by_side_leaves_what_a_thread_for_each_copy_leaves():
    """Dropout's draws too, which are torch's own from the same seed."""
    images, before, found = data.synthetic(), torch.get_num_threads(), []
    try:
        for threads, concurrent in ((2, True), (2, True), (1, True), (1, False)):
            torch.set_num_threads(threads)
            settings = replace(TINY, batches="own", concurrent=concurrent)
            run = Run(settings, Job("HTA", "hta", 3, 0), batches_of(images, settings, 0))
            run.start_epoch()
            for _ in range(3):
                run.advance()
            found.append((run.phase.replicas.params.clone(), run.losses))
    finally:
        torch.set_num_threads(before)
    assert all(all(map(torch.equal, found[0], other)) for other in found[1:])
    net, images = VGG(width=0.125), torch.randn(8, 3, 32, 32)
    torch.manual_seed(3)
    expected = net(images)
    net.seed(3)
    assert torch.equal(net(images), expected)


def test_json_has_a_name_for_every_number():
    text = as_json({"a": [math.nan, 1.0], "b": (math.inf, {"c": -math.inf})})
    assert json.loads(text) == {"a": ["nan", 1.0], "b": ["inf", {"c": "-inf"}]}


# ---------------------------------------------------------------------------------------------------- settings and VGG


def test_the_papers_recipe():
    paper = PAPER
    assert (paper.lr, paper.halve_every, paper.momentum, paper.weight_decay) == (0.05, 30, 0.9, 5e-4)
    assert (paper.batch_size, paper.epochs, paper.width, paper.dataset) == (128, 300, 1.0, "cifar10")
    assert paper.L_schedule.values == tuple(L for L in (0.01, 0.009, 0.008, 0.007, 0.006, 0.005) for _ in range(4))
    assert [paper.lr_at(e, 300) for e in (0, 29.9, 30, 60)] == [0.05, 0.05, 0.025, 0.0125]


def test_auto_is_the_memory_format_that_convolutions_are_fastest_in():
    formats = {
        (device, precision): replace(TINY, device=device, precision=precision).torch_memory_format
        for device in ("cpu", "cuda")
        for precision in ("fp32", "bf16")
    }
    assert formats.pop(("cuda", "fp32")) == torch.contiguous_format
    assert set(formats.values()) == {torch.channels_last}
    run = Run(TINY, Job("SGD", "sgd", 3, 0), batches_of(data.synthetic(), TINY, 0))
    run.start_epoch()
    assert run.phase.networks[0].features[3 + 1].weight.is_contiguous(memory_format=torch.channels_last)
    assert run.batches.next(5)[0].is_contiguous(memory_format=torch.channels_last)
    assert replace(TINY, memory_format="contiguous").torch_memory_format == torch.contiguous_format


def test_lr_schedules_start_and_end_where_they_should():
    cosine, cycle = replace(TINY, lr_schedule="cosine"), replace(TINY, lr_schedule="one-cycle")
    assert cosine.lr_at(0, 10) == 0.05
    assert cosine.lr_at(10, 10) == pytest.approx(0, abs=1e-9)
    assert max(cycle.lr_at(i / 10, 10) for i in range(100)) == pytest.approx(0.05)
    assert 0 < cycle.lr_at(0, 10) < 0.01
    assert 0 < cycle.lr_at(9.99, 10) < 0.001


@pytest.mark.parametrize("lr_schedule", ["constant", "cosine"])
def test_the_learning_rate_rises_in_the_warmup_and_is_the_schedules_after_it(lr_schedule):
    run = run_of(replace(TINY, lr_schedule=lr_schedule, warmup=2, epochs=4))
    plain = run_of(replace(run.settings, warmup=0))
    lrs = []
    for run.epoch in range(4):
        plain.epoch = run.epoch
        lrs += [run._lr_at(batch) / plain._lr_at(batch) for batch in range(len(run.batches))]
    steps = 2 * len(run.batches)
    assert lrs == pytest.approx([(i + 1) / steps for i in range(steps)] + [1.0] * steps)
    run.epoch = 0
    run.start_epoch()
    run.advance()
    assert run.phase.optimizer.param_groups[0]["lr"] == pytest.approx(TINY.lr / steps)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(epochs=0), "epochs must be at least 1, got 0"),
        (dict(epochs=1), "epochs must be at least 2, which the schedule of L takes, got 1"),
        (dict(lr=-1.0), "lr must be positive and finite"),
        (dict(momentum=-0.5), "momentum must not be negative"),
        (dict(L_start=0.001), "L_start must be at least L_stop, 0.009, got 0.001"),
        (dict(width=0.0), "width must be positive"),
        (dict(lr="0.1"), "lr must be a number, got '0.1'"),
        (dict(lr=None), "lr must be a number, got None"),
        (dict(momentum=True), "momentum must be a number, got True"),
        (dict(batch_size=64.0), "batch_size must be a whole number, got 64.0"),
        (dict(batch_norm=1), "batch_norm must be True or False, got 1"),
        (dict(data_dir=None), "data_dir must be a path, got None"),
        (dict(label_smoothing=1.0), "label_smoothing must be at least 0 and under 1, got 1.0"),
        (dict(label_smoothing=math.nan), "label_smoothing must be at least 0 and under 1, got nan"),
        (dict(ema=1.0), "ema must be at least 0 and under 1, got 1.0"),
        (dict(ema=-0.1), "ema must be at least 0 and under 1, got -0.1"),
        (dict(swa=1.5), "swa must be from 0 to 1, got 1.5"),
        (dict(swa=math.nan), "swa must be from 0 to 1, got nan"),
        (dict(ema=0.9, epochs=2), "ema must be 0 where no epoch is left after the merge, got 0.9"),
        (dict(swa=0.5, epochs=2), "swa must be 0 where no epoch is left after the merge, got 0.5"),
        (dict(warmup=-1), "warmup must not be negative, got -1"),
        (dict(warmup=3), "warmup must be under epochs, 3, got 3"),
        (dict(tta=True, dataset="digits"), "tta must be False where the dataset is digits"),
        (dict(flip="alternating", dataset="digits"), "flip must be random where the dataset is digits"),
        (dict(partition="thirds"), "partition must be one of conv_blocks, .*got 'thirds'"),
    ],
)
def test_bad_settings_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(TINY, **changes)


def test_settings_of_another_version_are_refused():
    with pytest.raises(ValueError, match="warmth is no setting of this version"):
        Settings.from_json(TINY.to_json() | {"warmth": 1})


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_vgg_shapes_and_initialisation(name, batch_norm):
    model = VGG(name, batch_norm)
    convs = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d)]
    assert len(convs) == int(name[3:]) - 3
    assert float(convs[-1].weight.detach().std()) == pytest.approx((2 / (9 * 512)) ** 0.5, rel=0.01)
    assert not any(c.bias.detach().any() for c in convs)
    model.eval()
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert parameter_count(name, batch_norm, 1.0) == sum(p.numel() for p in model.parameters())
    assert parameter_count("vgg16", False, 1.0) == 15_245_130  # as the public recipe counts it


def test_unknown_vgg():
    with pytest.raises(ValueError, match="name must be one of vgg11, .*got 'vgg12'"):
        VGG("vgg12")


# -------------------------------------------------------------------------------------------------------- command line


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--epochs", "0"], "epochs must be at least 1, got 0"),
        (["--epochs", "many"], "many"),
        (["--model", "vgg12"], "vgg12"),
        (["--frobnicate"], "frobnicate"),
        (["--dataset", "cifar10", "--data-dir", "/nowhere"], "CIFAR-10 is not in /nowhere"),
        (["--resume", "/nowhere"], "/nowhere is no run's folder"),
        (["--evaluate", "/nowhere/x.pt"], "/nowhere/x.pt"),
        (["--recipe", "cake"], "cake"),
    ],
)
def test_nonsense_on_the_command_line_is_answered_in_a_line_or_two(tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        cli.main(flags)
    printed = capsys.readouterr()
    text = printed.err + printed.out + str(stop.value.code)
    assert stop.value.code not in (0, None)
    assert message in re.sub(r"[│\s]+", " ", text)
    assert "Traceback" not in text


def test_a_folder_that_holds_a_run_is_not_overwritten(finished, capsys):
    out, _ = finished
    before = (out / "metrics.jsonl").read_bytes()
    with pytest.raises(SystemExit):
        cli.main([*FLAGS, "--out", str(out)])
    assert "already holds a run" in capsys.readouterr().err
    assert (out / "metrics.jsonl").read_bytes() == before


def test_resuming_a_finished_run_changes_nothing(finished):
    out, _ = finished
    before = metrics(out)
    cli.main(["--resume", str(out)])
    assert metrics(out) == before


@pytest.mark.parametrize("terminal", [True, False])
def test_a_progress_bar_on_a_terminal_and_plain_lines_elsewhere(tmp_path, monkeypatch, capsys, terminal):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    cli.main([*FLAGS, "--method", "sgd", "--batch-size", "16", "--out", str(tmp_path / "run")])
    printed = capsys.readouterr()
    assert ("sgd-seed0 epoch 2/3" in printed.err and "/32" in printed.err) == terminal
    assert re.findall(r"^ +(\d)/3 ", printed.out, re.MULTILINE) == ["1", "2", "3"]


def test_recipe_is_one_flag_and_others_still_count(monkeypatch, tmp_path):
    seen = {}

    class Stop(Exception):
        pass

    def catch(settings, **_):
        seen["settings"] = settings
        raise Stop

    monkeypatch.setattr(cli, "Trainer", catch)
    with pytest.raises(Stop):
        cli.main(["--recipe", "paper", "--model", "vgg16", "--out", str(tmp_path)])
    assert seen["settings"] == replace(PAPER, model="vgg16", out=tmp_path)


SMALL = [
    "--dataset",
    "synthetic",
    "--width",
    "0.0625",
    "--method",
    "sgd",
    "--epochs",
    "1",
    "--threads",
    "1",
    "--device",
    "cpu",
]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--train-images", "600"], "--train-images must be at most 512, got 600"),
        (
            ["--train-images", "512", "--validate"],
            "--train-images must be at most 511 to leave some to validate on, got 512",
        ),
        (
            ["--seed", "4294967295", "--seeds", "2"],
            "--seed must be at most 4294967294 where there are 2 seeds, got 4294967295",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused_before_a_folder_is_made(tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit):
        cli.main([*SMALL, *flags, "--out", str(tmp_path / "run")])
    assert capsys.readouterr().err == f"hta-train: {message}\n"
    assert not (tmp_path / "run").exists()


def test_an_export_is_tested_on_its_own_seeds_images_and_the_summary_counts_them(tmp_path, capsys):
    cli.main([*SMALL, "--train-images", "500", "--validate", "--seeds", "2", "--out", str(tmp_path / "run")])
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["test_images"] == 12
    for seed in range(2):
        cli.main(["--evaluate", str(tmp_path / "run" / f"sgd-seed{seed}.pt")])
        (row,) = (row for row in rows if row["seed"] == seed)
        said = f"test accuracy {row['test_accuracy']:.2f}%, test loss {row['test_loss']:.4f}"
        assert said in capsys.readouterr().out


def test_an_export_without_its_configuration_is_tested_by_a_recipe(tmp_path, capsys):
    cli.main([*SMALL, "--seeds", "1", "--out", str(tmp_path / "run")])
    alone = tmp_path / "sgd-seed0.pt"
    alone.write_bytes((tmp_path / "run" / "sgd-seed0.pt").read_bytes())
    capsys.readouterr()
    with pytest.raises(SystemExit):
        cli.main(["--evaluate", str(alone), "--recipe", "paper", "--device", "cpu"])
    assert f"a state_dict of {PAPER.model} at width 1, as a run exports it, is expected" in capsys.readouterr().err


def test_another_runs_summary_is_not_reported(tmp_path):
    first = replace(TINY, method="sgd", epochs=1, out=tmp_path / "run")
    Trainer(first, report=lambda _: None).train()
    for file in (tmp_path / "run").glob("checkpoint*"):
        file.unlink()
    said = []
    Trainer(replace(TINY, method="hta", out=tmp_path / "run"), report=said.append).train()
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["settings"]["method"] == "hta"
    assert list(summary["runs"]) == ["HTA"]
    assert "HTA" in said[-1]


def test_a_network_of_ddp_or_of_the_last_seed_is_tested_in_one_process(tmp_path):
    whole = replace(Settings(), method="ddp", seed=2**32 - 3, seeds=3)
    (tmp_path / "config.json").write_text(json.dumps(whole.to_json()))
    settings = cli.evaluated(tmp_path / f"ddp-seed{2**32 - 1}.pt", {})
    machine.check(settings)
    assert (settings.seed, settings.method) == (2**32 - 1, "sgd")
