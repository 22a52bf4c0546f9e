"""How a row of float32 numbers may lie in memory, in plain PyTorch: the twin of csrc/formats.h. Imports torch only.

A row is a tensor and, for some formats, what goes with it:

    float32                      as it is
    bfloat16, float16
    bfloat16, float16 and int8   24 bits of the number: the nearest of that type, and corrections of its last place
    uint8 and float32 scales     codes of magnitudes relative to the largest of SCALED elements; coarser at large ones
"""

import torch
from torch import Tensor

SCALED = 128  # elements that share a scale, as csrc/formats.h's kScaled
TILE = 1024  # elements that share two keys, as csrc/arithmetic.h's kTile
_MASK = 0xFFFFFFFF
TOP, LEAST = 0.96875, (2.0**-8, 2.0**-16)  # csrc/formats.h's kTop and kLeast, of numbers and of squares


def _bits(x: float) -> int:
    """A float32's."""
    return int(torch.tensor(x, dtype=torch.float32, device="cpu").view(torch.int32))


# ------------------------------------------------------------------------------------------------------- random numbers


def _signed(x: int) -> int:
    x &= 2**64 - 1
    return x - 2**64 if x >= 2**63 else x


def _shift(x: Tensor, bits: int) -> Tensor:
    """A logical shift to the right of int64s."""
    return (x >> bits) & (2 ** (64 - bits) - 1)


