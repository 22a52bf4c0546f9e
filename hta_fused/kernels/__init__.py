"""The ops' registration with PyTorch, their backends, and the choice between them.

The schemas stand here and nowhere else. The extension (csrc/bind.cpp) implements them for CPU and CUDA tensors,
triton.py and nvrtc.py for CUDA tensors where the extension does not, reference.py for everything. Imports nothing else
of the package; what users call, and its checks, is in ops.py.
"""

import ctypes
import importlib
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import formats, reference

# ---------------------------------------------------------------------------------------------------------------------
# Registration
#
# A list's rows are the copies: a 1-D tensor is one, an [m, N] tensor holds m. An optimizer hands over a few [m, N]
# buffers whatever m is, since each tensor in a list costs a microsecond a call.

library = torch.library.Library("hta_fused", "DEF")
_PATTERN = "Tensor? codes, Tensor? labels, Tensor? seed, Tensor rules"
_SCHEMAS = {
    "step_": "(Tensor(a!)[] copies, Tensor[] grads, Tensor(b!)[] states, Tensor(c!)[] low, Tensor? anchor, "
    f"Tensor(d!)? centre, Tensor(e!)? sums, {_PATTERN}, Tensor? grad_scale, Tensor? found_inf, Tensor(f!) stats, "
    "int proposal, bool explicit_mode, bool skip_nonfinite, int phase, Tensor(g!)[] corrections, Tensor(h!)[] scales, "
    "Tensor? noise) -> ()",
    "penalty": f"(Tensor[] copies, Tensor? anchor, {_PATTERN}) -> (Tensor, Tensor)",
    "penalty_accumulate_": f"(Tensor(a!)[] grads, Tensor[] copies, Tensor? anchor, {_PATTERN}) -> Tensor",
    "batch_": "(Tensor(a!) out, Tensor(b!) out_labels, Tensor images, Tensor labels, Tensor order, Tensor offsets, "
    "Tensor mirrored, Tensor scale, Tensor shift, Tensor position, int padding) -> ()",
}
_WRITTEN = {"step_": (0, 2, 3, 5, 6, 13, 18, 19), "penalty_accumulate_": (0,), "batch_": (0, 1)}


def _fake_penalty(copies, anchor, codes, labels, seed, rules):
    rows = reference.rows_of(copies)
    return copies[0].new_empty(()), copies[0].new_empty((len(rows), rows[0].numel()))


def _fake_penalty_accumulate_(grads, copies, anchor, codes, labels, seed, rules):
    return copies[0].new_empty(())


def _penalty_setup(ctx, inputs, output):
    copies, _, *ctx.pattern = inputs
    ctx.shapes = [copy.shape for copy in copies]
    ctx.save_for_backward(output[1])
    ctx.set_materialize_grads(False)


def _penalty_backward(op, ctx, grad_value, grad_grads):
    (saved,) = ctx.saved_tensors
    grads = None if grad_value is None else grad_value * saved
    if grad_grads is not None:
        # The gradients are affine in the copies; their derivative is the same map without the anchor, and is symmetric.
        curved = op([grad_grads.contiguous()], None, *ctx.pattern)[1]
        grads = curved if grads is None else grads + curved
    if grads is None:
        return [None] * len(ctx.shapes), None, None, None, None, None
    parts = grads.split([shape.numel() // grads.shape[1] if grads.shape[1] else 1 for shape in ctx.shapes])
    return [part.reshape(shape) for part, shape in zip(parts, ctx.shapes, strict=True)], None, None, None, None, None


def _bump_versions(op, mutated: tuple[int, ...]) -> None:
    """Moves the version counters of what `op` writes, which the stable ABI leaves alone.

    Without it a later backward() through an overwritten tensor would be silently wrong.
    """

    def kernel(keyset, *args):
        written: list[Tensor] = []
        for i in mutated:
            written += args[i] if isinstance(args[i], list) else [] if args[i] is None else [args[i]]
        torch.autograd.graph.increment_version(written)
        return op.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *args)

    library.impl(op._schema.name.split("::")[1], kernel, "ADInplaceOrView", with_keyset=True)


def _refuse_tangents(op) -> None:
    """Makes a penalty op raise under forward mode, where `register_autograd` would drop the tangents without a word."""

    def kernel(keyset, copies, *args):
        if forward_ad._current_level >= 0 and any(map(_has_tangent, copies)):
            raise NotImplementedError(f"{op} has no forward derivative; hta_fused.homotopy_penalty has")
        return op.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, copies, *args)

    library.impl(op._schema.name.split("::")[1], kernel, "ADInplaceOrView", with_keyset=True)


