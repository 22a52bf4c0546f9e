"""The public ops: argument checks, the choice of a backend, and the ops' registration with PyTorch.

The schemas stand here and nowhere else; the extension (csrc/ops.cpp) implements them for CPU and CUDA tensors,
triton_ops.py and nvrtc_ops.py for CUDA tensors where the extension does not. Imports these, the reference and the
tables; knows nothing of models or optimizers.
"""

import ctypes
import importlib
import os
import warnings
from functools import cache, lru_cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import reference, tables
from .tables import check_hyper, check_L

if TYPE_CHECKING:
    from .partition import Partition

# ---------------------------------------------------------------------------------------------------------------------
# Registration

_library = torch.library.Library("hta_fused", "DEF")
_PATTERN = "Tensor? anchor, Tensor? codes, Tensor? labels"
_SCHEMAS = {
    "step_": "(Tensor(a!) theta, Tensor(b!) eta, Tensor grad_theta, Tensor grad_eta, Tensor(c!)? momentum_theta, "
    f"Tensor(d!)? momentum_eta, Tensor(e!)? low_theta, Tensor(f!)? low_eta, {_PATTERN}, Tensor hyper, Tensor tables, "
    "Tensor? grad_scale, Tensor? found_inf, Tensor(g!) stats, bool skip_nonfinite) -> ()",
    "penalty": f"(Tensor theta, Tensor eta, {_PATTERN}, float L) -> (Tensor, Tensor, Tensor)",
    "penalty_accumulate_": "(Tensor(a!) grad_theta, Tensor(b!) grad_eta, Tensor theta, Tensor eta, "
    f"{_PATTERN}, float L) -> Tensor",
    "batch_": "(Tensor(a!) out, Tensor(b!) out_labels, Tensor images, Tensor labels, Tensor order, Tensor offsets, "
    "Tensor mirrored, Tensor scale, Tensor shift, Tensor position, int padding) -> ()",
}
_WRITTEN = {"step_": (0, 1, 4, 5, 6, 7, 15), "penalty_accumulate_": (0, 1), "batch_": (0, 1)}


def _fake_penalty(theta, eta, anchor, codes, labels, L):
    return theta.new_empty(()), torch.empty_like(theta), torch.empty_like(eta)


def _fake_penalty_accumulate_(grad_theta, grad_eta, theta, eta, anchor, codes, labels, L):
    return theta.new_empty(())


def _penalty_setup(ctx, inputs, output):
    *_, ctx.codes, ctx.labels, ctx.L = inputs
    ctx.save_for_backward(*output[1:])
    ctx.set_materialize_grads(False)


def _penalty_backward(op, ctx, grad_value, grad_grad_theta, grad_grad_eta):
    grads: list[Tensor | None] = [None, None]
    if grad_value is not None:
        grads = [grad_value * g for g in ctx.saved_tensors]
    if grad_grad_theta is not None or grad_grad_eta is not None:
        # The gradients are affine in (θ, η); their derivative is the same map without the anchor, and is symmetric.
        direction = [
            torch.zeros_like(saved) if g is None else g.contiguous()
            for g, saved in zip((grad_grad_theta, grad_grad_eta), ctx.saved_tensors, strict=True)
        ]
        curved = op(*direction, None, ctx.codes, ctx.labels, ctx.L)[1:]
        grads = [c if g is None else g + c for g, c in zip(grads, curved, strict=True)]
    return *grads, None, None, None, None


def _bump_versions(op, mutated: tuple[int, ...]) -> None:
    """Moves the version counters of what `op` writes, which the stable ABI leaves alone.

    Without it a later backward() through an overwritten tensor would be silently wrong.
    """

    def kernel(keyset, *args):
        torch.autograd.graph.increment_version([args[i] for i in mutated if args[i] is not None])
        return op.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *args)

    _library.impl(op._schema.name.split("::")[1], kernel, "ADInplaceOrView", with_keyset=True)


