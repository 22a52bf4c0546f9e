"""The homotopy function H of m copies: its quadratic terms, and the coordinates in which each value of L is tracked."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..checks import number, shown, whole
from .objective import as_float64

_STIFFEST = 1e20  # of H's second derivatives beside f's, beyond which coordinates at one L lose their digits


@dataclass
class QuadraticTerms:
    """All of H but f: the pull to the anchor and the copies' coupling.

    Attributes:
        anchored: [m, n], 1 where a copy feels the anchor.
        anchor: [n].
        curvature: what f's second derivatives are thought to be; only the correctors' speed depends on it.
    """

    anchored: np.ndarray
    anchor: np.ndarray
    curvature: float = 1.0

    @classmethod
    def of(cls, n: int, anchor: Any, blocks: Any, copies: int, curvature: float = 1.0) -> "QuadraticTerms":
        """The terms for n variables in `copies` blocks, numbered from 0.

        Copy j is free on block (j + 1) mod m and anchored on the others, as networks' copies are, whose blocks are
        numbered from 1: of two copies the first is anchored on the first block and free on the second.

        Args:
            anchor: θ̃, a number or [n].
            blocks: for each variable the number of its block; None makes m runs of equal length.

        Raises:
            TypeError: blocks or anchor hold no real numbers, or copies is no whole one.
            ValueError: fewer than 2 copies, or more than variables; blocks or anchor of a wrong shape or value.
        """
        copies = whole("copies", copies, -(2**63), 2**63 - 1)
        if copies < 2 or (blocks is None and n < copies):
            raise ValueError(f"copies must be from 2 to the number of variables ({n}), got {copies}")
        blocks = np.arange(n) * copies // n if blocks is None else as_float64("blocks", blocks).cpu().numpy()
        if blocks.shape != (n,) or not np.isin(blocks, np.arange(copies)).all():
            wanted = f"a number from 0 to {copies - 1} for each of {n} variables"
            raise ValueError(f"blocks must hold {wanted}, got {blocks.tolist()}"[:300])
        anchor = as_float64("anchor", anchor).cpu().numpy()
        if anchor.shape not in ((), (n,)) or not np.isfinite(anchor).all():
            raise ValueError(f"anchor must be a finite number or {n} of them, got shape {anchor.shape}")
        free_block = (np.arange(copies) + 1) % copies
        anchored = (blocks != free_block[:, None]).astype(np.float64)
        return cls(anchored, np.broadcast_to(anchor, (n,)).copy(), curvature)

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n)."""
        return self.anchored.shape[0], self.anchored.shape[1]

    def check_range(self, Ls: Sequence[float]) -> None:
        """Raises the error owed for a value of L at which float64 holds nothing of f, or of a copy, beside the others."""
        low, high = self.shape[0] / (_STIFFEST * self.curvature), _STIFFEST * self.curvature
        for L in Ls:
            if 0 < L < math.inf and not low <= L <= high:
                beside = f"from {low:g} to {high:g} where curvature is {self.curvature:g}"
                raise ValueError(f"Ls must be 0, ∞ or {beside}, got {L:g}")

    def at(self, L: float) -> "Stage":
        """H at one value of L, over coordinates z: the copies are base + z·embedding."""
        m, n = self.shape
        if L == 0:
            return Stage(L, 1, self.anchored, self.anchor, np.eye(n), np.zeros(n))
        if math.isinf(L):
            embedding = np.eye(m * n)[self.anchored.ravel() == 0]
            return Stage(L, m, self.anchored, self.anchor, embedding, (self.anchored * self.anchor).ravel())
        # Per variable an m×m Hessian; its inverse root makes all directions equally stiff, whatever L is.
        embedding = np.zeros((m, n, m, n))
        coupling = 2 / L * (m * np.eye(m) - np.ones((m, m)))
        for i in range(n):
            values, vectors = np.linalg.eigh(2 * L * np.diag(self.anchored[:, i]) + coupling)
            roots = 1 / np.sqrt(np.maximum(values, 0) + self.curvature)
            embedding[:, i, :, i] = (vectors * roots) @ vectors.T
        return Stage(L, m, self.anchored, self.anchor, embedding.reshape(m * n, m * n), np.zeros(m * n))


