"""What a stage's parts are told, and what they use: the session's settings, commands, backends."""

import ctypes
import os
import signal
import subprocess
import sys
import tempfile
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
# What NVIDIA's tools say where the machine does not let them in.
REFUSALS = ("LibraryNotLoaded", "Device not supported", "ERR_NVGPUCTRPERM")
PR_SET_PDEATHSIG = 1  # of Linux

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


_libc = ctypes.CDLL(None)


def die_with_parent() -> None:
    """Between fork and exec: the kernel ends the command when its parent ends, even where that had no time to."""
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def run(command: list[str], log: Path | None = None, **environment: str) -> tuple[int, str]:
    """A command's exit status and output, which `log` has as it comes. It has no time limit of its own: the stage has one."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    if log is not None:
        log.parent.mkdir(parents=True, exist_ok=True)
    with (log.open if log else tempfile.TemporaryFile)("w+", errors="replace") as file:
        done = subprocess.run(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, preexec_fn=die_with_parent,
                              env={**os.environ, "PYTHONPATH": path, **environment})  # fmt: skip
        file.seek(0)
        return done.returncode, file.read()


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


def outcome_of_tool(status: int, output: str, lines: int = 12) -> Result:
    """The same of a program that one of NVIDIA's tools watches: left out, whatever the status, where the tool says that
    it is not allowed to."""
    refusal = next((line for line in output.splitlines() if any(word in line for word in REFUSALS)), None)
    return outcome(status, output, lines) if refusal is None else {"skipped": refusal.strip("= ")}
