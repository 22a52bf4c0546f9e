"""Path tracking: against linear solves, between its two ways, and what it says of jumps and bad input."""

import itertools
import math
import time

import numpy as np
import pytest
import torch

import hta_fused as hta
from hta_fused import path, problems
from hta_fused.paper.table1 import LINEAR, SENTENCE, starts
from hta_fused.path.corrector import Corrector, along, conjugate_gradients

LS = [math.inf, *np.geomspace(1e3, 1e-6, 19).tolist(), 0.0]


def quadratic(n, seed):
    A, b, anchor = path.random_quadratic(n, seed)
    At, bt = torch.as_tensor(A), torch.as_tensor(b)
    return A, b, anchor, lambda x: 0.5 * x @ At @ x - bt @ x


@pytest.mark.parametrize("copies", [2, 3, 4])
def test_the_exact_minimiser_is_where_the_function_as_written_is_stationary(seed, copies):
    """H from its definition: elements of block b (from 1) are free in the copy j with b = 1 + (j + 1) mod m."""
    A, b, anchor, f = quadratic(7, seed)
    labels = 1 + torch.arange(7) * copies // 7
    free = torch.stack([labels == 1 + (j + 1) % copies for j in range(copies)])
    assert (free.sum(0) == 1).all()
    terms = path.QuadraticTerms.of(7, anchor, labels.numpy() - 1, copies)
    assert np.array_equal(terms.anchored, ~free.numpy())
    anchor = torch.as_tensor(anchor)

    def H(x, L):
        pulls = sum(((x[j] - anchor)[~free[j]]).square().sum() for j in range(copies))
        pairs = sum((x[i] - x[j]).square().sum() for i, j in itertools.combinations(range(copies), 2))
        return sum(f(x_j) for x_j in x) + L * pulls + pairs / L

    for L in np.geomspace(1e3, 1e-3, 7):
        x = torch.as_tensor(path.exact_minimiser(A, b, terms, L))
        gradient = torch.func.grad(H)(x, L)
        assert float(gradient.abs().max()) < 1e-11 * (L + 1 / L)


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("copies", [2, 3, 4])
@pytest.mark.parametrize(
    ("method", "predictor"), [*itertools.product(path.METHODS, (None, "secant")), ("BFGS", "tangent")]
)
def test_a_quadratics_path_is_its_linear_solve(seed, method, copies, predictor, adaptive):
    A, b, anchor, f = quadratic(6, seed)
    options = dict(copies=copies, predictor=predictor, adaptive=adaptive, tolerance=1e-9)
    result = path.track(f, np.zeros(6), LS, anchor, method, **options)
    terms = path.QuadraticTerms.of(6, anchor, None, copies)
    assert result.success, result.message
    assert result.message == "followed to L = 0"
    assert not result.jumps
    points = [point for point in result.per_L if 0 < point.L < math.inf]
    assert len(points) == len(LS) - 2 or adaptive
    for point in points:
        wanted = path.exact_minimiser(A, b, terms, point.L)
        # What a gradient of the tolerance leaves, and L-BFGS-B's Hessian is too coarse to go on without the values.
        bound = max(1e-8, 1e-8 / np.linalg.eigvalsh(A)[0]) * (1 if method == "BFGS" else 10)
        assert np.abs(point.x - wanted).max() < bound * max(1, np.abs(wanted).max())
    assert np.abs(result.x - np.linalg.solve(A, b)).max() < 1e-7
    assert result.evaluations >= sum(point.evaluations for point in result.per_L)


def test_at_infinity_the_problems_are_decoupled(seed):
    A, b, anchor, f = quadratic(4, seed)
    (point,) = path.track(f, np.zeros(4), [math.inf], anchor, tolerance=1e-9).per_L
    first, second = slice(0, 2), slice(2, 4)
    for copy, fixed, free in ((0, first, second), (1, second, first)):
        assert np.array_equal(point.x[copy, fixed], anchor[fixed])
        wanted = np.linalg.solve(A[free, free], b[free] - A[free, fixed] @ anchor[fixed])
        assert np.abs(point.x[copy, free] - wanted).max() < 1e-8


