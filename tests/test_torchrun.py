"""hta-train under torchrun, with real processes: the run of one process with as many copies, whatever dies on the way.

python tests/test_torchrun.py --kills 20      kills random workers at random moments and counts
torchrun … tests/test_torchrun.py FAULTS …    is hta-train with faults: what the tests start
"""

import contextlib
import importlib.util
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import stress
import torch
import torch.distributed as dist
from processes import attempt

from hta_fused.train import Run, Settings, Trainer, cli, data
from hta_fused.train.team import Team
from hta_fused.train.vgg import VGG

TINY = Settings(
    method="hta", dataset="synthetic", width=0.125, epochs=3, L_stop=0.009, batch_size=128, batches="own", seeds=1, threads=1, device="cpu"
)  # fmt: skip


def torchrun(
    out: Path, *faults: str, processes: int = 2, restarts: int = 0, settings: Settings = TINY
) -> subprocess.Popen:
    """hta-train in some processes: a new run in a folder, or one that goes on. A fault is WHAT@RANK, or a number before it:
    of a start by torchrun, 0 being the first."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += [f"--max-restarts={restarts}", str(Path(__file__).resolve()), ",".join(faults)]
    settings = replace(settings, copies=processes)
    command += ["--resume", str(out)] if out.exists() else [*stress.flags(settings), "--out", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def ended(process: subprocess.Popen, status: int | None = 0) -> tuple[str, list[str]]:
    """What it printed: on stdout, and of hta-train's own on stderr."""
    output, errors = process.communicate(timeout=120)
    assert status is None or (process.returncode == 0) == (status == 0), errors
    return output, [line for line in errors.splitlines() if line.startswith("hta-train: ")]


def results(out: Path) -> dict[str, Any]:
    """All that a folder holds, but for what a clock, a graph, or the order of a sum has a part in."""

    def exact(content: Any) -> Any:
        if isinstance(content, dict):
            return {k: exact(v) for k, v in content.items() if k not in ("distance", "graph")}
        return [exact(v) for v in content] if isinstance(content, list) else content

    return exact(stress.results(out))


def same_results(a: Path, b: Path) -> None:
    first, second = results(a), results(b)
    assert first.keys() == second.keys()
    for name in first:
        assert stress.same(first[name], second[name]), name


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """What one process with both copies leaves."""
    out = tmp_path_factory.mktemp("runs") / "alone"
    assert Trainer(replace(TINY, out=out), report=stress.silent).train()
    return out


def test_two_processes_leave_what_one_with_two_copies_does(tmp_path, alone):
    out, errors = ended(torchrun(tmp_path / "two", "late@1"))
    same_results(alone, tmp_path / "two")
    assert [row["distance"] for row in rows(tmp_path / "two")] == pytest.approx(
        [row["distance"] for row in rows(alone)], rel=1e-4
    )
    assert not errors
    assert len(re.findall("writes to", out)) == len(re.findall("copies, %", out)) == 1
    assert "torchrun --nproc-per-node 2 -m hta_fused.train --resume" in out


def test_torchrun_starts_all_again_after_every_death_and_the_end_has_the_same_bits(tmp_path, alone):
    _, errors = ended(torchrun(tmp_path / "run", "0checkpoint@0", "1all_reduce@1", restarts=2))
    same_results(alone, tmp_path / "run")
    assert len(errors) == 2, errors
    for line, dead in zip(errors, (0, 1), strict=True):
        assert re.search(
            rf"rank {1 - dead}, .*: rank {dead} \(process .*\) has ended, .* from the last checkpoint", line
        )


def test_a_death_is_told_in_one_line_and_one_process_goes_on(tmp_path, alone):
    out = tmp_path / "run"
    _, (line,) = ended(torchrun(out, "backward@1"), status=1)
    assert subprocess.run(["pgrep", "-f", str(out)], capture_output=True).stdout == b"", "somebody is left"
    assert re.search(
        r"rank 0, in epoch 2 of hta-seed0: rank 1 \(process \d+ on .*\) has ended.*; go on with: torchrun", line
    )
    theirs = {"tensorboard"} if importlib.util.find_spec("tensorboard") else set()
    assert {file.name for file in out.iterdir()} - theirs <= {
        ".lock", "checkpoint.pt", "checkpoint.previous.pt", "config.json", "metrics.jsonl"
    }  # fmt: skip
    assert Trainer.resume(out, report=stress.silent).train()
    same_results(alone, out)


def test_a_signal_to_torchrun_saves_and_one_process_goes_on(tmp_path, alone):
    out = tmp_path / "run"
    process = torchrun(out, "slow@0")
    while not (out / "metrics.jsonl").exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = ended(process, status=1)
    assert "everything so far is saved. Go on with: torchrun" in errors[-1], errors
    assert len(rows(out)) < TINY.epochs
    assert Trainer.resume(out, report=stress.silent).train()
    same_results(alone, out)


