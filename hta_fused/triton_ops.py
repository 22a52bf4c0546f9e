"""The GPU ops in Triton, for compute capability 8.0 and up, where the extension was built without CUDA.

The arithmetic is csrc/homotopy.h's, line by line; the arguments are the ops' in ops.py. Imports reference.py only for
the size of a tile. With TRITON_INTERPRET=1 set beforehand, Triton's interpreter runs these on CPU tensors, slowly.
"""

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from .reference import TILE, arithmetic

TILES = tl.constexpr(4)  # that a program walks: the same sums for the same input whatever the card
_ELEMENTS = tl.constexpr(TILE)
_FINISH = 1024  # programs' sums that the last kernel adds at a time
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_TYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
}
# No contraction into FMA: the same bits as the CUDA and the CPU kernels. A thread takes 16 bytes of each float32 buffer at a time.
OPTIONS = dict(num_warps=8, enable_fp_fusion=False)


def why_not(device: torch.device) -> str:
    """Why these kernels do not serve a device; empty if they do."""
    if _INTERPRETED:
        return "" if device.type == "cpu" else "TRITON_INTERPRET is set, so it serves CPU tensors"
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    if device.type != "cuda":
        return "it serves CUDA tensors"
    capability = torch.cuda.get_device_capability(device)
    return "" if capability >= (8, 0) else f"Triton needs compute capability 8.0, this card has {capability}"


# ---------------------------------------------------------------------------------------------------------- arithmetic


@triton.jit
def penalty_gradient(theta, eta, anchor, pull, couple, anchored_theta, anchored_eta):
    """The gradients of equation (3)'s quadratic terms: pull = 2L, couple = 2/L."""
    coupling = couple * (theta - eta)
    g_theta = pull * (anchored_theta * (theta - anchor)) + coupling
    g_eta = pull * (anchored_eta * (eta - anchor)) - coupling
    return g_theta, g_eta


@triton.jit
def squares(theta, eta, anchor, anchored_theta, anchored_eta):
    """Each element's part in ‖θ₁−θ̃₁‖² + ‖η₂−θ̃₂‖² and in ‖θ−η‖²."""
    to_theta = theta - anchor
    to_eta = eta - anchor
    gap = theta - eta
    return anchored_theta * (to_theta * to_theta) + anchored_eta * (to_eta * to_eta), gap * gap


@triton.jit
def sgd(x, g, v, lr_grad, lr_momentum, momentum, MOMENTUM: tl.constexpr):
    """One SGD step of one copy: its proposal and its momentum."""
    if MOMENTUM:
        v = momentum * v + g
        return x - (lr_grad * g + lr_momentum * v), v
    else:
        return x - lr_grad * g, v


# -------------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def codes_of(codes, tile, live, groups, rows, CODES: tl.constexpr):
    """A tile's parameter group, its label, and its row of labels or -1. What is not there counts as 0."""
    if CODES:
        group = tl.load(codes + 2 * tile, mask=live, other=0)
        label = tl.load(codes + 2 * tile + 1, mask=live, other=0)
        group = tl.where((group >= 0) & (group < groups), group, 0)
        row = tl.where((label < 0) & (-1 - label < rows), -1 - label, -1)
        label = tl.where((label >= 0) & (label < 3), label, 0)
        return group, label, row
    else:
        return tl.full((), 0, tl.int32), tl.full((), 0, tl.int32), tl.full((), -1, tl.int32)


@triton.jit
def labels_of(labels, start, at, mask, label, row, CODES: tl.constexpr, LABELS: tl.constexpr):
    """Each element's label; a scalar where no tile mixes them."""
    if LABELS:
        if CODES:
            bytes_ = tl.load(labels + row.to(tl.int64) * _ELEMENTS + at, mask=mask & (row >= 0), other=0)
            return tl.where(row >= 0, tl.minimum(bytes_.to(tl.int32), 2), label)
        else:
            return tl.minimum(tl.load(labels + start + at, mask=mask, other=0).to(tl.int32), 2)
    else:
        return label


@triton.jit
def coefficient(table, label, C: tl.constexpr, WORK: tl.constexpr, LABELS: tl.constexpr):
    """Number C of the 2×3 table that a label, or each element's, picks."""
    if LABELS:
        zero = tl.load(table + C).to(WORK)
        one = tl.load(table + 6 + C).to(WORK)
        two = tl.load(table + 12 + C).to(WORK)
        return tl.where(label == 1, one, tl.where(label == 2, two, zero))
    else:
        return tl.load(table + 6 * label + C).to(WORK)


@triton.jit
def skips(found_inf, nonfinite, FOUND: tl.constexpr, GUARD: tl.constexpr):
    skip = tl.full((), 0, tl.int32)
    if FOUND:
        skip += (tl.load(found_inf) != 0).to(tl.int32)
    if GUARD:
        skip += tl.load(nonfinite)
    return skip != 0


