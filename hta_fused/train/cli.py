"""hta-train: the trainer on a terminal. Flags, signals, progress bars."""

import argparse
import signal
import sys
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

from .comparison import Trainer, evaluate_file
from .run import Job
from .settings import RECIPES, Settings


@dataclass(frozen=True)
class Commands:
    """What to do other than start a new run."""

    resume: Path | None = None
    """Go on with the run in this folder, with the settings it was started with (all other flags are ignored)."""
    evaluate: Path | None = None
    """Print the test accuracy of an exported state_dict (a .pt of a run; the config.json beside it tells the rest)."""


def main(argv: list[str] | None = None) -> None:
    """The entry point of `hta-train`."""
    try:
        import tyro
        from tqdm import tqdm
    except ImportError as error:
        sys.exit(f"hta-train needs {error.name}: pip install 'hta_fused[train]'")
    argv = sys.argv[1:] if argv is None else argv
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--recipe", choices=RECIPES, default="none")
    recipe = RECIPES[early.parse_known_args(argv)[0].recipe]

    Both = tuple[  # the flags of both, without a prefix
        Annotated[Commands, tyro.conf.arg(name="")], Annotated[Settings, tyro.conf.arg(name="")]
    ]
    try:
        commands, settings = tyro.cli(
            Both, args=argv, prog="hta-train", description=Settings.__doc__, default=(Commands(), recipe)
        )
        if commands.evaluate is not None:
            loss, accuracy = evaluate_file(commands.evaluate, settings)
            print(f"{commands.evaluate}: test accuracy {accuracy:.2f}%, test loss {loss:.4f}")
            return
        if commands.resume is not None:
            settings = replace(settings, out=commands.resume)
        elif settings.out is None:
            stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
            settings = replace(
                settings, out=Path("runs") / f"{settings.dataset}-{settings.model}-{settings.method}-{stamp}"
            )

        caught: list[int] = []

        def on_signal(number: int, _frame: object) -> None:
            if caught:  # a second Ctrl-C does not wait for the batch to end
                sys.exit(128 + number)
            caught.append(number)

        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, on_signal)

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

        callbacks: dict[str, Any] = {
            "stop": lambda: bool(caught),
            "progress": progress,
            "report": lambda text: tqdm.write(text, file=sys.stdout),
        }
        trainer = Trainer.resume(commands.resume, **callbacks) if commands.resume else Trainer(settings, **callbacks)
        finished = trainer.train()
        if bar is not None:
            bar.close()
        if not finished:
            print(
                f"hta-train: stopped by {signal.Signals(caught[0]).name}; everything so far is saved. "
                f"Go on with: hta-train --resume {settings.out}",
                flush=True,
            )
            sys.exit(128 + caught[0])
    except (FloatingPointError, ValueError, OSError) as error:
        sys.exit(f"hta-train: {error}")
