"""How the Triton kernels read and write rows, whatever their format, and the random bits that rows are rounded by.

csrc/formats.h line by line; kernels/formats.py is the same in PyTorch. A row's format follows from its pointer's type and
from whether corrections go with it. Imports formats.py for the sizes.
"""

import torch
import triton
import triton.language as tl

from .formats import LEAST, SCALED, TILE, TOP

_ELEMENTS = tl.constexpr(TILE)
_SCALED = tl.constexpr(SCALED)
_SCALES = tl.constexpr(TILE // SCALED)  # of a tile
_TOP = tl.constexpr(TOP)
_LEAST = tl.constexpr(LEAST[0])
_LEAST_SQUARE = tl.constexpr(LEAST[1])
_WHOLE, _WHOLE_SQUARE = (tl.constexpr(float(torch.ones(()) / (TOP - least))) for least in LEAST)  # rounded as float32
_SUBNORMAL, _SUBNORMAL_BITS = tl.constexpr(2.0**-14), tl.constexpr(113 << 23)  # below it float16s are evenly spaced
_BEYOND_HALF = tl.constexpr(0x7C00 << 8)

# ------------------------------------------------------------------------------------------------------- random numbers


@triton.jit
def mix64(x):
    x = x + 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def hash_keys(seed, tile):
    """A tile's two keys, in one number."""
    return mix64(mix64(seed) ^ tile.to(tl.uint64))


@triton.jit
def random_bits(seed, tile, at):
    """32 random bits of each element of a tile."""
    key = hash_keys(tl.load(seed).to(tl.uint64), tile)
    x = at.to(tl.uint32) ^ key.to(tl.uint32)
    x ^= x >> 16
    x *= 0x85EBCA6B
    x ^= (x >> 13) ^ (key >> 32).to(tl.uint32)
    x *= 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def bits_of_row(bits, noise, tile, ROW: tl.constexpr, RANDOM: tl.constexpr):
    """The elements' bits as row number ROW has them."""
    if RANDOM:
        bits ^= hash_keys(tl.load(noise).to(tl.uint64) ^ ((ROW + 1) << 32), tile).to(tl.uint32)
    return bits


# -------------------------------------------------------------------------------------------------------------- reading


@triton.jit
def word(x):
    return x.to(tl.uint32, bitcast=True)


@triton.jit
def real(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def spread(scales):
    """A tile's scales, each for its elements."""
    return tl.reshape(tl.broadcast_to(scales[:, None], (_SCALES, _SCALED)), (_ELEMENTS,))


@triton.jit
def scales_of(more, tile, n, live):
    """Where a tile's scales are, and which of them there are."""
    at = tile * _SCALES + tl.arange(0, _SCALES)
    return more + at, (at * _SCALED < n) & live


@triton.jit
def read(row, i, mask, WORK: tl.constexpr):
    return tl.load(row + i, mask=mask, other=0).to(WORK)


@triton.jit
def read_copy(copies, corrections, j: tl.constexpr, i, mask, SPLIT: tl.constexpr, WORK: tl.constexpr):
    low = tl.load(copies[j] + i, mask=mask, other=0)
    if not SPLIT:
        x = low.to(WORK)
    else:
        correction = tl.load(corrections[j] + i, mask=mask, other=0).to(tl.int32)
        whole = low.to(tl.uint16, bitcast=True).to(tl.uint32)
        if low.dtype == tl.bfloat16:
            x = real((whole << 16) + (word(correction) << 8))
        else:
            kept = ((whole & 0x7FFF) << 8) + word(correction)
            even = real((kept << 5) + _SUBNORMAL_BITS) - _SUBNORMAL
            finite = tl.where(kept < (1 << 18), word(even), (kept << 5) + (112 << 23))
            beyond = tl.where(kept > _BEYOND_HALF, 0x7FC00000, 0x7F800000).to(tl.uint32)
            x = real(tl.where(kept < _BEYOND_HALF, finite, beyond) | ((whole & 0x8000) << 16))
    return x


@triton.jit
def read_state(states, scales, row: tl.constexpr, tile, i, mask, n, live, SQUARE: tl.constexpr, WORK: tl.constexpr):
    if states[row].dtype.element_ty != tl.uint8:
        x = read(states[row], i, mask, WORK)
    else:
        LEAST: tl.constexpr = _LEAST_SQUARE if SQUARE else _LEAST
        WHOLE: tl.constexpr = _WHOLE_SQUARE if SQUARE else _WHOLE
        code = tl.load(states[row] + i, mask=mask, other=0)
        code = code.to(tl.int32) if SQUARE else code.to(tl.int8, bitcast=True).to(tl.int32)
        at, there = scales_of(scales[row], tile, n, live)
        least = tl.full((_ELEMENTS,), LEAST, tl.float32)
        size = (real((word(tl.abs(code)) << 19) + word(least)) - least) * WHOLE
        size *= spread(tl.load(at, mask=there, other=0))
        x = tl.where(code < 0, -size, size)
    return x


# -------------------------------------------------------------------------------------------------------------- writing


@triton.jit
def as_bfloat16(x, bits, RANDOM: tl.constexpr):
    """To nearest, or at random."""
    more = bits & 0xFFFF if RANDOM else 0x7FFF + ((word(x) >> 16) & 1)
    return tl.where(x != x, 0x7FC0, (word(x) + more) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def write(row, i, mask, x, bits, RANDOM: tl.constexpr):
    if row.dtype.element_ty == tl.bfloat16:
        tl.store(row + i, as_bfloat16(x, bits, RANDOM), mask=mask)
    else:
        tl.store(row + i, x.to(row.dtype.element_ty), mask=mask)


@triton.jit
def write_copy(copies, corrections, j: tl.constexpr, i, mask, x, bits, SPLIT: tl.constexpr, RANDOM: tl.constexpr):
    if not SPLIT:
        write(copies[j], i, mask, x, bits, RANDOM)
    else:
        noise = bits & 0xFF if RANDOM else tl.full((_ELEMENTS,), 0x80, tl.uint32)
        if copies[j].dtype.element_ty == tl.bfloat16:
            kept = word(x) + noise
            low = tl.where(x != x, 0x7FC0, (kept + 0x8000) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
            kept >>= 8
        else:
            size = word(x) & 0x7FFFFFFF
            even = word(real(size) + _SUBNORMAL) - _SUBNORMAL_BITS
            fine = tl.where(real(size) < _SUBNORMAL, even, size - (112 << 23))
            kept = (fine + (noise >> 3)) >> 5
            kept = tl.where(kept < _BEYOND_HALF, kept, _BEYOND_HALF)
            low = tl.where(x != x, 0x7E00, ((kept + 0x80) >> 8) | ((word(x) >> 16) & 0x8000))
            low = low.to(tl.uint16).to(tl.float16, bitcast=True)
        tl.store(copies[j] + i, low, mask=mask)
        tl.store(corrections[j] + i, (kept & 0xFF).to(tl.uint8).to(tl.int8, bitcast=True), mask=mask)


@triton.jit
def write_state(
    states, scales, row: tl.constexpr, tile, i, mask, n, live, x, bits, SQUARE: tl.constexpr, RANDOM: tl.constexpr
):
    if states[row].dtype.element_ty != tl.uint8:
        write(states[row], i, mask, x, bits, RANDOM)
    else:
        LEAST: tl.constexpr = _LEAST_SQUARE if SQUARE else _LEAST
        size = word(x) & 0x7FFFFFFF
        # The largest magnitude, NaN being larger than all.
        most = real(tl.max(tl.reshape(tl.where(mask, size, 0), (_SCALES, _SCALED)), axis=1))
        at, there = scales_of(scales[row], tile, n, live)
        factor = tl.where(most >= 2.0**-126, tl.div_rn(tl.full((_SCALES,), _TOP - LEAST, tl.float32), most), 0.0)
        least = tl.full((_ELEMENTS,), LEAST, tl.float32)
        y = real(size) * spread(factor) + least
        noise = bits & ((1 << 19) - 1) if RANDOM else 1 << 18
        code = (word(tl.where(y < _TOP, y, _TOP)) + noise - word(least)) >> 19
        code = tl.where((x > 0) & (code == 0), 1, code) if SQUARE else tl.where(x < 0, 0 - code, code) & 0xFF
        tl.store(at, most, mask=there)
        tl.store(states[row] + i, code.to(tl.uint8), mask=mask)
