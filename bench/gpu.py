"""Everything that a machine with an NVIDIA GPU is to show, by one command, with no network and nothing but torch.

    python3 -m bench.gpu [--out DIR] [--data-dir CIFAR10] [--only STAGE …]

Stages: build (the extension, for this card), tests (the suite, every backend), sanitizer (compute-sanitizer's memcheck
and racecheck on the kernels), counters (DRAM bytes by Nsight Compute), speed (the step and a training step against
their rivals), train (VGG16 by SGD and by HTA). What a machine has no tool for is left out, and the summary says so.
Writes DIR/gpu.json and pictures, anew after each stage; DIR is bench/results/<gpu>-<date> by default.
"""

import argparse
import csv
import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

ROOT = Path(__file__).resolve().parent.parent
STAGES = ("build", "tests", "sanitizer", "counters", "speed", "train")
FLAT_SIZES = (15_000_576, 150_000_640)
# The kernel tests that a memory checker, some hundred times slower, is given.
CHECKED = "low_gradients or start_anywhere or harmless or any_dtype or mirrored"


def run(command: list[str], limit: float, **environment: str) -> tuple[int, str]:
    """A command's exit status and output; 124 where it outlasts `limit` seconds."""
    try:
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                              timeout=limit, env={**os.environ, "PYTHONPATH": str(ROOT), **environment})  # fmt: skip
        return done.returncode, done.stdout
    except subprocess.TimeoutExpired as stopped:
        output = stopped.stdout or b""
        return 124, output.decode(errors="replace") if isinstance(output, bytes) else output


def tail(text: str, lines: int = 12) -> str:
    return "\n".join(text.strip().splitlines()[-lines:])


# --------------------------------------------------------------------------------------------------------------- stages


def build() -> dict[str, Any]:
    major, minor = torch.cuda.get_device_capability()
    status, output = run([sys.executable, "setup.py", "build_ext", "--inplace"], 300, HTA_CUDA="auto",
                         TORCH_CUDA_ARCH_LIST=f"{major}.{minor}+PTX")  # fmt: skip
    return {"passed": status == 0, "output": tail(output)}


def tests() -> dict[str, Any]:
    # test_package.py installs from a registry; test_trainer.py and test_terminal.py need the extra train. The rest needs neither.
    trained = all(importlib.util.find_spec(module) for module in ("tqdm", "matplotlib", "sklearn"))
    left_out = ["test_package.py"] + ["test_trainer.py", "test_terminal.py"] * (not trained)
    files = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "tests").glob("test_*.py") if p.name not in left_out)
    status, output = run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files], 420)
    return {"passed": status == 0, "left_out": left_out, "output": tail(output)}


