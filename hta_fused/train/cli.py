"""hta-train: the trainer on a terminal. Flags, signals, progress bars, and errors in one line."""

import argparse
import json
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import torch

from ..terminal import FAILURE, Parser
from . import machine
from .comparison import Trainer, evaluate_file
from .report import heading
from .run import Job
from .settings import HINTS, RECIPES, Settings

FLAGS = {name: "--" + name.replace("_", "-") for name in HINTS}  # as they are typed
OF_THE_MACHINE = ("data_dir", "download", "device", "graph", "threads")  # may change where a run goes on

DESCRIPTION = """\
Train a VGG by homotopy (HTA), by SGD, or both beside each other.

HTA trains coupled copies while L falls, then merges them and goes on with one.
Two copies cost twice the work, so --method compare, the default, sets HTA
beside SGD at equal epochs and SGD at equal work. [Defaults] are in brackets."""

EXAMPLES = """\
examples:
  hta-train                                     in three minutes on two cores
  hta-train --method hta --copies 4 --batches own --out runs/four
  hta-train --resume runs/four                  go on with it after a stop
  hta-train --evaluate runs/four/hta-seed0.pt   test what came out
  hta-train --dataset cifar10 --download --recipe paper --model vgg16"""


def parser() -> Parser:
    """Every field of Settings is a flag, in its group; beside them stands what else hta-train does."""
    result = Parser("hta-train", usage="hta-train [FLAG ...]", description=DESCRIPTION, epilog=EXAMPLES)
    groups: dict[str, Any] = {}
    for field in fields(Settings):
        about, hint, default = field.metadata, HINTS[field.name], field.default
        if about["group"] not in groups:
            groups[about["group"]] = result.add_argument_group(about["group"])
        options: dict[str, Any] = {"metavar": about["metavar"], "type": {int: _int, float: _float}.get(hint, str)}
        if hint is bool:
            options, default = {"action": argparse.BooleanOptionalAction}, "on" if default else "off"
        shown = "" if default is None else f" [{default}]"
        if get_origin(hint) is Literal:
            shown = ": " + ", ".join(f"[{choice}]" if choice == default else choice for choice in get_args(hint))
        groups[about["group"]].add_argument(
            FLAGS[field.name], dest=field.name, default=argparse.SUPPRESS, help=about["help"] + shown, **options
        )
    other = result.add_argument_group("instead of a new run").add_mutually_exclusive_group()
    other.add_argument("--resume", metavar="FOLDER", type=Path, help="go on with the run in this folder")
    other.add_argument("--evaluate", metavar="FILE", type=Path, help="test an exported network, a .pt of a run")
    return result


# What is no number stays a text, which Settings refuses: all checks are there.
def _int(text: str) -> int | str:
    try:
        return int(text)
    except ValueError:
        return text


