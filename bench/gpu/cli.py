"""The command line of `make gpu`.

    python3 -m bench.gpu [--out DIR] [--data-dir CIFAR10] [--only STAGE …] [--limit SECONDS] [--again] [--rehearse]

Each stage runs in a process of its own, nine minutes at most, and writes DIR/<stage>.json; DIR/report.md is made anew
after each. Called again, it goes on: what has a result is not done again, what a limit cut short is.
"""

import argparse
import platform
import re
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

import hta_fused as hta
from hta_fused.files import write_text
from hta_fused.train.report import processor

from . import check, kernels, steps, table2
from .report import Content, finished, page
from .session import ROOT, Part, Session
from .stages import perform, read, work

STAGES: dict[str, tuple[Callable[[Session], Mapping[str, Part]], str]] = {  # the most telling first
    "check": (check.parts, "the build, compute-sanitizer over the kernels, the tests over every backend"),
    "kernels": (kernels.parts, "the step's bandwidth, its DRAM bytes, its rivals"),
    "step": (steps.parts, "the training step of HTA and SGD, beside the usual script's"),
    "table2": (table2.parts, "VGG11 and VGG16 on CIFAR-10 for the paper's 300 epochs"),
}
PROGRAM = [sys.executable, "-m", __package__]
LIMIT = 540.0


def parser() -> argparse.ArgumentParser:
    stages = "\n".join(f"  {name:8} {about}" for name, (_, about) in STAGES.items())
    result = argparse.ArgumentParser("bench.gpu", description=f"{__doc__}\nstages:\n{stages}",
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    result.add_argument("--out", type=Path, help="the folder for results [bench/results/<gpu>-<date>]")
    result.add_argument("--data-dir", type=Path, default=Path("data"), help="CIFAR-10, as hta-train takes it [data]")
    result.add_argument("--only", nargs="+", choices=STAGES, default=list(STAGES), metavar="STAGE", help="some stages")
    result.add_argument("--limit", type=float, default=LIMIT, metavar="SECONDS", help=f"of each stage [{LIMIT:g}]")
    result.add_argument("--again", action="store_true", help="forget these stages' results")
    result.add_argument(
        "--rehearse", action="store_true", help="tiny sizes, on the CPU by default: that everything runs"
    )
    result.add_argument("--device", choices=("cuda", "cpu"), help="[cuda; --rehearse: cpu]")
    result.add_argument("--work", choices=STAGES, help=argparse.SUPPRESS)  # a stage's own process
    return result


def main(argv: list[str] | None = None) -> None:
    options = parser().parse_args(argv)
    device = options.device or ("cpu" if options.rehearse else "cuda")
    if device == "cuda" and not torch.cuda.is_available():
        sys.exit("bench.gpu: this torch sees no CUDA device (torch.cuda.is_available() is False)")
    out = (options.out or default_folder(device)).resolve()
    session = Session(out, options.data_dir.resolve(), device, options.rehearse)
    if options.work:
        sys.exit(work(options.work, STAGES[options.work][0], session))
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        sys.exit(all_stages(options, session))
    except KeyboardInterrupt:
        print("bench.gpu: interrupted; the same command goes on", file=sys.stderr)
        sys.exit(130)


def all_stages(options: argparse.Namespace, session: Session) -> int:
    """The exit status: 1 where a stage has failed or missed a target."""
    out = session.out
    out.mkdir(parents=True, exist_ok=True)
    about = {"machine": machine(session.device), "rehearsal": session.rehearsal}
    if options.again:
        for name in options.only:
            (out / f"{name}.json").unlink(missing_ok=True)
        if "table2" in options.only:
            table2.clear(out)
    for name in STAGES:  # before any of them takes its time
        content = read(out / f"{name}.json")
        for what, own in about.items():
            if content.get(what, own) != own:
                sys.exit(
                    f"bench.gpu: {out / name}.json has another {what}, {content[what]}: choose another --out, or --again"
                )
    passed = []
    for name in options.only:
        file = out / f"{name}.json"
        content = read(file)
        print(f"== {name}", flush=True)
        if not finished(content):
            command = [*PROGRAM, "--work", name, "--out", str(out), "--data-dir", str(session.data_dir),
                       "--device", session.device, *["--rehearse"] * session.rehearsal]  # fmt: skip
            try:
                content = perform(name, command, file, options.limit, about)
            finally:
                write_text(out / "report.md", page(contents(out)))
        print(f"== {name}: {content['verdict']}", flush=True)
        passed.append(content["passed"])
    print(f"{out / 'report.md'}" + ("; the same command goes on with what is left" if None in passed else ""))
    return int(False in passed)


def contents(out: Path) -> dict[str, Content]:
    """The results that are there, by stage."""
    found = {name: read(out / f"{name}.json") for name in STAGES}
    return {name: content for name, content in found.items() if "verdict" in content}


def machine(device: str) -> dict[str, Any]:
    """What all results of a folder have in common."""
    name = torch.cuda.get_device_name() if device == "cuda" else processor()
    return {
        "processor": name,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "hta_fused": hta.__version__,
    }


def default_folder(device: str) -> Path:
    if device == "cpu":
        return ROOT / "runs" / "gpu-rehearsal"
    name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    return ROOT / "bench" / "results" / f"{name}-{time.strftime('%Y-%m-%d')}"