def sanitizer() -> dict[str, Any]:
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return {"skipped": "compute-sanitizer is not on the PATH"}
    result: dict[str, Any] = {}
    for check in ("memcheck", "racecheck"):
        command = [tool, "--tool", check, "--error-exitcode", "9", "--launch-timeout", "60", sys.executable, "-m", "pytest",
                   "-q", "-x", "-p", "no:cacheprovider", "tests/test_gpu.py", "tests/test_data.py", "-k", CHECKED]  # fmt: skip
        status, output = run(command, 150, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        result[check] = {"passed": status == 0, "output": tail(output, 6)}
    result["passed"] = all(entry["passed"] for entry in result.values())
    return result


COUNTED = """
import torch, hta_fused as hta
hta.use_backend("{backend}")
torch.set_default_device("cuda")
n = {n}
model = torch.nn.ParameterList([torch.randn(n)])
replicas = hta.Replicas(model, partition={{"0": 1}})
optimizer = hta.HomotopySGD(replicas, 0.1, 0.9, skip_nonfinite=False)
optimizer.step(); optimizer.step()
torch.cuda.synchronize()
"""


def counters() -> dict[str, Any]:
    tool = shutil.which("ncu")
    if tool is None:
        return {"skipped": "Nsight Compute (ncu) is not on the PATH"}
    n = FLAT_SIZES[1]
    result: dict[str, dict[str, Any]] = {}
    for backend in gpu_backends():
        command = [tool, "--clock-control", "none", "--csv", "--metrics", "dram__bytes_read.sum,dram__bytes_write.sum",
                   "-k", "regex:step_kernel", "--launch-skip", "1", "--launch-count", "1",
                   sys.executable, "-c", COUNTED.format(backend=backend, n=n)]  # fmt: skip
        status, output = run(command, 120)
        per_element = dram_bytes(output) / n
        result[backend] = {"bytes_per_element": per_element, "counted": 44.0, "passed": status == 0}
        if math.isnan(per_element):
            result[backend]["output"] = tail(output)
    return {**result, "passed": all(abs(r["bytes_per_element"] / 44 - 1) < 0.03 for r in result.values())}


def dram_bytes(output: str) -> float:
    """The sum of the DRAM metrics in ncu's CSV; NaN if there are none."""
    lines = output.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        return math.nan
    factors = {"byte": 1, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9}
    rows = [row for row in csv.DictReader(lines[start:]) if row["Metric Name"].startswith("dram__bytes")]
    return (
        sum(float(r["Metric Value"].replace(",", "")) * factors[r["Metric Unit"]] for r in rows) if rows else math.nan
    )


def gpu_backends() -> list[str]:
    import hta_fused as hta

    return [
        name
        for name, state in hta.backends().items()
        if state.startswith("available") and name not in ("cpu", "reference")
    ]


@contextmanager
def on_the_gpu(backend: str) -> Iterator[None]:
    import hta_fused as hta

    torch.set_default_device("cuda")
    hta.use_backend(backend)
    try:
        yield
    finally:
        hta.use_backend(None)
        torch.set_default_device(None)


def speed(out: Path) -> dict[str, Any]:
    """The step on flat buffers and on VGG16's list of tensors, then a training step."""
    from . import measure, plots, rivals, workloads

    results = []
    for backend in gpu_backends():
        with on_the_gpu(backend):
            for n in FLAT_SIZES:
                result = measure.step(lambda n=n: workloads.flat(n), 30, names=() if n > 1e8 else None)
                result["title"] += f" · {backend}"
                measure.ratio_claims(result, {"roof": 0.92})
                results.append(result)
            result = measure.step(lambda: workloads.model("vgg16"), 30)
            result["title"] += f" · {backend}"
            measure.ratio_claims(result, {rivals.NAIVE: 20.0, "torch._foreach_*": 5.0, "torch.compile": 1.3})
            results.append(result)
            torch.cuda.empty_cache()
    plots.ratios(results, out / "step.png", caption())
    plots.roofline(results[0], out / "roofline.png", caption())
    with on_the_gpu(gpu_backends()[0]):
        for batch, bound in ((128, 1.6), (1024, 2.0)):
            for precision in ("fp32", "bf16"):
                results.append(training("vgg16", precision, batch, bound, 10))
    for result in results:
        print(measure.show(result), flush=True)
    return {"results": results, "passed": all(c["met"] for r in results for c in r.get("claims", []))}


def caption() -> str:
    return f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}"


class UsualDataset(Dataset):
    """As training scripts have it: each image is cropped, mirrored and normalised by itself, by a worker."""

    def __init__(self, images: Tensor, labels: Tensor, mean: Tensor, std: Tensor):
        self.images, self.labels, self.mean, self.std = images, labels, mean, std

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = torch.nn.functional.pad(self.images[index].float() / 255, (4, 4, 4, 4))
        row, column = torch.randint(9, (2,)).tolist()
        image = image[:, row : row + 32, column : column + 32]
        if torch.rand(()) < 0.5:
            image = image.flip(-1)
        return (image - self.mean) / self.std, int(self.labels[index])