def _float(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def main(argv: list[str] | None = None) -> None:
    """The entry point of `hta-train`."""
    terminal = parser()
    given = vars(terminal.parse_args(argv))
    resume, evaluate = given.pop("resume"), given.pop("evaluate")
    terminal.need("tqdm", "matplotlib", "sklearn")
    try:
        settings = resumed(resume, given) if resume else evaluated(evaluate, given) if evaluate else anew(given)
        machine.check(settings)
    except ValueError as error:
        terminal.error(typed(str(error)))
    except OSError as error:
        terminal.fail(error)
    terminal.check_folder("--data-dir", settings.data_dir, written=settings.download)
    if evaluate is None:
        train(terminal, settings, given if resume else None)
        return
    try:
        loss, accuracy = evaluate_file(evaluate, settings)
    except (ValueError, OSError) as error:
        terminal.fail(error)
    print(f"{evaluate}: test accuracy {accuracy:.2f}%, test loss {loss:.4f}")


def typed(message: str) -> str:
    """An error of Settings, which begins with a field's name, with the flags that stand for fields."""
    return re.sub(r"^\w+(?= )|\b\w+_\w+\b", lambda word: FLAGS.get(word[0], word[0]), message)


# ------------------------------------------------------------------------------------- the settings that flags ask for


def anew(given: dict[str, Any]) -> Settings:
    """A new run's."""
    settings = replace(RECIPES.get(given.get("recipe", "none"), Settings()), **given)
    if settings.out is not None:
        return settings
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    return replace(settings, out=Path("runs") / f"{settings.dataset}-{settings.model}-{settings.method}-{stamp}")


def resumed(folder: Path, given: dict[str, Any]) -> Settings:
    """What is given anew for a run that goes on with its checkpoint's settings: only what is the machine's own."""
    for name in given:
        if name not in OF_THE_MACHINE:
            raise ValueError(f"{name} is the run's own and cannot change when --resume goes on with it")
    return replace(Settings(), out=folder, **given)


def evaluated(file: Path, given: dict[str, Any]) -> Settings:
    """Those of the run that made the file, where its config.json lies beside it, and what is given."""
    config = file.with_name("config.json") if file.name else file
    return replace(_configuration(config) if config.is_file() else Settings(), **given)


def _configuration(file: Path) -> Settings:
    try:
        return Settings.from_json(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is no run's configuration: {error}") from None


# ----------------------------------------------------------------------------------------------------------- a training


def train(terminal: Parser, settings: Settings, changes: dict[str, Any] | None) -> None:
    """Trains, and says where it writes and how to go on: at once, and whatever ends it.

    Args:
        settings: of a new run, or of one that goes on its folder.
        changes: what one that goes on is to do differently, or None for a new run.
    """
    from tqdm import tqdm

    assert settings.out is not None
    if changes is None:
        terminal.check_folder("--out", settings.out)
    command = f"hta-train --resume {shlex.quote(str(settings.out))}"
    with stopping() as caught, progress_bars() as progress:
        callbacks: dict[str, Any] = {
            "stop": lambda: bool(caught),
            "progress": progress,
            "report": lambda text: tqdm.write(text, file=sys.stdout),
        }
        try:
            if changes is None:
                trainer = Trainer(settings, **callbacks)
            else:
                trainer = Trainer.resume(settings.out, changes, **callbacks)
        except (ValueError, OSError) as error:
            terminal.fail(error)

        def say_how_to_go_on(saved: str) -> None:
            kept = trainer.folder.checkpoint.exists()
            terminal.say(f"{saved}. Go on with: {command}" if kept else "no checkpoint yet: start it again")

        try:
            print(f"writes to {settings.out}; to go on after a stop:\n  {command}", flush=True)
            if changes is not None:
                _head(trainer)
            finished = trainer.train()
        except FloatingPointError as error:  # to go on would be of no use
            terminal.fail(error)
        except BaseException as error:  # a full disk, a second Ctrl-C, a bug, whose traceback follows, ...
            what = "no memory left: it takes less with a smaller --batch-size" if _no_memory(error) else error
            expected = isinstance(error, OSError) or what is not error
            if expected:
                terminal.say(what)
            say_how_to_go_on("what the last checkpoint holds is saved")
            if expected:
                raise SystemExit(FAILURE) from None
            raise
    if not finished:
        say_how_to_go_on(f"stopped by {signal.Signals(caught[0]).name}; everything so far is saved")
        raise SystemExit(128 + caught[0])


def _no_memory(error: BaseException) -> bool:
    of_the_cpu = isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    return of_the_cpu or isinstance(error, MemoryError | torch.OutOfMemoryError)


def _head(trainer: Trainer) -> None:
    """The heading of a run that goes on in its middle."""
    job = trainer.jobs[trainer.done] if trainer.done < len(trainer.jobs) else None
    if job and any((row["run"], row["seed"]) == (job.label, job.seed) for row in trainer.rows):
        print(heading(job.label, job.seed))


@contextmanager
def stopping() -> Iterator[list[int]]:
    """A list that SIGINT or SIGTERM joins, acknowledged at once; a second one does not wait for the batch to end."""
    caught: list[int] = []

    def on_signal(number: int, _frame: object) -> None:
        if caught:
            raise SystemExit(128 + number)
        caught.append(number)
        # Not through sys.stderr, which the signal may have interrupted in its work.
        os.write(2, b"\nhta-train: stopping after this batch; Ctrl-C again to stop now\n")

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def progress_bars() -> Iterator[Callable[[Job, int, int, int], None]]:
    """What draws a bar for each epoch, on a terminal."""
    from tqdm import tqdm

    bar: tqdm | None = None  # of the epoch that `shown` names
    shown = ""

    def progress(job: Job, epoch: int, done: int, total: int) -> None:
        nonlocal bar, shown
        if not sys.stderr.isatty():
            return
        title = f"{job.name} epoch {epoch + 1}/{job.epochs}"
        if bar is None or title != shown:
            if bar is not None:
                bar.close()
            bar, shown = tqdm(desc=title, total=total, initial=done - 1, leave=False, unit="batch"), title
        bar.update(done - bar.n)

    try:
        yield progress
    finally:
        if bar is not None:
            bar.close()
