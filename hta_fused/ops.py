"""The public ops: argument checks around the kernels. Imports checks, rules, kernels, proposals and couplings; knows nothing of
models or optimizers."""

from collections.abc import Mapping, Sequence
from operator import itemgetter
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from . import proposals
from .checks import choice, concrete, flag, number, shown, whole
from .couplings import Coupling
from .kernels import kernels, library, reference
from .kernels.reference import DTYPES, MAX_COPIES
from .proposals import SGD, Proposal
from .rules import check_size, coupled_rules, homotopy_rules

if TYPE_CHECKING:
    from .partition import Partition

Rows = Tensor | Sequence[Tensor]

# ---------------------------------------------------------------------------------------------------------------------
# Checks at the boundary

# What depends on values is checked at run time under torch.compile too: the step reads the rules that this returns.
library.define("checked(Tensor rules, Tensor? labels, int copies) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))


@torch.library.register_fake("hta_fused::checked", lib=library)
def _(rules, labels, copies):
    return torch.empty_like(rules)


def _checked(rules: Tensor, labels: Tensor | None, copies: int) -> Tensor:
    check_size(rules, rules.dtype, "settings")
    if labels is not None:
        _check_labels(labels, copies)
    return rules.clone()


library.impl("checked", _checked, "CompositeExplicitAutograd")


def _check_like(
    name: str, tensor: Any, first: Tensor, dtype: torch.dtype | None = None, first_name: str = "theta"
) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.shape != first.shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, but {first_name} has shape {tuple(first.shape)}")
    if tensor.dtype != (first.dtype if dtype is None else dtype):
        if dtype in (None, first.dtype):
            raise TypeError(f"{name} has dtype {tensor.dtype}, but {first_name} has dtype {first.dtype}")
        raise TypeError(f"{name} must have dtype {dtype}, got {tensor.dtype}")
    if tensor.device != first.device:
        raise ValueError(f"{name} is on {tensor.device}, but {first_name} is on {first.device}")
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got {tensor.layout}")
    if not tensor.is_contiguous() and not torch._C._are_functorch_transforms_active():  # vmap's strides are none
        raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()} for shape {tuple(tensor.shape)}")


def _check_floating(name: str, tensor: Any) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{name} must have a floating dtype of 16, 32 or 64 bits, got {tensor.dtype}")


def _check_low(low: list[Tensor], grad_dtype: torch.dtype, first: Tensor) -> None:
    if low and grad_dtype == first.dtype:
        raise ValueError(
            f"low copies are for gradients of a lower dtype than the copies' {first.dtype}, got {grad_dtype}"
        )


def _gradient_dtype(first: Tensor, grad: Any) -> torch.dtype:
    """The dtype that all gradients must have: the copies', or a lower one beside float32."""
    low = isinstance(grad, Tensor) and first.dtype == torch.float32 and grad.dtype in reference.LOW
    return grad.dtype if low else first.dtype


def _pattern(
    labels: "Tensor | Partition | None", first: Tensor, copies: int
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The ops' (codes, labels, seed) for what the user passed as `labels`."""
    if labels is None:
        return None, None, None
    if isinstance(labels, Tensor):
        _check_like("labels", labels, first, torch.uint8)
        if concrete(labels):
            _check_labels(labels, copies)
        return None, labels.reshape(-1), None
    if not hasattr(labels, "codes"):
        raise TypeError(f"labels must be a uint8 tensor or a Partition, got {type(labels).__name__}")
    if labels.numel != first.numel():
        raise ValueError(f"labels is a Partition of {labels.numel} elements, but theta has {first.numel()}")
    if labels.blocks > copies:
        raise ValueError(f"labels is a Partition of {labels.blocks} blocks, but there are {copies} copies")
    labels.check_hashed(copies)
    labels = labels.to(first.device)
    return labels.codes, labels.labels, labels.seed


def _setting(name: str, value: Any, like: Tensor) -> float | Tensor:
    """A number. Where values are not known, as under the compiler, a tensor of one stays a tensor; `rules_of` checks it."""
    late = isinstance(value, Tensor) and value.numel() == 1 and value.is_floating_point() and not concrete(like)
    return value if late else number(name, value)


def _check_labels(labels: Tensor, copies: int) -> None:
    while torch._C._functorch.is_batchedtensor(labels):  # under vmap
        labels = torch._C._functorch.get_unwrapped(labels)
    if labels.numel() and labels.amax() > copies:
        raise ValueError(f"labels must be {label_range(copies)}, got {int(labels.amax())}")


def label_range(copies: int) -> str:
    """The labels there are, in words."""
    return {1: "0 or 1", 2: "0, 1 or 2"}.get(copies, f"0, 1, … {copies}")


def as_scalar(name: str, value: Any, first: Tensor) -> Tensor | None:
    """One of the ops' optional numbers as the tensor that a kernel reads; grad_scale is what gradients are divided by."""
    if value is None:
        return None
    scale: float | None = None
    if not isinstance(value, Tensor):
        scale = number(name, value)
        value = torch.tensor([scale], dtype=torch.float64, device="cpu")
    if value.numel() != 1 or value.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"{name} must be one float32 or float64 number, got {value.dtype} of shape {tuple(value.shape)}"
        )
    if scale is None and value.device.type == "cpu" and concrete(value):
        scale = float(value)
    if name == "grad_scale" and scale is not None:
        limits = torch.finfo(reference.arithmetic(first.dtype))
        if not (0 < scale < float("inf") and limits.tiny <= 1 / scale <= limits.max):
            raise ValueError(
                f"{name} must be positive and finite, as must its reciprocal in {limits.dtype}, got {scale}"
            )
    return value.to(first.device).reshape(1)


