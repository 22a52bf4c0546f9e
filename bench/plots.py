"""The benchmarks' pictures: a roofline, bars of ratios, scaling lines."""

from pathlib import Path
from typing import Any

from hta_fused.extras import needs
from hta_fused.pictures import OURS as COLOR_OURS
from hta_fused.pictures import RIVAL as COLOR_RIVAL
from hta_fused.pictures import THEIRS as COLOR_THEIRS
from hta_fused.pictures import name_ends

from .measure import AXES, MIX, PEAK, ROOFS, over_base


def _color(name: str) -> str:
    """Ours and what is measured against it; see hta_fused/pictures.py."""
    ours = (
        name.startswith(("CoupledOptimizer", "HomotopySGD", "HTA", "ours", "float32", "bfloat16", "split"))
        or "side by side" in name
    )
    return COLOR_OURS if ours else COLOR_RIVAL if name == "DDP" else COLOR_THEIRS


def _pyplot() -> Any:
    with needs("bench"):
        import matplotlib
        from matplotlib import pyplot
    matplotlib.use("Agg")
    return pyplot


def _panels(count: int, width: float, height: float, columns: int):
    """A figure with `count` panels, at most `columns` of them in a row."""
    columns = min(count, columns)
    rows = -(-count // columns)
    figure, axes = _pyplot().subplots(
        rows, columns, figsize=(columns * width, rows * height), layout="constrained", squeeze=False
    )
    for axis in axes.flat[count:]:
        axis.remove()
    return figure, axes.flatten()[:count]


def _save(figure, path: Path, caption: str) -> None:
    figure.suptitle(caption, fontsize=9)
    figure.savefig(path, dpi=110)
    _pyplot().close(figure)


def _bars(axis, names: list[str], values: list[float], form: str, inside: bool = False) -> None:
    bars = axis.barh(names, values, color=[_color(name) for name in names])
    axis.bar_label(bars, fmt=form, **(dict(label_type="center", color="white") if inside else dict(padding=3)))
    axis.invert_yaxis()
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_xlim(0, max(values) * 1.18)


def ratios(results: list[dict[str, Any]], path: Path, caption: str) -> None:
    """How many times as long as ours each rival takes, a panel per workload."""
    results = [result for result in results if "times" in result]
    figure, axes = _panels(len(results), 7, 3.4, columns=2)
    for axis, result in zip(axes, results, strict=True):
        over = over_base(result)
        names = sorted((n for n in over if n not in (*ROOFS, MIX)), key=lambda n: over[n][0])
        _bars(axis, names, [over[n][0] for n in names], "%.2f×")
        axis.set_title(result["title"], fontsize=10, loc="right")
        axis.set_xlabel(f"time over {result['base']}")
    _save(figure, path, caption)


def memory(results: list[dict[str, Any]], path: Path, caption: str) -> None:
    """The peak of a training step in each format, a panel for each network."""
    figure, axes = _panels(len(results), 7, 3.0, columns=2)
    for axis, result in zip(axes, results, strict=True):
        _bars(axis, [row["format"] for row in result["rows"]], [float(row[PEAK]) for row in result["rows"]], "%.0f")
        axis.set_title(result["title"], fontsize=10, loc="right")
        axis.set_xlabel(PEAK)
    _save(figure, path, caption)


def roofline(result: dict[str, Any], path: Path, caption: str) -> None:
    """Useful bandwidth: the bytes that a step must touch over its time, for ours and every rival, under the roof."""
    figure, (axis,) = _panels(1, 8.5, 4.2, columns=1)
    needed = result["bytes"][result["base"]] * result["elements"]
    roof = max(v for n, v in result["bandwidth"].items() if n in ROOFS) / 1e9
    names = sorted((n for n in result["times"] if n not in (*ROOFS, MIX)), key=lambda n: result["times"][n][0])
    values = []
    for name in names:  # SGD without homotopy needs fewer bytes
        useful = result["bandwidth"][name] if "plain " in name else needed / result["times"][name][0]
        values.append(useful / 1e9)
    _bars(axis, names, values, "%.1f", inside=True)
    axis.axvline(roof, color="black", linestyle="--", linewidth=1)
    axis.annotate(f" roof: {roof:.1f} GB/s", (roof, len(names) - 0.6), va="top")
    axis.set_title(result["title"], fontsize=10)
    axis.set_xlabel("GB/s: the bytes that a fused step needs, over the time taken")
    axis.set_xlim(0, 1.25 * max(*values, roof))
    _save(figure, path, caption)


def scaling(results: list[dict[str, Any]], path: Path, caption: str) -> None:
    """Time against size, number of tensors, threads and copies, of the results that have such an axis."""
    results = [result for result in results if any(k in result for k in AXES)]
    figure, axes = _panels(len(results), 5.5, 4, columns=3)
    for axis, result in zip(axes, results, strict=True):
        key = next(k for k in AXES if k in result)
        lines = {name: [1e3 * v for v in values] for name, values in result.items()
                 if isinstance(values, list) and name not in (key, "claims") and "skipping" not in name}  # fmt: skip
        for name, y in lines.items():
            ours = _color(name) == COLOR_OURS
            axis.plot(result[key], y, "o-", color=_color(name), linewidth=2.5 if ours else 1.4, zorder=3 if ours else 2)
        axis.set_title(result["title"], fontsize=10)
        axis.set(xlabel={"sizes": "elements", "counts": "tensors"}.get(key, key), ylabel="ms")
        if key in ("threads", "copies"):
            axis.set_xticks(result[key])
            axis.set_ylim(0, 1.1 * max(map(max, lines.values())))
        else:
            axis.set(xscale="log", yscale="log")
        name_ends(axis, [(y[-1], result[key][-1], name, _color(name)) for name, y in lines.items()])
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.3)
    _save(figure, path, caption)


