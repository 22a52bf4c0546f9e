"""What a comparison's metrics say: a line per epoch, the summary and its table, the picture of the curves.

Imports matplotlib when called, and of the package the settings and pictures.py.
"""

import math
import platform
import statistics
import textwrap
from collections.abc import Iterable
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from ..extras import needs
from ..pictures import name_ends, of_method
from .settings import Settings

Row = dict[str, Any]  # an epoch's metrics


# An epoch's columns and their widths: 79 in all, for any number of copies.
COLUMNS = {
    "epoch": 7, "L": 7, "distance": 8, "copies, %": 12, "test, %": 7, "loss": 8, "lr": 7, "images/s": 8, "skipped": 7
}  # fmt: skip


def heading(label: str, seed: int) -> str:
    """What stands above a run's lines."""
    return f"\n{label}, seed {seed}\n" + _line(COLUMNS)


def describe(row: Row, epochs: int) -> str:
    """An epoch in one line, below a heading if it is a run's first.

    With several copies, "copies, %" is the range of their accuracies, and "test, %" that of their mean. "skipped" counts
    the steps that a gradient which is not finite kept from being made; a loss that is not finite shows as nan or inf.
    """
    apart = row["copies"] > 1
    tested = row["test_accuracy"] is not None
    accuracies = [row[f"test_accuracy_{i}"] for i in range(row["copies"])] if tested else []
    line = _line(
        [
            f"{row['epoch']}/{epochs}",
            _number(row["L"], 7) if apart and row["L"] == row["L"] else "",
            _number(row["distance"], 8) if apart else "",
            f"{min(accuracies):.1f}..{max(accuracies):.1f}" if apart and tested else "",
            f"{row['test_accuracy']:.2f}" if tested else "",
            _number(row["train_loss"], 8, ".4f"),
            _number(row["lr"], 7),
            f"{row['images_per_second']:.0f}",
            str(row.get("skipped", 0)),
        ]
    )
    return f"{heading(row['run'], row['seed'])}\n{line}" if row["epoch"] == 1 else line


def _line(cells: Iterable[str]) -> str:
    return " ".join(cell.rjust(width) for cell, width in zip(cells, COLUMNS.values(), strict=True)).rstrip()


def _number(value: float, width: int, form: str = ".3g") -> str:
    text = format(float(value), form)
    return text if len(text) <= width else f"{float(value):.1e}"


def summarise(rows: list[Row], settings: Settings, fingerprint: str, test_images: int) -> dict[str, Any]:
    """Mean and deviation over the seeds of each run's last epoch; a run's EMA and SWA stand below it."""
    runs = {}
    for label in dict.fromkeys(row["run"] for row in rows):
        by_seed = _by_seed(rows, label)
        last = [epochs[-1] for epochs in by_seed]
        cost = {
            "epochs": last[0]["epoch"],
            "work": sum(row["copies"] for row in by_seed[0]),  # epochs, counted once per copy
            "images_per_second": statistics.median(row["images_per_second"] for epochs in by_seed for row in epochs),
            "seconds": sum(row["seconds"] for epochs in by_seed for row in epochs) / len(last),
        }
        for average in ("", "_ema", "_swa"):
            if f"test_loss{average}" in last[0]:
                runs[label + average.upper().replace("_", " + ")] = cost | _measured(last, average)
    machine = {
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": str(settings.torch_device),
    }
    return {
        "runs": runs,
        "settings": settings.to_json(),
        "data": fingerprint,
        "test_images": test_images,
        "machine": machine,
        "date": datetime.now().isoformat(timespec="seconds"),
    }


def _measured(last: list[Row], average: str) -> dict[str, Any]:
    """Over the last rows of a run's seeds, for the network or for an average of it, "_ema" or "_swa"."""
    accuracies = [row[f"test_accuracy{average}"] for row in last]
    return {
        "accuracies": accuracies,
        "accuracy_mean": statistics.fmean(accuracies),
        "accuracy_deviation": statistics.stdev(accuracies) if len(accuracies) > 1 else None,
        "test_loss_mean": statistics.fmean(row[f"test_loss{average}"] for row in last),
    }


