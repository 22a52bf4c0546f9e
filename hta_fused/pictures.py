"""What all pictures share, the trainer's, the paper's and the benchmarks': one colour for one thing, and names beside lines.

Green is what this package does, grey what it is measured against: light for the plain rival, dark for the one that is given
the same work or the same bytes. Red and blue are the two copies. Imports nothing.
"""

from typing import Any

OURS, THEIRS, RIVAL = "#1b7f5c", "#9aa3ad", "#59636e"
THETA, ETA = "#c8442d", "#2b69b5"
OF_METHOD = {
    "HTA": OURS,
    "SGD": THEIRS,
    "SGD, equal work": RIVAL,
    "local SGD": "#8d5bb3",
    "data-parallel SGD": "#b0498c",
    "SGD + EMA": RIVAL,
    "SGD + SWA": RIVAL,
    "HTA, as in the paper": OURS,
    "tight, loose, merged": "#6cc2a1",
    "neither": THEIRS,
    "neither, equal work": RIVAL,
    "dropout": "#e0a458",
    "dropout, equal work": "#a8651b",
    "HTA, masks of an epoch": OURS,
    "float32": RIVAL,
    "bfloat16 momentum, anchor": "#8d5bb3",
    "split masters": "#e0a458",
    "split, bfloat16": "#6cc2a1",
    "split, 8-bit": OURS,
    "HTA, masks of a step": "#6cc2a1",
}
_OTHERS = ("#4aa3b8", "#7a6a53", "#b5b02b")


def of_method(name: str, number: int = 0) -> str:
    """A method's colour; one that has none of its own takes number `number` of some others."""
    return OF_METHOD.get(name, _OTHERS[number % len(_OTHERS)])


def name_ends(panel: Any, ends: list[tuple[float, float, str, str]], apart: float = 0.07) -> None:
    """Writes curves' names to the right of all, each at its end's height or as little above as leaves lines `apart`.

    Args:
        panel: matplotlib's axes, with all that is to be in them.
        ends: of each curve (height, where on the horizontal axis, name, colour).
        apart: the height of a line of text, as a part of the panel's.
    """
    panel.get_xlim(), panel.get_ylim()  # so that the limits are what they will be
    to_panel = panel.transData + panel.transAxes.inverted()
    height = -1e9
    for value, where, name, color in sorted(ends):
        height = max(to_panel.transform((where, value))[1], height + apart)
        panel.annotate(name, (where, value), (1.03, height), textcoords="axes fraction", color=color, va="center", fontsize=8,
                       annotation_clip=False, arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.5, "relpos": (0, 0.5), "shrinkA": 0})  # fmt: skip