def _define(prefix: str, module: str | None) -> SimpleNamespace:
    """Defines the four ops under names that start with `prefix`, and returns their overloads.

    `module` names the module of this package that implements them, imported at their first call; without one the
    extension does.
    """
    ops = SimpleNamespace()
    for name, schema in _SCHEMAS.items():
        _library.define(prefix + name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        op = getattr(torch.ops.hta_fused, prefix + name).default  # the packet would cost a microsecond a call
        setattr(ops, name, op)
        if name in _WRITTEN:
            _bump_versions(op, _WRITTEN[name])
        if module is not None:
            implementation = partial(_call, module, name)
            for key in ("CPU", "CUDA"):  # on the CPU for Triton's interpreter and the tests' emulator
                _library.impl(prefix + name, implementation, key)
    for name, fake in (("penalty", _fake_penalty), ("penalty_accumulate_", _fake_penalty_accumulate_)):
        torch.library.register_fake(f"hta_fused::{prefix}{name}", fake, lib=_library)
    torch.library.register_autograd(
        f"hta_fused::{prefix}penalty",
        partial(_penalty_backward, ops.penalty),
        setup_context=_penalty_setup,
        lib=_library,
    )
    return ops


def _call(module: str, name: str, *args):
    return getattr(_module(module), name)(*args)


@cache
def _module(name: str) -> Any:
    return importlib.import_module(f"{__package__}.{name}")


# The ops of the extension, whose kernels are those of the tensors' device, and of the other backends.
_EXTENSION = _define("", None)
_IMPLEMENTATIONS: dict[str, Any] = {
    "cpu": SimpleNamespace(**{**vars(_EXTENSION), "batch_": reference.batch_}),
    "cuda": _EXTENSION,
    "triton": _define("triton_", "triton_ops"),
    "nvrtc": _define("nvrtc_", "nvrtc_ops"),
    "reference": reference,
}

_library.define(
    "coefficients(float L, float lr, float momentum, float weight_decay, bool nesterov, str mode) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.register_fake("hta_fused::coefficients", lib=_library)
def _(L, lr, momentum, weight_decay, nesterov, mode):
    return tuple(torch.empty(shape, dtype=torch.float64, device="cpu") for shape in ((1, 6), (1, 3, 2, 3)))


def _coefficients(
    L: float, lr: float, momentum: float, weight_decay: float, nesterov: bool, mode: str
) -> tuple[Tensor, Tensor]:
    """(hyper, tables) of one parameter group. An op of its own, so that torch.compile lets L and lr vary."""
    hyper, per_label = tables.step_coefficients(L, lr, momentum, weight_decay, nesterov, mode)
    on_cpu: dict[str, Any] = dict(dtype=torch.float64, device="cpu")
    return torch.tensor([hyper], **on_cpu), torch.tensor([per_label], **on_cpu)


_library.impl("coefficients", _coefficients, "CompositeExplicitAutograd")
_cached_coefficients = lru_cache(maxsize=64)(_coefficients)

# ---------------------------------------------------------------------------------------------------------------------
# Backends

_wanted: str | None = None


def _load_extension() -> tuple[ctypes.CDLL | None, str]:
    """Registers the extension's kernels with torch's dispatcher; None and why not where that fails."""
    path = Path(__file__).with_name("_C.so")
    if not path.exists():
        return None, "the extension was not built; install a C++ compiler, then reinstall hta_fused"
    try:
        torch.ops.load_library(str(path))
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return None, f"the extension does not load beside torch {torch.__version__}: {error}"
    library.hta_tile.restype = ctypes.c_int64
    library.hta_instruction_set.restype = library.hta_cuda_targets.restype = ctypes.c_char_p
    if library.hta_tile() != reference.TILE:
        return None, "the extension is of another version; reinstall hta_fused"
    return library, ""


_extension, _why_no_extension = _load_extension()


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


def _why_not(name: str, device: torch.device) -> str:
    """Why a backend does not serve a device; empty if it does."""
    if name == "reference":
        return ""
    if name == "cpu":
        return _why_no_extension if device.type == "cpu" else "it serves CPU tensors"
    if name == "cuda":
        return _why_no_cuda(device) if device.type == "cuda" else "it serves CUDA tensors"
    try:
        module = _module(f"{name}_ops")
    except ImportError as error:
        return f"{error.name or name} is not installed"
    return module.why_not(device)


def backends() -> dict[str, str]:
    """What this install can run: each backend's name with "available …", or why it is missing.

    "cpu" is the C++ extension, "cuda" the same extension's CUDA kernels, "triton" the kernels in Triton (cards of
    compute capability 8.0 and up), "nvrtc" the CUDA kernels compiled at first use by the NVRTC that comes with torch,
    "reference" plain PyTorch (any device). The first in this order that serves a tensor is used; HTA_BACKEND or
    `use_backend` overrides the choice. On the CPU, kernels take float32 and float64; on a GPU float16 and bfloat16 too.
    """
    result = {}
    for name in _IMPLEMENTATIONS:
        device = torch.device("cpu" if name in ("cpu", "reference") or not torch.cuda.is_available() else "cuda")
        why = _why_no_cuda(device) if name == "cuda" else _why_not(name, device)
        detail = {"reference": " (plain PyTorch, unfused)"}.get(name, "")
        if name == "cpu" and _extension is not None:
            detail = f" ({_extension.hta_instruction_set().decode()})"
        result[name] = why or f"available{detail}"
    return result


def use_backend(name: str | None) -> None:
    """Makes every op use one backend; None goes back to the automatic choice.

    Raises:
        ValueError: no backend has this name.
        RuntimeError: this install cannot run it.
    """
    global _wanted
    if name is not None:
        if name not in _IMPLEMENTATIONS:
            raise ValueError(f"backend must be one of {', '.join(_IMPLEMENTATIONS)}, got {name!r}")
        state = backends()[name]
        if not state.startswith("available"):
            raise RuntimeError(f"backend {name!r} cannot run here: {state}")
    _wanted = name
    _choose.cache_clear()


_ORDER = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "nvrtc", "reference")}
_DTYPES = (torch.float32, torch.float64, *reference.LOW)  # the kernels' on a GPU


