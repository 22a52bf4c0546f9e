"""hta-reproduce: the paper's small experiments, each a table in the terminal, a CSV and a picture.

    hta-reproduce table1       hits of the global minimum: quasi-Newton and homotopy, and what the claim rests on
    hta-reproduce figure1      the surface for n = 2, the tracked paths of θ and η on it, and L falling (GIF)
    hta-reproduce convergence  theorem 3.2 (logistic regression) and theorem 3.1 (a small network) in numbers
    hta-reproduce path         a quadratic's path: exact, tracked, and trained by HomotopySGD

Everything is seeded.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from . import convergence, figure1, quadratic, table1

EXPERIMENTS: dict[str, Callable[[Path, bool], None]] = {
    "table1": table1.run,
    "figure1": figure1.run,
    "convergence": convergence.run,
    "path": quadratic.run,
}


def main(argv: list[str] | None = None) -> None:
    """The entry point of `hta-reproduce`."""
    parser = argparse.ArgumentParser(
        "hta-reproduce", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ", ".join(EXPERIMENTS)
    parser.add_argument("experiment", choices=EXPERIMENTS, metavar="EXPERIMENT", help=f"one of {names}")
    parser.add_argument("--out", type=Path, required=True, help="the folder for the CSV and the pictures")
    parser.add_argument("--quick", action="store_true", help="a few points and steps: shows that everything runs")
    options = parser.parse_args(argv)
    try:
        import matplotlib  # noqa: F401
        import scipy  # noqa: F401
        import sklearn  # noqa: F401
        import tqdm  # noqa: F401
    except ImportError as error:
        sys.exit(f"hta-reproduce needs {error.name}: pip install 'hta_fused[train]'")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        EXPERIMENTS[options.experiment](options.out, options.quick)
    except OSError as error:
        sys.exit(f"hta-reproduce: {error}")
    print(f"{options.out}: " + ", ".join(sorted(p.name for p in options.out.iterdir())))


if __name__ == "__main__":
    main()
