"""The documents' examples run: every ```python block of README.md and docs, each file's blocks in one namespace.

A block fenced as ```python no-test is left out.
"""

import re
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^```python[ \t]*(?P<note>[^\n]*)\n(?P<code>.*?)^```[ \t]*$", re.MULTILINE | re.DOTALL)
PAGES = [path for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if path.exists()]


def blocks(text: str) -> list[str]:
    """The code of every block that is to run, on the lines it has in the page."""
    runs = [match for match in BLOCK.finditer(text) if "no-test" not in match["note"].split()]
    return ["\n" * text.count("\n", 0, match.start("code")) + match["code"] for match in runs]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_the_examples_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # whatever an example writes
    namespace = {"__name__": "__main__"}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for code in blocks(page.read_text(encoding="utf-8")):
            exec(compile(code, str(page), "exec"), namespace)


def test_blocks_keep_their_lines_and_those_marked_no_test_are_left_out():
    text = "a\n```python\nx = 1\n```\n```python no-test\n1/0\n```\n```sh\nls\n```\n```python\ny = x\n```\n"
    assert [code.lstrip("\n") for code in blocks(text)] == ["x = 1\n", "y = x\n"]
    assert [code.count("\n") for code in blocks(text)] == [3, 12]
