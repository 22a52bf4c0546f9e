"""The exact path of a quadratic f: linear systems, against which what is tracked or trained is measured."""

import numpy as np

from .homotopy import QuadraticTerms


def random_quadratic(n: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A and b of f(x) = ½·xᵀAx − bᵀx, A positive definite, and an anchor: [n, n], [n], [n]."""
    rng = np.random.default_rng(seed)
    root = rng.standard_normal((n, n))
    return root @ root.T / n + 0.5 * np.eye(n), rng.standard_normal(n), rng.standard_normal(n)


def exact_minimiser(A: np.ndarray, b: np.ndarray, terms: QuadraticTerms, L: float) -> np.ndarray:
    """H's minimiser for f(x) = ½·xᵀAx − bᵀx and 0 < L < ∞: the copies, [m, n]."""
    m, n = terms.shape
    hessian = np.zeros((m, n, m, n))
    for j in range(m):
        hessian[j, :, j, :] += A + 2 * L * np.diag(terms.anchored[j])
        for k in range(m):
            hessian[j, :, k, :] += 2 / L * (m * (j == k) - 1) * np.eye(n)
    right = b + 2 * L * terms.anchored * terms.anchor
    return np.linalg.solve(hessian.reshape(m * n, m * n), right.ravel()).reshape(m, n)