def _takes(name: str, dtype: torch.dtype, low: torch.dtype) -> bool:
    """Whether a backend has kernels for copies of `dtype` with gradients of `low`."""
    if name == "reference":
        return True
    if name == "cpu":
        return dtype == low and dtype in _DTYPES[:2]
    return dtype in _DTYPES and (dtype == low or dtype == torch.float32)


@cache
def _choose(device: torch.device, dtype: torch.dtype, low: torch.dtype) -> str:
    if _wanted is not None:
        why = _why_not(_wanted, device) or ("" if _takes(_wanted, dtype, low) else f"it has no kernel for {dtype}")
        if why:
            raise TypeError(f"backend {_wanted!r} cannot serve {dtype} with gradients of {low} on {device}: {why}")
        return _wanted
    reasons = []
    for name in _ORDER.get(device.type, ("reference",)):
        if not _takes(name, dtype, low):
            continue
        why = _why_not(name, device)
        if not why:
            break
        reasons.append(f"{name}: {why}")
    if reasons and name == "reference":
        warnings.warn(f"hta_fused runs in plain PyTorch, several times slower ({'; '.join(reasons)})", stacklevel=4)
    return name


@torch.compiler.assume_constant_result
def _chosen(device: torch.device, dtype: torch.dtype, low: torch.dtype) -> str:
    return _choose(device, dtype, low)  # the compiler would trace through a cache


def kernels(like: Tensor, grad: Tensor | None = None) -> Any:
    """The implementations of the ops (`step_`, `penalty`, …) that serve a tensor such as `like` and its gradient."""
    return _IMPLEMENTATIONS[_chosen(like.device, like.dtype, like.dtype if grad is None else grad.dtype)]


if os.environ.get("HTA_BACKEND"):
    use_backend(os.environ["HTA_BACKEND"])

# ---------------------------------------------------------------------------------------------------------------------
# Checks at the boundary


