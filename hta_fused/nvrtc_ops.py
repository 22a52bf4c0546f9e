"""The CUDA kernels without nvcc: compiled at first use by NVRTC, which PyTorch's CUDA wheels bring, and kept on disk.

The kernels are csrc/cuda.cuh, the very source that nvcc compiles; what cuda.cu does in C++ is done here through the
CUDA driver. For cards that Triton does not serve, where the extension was built without CUDA. Imports reference.py only
for the size of a tile.
"""

import ctypes
import hashlib
import os
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from .reference import TILE

THREADS, CHUNK = 256, 4 * TILE  # as csrc/cuda.cuh has them; the compiler checks
TYPES = {torch.float32: "float", torch.float64: "double", torch.float16: "hta::Half", torch.bfloat16: "hta::BFloat16"}
_HERE = Path(__file__).parent
SOURCE = next(path for path in (_HERE / "csrc", _HERE.parent / "csrc") if path.exists())  # installed, or a checkout
_HEADERS = ("homotopy.h", "kernels.h")


def why_not(device: torch.device) -> str:
    """Why these kernels do not serve a device; empty if they do."""
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    if device.type != "cuda":
        return "it serves CUDA tensors"
    try:
        target(torch.cuda.get_device_capability(device))
    except (OSError, RuntimeError) as error:
        return str(error)
    return ""


# ---------------------------------------------------------------------------------------- csrc/kernels.h's structs


class Pattern(ctypes.Structure):
    _fields_ = [("codes", ctypes.c_void_p), ("labels", ctypes.c_void_p), ("rows", ctypes.c_int64)]


class Scalar(ctypes.Structure):
    _fields_ = [("narrow", ctypes.c_void_p), ("wide", ctypes.c_void_p)]


def _fields(names: str, kind: type = ctypes.c_void_p) -> list[tuple[str, type]]:
    return [(name, kind) for name in names.split()]


class StepArgs(ctypes.Structure):
    _fields_ = [
        *_fields("theta eta g_theta g_eta v_theta v_eta low_theta low_eta anchor"),
        ("pattern", Pattern),
        *_fields("hyper tables"),
        *_fields("groups n", ctypes.c_int64),
        *_fields("grad_scale found_inf", Scalar),
        *_fields("nonfinite partial stats"),
    ]


class PenaltyArgs(ctypes.Structure):
    _fields_ = [
        *_fields("theta eta anchor g_theta g_eta"),
        ("pattern", Pattern),
        ("L", ctypes.c_double),
        *_fields("accumulate n", ctypes.c_int64),
        *_fields("partial value"),
    ]


class BatchArgs(ctypes.Structure):
    _fields_ = [
        ("out", ctypes.c_void_p),
        ("strides", ctypes.c_int64 * 4),
        *_fields("out_labels images labels order offsets mirrored scale shift position"),
        *_fields("count size channels height width padding", ctypes.c_int64),
    ]


# A struct or a constant that is not the header's is an error of the compiler.
DEFINITIONS = [
    f"-DHTA_MIRROR={THREADS},{CHUNK},{TILE},"
    + ",".join(str(ctypes.sizeof(struct)) for struct in (StepArgs, PenaltyArgs, BatchArgs))
]

# ------------------------------------------------------------------------------------------------------------ compiling


@cache
def nvrtc() -> ctypes.CDLL:
    """NVRTC, from torch's own wheels if it is there.

    Raises:
        OSError: there is none.
    """
    places: list[Path] = []
    with suppress(ImportError):
        import nvidia

        for root in nvidia.__path__:
            places += sorted(Path(root).glob("*/lib/libnvrtc.so.*"))
    places += sorted((Path(torch.__file__).parent / "lib").glob("libnvrtc*.so*"))
    names = [str(path) for path in places if "builtins" not in path.name and ".alt." not in path.name]
    major = (torch.version.cuda or "").split(".")[0]
    names.sort(key=lambda name: f".so.{major}" not in name)
    for name in [*names, "libnvrtc.so", "libnvrtc.so.13", "libnvrtc.so.12"]:
        with suppress(OSError):
            return ctypes.CDLL(name)
    raise OSError("there is no libnvrtc; PyTorch's CUDA wheels bring it")


def _nvrtc(name: str, *args, library: ctypes.CDLL | None = None) -> None:
    library = nvrtc() if library is None else library
    status = getattr(library, f"nvrtc{name}")(*args)
    if status:
        library.nvrtcGetErrorString.restype = ctypes.c_char_p
        raise RuntimeError(f"nvrtc{name}: {library.nvrtcGetErrorString(status).decode()}")