def _as_stats(stats: Tensor | None, first: Tensor) -> Tensor:
    if stats is None:
        return torch.zeros(4, dtype=torch.float64, device=first.device)
    if not isinstance(stats, Tensor):
        raise TypeError(f"stats must be a tensor, got {shown(stats)}")
    if stats.shape != (4,) or stats.dtype != torch.float64 or not stats.is_contiguous() or stats.device != first.device:
        raise ValueError(
            f"stats must be contiguous float64 of shape (4,) on {first.device}, "
            f"got {stats.dtype} {tuple(stats.shape)} on {stats.device}"
        )
    return stats


def check_apart(written: Mapping[str, Any], read: Mapping[str, Any], names: Mapping[str, str]) -> None:
    """Raises where a contiguous tensor that is written shares memory with another. Both: lists of tensors by name;
    names: what the user calls them."""

    def called(name: str, j: int | None) -> str:
        own = name if j is None else f"{name}[{j}]"
        return names.get(own, own)

    for name, rows in written.items():
        for j, row in enumerate(rows):
            if row is not None and is_traceable_wrapper_subclass(row):
                which = called(name, j if len(rows) > 1 else None)
                raise TypeError(f"{which} must be a plain tensor, got a {type(row).__name__}")
    spans = [
        (row.data_ptr(), row.data_ptr() + row.nbytes, writes, name, j if len(rows) > 1 else None)
        for rows_by_name, writes in ((written, True), (read, False))
        for name, rows in rows_by_name.items()
        for j, row in enumerate(rows)
        if row is not None
    ]
    spans.sort(key=itemgetter(0, 1))
    far: tuple[Any, ...] = (0, 0, False, "", None)
    far_written = far  # the spans that reach furthest so far
    for span in spans:
        other = far if span[2] else far_written
        if span[0] < min(other[1], span[1]):
            first, second = (called(name, j) for *_, name, j in (other, span))
            raise ValueError(f"{second} must not share memory with {first}, as one of them is written")
        if span[1] > far[1]:
            far = span
        if span[2] and span[1] > far_written[1]:
            far_written = span


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


def step_buffers(
    mutated: list[Tensor], copies: list[Tensor], grads: list[Tensor], states: list[Tensor], low: list[Tensor],
    *arguments: Any, corrections: Sequence[Tensor] = (), scales: Sequence[Tensor] = (), noise: Tensor | None = None,
) -> None:  # fmt: skip
    """The step op for a caller who owns the buffers and has checked them: no checks, and no Python in the dispatch.

    Args:
        mutated: every tensor whose version counter must move, those that merely share the buffers' memory included.
        copies, grads, states, low, arguments: the op's.
        corrections, scales, noise: the op's, where copies, states or anchor are in formats of their own (csrc/formats.h).
    """
    dtype = torch.float32 if corrections else copies[0].dtype
    step = kernels(copies[0], next(iter(low or grads), None), dtype).step_
    with torch._C._AutoDispatchBelowADInplaceOrView():
        step(copies, grads, states, low, *arguments, corrections, scales, noise)
    torch.autograd.graph.increment_version(mutated)


