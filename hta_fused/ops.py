"""The public ops: argument checks, the choice of a backend, and the ops' registration with PyTorch.

The schemas stand here and nowhere else; the extension (csrc/ops.cpp) implements them for the CPU. Imports the
reference and the tables; knows nothing of models or optimizers.
"""

import ctypes
import os
import warnings
from functools import cache, lru_cache
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
for _schema in (
    "step_(Tensor(a!) theta, Tensor(b!) eta, Tensor grad_theta, Tensor grad_eta, Tensor(c!)? momentum_theta, "
    f"Tensor(d!)? momentum_eta, {_PATTERN}, Tensor hyper, Tensor tables, Tensor? grad_scale, Tensor? found_inf, "
    "Tensor(e!) stats, bool skip_nonfinite) -> ()",
    f"penalty(Tensor theta, Tensor eta, {_PATTERN}, float L) -> (Tensor, Tensor, Tensor)",
    f"penalty_accumulate_(Tensor(a!) grad_theta, Tensor(b!) grad_eta, Tensor theta, Tensor eta, {_PATTERN}, float L)"
    " -> Tensor",
    "coefficients(float L, float lr, float momentum, float weight_decay, bool nesterov, str mode) -> (Tensor, Tensor)",
):
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))
_ops = torch.ops.hta_fused
_fused = SimpleNamespace(  # the overloads themselves: their packets cost a microsecond a call
    step_=_ops.step_.default, penalty=_ops.penalty.default, penalty_accumulate_=_ops.penalty_accumulate_.default
)


@torch.library.register_fake("hta_fused::penalty", lib=_library)
def _(theta, eta, anchor, codes, labels, L):
    return theta.new_empty(()), torch.empty_like(theta), torch.empty_like(eta)


@torch.library.register_fake("hta_fused::penalty_accumulate_", lib=_library)
def _(grad_theta, grad_eta, theta, eta, anchor, codes, labels, L):
    return theta.new_empty(())


@torch.library.register_fake("hta_fused::coefficients", lib=_library)
def _(L, lr, momentum, weight_decay, nesterov, mode):
    return torch.empty(1, 6, dtype=torch.float64), torch.empty(1, 3, 2, 3, dtype=torch.float64)


def _coefficients(
    L: float, lr: float, momentum: float, weight_decay: float, nesterov: bool, mode: str
) -> tuple[Tensor, Tensor]:
    """(hyper, tables) of one parameter group. An op of its own, so that torch.compile lets L and lr vary."""
    hyper, per_label = tables.step_coefficients(L, lr, momentum, weight_decay, nesterov, mode)
    return torch.tensor([hyper], dtype=torch.float64), torch.tensor([per_label], dtype=torch.float64)


_library.impl("coefficients", _coefficients, "CompositeExplicitAutograd")
_cached_coefficients = lru_cache(maxsize=64)(_coefficients)


def _penalty_setup(ctx, inputs, output):
    *_, ctx.codes, ctx.labels, ctx.L = inputs
    ctx.save_for_backward(*output[1:])
    ctx.set_materialize_grads(False)


def _penalty_backward(ctx, grad_value, grad_grad_theta, grad_grad_eta):
    grads: list[Tensor | None] = [None, None]
    if grad_value is not None:
        grads = [grad_value * g for g in ctx.saved_tensors]
    if grad_grad_theta is not None or grad_grad_eta is not None:
        # The gradients are affine in (θ, η); their derivative is the same map without the anchor, and is symmetric.
        direction = [
            torch.zeros_like(saved) if g is None else g.contiguous()
            for g, saved in zip((grad_grad_theta, grad_grad_eta), ctx.saved_tensors, strict=True)
        ]
        curved = _ops.penalty(*direction, None, ctx.codes, ctx.labels, ctx.L)[1:]
        grads = [c if g is None else g + c for g, c in zip(grads, curved, strict=True)]
    return *grads, None, None, None, None


torch.library.register_autograd("hta_fused::penalty", _penalty_backward, setup_context=_penalty_setup, lib=_library)


def _bump_versions(op, mutated: tuple[int, ...]) -> None:
    """Moves the version counters of what `op` writes, which the stable ABI leaves alone.

    Without it a later backward() through an overwritten tensor would be silently wrong.
    """

    def kernel(keyset, *args):
        torch.autograd.graph.increment_version([args[i] for i in mutated if args[i] is not None])
        return op.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *args)

    _library.impl(op._schema.name.split("::")[1], kernel, "ADInplaceOrView", with_keyset=True)


_bump_versions(_ops.step_.default, (0, 1, 4, 5, 13))
_bump_versions(_ops.penalty_accumulate_.default, (0, 1))

# ---------------------------------------------------------------------------------------------------------------------
# Backends

_NAMES = ("cpu", "reference")
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
    library.hta_instruction_set.restype = ctypes.c_char_p
    if library.hta_tile() != reference.TILE:
        return None, "the extension is of another version; reinstall hta_fused"
    return library, ""


_extension, _why_no_extension = _load_extension()


def backends() -> dict[str, str]:
    """What this install can run: each backend's name with "available …", or why it is missing.

    "cpu" is the C++ extension (float32 and float64 on the CPU), "reference" plain PyTorch (any dtype, any device). The
    first that serves a tensor is used; HTA_BACKEND or `use_backend` overrides the choice.
    """
    fused = _why_no_extension
    if _extension is not None:
        fused = f"available ({_extension.hta_instruction_set().decode()})"
    return {"cpu": fused, "reference": "available (plain PyTorch, unfused)"}


