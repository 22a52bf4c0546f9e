"""Little data, many epochs: where averaging is said to pay. Ten seeds, paired: for each seed all methods begin with the same
images and the same weights.

Two copies train apart for four fifths of the epochs, then merged. Everything but plain SGD does the work of that: SGD at
equal work, with an exponential average (EMA) and with one of its last epochs (SWA) of its weights, which cost next to
nothing; data-parallel SGD, with twice the batch; local SGD, averaged every 16 steps; HTA as in the paper; and copies with
batches of their own, coupled tightly, then loosely, then merged. The learning rates of SGD and of data-parallel SGD are
chosen on training images left out, from other seeds; all others take SGD's.
"""

import statistics
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..pictures import of_method
from ..train.machine import fastest_precision
from ..train.settings import Settings
from .report import Row, markdown, pyplot, save_csv, save_figure, say
from .runs import Curve, Scale, curves_csv, error, interval, settings_in_words, train

BASE, EMA, SWA, PARALLEL = "SGD, equal work", "SGD + EMA", "SGD + SWA", "data-parallel SGD"
LRS = (0.025, 0.05, 0.1)
_TUNING = range(1000, 1002)  # seeds

_CPU = Settings(
    method="sgd",
    dataset="cifar10",
    train_images=2304,
    width=0.125,
    epochs=120,
    evaluate_every=10,
    precision=fastest_precision(),
    device="cpu",
)
SCALES = {
    "quick": Scale("quick", replace(_CPU, dataset="synthetic", train_images=128, width=0.0625, epochs=5), 2),
    "cpu": Scale("cpu", _CPU, 10),
    "full": Scale("full", replace(_CPU, width=1.0, epochs=300, precision="bf16", device="auto"), 10),
}


def methods(plain: Settings, lr: float, parallel_lr: float) -> dict[str, Settings]:
    """Each method's settings.

    Args:
        plain: of SGD.
        lr, parallel_lr: the learning rates, that of data-parallel SGD last.
    """
    apart = plain.epochs * 4 // 5
    plain = replace(plain, method="sgd", lr=lr)
    longer = replace(plain, epochs=plain.epochs + apart)
    falling: dict[str, Any] = {"epochs_per_L": apart // 6}  # the six values of the paper's L
    if apart < 6:
        falling = {"schedule": "constant", "epochs_per_L": apart}
    own: dict[str, Any] = {"method": "hta", "batches": "own", "partition": "none"}
    return {
        "SGD": plain,
        BASE: replace(longer, ema=0.998, swa=0.25),
        PARALLEL: replace(longer, batch_size=2 * plain.batch_size, lr=parallel_lr),
        "local SGD": replace(plain, **own, coupling="average", every=16, schedule="constant", epochs_per_L=apart),
        "HTA, as in the paper": replace(plain, method="hta", **falling),
        "tight, loose, merged": replace(
            plain, **own, schedule="tight-loose-merge", L_start=0.01, L_stop=100.0, epochs_per_L=apart // 2
        ),
    }


def run(out: Path, scale: Scale) -> None:
    """Chooses the learning rates, trains, and leaves table, CSVs and picture."""
    say(settings_in_words(replace(scale, settings=methods(scale.settings, 0.05, 0.05)["HTA, as in the paper"])))
    lr, parallel_lr = (tuned(out, scale, name) for name in (BASE, PARALLEL))
    curves = train(out, methods(scale.settings, lr, parallel_lr), range(scale.seeds))
    rows = table(curves)
    say(markdown(rows))
    save_csv(out / "smalldata.csv", rows)
    save_csv(out / "smalldata-epochs.csv", curves_csv(curves))
    save_figure(out / "smalldata.png", figure(rows))


def tuned(out: Path, scale: Scale, name: str) -> float:
    """The learning rate with the best accuracy on images left out of training."""
    tried = {}
    for lr in LRS:
        settings = methods(scale.settings, lr, lr)[name]
        tried[f"{name}, lr {lr:g}"] = replace(settings, validate=True, ema=0.0, swa=0.0, evaluate_every=settings.epochs)
    curves = train(out / "tuning", tried, _TUNING if scale.name != "quick" else _TUNING[:1])
    accuracies = dict(zip(LRS, (statistics.fmean(c.last()) for c in curves.values()), strict=True))
    best = max(accuracies, key=lambda lr: accuracies[lr])
    say(f"{name}: " + ", ".join(f"lr {lr:g} {value:.2f} %" for lr, value in accuracies.items()) + f"; taken: {best:g}")
    return best


def table(curves: Mapping[str, Curve]) -> list[Row]:
    """Of each method the mean and its standard error, and the paired difference to SGD at equal work with a 95 % interval."""
    values = {name: (c.work, c.last(), c.last("test_loss")) for name, c in curves.items()}
    base = curves[BASE]
    for name, key in ((EMA, "ema"), (SWA, "swa")):
        values[name] = base.work, base.last(f"test_accuracy_{key}"), base.last(f"test_loss_{key}")
    rows: list[Row] = []
    for name, (work, accuracies, losses) in values.items():
        difference, half = interval([a - b for a, b in zip(accuracies, values[BASE][1], strict=True)])
        rows.append(
            {"method": name, "work": work, "accuracy, %": statistics.fmean(accuracies), "s.e.": error(accuracies)}
            | {"loss": statistics.fmean(losses), "its s.e.": error(losses)}
            | {"minus equal work": difference, "± 95 %": half}
        )
    return rows


def figure(rows: list[Row]) -> Any:
    """The paired differences with their intervals."""
    figure, axes = pyplot().subplots(figsize=(7, 0.45 * len(rows) + 1.2), layout="constrained")
    shown = [row for row in rows if row["method"] != BASE][::-1]
    axes.axvline(0, color="0.5", linewidth=0.8)
    for place, row in enumerate(shown):
        bar = {"xerr": row["± 95 %"], "color": of_method(row["method"])}
        axes.errorbar(row["minus equal work"], place, fmt="o", capsize=3, **bar)
    labels = [f"{row['method']} ({row['accuracy, %']:.2f} %, work {row['work']})" for row in shown]
    axes.set_yticks(range(len(shown)), labels)
    axes.set(xlabel="minus SGD at equal work, points (bars: 95 %)")
    axes.grid(alpha=0.3, axis="x")
    return figure
