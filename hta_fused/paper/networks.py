"""Tables 2 and 3, Figures 2 and 3, and the coupling with dropout: VGGs on CIFAR-10 by SGD and by HTA, from the same seeds.

SGD at equal work stands beside them, since two copies cost twice the work of one. What is trained stands here; runs.py
trains it.
"""

import statistics
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..extras import needs
from ..pictures import name_ends, of_method
from ..train.machine import fastest_precision
from ..train.settings import PAPER, Settings
from .report import Row, markdown, pyplot, save_csv, save_figure, say
from .runs import Curve, Scale, curves_csv, interval, settings_in_words, spread, train

SGD, EQUAL_WORK, HTA = "SGD", "SGD, equal work", "HTA"
FLOAT32 = "float32"

_QUICK = Settings(dataset="synthetic", train_images=256, width=0.0625, epochs=3, L_step=0.005, device="cpu")
_CPU = Settings(
    dataset="cifar10", train_images=10_000, width=0.25, epochs=10, precision=fastest_precision(), device="cpu"
)
# The scales of Table 2; others change what is trained and how often.
QUICK, CPU, FULL = Scale("quick", _QUICK, 1), Scale("cpu", _CPU, 3), Scale("full", PAPER, 5)
SCALES = {scale.name: scale for scale in (QUICK, CPU, FULL)}
FIVE_RUNS = {"quick": QUICK, "cpu": replace(CPU, seeds=5), "full": FULL}  # Table 3's

# Errors in %, as the paper's tables and figures have them.
TABLE_2 = {"vgg11": (7.83, 7.02), "vgg13": (5.82, 5.14), "vgg16": (6.14, 5.71), "vgg19": (6.35, 5.88)}
TABLE_3 = {"vgg11": "91.53 ± 0.09, best 91.66", "vgg13": "92.76 ± 0.22, best 93.09"}
FIGURE_2 = {"vgg13": (6.35, 5.14)}
FIGURE_3 = {"vgg11": (8.99, 8.39), "vgg13": (7.71, 6.91)}


def methods(plain: Settings, **homotopy: Any) -> dict[str, Settings]:
    """SGD, SGD at equal work, and HTA with such settings.

    Args:
        plain: what all of them share.
    """
    hta = replace(plain, method="hta", **homotopy)
    sgd = replace(plain, method="sgd")
    return {SGD: sgd, EQUAL_WORK: replace(sgd, epochs=hta.equal_work_epochs), HTA: hta}


def of_models(
    scale: Scale, models: tuple[str, ...], batch_norm: bool = True, **homotopy: Any
) -> dict[tuple[str, str], Settings]:
    """(network, method): its settings. At the quick scale one network stands for all."""
    found: dict[tuple[str, str], Settings] = {}
    for model in models[:1] if scale.name == "quick" else models:
        shared: dict[str, Any] = {"model": model, "batch_norm": batch_norm}
        found |= {(model, name): s for name, s in methods(replace(scale.settings, **shared), **homotopy).items()}
    return found


def without_batch_norm(scale: Scale) -> dict[tuple[str, str], Settings]:
    """What Table 3 and Figure 3 train: homotopy on the convolutions."""
    return of_models(scale, ("vgg11", "vgg13"), batch_norm=False, part="conv")


def trained(out: Path, scale: Scale, wanted: Mapping[tuple[str, str], Settings]) -> dict[tuple[str, str], Curve]:
    """Each method's runs of each network, said, and saved as curves."""
    first = next(iter(wanted.values()))
    say(settings_in_words(replace(scale, settings=first)))
    named = {f"{model} {name}": settings for (model, name), settings in wanted.items()}
    curves = train(out, named, range(scale.seeds))
    return {key: curves[name] for key, name in zip(wanted, named, strict=True)}


def table2(out: Path, scale: Scale) -> None:
    """Errors of VGG11 to VGG19 with batch norm."""
    leave(out, "table2", trained(out, scale, of_models(scale, tuple(TABLE_2))), TABLE_2)


