"""The GPU ops in Triton, for compute capability 8.0 and up, where the extension was built without CUDA.

The arithmetic is csrc/arithmetic.h's, line by line; the arguments are the ops'. Imports triton_rows.py, and reference.py for the sizes.
With TRITON_INTERPRET=1 set beforehand, Triton's interpreter runs these on CPU tensors, slowly.
"""

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from .reference import HASHED, NUMBERS, PROPOSE, RULE, SHARE, TILE, arithmetic, blocks_of, rows_of
from .triton_rows import bits_of_row, random_bits, read, read_copy, read_state, write, write_copy, write_state

TILES = tl.constexpr(4)  # that a program walks: the same sums for the same input whatever the card
_ELEMENTS = tl.constexpr(TILE)
_NUMBERS = tl.constexpr(NUMBERS)
_RULE = tl.constexpr(RULE)
_HASHED = tl.constexpr(HASHED)
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
def sgd(x, g, v, w, number, WORK: tl.constexpr):
    """The proposal and the new states."""
    g += tl.load(number + 1).to(WORK) * x
    v = tl.load(number + 4).to(WORK) * v + g
    return x - (tl.load(number + 2).to(WORK) * g + tl.load(number + 3).to(WORK) * v), v, w


@triton.jit
def adamw(x, g, v, w, number, WORK: tl.constexpr):
    """The proposal and the new states."""
    v += tl.load(number + 2).to(WORK) * (g - v)
    w = tl.load(number + 3).to(WORK) * w + tl.load(number + 4).to(WORK) * (g * g)
    if tl.float32 == WORK:
        root = tl.sqrt_rn(w)
    else:
        root = tl.sqrt(w)
    top = tl.load(number + 5).to(WORK) * v
    bottom = root * tl.load(number + 6).to(WORK) + tl.load(number + 7).to(WORK)
    if tl.float32 == WORK:
        step = tl.div_rn(top, bottom)
    else:
        step = top / bottom
    return tl.load(number + 1).to(WORK) * x - step, v, w


@triton.jit
def shared(a, s, anchor, rule):
    return tl.load(rule + 1) * a + tl.load(rule + 2) * s + tl.load(rule + 3) * anchor


@triton.jit
def quadratic_gradient(x, gap, gaps, reads, anchor, rule):
    return tl.load(rule + 3) * (x - anchor) + tl.load(rule + 2) * (reads * gap - gaps)


@triton.jit
def hashed_label(seed, tile, at, BLOCKS: tl.constexpr):
    return (((random_bits(seed, tile, at) >> 16) * BLOCKS) >> 16).to(tl.int32) + 1


