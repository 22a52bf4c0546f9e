"""Builds the C++ extension, with its CUDA kernels where there is an nvcc; all else about the package is in pyproject.toml.

Without a C++ compiler the package installs all the same, and its ops run in plain PyTorch.

pyproject.toml does not ask for torch to build with. Build isolation would fetch gigabytes of CUDA for it, beside the torch
that is already there, and any torch will do: the stable ABI makes one build serve them all. So we look for torch in the
environment that is installed into. Only where there is none do we ask for one, which the package depends on anyway.

Environment:

    HTA_CUDA              auto (default): CUDA kernels if an nvcc is found; 1: fail without one; 0: leave them out
    TORCH_CUDA_ARCH_LIST  CUDA targets such as "8.0;9.0+PTX"; by default all that the toolkit can do
"""

import os
import re
import shutil
import site
import subprocess
import sys
from contextlib import contextmanager, nullcontext
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

TORCH = (2, 10)  # the oldest release whose stable ABI has what we call
WANTED = "torch>={}.{}".format(*TORCH)
SOURCES = [path for path in Path("csrc").rglob("*") if path.suffix in (".h", ".cuh", ".cu", ".cpp")]
CUDA_SOURCES = [
    path for path in SOURCES if path.parent.name == "gpu" or (path.parent == Path("csrc") and path.suffix == ".h")
]
CUDA_TARGETS = ("60", "70", "75", "80", "86", "89", "90", "100", "120")


def say(text: str) -> None:
    print(f"hta_fused: {text}", file=sys.stderr)


def find_torch() -> bool:
    """Whether a torch to build against can be imported, if need be from the environment that build isolation hides."""
    for folder in (*site.getsitepackages(), site.getusersitepackages()):
        site.addsitedir(folder)  # behind what is on the path
    try:
        return tuple(map(int, version("torch").split(".")[:2])) >= TORCH
    except PackageNotFoundError:
        return False


COMPILER = os.environ.get("CXX", "c++").split()[0]
HAS_COMPILER = shutil.which(COMPILER) is not None
HAS_TORCH = HAS_COMPILER and find_torch()
if HAS_TORCH:
    from torch.utils.cpp_extension import BuildExtension, CppExtension
else:
    BuildExtension, CppExtension = build_ext, Extension


def find_nvcc() -> str | None:
    """The nvcc to use, or None; the compiler decides, not the card of the machine that builds."""
    wish = os.environ.get("HTA_CUDA", "auto")
    if wish not in ("auto", "0", "1"):
        sys.exit(f"hta_fused: HTA_CUDA must be auto, 1 or 0, got {wish!r}")
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    places = [os.environ.get("CUDACXX"), home and f"{home}/bin/nvcc", "nvcc", "/usr/local/cuda/bin/nvcc"]
    nvcc = next(filter(None, (shutil.which(place) for place in places if place)), None) if wish != "0" else None
    if nvcc is None and wish == "1":
        sys.exit(
            "hta_fused: HTA_CUDA=1, but there is no nvcc: not in CUDACXX, CUDA_HOME/bin, the PATH or /usr/local/cuda"
        )
    if nvcc is None and wish == "auto":
        say("no nvcc found, so the CUDA kernels are left out; on a GPU, Triton or NVRTC kernels will serve")
    return nvcc


