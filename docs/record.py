"""Draws a finished run's terminal as an animated SVG, from what its folder says: python docs/record.py FOLDER terminal.svg

The lines are those that hta-train printed, by the same functions. Their times are the epochs' own, all shortened alike.
"""

import json
import sys
from html import escape
from pathlib import Path

from hta_fused.files import write_text
from hta_fused.train import report

ROWS, WIDTH, HEIGHT = 34, 7.3, 16  # lines of the terminal; of a character, in pixels
LENGTH = 20.0  # seconds that the recording takes
PAGE = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height}" font-family="monospace" font-size="12">
<style>text {{ fill: #d7dce0; white-space: pre; animation: 1ms backwards appear; }} .typed {{ fill: #6cc2a1; }}
@keyframes appear {{ from {{ opacity: 0; }} }}
#screen {{ transform: translateY({end}px); animation: {length}s step-end scroll; }}
@keyframes scroll {{ {frames} }}</style>
<rect width="100%" height="100%" rx="6" fill="#1d2329"/>
<svg x="10" y="8" width="{inner:.0f}" height="{window}"><g id="screen">
{lines}
</g></svg></svg>
"""


def lines_of(folder: Path) -> list[tuple[float, str]]:
    """(seconds since the start, line) of all that the run printed."""
    metrics = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [{k: report_number(v) for k, v in json.loads(line).items()} for line in metrics]
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    ends = {run: summary["runs"][run]["epochs"] for run in summary["runs"]}
    time, found = 0.0, [(0.0, "$ make train"), (0.0, ".venv/bin/hta-train")]
    for row in rows:
        time += row["seconds"]
        found += [(time, line) for line in report.describe(row, ends[row["run"]]).splitlines()]
    words = report.in_words(summary, folder, f"hta-seed{rows[-1]['seed']}.pt", ".venv/bin/hta-train")
    return found + [(time, line) for line in ["", *report.table(summary).splitlines(), "", *words.splitlines()]]


def report_number(value: object) -> object:
    """The inverse of files.as_json, which has names for what JSON has no numbers for."""
    return float(value) if value in ("nan", "inf", "-inf") else value  # type: ignore[arg-type]


def svg(lines: list[tuple[float, str]]) -> str:
    """The recording: each line appears at its time, and the screen scrolls where it is full."""
    total = lines[-1][0]
    texts, frames = [], ["0% { transform: none; }"]
    for number, (time, line) in enumerate(lines):
        kind = ' class="typed"' if line.startswith("$") else ""
        delay = f"{LENGTH * time / total:.2f}s"
        texts.append(
            f'<text{kind} y="{HEIGHT * (number + 1) - 4}" style="animation-delay: {delay}">{escape(line)}</text>'
        )
        if number >= ROWS:
            frames.append(f"{100 * time / total:.2f}% {{ transform: translateY({-HEIGHT * (number + 1 - ROWS)}px); }}")
    width = WIDTH * max(len(line) for _, line in lines)
    end = -HEIGHT * max(0, len(lines) - ROWS)
    return PAGE.format(width=width + 20, height=HEIGHT * ROWS + 16, inner=width, window=HEIGHT * ROWS, length=LENGTH, end=end,
                       frames=" ".join(frames), lines="\n".join(texts))  # fmt: skip


if __name__ == "__main__":
    write_text(Path(sys.argv[2]), svg(lines_of(Path(sys.argv[1]))))
