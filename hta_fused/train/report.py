"""What a comparison's metrics say: a line per epoch, the summary and its table, the picture of the curves.

Imports matplotlib when called, and of the package the settings.
"""

import platform
import statistics
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from .settings import Settings

Row = dict[str, Any]  # an epoch's metrics


def describe(row: Row, epochs: int) -> str:
    """An epoch in one line."""
    copies = range(row["copies"])
    parts = [f"{row['run']} seed {row['seed']} epoch {row['epoch']}/{epochs}"]
    if row["copies"] == 1:
        parts.append(f"accuracy {row['test_accuracy']:.2f}%")
    else:
        parts.append(f"L {row['L']:.4g}")
        parts.append("copies " + " ".join(f"{row[f'test_accuracy_{i}']:.2f}%" for i in copies))
        parts.append(f"mean {row['test_accuracy']:.2f}%  distance {row['distance']:.3g}")
    parts.append("loss " + " ".join(f"{row[f'train_loss_{i}']:.4f}" for i in copies))
    return "  ".join([*parts, f"lr {row['lr']:.4g}", f"{row['images_per_second']:.0f} images/s"])


def summarise(rows: list[Row], settings: Settings, fingerprint: str) -> dict[str, Any]:
    """Mean and deviation over the seeds of each run's last epoch."""
    runs = {}
    for label in dict.fromkeys(row["run"] for row in rows):
        by_seed = _by_seed(rows, label)
        last = [epochs[-1] for epochs in by_seed]
        accuracies = [row["test_accuracy"] for row in last]
        runs[label] = {
            "epochs": last[0]["epoch"],
            "work": sum(row["copies"] for row in by_seed[0]),  # epochs, counted once per copy
            "accuracies": accuracies,
            "accuracy_mean": statistics.fmean(accuracies),
            "accuracy_deviation": statistics.stdev(accuracies) if len(accuracies) > 1 else None,
            "test_loss_mean": statistics.fmean(row["test_loss"] for row in last),
            "images_per_second": statistics.median(row["images_per_second"] for epochs in by_seed for row in epochs),
            "seconds": sum(row["seconds"] for epochs in by_seed for row in epochs) / len(last),
        }
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
        "machine": machine,
        "date": datetime.now().isoformat(timespec="seconds"),
    }


def table(summary: dict[str, Any]) -> str:
    """The summary for a terminal, as a Markdown table."""
    lines = [
        "| run | epochs | work (epochs × copies) | test accuracy, % | test loss | images/s per copy | s per run |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for label, run in summary["runs"].items():
        spread = "" if run["accuracy_deviation"] is None else f" ± {run['accuracy_deviation']:.2f}"
        lines.append(
            f"| {label} | {run['epochs']} | {run['work']} | {run['accuracy_mean']:.2f}{spread} | "
            f"{run['test_loss_mean']:.4f} | {run['images_per_second']:.0f} | {run['seconds']:.0f} |"
        )
    return "\n".join(lines)


def curves(rows: list[Row], path: Path) -> None:
    """Test accuracy, training loss, and the copies' distance over the work done; a line per seed, a colour per run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    apart = any(row["copies"] > 1 for row in rows)
    figure, axes = plt.subplots(1, 2 + apart, figsize=(5 * (2 + apart), 4), layout="constrained")
    for color, label in enumerate(dict.fromkeys(row["run"] for row in rows)):
        for number, mine in enumerate(_by_seed(rows, label)):
            style: dict[str, Any] = dict(color=f"C{color}", alpha=0.8, label=None if number else label)
            work = [sum(row["copies"] for row in mine[: i + 1]) for i in range(len(mine))]
            axes[0].plot(work, [row["test_accuracy"] for row in mine], **style)
            axes[1].plot(work, [row["train_loss"] for row in mine], **style)
            coupled = [row for row in mine if row["copies"] > 1]
            if coupled:
                axes[2].plot([row["epoch"] for row in coupled], [row["distance"] for row in coupled], "o-", **style)
    axes[0].set(xlabel="work: epochs × copies", title="test accuracy, %")
    axes[1].set(xlabel="work: epochs × copies", title="training loss, mean of the copies", yscale="log")
    lowest = sorted(row["test_accuracy"] for row in rows)[len(rows) // 5]
    axes[0].set_ylim(bottom=max(0.0, lowest - 5))
    axes[0].legend()
    if apart:
        axes[2].set(xlabel="epoch", title="distance between the copies", ylim=(0, None))
    for axis in axes:
        axis.grid(alpha=0.3)
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
