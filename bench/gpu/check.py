"""Stage 1: the extension built for this card, compute-sanitizer over the kernels, the tests over every backend.

python -m bench.gpu.check DEVICE      a step by each backend that there is
"""

import importlib.util
import json
import os
import shutil
import sys
from functools import partial
from itertools import product

import torch

import hta_fused as hta

from .session import BACKENDS, Part, Result, Session, default_device, outcome, outcome_of_tool, program, run, tail

# The tests that use a GPU: those of all kernels, and of what is captured of them; then those that can wait.
FIRST = ("test_kernels", "test_ops", "test_gpu", "test_data")
OTHERS = ("test_formats", "test_gpu_formats", "test_compile")
ON_THE_CPU = "planted or compiles or the_mirror or header"  # tests among them that need no GPU, and take minutes
FAILS = "fails: "  # how the state of a backend begins whose step does
WORKERS, MEMORY = 12, 2**31  # that test side by side at most; what each may need of the card


def parts(session: Session) -> dict[str, Part]:
    first, others = (FIRST, OTHERS) if not session.rehearsal else (("test_schedule",), ())
    backends = BACKENDS if session.device == "cuda" else tuple(session.backends)
    watched = {
        f"{tool}, {b}": partial(sanitizer, session, tool, b) for tool, b in product(("memcheck", "racecheck"), backends)
    }
    early = next(iter(watched))
    return {
        "build": partial(build, session),
        early: watched.pop(early),
        **{f"tests, {name}": partial(tests, session, name) for name in first},
        **watched,
        **{f"tests, {name}": partial(tests, session, name) for name in others},
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
    status, output = run(program("check", session.device))
    if status:
        return {"passed": False, "output": tail(output)}
    found = json.loads(output.splitlines()[-1])
    wrong = [f"{name} {state}" for name, state in found.items() if state.startswith(FAILS)]
    if not found["cuda"].startswith("available"):
        wrong.append(f"cuda: {found['cuda']}")
    return {"passed": not wrong, "backends": found, "output": "; ".join(wrong)}


def first_steps(device: str) -> dict[str, str]:
    """What `backends` says; of those that serve a device and that a step fails by, or leaves wrong, how."""
    found = hta.backends()
    with default_device(device):
        copies, grads = torch.randn(2, 2, 5000)

        def stepped(name: str) -> torch.Tensor:
            hta.use_backend(name)
            x = copies.clone()
            hta.coupled_step_(x, grads, None, None, proposal=hta.SGD(0.1), coupling=hta.Homotopy(0.05))
            return x.cpu()

        wanted = stepped("reference")
        for name in BACKENDS if device == "cuda" else ("cpu",):
            if found[name].startswith("available"):
                try:
                    torch.testing.assert_close(stepped(name), wanted)
                except Exception as error:
                    found[name] = f"{FAILS}{type(error).__name__}: {tail(str(error))}"
    hta.use_backend(None)
    return found


def tests(session: Session, name: str) -> Result:
    if importlib.util.find_spec("pytest") is None:
        return {"skipped": "pytest not installed"}
    command = [sys.executable, "-m", "pytest", "-vv", "-p", "no:cacheprovider", "-k", f"not ({ON_THE_CPU})"]
    if importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(workers(session.device)), "--dist", "worksteal"]
    if importlib.util.find_spec("pytest_timeout") is not None:
        command += ["--timeout", "300"]
    log = session.out / "tests" / f"{name}.txt"  # of a part that is cut, too
    status, output = run([*command, f"tests/{name}.py"], log, OMP_NUM_THREADS="1", PYTHONUNBUFFERED="1")
    return {**outcome(status, output), "rows": {"": {"": tail(output, 1).strip("= ")}}}


def workers(device: str) -> int:
    """How many processes test at a time: as many as there are cores, and as the card has memory for."""
    room = torch.cuda.get_device_properties(0).total_memory // MEMORY if device == "cuda" else WORKERS
    return max(1, min(WORKERS, os.cpu_count() or 1, room))


def sanitizer(session: Session, tool: str, backend: str) -> Result:
    found = shutil.which("compute-sanitizer")
    if found is None:
        return {"skipped": "compute-sanitizer is not on the PATH"}
    command = [found, "--tool", tool, "--error-exitcode", "9", "--launch-timeout", "60",
               *program("launches", backend, session.device)]  # fmt: skip
    return outcome_of_tool(*run(command, PYTORCH_NO_CUDA_MEMORY_CACHING="1"), lines=6)


if __name__ == "__main__":
    print(json.dumps(first_steps(*sys.argv[1:])))