def _flat(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t.detach().view(-1) for t in tensors]


def coupled_step_(
    copies: Rows,
    grads: Rows,
    states: Rows | Sequence[Rows] | None,
    anchor: Tensor | None,
    labels: "Tensor | Partition | None" = None,
    *,
    proposal: Proposal,
    coupling: Coupling,
    step: int = 1,
    grad_scale: float | Tensor | None = None,
    found_inf: Tensor | None = None,
    skip_nonfinite: bool = True,
    stats: Tensor | None = None,
    low: Rows | None = None,
) -> None:
    """One step of m coupled copies, in place and in one pass over memory: propose, sum, share (csrc/arithmetic.h).

    Under torch.compile new numbers in the proposal and the coupling, and new steps, do not compile anew; in a coupling
    of your own they do.

    Args:
        copies: [m, …], or a list of m tensors of one shape; one dtype and device; contiguous; m from 1 to 32.
            Overwritten. float16 and bfloat16 are computed with in float32.
        grads: the loss's gradients, like copies; or all float16 or bfloat16 where copies are float32.
        states: the proposal's buffers, overwritten: for each name in `proposal.buffers` one entry like copies. For
            SGD that entry itself will do; None where there is none.
        anchor: θ̃, like one copy; None stands for zero and is never read. Overwritten where the coupling moves it.
        labels: uint8, like one copy (0 coupled only; b from 1 to m: block b), or a Partition, or None for all 0.
        proposal: what each copy does by itself: `proposals.SGD` or `proposals.AdamW`.
        coupling: what pulls them together: see `couplings`. Not Parle, whose points are an optimizer's to keep.
        step: which step this is, the first being 1: AdamW's bias corrections and a coupling's period follow it.
        grad_scale: what the gradients are divided by (a loss scale): positive and finite, as is its reciprocal. A tensor
            on a GPU is not looked at, which would wait for the device: 0, NaN and the like there make the copies inf or
            NaN, where found_inf does not skip the step. skip_nonfinite looks at the gradients before the division.
        found_inf: one float; the step is skipped where it is not 0 (as torch.amp.GradScaler hands over).
        skip_nonfinite: skip the step, changing nothing, if any gradient is inf or NaN. Reads the gradients once more.
        stats: float64 [4], overwritten: after the step Σ_j ‖x_j − θ̃‖² over what is anchored and Σ_{i<j} ‖x_i − x_j‖²,
            1 if a gradient was not finite else 0, and a count to which each skipped step adds 1. Summed in a fixed
            order: same input, same bits, for any number of threads.
        low: like grads, where these are of a lower dtype than the copies; overwritten with the new copies in it, for the
            next forward pass in low precision.

    Raises:
        ValueError: shapes or devices differ, a buffer is missing or not contiguous, what is written shares memory with
            another argument, labels exceed m, no anchor to move, settings too large for the dtype.
        TypeError: dtypes differ or are not floating, or an argument is no tensor.
    """
    if not isinstance(proposal, proposals.KINDS):
        raise TypeError(f"proposal must be an SGD or AdamW, got {shown(proposal)}")
    if not isinstance(coupling, Coupling):
        raise TypeError(f"coupling must be one of those in couplings, got {shown(coupling)}")
    x = _as_rows("copies", copies)
    m, first = len(x), x[0]
    _check_floating("copies", first)
    g = _as_rows("grads", grads, m)
    grad_dtype = _gradient_dtype(first, g[0])
    buffers = _as_states(proposal, states, x)
    for name, rows, dtype in (
        ("copies", x, None),
        ("grads", g, grad_dtype),
        *((n, b, None) for n, b in buffers.items()),
    ):
        for j, row in enumerate(rows):
            _check_like(f"{name}[{j}]", row, first, dtype, "copies[0]")
    lows = [] if low is None else _as_rows("low", low, m)
    _check_low(lows, grad_dtype, first)
    for j, row in enumerate(lows):
        _check_like(f"low[{j}]", row, first, grad_dtype, "copies[0]")
    if anchor is not None:
        _check_like("anchor", anchor, first, None, "copies[0]")
    elif coupling.moves_anchor:
        raise ValueError(f"anchor must be a tensor, which {type(coupling).__name__} moves, got None")
    if coupling.buffers:
        raise ValueError("coupling must not be Parle, whose points an optimizer keeps: see CoupledOptimizer")
    step = whole("step", step, 1, 2**63 - 1)
    rules = coupled_rules(first, proposal, coupling, m, step, reference.arithmetic(first.dtype))
    _run({"copies": x, **buffers, "low": lows}, g, anchor, labels, rules, proposal.kernel, coupling.explicit,
         coupling.moves_anchor, grad_scale, found_inf, skip_nonfinite, stats)  # fmt: skip