@triton.jit
def step_kernel(
    theta, eta, g_theta, g_eta, v_theta, v_eta, low_theta, low_eta, anchor, codes, labels, hyper, tables, grad_scale,
    found_inf, nonfinite, partial, n, groups, rows,
    WORK: tl.constexpr, MOMENTUM: tl.constexpr, LOW: tl.constexpr, ANCHOR: tl.constexpr, CODES: tl.constexpr,
    LABELS: tl.constexpr, SCALE: tl.constexpr, FOUND: tl.constexpr, GUARD: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    live = ~skips(found_inf, nonfinite, FOUND, GUARD)
    sum_anchor = tl.full((), 0.0, tl.float64)
    sum_distance = tl.full((), 0.0, tl.float64)
    sum_poison = tl.full((), 0.0, tl.float64)
    for t in range(TILES):
        tile = program * TILES + t
        start = tile * _ELEMENTS
        at = tl.arange(0, _ELEMENTS)
        i = start + at
        mask = (i < n) & live
        group, label, row = codes_of(codes, tile, start < n, groups, rows, CODES)
        h = hyper + 6 * group
        k = tables + 18 * group

        x = tl.load(theta + i, mask=mask, other=0).to(WORK)
        y = tl.load(eta + i, mask=mask, other=0).to(WORK)
        g_x = tl.load(g_theta + i, mask=mask, other=0).to(WORK)
        g_y = tl.load(g_eta + i, mask=mask, other=0).to(WORK)
        v_x = tl.load(v_theta + i, mask=mask, other=0).to(WORK) if MOMENTUM else g_x
        v_y = tl.load(v_eta + i, mask=mask, other=0).to(WORK) if MOMENTUM else g_y
        z = tl.load(anchor + i, mask=mask, other=0).to(WORK) if ANCHOR else tl.zeros_like(x)
        label = labels_of(labels, start, at, mask, label, row, CODES, LABELS)
        in_theta = (label == 1).to(WORK)
        in_eta = (label == 2).to(WORK)
        if SCALE:
            inverse = (1.0 / tl.load(grad_scale).to(tl.float64)).to(WORK)
            g_x *= inverse
            g_y *= inverse

        sum_poison += tl.sum((g_x - g_x) + (g_y - g_y)).to(tl.float64)
        decay = tl.load(h + 3).to(WORK)
        q_x, q_y = penalty_gradient(x, y, z, tl.load(h + 4).to(WORK), tl.load(h + 5).to(WORK), in_theta, in_eta)
        g_x += decay * x + q_x
        g_y += decay * y + q_y
        lr_grad = tl.load(h).to(WORK)
        lr_momentum = tl.load(h + 1).to(WORK)
        momentum = tl.load(h + 2).to(WORK)
        a, v_x = sgd(x, g_x, v_x, lr_grad, lr_momentum, momentum, MOMENTUM)
        b, v_y = sgd(y, g_y, v_y, lr_grad, lr_momentum, momentum, MOMENTUM)
        x = coefficient(k, label, 0, WORK, LABELS) * a + coefficient(k, label, 1, WORK, LABELS) * b
        x += coefficient(k, label, 2, WORK, LABELS) * z
        y = coefficient(k, label, 3, WORK, LABELS) * a + coefficient(k, label, 4, WORK, LABELS) * b
        y += coefficient(k, label, 5, WORK, LABELS) * z
        to_anchor, gap = squares(x, y, z, in_theta, in_eta)
        sum_anchor += tl.sum(to_anchor).to(tl.float64)
        sum_distance += tl.sum(gap).to(tl.float64)

        tl.store(theta + i, x, mask=mask)
        tl.store(eta + i, y, mask=mask)
        if MOMENTUM:
            tl.store(v_theta + i, v_x, mask=mask)
            tl.store(v_eta + i, v_y, mask=mask)
        if LOW:
            tl.store(low_theta + i, x.to(low_theta.dtype.element_ty), mask=mask)
            tl.store(low_eta + i, y.to(low_eta.dtype.element_ty), mask=mask)
    out = partial + 3 * program
    tl.store(out, sum_anchor)
    tl.store(out + 1, sum_distance)
    tl.store(out + 2, sum_poison)


@triton.jit
def guard_kernel(g_theta, g_eta, nonfinite, n, WORK: tl.constexpr):
    """Sets the flag where a gradient is not finite. Every program that finds one writes the same 1."""
    program = tl.program_id(0).to(tl.int64)
    poison = tl.full((), 0.0, WORK)
    for t in range(TILES):
        i = (program * TILES + t) * _ELEMENTS + tl.arange(0, _ELEMENTS)
        x = tl.load(g_theta + i, mask=i < n, other=0).to(WORK)
        y = tl.load(g_eta + i, mask=i < n, other=0).to(WORK)
        poison += tl.sum((x - x) + (y - y))
    tl.store(nonfinite, 1, mask=poison != poison)


@triton.jit
def penalty_kernel(
    theta, eta, anchor, g_theta, g_eta, codes, labels, partial, L, n, rows,
    WORK: tl.constexpr, ACCUMULATE: tl.constexpr, ANCHOR: tl.constexpr, CODES: tl.constexpr, LABELS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    sum_anchor = tl.full((), 0.0, tl.float64)
    sum_distance = tl.full((), 0.0, tl.float64)
    L = tl.load(L)
    pull = (2 * L).to(WORK)
    couple = (2 / L).to(WORK)
    for t in range(TILES):
        tile = program * TILES + t
        start = tile * _ELEMENTS
        at = tl.arange(0, _ELEMENTS)
        i = start + at
        mask = i < n
        _, label, row = codes_of(codes, tile, start < n, 1, rows, CODES)
        x = tl.load(theta + i, mask=mask, other=0).to(WORK)
        y = tl.load(eta + i, mask=mask, other=0).to(WORK)
        z = tl.load(anchor + i, mask=mask, other=0).to(WORK) if ANCHOR else tl.zeros_like(x)
        label = labels_of(labels, start, at, mask, label, row, CODES, LABELS)
        in_theta = (label == 1).to(WORK)
        in_eta = (label == 2).to(WORK)
        q_x, q_y = penalty_gradient(x, y, z, pull, couple, in_theta, in_eta)
        to_anchor, gap = squares(x, y, z, in_theta, in_eta)
        sum_anchor += tl.sum(to_anchor).to(tl.float64)
        sum_distance += tl.sum(gap).to(tl.float64)
        if ACCUMULATE:
            q_x += tl.load(g_theta + i, mask=mask, other=0).to(WORK)
            q_y += tl.load(g_eta + i, mask=mask, other=0).to(WORK)
        tl.store(g_theta + i, q_x, mask=mask)
        tl.store(g_eta + i, q_y, mask=mask)
    out = partial + 3 * program
    tl.store(out, sum_anchor)
    tl.store(out + 1, sum_distance)


@triton.jit
def total(partial, which, programs, FINISH: tl.constexpr):
    """One of the programs' sums, added in an order that never changes."""
    sums = tl.zeros((FINISH,), tl.float64)
    for first in range(0, programs, FINISH):
        at = first + tl.arange(0, FINISH)
        sums += tl.load(partial + 3 * at + which, mask=at < programs, other=0)
    return tl.sum(sums)


@triton.jit
def step_end_kernel(
    partial, stats, found_inf, nonfinite, programs, FOUND: tl.constexpr, GUARD: tl.constexpr, FINISH: tl.constexpr
):
    skip = skips(found_inf, nonfinite, FOUND, GUARD)
    done = ~skip
    poison = total(partial, 2, programs, FINISH)
    tl.store(stats, total(partial, 0, programs, FINISH), mask=done)
    tl.store(stats + 1, total(partial, 1, programs, FINISH), mask=done)
    tl.store(stats + 2, tl.where(skip | (poison != 0), 1.0, 0.0).to(tl.float64))
    tl.store(stats + 3, tl.load(stats + 3) + skip.to(tl.float64))


@triton.jit
def penalty_end_kernel(partial, value, L, programs, WORK: tl.constexpr, FINISH: tl.constexpr):
    L = tl.load(L)
    result = L * total(partial, 0, programs, FINISH) + total(partial, 1, programs, FINISH) / L
    tl.store(value, result.to(WORK).to(value.dtype.element_ty))


@triton.jit
def batch_kernel(
    out, out_labels, images, labels, order, offsets, mirrored, scale, shift, position, count, size, s_n, s_c, s_h, s_w,
    CHANNELS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, PADDING: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    n = at // (HEIGHT * WIDTH)
    y = at % (HEIGHT * WIDTH) // WIDTH
    x = at % WIDTH
    chosen = tl.load(position) + n
    mask = (n < size) & (chosen < count)
    image = tl.load(order + chosen, mask=mask, other=0)
    row = y + tl.load(offsets + chosen, mask=mask, other=0) - PADDING
    mirror = tl.load(mirrored + chosen, mask=mask, other=0).to(tl.int1)
    column = tl.where(mirror, WIDTH - 1 - x, x) + tl.load(offsets + count + chosen, mask=mask, other=0) - PADDING
    inside = mask & (row >= 0) & (row < HEIGHT) & (column >= 0) & (column < WIDTH)
    for c in tl.static_range(CHANNELS):
        source = images + ((image * CHANNELS + c) * HEIGHT + row) * WIDTH + column
        pixel = tl.load(source, mask=inside, other=0).to(tl.float32)
        value = pixel * tl.load(scale + c) + tl.load(shift + c)
        tl.store(out + n * s_n + c * s_c + y * s_h + x * s_w, value.to(out.dtype.element_ty), mask=mask)
    tl.store(out_labels + n, tl.load(labels + image, mask=mask, other=0), mask=mask & (y == 0) & (x == 0))


# -------------------------------------------------------------------------------------------------------------- the ops


def _programs(n: int) -> int:
    return -(-n // (TILES.value * TILE))


def step_(theta, eta, grad_theta, grad_eta, momentum_theta, momentum_eta, low_theta, low_eta, anchor, codes, labels,
          hyper, tables, grad_scale, found_inf, stats, skip_nonfinite) -> None:  # fmt: skip
    """See ops.homotopy_step_."""
    n, programs = theta.numel(), _programs(theta.numel())
    partial = torch.empty(max(1, 3 * programs), dtype=torch.float64, device=theta.device)
    nonfinite = torch.zeros(1, dtype=torch.int32, device=theta.device) if skip_nonfinite else None
    found, guard = found_inf is not None, skip_nonfinite
    with _on(theta):
        if programs and skip_nonfinite:
            guard_kernel[(programs,)](
                grad_theta, grad_eta, nonfinite, n, WORK=_TYPES[arithmetic(grad_theta.dtype)], **OPTIONS
            )
        if programs:
            step_kernel[(programs,)](
                theta, eta, grad_theta, grad_eta, momentum_theta, momentum_eta, low_theta, low_eta, anchor, codes,
                labels, hyper, tables, grad_scale, found_inf, nonfinite, partial, n, len(hyper), _rows(codes, labels),
                WORK=_TYPES[arithmetic(theta.dtype)], MOMENTUM=momentum_theta is not None, LOW=low_theta is not None,
                ANCHOR=anchor is not None, CODES=codes is not None, LABELS=labels is not None,
                SCALE=grad_scale is not None, FOUND=found, GUARD=guard, **OPTIONS,
            )  # fmt: skip
        step_end_kernel[(1,)](
            partial, stats, found_inf, nonfinite, programs, FOUND=found, GUARD=guard, FINISH=_FINISH, **OPTIONS
        )


def penalty(theta, eta, anchor, codes, labels, L: float) -> tuple[Tensor, Tensor, Tensor]:
    """See ops.homotopy_penalty."""
    grad_theta, grad_eta = torch.empty_like(theta), torch.empty_like(eta)
    return _penalty(theta, eta, anchor, codes, labels, L, grad_theta, grad_eta, False), grad_theta, grad_eta


def penalty_accumulate_(grad_theta, grad_eta, theta, eta, anchor, codes, labels, L: float) -> Tensor:
    """See ops.homotopy_penalty_accumulate_."""
    return _penalty(theta, eta, anchor, codes, labels, L, grad_theta, grad_eta, True)


def _penalty(theta, eta, anchor, codes, labels, L, grad_theta, grad_eta, accumulate: bool) -> Tensor:
    n, programs = theta.numel(), _programs(theta.numel())
    partial = torch.empty(max(1, 3 * programs), dtype=torch.float64, device=theta.device)
    at_L = torch.full((1,), L, dtype=torch.float64, device=theta.device)  # Triton would pass a float in 32 bits
    value = theta.new_empty(())
    with _on(theta):
        if programs:
            penalty_kernel[(programs,)](
                theta, eta, anchor, grad_theta, grad_eta, codes, labels, partial, at_L, n,
                _rows(codes, labels), WORK=_TYPES[arithmetic(theta.dtype)], ACCUMULATE=accumulate,
                ANCHOR=anchor is not None, CODES=codes is not None, LABELS=labels is not None, **OPTIONS,
            )  # fmt: skip
        penalty_end_kernel[(1,)](
            partial, value, at_L, programs, WORK=_TYPES[arithmetic(theta.dtype)], FINISH=_FINISH, **OPTIONS
        )
    return value


def batch_(out, out_labels, images, labels, order, offsets, mirrored, scale, shift, position, padding: int) -> None:
    """See ops.batch_."""
    size, channels, height, width = out.shape
    block = 256
    with _on(out):
        batch_kernel[(-(-size * height * width // block),)](
            out, out_labels, images, labels, order, offsets, mirrored, scale, shift, position, len(order), size,
            *out.stride(), CHANNELS=channels, HEIGHT=height, WIDTH=width, PADDING=padding, BLOCK=block, **OPTIONS,
        )  # fmt: skip


def _rows(codes: Tensor | None, labels: Tensor | None) -> int:
    return 0 if labels is None or codes is None else labels.numel() // TILE


def _on(tensor: Tensor) -> torch.cuda.device:
    """Triton launches on the current device; -1 leaves it as it is."""
    return torch.cuda.device(tensor.device.index if tensor.is_cuda else -1)
