"""The training runs behind a table or a figure: one folder each, as many at once as there are cores, and resumed.

Imports the trainer; knows nothing of the experiments.
"""

import math
import multiprocessing
import os
import statistics
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path

from ..extras import needs
from ..train.comparison import Trainer
from ..train.folder import Folder
from ..train.settings import Settings
from .report import Row, progress, say


@dataclass(frozen=True)
class Scale:
    """How much of an experiment is done.

    Attributes:
        name: "quick" (that everything runs), "cpu" (under an hour on two cores) or "full" (the paper's own).
        settings: of its plain runs.
        seeds: runs of every method.
    """

    name: str
    settings: Settings
    seeds: int


@dataclass(frozen=True)
class Curve:
    """One method's runs: each seed's rows, an epoch each, as hta-train's metrics.jsonl has them."""

    seeds: list[list[Row]]

    @property
    def work(self) -> int:
        """Epochs, counted once for each copy."""
        return sum(row["copies"] for row in self.seeds[0])

    def last(self, key: str = "test_accuracy") -> list[float]:
        """Of each seed's last epoch."""
        return [rows[-1][key] for rows in self.seeds]

    def best(self) -> list[float]:
        """Of each seed the accuracy of the epoch that is best on the test set, which is the paper's habit: too high, since
        the test set chooses the epoch."""
        return [max(row["test_accuracy"] for row in rows if row["test_accuracy"] is not None) for rows in self.seeds]


def train(out: Path, methods: Mapping[str, Settings], seeds: range) -> dict[str, Curve]:
    """Trains by every method from every seed, in processes of one thread each on the CPU, one after the other on a GPU.

    What is finished in `out` is not done again, and what was begun goes on: a method's runs lie in folders that bear its
    name.

    Raises:
        ValueError: a folder holds a run of other settings.
        FloatingPointError: a run diverged.
    """
    wanted = [
        (name, replace(settings, seed=seed, seeds=1, out=out / "runs" / f"{_slug(name)}-seed{seed}"))
        for seed in seeds
        for name, settings in methods.items()
    ]
    on_cpu = next(iter(methods.values())).torch_device.type == "cpu"
    workers = min(len(wanted), os.cpu_count() or 1) if on_cpu else 1
    rows: dict[tuple[str, int], list[Row]] = {}
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        running = {
            pool.submit(_finished, replace(settings, threads=1) if on_cpu else settings): (name, settings.seed)
            for name, settings in wanted
        }
        try:
            for future in progress(as_completed(running), "runs", len(running)):
                name, seed = running[future]
                rows[name, seed] = future.result()
                last = rows[name, seed][-1]
                say(f"{name}, seed {seed}: {last['test_accuracy']:.2f} % after {last['epoch']} epochs")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return {name: Curve([rows[name, seed] for seed in seeds]) for name in methods}


def _finished(settings: Settings) -> list[Row]:
    """A run's rows, once it is done."""
    assert settings.out is not None
    if Folder.begun(settings.out):
        trainer = Trainer.resume(
            settings.out, {"data_dir": settings.data_dir, "device": settings.device}, report=_silent
        )
        name = settings.difference(trainer.settings)
        if name:
            held, asked = getattr(trainer.settings, name), getattr(settings, name)
            raise ValueError(
                f"{settings.out} holds another run, whose {name} is {held}, not {asked}: choose another --out"
            )
    else:
        trainer = Trainer(settings, report=_silent)
    trainer.train()
    return trainer.rows


def _silent(_: str) -> None:
    pass


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name.lower()).replace("--", "-").strip("-")


def spread(values: list[float]) -> str:
    """Mean and deviation."""
    return f"{statistics.fmean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


def error(values: list[float]) -> float:
    """The standard error of a mean."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def interval(differences: list[float]) -> tuple[float, float]:
    """Mean, and half the width of Student's 95 % interval."""
    with needs("paper"):
        from scipy.stats import t

    return statistics.fmean(differences), float(t.ppf(0.975, len(differences) - 1)) * error(differences)


def settings_in_words(scale: Scale) -> str:
    """What a table's caption says of its runs."""
    s = scale.settings
    images = f"{s.train_images:,} training images" if s.train_images else "all training images"
    return (
        f"{s.dataset}, {images}, width {s.width:g}, {s.epochs} epochs, {s.L_schedule.epochs} of them coupled, batch "
        f"{s.batch_size}, {s.precision}, {scale.seeds} seed{'s' * (scale.seeds > 1)}"
    )


def curves_csv(curves: Mapping[str, Curve]) -> list[Row]:
    """Every epoch of every run, for a CSV; empty where only other runs have an average of their weights."""
    runs = [(name, rows) for name, curve in curves.items() for rows in curve.seeds]
    of_averages = [f"test_{what}_{name}" for name in ("ema", "swa") for what in ("loss", "accuracy")]
    keys = ["epoch", "copies", "L", "lr", "train_loss", "test_loss", "test_accuracy"]
    keys += [key for key in of_averages if any(key in row for _, rows in runs for row in rows)]
    return [
        {"method": name, "seed": rows[0]["seed"]} | {key: row.get(key) for key in keys}
        for name, rows in runs
        for row in rows
    ]