def _check_like(name: str, tensor: Tensor, theta: Tensor, dtype: torch.dtype | None = None) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.shape != theta.shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, but theta has shape {tuple(theta.shape)}")
    if tensor.dtype != (theta.dtype if dtype is None else dtype):
        if dtype in (None, theta.dtype):
            raise TypeError(f"{name} has dtype {tensor.dtype}, but theta has dtype {theta.dtype}")
        raise TypeError(f"{name} must have dtype {dtype}, got {tensor.dtype}")
    if tensor.device != theta.device:
        raise ValueError(f"{name} is on {tensor.device}, but theta is on {theta.device}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()} for shape {tuple(tensor.shape)}")


def _check_buffers(theta: Tensor, **others: Tensor | None) -> None:
    if isinstance(theta, Tensor) and not theta.is_floating_point():
        raise TypeError(f"theta must have a floating dtype, got {theta.dtype}")
    for name, tensor in {"theta": theta, **others}.items():
        if tensor is not None:
            _check_like(name, tensor, theta)


def _pattern(labels: "Tensor | Partition | None", theta: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The ops' (codes, labels) for what the user passed as `labels`."""
    if labels is None:
        return None, None
    if isinstance(labels, Tensor):
        _check_like("labels", labels, theta, torch.uint8)
        if not torch.compiler.is_compiling() and labels.numel() and labels.amax() > 2:
            raise ValueError(f"labels must be 0, 1 or 2, got {int(labels.amax())}")
        return None, labels
    if not hasattr(labels, "codes"):
        raise TypeError(f"labels must be a uint8 tensor or a Partition, got {type(labels).__name__}")
    if labels.numel != theta.numel():
        raise ValueError(f"labels is a Partition of {labels.numel} elements, but theta has {theta.numel()}")
    labels = labels.to(theta.device)
    return labels.codes, labels.labels


# ---------------------------------------------------------------------------------------------------------------------
# The ops


def batch_(out: Tensor, *arguments: Any) -> None:
    """Fills `out` with one batch of a data set that lies on its device; in one kernel there if that is a GPU.

    Args:
        out: [size, channels, height, width], any strides, overwritten with pixel · scale + shift.
        arguments: out_labels (int64 [size], overwritten), images (uint8 [n, channels, height, width]), labels (int64
            [n]), order (int64 [count]: the epoch's images), offsets (int64 [2, count]: each one's row and column in
            the zero-padded image), mirrored (bool [count]), scale and shift (float32 [channels]), position (int64,
            one number: where in `order` the batch begins), padding (int).
    """
    kernels(out).batch_(out, *arguments)


def step_buffers(mutated: list[Tensor], *arguments: Any) -> None:
    """The step op for a caller who owns the buffers and has checked them: no checks, and no Python in the dispatch.

    Args:
        mutated: every tensor whose version counter must move, those that merely share the buffers' memory included.
        arguments: the op's.
    """
    step = kernels(arguments[0], arguments[2]).step_
    with torch._C._AutoDispatchBelowADInplaceOrView():
        step(*arguments)
    torch.autograd.graph.increment_version(mutated)


def _as_scalar(name: str, value: float | Tensor | None, theta: Tensor) -> Tensor | None:
    if value is None:
        return None
    if not isinstance(value, Tensor):
        if not 0 < value < float("inf"):
            raise ValueError(f"{name} must be positive and finite, got {value}")
        return torch.tensor([value], dtype=torch.float64, device=theta.device)
    if value.numel() != 1 or value.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"{name} must be one float32 or float64 number, got {value.dtype} of shape {tuple(value.shape)}"
        )
    return value.to(theta.device).contiguous()