def team_of(rank: int, size: int) -> Team:
    team = Team()
    if size > 1:
        team.rank, team.size, team.local_rank, team.group = rank, size, rank, dist.group.WORLD
    return team


def spoil(run: Run, net: Any, loss: torch.Tensor) -> torch.Tensor:
    """Copy 1's gradient is NaN in every second batch."""
    if run.batch == 1 and run.phase.count == 2 and net in list(run.phase.networks)[1 - run.phase.numbers[0] :]:
        loss.register_hook(lambda gradient: gradient * math.nan)
    return loss


OTHERS = {
    "all methods, averaged": dict(method="compare", epochs=2, L_stop=0.01, batches="shared", ema=0.9, swa=0.5),
    "hashed": dict(partition="hashed", start="independent", anchor="random"),
    "explicit": dict(mode="explicit", L_start=0.5, L_stop=0.5, lr=0.01, epochs=2),
    "bf16": dict(precision="bf16", epochs=2, memory_format="contiguous"),
    "local SGD": dict(coupling="average", every=3, partition="none", epochs=2, L_stop=0.01),
    "DiLoCo": dict(coupling="diloco", every=3, partition="none", epochs=2, L_stop=0.01),
    "fp16, NaN in copy 1": dict(precision="fp16", epochs=1, L_stop=0.01),
    "decoupled, NaN in copy 1": dict(decoupled=1, epochs=4),
}


def others(rank: int, size: int, folder: str) -> None:
    """Trains with other settings, and with gradients that are not finite in one copy."""
    loss = Run.loss
    for name, changes in OTHERS.items():
        settings = replace(TINY, width=0.04, **changes, out=Path(folder) / f"{name} {size}")
        with contextlib.ExitStack() as patches:
            if "NaN" in name:
                patches.enter_context(
                    mock.patch.object(Run, "loss", lambda run, net, batch: spoil(run, net, loss(run, net, batch)))
                )
            assert Trainer(settings, report=stress.silent, team=team_of(rank, size)).train()


def test_other_settings_and_a_nan_on_one_rank(tmp_path):
    """A step in which one rank's gradient is not finite is one that all skip, in the decoupled epoch too; counted once."""
    attempt(others, 2, str(tmp_path))
    others(0, 1, str(tmp_path))
    for name in OTHERS:
        same_results(tmp_path / f"{name} 1", tmp_path / f"{name} 2")
    assert [row["skipped"] for row in rows(tmp_path / "decoupled, NaN in copy 1 2")] == [1, 1, 1, 0]
    assert [row["skipped"] for row in rows(tmp_path / "fp16, NaN in copy 1 2")] == [1]


DDP = replace(TINY, method="ddp", width=0.04, dropout=0.0, batch_norm=False, epochs=2, batch_size=100, train_images=401)


def parallel(rank: int, size: int, folder: str) -> list[float]:
    """DDP, once as it is and once stopped in its second epoch and gone on with."""
    for name, stops in (("whole", 0), ("cut", 5)):
        batches = 0

        def stop(stops: int = stops) -> bool:
            nonlocal batches
            batches += 1
            return batches == stops

        settings = replace(DDP, copies=size, batch_norm=True, dropout=0.5, out=Path(folder) / f"{name} {size}")
        callbacks: dict[str, Any] = {"report": stress.silent, "team": team_of(rank, size)}
        if not Trainer(settings, stop=stop, **callbacks).train():
            assert Trainer.resume(settings.out, **callbacks).train()
    plain = replace(DDP, copies=size, out=Path(folder) / f"plain {size}")
    trainer = Trainer(plain, report=stress.silent, team=team_of(rank, size))
    assert trainer.train()
    return [row["train_loss"] for row in trainer.rows]


@pytest.mark.parametrize("size", [2, 3])
def test_ddp_is_sgd_on_all_processes_batches_and_goes_on_where_it_was(tmp_path, size):
    """The last batch of an epoch has one image for two processes, and 101 for three."""
    losses = attempt(parallel, size, str(tmp_path))
    alone = Trainer(replace(DDP, method="sgd", batch_size=100 * size, out=tmp_path / "alone"), report=stress.silent)
    assert alone.train()
    first, second = (torch.load(tmp_path / of) for of in ("alone/sgd-seed0.pt", f"plain {size}/ddp-seed0.pt"))
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=1e-4, atol=1e-5)
    for of_rank in losses:
        assert of_rank == losses[0]
        assert of_rank == pytest.approx([row["train_loss"] for row in alone.rows], rel=1e-5)
    assert [row["copies"] for row in rows(tmp_path / f"plain {size}")] == [1, 1]
    if size == 2:  # a sum of more has another order until DDP knows in which gradients come
        same_results(tmp_path / "whole 2", tmp_path / "cut 2")