def _as_rows(name: str, tensors: Any, count: int | None = None) -> list[Tensor]:
    if isinstance(tensors, Tensor):
        rows = list(tensors.unbind()) if tensors.dim() else [tensors]
    elif isinstance(tensors, Sequence) and not isinstance(tensors, str):
        rows = list(tensors)
    else:
        raise TypeError(f"{name} must be a tensor or a list of tensors, got {shown(tensors)}")
    if count is None and not 1 <= len(rows) <= MAX_COPIES:
        raise ValueError(f"{name} must hold 1 to {MAX_COPIES} copies, got {len(rows)}")
    if count is not None and len(rows) != count:
        raise ValueError(f"{name} must hold {count} tensors, one for each copy, got {len(rows)}")
    return rows


def _as_states(proposal: Proposal, states: Any, copies: list[Tensor]) -> dict[str, list[Tensor]]:
    names, m = proposal.buffers, len(copies)
    if states is not None and (isinstance(states, str) or not isinstance(states, Tensor | Sequence)):
        raise TypeError(f"states must be tensors or None, got {shown(states)}")
    if not names:
        return {}
    if len(names) == 1 and states is not None:  # the one entry itself
        whole = isinstance(states, Tensor) or len(states) != 1 or getattr(states[0], "shape", None) == copies[0].shape
        states = [states] if whole else states
    if states is None or len(states) != len(names):
        got = "None" if states is None else f"{len(states)} entries"
        raise ValueError(f"states must hold {', '.join(names)} for {proposal}, got {got}")
    return {name: _as_rows(name, entry, m) for name, entry in zip(names, states, strict=True)}


def _run(written: dict[str, list[Tensor]], g, anchor, labels, rules, kernel, explicit, moves_anchor, grad_scale, found_inf,
         skip_nonfinite, stats, names: Mapping[str, str] = MappingProxyType({})) -> None:  # fmt: skip
    """The step op over checked tensors of any shape; `written`: the copies, each of the states, and low by their names."""
    x, *states, low = written.values()
    first = x[0]
    flag("skip_nonfinite", skip_nonfinite)
    codes, bytes_, seed = _pattern(labels, first, len(x))
    stats = _as_stats(stats, first)
    scale, found = as_scalar("grad_scale", grad_scale, first), as_scalar("found_inf", found_inf, first)
    if concrete(first):
        read = {"grads": g, "labels": [bytes_], "grad_scale": [scale], "found_inf": [found]}
        (written if moves_anchor else read)["anchor"] = [anchor]
        check_apart({**written, "stats": [stats]}, read, names)
    else:
        rules = torch.ops.hta_fused.checked(rules, bytes_ if codes is None else None, len(x))
    flat_anchor = None if anchor is None else anchor.detach().view(-1)
    with torch.no_grad():
        kernels(first, g[0]).step_(
            _flat(x), _flat(g), _flat([v for rows in states for v in rows]), _flat(low), flat_anchor,
            flat_anchor if moves_anchor else None, None,
            codes, bytes_, seed, rules.to(first.device), scale, found, stats, kernel,
            explicit, skip_nonfinite, reference.PROPOSE | reference.SHARE, [], [], None,
        )  # fmt: skip