def use_backend(name: str | None) -> None:
    """Makes every op use one backend; None goes back to the automatic choice.

    Raises:
        ValueError: no backend has this name.
        RuntimeError: this install cannot run it.
    """
    global _wanted
    if name is not None:
        if name not in _NAMES:
            raise ValueError(f"backend must be one of {', '.join(_NAMES)}, got {name!r}")
        state = backends()[name]
        if not state.startswith("available"):
            raise RuntimeError(f"backend {name!r} cannot run here: {state}")
    _wanted = name


@cache
def _warn_slow() -> None:
    warnings.warn(f"hta_fused runs in plain PyTorch, several times slower: {_why_no_extension}", stacklevel=4)


def kernels(like: Tensor) -> Any:
    """The implementations of the ops (`step_`, `penalty`, `penalty_accumulate_`) that serve a tensor such as `like`."""
    if _wanted == "reference":
        return reference
    if _extension is not None and like.device.type == "cpu" and like.dtype in (torch.float32, torch.float64):
        return _fused
    if _wanted == "cpu":
        raise TypeError(f"backend 'cpu' takes float32 and float64 on the CPU, got {like.dtype} on {like.device}")
    if _extension is None and not torch.compiler.is_compiling():
        _warn_slow()
    return reference


if os.environ.get("HTA_BACKEND"):
    use_backend(os.environ["HTA_BACKEND"])

# ---------------------------------------------------------------------------------------------------------------------
# Checks at the boundary


def _check_like(name: str, tensor: Tensor, theta: Tensor, dtype: torch.dtype | None = None) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.shape != theta.shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, but theta has shape {tuple(theta.shape)}")
    if dtype is not None and tensor.dtype != dtype:
        raise TypeError(f"{name} must have dtype {dtype}, got {tensor.dtype}")
    if dtype is None and tensor.dtype != theta.dtype:
        raise TypeError(f"{name} has dtype {tensor.dtype}, but theta has dtype {theta.dtype}")
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


def step_buffers(mutated: list[Tensor], *arguments: Any) -> None:
    """The step op for a caller who owns the buffers and has checked them: no checks, and no Python in the dispatch.

    Args:
        mutated: every tensor whose version counter must move, those that merely share the buffers' memory included.
        arguments: the op's.
    """
    step = kernels(arguments[0]).step_
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
    return value.contiguous()


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
) -> None:
    """One SGD step of both copies, coupled as equation (3) says, in place and in one pass over memory.

    SGD with momentum (as torch.optim.SGD, from a zeroed buffer) proposes a_θ and a_η; then each element's label picks
    the 2×3 table that turns (a_θ, a_η, θ̃) into the new (θ, η). mode="implicit" takes (3)'s quadratic terms by their
    proximal map, stable for every L and lr; mode="explicit" is the paper's equation (7), whose gradients go through the
    momentum and which diverges where lr·4/L exceeds about 2(1 + momentum).

    Args:
        theta, eta: the two copies; one shape, dtype, device; contiguous. Overwritten.
        grad_theta, grad_eta: the loss's gradients, like theta.
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

    Raises:
        ValueError: shapes or devices differ, a buffer is not contiguous, labels exceed 2, L or lr is outside its range.
        TypeError: dtypes differ or are not floating, or an argument is no tensor.
    """
    _check_buffers(theta, eta=eta, grad_theta=grad_theta, grad_eta=grad_eta, momentum_theta=momentum_theta,
                   momentum_eta=momentum_eta, anchor=anchor)  # fmt: skip
    for name, buffer in (("momentum_theta", momentum_theta), ("momentum_eta", momentum_eta)):
        if momentum != 0 and buffer is None:
            raise ValueError(f"{name} must be a tensor where momentum is {momentum}, got None")
    check_hyper(lr, momentum, weight_decay, nesterov)
    codes, bytes_ = _pattern(labels, theta)
    if tables is None:
        if L is None:
            raise ValueError("L must be given, or tables in its place")
        check_L(L, mode)
        make = _ops.coefficients if torch.compiler.is_compiling() else _cached_coefficients
        hyper, tables = make(L, lr, momentum, weight_decay, nesterov, mode)
    else:
        if L is not None or mode != "implicit":
            raise ValueError("tables stands in place of L and mode: give one or the other")
        if tables.shape != (3, 2, 3) or tables.dtype != torch.float64:
            raise ValueError(f"tables must be float64 of shape (3, 2, 3), got {tables.dtype} {tuple(tables.shape)}")
        hyper = _ops.coefficients(1.0, lr, momentum, weight_decay, nesterov, "implicit")[0]
        tables = tables[None].contiguous()
    if stats is None:
        stats = torch.zeros(4, dtype=torch.float64, device=theta.device)
    elif stats.shape != (4,) or stats.dtype != torch.float64 or not stats.is_contiguous():
        raise ValueError(f"stats must be contiguous float64 of shape (4,), got {stats.dtype} {tuple(stats.shape)}")
    if momentum == 0:
        momentum_theta = momentum_eta = None  # as torch.optim.SGD: left alone
    scale, found = _as_scalar("grad_scale", grad_scale, theta), _as_scalar("found_inf", found_inf, theta)
    with torch.no_grad():
        kernels(theta).step_(
            theta, eta, grad_theta, grad_eta, momentum_theta, momentum_eta, anchor, codes, bytes_,
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
