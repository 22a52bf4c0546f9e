"""A comparison: the list of runs that the settings ask for, worked through one after the other, and their folder."""

import math
import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..checks import shown
from ..files import as_json, is_path, read_json, save_atomically, write_json, write_text
from ..kernels import backends
from ..terminal import called
from . import data
from .folder import Folder, Refused, load
from .machine import check_alone
from .report import curves, describe, in_words, processor, summarise, table
from .run import Job, Run, batches_of
from .settings import OF_THE_MACHINE, Settings
from .team import ALONE, Team

LABELS = {"homotopy": "HTA", "average": "local SGD", "diloco": "DiLoCo"}  # of each coupling of copies
PATIENCE = 3  # epochs in a row whose loss is not finite, after which a run is given up


def jobs(settings: Settings) -> list[Job]:
    """The runs that the settings ask for, in order."""
    kinds = []
    if settings.method in ("sgd", "compare"):
        kinds.append(("SGD", "sgd", settings.epochs))
    if settings.method == "compare":
        kinds.append(("SGD, equal work", "sgd", settings.equal_work_epochs))
    if settings.trains_copies:
        kinds.append((LABELS[settings.coupling], "hta", settings.epochs))
    if settings.method == "ddp":
        kinds.append(("DDP", "ddp", settings.epochs))
    return [Job(*kind, seed) for seed in range(settings.seed, settings.seed + settings.seeds) for kind in kinds]


