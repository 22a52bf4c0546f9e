"""Files that are always whole, whenever the process is killed; what may name one, and what one holds. Imports nothing of the
package."""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def save_atomically(path: Path, write: Callable[[Path], Any], keep: Path | None = None) -> None:
    """Has `write` write a partial file in `path`'s folder, and gives it `path`'s name once it is on the disk.

    What a killed process leaves has one name, which the next write takes over. What `path` held before is kept as
    `keep`, if that is given; a process killed between the two renamings leaves `keep` alone.
    """
    partial = path.with_name(f".part-{path.name}")
    try:
        write(partial)
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        if keep is not None and path.exists():
            os.replace(path, keep)
        os.replace(partial, path)
    except OSError as error:
        if error.errno is not None:  # the system's own
            error.filename = str(path)  # of the file that was wanted
        raise
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    save_atomically(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def write_json(path: Path, content: Any) -> None:
    write_text(path, as_json(content, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """What a file of JSON holds.

    Raises:
        ValueError: it is none.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def is_path(value: Any) -> bool:
    """Whether a value can name a file or a folder: "", which pathlib takes for the current one, can not."""
    return isinstance(value, str | os.PathLike) and bool(str(value)) and "\0" not in str(value)


def as_json(content: Any, indent: int | None = None) -> str:
    """JSON that every reader takes: numbers that it has no name for are the strings "inf", "-inf" and "nan"."""

    def named(value: Any) -> Any:
        if isinstance(value, float) and not math.isfinite(value):
            return str(value)
        if isinstance(value, dict):
            return {key: named(entry) for key, entry in value.items()}
        return [named(entry) for entry in value] if isinstance(value, list | tuple) else value

    return json.dumps(named(content), indent=indent, allow_nan=False)
