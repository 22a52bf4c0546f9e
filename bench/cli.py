"""hta-bench: measures, prints a table, and writes a JSON and a picture.

    hta-bench step       the step against its rivals, on models' own lists of tensors
    hta-bench copies     one flat buffer: SGD and AdamW in one to eight copies, kinds of labels, another version
    hta-bench ops        one flat buffer: the roofline, anchors, random labels, small sizes, the penalty
    hta-bench scaling    time against size, number of tensors, threads
    hta-bench train      a training step of HTA, of SGD, and of the usual script
    hta-bench report DIR joins a folder's JSONs into one Markdown page with their pictures

Rounds are interleaved; figures are medians, with half the distance between the quartiles; a difference inside that
spread is printed as a tie. Every rival is checked to do what hta_fused does before it is timed (bench/rivals.py).
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hta_fused.files import save_atomically, write_json, write_text
from hta_fused.ops import MAX_COPIES

from . import measure, plots, rivals, workloads

Result = dict[str, Any]


def ops(options: argparse.Namespace) -> Iterator[Result]:
    rounds = options.rounds
    if options.quick:
        yield measure.step(lambda: workloads.flat(200_000), rounds)
        yield measure.penalty(200_000, rounds)
        return
    yield measure.headline_flat(rounds)
    variants: tuple[Result, ...] = (
        dict(anchor=False), dict(labels="random"), dict(labels="random", anchor=False), dict(dtype=torch.float64)
    )  # fmt: skip
    for variant in variants:
        result = measure.step(partial(workloads.flat, measure.FLAT, **variant), rounds, roof="dtype" not in variant)
        result["title"] += " · " + ", ".join(f"{k}: {v}" for k, v in variant.items()).replace(
            "anchor: False", "anchor 0"
        )
        yield result
    for n in (10**3, 10**4, 10**5, 10**6, 10**7, 10**8):
        result = measure.step(partial(workloads.flat, n), rounds, roof=False)
        if n == 1000:
            measure.ratio_claims(result, {rivals.FLOOR_IN_ONE: 1.2})
        yield result
    yield measure.penalty(measure.FLAT, rounds)


def step(options: argparse.Namespace) -> Iterator[Result]:
    if options.quick:
        shapes = [torch.Size([16, 8, 3, 3]), torch.Size([16]), torch.Size([10, 16]), torch.Size([10])]
        yield measure.step(lambda: workloads.of_shapes("four tensors", shapes), options.rounds)
        return
    for name in options.models:
        yield measure.headline_model(name, options.rounds)


def scaling(options: argparse.Namespace) -> Iterator[Result]:
    if options.quick:
        yield measure.against_size([10_000, 100_000], options.rounds)
        yield measure.against_tensors([1, 10], 10_000, options.rounds)
        return
    sizes = [m * 10**k for k in (4, 5, 6) for m in (1, 3)] + [10**7, 3 * 10**7, 5 * 10**7, 10**8]
    yield measure.against_size(sizes, options.rounds)
    yield measure.against_tensors([1, 10, 100, 1000], 15_360_000, options.rounds)
    yield measure.against_threads(measure.FLAT, options.rounds)


def copies(options: argparse.Namespace) -> Iterator[Result]:
    n, rounds = (20_000 if options.quick else measure.FLAT), options.rounds
    counts = options.copies or ([1, 2] if options.quick else [1, 2, 3, 4, 8])
    with ExitStack() as stack:
        other = stack.enter_context(measure.Elsewhere(options.against, n)) if options.against else None
        for proposal in options.proposals:
            for m in counts:
                comparable = other if (proposal, m) == ("SGD", 2) else None
                yield measure.copies(m, proposal, n, rounds, comparable, claims=not options.quick)
            yield measure.against_copies(counts, proposal, n, rounds)
            yield measure.label_kinds(proposal, n, rounds)


def train(options: argparse.Namespace) -> Iterator[Result]:
    if options.quick:
        yield measure.training("vgg11", "fp32", options.rounds, batch=8, width=0.0625)
        return
    for name in ("vgg11", "vgg16"):
        for precision in ("fp32", "bf16"):
            yield measure.training(name, precision, options.rounds)


def report(folder: Path) -> str:
    """One Markdown page of all results in a folder; draws their pictures anew."""
    pages = []
    for file in sorted(folder.glob("*.json")):
        content = json.loads(file.read_text())
        if "results" not in content:
            continue
        draw(file.stem.split("-")[0], content["results"], file.with_suffix(".png"), describe(content["machine"]))
        pages.append(f"## {file.stem}\n\n{describe(content['machine'])}; `{content['command']}`\n")
        pages += [measure.show(result) for result in content["results"]]
        pages.append(f"![{file.stem}]({file.stem}.png)\n")
    if not pages:
        raise ValueError(f"{folder} holds no results of hta-bench")
    return "\n".join(pages)


def describe(machine: Result) -> str:
    return f"{machine['processor']}, {machine['threads']} threads, torch {machine['torch']}, {machine['date']}"


def draw(what: str, results: list[Result], path: Path, caption: str) -> None:
    """The picture of one command's results."""

    def picture(partial: Path) -> None:
        if what in ("scaling", "copies"):
            plots.scaling(results, partial, caption)
        elif what == "ops":
            plots.roofline(results[0], partial, caption)
        else:
            plots.ratios(results, partial, caption)

    save_atomically(path, picture)