def table3(out: Path, scale: Scale) -> None:
    """Accuracies of five runs without batch norm, homotopy on the convolutions."""
    curves = trained(out, scale, without_batch_norm(scale))
    rows = [
        {"network": model, "method": name, "work": curve.work, "accuracy, %": spread(curve.last())}
        | {"max, %": max(curve.last()), "best epochs' max, %": max(curve.best())}
        | {"paper, %": TABLE_3[model] if name == HTA else ""}
        for (model, name), curve in curves.items()
    ]
    write(out, "table3", rows, curves)


def figure2(out: Path, scale: Scale) -> None:
    """VGG13, homotopy on the fully connected layers."""
    curves = trained(out, scale, of_models(scale, ("vgg13",), partition="layer_blocks", part="classifier"))
    leave(out, "figure2", curves, FIGURE_2)


def figure3(out: Path, scale: Scale) -> None:
    """Table 3's networks, both methods, over the epochs."""
    leave(out, "figure3", trained(out, scale, without_batch_norm(scale)), FIGURE_3)


def dropout(out: Path, scale: Scale) -> None:
    """The paper's future work: every weight of the classifier draws anew which copy is free on it, θ̃ = 0, so that the other
    copy's weight decays as if it were left out; beside plain dropout, and neither."""
    plain = replace(scale.settings, dropout=0.0)
    masks = {"partition": "hashed", "part": "classifier", "anchor": "zero"}
    neither, dropped = methods(plain), methods(scale.settings)
    wanted = {
        "neither": neither[SGD],
        "neither, equal work": neither[EQUAL_WORK],
        "dropout": dropped[SGD],
        "dropout, equal work": dropped[EQUAL_WORK],
        "HTA, masks of an epoch": methods(plain, **masks)[HTA],
        "HTA, masks of a step": methods(plain, **masks, resample="step")[HTA],
    }
    leave(out, "dropout", trained(out, scale, {("vgg11", name): settings for name, settings in wanted.items()}), {})


def formats(out: Path, scale: Scale) -> None:
    """HTA whose masters, momentum and anchor are kept in fewer bytes, beside float32's from the same seeds; computed in float32
    all the same."""
    kept: dict[str, dict[str, Any]] = {
        FLOAT32: {},
        "bfloat16 momentum, anchor": {"state_format": "bfloat16", "anchor_format": "bfloat16"},
        "split masters": {"master_format": "split"},
        "split, bfloat16": {"master_format": "split", "state_format": "bfloat16", "anchor_format": "bfloat16"},
        "split, 8-bit": {"master_format": "split", "state_format": "8bit", "anchor_format": "bfloat16"},
    }
    shared = replace(scale.settings, method="hta", precision="fp32")
    few = replace(
        shared, train_images=min(shared.train_images or 2_000, 2_000), epochs=min(shared.epochs, 8), epochs_per_L=1
    )
    digits = replace(Settings(), method="hta", seeds=1, device=shared.device)

    def in_all(settings: Settings) -> dict[tuple[str, str], Settings]:
        return {(settings.dataset, name): replace(settings, **options) for name, options in kept.items()}

    curves = trained(out, scale, in_all(few))
    if scale.name != "quick":  # these take seconds, and differ more
        curves |= trained(out, replace(scale, seeds=max(scale.seeds, 30)), in_all(digits))
    rows: list[Row] = []
    for (dataset, name), curve in curves.items():
        base = curves[dataset, FLOAT32].last()
        difference, half = interval([b - a for a, b in zip(curve.last(), base, strict=True)])
        rows.append(
            {"dataset": dataset, "seeds": len(base), "method": name, "work": curve.work}
            | {"error, %": spread([100 - accuracy for accuracy in curve.last()])}
            | {f"minus {FLOAT32}": f"{difference:.2f}", "± 95 %": f"{half:.2f}"}
        )
    write(out, "formats", rows, curves)