class Trainer:
    """Works through a comparison's jobs and keeps its folder.

    The folder holds checkpoint.pt, the truth, from the instant that it exists, and the one before beside it; of what
    the checkpoint says: config.json, metrics.jsonl (a line per epoch), one state_dict per finished run (and one each
    for its EMA and SWA), and at the end summary.json and curves.png. Each is whole at any moment.

    Args:
        settings: what to train; `out`, a new folder, must be set.
        stop: asked after every batch; once it says True, a checkpoint is written and `train` returns.
        progress: told of every batch: (job, epoch, batches done, batches of the epoch).
        report: takes each line of text for the user.
        team: the processes that train it, a copy in each while L falls. All of them make a Trainer and call the same of it;
            rank 0 holds the folder, reports, and its numbers count. The folder is one process's: either goes on with the
            other's.

    Raises:
        FileExistsError: `out` holds a run.
        BlockingIOError: another process trains in it.
        OSError, ValueError: the data is not there or altered, or `out` cannot be written to.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        stop: Callable[[], bool] = lambda: False,
        progress: Callable[[Job, int, int, int], None] = lambda *_: None,
        report: Callable[[str], None] = print,
        team: Team = ALONE,
        _begun: tuple[Folder | None, dict[str, Any]]
        | None = None,  # the folder of a run that goes on, and its checkpoint
    ):
        if settings.out is None:
            raise ValueError("settings.out must be the folder for the results, got None")
        if team.group is not None and settings.copies != team.size:
            raise ValueError(
                f"copies is {settings.copies}, but there are {team.size} processes: start {settings.copies}, or one "
                "without torchrun"
            )
        if team.group is None:
            check_alone(settings)
        self.team, self.settings, self.stop = team, settings, stop
        self.progress: Callable[..., None] = progress if team.leads else _nothing
        self.report: Callable[[str], None] = report if team.leads else _nothing
        self.out = out = settings.out
        if settings.threads:
            torch.set_num_threads(settings.threads)
        self.images = self._load_images()
        self.tested = self.images.tested(settings.train_images, settings.validate)
        self.fingerprint = self.images.fingerprint()
        self.jobs = jobs(settings)
        self.rows: list[dict[str, Any]] = []
        self.done = 0
        self._run: Run | None = None  # under way
        self._let_go = False  # of the folder
        # What the bits depend on beside the settings.
        self.machine: dict[str, Any] = {
            "threads": torch.get_num_threads(),
            "torch": str(torch.__version__),
            "processor": processor(),
            "instructions": backends()["cpu"],
            "memory_format": settings.chosen_format,
        }
        team.agree({"the images": self.fingerprint, "threads": self.machine["threads"]})
        self._folder: Folder | None  # in the process that holds it
        if _begun is None:
            content = self._content()
            self._folder = _held(team, lambda: Folder.create(out, content))
        else:
            self._folder, content = _begun
            team.together(lambda: self._take(content))
        try:
            self._write_records()
            self._tensorboard = _tensorboard(self.out, self.report) if team.leads else None
        except BaseException:
            if self._folder is not None:
                self._folder.close()
            raise

    @classmethod
    def resume(
        cls, out: str | os.PathLike[str], changes: Mapping[str, Any] | None = None, team: Team = ALONE, **callbacks: Any
    ) -> "Trainer":
        """Goes on with the run in a folder, with the settings and the number of threads that it was begun with.

        Args:
            out: the folder.
            changes: settings that are the machine's and not the run's, such as data_dir or device.
            team: as above.
            callbacks: `stop`, `progress`, `report`, as above.

        Raises:
            FileNotFoundError: the folder holds no run.
            BlockingIOError: another process trains in it.
            ValueError: no checkpoint is whole, config.json is not the run's, or the images are not.
        """
        if not is_path(out):
            raise ValueError(f"out must be a path, got {shown(out)}")
        out = Path(out)
        folder = _held(team, lambda: Folder.open(out))

        def begin(content: dict[str, Any]) -> "Trainer":
            settings = _settings_of(content)
            team.lead(lambda: _check_record(out / "config.json", settings))
            settings = replace(settings, **{**(changes or {}), "out": out})
            return cls(settings, team=team, _begun=(folder, content), **callbacks)

        try:
            return load(out, team, begin, callbacks.get("report", print) if team.leads else _nothing)
        except BaseException:
            if folder is not None:
                folder.close()
            raise

    def train(self) -> bool:
        """Runs what is left, once. False if it was asked to stop before the end; then a checkpoint holds all there is, and
        `resume` goes on with it.

        Raises:
            FloatingPointError: the loss has not been finite for PATIENCE epochs in a row, or when a run ended.
            RuntimeError: it was called before, and has let go of the folder, in which another may have gone on.
        """
        if self._let_go:
            raise RuntimeError(f"train() has let go of {self.out}: Trainer.resume goes on with what is there")
        try:
            while self.done < len(self.jobs):
                job = self.jobs[self.done]
                if self._run is None:
                    self._run = self._new_run(None)
                self._check_finite(job)
                while self._run.epoch < job.epochs:
                    finished = self._epoch(self._run)
                    self._save()
                    if not finished:
                        return False
                    self._check_finite(job)
                self._export(job.name, self._run.phase.mean().state_dict())
                for name, net in self._run.averages.networks.items():
                    self._export(f"{job.name}-{name}", net.state_dict())
                self.done, self._run = self.done + 1, None
                self._save()
            self.team.lead(self._finish)
            return True
        finally:
            self._let_go = True
            if self._folder is not None:
                self._folder.close()

    @property
    def place(self) -> str:
        """Where it is."""
        run = self._run
        return "between two runs" if run is None else f"in epoch {min(run.epoch + 1, run.job.epochs)} of {run.job.name}"

    @property
    def saved(self) -> bool:
        """Whether there is a checkpoint to go on from, as far as this process knows."""
        return self._folder is None or self._folder.checkpoint.exists()

    def _load_images(self) -> data.Images:
        s = self.settings

        def load() -> data.Images:
            return data.load(s.dataset, s.data_dir, s.download)

        if s.download and self.team.group is not None:  # by one process on each machine
            self.team.together(lambda: self.team.local_rank or load())
        return self.team.together(load)

    def _new_run(self, saved: dict[str, Any] | None) -> Run:
        job = self.jobs[self.done]
        # The one that the run was begun with, whatever is fastest here: blocks of a partition depend on it.
        settings = replace(self.settings, memory_format=self.machine["memory_format"])
        if job.method == "ddp":  # a batch is all processes' together
            settings = replace(settings, batches="shared", batch_size=settings.copies * settings.batch_size)
        return Run(settings, job, batches_of(self.images, settings, job.seed), self.report, saved, self.team)

    def _epoch(self, run: Run) -> bool:
        start, already = time.perf_counter(), run.images_seen

        def on_batch() -> bool:
            self.progress(run.job, run.epoch, run.batch, len(run.batches))
            return self.team.largest(self.stop()) > 0

        if not run.train_epoch(on_batch):
            return False
        seconds = time.perf_counter() - start
        fresh = 1 - already / run.images_seen  # the part of the epoch that this process trained
        row = run.end_epoch(seconds / fresh if fresh > 0 else 0.0)
        self.rows.append(self.team.lead(lambda: row))
        if self._tensorboard is not None:
            averages = [key for key in row if key.endswith(("_ema", "_swa"))]
            for key in ("train_loss", "test_loss", "test_accuracy", "distance", "lr", "L", *averages):
                if row[key] is not None:
                    self._tensorboard.add_scalar(f"{run.job.name}/{key}", row[key], row["epoch"])
        self.report(describe(row, run.job.epochs))
        return True

    def _check_finite(self, job: Job) -> None:
        mine = [row for row in self.rows if (row["run"], row["seed"]) == (job.label, job.seed)]
        last = mine[-PATIENCE:]
        since = f"has not been finite for {len(last)} epochs"
        if len(mine) == job.epochs and not math.isfinite(mine[-1]["test_loss"]):
            since = "is not finite at its end"  # of the network that would be exported
        elif len(last) < min(PATIENCE, job.epochs) or any(map(_finite, last)):
            return
        s = self.settings
        advice = f"lower --lr (it is {s.lr:g})"
        if job.method == "hta" and s.mode == "explicit" and s.lr * 4 / s.L_start > 2 * (1 + s.momentum):
            advice = f"--mode explicit is unstable where lr · 4 / L exceeds 2 (1 + momentum): raise --L-start (it is {s.L_start:g}), {advice}, or take --mode implicit"
        elif s.precision == "fp16":
            advice += " or take --precision bf16"
        raise FloatingPointError(f"{job.label} seed {job.seed} diverged: its loss {since}; {advice}")

    # The checkpoint is the truth; what else is in the folder is written from it, after it.
    def _content(self) -> dict[str, Any]:
        return {
            "settings": self.settings.to_json(),
            "data": self.fingerprint,
            "machine": self.machine,
            "rows": self.rows,
            "done": self.done,
            "run": None if self._run is None else self._run.state(),
        }

    def _save(self) -> None:
        content = self._content()

        def save() -> None:
            assert self._folder is not None
            self._folder.save(content)
            self._write_metrics()

        self.team.lead(save)

    def _write_metrics(self) -> None:
        write_text(self.out / "metrics.jsonl", "".join(as_json(row) + "\n" for row in self.rows))

    def _write_records(self) -> None:
        self.team.lead(lambda: write_json(self.out / "config.json", self.settings.to_json()))
        self.team.lead(self._write_metrics)

    def _export(self, name: str, state: dict[str, Any]) -> None:
        self.team.lead(lambda: save_atomically(self.out / f"{name}.pt", lambda path: _torch_save(state, path)))

    def _take(self, content: dict[str, Any]) -> None:
        """Goes on from a checkpoint's content.

        Raises:
            Refused: it does not fit the images, the settings or itself.
        """
        if content["data"] != self.fingerprint:
            raise Refused(
                f"the images are not those that it was trained on (fingerprint {self.fingerprint}, was {content['data']})"
            )
        begun = content["machine"]
        self.machine["memory_format"] = begun["memory_format"]
        self.done, run = content["done"], None
        if content["run"] is not None:
            try:
                run = self._new_run(content["run"])
            except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
                why = str(error).splitlines()[0] if str(error) else type(error).__name__
                raise Refused(f"its run does not fit its settings: {why}") from error
        for name in ("torch", "processor", "instructions"):
            if begun[name] != self.machine[name]:
                self.report(f"begun with {name} {begun[name]}, going on with {self.machine[name]}: the bits may differ")
        if begun["threads"] != torch.get_num_threads():
            self.report(f"going on with {begun['threads']} threads, as it was begun: the bits depend on it")
            torch.set_num_threads(begun["threads"])
        self.machine, self.rows, self._run = begun, content["rows"], run

    def _finish(self) -> None:
        if self._tensorboard is not None:
            self._tensorboard.close()
        file = self.out / "summary.json"
        summary = summarise(self.rows, self.settings, self.fingerprint, self.tested)
        known = None
        with suppress(FileNotFoundError, ValueError):  # what is no summary is written anew
            known = read_json(file)
        # Where they are the same, it was finished before, and resumed for no reason.
        if not (isinstance(known, dict) and known.get("runs") == summary["runs"]):
            save_atomically(self.out / "curves.png", lambda path: curves(self.rows, path))
            write_json(file, summary)
        left = []
        for name in (f"{job.name}.pt" for job in self.jobs):
            if (self.out / name).is_file():
                left.append(name)
            else:
                self.report(f"{name} is gone: nothing else holds the network of a run that has ended")
        words = in_words(summary, self.out, left[-1] if left else None, called("hta-train"))
        self.report(f"\n{table(summary)}\n\n{words}")


def _finite(row: dict[str, Any]) -> bool:
    """Whether an epoch's losses are, those that were taken."""
    return math.isfinite(row["train_loss"]) and (row["test_loss"] is None or math.isfinite(row["test_loss"]))


