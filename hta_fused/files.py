"""Files that are always whole, whenever the process is killed. Imports nothing of the package."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def save_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Has `write` write a partial file in `path`'s folder, and gives it `path`'s name once it is on the disk.

    What a killed process leaves has one name, which the next write takes over.
    """
    partial = path.with_name(f".part-{path.name}")
    try:
        write(partial)
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    save_atomically(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def write_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=2) + "\n")
