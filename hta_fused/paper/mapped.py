"""The coupled step's map for two copies, in pictures: of what the new θ is made, and where a pair of proposals goes."""

from pathlib import Path
from typing import Any

import numpy as np

from ..pictures import ETA, THETA
from ..tables import implicit
from .report import Row, markdown, pyplot, save_csv, save_figure, say

GAMMA = 1.0  # lr 0.1 with momentum 0.9
LABELS = {1: "its anchored block", 2: "its free block", 0: "in no block"}  # of θ
PROPOSALS, ANCHOR = (2.0, 0.5), 0.0  # (a_θ, a_η) and θ̃ of the pair that the last panel follows


def run(out: Path, quick: bool) -> None:
    """The map's rows over L, and their pictures."""
    Ls = np.geomspace(100, 0.01, 9 if quick else 161).tolist()
    rows = table(Ls)
    save_csv(out / "map.csv", rows)
    say(markdown([row for row in rows if row["L"] in (Ls[0], Ls[len(Ls) // 2], Ls[-1])]))
    save_figure(out / "map.png", picture(Ls, rows))


def table(Ls: list[float]) -> list[Row]:
    """For each L and label, the parts of a_θ, a_η and θ̃ in the new θ and the new η."""
    return [
        {"L": L, "label": label, "copy": copy}
        | dict(zip(("a_theta", "a_eta", "anchor"), implicit(L, GAMMA)[label, number].tolist(), strict=True))
        for L in Ls
        for label in (0, 1, 2)
        for number, copy in enumerate(("theta", "eta"))
    ]


def picture(Ls: list[float], rows: list[Row]) -> Any:
    """A panel for each label with the parts of the new θ, and one in the plane of (θ, η)."""
    figure, axes = pyplot().subplots(1, 4, figsize=(15, 3.9), layout="constrained", width_ratios=[1, 1, 1, 1.25])
    for panel, (label, where) in zip(axes, LABELS.items(), strict=False):
        mine = [row for row in rows if (row["label"], row["copy"]) == (label, "theta")]
        parts = np.array([[row[name] for row in mine] for name in ("anchor", "a_theta", "a_eta")])
        panel.stackplot(Ls, parts, colors=["#d9d4c7", THETA, ETA], linewidth=0)
        panel.set(xscale="log", xlim=(Ls[0], Ls[-1]), ylim=(0, 1), xlabel="L, falling", title=f"the new θ, {where}")
        middles = parts.cumsum(0) - parts / 2
        for part, middle, name in zip(parts, middles, ("anchor θ̃", "a_θ", "a_η"), strict=True):
            if part.max() > 0.05:
                at = int(np.argmax(part))
                at = min(max(at, len(Ls) // 6), len(Ls) - len(Ls) // 6 - 1)
                panel.text(
                    Ls[at], middle[at], name, ha="center", va="center", color="black" if "θ̃" in name else "white"
                )
        panel.set_yticks([0, 0.5, 1], ["0", "½", "1"])
    _plane(axes[-1], Ls, rows)
    return figure


def _plane(panel: Any, Ls: list[float], rows: list[Row]) -> None:
    """Where one pair of proposals goes as L falls, for each label."""
    low, high = -0.25, 2.35
    panel.plot([low, high], [low, high], color="0.7", linewidth=1)
    panel.annotate("θ = η", (2.05, 2.05), (-6, 4), textcoords="offset points", color="0.5", ha="right")
    for label, name, place in ((0, "in no block", (8, 2)), (1, "θ anchored", (-68, 6)), (2, "η anchored", (6, -10))):
        pairs = np.array(
            [
                [sum(row[k] * v for k, v in zip(("a_theta", "a_eta", "anchor"), (*PROPOSALS, ANCHOR), strict=True))
                 for row in rows if (row["label"], row["L"]) == (label, L)]
                for L in Ls
            ]
        )  # fmt: skip
        panel.plot(*pairs.T, color="0.25", linewidth=1.6)
        middle = len(pairs) // 2
        panel.annotate("", pairs[middle + 1], pairs[middle - 1], arrowprops={"arrowstyle": "-|>", "color": "0.25"})
        panel.annotate(name, pairs[middle], place, textcoords="offset points", fontsize=9)
    panel.plot(*PROPOSALS, "kx", markersize=9, markeredgewidth=2)
    panel.annotate("proposals", PROPOSALS, (0, -16), textcoords="offset points", ha="center", weight="bold")
    panel.plot(ANCHOR, ANCHOR, "s", color="#a89f87", markersize=8)
    panel.annotate("anchor", (ANCHOR, ANCHOR), (8, -4), textcoords="offset points", color="#7d7560")
    panel.set(xlim=(low, high), ylim=(low, high), title="the pair, as L falls", aspect="equal")
    panel.set_xlabel("θ", color=THETA)
    panel.set_ylabel("η", color=ETA)