def test_ddp_runs_under_torchrun_and_is_refused_in_one_process(tmp_path, capsys):
    ended(torchrun(tmp_path / "run", settings=replace(DDP, epochs=1)))
    assert [row["run"] for row in rows(tmp_path / "run")] == ["DDP"]
    out = tmp_path / "new"
    for flags in (["--resume", str(tmp_path / "run")], [*stress.flags(DDP), "--out", str(out)]):
        with pytest.raises(SystemExit):
            cli.main(flags)
        (line,) = capsys.readouterr().err.splitlines()
        assert "method must be sgd in one process" in line
    assert not out.exists()


def gone_on_with(rank: int, size: int, folder: str) -> bool:
    return Trainer.resume(Path(folder), report=stress.silent, team=team_of(rank, size)).train()


@pytest.mark.parametrize("batches", [2, 10], ids=["before the merge", "after it"])
def test_two_processes_go_on_with_one_processs_run(tmp_path, alone, batches):
    out, left = tmp_path / "run", iter(range(batches))
    assert not Trainer(replace(TINY, out=out), report=stress.silent, stop=lambda: next(left) == batches - 1).train()
    assert len(rows(out)) == (batches - 1) // 4
    assert attempt(gone_on_with, 2, str(out)) == [True, True]
    same_results(alone, out)


def test_four_processes_come_close_to_one_with_four_copies(tmp_path):
    # Four terms summed in another order: in larger steps the processor's kernels decide how far that grows.
    settings = replace(TINY, copies=4, epochs=2, width=0.06, lr=0.0005)
    assert Trainer(replace(settings, out=tmp_path / "alone"), report=stress.silent).train()
    ended(torchrun(tmp_path / "four", processes=4, settings=settings))
    first, second = (torch.load(tmp_path / of / "hta-seed0.pt") for of in ("alone", "four"))
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=1e-5, atol=1e-6)
    for one, other in zip(rows(tmp_path / "alone"), rows(tmp_path / "four"), strict=True):
        assert other["train_loss"] == pytest.approx(one["train_loss"], rel=1e-4)
        assert one.keys() == other.keys()


# ------------------------------------------------------------------------------------------------------------- refused


def refusals(rank: int, size: int, folder: str) -> list[str]:
    """What each fault of one rank is answered with."""
    team, out, said = team_of(rank, size), Path(folder) / "run", []
    callbacks: dict[str, Any] = {"team": team, "report": stress.silent}

    def ask(settings: Settings, new: bool = True, given: dict[str, Any] | None = None) -> None:
        try:
            trainer, _ = cli._trainer(settings, given or {}, new, callbacks)
            trainer.train()
            said.append("taken")
        except (ValueError, OSError) as error:
            said.append(str(error))

    odd = rank == 1
    fine = replace(TINY, out=out)
    ask(replace(fine, lr=0.1 if odd else 0.05))
    with mock.patch.object(cli, "__version__", "7" if odd else "8"):
        ask(fine)
    with mock.patch.object(data, "synthetic", data.digits if odd else data.synthetic):
        ask(fine)
    with mock.patch.object(data, "load", side_effect=OSError("no images here") if odd else data.load):
        ask(fine)
    with mock.patch("hta_fused.train.run.network", return_value=VGG("vgg13" if odd else "vgg11", width=0.125)):
        ask(fine)
    ask(replace(fine, copies=3))
    said.append(str(out.exists()))
    with mock.patch("os.fsync", side_effect=OSError(28, "No space left on device") if rank == 0 else None):
        ask(replace(fine, out=Path(folder) / "full"))
    Trainer(replace(fine, out=Path(folder) / "other", copies=2), **callbacks, stop=lambda: odd).train()
    ask(replace(TINY, out=Path(folder) / "other"), new=False, given={"timeout": 5.0})
    return said


def test_what_differs_between_processes_is_named_in_all_of_them(tmp_path):
    first, second = attempt(refusals, 2, str(tmp_path))
    assert first == second
    lr, version, images, no_images, model, copies, made, full, other = first
    assert lr == "lr must be the same in all processes, got 0.05 on rank 0, 0.1 on rank 1"
    assert version == "the version of hta_fused must be the same in all processes, got 8 on rank 0, 7 on rank 1"
    assert images.startswith("the images must be the same in all processes")
    assert no_images == "rank 1: no images here"
    assert model.startswith("parameter 'features.3.weight' must be the same in all processes")
    assert copies == "copies is 3, but there are 2 processes: start 3, or one without torchrun"
    assert made == "True"  # by the run whose models differed, which is found out as it begins
    assert "No space left on device" in full
    assert other == "taken"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--copies", "3"], "--copies must be the number of processes, 2, or left out, got 3"),
        (["--method", "sgd"], "--method must be hta, compare or ddp under torchrun"),
        (["--graph"], "--graph is for one process's step"),
        (["--device", "cuda:0"], "--device must be auto, cpu or cuda under torchrun"),
        (["--evaluate", "x.pt"], "--evaluate is work for one process"),
        ([], "--out must be given where torchrun may start all again"),
    ],
)
def test_what_torchrun_settles_cannot_be_given(monkeypatch, capsys, flags, message):
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "TORCHELASTIC_MAX_RESTARTS": "3"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as stop:
        cli.main(flags)
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith(f"hta-train: {message}")


