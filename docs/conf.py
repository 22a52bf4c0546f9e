"""Sphinx's settings, for `make docs`. The sources are the repository's own Markdown, which reads as well without it."""

import re
from pathlib import Path

import hta_fused

ROOT = Path(__file__).parent.parent

project = "hta_fused"
author = "The hta_fused developers"
version = release = hta_fused.__version__
extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "myst_parser"]
root_doc = "docs/index"
include_patterns = ["README.md", "docs/**"]  # the source folder is the repository, so that links lead as on a forge
exclude_patterns = ["docs/requirements.txt"]
html_theme = "furo"
html_title = f"hta_fused {version}"

myst_heading_anchors = 4
default_role = "literal"  # `name` in a docstring
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_type_aliases = {"Rows": "Rows", "Part": "Part", "Proposal": "Proposal", "Function": "Function"}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
nitpicky = True
# Other projects' names are not looked up: that would take the internet.
nitpick_ignore_regex = [(r"py:.*", r"(?!hta_fused\.).*")]


LINK = re.compile(r"\[([^\]]*)\]\(([^)#:\s]+)\)")


def for_pages(app, name: str, source: list[str]) -> None:
    """Makes pages of what is written for a forge: a link to a folder, which a page cannot list, becomes text, one to a
    report of measurements a download, and what the index links to is the table of contents."""
    here = (ROOT / name).parent

    def link(match: re.Match[str]) -> str:
        text, target = match.groups()
        if (here / target).is_dir():
            return text
        return f"{{download}}`{text} <{target}>`" if "bench/" in target and target.endswith(".md") else match[0]

    if name == root_doc:
        pages = "\n".join(match[2] for match in LINK.finditer(source[0]))
        source[0] += f"\n```{{toctree}}\n:hidden:\n\n{pages}\n```\n"
    source[0] = LINK.sub(link, source[0])


def setup(app) -> None:
    app.connect("source-read", for_pages)