@dataclass
class Stage:
    """H at one L. Arrays may be NumPy's or torch's, with any number of leading dimensions.

    Attributes:
        copies: m; 1 at L = 0, where all are one.
        anchored, anchor: as in QuadraticTerms.
        embedding, base: [d, copies·n] and [copies·n].
    """

    L: float
    copies: int
    anchored: Any
    anchor: Any
    embedding: Any
    base: Any

    def to(self, like: Tensor) -> "Stage":
        """The same over tensors such as `like`."""
        arrays = (self.anchored, self.anchor, self.embedding, self.base)
        return Stage(self.L, self.copies, *(torch.as_tensor(array).to(like) for array in arrays))

    def expand(self, z: Any) -> Any:
        """The copies, [..., copies, n], at coordinates [..., d]."""
        return (self.base + z @ self.embedding).reshape(*z.shape[:-1], self.copies, len(self.anchor))

    def reduce(self, x: np.ndarray) -> np.ndarray:
        """The coordinates [..., d] of copies [..., m, n] (their mean's where there is one copy; the free ones' at ∞)."""
        if self.copies == 1:
            return x.mean(-2)
        flat = x.reshape(*x.shape[:-2], len(self.base)) - self.base
        if math.isinf(self.L):
            return flat @ self.embedding.T
        return np.linalg.solve(self.embedding, flat.reshape(-1, flat.shape[-1]).T).T.reshape(flat.shape)

    def value_and_gradient(self, x: Any) -> tuple[Any, Any]:
        """The quadratic terms and their gradient at copies [..., m, n]."""
        if self.L == 0 or math.isinf(self.L):
            return 0.0, 0.0
        pulled, spread = self._pulled_and_spread(x, self.anchor)
        m = self.copies  # Σ_{i<j} |x_i − x_j|² is m times the spread about the mean, which keeps its digits
        value = self.L * (pulled * pulled).sum((-2, -1)) + m / self.L * (spread * spread).sum((-2, -1))
        return value, 2 * self.L * pulled + 2 * m / self.L * spread

    def product(self, v: Any) -> Any:
        """The quadratic terms' Hessian times v [..., m, n]."""
        if self.L == 0 or math.isinf(self.L):
            return 0.0
        pulled, spread = self._pulled_and_spread(v, 0.0)
        return 2 * self.L * pulled + 2 * self.copies / self.L * spread

    def mixed_derivative(self, x: Any) -> Any:
        """The derivative of the quadratic terms' gradient by L, at copies [..., m, n] and 0 < L < ∞."""
        pulled, spread = self._pulled_and_spread(x, self.anchor)
        return 2 * pulled - 2 * self.copies / self.L**2 * spread

    def _pulled_and_spread(self, x: Any, anchor: Any) -> tuple[Any, Any]:
        return (x - anchor) * self.anchored, x - x.mean(axis=-2, keepdims=True)

    def hessian(self, known: Tensor, curvature: float) -> Tensor:
        """H's Hessians in coordinates, [..., d, d], where that of Σ_j f(x_j) is curvature·1 + known [..., m·n, m·n]."""
        d = len(self.embedding)
        unit = torch.eye(d).to(known)
        if self.L == 0:  # f at the copies' mean: the mean of what is known of them
            m = known.shape[-1] // d
            return curvature * unit + sum(known[..., i : i + d, i : i + d] for i in range(0, m * d, d)) / m
        # For 0 < L < ∞ the coordinates make the unit matrix of the quadratic terms and `curvature`.
        return (curvature if math.isinf(self.L) else 1.0) * unit + self.embedding @ known @ self.embedding.T

    def curvature_of(self, hessian: Tensor, curvature: float) -> Tensor:
        """What `hessian` takes for `known`, from H's Hessians [..., d, d] and L > 0; 0 for variables without a part."""
        unit = torch.eye(hessian.shape[-1]).to(hessian)
        if math.isinf(self.L):
            return self.embedding.T @ (hessian - curvature * unit) @ self.embedding
        out = torch.linalg.inv(self.embedding)
        return out @ (hessian - unit) @ out.T


def check_Ls(Ls: Sequence[float]) -> list[float]:
    """The values of L as a list; raises the error owed for one that is empty or does not fall."""
    try:
        given = list(Ls)
    except TypeError:  # of what is no sequence, or a tensor without dimensions
        raise TypeError(f"Ls must be a list of numbers, got {shown(Ls)}") from None
    values = [number("Ls", L) for L in given]
    if not values:
        raise ValueError("Ls must hold at least one value of L")
    for L in values:
        if not L >= 0:
            raise ValueError(f"Ls must be in [0, ∞], got {L}")
    for before, after in itertools.pairwise(values):
        if not after < before:
            raise ValueError(f"Ls must fall, got {before} and then {after}")
    return values