def leave(
    out: Path, name: str, curves: Mapping[tuple[str, str], Curve], paper: Mapping[str, tuple[float, float]]
) -> None:
    """Leaves a table of errors with the paper's, of SGD and HTA for each network, beside ours.

    "best epoch" is the paper's habit: the test set chooses the epoch. "improvement" is the paper's rate, over SGD at the
    last epoch.
    """
    rows: list[Row] = []
    for (model, method), curve in curves.items():
        theirs = dict(zip((SGD, HTA), paper.get(model, ()), strict=False))
        their_rate = f"{_rate(*theirs.values()):.1f}" if theirs and method == HTA else ""
        errors = [100 - accuracy for accuracy in curve.last()]
        base = curves.get((model, SGD))
        rate = "" if base is None or method == SGD else f"{improvement(base, curve):.1f}"
        rows.append(
            {"network": model, "method": method, "work": curve.work, "error, %": spread(errors)}
            | {"best epoch, %": spread([100 - accuracy for accuracy in curve.best()]), "improvement, %": rate}
            | {"paper's error, %": theirs.get(method, ""), "its improvement, %": their_rate}
        )
    write(out, name, rows, curves)


def write(out: Path, name: str, rows: list[Row], curves: Mapping[tuple[str, str], Curve]) -> None:
    """Prints a table, and writes it, all epochs, and a picture."""
    say(markdown(rows))
    save_csv(out / f"{name}.csv", rows)
    save_csv(out / f"{name}-epochs.csv", epochs(curves))
    save_figure(out / f"{name}.png", figure(curves))


def improvement(base: Curve, curve: Curve) -> float:
    """By how much of its mean error another method's is lower, in %."""
    return _rate(*(100 - statistics.fmean(c.last()) for c in (base, curve)))


def _rate(before: float, after: float) -> float:
    return 100 * (before - after) / before if before else 0.0


def epochs(curves: Mapping[tuple[str, str], Curve]) -> list[Row]:
    return [{"network": model} | row for (model, name), curve in curves.items() for row in curves_csv({name: curve})]


def figure(curves: Mapping[tuple[str, str], Curve]) -> Any:
    """Test error over the epochs, a panel for each network: the mean of the seeds and their range, named at its end."""
    with needs("paper"):
        from matplotlib.ticker import MaxNLocator

    models = list(dict.fromkeys(model for model, _ in curves))
    size = 5.2 * len(models), 3.8
    figure, axes = pyplot().subplots(1, len(models), figsize=size, layout="constrained", squeeze=False)
    for panel, model in zip(axes[0], models, strict=True):
        mine = {method: curve for (of, method), curve in curves.items() if of == model}
        ends: list[tuple[float, float, str, str]] = []
        for number, (method, curve) in enumerate(mine.items()):
            color = of_method(method, number)
            errors = [[100 - row["test_accuracy"] for row in at] for at in zip(*curve.seeds, strict=True)]
            means, where = list(map(statistics.fmean, errors)), range(1, len(errors) + 1)
            panel.fill_between(
                where, list(map(min, errors)), list(map(max, errors)), color=color, alpha=0.2, linewidth=0
            )
            panel.plot(where, means, color=color)
            ends.append((means[-1], len(errors), f"{method}: {means[-1]:.1f} %", color))
            apart = [row["epoch"] for row in curve.seeds[0] if row["copies"] > 1]
            if apart:
                panel.axvline(apart[-1] + 0.5, color="0.5", linewidth=0.8, linestyle=":")
        later = [100 - row["test_accuracy"] for curve in mine.values() for rows in curve.seeds for row in rows[1:]]
        low, high = min(later), max(later)
        panel.set_ylim(low - 0.08 * (high - low) - 1, high + 1)
        name_ends(panel, ends)
        panel.set(title=model.upper(), xlabel="epoch (dotted: the copies merge)", ylabel="test error, %")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.grid(alpha=0.3)
    return figure