def homotopy_step_(
    theta: Tensor,
    eta: Tensor,
    grad_theta: Tensor,
    grad_eta: Tensor,
    momentum_theta: Tensor | None,
    momentum_eta: Tensor | None,
    anchor: Tensor | None,
    labels: "Tensor | Partition | None",
    *,
    L: float | None = None,
    lr: float,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    mode: str = "implicit",
    tables: Tensor | None = None,
    grad_scale: float | Tensor | None = None,
    found_inf: Tensor | None = None,
    skip_nonfinite: bool = True,
    stats: Tensor | None = None,
    low_theta: Tensor | None = None,
    low_eta: Tensor | None = None,
) -> None:
    """One SGD step of both copies, coupled as equation (3) says, in place and in one pass over memory.

    SGD with momentum (as torch.optim.SGD, from a zeroed buffer) proposes a_θ and a_η; then each element's label picks
    the 2×3 table that turns (a_θ, a_η, θ̃) into the new (θ, η). mode="implicit" takes (3)'s quadratic terms by their
    proximal map, stable for every L and lr; mode="explicit" is the paper's equation (7), whose gradients go through the
    momentum and which diverges where lr·4/L exceeds about 2(1 + momentum).

    Args:
        theta, eta: the two copies; one shape, dtype, device; contiguous. Overwritten. float16 and bfloat16 are
            computed with in float32.
        grad_theta, grad_eta: the loss's gradients, like theta; or both float16 or bfloat16 where theta is float32.
        momentum_theta, momentum_eta: momentum buffers, like theta, overwritten; both None only without momentum.
        anchor: θ̃, like theta; None stands for zero and is never read.
        labels: uint8, like theta (0 coupled only, 1 anchored in θ, 2 anchored in η), or a Partition of theta's
            elements, or None for all 0.
        L: the homotopy parameter: 0 ≤ L ≤ ∞ (0 merges the copies, ∞ decouples them); explicit: 0 < L < ∞.
        lr: learning rate, positive.
        momentum, weight_decay, nesterov: as in torch.optim.SGD.
        mode: "implicit" or "explicit".
        tables: float64 [3, 2, 3] (label, copy, (θ, η, θ̃)), in place of L and mode: any other coupling of two copies.
        grad_scale: what the gradients are divided by (a loss scale).
        found_inf: one float; the step is skipped where it is not 0 (as torch.amp.GradScaler hands over).
        skip_nonfinite: skip the step, changing nothing, if any gradient is inf or NaN. Reads the gradients once more
            beforehand (8 of 52 bytes an element in float32).
        stats: float64 [4], overwritten: ‖θ₁−θ̃₁‖² + ‖η₂−θ̃₂‖² and ‖θ−η‖² after the step, 1 if a gradient was not
            finite else 0, and a count to which each skipped step adds 1. Summed in a fixed order: same input, same
            bits, for any number of threads.
        low_theta, low_eta: like grad_theta; overwritten with the new θ and η in its dtype, for the next forward pass
            of a network in low precision. Both None: not wanted.

    Raises:
        ValueError: shapes or devices differ, a buffer is not contiguous, labels exceed 2, L or lr is outside its range.
        TypeError: dtypes differ or are not floating, or an argument is no tensor.
    """
    _check_buffers(theta, eta=eta, momentum_theta=momentum_theta, momentum_eta=momentum_eta, anchor=anchor)
    low = theta.dtype
    if isinstance(grad_theta, Tensor) and theta.dtype == torch.float32 and grad_theta.dtype in reference.LOW:
        low = grad_theta.dtype
    for name, tensor in (("grad_theta", grad_theta), ("grad_eta", grad_eta)):
        _check_like(name, tensor, theta, low)
    if (low_theta is None) != (low_eta is None):
        raise ValueError("low_theta and low_eta must both be tensors, or neither")
    for name, copy in (("low_theta", low_theta), ("low_eta", low_eta)):
        if copy is not None:
            _check_like(name, copy, theta, low)
    for name, buffer in (("momentum_theta", momentum_theta), ("momentum_eta", momentum_eta)):
        if momentum != 0 and buffer is None:
            raise ValueError(f"{name} must be a tensor where momentum is {momentum}, got None")
    check_hyper(lr, momentum, weight_decay, nesterov)
    codes, bytes_ = _pattern(labels, theta)
    if tables is None:
        if L is None:
            raise ValueError("L must be given, or tables in its place")
        check_L(L, mode)
        make = torch.ops.hta_fused.coefficients if torch.compiler.is_compiling() else _cached_coefficients
        hyper, tables = make(L, lr, momentum, weight_decay, nesterov, mode)
    else:
        if L is not None or mode != "implicit":
            raise ValueError("tables stands in place of L and mode: give one or the other")
        if tables.shape != (3, 2, 3) or tables.dtype != torch.float64:
            raise ValueError(f"tables must be float64 of shape (3, 2, 3), got {tables.dtype} {tuple(tables.shape)}")
        hyper = torch.ops.hta_fused.coefficients(1.0, lr, momentum, weight_decay, nesterov, "implicit")[0]
        tables = tables[None].contiguous()
    if stats is None:
        stats = torch.zeros(4, dtype=torch.float64, device=theta.device)
    elif stats.shape != (4,) or stats.dtype != torch.float64 or not stats.is_contiguous():
        raise ValueError(f"stats must be contiguous float64 of shape (4,), got {stats.dtype} {tuple(stats.shape)}")
    if momentum == 0:
        momentum_theta = momentum_eta = None  # as torch.optim.SGD: left alone
    scale, found = _as_scalar("grad_scale", grad_scale, theta), _as_scalar("found_inf", found_inf, theta)
    with torch.no_grad():
        kernels(theta, grad_theta).step_(
            theta, eta, grad_theta, grad_eta, momentum_theta, momentum_eta, low_theta, low_eta, anchor, codes, bytes_,
            hyper.to(theta.device), tables.to(theta.device), scale, found, stats, skip_nonfinite,
        )  # fmt: skip