def test_numpy_functions_given_blocks_and_separate_starts(seed):
    A, b, anchor, f = quadratic(5, seed)
    pair = (lambda x: 0.5 * x @ A @ x - b @ x, lambda x: A @ x - b)
    blocks = [1, 0, 1, 1, 0]
    start = np.random.default_rng(seed).standard_normal((2, 5))
    ours = path.track(pair, start, [1.0, 0.1], anchor, blocks=blocks, tolerance=1e-9)
    theirs = path.track(f, torch.as_tensor(start), [1.0, 0.1], torch.as_tensor(anchor), blocks=blocks, tolerance=1e-9)
    wanted = path.exact_minimiser(A, b, path.QuadraticTerms.of(5, anchor, blocks, 2), 0.1)
    for result in (ours, theirs):
        assert np.abs(result.per_L[-1].x - wanted).max() < 1e-8
    assert np.abs(ours.x - ours.per_L[-1].x.mean(0)).max() == 0


@pytest.mark.parametrize("n", [2, 4, 6])
def test_many_paths_end_where_the_single_ones_do(n):
    points = starts(n, 8)
    many = path.track_many(problems.chow, points, LINEAR)
    assert many.success.all()
    for x, point in zip(many.x, points, strict=True):
        assert np.abs(x.numpy() - path.track(problems.chow, point, LINEAR).x).max() < 1e-5


@pytest.mark.parametrize("copies", [2, 3, 4])
def test_many_paths_take_an_anchor_each(seed, copies):
    A, b, _, f = quadratic(4, seed)
    anchors = torch.randn(7, 4, dtype=torch.float64)
    x0, Ls = torch.randn(7, 4, dtype=torch.float64), [math.inf, 1.0, 0.1]
    many = path.track_many(f, x0, Ls, anchors, copies=copies, tolerance=1e-9)
    for x, anchor in zip(many.x, anchors, strict=True):
        wanted = path.exact_minimiser(A, b, path.QuadraticTerms.of(4, anchor, None, copies), 0.1).mean(0)
        assert float((x - torch.as_tensor(wanted)).abs().max()) < 1e-8
    assert path.track_many(f, torch.zeros(0, 4, dtype=torch.float64), [1.0]).x.shape == (0, 4)


def test_many_paths_are_over_twenty_times_as_fast():
    points = starts(6, 600)
    path.track_many(problems.chow, points[:4], LINEAR)
    start = time.perf_counter()
    many = path.track_many(problems.chow, points, LINEAR)
    batched = (time.perf_counter() - start) / len(points)
    start = time.perf_counter()
    for point in points[:3]:
        path.track(problems.chow, point, LINEAR, tolerance=1e-6)
    single = (time.perf_counter() - start) / 3
    assert (many.f < 1e-8).all()
    assert single > 20 * batched, f"{single / batched:.1f}"


@pytest.mark.parametrize("predictor", [None, "tangent"])
def test_a_jump_is_reported(predictor):
    """From (5, 0) the path's minimum of equation (33) vanishes near L = 0.38, whatever the steps."""
    where = []
    for count in (60, 150):
        Ls = [math.inf, *np.geomspace(10, 0.01, count).tolist(), 0.0]
        result = path.track(problems.chow, [5.0, 0.0], Ls, predictor=predictor)
        assert not result.success
        assert f"the path jumped at L = {result.jumps[0]:.6g}" in result.message
        at = [point.L for point in result.per_L].index(result.jumps[0])
        moves = [np.linalg.norm(b.x - a.x) for a, b in itertools.pairwise(result.per_L)]
        assert moves[at - 1] == max(moves[1:])
        where.append(result.jumps[0])
    assert where[0] == pytest.approx(where[1], rel=0.15)


def test_adaptive_steps_are_fewer_on_an_easy_path_and_reach_the_same_end():
    Ls = [math.inf, *np.geomspace(10, 0.01, 60).tolist(), 0.0]
    every = path.track(problems.chow, [2.0, 0.0], Ls)
    few = path.track(problems.chow, [2.0, 0.0], Ls, adaptive=True, predictor="secant")
    assert every.success
    assert few.success
    assert len(few.per_L) < len(every.per_L) / 2
    assert few.evaluations < every.evaluations
    assert np.abs(few.x - every.x).max() < 1e-6


# --------------------------------------------------------------------------------------------------------- the tangent