def target(capability: tuple[int, int]) -> str:
    """The architecture to compile for: the card's own, or the newest that NVRTC knows, whose PTX the driver finishes.

    Raises:
        RuntimeError: the card is older than all that this NVRTC knows.
    """
    count = ctypes.c_int()
    _nvrtc("GetNumSupportedArchs", ctypes.byref(count))
    known = (ctypes.c_int * count.value)()
    _nvrtc("GetSupportedArchs", known)
    card = 10 * capability[0] + capability[1]
    if card in known:
        return f"sm_{card}"
    if card < min(known):
        raise RuntimeError(
            f"this NVRTC compiles for compute capability {min(known) / 10} and up, this card has {card / 10}"
        )
    return f"compute_{max(k for k in known if k < card)}"


def compile_kernel(expression: str, arch: str, ptx: bool = False) -> tuple[str, bytes]:
    """A kernel's lowered name and its machine code (PTX for a compute_… arch or where `ptx`), compiled or from the disk.

    Args:
        expression: such as "hta::gpu::step_kernel<float, float, true>".
        arch: such as "sm_70".

    Raises:
        RuntimeError: NVRTC refuses; the message holds its log.
    """
    sources = {name: (SOURCE / name).read_bytes() for name in (*_HEADERS, "cuda.cuh")}
    options = [f"--gpu-architecture={arch}", "-std=c++17", "-fmad=false", "-default-device", *DEFINITIONS]
    version = ctypes.c_int(), ctypes.c_int()
    _nvrtc("Version", *map(ctypes.byref, version))
    digest = hashlib.sha256(repr((sources, options, expression, [v.value for v in version], ptx)).encode()).hexdigest()
    kept = _cache_folder() / digest[:32]
    with suppress(OSError):
        lowered_name, _, code = kept.read_bytes().partition(b"\0")
        return lowered_name.decode(), code

    program = ctypes.c_void_p()
    headers = (ctypes.c_char_p * len(_HEADERS))(*(sources[name] for name in _HEADERS))
    names = (ctypes.c_char_p * len(_HEADERS))(*(name.encode() for name in _HEADERS))
    _nvrtc("CreateProgram", ctypes.byref(program), sources["cuda.cuh"], b"cuda.cuh", len(_HEADERS), headers, names)
    try:
        _nvrtc("AddNameExpression", program, expression.encode())
        flags = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        try:
            _nvrtc("CompileProgram", program, len(options), flags)
        except RuntimeError as error:
            raise RuntimeError(f"{error}\n{_text(program, 'ProgramLog').decode()}") from None
        lowered = ctypes.c_char_p()
        _nvrtc("GetLoweredName", program, expression.encode(), ctypes.byref(lowered))
        name = (lowered.value or b"").decode()
        code = _text(program, "PTX" if ptx or arch.startswith("compute") else "CUBIN")
    finally:
        _nvrtc("DestroyProgram", ctypes.byref(program))
    with suppress(OSError):  # a folder that cannot be written costs a compilation in each process, no more
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=kept.parent, delete=False) as beside:
            beside.write(name.encode() + b"\0" + code)
        os.replace(beside.name, kept)
    return name, code


