"""hta-bench: measures, prints a table, and writes a JSON and a picture.

Rounds are interleaved; figures are medians, with half the distance between the quartiles, and ratios those of single
rounds. Every rival is checked to do what hta_fused does before it is timed (bench/rivals.py).
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hta_fused.files import read_json, save_atomically, write_json, write_text
from hta_fused.kernels.reference import MAX_COPIES
from hta_fused.terminal import Parser, path, threads, whole_number

from . import distributed as processes
from . import formats, measure, plots, rivals, training, workloads

Result = dict[str, Any]


def ops(options: argparse.Namespace) -> Iterator[Result]:
    rounds = options.rounds
    if options.quick:
        yield measure.step(lambda: workloads.flat(200_000), rounds)
        yield measure.penalty(200_000, rounds)
        return
    yield measure.ratio_claims(measure.step(lambda: workloads.flat(measure.FLAT), rounds), measure.WANTED)
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
        yield measure.ratio_claims(measure.step(partial(workloads.model, name), options.rounds), measure.WANTED)


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
        yield training.training("vgg11", "fp32", options.rounds, batch=8, width=0.0625)
        return
    for name in ("vgg11", "vgg16"):
        for precision in ("fp32", "bf16"):
            yield training.training(name, precision, options.rounds)


def concurrent(options: argparse.Namespace) -> Iterator[Result]:
    small: Result = dict(batch=8, width=0.0625) if options.quick else {}
    for precision in ("fp32",) if options.quick else ("fp32", "bf16"):
        yield training.side_by_side(precision, options.rounds, **small)
    yield training.batched(2 if options.quick else 8, options.rounds, **small)


def distributed(options: argparse.Namespace) -> Iterator[Result]:
    small: Result = dict(width=0.0625, batch=8, period=3) if options.quick else {}
    for m in options.processes or ([2] if options.quick else [2, 4]):
        yield processes.measured(processes.Task(m, options.threads or 1, **small), options.rounds, not options.quick)
    yield from processes.modelled()


def in_formats(options: argparse.Namespace) -> Iterator[Result]:
    counts, proposals = options.copies or ([2] if options.quick else [2, 4]), options.proposals
    yield formats.table(counts, proposals)
    for proposal in proposals:
        for m in counts:
            yield formats.steps(m, proposal, 20_000 if options.quick else measure.FLAT, options.rounds)
    if not options.quick and formats.countable():
        yield formats.counts(counts[0], proposals)


def memory(options: argparse.Namespace) -> Iterator[Result]:
    for task in list(formats.TASKS)[: 1 if options.quick else None]:
        for m in options.copies or ([2] if options.quick else [2, 4]):
            yield formats.memory(task, m, "SGD" if task == "vgg16" else "AdamW")


def report(folder: Path) -> str:
    """One Markdown page of all results in a folder; draws their pictures anew."""
    pages, found = [], {}
    for file in sorted(folder.glob("*.json")):
        with _named(file):
            content = read_json(file)
            if not (isinstance(content, dict) and content.get("results") and {"machine", "command"} <= content.keys()):
                continue
            found[file] = content["results"], describe(content["machine"])
            pages.append(f"## {file.stem}\n\n{found[file][1]}; `{content['command']}`\n")
            pages += [measure.show(result) for result in content["results"]]
            pages.append(f"![{file.stem}]({file.stem}.png)\n")
    if not pages:
        raise ValueError(f"{folder} holds no results of hta-bench")
    for file, (results, caption) in found.items():
        with _named(file):
            draw(file.stem.split("-")[0], results, file.with_suffix(".png"), caption)
    return "\n".join(pages)


@contextmanager
def _named(file: Path) -> Iterator[None]:
    """Says of which file it is that it is not as `main` writes them."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, StopIteration, TypeError, ValueError) as error:
        raise ValueError(f"{file} is no result of hta-bench: {type(error).__name__}: {error}") from error


def describe(machine: Result) -> str:
    return f"{machine['processor']}, {machine['threads']} threads, torch {machine['torch']}, {machine['date']}"


def draw(what: str, results: list[Result], path: Path, caption: str) -> None:
    """The picture of one command's results."""

    def picture(partial: Path) -> None:
        if what in ("scaling", "copies"):
            plots.scaling(results, partial, caption)
        elif what == "ops":
            plots.roofline(results[0], partial, caption)
        elif what == "memory":
            plots.memory(results, partial, caption)
        elif what == "distributed":
            plots.distributed(results, partial, caption)
        else:
            plots.ratios(results, partial, caption)

    save_atomically(path, picture)


