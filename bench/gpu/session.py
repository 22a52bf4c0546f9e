"""What a stage's parts are told, and what they use: the session's settings, commands, backends."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import hta_fused as hta

ROOT = Path(__file__).resolve().parent.parent.parent
BACKENDS = ("cuda", "triton", "nvrtc")
LEFT_OUT = 77  # the exit status of a program that cannot do what it is for; its last line says why

Result = dict[str, Any]  # with "passed", "skipped" (why it cannot run) or "unfinished" (how far it is)
Part = Callable[[], Result]


class Stopped(BaseException):
    """The stage's process is to end at once."""


@dataclass
class Session:
    """A rehearsal takes tiny sizes; its figures mean nothing, and no target is asked of them."""

    out: Path
    data_dir: Path
    device: str = "cuda"
    rehearsal: bool = False
    asked_to_stop: bool = False
    polls: bool = False  # the part under way looks at asked_to_stop by itself, and is not to be interrupted

    def on_signal(self, *_: object) -> None:
        self.asked_to_stop = True
        if not self.polls:
            raise Stopped

    @property
    def backends(self) -> list[str]:
        """Those that serve the device, the one that is chosen first; a rehearsal on the CPU has one."""
        if self.device == "cpu":
            return ["cpu" if hta.backends()["cpu"].startswith("available") else "reference"]
        return [name for name in BACKENDS if hta.backends()[name].startswith("available")]

    def judged(self, claims: list[Result]) -> Result:
        """A result's claims, and whether they are met."""
        return {"claims": claims, "passed": self.rehearsal or all(c["met"] for c in claims)}


@contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


def run(command: list[str], **environment: str) -> tuple[int, str]:
    """A command's exit status and output. It has no time limit of its own: the stage has one."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
                          env={**os.environ, "PYTHONPATH": path, **environment})  # fmt: skip
    return done.returncode, done.stdout


def program(module: str, *arguments: object) -> list[str]:
    """The command that runs a module of this package."""
    return [sys.executable, "-m", f"{__package__}.{module}", *map(str, arguments)]


def tail(text: str, lines: int = 12) -> str:
    return "\n".join(text.strip().splitlines()[-lines:])


def outcome(status: int, output: str, lines: int = 12) -> Result:
    """A program's result: left out where it says that it cannot run."""
    if status == LEFT_OUT:
        return {"skipped": tail(output, 1)}
    return {"passed": status == 0, "output": tail(output, lines)}
