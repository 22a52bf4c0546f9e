"""The ops against float64: the definition of the step as a minimiser, the definition of the penalty, the reference."""

import contextlib
import dataclasses
import math
import os
import subprocess
import sys

import pytest
import torch
from conftest import DTYPES, GPU, LABELS, SIZES, pattern, relative_error
from torch import nn

import hta_fused as hta
from hta_fused import ops
from hta_fused.kernels import reference
from hta_fused.rules import rules_of

TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-14}


def buffers(n, dtype):
    """θ, η, g_θ, g_η, v_θ, v_η, θ̃, on the default device."""
    return [torch.randn(n, dtype=dtype) for _ in range(7)]


def expected_step(
    theta, eta, g_theta, g_eta, v_theta, v_eta, anchor, labels, *, L, lr, momentum, weight_decay, nesterov, mode
):
    """The step in float64 from its definition: SGD's proposals, then per element the 2×2 system of the minimiser."""
    theta, eta, g_theta, g_eta, v_theta, v_eta = (t.double() for t in (theta, eta, g_theta, g_eta, v_theta, v_eta))
    anchor = torch.zeros_like(theta) if anchor is None else anchor.double()
    in_theta, in_eta = (labels == 1).double(), (labels == 2).double()
    g_theta, g_eta = g_theta + weight_decay * theta, g_eta + weight_decay * eta
    if mode == "explicit":
        gap = 2 / L * (theta - eta)
        g_theta, g_eta = (
            g_theta + 2 * L * in_theta * (theta - anchor) + gap,
            g_eta + 2 * L * in_eta * (eta - anchor) - gap,
        )
    if momentum:
        v_theta, v_eta = momentum * v_theta + g_theta, momentum * v_eta + g_eta
        g_theta, g_eta = (g_theta + momentum * v_theta, g_eta + momentum * v_eta) if nesterov else (v_theta, v_eta)
    a, b = theta - lr * g_theta, eta - lr * g_eta
    if mode == "explicit":
        return a, b, v_theta, v_eta
    if L == 0:
        return (a + b) / 2, (a + b) / 2, v_theta, v_eta
    lr = lr / (1 - momentum)  # γ of the proximal map
    if math.inf == L:
        return torch.where(in_theta > 0, anchor, a), torch.where(in_eta > 0, anchor, b), v_theta, v_eta
    # Stationarity of (|u−a|² + |v−b|²)/(2γ) + L·in_θ|u−θ̃|² + L·in_η|v−θ̃|² + |u−v|²/L, by Cramer's rule, times γ.
    c = 2 * lr / L
    p, q = 1 + 2 * lr * L * in_theta + c, 1 + 2 * lr * L * in_eta + c
    right_u, right_v = a + 2 * lr * L * in_theta * anchor, b + 2 * lr * L * in_eta * anchor
    determinant = p * q - c * c
    return (q * right_u + c * right_v) / determinant, (p * right_v + c * right_u) / determinant, v_theta, v_eta


def check_step(n, dtype, kind, with_anchor, tolerance=None, **settings):
    tensors = buffers(n, dtype)
    anchor = tensors.pop()
    anchor = anchor if with_anchor else None
    labels, per_element = pattern(kind, n)
    expected = expected_step(*tensors, anchor, per_element, **settings)
    stats = torch.zeros(4, dtype=torch.float64)
    used = [t.clone() for t in tensors]
    hta.homotopy_step_(*used, anchor, labels, stats=stats, **settings)
    theta, eta, *_, v_theta, v_eta = used
    base = torch.zeros_like(theta) if anchor is None else anchor
    results = (theta, eta, v_theta, v_eta) if settings["momentum"] else (theta, eta)
    for name, actual, wanted in zip(("theta", "eta", "v_theta", "v_eta"), results, expected, strict=False):
        # Cramer's rule itself loses digits as L falls; 1e-14 is asked where it has them.
        assert relative_error(actual, wanted, *tensors, base) < (tolerance or TOLERANCE[dtype]), name
    if not settings["momentum"]:
        assert torch.equal(used[4], tensors[4])
    in_theta, in_eta = per_element == 1, per_element == 2
    to_anchor = ((theta - base).double().square() * in_theta + (eta - base).double().square() * in_eta).sum()
    distance = (theta - eta).double().square().sum()
    assert stats[0] == pytest.approx(float(to_anchor), rel=TOLERANCE[dtype], abs=0)
    assert stats[1] == pytest.approx(float(distance), rel=TOLERANCE[dtype], abs=0)
    assert stats[2:].tolist() == [0, 0]
    if settings["L"] == 0:
        assert torch.equal(theta, eta)
    if settings["L"] == math.inf:
        assert torch.equal(theta[in_theta], base[in_theta])
        assert torch.equal(eta[in_eta], base[in_eta])