def test_the_tangent_of_a_quadratics_path_is_that_of_the_linear_solves(seed):
    A, b, anchor, f = quadratic(5, seed)
    terms = path.QuadraticTerms.of(5, anchor, None, 3)
    for L in (20.0, 1.0, 0.05):
        corrector = Corrector(f, terms, torch.zeros(1, 5, dtype=torch.float64), 1e-9)
        x = torch.as_tensor(path.exact_minimiser(A, b, terms, L))[None]
        slope = corrector.tangent(x, L)[0].numpy()
        ends = [path.exact_minimiser(A, b, terms, L * (1 + e)) for e in (1e-4, -1e-4)]
        wanted = (ends[0] - ends[1]) / (along(L * (1 + 1e-4)) - along(L * (1 - 1e-4)))
        assert np.abs(slope - wanted).max() < 1e-5 * np.abs(wanted).max()
        assert int(corrector.evaluations) % (3 * 2) == 0  # a product is two a copy
        assert 3 * 2 <= int(corrector.evaluations) <= 3 * 2 * 20  # for 15 unknowns


def test_conjugate_gradients_solve_and_learn(seed):
    """d products leave the solution, and the inverse itself in the preconditioner; a saddle's system is left alone."""
    d = 6
    root = torch.randn(3, d, d, dtype=torch.float64)
    A = root @ root.mT + torch.eye(d)
    A[2] *= -1
    right, unit = torch.randn(3, d, dtype=torch.float64), torch.eye(d, dtype=torch.float64).expand(3, d, d)
    u, inverse = conjugate_gradients(lambda p, rows: (A[rows] @ p[..., None])[..., 0], right, unit, 1e-14)
    assert torch.allclose((A @ u[..., None])[:2, :, 0], right[:2], atol=1e-9)
    assert torch.allclose(inverse[:2] @ A[:2], unit[:2], atol=1e-6)
    assert (u[2] == 0).all()
    assert (inverse[2] == unit[2]).all()


@pytest.mark.parametrize("L", [math.inf, 5.0, 0.7])
@pytest.mark.parametrize("name", ["quadratic", "chow"])
def test_the_tangent_predicts_to_second_order(seed, name, L):
    """Half the step leaves a quarter of the error: 2 to within 0.1, over three halvings."""
    f = problems.chow if name == "chow" else quadratic(4, seed)[3]
    terms = path.QuadraticTerms.of(4, 0.0, None, 2)
    corrector = Corrector(f, terms, torch.zeros(1, 4, dtype=torch.float64), 1e-11)
    x, _ = corrector(torch.ones(1, 2, 4, dtype=torch.float64), L)
    steps = [0.004 / 2**k for k in range(4)]
    errors = []
    for step in steps:
        t = along(L) - step
        ahead = t / (1 - t)
        there, _ = corrector(x, ahead)
        errors.append(float((corrector.predict(x, L, ahead, 1e-10) - there).norm()))
    order = np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert order == pytest.approx(2, abs=0.1)


@pytest.mark.parametrize("tolerance", [1e-3, 1e-8])
def test_the_tangent_saves_steps_and_evaluations(tolerance):
    """On the paper's own path, and from Table 1's starts; products are counted, and the ends are the same."""
    plain, steered = (
        path.track(problems.chow, [5.0, 4.0, 5.0, 5.0], SENTENCE, predictor=predictor, tolerance=tolerance)
        for predictor in (None, "tangent")
    )
    assert steered.success
    assert steered.steps < 0.6 * plain.steps
    assert steered.evaluations < 0.75 * plain.evaluations
    assert np.abs(steered.x - plain.x).max() < 30 * tolerance
    for result in (plain, steered):
        assert result.steps == sum(point.steps for point in result.per_L)
    points = starts(6, 32)
    plain, steered = (
        path.track_many(problems.chow, points, LINEAR, predictor=predictor) for predictor in (None, "tangent")
    )
    assert steered.success.all()
    assert steered.steps.double().mean() < 0.5 * plain.steps.double().mean()
    assert steered.evaluations.double().mean() < 0.75 * plain.evaluations.double().mean()
    assert torch.allclose(steered.x, plain.x, atol=1e-5)


@pytest.mark.parametrize("Ls", [[1.0, 0.1, 0.0], [math.inf, 1.0, 0.0], [0.0], [math.inf]])
@pytest.mark.parametrize("options", [{}, {"copies": 3}, {"blocks": [1, 0, 1]}])
def test_the_tangent_goes_on_from_a_start_that_is_a_minimiser(Ls, options):
    """scipy's BFGS then takes no step, and its inverse Hessian is the unit matrix, of whole numbers."""
    result = path.track(lambda x: x.square().sum(), np.zeros(3), Ls, predictor="tangent", **options)
    assert result.success, result.message
    assert (result.x == 0).all()


