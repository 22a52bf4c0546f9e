"""The packages that only a part of hta_fused imports, and the extras that install them. Imports nothing of the package."""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager

# What each extra of pyproject.toml must bring. An extra bears the name of the subpackage that needs it.
EXTRAS = {
    "path": ("scipy",),
    "train": ("matplotlib", "sklearn", "tqdm"),
    "paper": ("matplotlib", "scipy", "sklearn", "tqdm"),
    "bench": ("matplotlib",),
}


@contextmanager
def needs(extra: str) -> Iterator[None]:
    """Goes around the imports of what an extra brings, so that an error names the extra.

    Raises:
        ModuleNotFoundError: one line, such as "hta_fused.path needs scipy: pip install 'hta_fused[path]'".
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(_line(extra, str(error.name).split(".")[0]), name=error.name) from None


def missing(extra: str) -> str:
    """The same line about the first package of an extra that is not installed; empty if all are."""
    absent = (module for module in EXTRAS[extra] if importlib.util.find_spec(module) is None)
    return next((_line(extra, module) for module in absent), "")


def _line(extra: str, module: str) -> str:
    package = "hta_fused_bench" if extra == "bench" else f"hta_fused.{extra}"
    return f"{package} needs {module}: pip install 'hta_fused[{extra}]'"
