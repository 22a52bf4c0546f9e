"""The documents: every ```python block runs, each file's in one namespace, and every relative link leads somewhere.

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


# ------------------------------------------------------------------------------------------------------------- links

LINK = re.compile(r"!?\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^()\s]+)\)")
LINKED = [*PAGES, ROOT / "CHANGELOG.md"]


def prose(text: str) -> str:
    """A page without its blocks and pieces of code."""
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))


def anchors(text: str) -> set[str]:
    """What a forge names a page's headings."""
    found: set[str] = set()
    blocks_out = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    for heading in re.findall(r"^#+ +(.+?) *$", blocks_out, re.MULTILINE):
        name = re.sub(r"[^\w\- ]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()).replace(" ", "-")
        again = sum(other == name or re.fullmatch(re.escape(name) + r"-\d+", other) is not None for other in found)
        found.add(f"{name}-{again}" if again else name)
    return found


def broken(page: Path, text: str) -> list[str]:
    """The relative links of a page that lead nowhere."""
    wrong = []
    for target in LINK.findall(prose(text)):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        there = (page.parent / name).resolve() if name else page
        if not (there.exists() and there.is_relative_to(ROOT)) or (
            anchor and (there.suffix != ".md" or anchor not in anchors(there.read_text(encoding="utf-8")))
        ):
            wrong.append(target)
    return wrong


@pytest.mark.parametrize("page", LINKED, ids=lambda path: path.name)
def test_every_relative_link_and_anchor_is_there(page):
    assert broken(page, page.read_text(encoding="utf-8")) == []


def test_a_broken_link_is_found():
    text = "# A b: `c`\n[x](#a-b-c) [y](#nowhere) [z](no.md) ![p](no.png) `[code](no.md)` [u](https://a.b/c)\n"
    page = ROOT / "docs" / "design.md"
    assert anchors(text) == {"a-b-c"}
    assert broken(page, text.replace("#a-b-c", "couplings.md#propose-sum-share")) == ["#nowhere", "no.md", "no.png"]


def test_the_index_leads_to_every_page():
    index = ROOT / "docs" / "index.md"
    linked = {target.partition("#")[0] for target in LINK.findall(index.read_text(encoding="utf-8"))}
    assert {path.name for path in index.parent.glob("*.md")} - {"index.md"} <= linked


def test_the_commands_that_the_readme_names_are_targets():
    named = set(re.findall(r"^make (\w+)", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE))
    assert {"train", "test"} <= named
    assert named <= set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