USUAL = dict(lr=0.05, momentum=0.9, weight_decay=5e-4, nesterov=False, mode="implicit")


@pytest.mark.parametrize("with_anchor", [True, False])
@pytest.mark.parametrize("kind", LABELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", SIZES)
def test_step_solves_its_definition(backend, n, dtype, kind, with_anchor):
    check_step(n, dtype, kind, with_anchor, L=0.1, **USUAL)


@pytest.mark.parametrize("L", [0.0, 1e-6, 1e-3, 0.01, 1.0, 100.0, math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_step_for_every_L(backend, L, dtype):
    # At L = 1e-6 the direct solve in float64 keeps 11 digits.
    check_step(
        5003, dtype, "mixed", True, tolerance=1e-10 if 0 < L < 1e-2 and dtype == torch.float64 else None, L=L, **USUAL
    )


@pytest.mark.parametrize("mode", ["implicit", "explicit"])
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.99])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_step_for_every_setting(backend, dtype, mode, nesterov, momentum, weight_decay):
    if nesterov and not momentum:
        pytest.skip("Nesterov needs a momentum")
    check_step(
        4099,
        dtype,
        "mixed",
        True,
        L=0.5,
        lr=0.1,
        momentum=momentum,
        weight_decay=weight_decay,
        nesterov=nesterov,
        mode=mode,
    )


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("nesterov", [False, True])
def test_decoupled_step_without_anchors_is_torch_sgd(backend, momentum, nesterov):
    if nesterov and not momentum:
        pytest.skip("Nesterov needs a momentum")
    copies = [nn.Parameter(torch.randn(1500)) for _ in range(2)]
    ours = [p.detach().clone() for p in copies]
    momenta = [torch.zeros(1500) for _ in range(2)]
    optimizers = [torch.optim.SGD([p], 0.1, momentum, weight_decay=0.01, nesterov=nesterov) for p in copies]
    for _ in range(5):
        grads = [torch.randn(1500) for _ in range(2)]
        for p, g, optimizer in zip(copies, grads, optimizers, strict=True):
            p.grad = g.clone()
            optimizer.step()
        hta.homotopy_step_(
            *ours,
            *grads,
            *momenta,
            None,
            None,
            L=math.inf,
            lr=0.1,
            momentum=momentum,
            weight_decay=0.01,
            nesterov=nesterov,
        )
    for p, x in zip(copies, ours, strict=True):
        assert relative_error(x, p.detach()) < 1e-6


@pytest.mark.parametrize("scale", [1024.0, torch.tensor(1024.0)])
def test_gradients_are_divided_by_the_scale(backend, scale):
    tensors = buffers(3000, torch.float32)
    plain, scaled = [t.clone() for t in tensors[:6]], [t.clone() for t in tensors[:6]]
    scaled[2] *= 1024
    scaled[3] *= 1024
    hta.homotopy_step_(*plain, None, None, L=0.1, lr=0.1, momentum=0.9)
    hta.homotopy_step_(*scaled, None, None, L=0.1, lr=0.1, momentum=0.9, grad_scale=scale)
    assert torch.equal(plain[0], scaled[0])
    assert torch.equal(plain[5], scaled[5])


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("n", [1, 1025, 40_000])
@pytest.mark.parametrize("which", [2, 3])
def test_a_gradient_that_is_not_finite_skips_the_step(backend, bad, n, which):
    tensors = buffers(n, torch.float32)[:6]
    tensors[which][torch.randint(n, ())] = bad
    before = [t.clone() for t in tensors]
    stats = torch.tensor([5.0, 6.0, 0.0, 2.0], dtype=torch.float64)
    hta.homotopy_step_(*tensors, None, None, L=0.1, lr=0.1, momentum=0.9, stats=stats)
    for i in (0, 1, 4, 5):
        assert torch.equal(tensors[i], before[i])
    assert stats.tolist() == [5, 6, 1, 3]  # the sums still describe the untouched state; one more skip is counted


def test_without_the_guard_a_bad_gradient_is_reported(backend):
    tensors = buffers(5000, torch.float32)[:6]
    tensors[3][4321] = math.nan
    stats = torch.zeros(4, dtype=torch.float64)
    hta.homotopy_step_(*tensors, None, None, L=math.inf, lr=0.1, momentum=0.9, stats=stats, skip_nonfinite=False)
    assert stats[2:].tolist() == [1, 0]
    assert tensors[1].isnan().sum() == 1


@pytest.mark.parametrize("guard", [True, False])
def test_a_gradient_that_its_scale_takes_out_of_range_spoils_its_own_element_only(backend, guard):
    """The guard looks at gradients as they come; that one is infinite once divided is said, and skips no part of the step."""
    tensors = buffers(70_000, torch.float32)[:6]  # several blocks on a GPU
    tensors[2][5] = 3e38
    before = tensors[0].clone()
    stats = torch.zeros(4, dtype=torch.float64)
    hta.homotopy_step_(
        *tensors, None, None, L=math.inf, lr=0.1, momentum=0.9, grad_scale=0.5, stats=stats, skip_nonfinite=guard
    )
    assert stats[2:].tolist() == [1, 0]
    assert tensors[0][5].isnan() or tensors[0][5].isinf()
    assert tensors[0].isfinite().sum() == 69_999
    assert (tensors[0] != before).sum() > 69_000


def test_found_inf_skips_the_step(backend):
    tensors = buffers(100, torch.float32)[:6]
    before = tensors[0].clone()
    stats = torch.zeros(4, dtype=torch.float64)
    for found, skipped in ((1.0, 1), (0.0, 1)):
        hta.homotopy_step_(
            *tensors, None, None, L=0.1, lr=0.1, momentum=0.9, found_inf=torch.tensor([found]), stats=stats
        )
        assert int(stats[3]) == skipped
        assert torch.equal(tensors[0], before) == bool(found)


@pytest.mark.parametrize("n", [1025, 1_000_003])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits_for_any_number_of_threads(n, dtype):
    if not hta.backends()["cpu"].startswith("available"):
        pytest.skip("no extension")
    tensors = buffers(n, dtype)
    labels, _ = pattern("mixed", n)
    results, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            used, stats = [t.clone() for t in tensors], torch.zeros(4, dtype=torch.float64)
            hta.homotopy_step_(*used, labels, L=0.01, lr=0.1, momentum=0.9, stats=stats)
            value = hta.homotopy_penalty(used[0], used[1], used[6], labels, 0.01)
            results.append([*used, stats, value])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_every_instruction_set_gives_the_same_elements():
    """The processors that this library may meet, as far as this one can play them."""
    code = (
        "import torch, hta_fused as hta, hashlib; torch.manual_seed(3)\n"
        "t = [torch.randn(70001) for _ in range(7)]; l = torch.randint(0, 3, (70001,), dtype=torch.uint8)\n"
        "s = torch.zeros(4, dtype=torch.float64)\n"
        "hta.homotopy_step_(*t, l, L=.01, lr=.1, momentum=.9, stats=s)\n"
        "print(hta.backends()['cpu'], hashlib.sha256(b''.join(x.numpy().tobytes() for x in t)).hexdigest(), float(s[0]))"
    )
    lines = []
    for isa in ("plain", "avx2", "avx512"):
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "HTA_ISA": isa}, check=True
        )
        lines.append(done.stdout.split())
    assert len({line[-2] for line in lines}) == 1
    sums = [float(line[-1]) for line in lines]
    assert sums == pytest.approx([sums[0]] * 3, rel=1e-6)


