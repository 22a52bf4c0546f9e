"""hta-train: the trainer on a terminal. Flags, signals, progress bars, and errors in one line."""

import argparse
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

from .. import __version__
from ..extras import needs
from ..files import read_json
from ..terminal import FAILURE, Parser, called, no_memory, path
from . import machine
from .comparison import Trainer
from .exported import evaluate_file
from .folder import Folder
from .report import heading
from .run import Job
from .settings import HINTS, OF_THE_MACHINE, RECIPES, Settings
from .team import ALONE, Team, of_torchrun

NO_MEMORY = "no memory left: it takes less with a smaller --batch-size"
FLAGS = {name: "--" + name.replace("_", "-") for name in HINTS}  # as they are typed

DESCRIPTION = """\
Train a VGG by homotopy (HTA), by SGD, or both beside each other.

HTA trains coupled copies while L falls, then merges them and goes on with one.
Two copies cost twice the work, so --method compare, the default, sets HTA
beside SGD at equal epochs and SGD at equal work. [Defaults] are in brackets.

torchrun --nproc-per-node 4 -m hta_fused.train trains four copies, each in a
process of its own."""

EXAMPLES = """\
examples:
  hta-train                           the first run, under a minute on two cores
  hta-train --method hta --copies 4 --batches own --out runs/four
  hta-train --resume runs/four                  go on with it after a stop
  hta-train --evaluate runs/four/hta-seed0.pt   test what came out
  hta-train --dataset cifar10 --download --recipe paper --model vgg16"""


class Terminal(Parser):
    """A Parser of a process that may have to be silent, where others say the same."""

    speaks = True

    def say(self, what: object) -> None:
        if self.speaks:
            super().say(what)


def parser() -> Terminal:
    """Every field of Settings is a flag, in its group; beside them stands what else hta-train does."""
    result = Terminal("hta-train", usage="hta-train [FLAG ...]", description=DESCRIPTION, epilog=EXAMPLES)
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
    other.add_argument("--resume", metavar="FOLDER", type=path, help="go on with the run in this folder")
    other.add_argument("--evaluate", metavar="FILE", type=path, help="test an exported network, a .pt of a run")
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
    terminal.speaks = not of_torchrun() or os.environ["LOCAL_RANK"] == "0"  # one line on each machine is enough
    given = vars(terminal.parse_args(argv))
    resume, evaluate = given.pop("resume"), given.pop("evaluate")
    terminal.need("train")
    try:
        if of_torchrun():
            given |= under_torchrun(given, new=not (resume or evaluate), evaluate=bool(evaluate))
        settings = resumed(resume, given) if resume else evaluated(evaluate, given) if evaluate else anew(given)
        machine.check(settings, int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if of_torchrun() else None)
    except ValueError as error:
        terminal.error(typed(str(error)))
    except OSError as error:
        terminal.fail(error)
    terminal.check_folder("--data-dir", settings.data_dir, written=settings.download)
    if evaluate is None:
        if not resume and (not of_torchrun() or os.environ["RANK"] == "0"):
            assert settings.out is not None
            terminal.check_folder("--out", settings.out)
        train(terminal, settings, given, new=not resume)
        return
    with terminal.ending_in_one_line("nothing was written", NO_MEMORY):
        loss, accuracy = evaluate_file(evaluate, settings)
    print(f"{evaluate}: test accuracy {accuracy:.2f}%, test loss {loss:.4f}")


def typed(message: str) -> str:
    """An error of Settings, which begins with a field's name, with the flags that stand for fields."""
    return re.sub(r"^\w+(?= )|(?<![\w/.-])\w+_\w+(?![\w/.-])", lambda word: FLAGS.get(word[0], word[0]), message)


# ------------------------------------------------------------------------------------- the settings that flags ask for


def anew(given: dict[str, Any]) -> Settings:
    """A new run's."""
    settings = replace(_recipe(given), **given)
    if settings.out is not None:
        return settings
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    return replace(settings, out=Path("runs") / f"{settings.dataset}-{settings.model}-{settings.method}-{stamp}")


