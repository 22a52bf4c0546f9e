"""The values of all copies, and where each parameter finds its own: whole, or in two parts of which the networks read one.

Imports layout.py and kernels/formats.py. flat.py lays the parameters there and says when others may have written.
"""

from collections.abc import Sequence
from operator import attrgetter

import torch
from torch import Tensor

from .kernels.formats import TILE, packed, unpack
from .layout import Layout

_VERSION = attrgetter("_version")


class Masters:
    """The values as they are; with a compute_dtype, beside a copy of them in it that the modules read.

    Args:
        layout: of a copy.
        count: m.
        like: of which dtype and device the values are.
        compute_dtype: float16 or bfloat16, or None.
        in_norm: of each parameter whether a normalisation layer holds it: those the modules read in float32.

    Attributes:
        rows: [m, N], which a step writes.
        corrections: what rows lack of the values, int8 [m, N], or None.
        low: [m, N] in compute_dtype, which a step writes beside the rows, or None.
        homes: where each copy's parameters lie.
    """

    corrections: Tensor | None = None

    def __init__(
        self, layout: Layout, count: int, like: Tensor, compute_dtype: torch.dtype | None, in_norm: Sequence[bool]
    ):
        self.rows = layout.rows(count, like)
        self.low = None if compute_dtype is None else layout.rows(count, like, compute_dtype, 4)
        self._values = [layout.tensors(row) for row in self.rows]
        self.homes = self._values
        if self.low is not None:
            self.homes = [
                [value if norm else low for value, low, norm in zip(*both, in_norm, strict=True)]
                for both in zip(self._values, map(layout.tensors, self.low), strict=True)
            ]
        self._versions: list[int] | None = None

    @property
    def values(self) -> Tensor:
        """[m, N]: the buffer itself."""
        return self.rows

    def read(self, row: int, i: int) -> Tensor:
        """The values of a parameter of a copy, by the layout's number."""
        return self._values[row][i]

    def write(self, row: int, i: int, value: Tensor) -> None:
        """Makes `value` those of a parameter, for its network too."""
        self._values[row][i].copy_(value)
        if self.homes[row][i] is not self._values[row][i]:
            self.homes[row][i].copy_(value)

    def write_all(self, values: Tensor) -> None:
        """Makes values [m, N] those of all copies; `refresh` does the rest."""
        if values is not self.rows:
            self.rows.copy_(values)
        if self.low is not None:
            self.low.copy_(self.rows)

    def refresh(self) -> None:
        """After a step: brings up to date what that did not write."""

    def written(self, parameters: Sequence[Tensor]) -> None:
        """Says that what was written to all copies' parameters until now came from here."""
        if self.low is not None:
            self._versions = list(map(_VERSION, parameters))

    @torch.no_grad()
    def take(self, parameters: Sequence[Tensor]) -> None:
        """Takes what others wrote to the parameters since."""
        if self._versions is None or (now := list(map(_VERSION, parameters))) == self._versions:
            return
        names = len(self.homes[0])
        for number, (parameter, was, version) in enumerate(zip(parameters, self._versions, now, strict=True)):
            if was != version:
                self._take(*divmod(number, names), parameter)
        self.written(parameters)

    def _take(self, row: int, i: int, parameter: Tensor) -> None:
        value = self._values[row][i]
        if parameter.dtype != value.dtype:  # an untouched one's value holds more digits
            value.copy_(torch.where(parameter == value.to(parameter.dtype), value, parameter))


class SplitMasters(Masters):
    """24 bits of each value, in two parts: the nearest number of compute_dtype, which the modules read, and a byte of
    correction. What others write to such a parameter is that number, with no correction; those of normalisation layers have
    a float32 copy."""

    def __init__(self, layout: Layout, count: int, like: Tensor, compute_dtype: torch.dtype, in_norm: Sequence[bool]):
        self.rows = layout.rows(count, like, compute_dtype, 4)
        self.corrections = layout.rows(count, like, torch.int8)
        self.low = None
        self._parts = [list(map(layout.tensors, both)) for both in zip(self.rows, self.corrections, strict=True)]
        tiles = [torch.arange(layout.numel // TILE)[layout.tiles(i)] for i, norm in enumerate(in_norm) if norm]
        self._tiles = torch.cat(tiles).to(like.device) if tiles else None
        self.homes = [list(lows) for lows, _ in self._parts]
        self._in_norm = list(in_norm)
        if self._tiles is not None:
            self._norms = like.new_zeros(count, len(self._tiles), TILE)
            within = Layout.of_shapes(
                [(layout.names[i], layout.shapes[i], layout.strides[i]) for i, norm in enumerate(in_norm) if norm]
            )
            for row, homes in enumerate(self.homes):
                places = iter(within.tensors(self._norms[row].view(-1)))
                homes[:] = [next(places) if norm else home for norm, home in zip(in_norm, homes, strict=True)]
        self._versions = None

    @property
    def values(self) -> Tensor:
        """[m, N], made anew: writing to it changes nothing."""
        assert self.corrections is not None
        return unpack(self.rows, self.corrections)

    def read(self, row: int, i: int) -> Tensor:
        low, correction = (part[i] for part in self._parts[row])
        return unpack(low, correction)

    def write(self, row: int, i: int, value: Tensor) -> None:
        low, correction = (part[i] for part in self._parts[row])
        for part, wanted in zip((low, correction), packed(value.float(), low, correction), strict=True):
            part.copy_(wanted)
        if self._in_norm[i]:
            self.homes[row][i].copy_(unpack(low, correction))

    def write_all(self, values: Tensor) -> None:
        assert self.corrections is not None
        for part, wanted in zip(
            (self.rows, self.corrections), packed(values, self.rows, self.corrections), strict=True
        ):
            part.copy_(wanted)

    def refresh(self) -> None:
        if self._tiles is not None:
            assert self.corrections is not None
            low, correction = (part.unflatten(1, (-1, TILE))[:, self._tiles] for part in (self.rows, self.corrections))
            self._norms.copy_(unpack(low, correction))

    def written(self, parameters: Sequence[Tensor]) -> None:
        self._versions = list(map(_VERSION, parameters))

    def _take(self, row: int, i: int, parameter: Tensor) -> None:
        if self._in_norm[i]:
            self.write(row, i, parameter)
        else:
            self._parts[row][1][i].zero_()


FORMATS: dict[str, type[Masters]] = {"full": Masters, "split": SplitMasters}