def table(summary: dict[str, Any]) -> str:
    """The summary for a terminal, as a Markdown table; work is epochs × copies, img/s are of a copy."""
    rows = [["run", "epochs", "work", "test, %", "test loss", "img/s", "s/run"]]
    for label, run in summary["runs"].items():
        spread = "" if run["accuracy_deviation"] is None else f" ± {run['accuracy_deviation']:.2f}"
        accuracy = f"{run['accuracy_mean']:.2f}"[:5] + spread  # 100.0 has the room of 99.99
        numbers = [
            accuracy,
            _number(run["test_loss_mean"], 8, ".4f"),
            f"{run['images_per_second']:.0f}",
            f"{run['seconds']:.0f}",
        ]
        rows.append([label, str(run["epochs"]), str(run["work"]), *numbers])
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])

    def line(cells: list[str]) -> str:
        first, *others = (cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
        return "| " + " | ".join([cells[0].ljust(len(first)), *others]) + " |"

    return "\n".join(line(row) for row in rows)


def in_words(summary: dict[str, Any], out: Path, network: str | None, command: str) -> str:
    """Three sentences: what the table shows, where the files are, what to try next.

    A difference is called one where it is at least twice its standard error: over the seeds, paired, or for one seed
    that of accuracies on so many test images.

    Args:
        summary: as `summarise` makes it.
        out: the run's folder.
        network: the name of one of its exported networks, if there is any left.
        command: how hta-train is called here.
    """
    runs = summary["runs"]
    label, run = [(name, run) for name, run in runs.items() if " + " not in name][-1]  # its averages stand below it
    rivals = {name: runs[name] for name in ("SGD", "SGD, equal work") if name in runs and name != label}
    images, seeds = summary["test_images"], len(run["accuracies"])
    shows = f"{label} reaches {run['accuracy_mean']:.1f} ± {standard_error(run['accuracies'], images):.1f} %."
    error = f"± is the standard error over {seeds} seeds."
    if seeds == 1:
        error = f"± is the standard error of one run's accuracy on {images:,} test images; --seeds 3 tells more."
    settings = summary["settings"]
    following, flags = "set it beside SGD at equal epochs and at equal work:", "--method compare"
    if rivals:
        said = [_beside(run["accuracies"], rival["accuracies"], images, name) for name, rival in rivals.items()]
        shows = f"{label} is {', and '.join(said)}. Its copies cost work, so equal work is the fair rival."
        error += " A difference of less than twice that counts as none."
        following = "copies with batches of their own, coupled tightly, then loosely, then merged:"
        flags = "--batches own --partition none --schedule tight-loose-merge --L-stop 100 --epochs-per-L 3"
        if settings["batches"] == "own":
            following = "more epochs and seeds; where averages of copies are reported to pay, runs are long:"
            flags += f" --epochs {max(9, 3 * settings['epochs'])} --seeds 5"
    flags += f" --dataset {settings['dataset']}" * (settings["dataset"] != "digits")
    holds = f", and {network} holds a trained network" if network else ""
    where = f"in {out}, curves.png shows every epoch{holds}."
    told = [f"What it shows: {shows} ({error})", f"Where it is: {where}", f"What to try: {following}"]
    wrapped = [textwrap.fill(text, 79, subsequent_indent="  ", break_on_hyphens=False) for text in told]
    typed = textwrap.wrap(f"{command} {flags}", 73, break_on_hyphens=False)
    return "\n".join(wrapped) + "\n    " + " \\\n      ".join(typed)


def standard_error(accuracies: list[float], images: int) -> float:
    """Of a mean accuracy, in points: over the seeds, or of one run on so many test images."""
    if len(accuracies) > 1:
        return statistics.stdev(accuracies) / math.sqrt(len(accuracies))
    return math.sqrt(accuracies[0] * (100 - accuracies[0]) / images)


def _beside(ours: list[float], theirs: list[float], images: int, name: str) -> str:
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    difference = statistics.fmean(differences)
    error = (
        standard_error(differences, 1)
        if len(ours) > 1
        else math.hypot(*(standard_error(a, images) for a in (ours, theirs)))
    )
    rival = "SGD at equal work" if name == "SGD, equal work" else "SGD at equal epochs"
    if abs(difference) < 2 * error or not difference:
        return f"level with {rival} ({difference:+.1f} ± {error:.1f} points)".replace("-", "−")
    return f"{abs(difference):.1f} ± {error:.1f} points {'above' if difference > 0 else 'below'} {rival}"


def curves(rows: list[Row], path: Path) -> None:
    """Test accuracy, training loss, and the copies' distance over the work done; a line per seed, a colour per run, each
    named where it ends."""
    with needs("train"):
        import matplotlib
        from matplotlib import pyplot as plt
        from matplotlib.ticker import LogLocator, MaxNLocator
    matplotlib.use("Agg")

    apart = any(row["copies"] > 1 for row in rows)
    figure, axes = plt.subplots(1, 2 + apart, figsize=(5 * (2 + apart), 4), layout="constrained")
    ends: list[tuple[float, float, str, str]] = []
    for order, label in enumerate(dict.fromkeys(row["run"] for row in rows)):
        color = of_method(label, order)
        last: list[tuple[float, float]] = []
        for mine in _by_seed(rows, label):
            style: dict[str, Any] = dict(color=color, alpha=0.8)
            work = [sum(row["copies"] for row in mine[: i + 1]) for i in range(len(mine))]
            tested = [
                (done, row["test_accuracy"])
                for done, row in zip(work, mine, strict=True)
                if row["test_accuracy"] is not None
            ]
            axes[0].plot(*zip(*tested, strict=True), **style)
            axes[1].plot(work, [row["train_loss"] for row in mine], **style)
            coupled = [row for row in mine if row["copies"] > 1]
            if coupled:
                axes[2].plot([row["epoch"] for row in coupled], [row["distance"] for row in coupled], "o-", **style)
            last.append(tested[-1])
        ends.append((statistics.fmean(accuracy for _, accuracy in last), last[0][0], label, color))
    accuracies = sorted(row["test_accuracy"] for row in rows if row["test_accuracy"] is not None)
    low, high = max(0.0, accuracies[len(accuracies) // 5] - 5), accuracies[-1]
    axes[0].set_ylim(low, high + 0.04 * (high - low) + 0.1)
    name_ends(axes[0], ends)
    axes[0].set(xlabel="work: epochs × copies", title="test accuracy, %")
    axes[1].set(xlabel="work: epochs × copies", title="training loss, mean of the copies", yscale="log")
    axes[1].yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes[1].yaxis.set_major_formatter("{x:g}")
    axes[1].yaxis.set_minor_formatter("")
    if apart:
        axes[2].set(xlabel="epoch", title="distance between the copies", ylim=(0, None))
    for panel in axes:
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.3)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def processor() -> str:
    """The CPU's name."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _by_seed(rows: list[Row], label: str) -> list[list[Row]]:
    """A run's rows in the order of their epochs, a list per seed."""
    mine = [row for row in rows if row["run"] == label]
    return [[row for row in mine if row["seed"] == seed] for seed in dict.fromkeys(row["seed"] for row in mine)]
