"""A comparison: the list of runs that the settings ask for, worked through one after the other, and their folder."""

import io
import json
import math
import pickle
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..files import save_atomically, write_json, write_text
from . import data
from .report import curves, describe, summarise, table
from .run import Job, Run, batches_of, evaluate, network
from .settings import Settings


def jobs(settings: Settings) -> list[Job]:
    """The runs that the settings ask for, in order."""
    kinds = []
    if settings.method != "hta":
        kinds.append(("SGD", "sgd", settings.epochs))
    if settings.method == "compare":
        kinds.append(("SGD, equal work", "sgd", settings.epochs + (settings.copies - 1) * settings.L_schedule.epochs))
    if settings.method != "sgd":
        kinds.append(("HTA", "hta", settings.epochs))
    return [Job(*kind, seed) for seed in range(settings.seed, settings.seed + settings.seeds) for kind in kinds]


class Trainer:
    """Works through a comparison's jobs and keeps its folder.

    The folder holds config.json, metrics.jsonl (a line per epoch), checkpoint.pt, one state_dict per finished run,
    summary.json and curves.png, each whole at any moment.

    Args:
        settings: what to train; `out` must be set.
        resume: go on from the folder's checkpoint.
        stop: asked after every batch; once it says True, a checkpoint is written and `train` returns.
        progress: told of every batch: (job, epoch, batches done, batches of the epoch).
        report: takes each line of text for the user.
    """

    def __init__(
        self,
        settings: Settings,
        resume: bool = False,
        stop: Callable[[], bool] = lambda: False,
        progress: Callable[[Job, int, int, int], None] = lambda *_: None,
        report: Callable[[str], None] = print,
    ):
        assert settings.out is not None
        self.settings, self.stop, self.progress, self.report = settings, stop, progress, report
        self.out = settings.out
        self.checkpoint = self.out / "checkpoint.pt"
        if self.checkpoint.exists() and not resume:
            raise FileExistsError(
                f"{self.out} already holds a run: --resume {self.out} goes on with it, or choose another --out"
            )
        if resume and not self.checkpoint.exists():
            raise FileNotFoundError(f"{self.out} holds no checkpoint.pt to resume from")
        if settings.threads:
            torch.set_num_threads(settings.threads)
        self.images = data.load(settings.dataset, settings.data_dir, settings.download)
        self.fingerprint = self.images.fingerprint()
        self.jobs = jobs(settings)
        self.rows: list[dict[str, Any]] = []
        self.done = 0
        self._saved_run: dict[str, Any] | None = None
        if resume:
            self._load()
        else:
            self.out.mkdir(parents=True, exist_ok=True)
            write_json(self.out / "config.json", settings.to_json())
        write_text(self.out / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in self.rows))
        self._tensorboard = _tensorboard(self.out)

    def train(self) -> bool:
        """Runs what is left. False if it was asked to stop before the end; then a checkpoint holds all there is."""
        while self.done < len(self.jobs):
            job = self.jobs[self.done]
            batches = batches_of(self.images, self.settings, job.seed)
            run = Run(self.settings, job, batches, self.report, self._saved_run)
            self._saved_run = None
            while run.epoch < job.epochs:
                finished = self._epoch(run)
                self._save(run)
                if not finished:
                    return False
            self.done += 1
            state = run.phase.mean().state_dict()
            save_atomically(self.out / f"{job.name}.pt", lambda path, state=state: torch.save(state, path))  # type: ignore[misc]
            self._save(None)
        self._finish()
        return True

    def _epoch(self, run: Run) -> bool:
        start, already = time.perf_counter(), run.images_seen

        def on_batch() -> bool:
            self.progress(run.job, run.epoch, run.batch, len(run.batches))
            return self.stop()

        if not run.train_epoch(on_batch):
            return False
        seconds = time.perf_counter() - start
        fresh = 1 - already / run.images_seen  # the part of the epoch that this process trained
        row = run.end_epoch(seconds / fresh if fresh > 0 else 0.0)
        self.rows.append({k: "inf" if v == math.inf else v for k, v in row.items()})  # JSON has no infinity
        with open(self.out / "metrics.jsonl", "a", encoding="utf-8") as log:
            log.write(json.dumps(self.rows[-1]) + "\n")
        if self._tensorboard is not None:
            for key in ("train_loss", "test_loss", "test_accuracy", "distance", "lr", "L"):
                self._tensorboard.add_scalar(f"{run.job.name}/{key}", row[key], row["epoch"])
        self.report(describe(row, run.job.epochs))
        return True

    # The checkpoint is the truth; metrics.jsonl is written again from it on resuming, since the last lines may be lost
    # or ahead of it.
    def _save(self, run: Run | None) -> None:
        content = {
            "settings": self.settings.to_json(),
            "data": self.fingerprint,
            "rows": self.rows,
            "done": self.done,
            "run": None if run is None else run.state(),
        }
        save_atomically(self.checkpoint, lambda path: torch.save(content, path))

    def _load(self) -> None:
        content = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
        if content["data"] != self.fingerprint:
            raise ValueError(
                f"the images are not those that {self.out} was trained on (fingerprint {self.fingerprint}, "
                f"was {content['data']})"
            )
        self.rows, self.done, self._saved_run = content["rows"], content["done"], content["run"]

    def _finish(self) -> None:
        if self._tensorboard is not None:
            self._tensorboard.close()
        summary = summarise(self.rows, self.settings, self.fingerprint)
        write_json(self.out / "summary.json", summary)
        save_atomically(self.out / "curves.png", lambda path: curves(self.rows, path))
        files = ", ".join(sorted(p.name for p in self.out.iterdir()))
        self.report(f"\n{table(summary)}\n\n{self.out}: {files}")


def evaluate_file(file: Path, settings: Settings) -> tuple[float, float]:
    """Loads an exported state_dict into the plain VGG of the settings and returns its test loss and accuracy (in %).

    Raises:
        ValueError: the file holds something else; the message names it.
    """
    wanted = f"a state_dict of {settings.model} at width {settings.width:g}, as a run exports it, is expected"
    if file.is_dir():
        raise ValueError(f"{file} is a folder, where {wanted}")
    content = io.BytesIO(file.read_bytes())
    try:
        state = torch.load(content, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError, ValueError, KeyError, OSError) as error:  # torch.load's
        raise ValueError(f"{file} is no file that torch.save wrote, where {wanted}") from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        hint = f" (it is a checkpoint: --resume {file.parent})" if isinstance(state, dict) and "rows" in state else ""
        raise ValueError(f"{file} holds no state_dict, where {wanted}{hint}")
    model = network(settings)
    for name, tensor in model.state_dict().items():
        held = tuple(state[name].shape) if name in state else "missing"
        if held != tuple(tensor.shape):
            raise ValueError(f"{file} holds another network: {name} is {held}, not {tuple(tensor.shape)}; {wanted}")
    for name in state.keys() - model.state_dict().keys():
        raise ValueError(f"{file} holds another network: {name} is none of its tensors; {wanted}")
    model.load_state_dict(state)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    images = data.load(settings.dataset, settings.data_dir, settings.download)
    return evaluate(model, batches_of(images, settings, settings.seed), settings)


def _tensorboard(out: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(out / "tensorboard"))