@pytest.mark.parametrize("predictor", [None, "tangent"])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_function_that_is_nan_at_infinity_is_not_followed(predictor):
    """With the anchor −1 the copies have no square root."""
    result = path.track(lambda x: x.sqrt().sum(), [1.0, 1.0], [math.inf, 1.0], -1.0, predictor=predictor)
    assert (result.success, result.message) == (False, "the corrector did not converge at L = inf")


# ---------------------------------------------------------------------------------------------------------- the arclength


def folding(x):
    """Of x₁ a quartic with g' = 3, −4 and g'' = 3, −2 at 1, 2; of x₂ a parabola.

    With the anchor 0, θ₁ = 1 and η₁ = 2 are stationary at L = 1/2, since g'(1) + 2L + 2(1 − 2)/L = 0 and
    g'(2) + 2(2 − 1)/L = 0; and the Hessian's determinant (3 + 2L + 2/L)(−2 + 2/L) − 4/L² is 0 there: a fold.
    """
    t = x[0] - 1
    return 3 * t + 1.5 * t**2 - 25 / 3 * t**3 + 15 / 4 * t**4 + 0.5 * x[1] ** 2


@pytest.mark.parametrize("top", [2.0, 0.7])
def test_a_known_fold_is_found_and_gone_through(top):
    result = path.track(folding, [[1.0, 0.0], [2.0, 0.0]], [top, 0.1, 0.0], continuation="arclength")
    (fold,) = result.folds
    assert abs(fold.L - 0.5) < 1e-9
    assert np.abs(fold.x - np.array([[1.0, 0.0], [2.0, 0.0]])).max() < 1e-6
    turn = min(range(len(result.per_L)), key=lambda i: result.per_L[i].L)
    falls = [b.L < a.L for a, b in itertools.pairwise(result.per_L)]
    assert falls == sorted(falls, reverse=True)  # down to the fold, and up from it
    minima = [point.minimum for point in result.per_L]
    assert minima[:turn] == [True] * turn
    assert minima[turn + 1 :] == [False] * (len(minima) - turn - 1)
    assert not result.success
    assert (
        "through a fold at L = 0.5, and not to L = 0.1: the curve came back; what is there is no min" in result.message
    )
    terms = path.QuadraticTerms.of(2, 0.0, None, 2)
    for point in result.per_L:
        _, pull = terms.at(point.L).value_and_gradient(point.x)
        gradient = torch.func.vmap(torch.func.grad(folding))(torch.as_tensor(point.x)).numpy()
        assert np.abs(gradient + pull).max() < 1e-6
    assert result.evaluations >= sum(point.evaluations for point in result.per_L)


def test_the_path_that_jumps_ends_in_a_fold():
    """Figure 1's start (5, 0): η's minimum meets a saddle at L = 0.3927, between the values of L where `track` jumps."""
    Ls = [math.inf, *np.geomspace(10, 0.05, 40).tolist(), 0.0]
    natural = path.track(problems.chow, [5.0, 0.0], Ls)
    result = path.track(problems.chow, [5.0, 0.0], Ls, continuation="arclength")
    (fold,) = result.folds
    before = max(i for i, L in enumerate(Ls) if natural.jumps[0] < L)
    assert natural.jumps[0] < fold.L < natural.per_L[before].L
    assert abs(fold.L - 0.392691) < 1e-6
    assert math.isinf(result.per_L[0].L)
    assert result.per_L[0].minimum
    assert not result.per_L[-1].minimum

    def H(x, L):
        pull = x[0, 0] ** 2 + x[1, 1] ** 2  # the anchor is 0
        return problems.chow(x[0]) + problems.chow(x[1]) + L * pull + (x[0] - x[1]).square().sum() / L

    x = torch.as_tensor(fold.x)
    assert float(torch.func.grad(H)(x, fold.L).abs().max()) < 1e-9
    eigenvalues = torch.linalg.eigvalsh(torch.func.hessian(H)(x, fold.L).reshape(4, 4))
    assert abs(float(eigenvalues[0])) < 1e-8 < 1 < float(eigenvalues[1])


@pytest.mark.parametrize("copies", [2, 3])
def test_a_path_without_a_fold_is_followed_by_arclength_too(seed, copies):
    A, b, anchor, f = quadratic(5, seed)
    Ls = [math.inf, 30.0, 0.01, 0.0]
    result = path.track(f, np.zeros(5), Ls, anchor, copies=copies, continuation="arclength")
    assert result.success, result.message
    assert result.message == "followed to L = 0"
    assert not result.folds
    assert all(point.minimum for point in result.per_L)
    terms = path.QuadraticTerms.of(5, anchor, None, copies)
    for point in result.per_L[1:-1]:
        assert np.abs(point.x - path.exact_minimiser(A, b, terms, point.L)).max() < 1e-7
    assert result.per_L[-2].L == 0.01
    assert np.abs(result.x - np.linalg.solve(A, b)).max() < 1e-6


