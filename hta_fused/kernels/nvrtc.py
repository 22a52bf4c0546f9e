"""The CUDA kernels without nvcc: compiled at first use by NVRTC, which PyTorch's CUDA wheels bring, and kept on disk.

The kernels are csrc/gpu/kernels.cuh, the very source that nvcc compiles; what launch.cu does in C++ is done here through
the CUDA driver. The structs that they are handed are read from csrc/args.h. For cards that Triton does not serve, where
the extension was built without CUDA. Imports files.py, and reference.py for the sizes.
"""

import ctypes
import hashlib
import os
import re
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import save_atomically
from .reference import PROPOSE, SHARE, TILE, blocks_of, rows_of

THREADS, CHUNK = 256, 8 * TILE  # as csrc/gpu/kernels.cuh has them; the compiler checks
TYPES = {torch.float32: "float", torch.float64: "double", torch.float16: "hta::Half", torch.bfloat16: "hta::BFloat16"}
PROPOSALS = ("hta::Sgd", "hta::AdamW")  # by their numbers in csrc/args.h
_PACKAGE = Path(__file__).parent.parent
SOURCE = next(
    path for path in (_PACKAGE / "csrc", _PACKAGE.parent / "csrc") if path.exists()
)  # installed, or a checkout
_HEADERS = ("arithmetic.h", "formats.h", "args.h", "gpu/rows.cuh")
_KERNELS = "gpu/kernels.cuh"
MINIMUM = (12, 0)  # of NVRTC: older ones do not know __builtin_bit_cast


def why_not(device: torch.device) -> str:
    """Why these kernels do not serve a device; empty if they do."""
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    if device.type != "cuda":
        return "it serves CUDA tensors"
    try:
        if version() < MINIMUM:
            return f"NVRTC is {'.'.join(map(str, version()))}, and its kernels need {'.'.join(map(str, MINIMUM))}"
        target(torch.cuda.get_device_capability(device))
    except (OSError, RuntimeError) as error:
        return str(error)
    return ""


# ------------------------------------------------------------------------------------------- csrc/args.h's structs

_SCALARS: dict[str, type] = {"int32_t": ctypes.c_int32, "int64_t": ctypes.c_int64, "double": ctypes.c_double}


@cache
def structs() -> dict[str, type[ctypes.Structure]]:
    """The structs of csrc/args.h, read from it: a declaration a line, pointers, numbers, and structs of its own.

    Raises:
        RuntimeError: a line that is neither.
    """
    found: dict[str, type[ctypes.Structure]] = {}
    text = (SOURCE / "args.h").read_text()
    constants = dict(re.findall(r"constexpr int (\w+) = (\d+);", (SOURCE / "arithmetic.h").read_text()))
    for name, body in re.findall(r"^struct (\w+) \{\n(.*?)^\};", text, re.MULTILINE | re.DOTALL):
        fields: list[tuple[str, type]] = []
        for line in body.splitlines():
            if not line.strip() or line.lstrip().startswith("HTA_INLINE"):
                continue
            match = re.fullmatch(r"\s+(?:const )?([\w<>:]+)(\*?) (\w+)(?:\[([^\]]+)\])?;", line)
            known: dict[str, Any] = {**_SCALARS, **found}
            kind = None if match is None else ctypes.c_void_p if match[2] else known.get(match[1])
            if match is None or kind is None:
                raise RuntimeError(f"csrc/args.h: struct {name} has a line that nvrtc.py cannot read: {line.strip()}")
            if match[4]:
                count = re.sub(r"\w+", lambda m: constants.get(m[0], m[0]), match[4])
                kind = kind * int(eval(count, {"__builtins__": {}}))  # such as 2 * 32
            fields.append((match[3], kind))
        found[name] = type(name, (ctypes.Structure,), {"_fields_": fields})
    return found


@cache
def _formats() -> dict[tuple[torch.dtype, bool], int]:
    """csrc/formats.h's formats by a tensor's dtype and whether it has corrections."""
    names = re.findall(r"^  (k\w+),", (SOURCE / "formats.h").read_text().partition("enum Format")[2], re.MULTILINE)
    return {
        (torch.float32, False): names.index("kFloat32"),
        (torch.bfloat16, False): names.index("kBFloat16"),
        (torch.float16, False): names.index("kHalf"),
        (torch.bfloat16, True): names.index("kSplitBFloat16"),
        (torch.float16, True): names.index("kSplitHalf"),
        (torch.uint8, False): names.index("kSigned8"),
    }


