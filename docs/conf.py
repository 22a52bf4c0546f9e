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
myst_links_external_new_tab = True
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
    """Makes pages of what is written for a forge: links to folders, which a page cannot list, become text, and what the
    index links to is the table of contents."""
    here = (ROOT / name).parent
    if name == root_doc:
        pages = "\n".join(link[2] for link in LINK.finditer(source[0]))
        source[0] += f"\n```{{toctree}}\n:hidden:\n\n{pages}\n```\n"
    source[0] = LINK.sub(lambda link: link[1] if (here / link[2]).is_dir() else link[0], source[0])


def setup(app) -> None:
    app.connect("source-read", for_pages)
