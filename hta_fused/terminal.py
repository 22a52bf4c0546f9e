"""What the commands share: help that fits a terminal, errors in one line, checks that come before the work.

Imports torch, extras.py and files.py.
"""

import argparse
import difflib
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch

from . import extras
from .files import is_path

FAILURE, USAGE = 1, 2  # exit statuses: something went wrong; the command line asks for what there is not


class _Help(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str, **options: Any):
        width = min(80, shutil.get_terminal_size().columns)
        super().__init__(prog, max_help_position=34, width=width, **options)

    def format_help(self) -> str:
        self._action_max_length += 2  # argparse forgets that commands are indented further
        return super().format_help()


class Parser(argparse.ArgumentParser):
    """argparse with errors in one line that name flags as they are typed, and suggest one for a flag unknown."""

    def __init__(self, prog: str | None = None, **options: Any):
        super().__init__(prog, allow_abbrev=False, formatter_class=_Help, **options)

    def parse_args(self, *args: Any, **options: Any) -> Any:
        """As argparse's. From here on, what stdout's encoding lacks (a ±, a file's name that is no text) is printed escaped."""
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):  # not what a notebook or a test may have put there
                stream.reconfigure(errors="backslashreplace")
        return super().parse_args(*args, **options)

    def error(self, message: str) -> NoReturn:
        """A usage error, argparse's own among them."""
        if message.startswith("unrecognized arguments: "):
            words = message.removeprefix("unrecognized arguments: ")
            message = self._unknown(words.split()[0].split("=")[0] if words.split() else repr(words))
        for pattern, text in _IN_OUR_WORDS.items():
            message = re.sub(pattern, text, message)
        self.fail(message, USAGE)

    def _unknown(self, word: str) -> str:
        flags = {flag.lower(): flag for flag in self._flags()}
        if word in flags.values():
            return f"{word} is another command's flag: see --help"
        like = difflib.get_close_matches(word.lower().replace("_", "-"), flags, 1)
        kind = "flag" if word.startswith("-") else "argument"
        return f"unknown {kind} {word}: " + (f"did you mean {flags[like[0]]}?" if like else "see --help")

    def _flags(self) -> list[str]:
        own = [flag for action in self._actions for flag in action.option_strings]
        commands = [a.choices for a in self._actions if isinstance(a, argparse._SubParsersAction)]
        return own + [flag for choices in commands for parser in choices.values() for flag in parser._flags()]

    def fail(self, what: object, status: int = FAILURE) -> NoReturn:
        """Ends the command with one line."""
        self.say(what)
        raise SystemExit(status)

    def say(self, what: object) -> None:
        """One line on stderr, under the command's name."""
        if isinstance(what, OSError) and what.strerror:
            what = f"{what.filename}: {what.strerror}" if what.filename else what.strerror
        print(f"{self.prog.split()[0]}: {' '.join(str(what).split())}", file=sys.stderr, flush=True)

    def need(self, extra: str) -> None:
        """Refuses to begin where what the command imports later is not installed."""
        line = extras.missing(extra)
        if line:
            self.fail(line)

    def check_folder(self, flag: str, folder: Path, written: bool = True) -> None:
        """Refuses what cannot be a folder (to write to). Makes nothing."""
        place = folder
        try:
            while not place.exists() and place != place.parent:
                place = place.parent
        except OSError as error:  # a name too long
            self.fail(f"{flag}: {error.strerror}: {folder}")
        where = f"{flag} {folder}" if place == folder else f"{flag} {folder}: {place}"
        if not place.is_dir():
            self.error(f"{where} is a file, not a folder")
        if written and not os.access(place, os.W_OK | os.X_OK):
            self.fail(f"{where} may not be written to")

    @contextmanager
    def ending_in_one_line(self, then: str, remedy: str | None = None) -> Iterator[None]:
        """Around a command's work: what stops it, and what it expects to fail by, is said in one line. then: what to do, or what
        has become of the work; remedy: what else to say where memory runs out."""
        try:
            yield
        except KeyboardInterrupt:
            self.say(f"stopped; {then}")
            raise SystemExit(128 + signal.SIGINT) from None
        except (OSError, ValueError, FloatingPointError) as error:
            self.fail(error)
        except (MemoryError, RuntimeError) as error:
            if not no_memory(error):
                raise
            self.fail(remedy or f"no memory left; {then}")


def no_memory(error: BaseException) -> bool:
    """Whether it is Python's or torch's word for memory that has run out."""
    of_the_cpu = isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    return of_the_cpu or isinstance(error, MemoryError | torch.OutOfMemoryError)


def called(command: str) -> str:
    """How a command is to be typed here: as this program was started, where the PATH does not find it."""
    started = sys.argv[0]
    return started if Path(started).name == command and shutil.which(command) is None else command


# argparse's errors.
_IN_OUR_WORDS: dict[str, Any] = {
    r"^argument (\S+?)(/\S+)?: ": r"\1 ",
    r"invalid choice: (.*) \(choose from (.*)\)": lambda m: f"must be one of {m[2].replace(chr(39), '')}, got {m[1]}",
    r"the following arguments are required: (.*)": r"\1 is missing",
    "expected one argument": "takes a value, and has none",
    "ignored explicit argument": "takes no value, got",
    "not allowed with argument": "cannot go with",
}


def whole_number(low: int, high: int | None = None) -> Callable[[str], int]:
    """A `type` for whole numbers from low (to high)."""

    def convert(text: str) -> int:
        wanted = f"at least {low}" if high is None else f"from {low} to {high}"
        try:
            number = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}") from None
        if number < low or (high is not None and number > high):
            raise argparse.ArgumentTypeError(f"must be {wanted}, got {number}")
        return number

    return convert


def path(text: str) -> Path:
    """A `type` for the names of files and folders."""
    if not is_path(text):
        raise argparse.ArgumentTypeError(f"must be a path, got {text!r}")
    return Path(text)


def threads(text: str) -> int:
    """A `type` for a number of CPU threads; 0 leaves torch's choice."""
    number, cores = whole_number(0)(text), os.cpu_count() or 1
    if number > cores:
        raise argparse.ArgumentTypeError(f"must be at most {cores}, this machine's cores, got {number}")
    return number