# -------------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def rules_of(
    codes, labels, seed, rules, tile, at, mask, live, groups, rows,
    M: tl.constexpr, BLOCKS: tl.constexpr, CODES: tl.constexpr, LABELS: tl.constexpr, SEED: tl.constexpr,
):  # fmt: skip
    """A tile's proposal numbers, and where the rules of its label, or of each element's, begin."""
    WIDTH: tl.constexpr = _NUMBERS + (BLOCKS + 1) * (M + 1) * _RULE
    label = tl.full((), 0, tl.int32)
    number = rules
    if CODES:
        # A code that names what is not there reads something harmless.
        group = tl.load(codes + 2 * tile, mask=live, other=0)
        label = tl.load(codes + 2 * tile + 1, mask=live, other=0)
        number += tl.where((group >= 0) & (group < groups), group, 0) * WIDTH
        row = tl.where((label < 0) & (-1 - label < rows), -1 - label, -1)
        hashed = label == _HASHED
        label = tl.where((label >= 0) & (label <= BLOCKS), label, 0)
        if LABELS:
            bytes_ = tl.load(labels + row.to(tl.int64) * _ELEMENTS + at, mask=mask & (row >= 0), other=0)
            label = tl.where(row >= 0, tl.minimum(bytes_.to(tl.int32), BLOCKS), label)
        if SEED:
            label = tl.where(hashed, hashed_label(seed, tile, at, BLOCKS), label)
    elif LABELS:
        label = tl.minimum(tl.load(labels + tile * _ELEMENTS + at, mask=mask, other=0).to(tl.int32), BLOCKS)
    return number, number + _NUMBERS + label * ((M + 1) * _RULE)


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
    copies, grads, states, low, anchor, centre, sums, codes, labels, seed, rules, grad_scale, found_inf, nonfinite, partial,
    corrections, scales, noise, n, groups, rows,
    WORK: tl.constexpr, M: tl.constexpr, BLOCKS: tl.constexpr, ADAMW: tl.constexpr, EXPLICIT: tl.constexpr, PROPOSES: tl.constexpr, SHARES: tl.constexpr,
    STATES: tl.constexpr, LOW: tl.constexpr, ANCHOR: tl.constexpr, CENTRE: tl.constexpr, SUMS: tl.constexpr,
    CODES: tl.constexpr, LABELS: tl.constexpr, SEED: tl.constexpr, SCALE: tl.constexpr, FOUND: tl.constexpr,
    GUARD: tl.constexpr, SPLIT: tl.constexpr, RANDOM: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    live = ~skips(found_inf, nonfinite, FOUND, GUARD)
    sum_anchor = tl.full((), 0.0, tl.float64)
    sum_pairs = tl.full((), 0.0, tl.float64)
    poison = tl.full((), 0.0, WORK)
    for t in range(TILES):
        tile = program * TILES + t
        at = tl.arange(0, _ELEMENTS)
        i = tile * _ELEMENTS + at
        mask = (i < n) & live
        number, rule = rules_of(
            codes,
            labels,
            seed,
            rules,
            tile,
            at,
            mask,
            tile * _ELEMENTS < n,
            groups,
            rows,
            M,
            BLOCKS,
            CODES,
            LABELS,
            SEED,
        )
        x = read_copy(copies, corrections, 0, i, mask, SPLIT, WORK)
        z = read(anchor, i, mask, WORK) if ANCHOR else tl.zeros_like(x)
        s = tl.zeros_like(x)
        bits = random_bits(noise, tile, at) if RANDOM else at.to(tl.uint32)
        if EXPLICIT:
            first = x
            gaps = tl.zeros_like(x)
            reads = tl.zeros_like(x)
            for j in tl.static_range(M):
                value = read_copy(copies, corrections, j, i, mask, SPLIT, WORK)
                weight = tl.load(rule + j * _RULE)
                s += weight * value
                gaps += weight * (value - first)
                reads += weight
        values = ()
        for j in tl.static_range(M):
            x = read_copy(copies, corrections, j, i, mask, SPLIT, WORK)
            if PROPOSES:
                g = read(grads[j], i, mask, WORK)
                v = read_state(states, scales, j, tile, i, mask, n, live, False, WORK) if STATES else tl.zeros_like(x)
                scale = tl.load(number).to(WORK)
                if SCALE:
                    scale *= (1.0 / tl.load(grad_scale).to(tl.float64)).to(WORK)
                g *= scale
                poison += tl.sum(g - g)
                if EXPLICIT:
                    g += quadratic_gradient(x, x - first, gaps, reads, z, rule + j * _RULE)
                if ADAMW:
                    w = read_state(states, scales, M + j, tile, i, mask, n, live, True, WORK)
                    x, v, w = adamw(x, g, v, w, number, WORK)
                    of_row = bits_of_row(bits, noise, tile, 2 * M + j, RANDOM)
                    write_state(states, scales, M + j, tile, i, mask, n, live, w, of_row, True, RANDOM)
                else:
                    x, v, _ = sgd(x, g, v, v, number, WORK)
                if STATES:
                    of_row = bits_of_row(bits, noise, tile, M + j, RANDOM)
                    write_state(states, scales, j, tile, i, mask, n, live, v, of_row, False, RANDOM)
                if not EXPLICIT:
                    s += tl.load(rule + j * _RULE) * x
            values = values + (x,)  # type: ignore[assignment]
        if SUMS:
            if PROPOSES:
                tl.store(sums + i, s, mask=mask)
            else:
                s = tl.load(sums + i, mask=mask, other=0).to(WORK)

        apart = tl.zeros_like(x)
        results = ()
        for j in tl.static_range(M):
            x = values[j]
            if SHARES:
                if not EXPLICIT:
                    x = shared(x, s, z, rule + j * _RULE)
            sum_anchor += tl.sum(tl.load(rule + j * _RULE + 4) * ((x - z) * (x - z))).to(tl.float64)
            if j == 0:
                first = x
            apart += x - first
            results = results + (x,)  # type: ignore[assignment]
            write_copy(copies, corrections, j, i, mask, x, bits_of_row(bits, noise, tile, j, RANDOM), SPLIT, RANDOM)
            if LOW:
                write(low[j], i, mask, x, bits, False)
        for j in tl.static_range(M):
            gap = (results[j] - first) - apart / M
            sum_pairs += tl.sum(M * (gap * gap)).to(tl.float64)
        if CENTRE:
            if SHARES:
                c = shared(read(centre, i, mask, WORK), s, z, rule + M * _RULE)
                write(centre, i, mask, c, bits_of_row(bits, noise, tile, 3 * M, RANDOM), RANDOM)
    tl.store(partial + 2 * program, sum_anchor)
    tl.store(partial + 2 * program + 1, sum_pairs)
    # Every program that finds one writes the same, and none reads it: the guard's flag is the one before.
    tl.store(nonfinite + 1, 1, mask=live & (poison != poison))