WHAT: dict[str, tuple[Callable[[argparse.Namespace], Iterator[Result]], str]] = {
    "step": (step, "the step and its rivals, on models' own lists of tensors"),
    "copies": (copies, "one flat buffer: one to eight copies, kinds of labels"),
    "ops": (ops, "one flat buffer: the roofline, anchors, sizes, the penalty"),
    "scaling": (scaling, "time against size, number of tensors, threads"),
    "formats": (in_formats, "split masters, bfloat16 and 8-bit states: bytes, time, instructions"),
    "memory": (memory, "the most memory that a training step holds, in each format"),
    "train": (train, "a training step of HTA, of SGD, and of the usual script"),
    "concurrent": (concurrent, "a step's copies in turn, side by side, as one network"),
    "distributed": (distributed, "one copy for each process, beside DDP, local SGD and DiLoCo"),
}
DESCRIPTION = """\
Measures, prints a table, and writes a JSON and a picture.

Rounds are interleaved; figures are medians, with half the distance between the
quartiles; a difference inside that spread is printed as a tie. Every rival is
checked to do what hta_fused does before it is timed."""
EXAMPLES = """\
examples:
  hta-bench step --quick
  hta-bench copies --copies 2 4 --proposals SGD --out runs/bench
  hta-bench distributed --processes 2 --out runs/bench
  hta-bench report runs/bench"""


def parser() -> Parser:
    result = Parser("hta-bench", usage="hta-bench WHAT [FLAG ...]", description=DESCRIPTION, epilog=EXAMPLES)
    commands = result.add_subparsers(
        dest="what", required=True, metavar="WHAT", title="what to measure", prog="hta-bench"
    )
    for name, (_, about) in WHAT.items():
        command = commands.add_parser(name, help=about, description=f"hta-bench {name}: {about}.")
        if name == "step":
            _add_names(command, "--models", list(workloads.MODELS))
        if name in ("copies", "formats", "memory"):
            command.add_argument(
                "--copies", nargs="+", type=whole_number(1, MAX_COPIES), metavar="M",
                help="[1 2 3 4 8; --quick: 1 2]" if name == "copies" else "[2 4; --quick: 2]",
            )  # fmt: skip
        if name in ("copies", "formats"):
            _add_names(command, "--proposals", list(rivals.PROPOSALS))
        if name == "copies":
            command.add_argument("--against", type=path, metavar="CHECKOUT", help="built, of another version")
        several = name == "distributed"
        if several:
            command.add_argument(
                "--processes", nargs="+", type=whole_number(2, MAX_COPIES), metavar="M", help="[2 4; --quick: 2]"
            )
        if name != "memory":
            command.add_argument(
                "--rounds", type=whole_number(2), metavar="ROUNDS",
                help=f"interleaved [{_rounds(name)}; 5 with --quick]",
            )  # fmt: skip
        choice = "of each process [1]" if several else "0: torch's choice [0]"
        command.add_argument("--threads", type=threads, metavar="THREADS", default=0, help=choice)
        command.add_argument("--quick", action="store_true", help="tiny sizes: that everything runs")
        command.add_argument("--out", type=path, metavar="FOLDER", help="for the JSON and the picture")
    joiner = commands.add_parser("report", help="join a folder's JSONs into one Markdown page")
    joiner.add_argument("dir", type=path, metavar="FOLDER", help="that the other commands wrote to")
    return result


def _rounds(what: str) -> int:
    return 10 if what == "distributed" else 30  # of a period of steps each


def _add_names(command: Parser, flag: str, names: list[str]) -> None:
    def name(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(f"must be among {', '.join(names)}, got {text!r}")
        return text

    command.add_argument(
        flag, nargs="+", type=name, default=names, metavar="NAME", help=f"of {', '.join(names)} [all of them]"
    )


def main(argv: list[str] | None = None) -> None:
    """The entry point of `hta-bench`."""
    argv = sys.argv[1:] if argv is None else argv
    terminal = parser()
    options = terminal.parse_args(argv)
    with terminal.ending_in_one_line("nothing was written"):
        if options.what == "report":
            page = report(options.dir)
            write_text(options.dir / "report.md", page)
            print(page)
            return
        if options.out:
            terminal.need("bench")
            terminal.check_folder("--out", options.out)
        if against := getattr(options, "against", None):
            terminal.check_folder("--against", against, written=False)
            if not measure.Elsewhere.serves(against):
                terminal.error(f"--against must be a checkout of hta_fused, got {against}")
        options.rounds = getattr(options, "rounds", None) or (5 if options.quick else _rounds(options.what))
        if options.threads:
            torch.set_num_threads(options.threads)
        machine = measure.machine()
        print(describe(machine) + "\n", flush=True)
        results = []
        for result in WHAT[options.what][0](options):
            results.append(result)
            print(measure.show(result), flush=True)
        if options.out:
            options.out.mkdir(parents=True, exist_ok=True)
            suffix = ("-quick" if options.quick else "") + (f"-{options.threads}-threads" if options.threads else "")
            stem = options.out / (options.what + suffix)
            content = {"machine": machine, "command": "hta-bench " + " ".join(argv), "results": results}
            write_json(stem.with_suffix(".json"), content)
            draw(options.what, results, stem.with_suffix(".png"), describe(machine))


if __name__ == "__main__":
    main()