def _text(program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    _nvrtc(f"Get{what}Size", program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    _nvrtc(f"Get{what}", program, buffer)
    return buffer.raw


def _cache_folder() -> Path:
    wish = os.environ.get("HTA_CACHE_DIR")
    return Path(wish) if wish else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hta_fused"


# ------------------------------------------------------------------------------------------------------------ launching


@cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _cuda(name: str, *args) -> None:
    status = getattr(_driver(), f"cu{name}")(*args)
    if status:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(status, ctypes.byref(text))
        raise RuntimeError(f"cu{name}: {(text.value or b'unknown error').decode()}")


@cache
def _function(expression: str, device: int) -> ctypes.c_void_p:
    """A kernel on a device, whose context is the current one."""
    name, code = compile_kernel(expression, target(torch.cuda.get_device_capability(device)))
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    _cuda("ModuleLoadData", ctypes.byref(module), code)  # never unloaded
    _cuda("ModuleGetFunction", ctypes.byref(function), module, name.encode())
    return function


def launch(expression: str, blocks: int, args: ctypes.Structure, like: Tensor) -> None:
    """Launches a kernel on the current stream of a tensor's device."""
    if blocks == 0:
        return
    device = like.device.index
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream(device).cuda_stream
        parameters = (ctypes.c_void_p * 1)(ctypes.addressof(args))
        _cuda("LaunchKernel", _function(f"hta::gpu::{expression}", device), ctypes.c_uint(blocks), 1, 1, THREADS, 1, 1, 0,
              ctypes.c_void_p(stream), parameters, None)  # fmt: skip


# -------------------------------------------------------------------------------------------------------------- the ops


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _pattern(codes: Tensor | None, labels: Tensor | None) -> Pattern:
    rows = 0 if labels is None or codes is None else labels.numel() // TILE
    return Pattern(_pointer(codes), _pointer(labels), rows)


def _scalar(tensor: Tensor | None) -> Scalar:
    if tensor is None:
        return Scalar(None, None)
    return Scalar(None, tensor.data_ptr()) if tensor.dtype == torch.float64 else Scalar(tensor.data_ptr(), None)


def _scratch(like: Tensor) -> tuple[Tensor, int]:
    """The guard's flag and the blocks' sums; how many blocks."""
    blocks = -(-like.numel() // CHUNK)
    return torch.empty(1 + 3 * blocks, dtype=torch.float64, device=like.device), blocks


def step_(theta, eta, grad_theta, grad_eta, momentum_theta, momentum_eta, low_theta, low_eta, anchor, codes, labels,
          hyper, tables, grad_scale, found_inf, stats, skip_nonfinite) -> None:  # fmt: skip
    """See ops.homotopy_step_."""
    scratch, blocks = _scratch(theta)
    buffers = theta, eta, grad_theta, grad_eta, momentum_theta, momentum_eta, low_theta, low_eta, anchor
    args = StepArgs(
        *map(_pointer, buffers), _pattern(codes, labels), _pointer(hyper), _pointer(tables), len(hyper), theta.numel(),
        _scalar(grad_scale), _scalar(found_inf), scratch.data_ptr() if skip_nonfinite else None,
        scratch[1:].data_ptr(), stats.data_ptr(),
    )  # fmt: skip
    types = f"{TYPES[theta.dtype]}, {TYPES[grad_theta.dtype]}"
    if skip_nonfinite:
        scratch[:1].zero_()
        launch(f"guard_kernel<{types}>", blocks, args, theta)
    launch(f"step_kernel<{types}, {'false' if momentum_theta is None else 'true'}>", blocks, args, theta)
    launch(f"step_end_kernel<{types}>", 1, args, theta)


def penalty(theta, eta, anchor, codes, labels, L: float) -> tuple[Tensor, Tensor, Tensor]:
    """See ops.homotopy_penalty."""
    grad_theta, grad_eta = torch.empty_like(theta), torch.empty_like(eta)
    return _penalty(theta, eta, anchor, codes, labels, L, grad_theta, grad_eta, False), grad_theta, grad_eta


def penalty_accumulate_(grad_theta, grad_eta, theta, eta, anchor, codes, labels, L: float) -> Tensor:
    """See ops.homotopy_penalty_accumulate_."""
    return _penalty(theta, eta, anchor, codes, labels, L, grad_theta, grad_eta, True)


def _penalty(theta, eta, anchor, codes, labels, L, grad_theta, grad_eta, accumulate: bool) -> Tensor:
    scratch, blocks = _scratch(theta)
    value = theta.new_empty(())
    args = PenaltyArgs(
        *map(_pointer, (theta, eta, anchor, grad_theta, grad_eta)), _pattern(codes, labels), L, accumulate,
        theta.numel(), scratch[1:].data_ptr(), value.data_ptr(),
    )  # fmt: skip
    launch(f"penalty_kernel<{TYPES[theta.dtype]}>", blocks, args, theta)
    launch(f"penalty_end_kernel<{TYPES[theta.dtype]}>", 1, args, theta)
    return value


def batch_(out, out_labels, images, labels, order, offsets, mirrored, scale, shift, position, padding: int) -> None:
    """See ops.batch_."""
    size, channels, height, width = out.shape
    pointers = out_labels, images, labels, order, offsets, mirrored, scale, shift, position
    args = BatchArgs(
        out.data_ptr(), (ctypes.c_int64 * 4)(*out.stride()), *map(_pointer, pointers), len(order), size, channels,
        height, width, padding,
    )  # fmt: skip
    launch(f"batch_kernel<{TYPES[out.dtype]}>", -(-size * height * width // THREADS), args, out)