WHAT: dict[str, Callable[[argparse.Namespace], Iterator[Result]]] = {
    "ops": ops,
    "copies": copies,
    "step": step,
    "train": train,
    "scaling": scaling,
}


def main(argv: list[str] | None = None) -> None:
    """The entry point of `hta-bench`."""
    parser = argparse.ArgumentParser(
        "hta-bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    for name in WHAT:
        command = commands.add_parser(name, help=name)
        command.add_argument("--rounds", type=int, default=None, help="interleaved rounds (default 30; 5 with --quick)")
        command.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves torch's choice")
        command.add_argument("--quick", action="store_true", help="tiny sizes: shows that everything runs, in seconds")
        command.add_argument("--out", type=Path, help="a folder for the JSON and the PNG")
        if name == "step":
            known = ", ".join(workloads.MODELS)
            command.add_argument(
                "--models", nargs="+", default=list(workloads.MODELS), metavar="NAME", help=f"of {known}"
            )
        if name == "copies":
            command.add_argument(
                "--copies", nargs="+", type=int, metavar="M", help="how many (default 1 2 3 4 8; 1 2 with --quick)"
            )
            known = ", ".join(rivals.PROPOSALS)
            command.add_argument(
                "--proposals", nargs="+", default=list(rivals.PROPOSALS), metavar="NAME", help=f"of {known}"
            )
            command.add_argument(
                "--against", type=Path, metavar="CHECKOUT", help="another, built checkout to time beside"
            )
    joiner = commands.add_parser("report", help="join a folder's JSONs into one Markdown page")
    joiner.add_argument("dir", type=Path)
    options = parser.parse_args(argv)
    argv = sys.argv[1:] if argv is None else argv
    try:
        if options.what == "report":
            page = report(options.dir)
            write_text(options.dir / "report.md", page)
            print(page)
            return
        options.rounds = options.rounds if options.rounds is not None else 5 if options.quick else 30
        if options.rounds < 2:
            raise ValueError(f"--rounds must be at least 2, got {options.rounds}")
        if options.threads < 0:
            raise ValueError(f"--threads must not be negative, got {options.threads}")
        for flag, names in (("models", list(workloads.MODELS)), ("proposals", list(rivals.PROPOSALS))):
            for name in getattr(options, flag, []):
                if name not in names:
                    raise ValueError(f"--{flag} must be among {', '.join(names)}, got {name!r}")
        for m in getattr(options, "copies", None) or []:
            if not 1 <= m <= MAX_COPIES:
                raise ValueError(f"--copies must be from 1 to {MAX_COPIES}, got {m}")
        if options.threads:
            torch.set_num_threads(options.threads)
        machine = measure.machine()
        print(describe(machine) + "\n", flush=True)
        results = []
        for result in WHAT[options.what](options):
            results.append(result)
            print(measure.show(result), flush=True)
        if options.out:
            options.out.mkdir(parents=True, exist_ok=True)
            suffix = ("-quick" if options.quick else "") + (f"-{options.threads}-threads" if options.threads else "")
            stem = options.out / (options.what + suffix)
            content = {"machine": machine, "command": "hta-bench " + " ".join(argv), "results": results}
            write_json(stem.with_suffix(".json"), content)
            draw(options.what, results, stem.with_suffix(".png"), describe(machine))
    except (ValueError, OSError) as error:
        sys.exit(f"hta-bench: {error}")


if __name__ == "__main__":
    main()