def under_torchrun(given: dict[str, Any], new: bool, evaluate: bool) -> dict[str, Any]:
    """What torchrun settles: a copy in each process, each on its own GPU.

    Raises:
        ValueError: for what is given otherwise, or makes no sense there.
    """
    size = int(os.environ["WORLD_SIZE"])
    if evaluate:
        raise ValueError("--evaluate is work for one process: leave torchrun out")
    if given.get("graph"):
        raise ValueError("graph is for one process's step: leave it out under torchrun")
    if ":" in given.get("device", ""):
        raise ValueError(
            f"device must be auto, cpu or cuda under torchrun, which numbers the GPUs, got {given['device']!r}"
        )
    if not new:
        return {"graph": False}
    if given.get("method") == "sgd":
        raise ValueError("method must be hta, compare or ddp under torchrun, as SGD trains one network, got 'sgd'")
    if given.get("copies", size) != size:
        raise ValueError(f"copies must be the number of processes, {size}, or left out, got {given['copies']}")
    if "out" not in given and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")):
        raise ValueError("out must be given where torchrun may start all again, so that it finds the run")
    return {"graph": False, "copies": size}


def resumed(folder: Path, given: dict[str, Any]) -> Settings:
    """What is given anew for a run that goes on with its checkpoint's settings: only what is the machine's own."""
    for name in given:
        if name not in OF_THE_MACHINE:
            raise ValueError(f"{name} is the run's own and cannot change when --resume goes on with it")
    return replace(Settings(), out=folder, **given)


def evaluated(file: Path, given: dict[str, Any]) -> Settings:
    """Those of the run that made the file, where its config.json lies beside it (else a recipe's), and what is given."""
    config = file.with_name("config.json") if file.name else file
    if not config.is_file():
        return replace(_recipe(given), **given)
    settings = _configuration(config)
    seed = re.search(r"-seed(\d+)(-\w+)?$", file.stem)  # by which its images were drawn
    alone = {"method": "sgd"} if settings.method == "ddp" else {}  # one network is tested in one process
    return replace(settings, **(alone | {"seed": int(seed[1]), "seeds": 1} if seed else alone) | given)


def _recipe(given: dict[str, Any]) -> Settings:
    return RECIPES.get(given.get("recipe", "none"), Settings())


def _configuration(file: Path) -> Settings:
    try:
        return Settings.from_json(read_json(file))
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is no run's configuration: {error}") from None


# ----------------------------------------------------------------------------------------------------------- a training


def train(terminal: Terminal, settings: Settings, given: dict[str, Any], new: bool) -> None:
    """Trains, and says where it writes and how to go on: at once, and whatever ends it.

    Args:
        settings: of a new run, or of one that goes on its folder.
        given: those that were given on the command line.
        new: whether it is a new run.
    """
    with needs("train"):
        from tqdm import tqdm

    assert settings.out is not None
    team = ALONE
    if of_torchrun():
        try:
            team = Team.gathered(settings.torch_device.type == "cuda", settings.timeout)
        except (ValueError, OSError) as error:
            terminal.fail(error)
    terminal.speaks = team.leads
    command = f"{_launcher(team)} --resume {shlex.quote(str(settings.out))}"
    trainer: Trainer | None = None
    with stopping(team) as caught, progress_bars() as progress:
        callbacks: dict[str, Any] = {
            "stop": lambda: bool(caught),
            "progress": progress,
            "report": lambda text: tqdm.write(text, file=sys.stdout),
            "team": team,
        }

        def how_to_go_on(saved: str) -> str:
            kept = trainer is not None and trainer.saved
            return f"{saved}. Go on with: {command}" if kept else "no checkpoint yet: start it again"

        try:
            trainer, begun = _trainer(settings, given, new, callbacks)
            if team.leads:
                print(f"writes to {settings.out}; to go on after a stop:\n  {command}", flush=True)
                if begun:
                    _head(trainer)
            finished = trainer.train()
        except FloatingPointError as error:  # to go on would be of no use
            terminal.fail(error)
        except BaseException as error:  # a full disk, a second Ctrl-C, a bug, whose traceback follows, ...
            missed = team.missed(error)
            if missed is not None:
                terminal.speaks = bool(missed)
                then = f"go on with: {command}"
                if _restarts_left():
                    then = "torchrun starts all again, from the last checkpoint"
                terminal.say(f"rank {team.rank}, {trainer.place if trainer else 'at its start'}: {missed}; {then}")
                sys.stdout.flush()
                os._exit(FAILURE)  # the group's threads, which wait for those that are gone, would abort an orderly end
            if trainer is None and isinstance(error, ValueError | OSError):
                terminal.fail(typed(str(error)) if isinstance(error, ValueError) else error)
            what = NO_MEMORY if no_memory(error) else error
            expected = isinstance(error, OSError) or what is not error
            if what is not error and team.group is not None:  # others do not know of it
                terminal.speaks, what = True, f"rank {team.rank}: {what}"
            if expected:
                terminal.say(what)
            terminal.say(how_to_go_on("what the last checkpoint holds is saved"))
            if expected:
                raise SystemExit(FAILURE) from None
            raise
        number = 0 if finished else team.largest(caught[0] if caught else 0)
        if number:
            terminal.say(how_to_go_on(f"stopped by {signal.Signals(number).name}; everything so far is saved"))
        trainer = None
        team.close()
    if number:
        raise SystemExit(128 + number)


