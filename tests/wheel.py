"""Installs the wheel and the sdist that lie in dist/ in clean environments, with old and new torch, and tests them there.

    python tests/wheel.py                                     this Python, torch 2.10.0 and 2.13.0: `make wheel` runs it
    python tests/wheel.py --python python3.12 --torch 2.14.1

The environments, which hold torch, are kept in .venv-wheel for the next time; hta_fused is installed in them anew.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
# Of what the package is imported for. Its commands want more than it depends on: they are the checkout's to test.
TESTS = [f"test_{name}.py" for name in ("ops", "couplings", "proposals", "partition", "formats", "replicas", "module", "optim", "schedule",
         "bad_inputs", "compile", "distributed", "path")]  # fmt: skip
QUICK = "not triton and not nvrtc"  # their interpreter and emulator take minutes, and are the checkout's tests
SMOKE = """
import sys, warnings
import torch
import hta_fused as hta
assert sys.prefix in hta.__file__, hta.__file__
model, twin = (torch.nn.Linear(4, 4) for _ in range(2))
twin.load_state_dict(model.state_dict())
x = torch.randn(8, 4)
replicas = hta.Replicas(model, copies=1)
ours = hta.CoupledOptimizer(replicas, hta.SGD(0.1, 0.9), hta.Average(every=1))
torchs = torch.optim.SGD(twin.parameters(), 0.1, momentum=0.9)
for _ in range(3):
    for optimizer, net in ((ours, replicas), (torchs, twin)):
        optimizer.zero_grad()
        output = net(x)
        (output[0] if isinstance(output, tuple) else output).square().sum().backward()
        optimizer.step()
torch.testing.assert_close(model.weight, twin.weight)
print("cpu:", hta.backends()["cpu"])
"""


def check(command: list, folder: Path, **changes: str) -> str:
    """Runs a command in a folder, outside any checkout, and returns what it printed; ends us where it fails."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "HTA_"))} | changes
    done = subprocess.run(list(map(str, command)), cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout


def environment(python: str, torch: str) -> Path:
    """An environment's Python, with a torch and what the tests import."""
    name = check([python, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"], ROOT).strip()
    folder = ROOT / ".venv-wheel" / f"python-{name}-torch-{torch}"
    if not (folder / "ready").exists():
        check([python, "-m", "venv", "--clear", folder], ROOT)
        check([folder / "bin/python", "-m", "pip", "install", f"torch=={torch}", "numpy", "scipy", "pytest", "setuptools>=77"], ROOT)  # fmt: skip
        (folder / "ready").touch()
    return folder / "bin/python"


def contents(wheel: Path) -> str:
    """Its tag and size, once it is seen to be what it should be."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    tag = re.fullmatch(r"hta_fused-[^-]+-(cp310-abi3-.*manylinux_\d+_\d+_.*)\.whl", wheel.name)
    libraries = [name for name in names if ".so" in name]
    if tag is None or libraries != ["hta_fused/_C.so"]:
        sys.exit(f"{wheel.name} must be an abi3 manylinux wheel with the one library hta_fused/_C.so, has {libraries}")
    return f"{tag[1]}, {wheel.stat().st_size / 1e6:.2f} MB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dist", type=Path, default=ROOT / "dist", help="where the wheel and the sdist lie")
    parser.add_argument("--python", default=sys.executable, help="the interpreter of the environments")
    parser.add_argument("--torch", nargs="+", default=["2.10.0", "2.13.0"], help="versions")
    options = parser.parse_args()
    (wheel,), (sdist,) = (list(options.dist.resolve().glob(pattern)) for pattern in ("*.whl", "*.tar.gz"))
    print(f"wheel: {contents(wheel)}", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for part in ("tests", "docs"):  # whose code is tested
            shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__", "clients"))
        for torch in options.torch:
            python = environment(options.python, torch)
            install = [python, "-m", "pip", "install", "--no-deps", "--force-reinstall"]
            check([*install, wheel], folder)
            print(f"torch {torch}, wheel: {check([python, '-c', SMOKE], folder).strip()}", flush=True)
            tests = [python, "-m", "pytest", "-p", "no:cacheprovider", "-k", QUICK, *TESTS]
            last = check(tests, folder / "tests", OMP_NUM_THREADS="1").splitlines()[-1]
            print(f"torch {torch}, wheel: tests: {last.strip('= ')}", flush=True)
            for compiler, state in (("no-such-compiler", "the extension was not built"), ("c++", "available")):
                check([*install, "--no-build-isolation", sdist], folder, CXX=compiler, HTA_CUDA="0")
                said = check([python, "-c", SMOKE], folder).strip()
                if not said.startswith(f"cpu: {state}"):
                    sys.exit(f"the sdist, built by {compiler}, is {said!r}, not {state!r}")
                print(f"torch {torch}, sdist, {compiler}: {said}", flush=True)


if __name__ == "__main__":
    main()