def training(
    name: str, precision: str, batch: int, bound: float, rounds: int, device: str = "cuda", width: float = 1.0
) -> dict[str, Any]:
    """HTA's training step beside SGD's, each captured in a graph with its data, and beside the usual script's."""
    from hta_fused.train import Job, Run, Settings, data
    from hta_fused.train.run import batches_of
    from hta_fused.train.vgg import VGG

    from . import measure

    torch.set_default_device(None)  # the trainer names its devices, and a DataLoader's sampler wants the CPU
    images = data.synthetic(train=(100 if device == "cuda" else 4) * batch, test=64)
    chosen: dict[str, Any] = dict(model=name, width=width, batch_size=batch, precision=precision, device=device)
    settings = Settings(dataset="synthetic", **chosen)
    steps: dict[str, Callable[[], None]] = {}
    runs = {}
    for label, method in (("HTA, both copies", "hta"), ("SGD(fused=True)", "sgd")):
        job = Job(label, method, settings.epochs, 0)
        run_ = runs[label] = Run(settings, job, batches_of(images, settings, job.seed))
        run_.start_epoch()

        def step(run_=run_) -> None:
            if run_.batch == len(run_.batches) - 1:  # the last may be smaller
                run_.batch = 0
                run_.start_epoch()
            run_.advance()

        for _ in range(6):  # warmed up, captured
            step()
        steps[label] = step

    script = VGG(name, settings.batch_norm, width).to(device)
    optimizer = torch.optim.SGD(script.parameters(), 0.05, momentum=0.9, weight_decay=5e-4)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (images.mean, images.std))
    loader = DataLoader(UsualDataset(images.train, images.train_labels, mean, std), batch, shuffle=True, pin_memory=device == "cuda",
                        num_workers=min(8, os.cpu_count() or 1), persistent_workers=True, drop_last=True)  # fmt: skip

    def endless() -> Iterator[list[Tensor]]:
        while True:
            yield from loader

    stream = endless()

    def usual() -> None:
        x, y = next(stream)
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(
            script(x.to(device, non_blocking=True)), y.to(device, non_blocking=True)
        )
        loss.backward()
        optimizer.step()
        loss.item()  # the running loss that such scripts print

    both, one, other = "HTA, both copies", "SGD(fused=True)", "the usual script (DataLoader, float32, eager)"
    times = measure.measure({**steps, other: usual}, rounds, gpu=device == "cuda")
    captured = {label: run_.graphed is not None and run_.graphed.graph is not None for label, run_ in runs.items()}
    per_copy = {label: (2 if label == both else 1) * batch / seconds for label, (seconds, _) in times.items()}
    return {
        "title": f"Training {name.upper()}, batch {batch}, {precision}, {settings.chosen_format.replace('_', '-')}",
        "base": both,
        "times": times,
        "captured": captured,
        "images_per_second": per_copy,
        "claims": [
            measure.claim("HTA's step over SGD's", times[both][0] / times[one][0], bound, "at most"),
            measure.claim(
                "images/s per copy over the usual script's", per_copy[both] / per_copy[other], 10.0, "at least"
            ),
        ],
    }


def train(out: Path, data_dir: Path | None) -> dict[str, Any]:
    """VGG16 by SGD and by HTA, for a few epochs, through the trainer itself."""
    from hta_fused.train import Settings, Trainer

    folder = out / "vgg16"
    shutil.rmtree(folder, ignore_errors=True)
    found = data_dir is not None and data_dir.exists()
    settings = Settings(
        dataset="cifar10" if found else "synthetic", data_dir=data_dir or Path("data"), model="vgg16", width=1.0,
        epochs=8, batch_size=128, precision="bf16", L_start=0.01, L_stop=0.007, device="cuda", out=folder,
    )  # fmt: skip
    lines: list[str] = []

    def report(text: str) -> None:
        lines.append(text)
        print(text, flush=True)

    Trainer(settings, report=report).train()
    for heavy in folder.glob("*.pt"):
        heavy.unlink()
    summary = json.loads((folder / "summary.json").read_text())
    return {"runs": summary["runs"], "passed": not any("no CUDA graph" in line for line in lines)}


# ----------------------------------------------------------------------------------------------------------------- main


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "bench.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="the folder for results")
    parser.add_argument("--data-dir", type=Path, help="CIFAR-10, as hta-train takes it; synthetic images without it")
    parser.add_argument(
        "--only", nargs="+", choices=STAGES, default=STAGES, metavar="STAGE", help=f"of {', '.join(STAGES)}"
    )
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        sys.exit("bench.gpu: this torch sees no CUDA device (torch.cuda.is_available() is False)")
    name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    out = options.out or ROOT / "bench" / "results" / f"{name}-{time.strftime('%Y-%m-%d')}"
    out.mkdir(parents=True, exist_ok=True)
    file = out / "gpu.json"
    content: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"stages": {}}

    work: dict[str, Callable[[], dict[str, Any]]] = {
        "build": build, "tests": tests, "sanitizer": sanitizer, "counters": counters,
        "speed": lambda: speed(out), "train": lambda: train(out, options.data_dir),
    }  # fmt: skip
    for stage in options.only:
        print(f"== {stage}", flush=True)
        start = time.perf_counter()
        try:
            result = work[stage]()
        except Exception as error:  # the stages after it still have something to show
            result = {"passed": False, "error": f"{type(error).__name__}: {error}"}
        result["seconds"] = round(time.perf_counter() - start, 1)
        content["stages"][stage] = result
        shown = result.get("skipped") or ("passed" if result.get("passed") else "NOT PASSED")
        print(
            f"== {stage}: {shown}, {result['seconds']} s\n" + str(result.get("error") or result.get("output") or ""),
            flush=True,
        )
        if stage != "build":  # not before there is an extension to load
            from hta_fused.files import write_json

            from . import measure

            content["machine"] = {**measure.machine(), "processor": torch.cuda.get_device_name()}
            write_json(file, content)
    print(json.dumps({stage: r.get("passed", "skipped") for stage, r in content["stages"].items()}))


if __name__ == "__main__":
    main()