# ------------------------------------------------------------------------------------------------------------- penalty


def expected_penalty(theta, eta, anchor, labels, L):
    """Equation (3)'s quadratic terms in float64."""
    theta, eta = theta.double(), eta.double()
    anchor = torch.zeros_like(theta) if anchor is None else anchor.double()
    terms = L * ((theta - anchor)[labels == 1] ** 2).sum() + L * ((eta - anchor)[labels == 2] ** 2).sum()
    return terms + ((theta - eta) ** 2).sum() / L


@pytest.mark.parametrize("with_anchor", [True, False])
@pytest.mark.parametrize("kind", LABELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", SIZES)
def test_penalty_and_its_gradients(backend, n, dtype, kind, with_anchor):
    theta, eta, anchor, add_theta, add_eta, *_ = buffers(n, dtype)
    anchor = anchor if with_anchor else None
    labels, per_element = pattern(kind, n)
    theta.requires_grad_()
    eta.requires_grad_()
    wide = [theta.detach().double().requires_grad_(), eta.detach().double().requires_grad_()]
    expected = expected_penalty(*wide, anchor, per_element, 0.3)
    expected_grads = torch.autograd.grad(expected, wide)
    terms = theta.detach() * 2 / 0.3, eta.detach() * 2 / 0.3
    value = hta.homotopy_penalty(theta, eta, anchor, labels, 0.3)
    assert value.dtype == dtype
    assert value.shape == ()
    assert relative_error(value.detach(), expected.detach()) < TOLERANCE[dtype]
    for actual, wanted in zip(torch.autograd.grad(value, [theta, eta]), expected_grads, strict=True):
        assert relative_error(actual, wanted, *terms) < TOLERANCE[dtype]

    sums = [add_theta.double() + expected_grads[0], add_eta.double() + expected_grads[1]]
    value = hta.homotopy_penalty_accumulate_(add_theta, add_eta, theta, eta, anchor, labels, 0.3)
    assert relative_error(value, expected.detach()) < TOLERANCE[dtype]
    assert relative_error(add_theta, sums[0], *terms) < TOLERANCE[dtype]
    assert relative_error(add_eta, sums[1], *terms) < TOLERANCE[dtype]


def test_penalty_keeps_its_digits_when_the_copies_nearly_agree(backend):
    theta = torch.randn(10_000)
    eta = theta * (1 + 1e-4 * torch.randn(10_000))
    expected = expected_penalty(theta, eta, None, torch.zeros(10_000), 1e-6)
    assert relative_error(hta.homotopy_penalty(theta, eta, None, None, 1e-6), expected) < 1e-6


@pytest.mark.parametrize("with_anchor", [True, False])
def test_gradcheck_and_gradgradcheck(backend, with_anchor):
    theta, eta, anchor = (torch.randn(2, 3, dtype=torch.float64) for _ in range(3))
    labels = torch.tensor([[0, 1, 2], [2, 1, 0]], dtype=torch.uint8)

    def penalty(a, b):
        return hta.homotopy_penalty(a, b, anchor if with_anchor else None, labels, 0.7)

    inputs = (theta.requires_grad_(), eta.requires_grad_())
    assert torch.autograd.gradcheck(penalty, inputs)
    assert torch.autograd.gradgradcheck(penalty, inputs)


def test_backward_of_equation_3_is_the_explicit_step(backend):
    """autograd on (3) plus torch.optim.SGD, the naive way, does what mode="explicit" does."""
    theta, eta, anchor = (torch.randn(2000, dtype=torch.float64) for _ in range(3))
    target = torch.randn(2000, dtype=torch.float64)
    labels = torch.randint(0, 3, (2000,), dtype=torch.uint8)
    naive = [nn.Parameter(theta.clone()), nn.Parameter(eta.clone())]
    optimizer = torch.optim.SGD(naive, 0.01, 0.9)
    momenta = [torch.zeros_like(theta) for _ in range(2)]
    for _ in range(4):
        optimizer.zero_grad()
        loss = sum(((p - target) ** 2).sum() for p in naive) + hta.homotopy_penalty(*naive, anchor, labels, 0.5)
        loss.backward()
        optimizer.step()
        hta.homotopy_step_(
            theta,
            eta,
            2 * (theta - target),
            2 * (eta - target),
            *momenta,
            anchor,
            labels,
            L=0.5,
            lr=0.01,
            momentum=0.9,
            mode="explicit",
        )
    assert relative_error(theta, naive[0].detach()) < 1e-14
    assert relative_error(eta, naive[1].detach()) < 1e-14


# -------------------------------------------------------------------------------------------------- torch's own checks

needs_extension = pytest.mark.skipif(not hta.backends()["cpu"].startswith("available"), reason="no extension")


def op_arguments(dtype=torch.float32, n=2100, m=2):
    labels, _ = pattern("hashed", n, m)
    stats = torch.zeros(4, dtype=torch.float64)
    x, g, v = (torch.randn(m, n, dtype=dtype) for _ in range(3))
    anchor = torch.randn(n, dtype=dtype)
    rules = rules_of(hta.SGD(0.1, 0.9), hta.Explicit(0.1), m)[None].to(stats.device, dtype)
    pattern_ = (labels.codes, labels.labels, labels.seed, rules)
    return {
        "step_": (
            [x],
            [g],
            list(v),
            [],
            anchor,
            anchor.clone(),
            None,
            *pattern_,
            None,
            None,
            stats,
            0,
            False,
            True,
            3,
            [],
            [],
            None,
        ),
        "penalty": (list(x), anchor, *pattern_),
        "penalty_accumulate_": ([g], [x], anchor, *pattern_),
    }


@needs_extension
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["step_", "penalty", "penalty_accumulate_"])
def test_opcheck(backend, name, dtype):
    if backend == "reference":
        pytest.skip("plain functions")
    arguments = op_arguments(dtype)[name]
    if name == "penalty":
        arguments = ([x.requires_grad_() for x in arguments[0]], *arguments[1:])
    torch.library.opcheck(getattr(ops.kernels(arguments[0][0]), name), arguments)