def _filled(name: str, **values: object) -> ctypes.Structure:
    """A struct by its fields' names; tensors stand for their addresses, lists of tensors for their rows'."""
    struct = structs()[name]()
    for field, value in values.items():
        if isinstance(value, Tensor):
            value = value.data_ptr()
        elif isinstance(value, list):
            rows = getattr(struct, field)
            for i, row in enumerate(rows_of(value)):
                rows[i] = row.data_ptr()
            continue
        setattr(struct, field, value)
    return struct


def definitions() -> list[str]:
    """Compiler options by which a size that is not the header's is an error."""
    sizes = [ctypes.sizeof(structs()[name]) for name in ("StepArgs", "PenaltyArgs", "BatchArgs")]
    return ["-DHTA_MIRROR=" + ",".join(map(str, (THREADS, CHUNK, *sizes)))]


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


@cache
def version() -> tuple[int, int]:
    """NVRTC's version."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    _nvrtc("Version", ctypes.byref(major), ctypes.byref(minor))
    return major.value, minor.value


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


def compile_program(expressions: list[str], arch: str, ptx: bool = False) -> tuple[list[str], bytes]:
    """Kernels' lowered names and their machine code (PTX for a compute_… arch or where `ptx`).

    Args:
        expressions: such as "hta::gpu::guard_kernel<float, float>".
        arch: such as "sm_70".

    Raises:
        RuntimeError: NVRTC refuses; the message holds its log.
    """
    sources, options = _program(arch)
    program = ctypes.c_void_p()
    headers = (ctypes.c_char_p * len(_HEADERS))(*(sources[name] for name in _HEADERS))
    names = (ctypes.c_char_p * len(_HEADERS))(*(Path(name).name.encode() for name in _HEADERS))
    _nvrtc("CreateProgram", ctypes.byref(program), sources[_KERNELS], b"kernels.cuh", len(_HEADERS), headers, names)
    try:
        for expression in expressions:
            _nvrtc("AddNameExpression", program, expression.encode())
        flags = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        try:
            _nvrtc("CompileProgram", program, len(options), flags)
        except RuntimeError as error:
            raise RuntimeError(f"{error}\n{_text(program, 'ProgramLog').decode()}") from None
        lowered = []
        for expression in expressions:
            name = ctypes.c_char_p()
            _nvrtc("GetLoweredName", program, expression.encode(), ctypes.byref(name))
            lowered.append((name.value or b"").decode())
        return lowered, _text(program, "PTX" if ptx or arch.startswith("compute") else "CUBIN")
    finally:
        _nvrtc("DestroyProgram", ctypes.byref(program))


def _program(arch: str) -> tuple[dict[str, bytes], list[str]]:
    """The sources and the compiler's options."""
    sources = {name: (SOURCE / name).read_bytes() for name in (*_HEADERS, _KERNELS)}
    return sources, [f"--gpu-architecture={arch}", "-std=c++17", "-fmad=false", "-default-device", *definitions()]


def compile_kernel(expression: str, arch: str) -> tuple[str, bytes]:
    """`compile_program` of one kernel, or what it left on the disk: the lowered name and the code."""
    digest = hashlib.sha256(repr((_program(arch), expression, version())).encode()).hexdigest()
    kept = _cache_folder() / digest[:32]
    with suppress(OSError):
        lowered, _, code = kept.read_bytes().partition(b"\0")
        return lowered.decode(), code
    (name,), code = compile_program([expression], arch)
    with suppress(OSError):  # a folder that cannot be written costs a compilation in each process, no more
        save_atomically(kept, lambda path: path.write_bytes(name.encode() + b"\0" + code))
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


def _pattern(codes: Tensor | None, labels: Tensor | None, seed: Tensor | None) -> ctypes.Structure:
    rows = 0 if labels is None or codes is None else labels.numel() // TILE
    return _filled("Pattern", codes=codes, bytes=labels, seed=seed, rows=rows)


def _scalar(tensor: Tensor | None) -> ctypes.Structure:
    wide = tensor is not None and tensor.dtype == torch.float64
    return _filled("Scalar", narrow=None if wide else tensor, wide=tensor if wide else None)


