"""hta-reproduce: the paper's experiments, each a table in the terminal, a CSV and a picture.

Everything is seeded.
"""

from argparse import Namespace
from collections.abc import Callable
from concurrent.futures import BrokenExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from ..terminal import Parser, path, whole_number
from ..train import machine
from ..train.cli import typed
from . import convergence, figure1, mapped, networks, quadratic, smalldata, table1
from .runs import Scale

# Those that take minutes at most, and those that train networks.
SMALL: dict[str, Callable[[Path, bool], None]] = {
    "table1": table1.run,
    "figure1": figure1.run,
    "convergence": convergence.run,
    "path": quadratic.run,
    "map": mapped.run,
}
TRAINED: dict[str, tuple[Callable[[Path, Scale], None], dict[str, Scale]]] = {
    "table2": (networks.table2, networks.SCALES),
    "table3": (networks.table3, networks.FIVE_RUNS),
    "figure2": (networks.figure2, networks.SCALES),
    "figure3": (networks.figure3, networks.FIVE_RUNS),
    "dropout": (networks.dropout, networks.SCALES),
    "formats": (networks.formats, networks.SCALES),
    "smalldata": (smalldata.run, smalldata.SCALES),
}

HELP = {
    "table1": "hits of the global minimum: quasi-Newton, homotopy",
    "figure1": "the paths of θ and η on a surface, and L falling",
    "convergence": "theorems 3.2 and 3.1 in numbers",
    "path": "a quadratic's path: exact, tracked, trained",
    "map": "the coupled step's map for two copies, in pictures",
    "table2": "VGG11 to VGG19 on CIFAR-10: SGD, HTA",
    "table3": "VGG11 and VGG13, homotopy on the convolutions",
    "figure2": "VGG13, homotopy on the fully connected layers",
    "figure3": "Table 3's networks over the epochs: SGD, HTA",
    "dropout": "the coupling with dropout, beside plain dropout",
    "formats": "HTA whose masters, momentum and anchor take fewer bytes",
    "smalldata": "few images, many epochs: all that averages weights",
}
EXAMPLES = """\
examples:
  hta-reproduce table1 --out runs/table1
  hta-reproduce figure1 --quick --out runs/figure1
  hta-reproduce table2 --scale cpu --data-dir data --out runs/table2"""


def main(argv: list[str] | None = None) -> None:
    """The entry point of `hta-reproduce`."""
    description = "The paper's experiments, each a table in the terminal, a CSV and a picture.\nEverything is seeded."
    terminal = Parser(
        "hta-reproduce", usage="hta-reproduce EXPERIMENT --out FOLDER", description=description, epilog=EXAMPLES
    )
    experiments = terminal.add_subparsers(
        dest="experiment", required=True, metavar="EXPERIMENT", title="experiments", prog="hta-reproduce"
    )
    for name, about in HELP.items():
        one = experiments.add_parser(name, help=about, description=f"hta-reproduce {name}: {about}.")
        one.add_argument("--out", metavar="FOLDER", type=path, required=True, help="for the CSV and the pictures")
        if name in SMALL:
            one.add_argument("--quick", action="store_true", help="a few points and steps: that everything runs")
            continue
        one.add_argument(
            "--scale", choices=list(networks.SCALES), default="cpu", metavar="SCALE",
            help="quick: a minute; [cpu]: under an hour on two cores; full: the paper's 300 epochs, for a GPU",
        )  # fmt: skip
        one.add_argument("--data-dir", metavar="FOLDER", type=path, default=Path("data"), help="where CIFAR-10 lies")
        one.add_argument("--device", metavar="DEVICE", help="cpu, cuda or cuda:N, instead of the scale's")
        one.add_argument("--seeds", metavar="SEEDS", type=whole_number(1, 1000), help="runs of every method")
        if name == "smalldata":
            one.add_argument(
                "--images", metavar="IMAGES", type=whole_number(1, 49_999), help="to train on, at most 49,999 [2304]"
            )
    options = terminal.parse_args(argv)
    terminal.need("paper")
    terminal.check_folder("--out", options.out)
    there = options.out.exists()
    with terminal.ending_in_one_line("the same command goes on"):
        try:
            _experiment(terminal, options)
        except BaseException as error:
            if not there:
                with suppress(OSError):  # something came of it
                    options.out.rmdir()
            if isinstance(error, BrokenExecutor):
                terminal.fail("a run's process has ended, killed or for want of memory; the same command goes on")
            raise
        print(f"{options.out}: " + ", ".join(sorted(p.name for p in options.out.iterdir())), flush=True)


def _experiment(terminal: Parser, options: Namespace) -> None:
    if options.experiment in SMALL:
        options.out.mkdir(parents=True, exist_ok=True)
        SMALL[options.experiment](options.out, options.quick)
        return
    terminal.check_folder("--data-dir", options.data_dir, written=False)
    run, scales = TRAINED[options.experiment]
    try:
        scale = asked(scales[options.scale], options)
        machine.check(scale.settings)
    except ValueError as error:
        terminal.error(typed(str(error)))
    if scale.name == "full" and scale.settings.torch_device.type == "cpu":
        much = f"{scale.settings.epochs} epochs a run, {scale.seeds} seeds"
        terminal.say(f"--scale full is for a GPU, and will take very long on this CPU ({much}); see --scale cpu")
    options.out.mkdir(parents=True, exist_ok=True)
    run(options.out, scale)


def asked(scale: Scale, options: Namespace) -> Scale:
    """A scale with what the flags change in it."""
    changes = {"data_dir": options.data_dir, "device": options.device, "train_images": getattr(options, "images", None)}
    settings = replace(scale.settings, **{name: value for name, value in changes.items() if value is not None})
    return replace(scale, settings=settings, seeds=options.seeds or scale.seeds)


if __name__ == "__main__":
    main()