# ------------------------------------------------------------------------------------------------------------ the worker


def worker(faults: str, argv: list[str]) -> None:
    """hta-train with faults of this rank, at this start."""
    rank, start = os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]
    mine = [
        what
        for number, what, where in re.findall(r"(\d?)(\w+)@(\d)", faults)
        if where == rank and number in ("", start)
    ]

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    loss, all_reduce, replace_ = Run.loss, dist.all_reduce, os.replace

    def broken_loss(run: Run, net: Any, batch: Any) -> Any:
        value = loss(run, net, batch)
        if "backward" in mine and (run.epoch, run.batch) == (1, 2):
            value.register_hook(lambda _: die())
        if "slow" in mine:
            time.sleep(0.3)
        return value

    calls = iter(range(10**6))

    def broken_all_reduce(*arguments: Any, **options: Any) -> Any:
        if next(calls) == 12:
            die()
        return all_reduce(*arguments, **options)

    saved = iter(range(10**6))

    def broken_replace(source: Any, target: Any) -> None:
        if str(target).endswith("checkpoint.pt") and next(saved) == 1:
            die()
        replace_(source, target)

    if "late" in mine:
        time.sleep(4)
    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.object(Run, "loss", broken_loss))
        if "all_reduce" in mine:
            patches.enter_context(mock.patch.object(dist, "all_reduce", broken_all_reduce))
        if "checkpoint" in mine:
            patches.enter_context(mock.patch.object(os, "replace", broken_replace))
        cli.main(argv)


def workers(process: subprocess.Popen) -> list[int]:
    """The processes that a torchrun has started."""
    try:
        return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    except OSError:
        return []


def written_since(file: Path, start: float) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return file.stat().st_mtime > start
    return False


def kills(count: int, seed: int) -> int:
    """Kills random workers at random moments of their training; how many kills did not go as they should.

    One that strikes after the last batch is not counted, since nobody may miss the dead there.
    """
    moments, struck, wrong = random.Random(seed), 0, 0
    with tempfile.TemporaryDirectory() as folder:
        whole, broken = Path(folder) / "whole", Path(folder) / "broken"
        settings = replace(TINY, batch_size=32, epochs=5)
        began = time.monotonic()
        ended(torchrun(whole, settings=settings))
        length = time.monotonic() - began
        while struck < count:
            start, process = time.time(), torchrun(broken, settings=settings)
            while process.poll() is None and not written_since(broken / "checkpoint.pt", start):  # the first epoch
                time.sleep(0.01)
            if struck % 2:  # aimed at a checkpoint that is being written
                while process.poll() is None and not (broken / ".part-checkpoint.pt").exists():
                    time.sleep(0.0005)
            else:
                time.sleep(moments.uniform(0, 0.2) * length)
            pids = workers(process)
            over = (broken / "hta-seed0.pt").exists()
            if pids:
                os.kill(pids[moments.randrange(len(pids))], signal.SIGKILL)
            since = time.monotonic()
            _, errors = process.communicate(timeout=120)
            if pids:
                said = [line for line in errors.splitlines() if line.startswith("hta-train: ")]
                fine = (
                    process.returncode != 0
                    and time.monotonic() - since < 15
                    and len(said) in ((0, 1) if over else (1,))
                )
                fine = fine and all("has ended" in line for line in said) and "hta_fused/train" not in errors
                struck += not over
                wrong += not fine
                print(f"kill {struck}: {time.monotonic() - since:.1f} s, {said}{'' if fine else errors}", flush=True)
            if (broken / "summary.json").exists():
                same_results(whole, broken)
                stress.shutil.rmtree(broken)
        if broken.exists():
            ended(torchrun(broken, settings=settings))
            same_results(whole, broken)
    print(f"{count} kills, {wrong} wrong")
    return wrong


if __name__ == "__main__":
    if sys.argv[1:2] == ["--kills"]:
        sys.exit(kills(int(sys.argv[2]), random.SystemRandom().randrange(10**6)))
    worker(sys.argv[1], sys.argv[2:])