def homotopy_penalty(
    theta: Tensor, eta: Tensor, anchor: Tensor | None, labels: "Tensor | Partition | None", L: float
) -> Tensor:
    """The quadratic terms of H (equation 3): L‖θ₁−θ̃₁‖² + L‖η₂−θ̃₂‖² + ‖θ−η‖²/L.

    Args:
        theta, eta: tensors of one shape, floating dtype and device, contiguous.
        anchor: θ̃, like theta; None stands for zero and is never read. Taken as a constant: it gets no gradient.
        labels: uint8, like theta (0 free in both copies, 1 anchored in θ, 2 anchored in η), or a Partition, or None.
        L: homotopy parameter, 0 < L < ∞ (the value is infinite at both ends).

    Returns:
        A scalar tensor of theta's dtype. Differentiable any number of times in theta and eta; the value and both
        gradients come out of one pass that reads each input once.

    Raises:
        ValueError: shapes or devices differ, a tensor is not contiguous, labels exceed 2, or L is outside its range.
        TypeError: dtypes differ or are not floating, or an argument is no tensor.
    """
    _check_buffers(theta, eta=eta, anchor=anchor)
    check_L(L, "explicit")
    anchor = None if anchor is None else anchor.detach()
    return kernels(theta).penalty(theta, eta, anchor, *_pattern(labels, theta), float(L))[0]


def homotopy_penalty_accumulate_(
    grad_theta: Tensor,
    grad_eta: Tensor,
    theta: Tensor,
    eta: Tensor,
    anchor: Tensor | None,
    labels: "Tensor | Partition | None",
    L: float,
) -> Tensor:
    """`homotopy_penalty` without autograd: returns its value and adds its gradients to grad_theta and grad_eta.

    Args:
        grad_theta, grad_eta: like theta; added to in place.
        theta, eta, anchor, labels, L: as in `homotopy_penalty`.

    Raises:
        ValueError, TypeError: as `homotopy_penalty`.
    """
    _check_buffers(theta, eta=eta, anchor=anchor, grad_theta=grad_theta, grad_eta=grad_eta)
    check_L(L, "explicit")
    with torch.no_grad():
        return kernels(theta).penalty_accumulate_(
            grad_theta, grad_eta, theta, eta, anchor, *_pattern(labels, theta), float(L)
        )
