"""What all tests share: fresh random inputs, and the backends, dtypes, sizes and label patterns to run them over."""

import ctypes
import mmap
import os
import random

import pytest
import torch

GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import emulation

import hta_fused as hta
from hta_fused.kernels import nvrtc, reference

# Around the tile of 1024 elements and the chunk of 16 tiles, and one that no lane width divides.
SIZES = (0, 1, 7, 1023, 1024, 1025, 16 * 1024, 16 * 1024 + 1, 1_000_003)
DTYPES = (torch.float32, torch.float64)
LABELS = ("none", "bytes", "structural", "mixed", "random", "hashed")
AVAILABLE = [name for name, state in hta.backends().items() if state.startswith("available")]
if not GPU and emulation.COMPILER:
    AVAILABLE.append("nvrtc")
GPU_BACKENDS = [name for name in AVAILABLE if name in ("cuda", "triton", "nvrtc")]


@pytest.fixture(autouse=True)
def seed():
    """Fresh inputs at every run; a failure shows the seed, and HTA_TEST_SEED brings it back."""
    value = int(os.environ.get("HTA_TEST_SEED", random.SystemRandom().randrange(2**31)))
    print(f"HTA_TEST_SEED={value}")
    torch.manual_seed(value)
    return value


@pytest.fixture(params=AVAILABLE)
def backend(request, monkeypatch):
    """Each backend in turn. Where there is no GPU, its kernels run on the CPU: Triton's in the interpreter, the CUDA
    source in an emulator. Where there is one, the tensors that a test makes are on it."""
    if request.param in GPU_BACKENDS and GPU:
        torch.set_default_device("cuda")
    elif request.param == "nvrtc":
        monkeypatch.setattr(nvrtc, "launch", emulation.launch)
        monkeypatch.setattr(nvrtc, "why_not", lambda device: "")
    hta.use_backend(request.param)
    yield request.param
    hta.use_backend(None)
    torch.set_default_device(None)


needs_emulator = pytest.mark.skipif(emulation.COMPILER is None, reason="no C++ compiler")


@pytest.fixture
def emulated(monkeypatch, tmp_path):
    """Runs the GPU's source on the CPU with a change to its text: emulated(was, planted)."""
    monkeypatch.setattr(nvrtc, "launch", emulation.launch)
    monkeypatch.setattr(nvrtc, "why_not", lambda device: "")
    sources = {str(path.relative_to(nvrtc.SOURCE)): path.read_text() for path in nvrtc.SOURCE.glob("**/*.*h")}

    def plant(was: str, planted: str, few: str = "float") -> None:
        assert sum(text.count(was) for text in sources.values()) == 1
        (tmp_path / "gpu").mkdir()
        for name, text in sources.items():
            if not name.startswith("cpu"):
                (tmp_path / name).write_text(text.replace(was, planted))
        monkeypatch.setattr(nvrtc, "SOURCE", tmp_path)
        nvrtc.structs.cache_clear()
        changed = emulation.library.__wrapped__(few)
        monkeypatch.setattr(emulation, "library", lambda: changed)
        hta.use_backend("nvrtc")

    yield plant
    hta.use_backend(None)
    nvrtc.structs.cache_clear()


def pytest_collection_modifyitems(config, items):
    """Triton's interpreter takes a second for 30,000 elements, the emulator for a million: they are spared the largest
    size and near duplicates."""

    def slow(item) -> bool:
        values = item.callspec.params if hasattr(item, "callspec") else {}
        n, backend = values.get("n"), values.get("backend")
        if GPU or backend not in ("triton", "nvrtc"):
            return False
        if backend == "triton":
            return n in (7, 1023, 16 * 1024, 1_000_003)
        return n == 1_000_003 and values.get("kind") != "mixed"

    config.hook.pytest_deselected(items=[item for item in items if slow(item)])
    items[:] = [item for item in items if not slow(item)]


def pattern(kind: str, n: int, copies: int = 2):
    """(what a user passes as labels, the same as a byte an element)."""
    labels = copies + 1
    random_bytes = torch.randint(0, labels, (n,), dtype=torch.uint8)
    # Runs of a few tiles whose ends do not fall on tiles' ends: most tiles have one label, some mix.
    runs = (torch.arange(n) // 2500 % labels).byte()
    whole = (torch.arange(n) // 2048 % labels).byte()
    if kind == "none":
        return None, torch.zeros(n, dtype=torch.uint8)
    if kind == "bytes":
        return random_bytes, random_bytes
    if kind == "hashed":  # beside tiles of one label and tiles of bytes
        partition = hta.Partition(runs, blocks=copies)
        partition.codes[::2, 1] = reference.HASHED
        partition.seed = torch.randint(-(2**62), 2**62, (1,))
        return partition, partition.flat()
    per_element = {"structural": whole, "mixed": runs, "random": random_bytes}[kind]
    return hta.Partition(per_element, blocks=copies), per_element


def guarded(tensor):
    """The same numbers up to a page's end, beyond which nothing may be read: an access there ends the process."""
    page = mmap.PAGESIZE
    size = (tensor.nbytes // page + 2) * page
    memory = mmap.mmap(-1, size)
    end = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + size - page
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(end), page, 0) == 0
    held = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=size - page - tensor.nbytes)
    return held.view(tensor.shape).copy_(tensor)


def relative_error(actual: torch.Tensor, expected: torch.Tensor, *terms: torch.Tensor) -> float:
    """The largest error over the largest magnitude among what was expected and the terms it was summed from."""
    if not expected.numel():
        return 0.0
    error = (actual.double() - expected.double()).abs().max()
    scale = max(t.double().abs().max() for t in (expected, *terms))
    return float(error / scale) if scale else float(error)
