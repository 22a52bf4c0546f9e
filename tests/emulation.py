"""The GPU kernels on the CPU, for machines without a GPU: csrc/gpu under emulator.cpp, behind nvrtc.launch."""

import ctypes
import hashlib
import os
import shutil
import subprocess
from functools import cache
from pathlib import Path

from hta_fused.kernels import nvrtc

COMPILER = shutil.which(os.environ.get("CXX", "c++").split()[0])


@cache
def library(few: str = "") -> ctypes.CDLL:
    """The emulator, compiled once for its sources; `few`: with the step's kernels of one type only."""
    source = Path(__file__).with_name("emulator.cpp")
    command = [COMPILER, "-O2", "-std=c++20", "-c", "-fPIC", "-ffp-contract=off", "-fsanitize=alignment",
               "-Wno-unknown-pragmas", *[f"-DFEW={few}"] * bool(few), *nvrtc.definitions()]  # fmt: skip
    texts = [path.read_bytes() for path in (source, *sorted(nvrtc.SOURCE.glob("**/*.*h")))]
    key = hashlib.sha256(b"\0".join([" ".join(command).encode(), *texts])).hexdigest()[:16]
    out = Path(__file__).parent.parent / "build" / f"emulator-{key}.so"  # for all workers, and for the next session
    if not out.exists():
        out.parent.mkdir(exist_ok=True)
        compiled, made = (out.with_suffix(f".{os.getpid()}{suffix}") for suffix in (".o", ""))
        subprocess.run([*command, f"-I{nvrtc.SOURCE}", str(source), "-o", str(compiled)], check=True)
        # By itself, without the sanitizer: its library is not everywhere, and emulator.cpp stands in for it.
        subprocess.run([COMPILER, "-shared", str(compiled), "-o", str(made)], check=True)
        compiled.unlink()
        made.replace(out)
    emulator = ctypes.CDLL(str(out))
    emulator.emulate.restype = emulator.kernel_names.restype = ctypes.c_char_p
    emulator.emulate.argtypes = [ctypes.c_char_p, ctypes.c_int64, ctypes.c_void_p]
    return emulator


def launch(expression, blocks, args, like) -> None:
    """Stands in for nvrtc.launch."""
    assert like.device.type == "cpu"
    error = library().emulate(expression.encode(), blocks, ctypes.addressof(args))
    assert error is None, f"{expression}: {error.decode()}"