@triton.jit
def guard_kernel(grads, nonfinite, n, WORK: tl.constexpr, M: tl.constexpr):
    """Sets the flag where a gradient is not finite."""
    program = tl.program_id(0).to(tl.int64)
    poison = tl.full((), 0.0, WORK)
    for t in range(TILES):
        i = (program * TILES + t) * _ELEMENTS + tl.arange(0, _ELEMENTS)
        for j in tl.static_range(M):
            g = tl.load(grads[j] + i, mask=i < n, other=0).to(WORK)
            poison += tl.sum(g - g)
    tl.store(nonfinite, 1, mask=poison != poison)


@triton.jit
def penalty_kernel(
    copies, grads, anchor, codes, labels, seed, rules, partial, n, rows,
    WORK: tl.constexpr, M: tl.constexpr, ACCUMULATE: tl.constexpr, ANCHOR: tl.constexpr, CODES: tl.constexpr,
    LABELS: tl.constexpr, SEED: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    energy = tl.full((), 0.0, tl.float64)
    for t in range(TILES):
        tile = program * TILES + t
        at = tl.arange(0, _ELEMENTS)
        i = tile * _ELEMENTS + at
        mask = i < n
        _, rule = rules_of(
            codes, labels, seed, rules, tile, at, mask, tile * _ELEMENTS < n, 1, rows, M, M, CODES, LABELS, SEED
        )
        first = tl.load(copies[0] + i, mask=mask, other=0).to(WORK)
        z = tl.load(anchor + i, mask=mask, other=0).to(WORK) if ANCHOR else tl.zeros_like(first)
        gaps = tl.zeros_like(first)
        reads = tl.zeros_like(first)
        for j in tl.static_range(M):
            read = tl.load(rule + j * _RULE)
            gaps += read * (tl.load(copies[j] + i, mask=mask, other=0).to(WORK) - first)
            reads += read
        for j in tl.static_range(M):
            x = tl.load(copies[j] + i, mask=mask, other=0).to(WORK)
            g = quadratic_gradient(x, x - first, gaps, reads, z, rule + j * _RULE)
            off = (x - first) - gaps / reads
            pulled = tl.load(rule + j * _RULE + 3) * ((x - z) * (x - z))
            energy += tl.sum(0.5 * (pulled + tl.load(rule + j * _RULE + 2) * (reads * (off * off)))).to(tl.float64)
            if ACCUMULATE:
                g += tl.load(grads[j] + i, mask=mask, other=0).to(WORK)
            tl.store(grads[j] + i, g, mask=mask)
    tl.store(partial + 2 * program, energy)


@triton.jit
def total(partial, which, programs, FINISH: tl.constexpr):
    """One of the programs' sums, added in an order that never changes."""
    sums = tl.zeros((FINISH,), tl.float64)
    for first in range(0, programs, FINISH):
        at = first + tl.arange(0, FINISH)
        sums += tl.load(partial + 2 * at + which, mask=at < programs, other=0)
    return tl.sum(sums)


@triton.jit
def step_end_kernel(
    partial, stats, found_inf, nonfinite, programs, FOUND: tl.constexpr, GUARD: tl.constexpr, FINISH: tl.constexpr
):
    skip = skips(found_inf, nonfinite, FOUND, GUARD)
    done = ~skip
    tl.store(stats, total(partial, 0, programs, FINISH), mask=done)
    tl.store(stats + 1, total(partial, 1, programs, FINISH), mask=done)
    tl.store(
        stats + 2, tl.where(skip | (tl.load(nonfinite) != 0) | (tl.load(nonfinite + 1) != 0), 1.0, 0.0).to(tl.float64)
    )
    tl.store(stats + 3, tl.load(stats + 3) + skip.to(tl.float64))


@triton.jit
def penalty_end_kernel(partial, value, programs, WORK: tl.constexpr, FINISH: tl.constexpr):
    tl.store(value, total(partial, 0, programs, FINISH).to(WORK).to(value.dtype.element_ty))


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


def _shape(copies: list[Tensor]) -> tuple[tuple[Tensor, ...], int, int]:
    """The rows, their elements, and how many programs walk them."""
    rows = tuple(rows_of(copies))
    return rows, rows[0].numel(), -(-rows[0].numel() // (TILES.value * TILE))


def step_(copies, grads, states, low, anchor, centre, sums, codes, labels, seed, rules, grad_scale, found_inf, stats,
          proposal, explicit_mode, skip_nonfinite, phase, corrections, scales, noise) -> None:  # fmt: skip
    """See reference.step_."""
    x, n, programs = _shape(copies)
    g, state, lows, more, scale_rows = (tuple(rows_of(list_)) for list_ in (grads, states, low, corrections, scales))
    partial = torch.empty(max(1, 2 * programs), dtype=torch.float64, device=stats.device)
    nonfinite = torch.zeros(2, dtype=torch.int32, device=stats.device)
    found, guard = found_inf is not None, bool(skip_nonfinite and phase & PROPOSE)
    with _on(stats):
        if programs and guard:
            guard_kernel[(programs,)](g, nonfinite, n, WORK=_TYPES[arithmetic(g[0].dtype)], M=len(x), **OPTIONS)
        if programs:
            step_kernel[(programs,)](
                x, g, state, lows, anchor, centre, sums, codes, labels, seed, rules, grad_scale, found_inf, nonfinite,
                partial, more, scale_rows, noise, n, len(rules), _byte_rows(codes, labels), WORK=_TYPES[arithmetic(x[0].dtype)], M=len(x),
                BLOCKS=blocks_of(rules, len(x)), ADAMW=proposal == 1, EXPLICIT=explicit_mode, PROPOSES=bool(phase & PROPOSE),
                SHARES=bool(phase & SHARE), STATES=bool(state), LOW=bool(lows),
                ANCHOR=anchor is not None, CENTRE=centre is not None, SUMS=sums is not None, CODES=codes is not None,
                LABELS=labels is not None, SEED=seed is not None, SCALE=grad_scale is not None, FOUND=found, GUARD=guard,
                SPLIT=bool(more), RANDOM=noise is not None, **OPTIONS,
            )  # fmt: skip
        step_end_kernel[(1,)](
            partial, stats, found_inf, nonfinite, programs, FOUND=found, GUARD=guard, FINISH=_FINISH, **OPTIONS
        )


def penalty(copies, anchor, codes, labels, seed, rules) -> tuple[Tensor, Tensor]:
    """See reference.penalty."""
    rows, n, _ = _shape(copies)
    grads = copies[0].new_empty((len(rows), n))
    return _penalty([grads], copies, anchor, codes, labels, seed, rules, False), grads


def penalty_accumulate_(grads, copies, anchor, codes, labels, seed, rules) -> Tensor:
    """See reference.penalty_accumulate_."""
    return _penalty(grads, copies, anchor, codes, labels, seed, rules, True)


def _penalty(grads, copies, anchor, codes, labels, seed, rules, accumulate: bool) -> Tensor:
    x, n, programs = _shape(copies)
    partial = torch.empty(max(1, 2 * programs), dtype=torch.float64, device=rules.device)
    value = copies[0].new_empty(())
    work = _TYPES[arithmetic(value.dtype)]
    with _on(value):
        if programs:
            penalty_kernel[(programs,)](
                x, tuple(rows_of(grads)), anchor, codes, labels, seed, rules, partial, n, _byte_rows(codes, labels),
                WORK=work, M=len(x), ACCUMULATE=accumulate, ANCHOR=anchor is not None, CODES=codes is not None,
                LABELS=labels is not None, SEED=seed is not None, **OPTIONS,
            )  # fmt: skip
        penalty_end_kernel[(1,)](partial, value, programs, WORK=work, FINISH=_FINISH, **OPTIONS)
    return value


def batch_(out, out_labels, images, labels, order, offsets, mirrored, scale, shift, position, padding: int) -> None:
    """See reference.batch_."""
    size, channels, height, width = out.shape
    block = 256
    with _on(out):
        batch_kernel[(-(-size * height * width // block),)](
            out, out_labels, images, labels, order, offsets, mirrored, scale, shift, position, len(order), size,
            *out.stride(), CHANNELS=channels, HEIGHT=height, WIDTH=width, PADDING=padding, BLOCK=block, **OPTIONS,
        )  # fmt: skip


def _byte_rows(codes: Tensor | None, labels: Tensor | None) -> int:
    return 0 if labels is None or codes is None else labels.numel() // TILE


def _on(tensor: Tensor) -> torch.cuda.device:
    """Triton launches on the current device; -1 leaves it as it is."""
    return torch.cuda.device(tensor.device.index if tensor.is_cuda else -1)