def _has_tangent(tensor: Tensor) -> bool:
    if torch._C._functorch.is_gradtrackingtensor(tensor):  # torch.func.jvp's, which hides its tangent here
        return True
    return torch._C._is_fwd_grad_enabled() and forward_ad.unpack_dual(tensor).tangent is not None


def _define(prefix: str, module: str | None) -> SimpleNamespace:
    """Defines the ops under names that start with `prefix`, and returns their overloads.

    `module` names the module of this package that implements them, imported at their first call; without one the
    extension does.
    """
    ops = SimpleNamespace()
    for name, schema in _SCHEMAS.items():
        library.define(prefix + name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        op = getattr(torch.ops.hta_fused, prefix + name).default  # the packet would cost a microsecond a call
        setattr(ops, name, op)
        if name in _WRITTEN:
            _bump_versions(op, _WRITTEN[name])
        if module is not None:
            implementation = partial(_call, module, name)
            for key in ("CPU", "CUDA"):  # on the CPU for Triton's interpreter and the tests' emulator
                library.impl(prefix + name, implementation, key)
    for name, fake in (("penalty", _fake_penalty), ("penalty_accumulate_", _fake_penalty_accumulate_)):
        torch.library.register_fake(f"hta_fused::{prefix}{name}", fake, lib=library)
    torch.library.register_autograd(
        f"hta_fused::{prefix}penalty",
        partial(_penalty_backward, ops.penalty),
        setup_context=_penalty_setup,
        lib=library,
    )
    _refuse_tangents(ops.penalty)
    # For torch.autograd.functional's vectorize=True, whose vmap is not torch.func's and knows no Function's rule.
    library.impl(f"{prefix}penalty", reference.penalty, "Batched")
    return ops


def _call(module: str, name: str, *args):
    return getattr(_module(module), name)(*args)


@cache
def _module(name: str) -> Any:
    return importlib.import_module(f"{__package__}.{name}")


# ---------------------------------------------------------------------------------------------------------------------
# Backends


def _load_extension() -> tuple[ctypes.CDLL | None, str]:
    """Registers the extension's kernels with torch's dispatcher; None and why not where that fails."""
    path = Path(__file__).parent.with_name("_C.so")
    if not path.exists():
        return None, "the extension was not built; install a C++ compiler, then reinstall hta_fused"
    try:
        torch.ops.load_library(str(path))
        extension = ctypes.CDLL(str(path))
    except OSError as error:
        return None, f"the extension does not load beside torch {torch.__version__}: {error}"
    layout = (reference.TILE, reference.NUMBERS, reference.RULE, reference.HASHED, formats.SCALED)
    try:
        extension.hta_layout.restype = extension.hta_instruction_set.restype = ctypes.c_char_p
        extension.hta_cuda_targets.restype = ctypes.c_char_p
        same = extension.hta_layout().decode() == " ".join(map(str, layout))
    except AttributeError:
        same = False
    return (extension, "") if same else (None, "the extension is of another version; reinstall hta_fused")


def _why_no_cuda(device: torch.device) -> str:
    if _extension is None:
        return _why_no_extension
    targets = (_extension.hta_cuda_targets() or b"").decode()
    if not targets:
        return "the extension was built without CUDA; install CUDA's nvcc, then reinstall hta_fused"
    if not torch.cuda.is_available():
        return f"there is no CUDA device (the extension has kernels for {targets})"
    major, minor = torch.cuda.get_device_capability(device)
    compiled = [int(name) for name in targets.removesuffix("+PTX").split()]
    # Machine code serves later cards of its generation; PTX all that come after.
    if any(c // 10 == major and c % 10 <= minor for c in compiled):
        return ""
    if targets.endswith("+PTX") and compiled[-1] <= 10 * major + minor:
        return ""
    return f"the extension has kernels for {targets}, and this card is {major}{minor}"


def _why_no_module(name: str, device: torch.device) -> str:
    try:
        return _module(name).why_not(device)
    except ImportError as error:
        return f"{error.name or name} is not installed"


@dataclass(frozen=True)
class Backend:
    """One implementation of the ops.

    Attributes:
        ops: step_, penalty, penalty_accumulate_, batch_.
        device: the kind of device it serves; any where None.
        why_not: why it cannot run on a device of that kind; empty if it can.
        dtypes: of copies that it takes; any where None. Gradients have the copies' dtype,
        low: or, beside float32 copies, one of these.
    """

    ops: Any
    device: str | None = None
    why_not: Callable[[torch.device], str] = lambda device: ""
    dtypes: tuple[torch.dtype, ...] | None = None
    low: tuple[torch.dtype, ...] = ()

    def refuses(self, device: torch.device, dtype: torch.dtype, grad: torch.dtype) -> str:
        """Why it does not take such tensors; empty if it does."""
        if self.dtypes is None or (
            dtype in self.dtypes and (dtype == grad or (dtype == torch.float32 and grad in self.low))
        ):
            return ""
        return f"it has no kernel for {dtype}" + (f" with gradients of {grad}" if grad != dtype else "")


_extension, _why_no_extension = _load_extension()
_FULL = (torch.float32, torch.float64)
_extension_ops = _define("", None)
# In the order in which they are chosen.
BACKENDS = {
    "cpu": Backend(SimpleNamespace(**{**vars(_extension_ops), "batch_": reference.batch_}), "cpu",
                   lambda device: _why_no_extension, _FULL, reference.LOW),
    "cuda": Backend(_extension_ops, "cuda", _why_no_cuda, (*_FULL, *reference.LOW), reference.LOW),
    "triton": Backend(_define("triton_", "triton"), "cuda", partial(_why_no_module, "triton"), (*_FULL, *reference.LOW),
                      reference.LOW),
    "nvrtc": Backend(_define("nvrtc_", "nvrtc"), "cuda", partial(_why_no_module, "nvrtc"), (*_FULL, *reference.LOW),
                     reference.LOW),
    "reference": Backend(reference),
}  # fmt: skip
_wanted: str | None = None


def backends() -> dict[str, str]:
    """What this install can run: each backend's name with "available …", or why it is missing.

    "cpu" is the C++ extension, "cuda" the same extension's CUDA kernels, "triton" the kernels in Triton (cards of
    compute capability 8.0 and up), "nvrtc" the CUDA kernels compiled at first use by the NVRTC that comes with torch,
    "reference" plain PyTorch (any device). The first in this order that serves a tensor is used; HTA_BACKEND or
    `use_backend` overrides the choice. On the CPU, kernels take float32 and float64; on a GPU float16 and bfloat16 too.
    """
    details = {"reference": " (plain PyTorch, unfused)"}
    if _extension is not None:
        details["cpu"] = f" ({_extension.hta_instruction_set().decode()})"
    result = {}
    for name, backend in BACKENDS.items():
        on_gpu = backend.device == "cuda" and torch.cuda.is_available()
        why = backend.why_not(torch.device("cuda" if on_gpu else "cpu"))
        result[name] = why or f"available{details.get(name, '')}"
    return result


def use_backend(name: str | None) -> None:
    """Makes every op use one backend; None goes back to the automatic choice.

    Raises:
        ValueError: no backend has this name.
        RuntimeError: this install cannot run it.
    """
    global _wanted
    if name is not None:
        if name not in BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {name!r}")
        state = backends()[name]
        if not state.startswith("available"):
            raise RuntimeError(f"backend {name!r} cannot run here: {state}")
    _wanted = name
    _choose.cache_clear()


@cache
def _choose(device: torch.device, dtype: torch.dtype, grad: torch.dtype) -> str:
    if _wanted is not None:
        backend = BACKENDS[_wanted]
        why = backend.refuses(device, dtype, grad) or backend.why_not(device)
        if not why and _wanted in ("cpu", "cuda") and device.type != _wanted:
            why = f"it serves {_wanted.upper()} tensors"
        if why:
            raise TypeError(f"backend {_wanted!r} cannot serve {dtype} with gradients of {grad} on {device}: {why}")
        return _wanted
    reasons = []
    for name, backend in BACKENDS.items():
        if backend.device not in (None, device.type) or backend.refuses(device, dtype, grad):
            continue
        why = backend.why_not(device)
        if not why:
            break
        reasons.append(f"{name}: {why}")
    if reasons and name == "reference":
        warnings.warn(f"hta_fused runs in plain PyTorch, several times slower ({'; '.join(reasons)})", stacklevel=4)
    return name


def _chosen(device: torch.device, dtype: torch.dtype, grad: torch.dtype) -> str:
    return _choose(device, dtype, grad)  # the compiler would trace through a cache


# What torch.compiler.assume_constant_result does, which would first import the compiler: 1.2 s for all who never compile.
_chosen._dynamo_marked_constant = True  # type: ignore[attr-defined]


def kernels(like: Tensor, grad: Tensor | None = None, dtype: torch.dtype | None = None) -> Any:
    """The implementations of the ops (`step_`, `penalty`, …) that serve a tensor such as `like` and its gradient.

    dtype: of the numbers, where `like` is a part of them.
    """
    return BACKENDS[_chosen(like.device, dtype or like.dtype, like.dtype if grad is None else grad.dtype)].ops


if os.environ.get("HTA_BACKEND"):
    use_backend(os.environ["HTA_BACKEND"])