def test_a_corrector_that_fails_ends_the_path():
    result = path.track(lambda x: -x.square().sum(), np.ones(2), [1.0, 0.1, 0.0])  # unbounded below
    assert not result.success
    assert "did not converge" in result.message


@pytest.mark.parametrize("n", [2, 3, 8])
def test_chow_is_equation_33_as_printed(seed, n):
    """Its sum written out, with (34): y_i = 1 + (x_i − 1)/4, k = 10, A = 1."""
    x, k, A = np.random.default_rng(seed).uniform(-10, 10, n), 10, 1
    y = [1 + (x_i - 1) / 4 for x_i in x]
    total = k * math.sin(math.pi * y[0]) ** 2 + (y[n - 1] - A) ** 2
    for i in range(n - 1):
        total += (y[i] - A) ** 2 * (1 + k * math.sin(math.pi * y[i + 1]) ** 2)
    assert float(problems.chow(torch.as_tensor(x))) == pytest.approx(math.pi / n * total, rel=1e-12)


@pytest.mark.parametrize("name", ["chow", "ackley", "rastrigin", "griewank"])
@pytest.mark.parametrize("n", [2, 7])
def test_the_problems_are_0_at_their_minimisers_and_above_elsewhere(name, n):
    f = getattr(problems, name)
    at = torch.full((n,), problems.CHOW_MINIMISER if name == "chow" else 0.0, dtype=torch.float64)
    shift = torch.randn(n, dtype=torch.float64)
    assert f(at) == pytest.approx(0, abs=1e-14)
    assert problems.shifted(f, shift)(at + shift) == pytest.approx(0, abs=1e-12)
    others = 5 * torch.randn(200, n, dtype=torch.float64)
    assert (torch.func.vmap(f)(others) > 1e-3).all()
    assert torch.autograd.gradcheck(f, (others[0].requires_grad_(),))
    at.requires_grad_()
    (gradient,) = torch.autograd.grad(f(at), at)
    assert gradient.isfinite().all()


# ---------------------------------------------------------------------------------------------------------- bad input

GOOD = dict(f=problems.chow, x0=np.zeros(2), Ls=[1.0, 0.0])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (dict(f=lambda x: x), r"f must return a scalar tensor, got shape \(2,\)"),
        (dict(f=lambda x: 1.0), "f must return a scalar tensor, got float"),
        (dict(f=lambda x: torch.tensor(1.0)), "f has no gradient"),
        (dict(f=lambda x: x.detach().sum()), "f has no gradient"),
        (dict(f=lambda x: x.sum().log() - math.inf), "f must be finite at x0, got -inf"),
        (dict(f=(lambda x: x.sum(), lambda x: 1.0)), r"f's gradient must have shape \(2,\), got \(\)"),
        (dict(Ls=[]), "Ls must hold at least one"),
        (dict(Ls=[1.0, 2.0]), "Ls must fall, got 1.0 and then 2.0"),
        (dict(Ls=[1.0, 1.0]), "Ls must fall"),
        (dict(Ls=[-1.0]), r"Ls must be in \[0, ∞\], got -1.0"),
        (dict(Ls=[math.nan]), "Ls must be in"),
        (dict(x0=np.zeros((3, 2))), r"x0 must have shape \[n\] or \[2, n\], got \[3, 2\]"),
        (dict(x0=1.0), "x0 must have shape"),
        (dict(x0=np.zeros(1)), "copies must be from 2 to the number of variables"),
        (dict(anchor=np.zeros(3)), "anchor must be a finite number or 2 of them"),
        (dict(anchor=math.nan), "anchor must be a finite number"),
        (dict(method="Newton"), "method must be one of BFGS, L-BFGS-B, got 'Newton'"),
        (dict(predictor="cubic"), "predictor must be one of None, 'secant', 'tangent', got 'cubic'"),
        (dict(predictor="tangent", method="L-BFGS-B"), "predictor 'tangent' needs method 'BFGS'"),
        (dict(predictor="tangent", f=(np.sum, np.ones_like)), "predictor 'tangent' needs f as a function of a tensor"),
        (dict(continuation="arc"), "continuation must be one of natural, arclength, got 'arc'"),
        (dict(continuation="arclength", adaptive=True), "predictor must be None and adaptive False, got None and True"),
        (dict(continuation="arclength"), "Ls must hold two finite values above 0 for continuation 'arclength'"),
        (dict(continuation="arclength", Ls=[1, 0.1], f=(np.sum, np.ones_like)), "'arclength' needs f as a function of"),
        (dict(copies=1), "copies must be from 2"),
        (dict(blocks=[0, 5]), "blocks must hold a number from 0 to 1"),
    ],
)
def test_bad_input_is_named(changed, message):
    with pytest.raises(ValueError, match=message):
        path.track(**{**GOOD, **changed})