def _mix64(x: Tensor) -> Tensor:
    x = x + _signed(0x9E3779B97F4A7C15)
    x = (x ^ _shift(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift(x, 31)


def _keys(seed: Tensor, tiles: int) -> Tensor:
    """Two keys of 32 bits for every tile: int64 [tiles, 1]."""
    return _mix64(_mix64(seed.reshape(1)) ^ torch.arange(tiles, device=seed.device))[:, None]


def random_bits(seed: Tensor, tiles: int) -> Tensor:
    """32 random bits of every element of so many tiles: int64 [tiles, TILE]."""
    key = _keys(seed, tiles)
    x = torch.arange(TILE, device=seed.device) ^ (key & _MASK)
    x = x ^ (x >> 16)
    x = x * 0x85EBCA6B & _MASK
    x = x ^ (x >> 13) ^ _shift(key, 32)
    x = x * 0xC2B2AE35 & _MASK
    return x ^ (x >> 16)


def noise_of(noise: Tensor, row: int, n: int) -> Tensor:
    """The random bits by which n elements of a row are rounded, under a step's number: int64 [n]."""
    tiles = -(-n // TILE)
    of_row = _keys(noise ^ ((row + 1) << 32), tiles) & _MASK
    return (random_bits(noise, tiles) ^ of_row).view(-1)[:n]


# -------------------------------------------------------------------------------------------------------------- formats


def unpack(row: Tensor, more: Tensor | None = None, square: bool = False) -> Tensor:
    """A row [n] as float32 (float64 as it is).

    Args:
        more: its corrections, int8 [n], or its scales, float32 [ceil(n / SCALED)].
        square: of codes: that of unsigned numbers, an AdamW's second moments.
    """
    if more is None:
        return row if row.dtype == torch.float64 else row.float()
    if row.dtype == torch.bfloat16:
        return ((row.view(torch.int16).int() << 16) + (more.int() << 8)).view(torch.float32)
    if row.dtype == torch.float16:
        return _join_half(row, more)
    least = LEAST[square]
    code = row.int() if square else row.view(torch.int8).int()
    sizes = ((code.abs() << 19) + _bits(least)).view(torch.float32) - least
    whole = float(torch.tensor(1, dtype=torch.float32, device="cpu") / (TOP - least))
    x = sizes * whole * _spread(more, len(row))
    return x if square else torch.where(code < 0, -x, x)


def packed(
    values: Tensor, row: Tensor, more: Tensor | None = None, noise: Tensor | None = None, square: bool = False
) -> list[Tensor]:
    """What `row`, and `more` where it has one, are to hold for these values [n].

    Args:
        noise: 32 random bits for each, int64 [n], which round such that the mean is right; without it to nearest.
    """
    if row.dtype == torch.uint8:
        assert more is not None
        if noise is None:
            noise = torch.full_like(values, 1 << 18, dtype=torch.int64)
        scale = _largest(values)
        return [_encoded(values, noise, scale, square).to(torch.uint8), scale]
    if more is not None:
        last = torch.full_like(values, 0x80, dtype=torch.int64) if noise is None else noise & 0xFF
        return list((_split_bfloat16 if row.dtype == torch.bfloat16 else _split_half)(values, last))
    if row.dtype == torch.bfloat16 and noise is not None:
        bits = (values.view(torch.int32).long() & _MASK) + (noise & 0xFFFF) >> 16
        return [torch.where(values.isnan(), 0x7FC0, bits).to(torch.int16).view(torch.bfloat16)]
    return [values.to(row.dtype)]


def _split_bfloat16(x: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    bits = x.view(torch.int32).long() & _MASK
    kept = bits + last
    low = torch.where(x.isnan(), 0x7FC0, kept + 0x8000 >> 16)
    return low.to(torch.int16).view(torch.bfloat16), (kept >> 8 & 0xFF).to(torch.uint8).view(torch.int8)


_SUBNORMAL, _FIRST_NORMAL, _BEYOND_HALF, _BIAS = 2.0**-14, 1 << 18, 0x7C00 << 8, 112 << 23


def _split_half(x: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    size = x.abs()
    even = (size + _SUBNORMAL).view(torch.int32).long() - _bits(_SUBNORMAL)
    fine = torch.where(size < _SUBNORMAL, even, size.view(torch.int32).long() - _BIAS)
    kept = (fine + (last >> 3 & 0x1F) >> 5).clamp(max=_BEYOND_HALF)
    low = torch.where(x.isnan(), 0x7E00, (kept + 0x80 >> 8) | (x.view(torch.int32).long() >> 16 & 0x8000))
    return low.to(torch.int16).view(torch.float16), (kept & 0xFF).to(torch.uint8).view(torch.int8)


def _join_half(row: Tensor, correction: Tensor) -> Tensor:
    low = row.view(torch.int16).int()
    kept = ((low & 0x7FFF) << 8) + correction.int()
    even = ((kept << 5) + _bits(_SUBNORMAL)).view(torch.float32) - _SUBNORMAL
    finite = torch.where(kept < _FIRST_NORMAL, even, ((kept << 5) + _BIAS).view(torch.float32))
    size = torch.where(kept < _BEYOND_HALF, finite, torch.where(kept > _BEYOND_HALF, torch.nan, torch.inf))
    return torch.where(low < 0, -size, size)


def _spread(scale: Tensor, n: int) -> Tensor:
    return scale.repeat_interleave(SCALED)[:n]


def _largest(values: Tensor) -> Tensor:
    """The scales of a row: the largest magnitude of each SCALED elements, where NaN is larger than all."""
    short = -len(values) % SCALED
    bits = torch.nn.functional.pad(values.view(torch.int32) & 0x7FFFFFFF, (0, short))
    return bits.view(-1, SCALED).amax(1).view(torch.float32) if len(values) else values.new_empty(0)


def _encoded(x: Tensor, noise: Tensor, scale: Tensor, square: bool) -> Tensor:
    least = LEAST[square]
    whole = torch.full_like(scale, TOP - least)  # a number divided by a tensor would be multiplied by its reciprocal
    factor = torch.where(scale >= 2.0**-126, whole / scale, torch.zeros_like(scale))
    y = x.abs() * _spread(factor, len(x)) + least
    y = torch.where(y < TOP, y, TOP)  # NaN too
    code = (y.view(torch.int32).long() + (noise & (1 << 19) - 1) - _bits(least)) >> 19
    return torch.where((x > 0) & (code == 0), 1, code) if square else torch.where(x < 0, -code, code) & 0xFF
