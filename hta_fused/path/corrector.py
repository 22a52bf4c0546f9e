"""The batched predictor and corrector: where the path's tangent leads, and BFGS from there with what it already knows."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .bfgs import Minima, minimise_many, update
from .homotopy import QuadraticTerms, Stage
from .objective import one_value


def along(L: float) -> float:
    """The coordinate t = L/(1 + L) that tangents are taken in: the path is smooth in it at L = 0 and at L = ∞."""
    return 1.0 if math.isinf(L) else L / (1 + L)


class Corrector:
    """Minimises H at one L after the other, from B starts.

    H's quadratic terms are known, so that only f's curvature must be learnt; `learnt` carries it from L to L.

    Args:
        f: a function of a 1-D tensor that torch.func.vmap can batch.
        offset: [B, n], what is added to the variables before f sees them.
        tolerance: of the gradient's largest element.

    Attributes:
        evaluations: int64 [B], of f and its gradient so far; a Hessian-vector product, forward over reverse, counts as
            two.
        steps: int64 [B], corrector steps so far.
        learnt: [B, m·n, m·n], BFGS's picture of Σ_j f(x_j)'s Hessian, less terms.curvature times the unit matrix.
    """

    def __init__(self, f: Callable[[Tensor], Tensor], terms: QuadraticTerms, offset: Tensor, tolerance: float):
        self.terms, self.offset, self.tolerance = terms, offset, tolerance
        count, (m, n) = len(offset), terms.shape
        f = one_value(f)
        gradient = torch.func.grad(f)
        self._gradient_and_value = torch.func.vmap(torch.func.vmap(torch.func.grad_and_value(f)))
        self._product = torch.func.vmap(torch.func.vmap(lambda x, v: torch.func.jvp(gradient, (x,), (v,))[1]))
        self.evaluations = torch.zeros(count, dtype=torch.int64, device=offset.device)
        self.steps = torch.zeros_like(self.evaluations)
        self.learnt = offset.new_zeros(count, m * n, m * n)

    def __call__(self, x: Tensor, L: float, warm: bool = False) -> tuple[Tensor, Minima]:
        """The minimisers [B, m, n] found from x, those of the copies at L; `warm` begins with what is learnt."""
        stage = self.terms.at(L)
        z = torch.as_tensor(stage.reduce(x.cpu().numpy())).to(x)
        stage = stage.to(x)

        def h(z: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
            x = stage.expand(z)
            gradient, value = self._gradient_and_value(x + self.offset[rows, None])
            penalty, pull = stage.value_and_gradient(x)
            return value.sum(-1) + penalty, (gradient + pull).flatten(1) @ stage.embedding.T

        found = minimise_many(h, z, self.tolerance, inverse=self.inverse(stage) if warm else None)
        self.evaluations += found.evaluations * stage.copies
        self.steps += found.steps
        if warm:
            self.learn(stage, found.inverse)
        return stage.expand(found.z).expand(x.shape), found

    def inverse(self, stage: Stage) -> Tensor:
        """The inverse Hessians of H at a stage, [B, d, d] in its coordinates, as far as they are learnt."""
        values, vectors = torch.linalg.eigh(stage.hessian(self.learnt, self.terms.curvature))
        # A Hessian that is not positive definite is an old one's extrapolation; |λ| keeps every direction a descent.
        return (vectors / values.abs().clamp(min=1e-3)[:, None]) @ vectors.mT

    def learn(self, stage: Stage, inverse: Tensor) -> None:
        """Takes f's part out of inverse Hessians [B, d, d] at a stage."""
        if stage.L > 0:
            self.learnt = stage.curvature_of(torch.linalg.inv(inverse), self.terms.curvature)

    def predict(self, x: Tensor, L: float, ahead: float, tolerance: float = 0.05) -> Tensor:
        """The copies at `ahead` on the tangent at the minimisers x [B, m, n] for L > 0.

        Args:
            tolerance: what is left of the tangent's residual.
        """
        return x + (along(ahead) - along(L)) * self.tangent(x, L, tolerance)

    def tangent(self, x: Tensor, L: float, tolerance: float = 1e-10) -> Tensor:
        """dx/dt at the minimisers x [B, m, n] for L > 0, by the implicit function theorem: H_xx·dx/dt = −H_xt.

        The Hessian is positive definite at a minimum, so the systems are solved by conjugate gradients, with BFGS's
        inverse Hessian for a preconditioner: a few Hessian-vector products, where a dense Hessian takes n a copy. Each
        product is also a secant equation, by which `learnt` gets better (Morales and Nocedal 2000).
        """
        stage = self.terms.at(L).to(x)
        rows = torch.arange(len(x), device=x.device)
        if math.isinf(L):  # in τ = 1/L, dt = −dτ: an anchored variable leaves θ̃ by −τ/2 times its derivative
            gradient, _ = self._gradient_and_value(x + self.offset[:, None])
            self.evaluations += stage.copies
            fixed = 0.5 * gradient * stage.anchored
            spread = 2 * stage.copies * (x - x.mean(1, keepdim=True))
            right = spread - self._f_product(x, fixed, rows)
        else:
            fixed = torch.zeros_like(x)
            right = -((1 + L) ** 2) * stage.mixed_derivative(x)

        def product(p: Tensor, rows: Tensor) -> Tensor:
            v = (p @ stage.embedding).view(len(p), *x.shape[1:])
            return (self._f_product(x[rows], v, rows) + stage.product(v)).flatten(1) @ stage.embedding.T

        slope, inverse = conjugate_gradients(
            product, right.flatten(1) @ stage.embedding.T, self.inverse(stage), tolerance
        )
        self.learn(stage, inverse)
        return fixed + (slope @ stage.embedding).view_as(x)

    def _f_product(self, x: Tensor, v: Tensor, rows: Tensor) -> Tensor:
        """f's Hessians at the copies of some rows times v, [B', m, n]."""
        self.evaluations[rows] += 2 * self.terms.shape[0]
        return self._product(x + self.offset[rows, None], v)


def conjugate_gradients(
    product: Callable[[Tensor, Tensor], Tensor], right: Tensor, inverse: Tensor, tolerance: float
) -> tuple[Tensor, Tensor]:
    """Solves B systems with symmetric matrices A, each until its preconditioned residual fell to `tolerance` of itself.

    Args:
        product: product(p [B', d], rows [B']) returns A·p; rows are the systems' numbers.
        right: [B, d].
        inverse: the preconditioners, [B, d, d].

    Returns:
        The solutions [B, d], as far as A was seen to be positive definite, and the preconditioners made better by
        BFGS's update for every product.
    """
    u, residual = torch.zeros_like(right), right.clone()
    better, rows = inverse.clone(), torch.arange(len(right), device=right.device)
    p = (inverse @ residual[..., None]).squeeze(-1)
    rho = (residual * p).sum(1)
    goal = tolerance**2 * rho
    for _ in range(2 * right.shape[1]):
        rows = rows[rho[rows] > goal[rows]]
        if not len(rows):
            break
        direction = p[rows]
        image = product(direction, rows)
        curvature = (direction * image).sum(1)
        convex = curvature > 0
        rows, direction, image = rows[convex], direction[convex], image[convex]
        length = (rho[rows] / curvature[convex])[:, None]
        u[rows] += length * direction
        residual[rows] -= length * image
        better[rows], _ = update(better[rows], direction, image)
        y = (inverse[rows] @ residual[rows][..., None]).squeeze(-1)
        before, rho[rows] = rho[rows], (residual[rows] * y).sum(1)
        p[rows] = y + (rho[rows] / before)[:, None] * direction
    return u, better