def test_bad_input_to_many_is_named():
    for changed, message in (
        (dict(x0=torch.zeros(2)), r"x0 must be a float tensor of shape \[B, n\]"),
        (dict(x0=torch.zeros(5, 3, 4)), r"x0 must have shape \[B, n\] or \[B, 2, n\], got \[5, 3, 4\]"),
        (dict(anchor=torch.zeros(4, 2)), r"anchor must have shape \[n\] or \[5, 2\]"),
        (dict(Ls=[]), "Ls must hold"),
        (dict(f=lambda x: x), "f must return a scalar tensor"),
        (dict(predictor="secant"), "predictor must be None or 'tangent', got 'secant'"),
    ):
        with pytest.raises(ValueError, match=message):
            path.track_many(**{**dict(f=problems.chow, x0=torch.zeros(5, 2), Ls=[1.0]), **changed})


def test_public_names():
    assert hta.path.track is path.track
    assert hta.problems.CHOW_MINIMISER == 1.0


@pytest.mark.parametrize("predictor", [None, "secant", "tangent"])
@pytest.mark.parametrize("f", [lambda x: x.sum(), lambda x: -x.exp().sum(), lambda x: -(x**4).sum() - x.sum()])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_what_has_no_minimum_is_not_followed_to_its_end(f, predictor):
    result = hta.path.track(f, [1.0, 1.0], [10.0, 1.0, 0.0], predictor=predictor)
    assert result.success is False
    assert "did not converge" in result.message


@pytest.mark.parametrize("size", [1e-3, 1e3])
def test_a_minimum_of_any_value_is_one(size):
    result = hta.path.track(lambda x: size * ((x - 1) ** 2).sum() - 10 * size, [3.0, -1.0], [10.0, 1.0, 0.1, 0.0])
    assert result.success is True
    assert abs(result.x - 1).max() < 1e-2


@pytest.mark.parametrize("before", [[], [93.0, 92.0]])
def test_a_jump_right_after_infinity_is_reported(before):
    result = hta.path.track(hta.problems.chow, [5.0, 5.0], [math.inf, 95.0, *before, 91.0, 90.0, 89.0])
    assert (result.success, result.jumps) == (False, [91.0])


def test_a_smooth_path_of_few_steps_has_no_jump():
    assert hta.path.track(lambda x: ((x - 2) ** 2).sum(), [5.0, 5.0], [math.inf, 10.0, 0.1, 0.0]).success is True


def test_a_jump_to_0_after_the_curve_is_reported():
    Ls = [math.inf, *np.geomspace(10, 1, 8), 0.0]
    result = hta.path.track(hta.problems.chow, [5.0, 5.0], Ls, continuation="arclength")
    assert (result.success, result.jumps) == (False, [0.0])
    assert "but the path jumped there" in result.message


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_adaptive_steps_do_not_divide_what_lies_below_infinity():
    result = hta.path.track(
        lambda x: x[0] ** 2 + x[1] ** 2 + 3 * x[0] * x[1] + x[0], [1.0, 1.0], [math.inf, 0.001, 0.0], adaptive=True
    )
    assert [point.L for point in result.per_L] == [math.inf, 0.001]
    assert result.success is False


def test_many_starts_are_followed_in_float64_whatever_they_are():
    starts = torch.randint(0, 6, (5, 2))
    expected = hta.path.track_many(hta.problems.chow, starts.double(), [10.0, 1.0, 0.0])
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        result = hta.path.track_many(hta.problems.chow, starts.to(dtype).requires_grad_(), [10.0, 1.0, 0.0])
        assert torch.equal(result.x, expected.x)
    assert hta.path.track_many(hta.problems.chow, starts[:0].double(), [1.0, 0.0]).x.shape == (0, 2)


@pytest.mark.parametrize("options", [{}, {"predictor": "tangent"}, {"continuation": "arclength"}])
def test_a_function_may_return_one_value_of_any_shape(options):
    result = hta.path.track(lambda x: (x**2).sum(0, keepdim=True), [1.0, 2.0], [1.0, 0.5, 0.0], **options)
    assert result.success is True


