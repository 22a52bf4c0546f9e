"""What an experiment leaves: lines and tables in the terminal, CSV files, pictures. Imports matplotlib when it is called."""

import csv
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..extras import needs
from ..files import save_atomically

Row = dict[str, Any]


def progress(items: Iterable[Any], caption: str, total: int | None = None) -> Iterable[Any]:
    """The items, with a bar in a terminal."""
    with needs("paper"):
        from tqdm import tqdm

    return tqdm(items, desc=caption, total=total, leave=False, disable=not sys.stderr.isatty())


def say(text: str) -> None:
    """Prints a line above the bars."""
    with needs("paper"):
        from tqdm import tqdm

    tqdm.write(text, file=sys.stdout)


def markdown(rows: list[Row]) -> str:
    """The rows as a Markdown table."""
    heads = list(rows[0])
    lines = [f"| {' | '.join(heads)} |", "|" + " --- |" * len(heads)]
    for row in rows:
        cells = (f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values())
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def save_csv(path: Path, rows: list[Row]) -> None:
    """Writes the rows, whose keys are the first line."""

    def write(partial: Path) -> None:
        with open(partial, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)

    save_atomically(path, write)


def pyplot() -> Any:
    """matplotlib.pyplot, which draws into files."""
    with needs("paper"):
        import matplotlib
        from matplotlib import pyplot
    matplotlib.use("Agg")
    return pyplot


def save_figure(path: Path, figure: Any) -> None:
    """Writes a figure and closes it."""
    save_atomically(path, lambda partial: figure.savefig(partial, dpi=110))
    pyplot().close(figure)


def save_animation(path: Path, figure: Any, animation: Any) -> None:
    """Writes a figure's animation as a GIF and closes the figure."""
    with needs("paper"):
        from matplotlib.animation import PillowWriter

    save_atomically(path, lambda partial: animation.save(partial, writer=PillowWriter(fps=6), dpi=80))
    pyplot().close(figure)