def _trainer(settings: Settings, given: dict[str, Any], new: bool, callbacks: dict[str, Any]) -> tuple[Trainer, bool]:
    """A Trainer, and whether its run had begun: where torchrun starts all again, a new run is not new any more.

    Raises:
        ValueError, OSError: as Trainer; or the processes' settings differ, or those of the run that is there.
    """
    team: Team = callbacks["team"]
    assert settings.out is not None
    out = settings.out
    team.agree({"the version of hta_fused": __version__, "the version of torch": torch.__version__, "new": new})
    own = settings.to_json() if new else given
    team.agree({name: value for name, value in own.items() if name not in ("out", *OF_THE_MACHINE)})
    if new:
        again = of_torchrun() and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
        if not (again and team.lead(lambda: Folder.begun(out))):
            return Trainer(settings, **callbacks), False
    trainer = Trainer.resume(out, {k: v for k, v in given.items() if k in OF_THE_MACHINE}, **callbacks)
    name = settings.difference(trainer.settings) if new else None
    if name:
        held = getattr(trainer.settings, name)
        raise ValueError(f"{out} already holds another run, whose {name} is {held}: choose another --out")
    return trainer, True


def _launcher(team: Team) -> str:
    if team.group is None:
        return called("hta-train")
    here = int(os.environ.get("LOCAL_WORLD_SIZE", team.size))
    machines = f"--nnodes {team.size // here} " if here != team.size else ""
    return f"torchrun {machines}--nproc-per-node {here} -m hta_fused.train"


def _restarts_left() -> bool:
    done, most = (int(os.environ.get(f"TORCHELASTIC_{name}", "0")) for name in ("RESTART_COUNT", "MAX_RESTARTS"))
    return done < most


def _head(trainer: Trainer) -> None:
    """The heading of a run that goes on in its middle."""
    job = trainer.jobs[trainer.done] if trainer.done < len(trainer.jobs) else None
    if job and any((row["run"], row["seed"]) == (job.label, job.seed) for row in trainer.rows):
        print(heading(job.label, job.seed))


@contextmanager
def stopping(team: Team = ALONE) -> Iterator[list[int]]:
    """A list that SIGINT or SIGTERM joins, acknowledged at once; a second one does not wait for the batch to end.

    Of a team one process acknowledges, and not SIGTERM, which torchrun sends to all that are left when one has died.
    """
    caught: list[int] = []

    def on_signal(number: int, _frame: object) -> None:
        if caught:
            raise SystemExit(128 + number)
        caught.append(number)
        if team.group is not None and not (team.leads and number == signal.SIGINT):
            return
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
    with needs("train"):
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