@pytest.mark.parametrize("name", ["tolerance", "curvature"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf, "x"])
def test_tolerance_and_curvature_are_positive_numbers(name, value):
    for track, start in ((hta.path.track, [1.0, 1.0]), (hta.path.track_many, torch.ones(1, 2).double())):
        with pytest.raises((ValueError, TypeError), match=f"{name} must be"):
            track(hta.problems.chow, start, [1.0, 0.0], **{name: value})


def test_a_jump_whose_halves_end_in_a_nearer_valley_is_a_jump():
    """Random wells; past the fold the corrector lands elsewhere from the middle than from where the whole step began."""
    W = torch.tensor([[1.139279, -2.473181], [0.381582, 1.836970], [-0.446290, -1.216222]], dtype=torch.float64)
    c = torch.tensor([1.504487, 0.506893, 1.791766], dtype=torch.float64)
    p = torch.tensor([5.514532, 4.960952, 5.313122], dtype=torch.float64)

    def wells(x):
        return 0.298107 * (x @ x) + (c * torch.cos(W @ x + p)).sum()

    Ls = [math.inf, *np.geomspace(30, 0.05, 40).tolist(), 0.0]
    for options in ({}, {"predictor": "secant"}, {"predictor": "tangent"}, {"adaptive": True}):
        found = path.track(wells, [-2.544477, 2.685170], Ls, [-3.261698, -2.390326], **options)
        assert not found.success, options
        assert "jumped" in found.message


def test_a_start_that_falls_for_ever_does_not_hold_up_the_others():
    def falls(x):
        return x[0] ** 3 + x[1] ** 2 - x[0]

    starts = torch.tensor([[1.0, 0.0], [2.0, 1.0], [-5.0, 0.0]], dtype=torch.float64)
    found = path.track_many(falls, starts, [1.0, 0.5])
    assert found.success.tolist() == [True, True, False]
    assert int(found.evaluations[2]) < 1000


def test_every_start_and_anchor_must_be_finite():
    def f(x):
        return (x * x).sum()

    good, bad = torch.ones(2, 2, dtype=torch.float64), torch.tensor([[1.0, 1.0], [math.nan, 0.0]], dtype=torch.float64)
    with pytest.raises(ValueError, match="f must be finite at x0"):
        path.track_many(f, bad, [1.0])
    with pytest.raises(ValueError, match="anchor must be finite"):
        path.track_many(f, good, [1.0], bad)
    with pytest.raises(ValueError, match="f must be finite at x0"):
        path.track(f, bad.numpy(), [1.0])


def bowl(x):
    return (x - 1).square().sum()


NO_NUMBERS = {
    "complex": np.array([1.0, 1j]),
    "complex numbers": [1.0, 1j],
    "a complex tensor": torch.tensor([1.0, 1j]),
    "strings": ["1", "2"],
    "flags": torch.tensor([True, False]),
    "None": [None, 1.0],
    "rows of several lengths": [[1.0, 2.0], [1.0]],
    "a sparse tensor": torch.ones(2).to_sparse(),
    "a tensor of the meta device": torch.ones(2, device="meta"),
}


@pytest.mark.parametrize("what", NO_NUMBERS)
@pytest.mark.filterwarnings("error")
def test_what_holds_no_real_numbers_is_named(what):
    value = NO_NUMBERS[what]
    with pytest.raises(TypeError, match="x0 must hold real numbers, got "):
        path.track(bowl, value, [1.0])
    for name in ("anchor", "blocks"):
        with pytest.raises(TypeError, match=f"{name} must hold real numbers, got "):
            path.track(bowl, [1.0, 1.0], [1.0], **{name: value})
        with pytest.raises(TypeError, match=f"{name} must hold real numbers, got "):
            path.track_many(bowl, torch.ones(1, 2), [1.0], **{name: value})
    with pytest.raises(TypeError, match="f's gradient must hold real numbers, got "):
        path.Objective((lambda x: 1.0, lambda x: value))(np.ones(2))
    with pytest.raises((TypeError, ValueError), match="x0 must "):
        path.track_many(bowl, value[None] if isinstance(value, torch.Tensor) and not value.is_sparse else value, [1.0])