@needs_extension
@pytest.mark.parametrize(("name", "written"), [("step_", [0, 2, 5, 13]), ("penalty_accumulate_", [0])])
def test_ops_move_version_counters(backend, name, written):
    if backend == "reference":
        pytest.skip("plain functions")
    arguments = op_arguments()[name]

    def versions() -> list[list[int]]:
        lists = [a if isinstance(a, list) else [a] for a in arguments]
        return [[t._version for t in entries if isinstance(t, torch.Tensor)] for entries in lists]

    before = versions()
    getattr(ops.kernels(arguments[0][0]), name)(*arguments)
    assert [i for i, (was, now) in enumerate(zip(before, versions(), strict=True)) if was != now] == written


def test_backward_through_an_overwritten_tensor_is_an_error(backend):
    theta, eta, g, h, *_ = buffers(50, torch.float32)
    w = torch.randn(50, requires_grad=True)
    loss = (w * theta).sum()
    hta.homotopy_step_(theta, eta, g, h, None, None, None, None, L=0.1, lr=0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ---------------------------------------------------------------------------------------------------------- bad input


def good():
    tensors = dict(
        zip(
            ("theta", "eta", "grad_theta", "grad_eta", "momentum_theta", "momentum_eta", "anchor"),
            buffers(10, torch.float32),
            strict=True,
        )
    )
    return {**tensors, "labels": torch.zeros(10, dtype=torch.uint8), "L": 0.1, "lr": 0.1, "momentum": 0.9}


BAD = [
    ("eta", torch.randn(9), ValueError, r"eta has shape \(9,\), but theta has shape \(10,\)"),
    ("grad_theta", torch.randn(10).double(), TypeError, "grad_theta has dtype torch.float64, but theta has dtype torch.float32"),
    ("anchor", torch.randn(20)[::2], ValueError, "anchor must be contiguous"),
    ("anchor", "zero", TypeError, "anchor must be a tensor, got str"),
    ("theta", torch.zeros(10, dtype=torch.int64), TypeError, "theta must have a floating dtype"),
    ("momentum_eta", None, ValueError, "momentum_eta must be a tensor where momentum is 0.9"),
    ("grad_eta", torch.randn(10, device="meta"), ValueError, "grad_eta is on meta, but theta is on (cpu|cuda)"),
    ("labels", torch.full((10,), 3, dtype=torch.uint8), ValueError, "labels must be 0, 1 or 2, got 3"),
    ("labels", torch.zeros(10, dtype=torch.int64), TypeError, "labels must have dtype torch.uint8"),
    ("labels", torch.zeros(11, dtype=torch.uint8), ValueError, r"labels has shape \(11,\)"),
    ("labels", [0] * 10, TypeError, "labels must be a uint8 tensor or a Partition, got list"),
    ("labels", hta.Partition(torch.zeros(11, dtype=torch.uint8)), ValueError, "labels is a Partition of 11 elements"),
    ("L", -1.0, ValueError, r"L must be in \[0, ∞\], got -1.0"),
    ("L", math.nan, ValueError, r"L must be in \[0, ∞\], got nan"),
    ("L", None, ValueError, "L must be given"),
    ("lr", 0.0, ValueError, "lr must be positive and finite, got 0.0"),
    ("lr", math.nan, ValueError, "lr must be positive"),
    ("momentum", -0.1, ValueError, r"momentum must be in \[0, 1\), got -0.1"),
    ("momentum", 1.0, ValueError, r"momentum must be in \[0, 1\), got 1.0"),
    ("weight_decay", -0.1, ValueError, "weight_decay must be finite and not negative"),
    ("labels", hta.Partition(torch.zeros(10, dtype=torch.uint8), blocks=3), ValueError, "a Partition of 3 blocks, but there are 2"),
    ("mode", "semi", ValueError, "mode must be 'implicit' or 'explicit', got 'semi'"),
    ("stats", torch.zeros(3), ValueError, "stats must be contiguous float64"),
    ("grad_scale", 0.0, ValueError, "grad_scale must be positive"),
    ("grad_theta", torch.randn(10).half(), TypeError, "grad_eta must have dtype torch.float16, got torch.float32"),
    ("low_theta", torch.randn(10), ValueError, "low_theta and low_eta must both be tensors"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value", "error", "message"), BAD)
def test_bad_input_is_named_before_anything_is_written(backend, name, value, error, message):
    if GPU and isinstance(value, torch.Tensor) and value.device.type == "cpu":
        beyond = torch.zeros(2 * value.numel(), dtype=value.dtype)  # with the strides that it had
        value = beyond.as_strided(value.shape, value.stride()).copy_(value)
    arguments = {**good(), name: value}
    before = {k: v.clone() for k, v in arguments.items() if isinstance(v, torch.Tensor) and v.device.type != "meta"}
    with pytest.raises(error, match=message):
        hta.homotopy_step_(**arguments)
    for k, v in before.items():
        assert torch.equal(arguments[k], v)


@pytest.mark.parametrize("L", [0.0, math.inf, -1.0, math.nan])
def test_penalty_needs_a_finite_positive_L(backend, L):
    with pytest.raises(ValueError, match="L must be positive and finite"):
        hta.homotopy_penalty(torch.ones(3), torch.ones(3), None, None, L)


@pytest.mark.parametrize("L", [0.0, math.inf])
def test_explicit_mode_needs_a_finite_positive_L(L):
    with pytest.raises(ValueError, match="explicit mode"):
        hta.homotopy_step_(**{**good(), "L": L, "mode": "explicit"})


@needs_extension
def test_direct_calls_of_the_ops_are_kept_inside_their_buffers():
    wrong = {
        0: ([torch.zeros(2, 2100)], "grads must be a contiguous tensor|grads must have 2 rows"),
        1: ([torch.zeros(1, 2100)], "grads must have 2 rows"),
        2: ([torch.zeros(2100)], "states must have 2 rows or none, got 1"),
        4: (torch.zeros(5), "anchor must be a contiguous tensor of the op's dtype and device"),
        10: (torch.zeros(1, 7), "rules must have rows of 53 numbers"),
        14: (7, "proposal must be 0 or 1, got 7"),
        17: (1, "sums must be given where a phase is done alone"),
    }
    for position, (value, message) in list(wrong.items())[1:]:
        arguments = list(op_arguments()["step_"])
        arguments[position] = value
        with pytest.raises(RuntimeError, match=message):
            torch.ops.hta_fused.step_(*arguments)
    for column, code in ((0, 1), (1, 77)):
        arguments = list(op_arguments()["step_"])
        arguments[7] = arguments[7].clone()
        arguments[7][0, column] = code
        with pytest.raises(RuntimeError, match="codes of tile 0"):
            torch.ops.hta_fused.step_(*arguments)


def test_unknown_backends_are_refused():
    with pytest.raises(ValueError, match="backend must be one of cpu, cuda, triton, nvrtc, reference, got 'tpu'"):
        hta.use_backend("tpu")


def test_reference_serves_what_the_kernels_do_not():
    tensors = [t.to(torch.bfloat16) for t in buffers(100, torch.float32)]
    wide = [t.double() for t in tensors]
    hta.homotopy_step_(*tensors, None, L=0.1, lr=0.1, momentum=0.9)
    hta.homotopy_step_(*wide, None, L=0.1, lr=0.1, momentum=0.9)
    assert relative_error(tensors[0], wide[0]) < 0.02


def test_expand_reads_codes_as_the_kernels_do():
    labels = torch.randint(0, 3, (5000,), dtype=torch.uint8)
    labels[:2048] = 2
    partition = hta.Partition(labels)
    group, label = reference.expand(partition.codes, partition.labels, None, 5000, 2, "cpu")
    assert torch.equal(label.byte(), labels)
    assert not group.any()


def test_hashed_labels_are_evenly_and_independently_drawn():
    n = 4_000_000 // 1024
    for copies in (1, 2, 3, 7):
        first, second = (reference.hashed_labels(torch.tensor([seed]), n, copies) for seed in (5, 6))
        counts = torch.bincount(first.flatten(), minlength=copies + 1)[1:] / first.numel()
        assert counts.sum() == 1
        assert (counts - 1 / copies).abs().max() < 5 * (0.25 / first.numel()) ** 0.5 + 2**-16
        for other in (second, first.roll(1, 0), first.roll(1, 1)):  # another seed, the next tile, the next element
            agree = (first == other).double().mean()
            assert abs(agree - 1 / copies) < 5 * (0.25 / first.numel()) ** 0.5 + 2**-15


# ------------------------------------------------------------------------------------------------- where ops are called


def test_a_first_call_in_inference_mode_or_a_transform_leaves_nothing_behind():
    """The rules of the last settings are kept; they must not be another mode's tensors."""
    theta, eta = torch.randn(5, requires_grad=True), torch.randn(5)
    with torch.inference_mode():
        expected = hta.homotopy_penalty(theta, eta, None, None, 0.123)
    value = hta.homotopy_penalty(theta, eta, None, None, 0.123)
    value.backward()
    assert torch.equal(value, expected)
    copies, grads = torch.randn(2, 5), torch.randn(2, 5)
    with torch.inference_mode():
        hta.coupled_step_(copies.clone(), grads, None, None, proposal=hta.SGD(0.321), coupling=hta.Average())
    hta.coupled_step_(copies, grads, None, None, proposal=hta.SGD(0.321), coupling=hta.Average())

    def penalty(a, b):
        return hta.homotopy_penalty(a, b, None, None, 0.321)

    with contextlib.suppress(RuntimeError):
        torch.func.functionalize(penalty)(torch.ones(2), torch.zeros(2))
    assert type(penalty(torch.ones(2), torch.zeros(2)).item()) is float
    assert not torch._is_functional_tensor(penalty(torch.ones(2), torch.zeros(2)))


def test_a_coupling_of_ones_own_may_change_in_place():
    @dataclasses.dataclass(frozen=True, eq=False)
    class Mine(hta.Average):
        weights: list = dataclasses.field(default_factory=lambda: [0.0])

        def rules(self, copies, step_size, step=1):
            return super().rules(copies, step_size, step) * self.weights[0]

    mine, x = Mine(), torch.ones(2, 3)
    hta.coupled_step_(x, torch.zeros(2, 3), None, None, proposal=hta.SGD(0.1), coupling=mine)
    assert not x.any()
    x.fill_(1)
    mine.weights[0] = 1.0
    hta.coupled_step_(x, torch.zeros(2, 3), None, None, proposal=hta.SGD(0.1), coupling=mine)
    assert torch.equal(x, torch.ones(2, 3))


def test_what_holds_no_memory_of_its_own_is_named():
    from torch.testing._internal.two_tensor import TwoTensor

    plain = [torch.ones(4) for _ in range(4)]
    wrapped = TwoTensor(torch.ones(4), torch.ones(4))
    with pytest.raises(TypeError, match="theta must be a plain tensor, got a TwoTensor"):
        hta.homotopy_step_(wrapped, *plain[1:], None, None, None, None, L=0.1, lr=0.1)


def test_the_scale_may_have_any_shape_of_one_number_and_is_checked_under_the_compiler(backend):
    tensors = buffers(100, torch.float32)[:6]
    other = [t.clone() for t in tensors]
    hta.homotopy_step_(*tensors, None, None, L=0.1, lr=0.1, momentum=0.9, grad_scale=torch.full((1, 1), 2.0))
    hta.homotopy_step_(*other, None, None, L=0.1, lr=0.1, momentum=0.9, grad_scale=2.0)
    assert torch.equal(tensors[0], other[0])

    def step(theta):
        hta.homotopy_step_(theta, *other[1:], None, None, L=0.1, lr=0.1, momentum=0.9, grad_scale=0.0)

    with pytest.raises(Exception, match="grad_scale must be positive"):
        torch.compile(step, backend="eager", fullgraph=True)(other[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_accumulating_rounds_once(backend, dtype):
    if backend == "cpu":
        pytest.skip("has no kernels for low precision")
    if backend == "triton" and dtype == torch.bfloat16 and not GPU:
        pytest.skip("Triton's interpreter cuts off where the GPU rounds")
    theta, eta, *sums = (torch.randn(1000, dtype=dtype) for _ in range(4))
    exact = [x.float() for x in (theta, eta)]
    added = [2 * (exact[0] - exact[1]) / 0.1, 2 * (exact[1] - exact[0]) / 0.1]
    expected = [(s.float() + a).to(dtype) for s, a in zip(sums, added, strict=True)]
    hta.homotopy_penalty_accumulate_(*sums, theta, eta, None, None, 0.1)
    for got, wanted in zip(sums, expected, strict=True):
        assert (got != wanted).sum() <= 2  # the gradient's own last bit in float32 may decide a tie