_OF_A_PAIR = {"copies[0]": "theta", "copies[1]": "eta"} | {
    f"{name}[{j}]": f"{word}_{copy}"
    for name, word in (("grads", "grad"), ("momentum", "momentum"), ("low", "low"))
    for j, copy in enumerate(("theta", "eta"))
}


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
    L: float,
    lr: float,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    mode: str = "implicit",
    grad_scale: float | Tensor | None = None,
    found_inf: Tensor | None = None,
    skip_nonfinite: bool = True,
    stats: Tensor | None = None,
    low_theta: Tensor | None = None,
    low_eta: Tensor | None = None,
) -> None:
    """`coupled_step_` of two copies θ and η by SGD, coupled as equation (3) says.

    mode="implicit" takes (3)'s quadratic terms by their proximal map with γ = lr/(1 − momentum), stable for every L and
    lr; mode="explicit" is the paper's equation (7), whose gradients go through the momentum and which diverges where
    lr·4/L exceeds about 2(1 + momentum). Under torch.compile new values of L, lr, momentum and weight_decay do not
    compile anew.

    Args:
        theta, eta: the two copies; one shape, dtype, device; contiguous. Overwritten.
        grad_theta, grad_eta: the loss's gradients, like theta; or both float16 or bfloat16 where theta is float32.
        momentum_theta, momentum_eta: momentum buffers, like theta, overwritten; None only without momentum.
        anchor: θ̃, like theta; None stands for zero and is never read.
        labels: uint8, like theta (0 coupled only, 1 anchored in θ, 2 anchored in η), or a Partition of theta's
            elements, or None for all 0.
        L: the homotopy parameter: 0 ≤ L ≤ ∞ (0 merges the copies, ∞ decouples them); explicit: 0 < L < ∞.
        lr: learning rate, positive.
        momentum: in [0, 1). weight_decay, nesterov: as in torch.optim.SGD.
        mode: "implicit" or "explicit".
        grad_scale, found_inf, skip_nonfinite, stats: as in `coupled_step_`.
        low_theta, low_eta: like grad_theta; overwritten with the new θ and η in its dtype. Both None: not wanted.

    Raises:
        ValueError: shapes or devices differ, a buffer is not contiguous, what is written shares memory with another
            argument, labels exceed 2, a setting is outside its range or too large for the dtype.
        TypeError: dtypes differ or are not floating, an argument is no tensor, or a setting no number.
    """
    _check_floating("theta", theta)
    for name, tensor in (("theta", theta), ("eta", eta)):
        _check_like(name, tensor, theta)
    grad_dtype = _gradient_dtype(theta, grad_theta)
    for name, tensor in (("grad_theta", grad_theta), ("grad_eta", grad_eta)):
        _check_like(name, tensor, theta, grad_dtype)
    rate, decay = _setting("lr", lr, theta), _setting("weight_decay", weight_decay, theta)
    momentum = number("momentum", momentum)
    flag("nesterov", nesterov)
    if not isinstance(rate, Tensor) and not 0 < rate < float("inf"):
        raise ValueError(f"lr must be positive and finite, got {lr}")
    momenta = [("momentum_theta", momentum_theta), ("momentum_eta", momentum_eta)]
    for name, buffer in momenta:
        if momentum != 0 and buffer is None:
            raise ValueError(f"{name} must be a tensor where momentum is {momentum}, got None")
        if buffer is not None:
            _check_like(name, buffer, theta)
    if anchor is not None:
        _check_like("anchor", anchor, theta)
    if (low_theta is None) != (low_eta is None):
        raise ValueError("low_theta and low_eta must both be tensors, or neither")
    lows = [] if low_theta is None or low_eta is None else [low_theta, low_eta]
    _check_low(lows, grad_dtype, theta)
    for name, copy in zip(("low_theta", "low_eta"), lows, strict=False):
        _check_like(name, copy, theta, grad_dtype)
    choice("mode", mode, "implicit", "explicit")
    if L is None:
        raise ValueError("L must be given")
    explicit = mode == "explicit"
    rules = homotopy_rules(
        theta, _setting("L", L, theta), rate, momentum, decay, nesterov, explicit, 2, reference.arithmetic(theta.dtype)
    )
    states = {"momentum": [v for _, v in momenta]} if momentum else {}  # without it left alone, as torch.optim.SGD
    written: dict[str, Any] = {"copies": [theta, eta], **states, "low": lows}
    _run(written, [grad_theta, grad_eta], anchor, labels, rules, SGD.kernel, explicit, False, grad_scale, found_inf,
         skip_nonfinite, stats, _OF_A_PAIR)  # fmt: skip


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
        A scalar tensor of theta's dtype. Differentiable any number of times in theta and eta, backward and forward, and
        under torch.func's transforms; the value and both gradients come out of one pass that reads each input once
        (under vmap one pass for each member of the batch).

    Raises:
        ValueError: shapes or devices differ, a tensor is not contiguous, labels exceed 2, or L is outside its range.
        TypeError: dtypes differ or are not floating, or an argument is no tensor.
    """
    arguments = _penalty_arguments(theta, eta, anchor, labels, L)
    forward = forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()
    if torch.compiler.is_compiling() and not forward:  # where the op's own registration serves, which knows neither
        return kernels(theta).penalty([theta.view(-1), eta.view(-1)], *arguments)[0]
    return _differentiable(theta.reshape(-1), eta.reshape(-1), *arguments)


@_disable_dynamo  # which would trace into the derivatives and lose their levels
def _differentiable(*arguments: Tensor | None) -> Tensor:
    return _Penalty.apply(*arguments)[0]


class _Penalty(torch.autograd.Function):
    """The penalty op with every kind of derivative, and vmap. It is quadratic: its gradients' derivative along a direction
    is the gradients at that direction, without the anchor."""

    @staticmethod
    def forward(theta, eta, anchor, *pattern):
        return kernels(theta).penalty([theta.contiguous(), eta.contiguous()], anchor, *pattern)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(output[1], *inputs[3:])
        ctx.save_for_forward(*inputs)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad_value, grad_grads):
        grads, *pattern = ctx.saved_tensors
        total = None if grad_value is None else grad_value * grads
        if grad_grads is not None:
            curved = _Penalty.apply(*grad_grads.contiguous(), None, *pattern)[1]
            total = curved if total is None else total + curved
        return *((None, None) if total is None else total), None, None, None, None, None

    @staticmethod
    def jvp(ctx, *tangents):
        with forward_ad._set_fwd_grad_enabled(
            True
        ):  # torch turns it off here, and would drop the tangents of an outer level
            theta, eta, anchor, *pattern = [
                None if t is None else forward_ad.unpack_dual(t).primal for t in ctx.saved_tensors
            ]
            grads = _Penalty.apply(theta, eta, anchor, *pattern)[1]
            along = [
                torch.zeros_like(g) if t is None else t.contiguous() for t, g in zip(tangents[:2], grads, strict=True)
            ]
            value = sum((t * g).sum() for t, g in zip(along, grads, strict=True))
            return value, _Penalty.apply(*along, None, *pattern)[1]

    @staticmethod
    def vmap(info, in_dims, *inputs):
        """One pass of the kernel for each member of the batch: its value is one sum over all that it is given."""
        results = [
            _Penalty.apply(
                *(t if d is None else t.select(d, b).contiguous() for t, d in zip(inputs, in_dims, strict=True))
            )
            for b in range(info.batch_size)
        ]
        return tuple(map(torch.stack, zip(*results, strict=True))), (0, 0)


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
    arguments = _penalty_arguments(theta, eta, anchor, labels, L)
    for name, grad in (("grad_theta", grad_theta), ("grad_eta", grad_eta)):
        _check_like(name, grad, theta)
    if concrete(theta):
        read = {"theta": [theta], "eta": [eta], "anchor": [anchor], "labels": [arguments[2]]}
        check_apart({"grad_theta": [grad_theta], "grad_eta": [grad_eta]}, read, {})
    with torch.no_grad():
        return kernels(theta).penalty_accumulate_(_flat([grad_theta, grad_eta]), _flat([theta, eta]), *arguments)


def _penalty_arguments(theta, eta, anchor, labels, L: float) -> tuple[Any, ...]:
    """The checked tail of a penalty op's arguments: anchor, codes, labels, seed, rules."""
    _check_floating("theta", theta)
    for name, tensor in (("theta", theta), ("eta", eta), ("anchor", anchor)):
        if name != "anchor" or tensor is not None:
            _check_like(name, tensor, theta)
    strength = _setting("L", L, theta)
    if not isinstance(strength, Tensor) and not 0 < strength < float("inf"):
        raise ValueError(f"L must be positive and finite, got {L}")
    rules = homotopy_rules(theta, strength, 1.0, 0.0, 0.0, False, True, 2, reference.arithmetic(theta.dtype))
    codes, bytes_, seed = _pattern(labels, theta, 2)
    if not concrete(theta):
        rules = torch.ops.hta_fused.checked(rules, bytes_ if codes is None else None, 2)
    return None if anchor is None else anchor.detach().reshape(-1), codes, bytes_, seed, rules.to(theta.device)
