"""The trainer's picture. Imports matplotlib when called, nothing of the package."""

from pathlib import Path
from typing import Any


def curves(rows: list[dict[str, Any]], path: Path) -> None:
    """Test accuracy, training loss, and the copies' distance over the work done; a line per seed, a colour per method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    labels = list(dict.fromkeys(row["run"] for row in rows))
    apart = [row for row in rows if row["copies"] == 2]
    panels = [("test_accuracy", "test accuracy, %"), ("train_loss_theta", "training loss")]
    figure, axes = plt.subplots(1, 2 + bool(apart), figsize=(5 * (2 + bool(apart)), 4), layout="constrained")
    for axis, (key, title) in zip(axes, panels, strict=False):
        for color, label in enumerate(labels):
            for number, seed in enumerate(dict.fromkeys(r["seed"] for r in rows if r["run"] == label)):
                mine = [r for r in rows if r["run"] == label and r["seed"] == seed]
                work = [sum(r["copies"] for r in mine[: i + 1]) for i in range(len(mine))]
                axis.plot(work, [r[key] for r in mine], color=f"C{color}", alpha=0.8, label=None if number else label)
        axis.set(xlabel="work: epochs × copies", title=title)
        axis.grid(alpha=0.3)
    axes[0].legend()
    lowest = sorted(r["test_accuracy"] for r in rows)[len(rows) // 5]
    axes[0].set_ylim(bottom=max(0.0, lowest - 5))
    axes[1].set_yscale("log")
    if apart:
        for seed in dict.fromkeys(r["seed"] for r in apart):
            mine = [r for r in apart if r["seed"] == seed]
            axes[2].plot(
                [r["epoch"] for r in mine], [r["distance"] for r in mine], "o-", color=f"C{labels.index('HTA')}"
            )
        axes[2].set(xlabel="epoch", title="‖θ − η‖ while there are two copies", ylim=(0, None))
        axes[2].grid(alpha=0.3)
    figure.savefig(path, dpi=130)
    plt.close(figure)
