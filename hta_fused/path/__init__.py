"""Tracks the minimisers of equation (3) as L falls, by quasi-Newton steps: for problems of few variables.

    H(x₁, …, x_m; L) = Σ_j f(x_j) + L·Σ_j ‖(x_j − θ̃) where copy j is anchored‖² + (1/L)·Σ_{i<j} ‖x_i − x_j‖²

Copy j is free on one of m blocks of variables and anchored on the others; m = 2 gives equation (3). L = ∞ stands for the
decoupled problems (2), L = 0 for f itself. `track` follows one path with scipy's correctors; `track_many` follows
thousands at once in torch. Knows nothing of networks; imports torch and, in `track`, scipy.

Rooms: objective.py f and its gradient, homotopy.py the quadratic terms and their stages, single_start.py `track`,
many_starts.py `track_many`, corrector.py the tangent and what a corrector knows, bfgs.py its minimiser, arclength.py
folds, quadratic.py the exact path of a quadratic f.
"""

from .arclength import Fold
from .homotopy import QuadraticTerms
from .many_starts import ManyResult, track_many
from .objective import Objective
from .quadratic import exact_minimiser, random_quadratic
from .single_start import METHODS, PathPoint, PathResult, track

__all__ = [
    "METHODS",
    "Fold",
    "ManyResult",
    "Objective",
    "PathPoint",
    "PathResult",
    "QuadraticTerms",
    "exact_minimiser",
    "random_quadratic",
    "track",
    "track_many",
]