def _nothing(*_: Any) -> None:
    pass


def _held(team: Team, take: Callable[[], Folder]) -> Folder | None:
    """The folder, in the process that holds it."""
    folder = None

    def hold() -> None:
        nonlocal folder
        folder = take()

    team.lead(hold)
    return folder


def _torch_save(content: Any, path: Path) -> None:
    with open(path, "wb") as file:  # so that a full disk is an OSError
        torch.save(content, file)


def _settings_of(content: dict[str, Any]) -> Settings:
    """A checkpoint's settings.

    Raises:
        Refused: its content is not as `Trainer._content` makes it.
    """
    kinds = {"settings": dict, "data": str, "machine": dict, "rows": list, "done": int, "run": dict | None}
    if not isinstance(content, dict):
        raise Refused(f"it is no checkpoint of hta-train: it holds a {type(content).__name__}")
    for name, kind in kinds.items():
        if not isinstance(content.get(name, ...), kind):
            raise Refused(
                f"it is no checkpoint of hta-train, or of another version: {name} is {type(content.get(name)).__name__}"
            )
    if not all(
        isinstance(row, dict) and {"run", "seed", "train_loss", "test_loss"} <= row.keys() for row in content["rows"]
    ):
        raise Refused("it is no checkpoint of hta-train, or of another version: its rows are no metrics")
    if not {"threads", "torch", "processor", "instructions", "memory_format"} <= content["machine"].keys():
        raise Refused("it is no checkpoint of hta-train, or of another version: its machine is not described")
    try:
        settings = Settings.from_json(content["settings"])
    except (TypeError, ValueError) as error:
        raise Refused(f"it is no checkpoint of hta-train, or of another version: {error}") from None
    if not 0 <= content["done"] <= len(jobs(settings)):
        raise Refused(f"it says that {content['done']} runs of {len(jobs(settings))} are done")
    return settings


def _check_record(config: Path, settings: Settings) -> None:
    """config.json is a record and not an input: a difference in what is the run's own is refused."""
    if not config.exists():
        return
    cure = f"put it back or delete it ({config.name} is a record; a run goes on with what its checkpoint says)"
    try:
        found = read_json(config)
        if not isinstance(found, dict):
            raise ValueError(f"it holds {type(found).__name__}")
    except ValueError as error:
        raise ValueError(f"{config} is no JSON of settings ({error}): {cure}") from None
    ours = settings.to_json()
    names = [
        n for n in {**ours, **found} if n not in ("out", *OF_THE_MACHINE) and found.get(n, ...) != ours.get(n, ...)
    ]
    if names:
        differences = ", ".join(f"{n} is {shown(found.get(n))}, but the run has {ours.get(n)!r}" for n in names)
        raise ValueError(f"{config}: {differences}: {cure}")


def _tensorboard(out: Path, report: Callable[[str], None]) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    try:
        return SummaryWriter(str(out / "tensorboard"))
    except UnicodeError as error:  # it writes to folders with names in UTF-8 only
        report(f"nothing is written for TensorBoard: {error}")
        return None
