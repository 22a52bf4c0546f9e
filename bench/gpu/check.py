"""Stage 1: the extension built for this card, the tests over every backend, compute-sanitizer over every kernel."""

import importlib.util
import json
import shutil
import sys
from functools import partial

import torch

from .session import BACKENDS, ROOT, Part, Result, Session, outcome, program, run, tail

FIRST = ("test_kernels", "test_ops", "test_gpu", "test_data")  # all kernels, and what is captured of them
# Installs from a registry; runs these stages.
NOT_HERE = ("test_package", "test_gpu_stages")
NEEDS = {"test_trainer": ("tqdm", "matplotlib", "sklearn"), "test_terminal": ("tqdm", "matplotlib", "sklearn")}


def parts(session: Session) -> dict[str, Part]:
    files = sorted(path.stem for path in (ROOT / "tests").glob("test_*.py") if path.stem not in NOT_HERE)
    first, others = [name for name in FIRST if name in files], [name for name in files if name not in FIRST]
    if session.rehearsal:
        first, others = ["test_schedule"], []
    backends = BACKENDS if session.device == "cuda" else tuple(session.backends)
    return {
        "build": partial(build, session),
        **{f"tests, {name}": partial(tests, name) for name in first},
        **{
            f"{tool}, {b}": partial(sanitizer, session, tool, b) for tool in ("memcheck", "racecheck") for b in backends
        },
        **{f"tests, {name}": partial(tests, name) for name in others},
    }


def build(session: Session) -> Result:
    if session.device == "cpu":
        return {"skipped": "there is no card to build for"}
    major, minor = torch.cuda.get_device_capability()
    status, output = run([sys.executable, "setup.py", "build_ext", "--inplace"], HTA_CUDA="auto",
                         TORCH_CUDA_ARCH_LIST=f"{major}.{minor}+PTX")  # fmt: skip
    if status:
        return {"passed": False, "output": tail(output)}
    # In a process of its own, since this one has loaded what was there before.
    status, output = run([sys.executable, "-c", "import json, hta_fused; print(json.dumps(hta_fused.backends()))"])
    found = {} if status else json.loads(output.splitlines()[-1])
    return {"passed": found.get("cuda", "").startswith("available"), "backends": found, "output": tail(output, 3)}


def tests(name: str) -> Result:
    missing = [module for module in ("pytest", *NEEDS.get(name, ())) if importlib.util.find_spec(module) is None]
    if missing:
        return {"skipped": f"{', '.join(missing)} not installed"}
    status, output = run([sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"tests/{name}.py"])
    return {**outcome(status, output), "rows": {"": {"": tail(output, 1).strip("= ")}}}


def sanitizer(session: Session, tool: str, backend: str) -> Result:
    found = shutil.which("compute-sanitizer")
    if found is None:
        return {"skipped": "compute-sanitizer is not on the PATH"}
    command = [found, "--tool", tool, "--error-exitcode", "9", "--launch-timeout", "60",
               *program("launches", backend, session.device)]  # fmt: skip
    return outcome(*run(command, PYTORCH_NO_CUDA_MEMORY_CACHING="1"), lines=6)
