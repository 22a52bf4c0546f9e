"""A run's folder on the disk: its lock, its checkpoint and the one before. Knows nothing of what they hold."""

import hashlib
import io
import os
import platform
import shutil
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..files import save_atomically
from .team import Team

try:
    import fcntl
except ImportError:  # not a Unix: no lock
    fcntl = None  # type: ignore[assignment]

_SEAL = b"\nSHA-256 %s\n"  # ends a checkpoint; torch.load does not mind it
_SEAL_SIZE = len(_SEAL) - 2 + 64

Content = dict[str, Any]


class Refused(ValueError):
    """A checkpoint is not to be used; says why."""


class Folder:
    """A run's folder, which one process at a time holds.

    checkpoint.pt is the truth about the run: a torch file that ends in the SHA-256 of the rest. checkpoint.previous.pt
    is the one before, which serves where the newest does not.

    Args:
        path: the folder, which exists.

    Raises:
        BlockingIOError: another process holds it.
    """

    def __init__(self, path: Path):
        self.path = path
        self._lock = open(path / ".lock", "a+", encoding="utf-8")  # noqa: SIM115  # held until close() or death
        try:
            if fcntl is not None:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.seek(0)
            holder = self._lock.read().strip() or "another process"
            self._lock.close()
            raise BlockingIOError(f"{path} is in use by {holder}: one run, one process") from None
        except OSError as error:
            warnings.warn(f"{path} cannot be locked ({error}): see to it that no other process uses it", stacklevel=2)
        self._lock.truncate(0)
        self._lock.write(f"process {os.getpid()} on {platform.node()}")
        self._lock.flush()

    def close(self) -> None:
        """Lets go of the folder."""
        self._lock.close()

    @property
    def checkpoint(self) -> Path:
        return self.path / "checkpoint.pt"

    @property
    def previous(self) -> Path:
        return self.path / "checkpoint.previous.pt"

    @staticmethod
    def begun(path: Path) -> bool:
        """Whether there is a run in a folder."""
        return any((path / name).exists() for name in ("checkpoint.pt", "checkpoint.previous.pt"))

    @classmethod
    def create(cls, path: Path, content: Content) -> "Folder":
        """A new folder that holds a checkpoint from the instant that it exists; or one that exists and holds none.

        Raises:
            FileExistsError: it holds a run.
            OSError: it cannot be made or written to; nothing is left behind then.
        """
        taken = FileExistsError(f"{path} already holds a run: --resume {path} goes on with it, or choose another --out")
        folder: Folder | None = None
        if path.exists():
            folder = cls(path)
            try:
                if cls.begun(path):
                    raise taken
                folder.save(content)
            except OSError:
                folder.close()
                raise
            return folder
        unnamed = path.with_name(f".part-{path.name}")  # what a killed process left is taken over
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            unnamed.mkdir(exist_ok=True)
            folder = cls(unnamed)
            folder.save(content)
            os.rename(unnamed, path)
        except OSError as error:
            if folder is not None:
                folder.close()
                shutil.rmtree(unnamed, ignore_errors=True)
            if path.exists():  # another process was faster
                raise taken from None
            raise OSError(error.errno, f"{path} cannot be made: {error.strerror or error}") from error
        folder.path = path
        return folder

    @classmethod
    def open(cls, path: Path) -> "Folder":
        """The folder of a run that has begun.

        Raises:
            FileNotFoundError: there is none.
        """
        if not path.is_dir():
            raise FileNotFoundError(f"{path} is no run's folder: {'a file' if path.exists() else 'it does not exist'}")
        if not cls.begun(path):
            raise FileNotFoundError(f"{path} is no run's folder: it holds no checkpoint.pt to resume from")
        return cls(path)

    def save(self, content: Content) -> None:
        """Makes `content` the newest checkpoint, and the newest the previous one."""
        payload = sealed(content)
        save_atomically(self.checkpoint, lambda partial: partial.write_bytes(payload), keep=self.previous)


def load(folder: Path, team: Team, take: Callable[[Content], Any], report: Callable[[str], None]) -> Any:
    """What `take` makes, in all processes, of the newest checkpoint that is whole and that it does not refuse.

    Args:
        folder: which rank 0 holds; it reads, and hands what it read to the others.
        take: raises Refused for a content that is not to be used.
        report: told if the newest does not serve, why, and what does; it is then set aside.

    Raises:
        Refused: none serves; says why.
    """
    newest, previous, aside = (folder / f"checkpoint{what}.pt" for what in ("", ".previous", ".refused"))
    refused: Refused | None = None
    for path in (newest, previous):
        try:
            content = team.lead(partial(_unsealed_if_there, path))
            if content is None:
                continue
            taken = team.together(partial(take, content))
        except Refused as error:
            refused = refused or Refused(f"{path}: {error}")
            continue
        if refused:
            team.lead(lambda: os.replace(newest, aside))
            report(f"{refused}; {path.name} serves instead, and {aside.name} is what did not")
        return taken
    assert refused is not None
    raise refused


def sealed(content: Content) -> bytearray:
    """A checkpoint's bytes."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    payload = bytearray(buffer.getbuffer())
    payload += _SEAL % hashlib.sha256(payload).hexdigest().encode()
    return payload


def _unsealed_if_there(path: Path) -> Content | None:
    return unsealed(path) if path.exists() else None


def unsealed(path: Path) -> Content:
    """What a checkpoint holds; its tensors on the CPU.

    Raises:
        Refused: it is altered, or no checkpoint; says what was found.
    """
    payload = path.read_bytes()
    content, seal = payload[:-_SEAL_SIZE], payload[-_SEAL_SIZE:]
    digest = hashlib.sha256(content).hexdigest()
    if not seal.startswith(_SEAL[:9]) or not seal.endswith(b"\n"):
        raise Refused(
            f"its {len(payload)} bytes do not end in a SHA-256: it is truncated, altered or no checkpoint of hta-train"
        )
    if seal != _SEAL % digest.encode():
        raise Refused(
            f"its content has SHA-256 {digest[:16]}…, expected {seal[9:25].decode(errors='replace')}…: it is altered"
        )
    try:
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # whatever an unpickler finds in what only looks like a checkpoint
        raise Refused(f"it is no checkpoint of hta-train: {str(error).splitlines()[0]}") from error
