"""hta-reproduce: the paper's small experiments, each a table in the terminal, a CSV and a picture.

Everything is seeded.
"""

from collections.abc import Callable
from pathlib import Path

from ..terminal import Parser
from . import convergence, figure1, quadratic, table1

EXPERIMENTS: dict[str, Callable[[Path, bool], None]] = {
    "table1": table1.run,
    "figure1": figure1.run,
    "convergence": convergence.run,
    "path": quadratic.run,
}


HELP = {
    "table1": "hits of the global minimum: quasi-Newton, homotopy",
    "figure1": "the paths of θ and η on a surface, and L falling",
    "convergence": "theorems 3.2 and 3.1 in numbers",
    "path": "a quadratic's path: exact, tracked, trained",
}
EXAMPLES = """\
examples:
  hta-reproduce table1 --out runs/table1
  hta-reproduce figure1 --quick --out runs/figure1"""


def main(argv: list[str] | None = None) -> None:
    """The entry point of `hta-reproduce`."""
    description = (
        "The paper's small experiments, each a table in the terminal, a CSV and a\npicture. Everything is seeded."
    )
    terminal = Parser(
        "hta-reproduce", usage="hta-reproduce EXPERIMENT --out FOLDER", description=description, epilog=EXAMPLES
    )
    experiments = terminal.add_subparsers(
        dest="experiment", required=True, metavar="EXPERIMENT", title="experiments", prog="hta-reproduce"
    )
    for name, about in HELP.items():
        one = experiments.add_parser(name, help=about, description=f"hta-reproduce {name}: {about}.")
        one.add_argument("--out", metavar="FOLDER", type=Path, required=True, help="for the CSV and the pictures")
        one.add_argument("--quick", action="store_true", help="a few points and steps: that everything runs")
    options = terminal.parse_args(argv)
    terminal.need("matplotlib", "scipy", "sklearn", "tqdm")
    terminal.check_folder("--out", options.out)
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        EXPERIMENTS[options.experiment](options.out, options.quick)
    except OSError as error:
        terminal.fail(error)
    print(f"{options.out}: " + ", ".join(sorted(p.name for p in options.out.iterdir())))


if __name__ == "__main__":
    main()