def distributed(results: list[dict[str, Any]], path: Path, caption: str) -> None:
    """Above, step times as measured, with the model's beside them; below, the model's against the network's bandwidth."""
    seen, curves = [r for r in results if "processes" in r], [r for r in results if "net" in r]
    rows = -(-len(curves) // 3)
    figure = _pyplot().figure(figsize=(15, 4.4 * (1 + rows)), layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=[1, rows])
    above, below = parts
    for axis, result in zip(above.subplots(1, len(seen), sharey=True, squeeze=False)[0], seen, strict=True):
        names = [name for name in result["times"] if name in result["sent"]]
        milliseconds = [1e3 * result["times"][name][0] for name in names]
        _bars(axis, names, milliseconds, "%.1f", inside=True)
        axis.plot([1e3 * result["modelled"][name] for name in names], names, "k|", markersize=16)
        axis.set_title(result["title"].replace(": ", "\n"), fontsize=9)
        axis.set_xlabel("ms a step, the slowest process (|: as modelled)")
        last = len(names) - 1
        axis.annotate(
            "| the model's", (max(milliseconds), last), (1.02 * max(milliseconds), last), va="center", fontsize=8
        )
    above.axes[0].set_ylim(len(names) - 0.5, -0.5)  # shared, and so turned round once for each
    for axis, result in zip(below.subplots(rows, 3, squeeze=False).flat, curves, strict=True):
        _curves(axis, result)
        axis.set_title(f"The model: {result['net']}, {result['workers']} workers", fontsize=9)
        axis.set(xlabel="Gbit/s", ylabel="ms a step")
    _save(figure, path, caption)


def _curves(axis, result: dict[str, Any]) -> None:
    """Step times over bandwidths, each named where it begins; names that would meet are moved apart."""
    x = result["Gbit/s"]
    lines = {name: [1e3 * v for v in values] for name, values in result.items()
             if isinstance(values, list) and name != "Gbit/s"}  # fmt: skip
    axis.set(xscale="log", yscale="log")
    low, high = min(map(min, lines.values())) * 0.8, max(map(max, lines.values())) * 1.25
    gap = (high / low) ** 0.062  # a label's height
    place = 0.0
    for name, y in sorted(lines.items(), key=lambda line: line[1][0]):
        color = _color(name)
        style = "--" if "bf16" in name else "-"
        axis.plot(x, y, style, color=color, linewidth=1.2 if "k = 64" in name else 2)
        place = max(y[0], place * gap)
        axis.annotate(name, (x[0], y[0]), xytext=(x[0] / 1.25, place), textcoords="data", color=color,
                      ha="right", va="center", fontsize=8)  # fmt: skip
    axis.set_xlim(x[0] / 18, x[-1])
    axis.set_ylim(low, max(high, place * gap))
    axis.set_xticks([1, 10, 100, 400], ["1", "10", "100", "400"])
    axis.minorticks_off()
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.3)