def cuda_targets(nvcc: str) -> tuple[list[str], str]:
    """The targets to compile for, as "90", and the one whose PTX to embed for cards to come."""
    known = re.findall(r"sm_(\d+)", subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True).stdout)
    asked = re.split(r"[;, ]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip())
    if asked == [""]:
        targets = [target for target in CUDA_TARGETS if target in known]
        return targets, targets[-1]
    targets, ptx = [], ""
    for name in asked:
        match = re.fullmatch(r"(\d+)\.(\d)a?f?(\+PTX)?", name)
        target = match[1] + match[2] if match else name
        if target not in known:
            sys.exit(
                f"hta_fused: TORCH_CUDA_ARCH_LIST asks for {name!r}, which {nvcc} cannot compile for; it knows "
                f"{', '.join(f'{k[:-1]}.{k[-1]}' for k in known)}. Older cards need an older toolkit (7.0 and 6.0: CUDA 12); "
                "or leave them out: NVRTC compiles for them at run time"
            )
        targets.append(target)
        if match and match[3]:
            ptx = target
    return targets, ptx


class Build(BuildExtension):
    """Compiles launch.cu by itself, since torch.utils.cpp_extension refuses CUDA beside a CPU-only torch; and meanwhile
    the rest, which keeps one core busy as long."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.no_python_abi_suffix = True

    def finalize_options(self) -> None:
        # Where objects stay, so that only what has changed is compiled anew; pip has another folder each time.
        self.build_temp = self.build_temp or "build/objects"
        super().finalize_options()

    def build_extension(self, extension) -> None:
        if not HAS_TORCH:
            sys.exit(f"hta_fused: there is no {WANTED} to build against: `pip install torch`, then this again")
        nvcc = find_nvcc()
        with self.cuda_beside(*self.add_cuda(extension, nvcc)) if nvcc else nullcontext():
            super().build_extension(extension)

    @contextmanager
    def cuda_beside(self, command: list[str], out: Path):
        """While it is open nvcc runs, if it must; what g++ compiles meanwhile is not linked before nvcc is done."""
        stamp, newest = out.with_suffix(".command"), max(path.stat().st_mtime for path in CUDA_SOURCES)
        if out.exists() and stamp.exists() and stamp.read_text() == str(command) and out.stat().st_mtime > newest:
            yield
            return
        stamp.unlink(missing_ok=True)
        process, compile_rest = subprocess.Popen(command), self.compiler.compile

        def compile_and_wait(*args, **options):
            objects = compile_rest(*args, **options)
            if process.wait():
                sys.exit(f"hta_fused: {command[0]} failed, see above; HTA_CUDA=0 builds without CUDA")
            stamp.write_text(str(command))
            return objects

        self.compiler.compile = compile_and_wait
        try:
            yield
        finally:
            process.kill()

    def add_cuda(self, extension, nvcc: str) -> tuple[list[str], Path]:
        """Adds the CUDA kernels' object to the extension; returns the command that makes it, and where."""
        # nvcc on the PATH may be a script that stands for the real one: ask where the toolkit is.
        dry = subprocess.run(
            [nvcc, "--dryrun", "-x", "cu", os.devnull, "-o", os.devnull], capture_output=True, text=True
        )
        top = Path(re.search(r"TOP=(\S+)", dry.stderr)[1]).resolve()
        libraries = next((p.parent for p in sorted(top.glob("**/libcudart_static.a"))), None)
        if libraries is None:
            sys.exit(f"hta_fused: {nvcc} has no libcudart_static.a under {top}; HTA_CUDA=0 builds without CUDA")
        targets, ptx = cuda_targets(nvcc)
        out = Path(self.build_temp) / "cuda.o"
        out.parent.mkdir(parents=True, exist_ok=True)
        command = [nvcc, "-c", "csrc/gpu/launch.cu", "-Icsrc", "-o", str(out), "-O3", "-std=c++17", "-fmad=false", "-t", "0",
                   "-Xcompiler", "-fPIC,-fvisibility=hidden"]  # fmt: skip
        command += [f"-gencode=arch=compute_{t},code=sm_{t}" for t in targets]
        if ptx:
            command.append(f"-gencode=arch=compute_{ptx},code=compute_{ptx}")
        if os.environ.get("CXX"):
            command += ["-ccbin", os.environ["CXX"].split()[0]]
        say(f"compiling CUDA kernels for {', '.join(targets)}{f', PTX of {ptx}' if ptx else ''}")
        extension.extra_objects = [*extension.extra_objects, str(out)]
        extension.library_dirs.append(str(libraries))
        extension.libraries += ["cudart_static", "dl", "rt", "pthread"]
        label = " ".join(targets) + ("+PTX" if ptx else "")
        extension.extra_compile_args["cxx"] += ["-DHTA_WITH_CUDA", f'-DHTA_CUDA_TARGETS="{label}"']
        return command, out


def extensions() -> list:
    if not HAS_COMPILER:
        say(
            f"no C++ compiler ({COMPILER!r} is not on the PATH), so the fused kernels are left out and the slower "
            "pure-PyTorch backend will serve. Install one (g++ or clang++) and reinstall to have them."
        )
        return []
    return [
        CppExtension(
            "hta_fused._C",
            ["csrc/bind.cpp", "csrc/cpu/kernels.cpp"],
            include_dirs=["csrc"],
            depends=[str(path) for path in SOURCES],
            # No contraction into FMA: the same bits on every processor.
            extra_compile_args={
                "cxx": [
                    "-O3",
                    "-g0",
                    "-std=c++20",
                    "-ffp-contract=off",
                    "-fno-math-errno",  # so that a square root is one instruction
                    "-fvisibility=hidden",
                    "-DTORCH_TARGET_VERSION=0x{:02x}{:02x}000000000000".format(*TORCH),
                ]
            },
            py_limited_api=True,
        )
    ]


setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": Build},
    # pip asks for it by egg_info; under any other command setuptools would fetch it itself.
    setup_requires=[WANTED] if HAS_COMPILER and not HAS_TORCH and "egg_info" in sys.argv else [],
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
