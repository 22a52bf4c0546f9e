"""The benchmarks' pictures: a roofline, bars of ratios, scaling lines."""

from pathlib import Path
from typing import Any

from .measure import GUARDED, OURS

OUR_COLOR, THEIR_COLOR = "#1b7f5c", "#9aa3ad"


def _figure(width: float, height: float, panels: int = 1):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt.subplots(1, panels, figsize=(width, height), layout="constrained", squeeze=False)


def _bars(axis, names: list[str], values: list[float], ours: set[str], form: str) -> None:
    bars = axis.barh(names, values, color=[OUR_COLOR if n in ours else THEIR_COLOR for n in names])
    axis.bar_label(bars, fmt=form, padding=3)
    axis.invert_yaxis()
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_xlim(0, max(values) * 1.18)


def ratios(results: list[dict[str, Any]], path: Path, caption: str) -> None:
    """How many times as long as ours each rival takes, a panel per workload."""
    figure, axes = _figure(6.5 * len(results), 3.6, len(results))
    for axis, result in zip(axes[0], results, strict=True):
        times, base = result["times"], result["times"][result["base"]][0]
        names = sorted((n for n in times if not n.startswith("triad") and n != GUARDED), key=lambda n: times[n][0])
        _bars(axis, names, [times[n][0] / base for n in names], {result["base"]}, "%.2f×")
        axis.set(title=result["title"], xlabel=f"time over {result['base']}")
    figure.suptitle(caption, fontsize=9)
    figure.savefig(path, dpi=130)


def roofline(result: dict[str, Any], path: Path, caption: str) -> None:
    """Useful bandwidth: the bytes that a step must touch over its time, for ours and every rival, under the triad."""
    figure, axes = _figure(8, 4)
    needed = result["bytes"][OURS] * result["elements"]
    roof = max(v for n, v in result["bandwidth"].items() if n.startswith("triad"))
    names = sorted((n for n in result["times"] if not n.startswith("triad")), key=lambda n: result["times"][n][0])
    values = []
    for name in names:
        moved = result["bandwidth"][name] if "plain SGD" in name else needed / result["times"][name][0]
        values.append(moved / 1e9)
    _bars(axes[0][0], names, values, {OURS, GUARDED}, "%.1f")
    axes[0][0].axvline(roof / 1e9, color="black", linestyle="--", linewidth=1)
    axes[0][0].text(roof / 1e9, -0.7, f"triad {roof / 1e9:.1f} GB/s", ha="right", va="bottom", fontsize=9)
    axes[0][0].set(title=result["title"], xlabel="GB/s: bytes a fused step needs over the time taken")
    axes[0][0].set_xlim(0, 1.15 * max(*values, roof / 1e9))
    figure.suptitle(caption, fontsize=9)
    figure.savefig(path, dpi=130)


def scaling(results: list[dict[str, Any]], path: Path, caption: str) -> None:
    """Time against size, number of tensors and threads."""
    figure, axes = _figure(5 * len(results), 4, len(results))
    for axis, result in zip(axes[0], results, strict=True):
        key = next(k for k in ("sizes", "counts", "threads") if k in result)
        for name, values in result.items():
            if isinstance(values, list) and name not in (key, "claims") and name != GUARDED:
                mine = name == OURS
                axis.plot(result[key], [1e3 * v for v in values], "o-", color=OUR_COLOR if mine else None,
                          linewidth=2.5 if mine else 1.2, zorder=3 if mine else 2, label=name)  # fmt: skip
        axis.set(title=result["title"], xlabel={"sizes": "elements", "counts": "tensors"}.get(key, key), ylabel="ms")
        if key != "threads":
            axis.set(xscale="log", yscale="log")
        else:
            axis.set_xticks(result[key])
            axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.suptitle(caption, fontsize=9)
    figure.savefig(path, dpi=130)