def _shape(copies: list[Tensor]) -> tuple[int, int, int]:
    """m, n, and how many blocks walk n elements."""
    rows = rows_of(copies)
    return len(rows), rows[0].numel(), -(-rows[0].numel() // CHUNK)


def step_(copies, grads, states, low, anchor, centre, sums, codes, labels, seed, rules, grad_scale, found_inf, stats,
          proposal, explicit_mode, skip_nonfinite, phase, corrections, scales, noise) -> None:  # fmt: skip
    """See reference.step_; launch.cu is this in C++."""
    m, n, blocks = _shape(copies)
    scratch = torch.zeros(1 + 2 * blocks, dtype=torch.float64, device=stats.device)  # two flags, then the blocks' sums
    guard = bool(skip_nonfinite and phase & PROPOSE)
    args = _filled(
        "StepArgs", copies=copies, grads=grads, states=states, low=low, anchor=anchor, centre=centre, sums=sums,
        pattern=_pattern(codes, labels, seed), rules=rules, groups=len(rules), n=n, grad_scale=_scalar(grad_scale),
        found_inf=_scalar(found_inf), stats=stats, partial=scratch[1:], nonfinite=scratch, m=m, blocks=blocks_of(rules, m), proposal=proposal,
        phase=phase, explicit_mode=explicit_mode, guard=guard, corrections=corrections, scales=scales, noise=noise,
    )  # fmt: skip
    dtype, grad_dtype, of_anchor = (
        copies[0].dtype,
        (low or grads or copies)[0].dtype,
        centre if anchor is None else anchor,
    )
    in_formats = bool(corrections) or any(
        t.dtype != dtype for t in (*states[:1], *([] if of_anchor is None else [of_anchor]))
    )
    types = "hta::Packed, hta::Packed" if in_formats else f"{TYPES[dtype]}, {TYPES[grad_dtype]}"
    if in_formats:
        args.copies_format = _formats()[dtype, bool(corrections)]
        args.grads_format = _formats()[grad_dtype, False]
        args.states_format = _formats()[states[0].dtype, False] if states else 0
        args.anchor_format = 0 if of_anchor is None else _formats()[of_anchor.dtype, False]
    instances = (2, 4, 8) if dtype == torch.float32 and not in_formats else (2,)
    held = (
        0
        if explicit_mode or phase != PROPOSE | SHARE or blocks_of(rules, m) != m
        else next((instance for instance in instances if m <= instance), 0)
    )
    if guard:
        launch(f"guard_kernel<{types}>", blocks, args, stats)
    launch(f"step_kernel<{types}, {PROPOSALS[proposal]}, {held}, {str(explicit_mode).lower()}>", blocks, args, stats)
    launch(f"step_end_kernel<{types}>", 1, args, stats)


def penalty(copies, anchor, codes, labels, seed, rules) -> tuple[Tensor, Tensor]:
    """See reference.penalty."""
    m, n, _ = _shape(copies)
    grads = copies[0].new_empty((m, n))
    return _penalty([grads], copies, anchor, codes, labels, seed, rules, False), grads


def penalty_accumulate_(grads, copies, anchor, codes, labels, seed, rules) -> Tensor:
    """See reference.penalty_accumulate_."""
    return _penalty(grads, copies, anchor, codes, labels, seed, rules, True)


def _penalty(grads, copies, anchor, codes, labels, seed, rules, accumulate: bool) -> Tensor:
    m, n, blocks = _shape(copies)
    partial = torch.empty(2 * blocks, dtype=torch.float64, device=rules.device)
    value = copies[0].new_empty(())
    args = _filled("PenaltyArgs", copies=copies, grads=grads, anchor=anchor, pattern=_pattern(codes, labels, seed),
                   rules=rules, n=n, value=value, partial=partial, m=m, accumulate=accumulate)  # fmt: skip
    launch(f"penalty_kernel<{TYPES[value.dtype]}>", blocks, args, value)
    launch(f"penalty_end_kernel<{TYPES[value.dtype]}>", 1, args, value)
    return value


def batch_(out, out_labels, images, labels, order, offsets, mirrored, scale, shift, position, padding: int) -> None:
    """See reference.batch_."""
    size, channels, height, width = out.shape
    args = _filled(
        "BatchArgs", out=out, strides=(ctypes.c_int64 * 4)(*out.stride()), out_labels=out_labels, images=images,
        labels=labels, order=order, offsets=offsets, mirrored=mirrored, scale=scale, shift=shift, position=position,
        count=len(order), size=size, channels=channels, height=height, width=width, padding=padding,
    )  # fmt: skip
    launch(f"batch_kernel<{TYPES[out.dtype]}>", -(-size * height * width // THREADS), args, out)