@pytest.mark.parametrize(
    "as_given",
    [
        lambda x: x.tolist(),
        lambda x: x.numpy().astype(np.int8),
        lambda x: x.float().requires_grad_(),
        lambda x: x.half(),
        lambda x: x.bfloat16().requires_grad_(),
        lambda x: x.long(),
        lambda x: x.float().t().contiguous().t(),
    ],
)
def test_real_numbers_of_any_kind_are_taken(as_given):
    x0 = torch.tensor([[3.0, -2.0], [0.0, 1.0]], dtype=torch.float64)
    expected = path.track(bowl, x0[0], [1.0, 0.1], x0[1]).x
    assert np.array_equal(path.track(bowl, as_given(x0[0]), [1.0, 0.1], as_given(x0[1])).x, expected)
    for anchor in (x0[1], x0.flip(0)):
        expected = path.track_many(bowl, x0, [1.0, 0.1], anchor).x
        assert torch.equal(path.track_many(bowl, x0, [1.0, 0.1], as_given(anchor)).x, expected)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("options", [{}, {"predictor": "tangent"}, {"continuation": "arclength"}])
def test_a_path_is_followed_where_gradients_are_switched_off(mode, options):
    Ls, x0 = [1.0, 0.1, 0.0], torch.tensor([[3.0, -2.0]], dtype=torch.float64)
    expected = path.track(problems.chow, x0[0], Ls, **options)
    with mode():
        assert np.array_equal(path.track(problems.chow, x0[0].clone(), Ls, **options).x, expected.x)
        assert path.Objective(bowl)(np.zeros(2))[1].tolist() == [-2.0, -2.0]
        assert not torch.is_grad_enabled()
        many = "continuation" not in options and path.track_many(problems.chow, x0.clone(), Ls, x0.clone(), **options).x
    if many is not False:
        assert torch.equal(many, path.track_many(problems.chow, x0, Ls, x0, **options).x)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (dict(copies=2.0), "copies must be a whole number, got 2.0"),
        (dict(copies=True), "copies must be a whole number, got True"),
        (dict(copies="2"), "copies must be a whole number, got '2'"),
        (dict(Ls=[None]), "Ls must be a number, got None"),
        (dict(Ls=[1.0, 1j]), "Ls must be a number, got 1j"),
        (dict(Ls="1"), "Ls must be a number, got '1'"),
        (dict(Ls=1.0), "Ls must be a list of numbers, got 1.0"),
        (dict(Ls=None), "Ls must be a list of numbers, got None"),
        (dict(Ls=torch.tensor(1.0)), "Ls must be a list of numbers, got a Tensor"),
        (dict(f=None), "f must be a function"),
        (dict(f=[bowl, bowl]), "f must be a function, or a tuple of two|f must be a function of a tensor, got a list"),
        (dict(f=(bowl,)), "f must be a function"),
        (dict(f=(bowl, None)), "f must be a function"),
        (dict(f=lambda x: bowl(x) * 1j), "f must return a real number, got torch.complex128"),
    ],
)
def test_a_setting_of_another_kind_is_named(changed, message):
    for track, start in ((path.track, [0.0, 0.0]), (path.track_many, torch.zeros(1, 2))):
        with pytest.raises((TypeError, ValueError), match=message):
            track(**{"f": bowl, "x0": start, "Ls": [1.0], **changed})


def test_the_value_of_a_pair_is_real_too():
    with pytest.raises(TypeError, match="f's value must hold real numbers, got 1j"):
        path.track((lambda x: 1j, lambda x: x), [1.0, 1.0], [1.0])


@pytest.mark.parametrize(
    "options", [{}, {"predictor": "secant"}, {"predictor": "tangent"}, {"continuation": "arclength"}]
)
@pytest.mark.parametrize("curvature", [1.0, 1e-6])
@pytest.mark.parametrize("Ls", [[1e200, 1.0, 1e-200], [1e200, 1.0], [1.0, 1e-200], [1.0, 1e-30], [5e-324, 0.0]])
def test_an_L_beyond_what_float64_holds_is_refused(Ls, curvature, options):
    """There the coordinates lose a copy beside the others, and what was found was anything."""
    if options.get("continuation") and 0 in Ls:
        return
    with pytest.raises(ValueError, match=r"Ls must be 0, ∞ or from \S+ to \S+ where curvature is \S+, got "):
        path.track(bowl, [0.0, 0.0], Ls, curvature=curvature, **options)
    if options.get("predictor") != "secant" and "continuation" not in options:
        with pytest.raises(ValueError, match="Ls must be 0, ∞ or from"):
            path.track_many(bowl, torch.zeros(1, 2), Ls, curvature=curvature, **options)
