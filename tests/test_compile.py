"""torch.compile and torch.func: no compilation for new settings and steps, the bits of eager mode; every derivative."""

import copy
import math
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from bad_inputs import Net
from conftest import pattern, relative_error
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import functional
from torch.func import grad, grad_and_value, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils._pytree import tree_leaves

import hta_fused as hta
from hta_fused import ops
from hta_fused.rules import rules_of

needs_extension = pytest.mark.skipif(not hta.backends()["cpu"].startswith("available"), reason="no extension")
# L, lr, momentum, weight decay, step.
SCHEDULE = [(0.5 * 0.6**k, 0.1 / (1 + k), 0.9 - 0.01 * k, 1e-4 * k, 1 + k) for k in range(12)]


def counted(function, backend: str, **options):
    """The compiled function, and what counts its compilations."""
    torch.compiler.reset()
    counter = CompileCounterWithBackend(backend)
    return torch.compile(function, backend=counter, **options), counter


def check_steps(function, backend, schedule, n=50, tolerance=0.0) -> CompileCounterWithBackend:
    """Runs function(*settings, *tensors) along a schedule, compiled without a graph break and eager, on tensors that
    both change; the compiler may run twice, the second time to let settings vary."""
    compiled, counter = counted(function, backend, fullgraph=True)
    rows = torch.randn(9, n)
    rows[6:8].abs_()  # AdamW's averaged squares
    tensors = [*rows.unbind(), torch.zeros(4, dtype=torch.float64)]
    copies = [t.clone() for t in tensors]
    for settings in schedule:
        results = [[to, f(*settings, *to)] for f, to in ((function, tensors), (compiled, copies))]
        for expected, actual in zip(*map(tree_leaves, results), strict=True):
            assert expected is actual is None or relative_error(actual, expected) <= tolerance
    assert counter.frame_count <= 2
    return counter


# --------------------------------------------------------------------------------------------------- the ops, compiled


@needs_extension
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("kind", ["none", "bytes", "mixed"])
def test_new_settings_do_not_compile_the_ops_anew(backend, kind, compiler):
    if backend == "reference" or (compiler == "inductor" and backend != "cpu" and kind != "mixed"):
        pytest.skip("not opaque to the compiler, or nearly a duplicate")
    labels, _ = pattern(kind, 3000)

    def function(L, lr, momentum, decay, step, theta, eta, g, h, v, w, square, other, anchor, stats):
        hta.homotopy_step_(
            theta, eta, g, h, v, w, anchor, labels, L=L, lr=lr, momentum=momentum, weight_decay=decay, stats=stats
        )
        hta.coupled_step_(
            [theta, eta], [g, h], [[v, w], [square, other]], anchor, labels,
            proposal=hta.AdamW(lr, (momentum, 0.99), weight_decay=decay), coupling=hta.Elastic(L), step=step,
        )  # fmt: skip
        value = hta.homotopy_penalty_accumulate_(g, h, theta, eta, anchor, labels, L)
        return value, hta.homotopy_penalty(theta * 2, eta + 1, anchor, labels, L)

    schedule = SCHEDULE if backend == "cpu" else SCHEDULE[:3]  # what interprets or emulates a GPU is slow
    check_steps(function, compiler, schedule, 3000, tolerance=1e-6 if compiler == "inductor" else 0)


class Own(hta.Elastic):
    """A coupling that the package does not know."""


COUPLINGS = {
    "Homotopy": hta.Homotopy,
    "Homotopy every 3": lambda x: hta.Homotopy(x, every=3),
    "Explicit": hta.Explicit,
    "EMA": hta.EMA,
    "Lookahead": hta.Lookahead,
    "Elastic": hta.Elastic,
    "Elastic explicit": lambda x: hta.Elastic(x, "explicit"),
    "Toward": hta.Toward,
    "Average": lambda x: hta.Average(x, every=2),
}


@needs_extension  # the reference is traced, and its bits are the compiler's
@pytest.mark.parametrize("coupling", COUPLINGS)
def test_new_settings_do_not_compile_any_coupling_anew(coupling):
    def function(x, lr, momentum, decay, step, theta, eta, g, h, v, w, square, other, anchor, stats):
        for proposal, states in (
            (hta.SGD(lr, momentum, decay), [v, w]),
            (hta.AdamW(lr, (momentum, 0.9), 1e-8, decay), [[v, w], [square, other]]),
        ):
            made = {"proposal": proposal, "coupling": COUPLINGS[coupling](x), "step": step}
            hta.coupled_step_([theta, eta], [g, h], states, anchor, **made, stats=stats)

    ends = [(end, *rest) for end, (_, *rest) in zip((0.0, math.inf, 0.0), SCHEDULE, strict=False)]
    check_steps(function, "aot_eager", SCHEDULE + (ends if "Homotopy" in coupling else []))


@needs_extension
def test_new_settings_objects_do_not_compile_anew():
    def function(proposal, coupling, step, theta, eta, g, h, v, w, square, other, anchor, stats):
        hta.coupled_step_([theta, eta], [g, h], [v, w], anchor, proposal=proposal, coupling=coupling, step=step)

    schedule = [(hta.SGD(lr, 0.9), hta.Homotopy(L), step) for L, lr, *_, step in SCHEDULE]
    check_steps(function, "aot_eager", schedule)
    schedule = [(hta.SGD(torch.tensor(lr), 0.9), hta.Homotopy(L), step) for L, lr, *_, step in SCHEDULE]
    check_steps(function, "aot_eager", schedule)


@needs_extension
def test_a_coupling_of_the_users_own_compiles():
    def function(x, lr, momentum, decay, step, theta, eta, g, h, v, w, square, other, anchor, stats):
        proposal = hta.SGD(lr, momentum, decay)
        hta.coupled_step_([theta, eta], [g, h], [v, w], anchor, proposal=proposal, coupling=Own(x), step=step)

    check_steps(function, "aot_eager", SCHEDULE[:1])


@needs_extension
def test_settings_in_tensors_compile_once():
    def function(L, lr, decay, theta, eta, g, h, v, w, square, other, anchor, stats):
        hta.homotopy_step_(theta, eta, g, h, v, w, anchor, None, L=L, lr=lr, momentum=0.9, weight_decay=decay)
        return hta.homotopy_penalty(theta, eta, anchor, None, L)

    schedule = [tuple(map(torch.tensor, (L, lr, decay))) for L, lr, _, decay, _ in SCHEDULE]
    assert check_steps(function, "aot_eager", schedule).frame_count == 1


@pytest.mark.parametrize(
    ("L", "lr", "match"),
    [(-0.1, 0.1, "L must be in"), (0.1, -0.1, "lr must be"), (0.1, 1e30, "must give numbers of at most")],
)
def test_bad_settings_in_tensors_raise_before_a_write(L, lr, match):
    theta, eta, g, h = torch.randn(4, 50).unbind()

    def function(L, lr):
        hta.homotopy_step_(theta, eta, g, h, None, None, None, None, L=L, lr=lr)

    compiled, _ = counted(function, "aot_eager", fullgraph=True)
    compiled(torch.tensor(0.1), torch.tensor(0.1))
    before = theta.clone()
    with pytest.raises(ValueError, match=match):
        compiled(torch.tensor(L), torch.tensor(lr))
    assert torch.equal(theta, before)


def test_opcheck_of_the_rules():
    numbers = [torch.tensor(x, dtype=torch.float64) for x in (0.1, 0.9, 0.99, 1e-8, 0.01, 0.0, 0.2)]
    arguments = (numbers, "AdamW", "Elastic", "implicit", 3, 6, 2, torch.float32)
    torch.library.opcheck(torch.ops.hta_fused.rules, arguments)
    expected = rules_of(hta.AdamW(0.1, (0.9, 0.99), 1e-8, 0.01), hta.Elastic(0.2, every=3), 2, 6, torch.float32)
    assert torch.equal(torch.ops.hta_fused.rules(*arguments), expected[None])


@needs_extension
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compile_differentiates_the_penalty(compiler):
    theta, eta = (torch.randn(3000, requires_grad=True) for _ in range(2))

    def function(a, b, L):
        return hta.homotopy_penalty(a * a, b, None, None, L)

    compiled, counter = counted(function, compiler, fullgraph=True)
    for L, *_ in SCHEDULE:
        results = [torch.autograd.grad(f(theta, eta, L), [theta, eta]) for f in (compiled, function)]
        for actual, expected in zip(*results, strict=True):
            assert relative_error(actual, expected) <= (1e-6 if compiler == "inductor" else 0)
    assert counter.frame_count <= 2


@pytest.mark.parametrize(
    "name", ["homotopy_step_", "coupled_step_", "homotopy_penalty", "homotopy_penalty_accumulate_"]
)
def test_labels_above_the_range_raise_compiled_as_eager(name):
    torch.compiler.reset()
    theta, eta, g, h = (torch.randn(50) for _ in range(4))

    def function(theta, eta, labels):
        if name == "homotopy_step_":
            return hta.homotopy_step_(theta, eta, g, h, None, None, None, labels, L=0.1, lr=0.1)
        if name == "coupled_step_":
            settings = {"proposal": hta.SGD(0.1), "coupling": hta.Homotopy(0.1)}
            return hta.coupled_step_([theta, eta], [g, h], None, None, labels, **settings)
        if name == "homotopy_penalty":
            return hta.homotopy_penalty(theta, eta, None, labels, 0.1)
        return hta.homotopy_penalty_accumulate_(theta, eta, g, h, None, labels, 0.1)

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    labels = torch.randint(0, 3, (50,), dtype=torch.uint8)
    compiled(theta.clone(), eta.clone(), labels)
    labels[33] = 3
    before = theta.clone(), eta.clone()
    for f in (function, compiled):
        with pytest.raises(ValueError, match="labels must be 0, 1 or 2, got 3"):
            f(theta, eta, labels)
        assert torch.equal(theta, before[0])
        assert torch.equal(eta, before[1])


# -------------------------------------------------------------------------------------------- training steps, compiled

PROPOSALS = {
    "SGD": hta.SGD(0.05, 0.9, 1e-3),
    "AdamW": hta.AdamW(0.01, eps=1e-3),
}  # eps: a bias before a norm has no gradient


@pytest.mark.parametrize(("compiler", "copies"), [("eager", 2), ("aot_eager", 2), ("aot_eager", 3), ("inductor", 3)])
@pytest.mark.parametrize("part", ["backward", "step"])
@pytest.mark.parametrize("proposal", PROPOSALS)
def test_a_training_step_compiles_once_and_is_the_eager_one(proposal, part, compiler, copies):
    x, y = torch.randn(12, 8, 1, 4, 4), torch.randint(0, 16, (12, 8))
    optimizer = hta.CoupledOptimizer(hta.Replicas(Net(), copies), PROPOSALS[proposal], hta.Homotopy(0.1))
    twin = copy.deepcopy(optimizer)
    schedulers = [torch.optim.lr_scheduler.CosineAnnealingLR(o, 12) for o in (optimizer, twin)]

    def loss(net, batch):
        return F.cross_entropy(net(batch[0]), batch[1])

    def backward(batch):
        return twin.replicas.backward(loss, batch)

    def step(batch):
        twin.zero_grad()
        losses = twin.replicas.backward(loss, batch)
        twin.step()
        return losses

    def close(actual, expected):
        return relative_error(actual, expected) <= (1e-5 if compiler == "inductor" else 0)

    compiled, counter = counted(step if part == "step" else backward, compiler)
    for k, batch in enumerate(zip(x, y, strict=True)):
        optimizer.coupling = twin.coupling = hta.Homotopy(0.5 * 0.6**k)
        optimizer.zero_grad()
        losses = optimizer.replicas.backward(loss, batch)
        optimizer.step()
        with torch._dynamo.config.patch(error_on_recompile=k > 1):
            if part == "step":
                actual = compiled(batch)
            else:
                twin.zero_grad()
                actual = compiled(batch)
                twin.step()
        assert close(torch.stack(actual), torch.stack(losses))
        assert close(twin.replicas.params, optimizer.replicas.params)
        for scheduler in schedulers:
            scheduler.step()
    assert counter.frame_count == 1  # the loss of a copy, whichever
    assert optimizer.steps == twin.steps == 12


@pytest.mark.skipif(
    torch.__version__.split(".")[:2] in (["2", "10"], ["2", "11"]),
    reason="torch cannot trace it: an optimizer's attribute",
)
def test_L_may_be_assigned_inside_a_compiled_step():
    x, y = torch.randn(12, 8, 1, 4, 4), torch.randint(0, 16, (12, 8))
    optimizer = hta.HomotopySGD(hta.Replicas(Net()), 0.05, 0.9)
    twin = copy.deepcopy(optimizer)

    def step(optimizer, L, batch):
        optimizer.L = L
        optimizer.zero_grad()
        optimizer.replicas.backward(lambda net, batch: F.cross_entropy(net(batch[0]), batch[1]), batch)
        optimizer.step()

    compiled, _ = counted(step, "aot_eager")
    for k, batch in enumerate(zip(x, y, strict=True)):
        step(optimizer, 0.5 * 0.6**k, batch)
        with torch._dynamo.config.patch(error_on_recompile=k > 2):
            compiled(twin, 0.5 * 0.6**k, batch)
        assert torch.equal(optimizer.replicas.params, twin.replicas.params)


# --------------------------------------------------------------------------------------------------------- torch.func

N = 7


def plain_penalty(theta, eta, anchor, labels, L):
    one, two = (labels == 1).to(theta.dtype), (labels == 2).to(theta.dtype)
    anchor = 0 if anchor is None else anchor
    return (
        L * (one * (theta - anchor) ** 2).sum() + L * (two * (eta - anchor) ** 2).sum() + ((theta - eta) ** 2).sum() / L
    )


def dual(f, a, b):
    with forward_ad.dual_level():
        return tuple(forward_ad.unpack_dual(f(forward_ad.make_dual(a, b.detach()), b)))


TRANSFORMS: dict[str, Any] = {
    "grad": lambda f, a, b: grad(f, (0, 1))(a, b),
    "grad_and_value": lambda f, a, b: grad_and_value(f, (0, 1))(a, b),
    "vjp": lambda f, a, b: vjp(f, a, b)[1](torch.tensor(2.0, dtype=a.dtype)),
    "jvp": lambda f, a, b: jvp(f, (a, b), (b, a)),
    "jvp in one": lambda f, a, b: jvp(lambda x: f(x, b), (a,), (b,)),
    "forward_ad": dual,
    "jacfwd": lambda f, a, b: jacfwd(f, (0, 1))(a, b),
    "jacrev": lambda f, a, b: jacrev(f, (0, 1))(a, b),
    "hessian": lambda f, a, b: hessian(f, (0, 1))(a, b),
    "jacrev of jacrev": lambda f, a, b: jacrev(jacrev(f, (0, 1)), (0, 1))(a, b),
    "jacfwd of jacfwd": lambda f, a, b: jacfwd(jacfwd(f, (0, 1)), (0, 1))(a, b),
    "jacrev of jacfwd": lambda f, a, b: jacrev(jacfwd(f, (0, 1)), (0, 1))(a, b),
    "third": lambda f, a, b: jacfwd(hessian(lambda x: f(x * x, b)))(a),
    "vmap": lambda f, a, b: vmap(f)(torch.stack([a, b]), torch.stack([b, 2 * a])),
    "vmap over one": lambda f, a, b: vmap(f, (0, None))(torch.stack([a, b]), b),
    "vmap over columns": lambda f, a, b: vmap(f, (1, None))(torch.stack([a, b], 1), b),
    "vmap of vmap": lambda f, a, b: vmap(vmap(f, (0, None)), (None, 0))(torch.stack([a, b, a]), torch.stack([b, a])),
    "vmap of grad": lambda f, a, b: vmap(grad(f, (0, 1)), (0, None))(torch.stack([a, b]), b),
    "vmap of jvp": lambda f, a, b: vmap(lambda x: jvp(f, (x, b), (b, x)))(torch.stack([a, b])),
    "grad of vmap": lambda f, a, b: grad(lambda x: vmap(f, (0, None))(x, b).sum())(torch.stack([a, b])),
    "jvp of grad": lambda f, a, b: jvp(grad(f, (0, 1)), (a, b), (b, a)),
    "grad of a norm of grad": lambda f, a, b: grad(lambda x: grad(f)(x, b).square().sum())(a),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["none", "bytes", "mixed"])
@pytest.mark.parametrize("with_anchor", [True, False])
@pytest.mark.parametrize("how", TRANSFORMS)
def test_the_penalty_under_torch_func(how, with_anchor, kind):
    theta, eta, anchor = (torch.randn(N, dtype=torch.float64) for _ in range(3))
    labels, per_element = pattern(kind, N)
    if kind == "mixed":
        per_element = torch.randint(0, 3, (N,), dtype=torch.uint8)
        labels = hta.Partition(per_element, blocks=2)
    anchor = anchor if with_anchor else None
    results = [
        tree_leaves(TRANSFORMS[how](f, theta, eta))
        for f in (
            lambda a, b: hta.homotopy_penalty(a, b, anchor, labels, 0.3),
            lambda a, b: plain_penalty(a, b, anchor, per_element, 0.3),
        )
    ]
    for actual, wanted in zip(*results, strict=True):
        assert actual.shape == wanted.shape
        assert relative_error(actual, wanted, torch.ones(1)) < 1e-13


@pytest.mark.parametrize("strategy", ["reverse-mode", "forward-mode"])
def test_vectorized_derivatives_of_autograd_functional(strategy):
    """Their vmap is not torch.func's."""
    theta, eta, anchor = torch.randn(3, N, dtype=torch.float64).unbind()
    labels = torch.randint(0, 3, (N,), dtype=torch.uint8)
    results = []
    for penalty in (hta.homotopy_penalty, plain_penalty):
        f = lambda a, b: penalty(a * a, b, anchor, labels, 0.3)  # noqa: B023, E731
        hessians = functional.hessian(f, (theta, eta), vectorize=True, outer_jacobian_strategy=strategy)
        results.append([hessians, functional.jacobian(f, (theta, eta), vectorize=True, strategy=strategy)])
    for actual, wanted in zip(*map(tree_leaves, results), strict=True):
        assert relative_error(actual.detach(), wanted) < 1e-13


def test_the_op_beneath_raises_rather_than_lose_a_tangent(backend):
    if backend == "reference":
        pytest.skip("plain functions")
    theta, eta = torch.randn(2, N).unbind()
    rules = rules_of(hta.SGD(1.0), hta.Explicit(0.3), 2, dtype=torch.float32)[None].to(theta.device)
    penalty = lambda a, b: ops.kernels(theta).penalty([a, b], None, None, None, None, rules)[0]  # noqa: E731
    for how in ("jvp", "forward_ad"):
        with pytest.raises(NotImplementedError, match="has no forward derivative"):
            TRANSFORMS[how](penalty, theta, eta)
    with forward_ad.dual_level():
        assert torch.equal(penalty(theta, eta), penalty(theta, eta))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_penalty_keeps_tangents(backend):
    torch.compiler.reset()
    theta, eta = (torch.randn(N, dtype=torch.float64) for _ in range(2))
    plain = lambda a, b: hta.homotopy_penalty(a, b, None, None, 0.3)  # noqa: E731
    compiled = torch.compile(plain, backend=backend)
    assert torch.equal(compiled(theta, eta), plain(theta, eta))  # the graph without them is there first
    for how in ("forward_ad", "jvp"):
        for a, b in zip(TRANSFORMS[how](compiled, theta, eta), TRANSFORMS[how](plain, theta, eta), strict=True):
            assert relative_error(a, b) < 1e-13


@pytest.mark.parametrize("how", ["grad", "jvp", "vmap", "hessian"])
def test_torch_func_inside_the_compiler(how):
    torch.compiler.reset()
    theta, eta = (torch.randn(N, dtype=torch.float64) for _ in range(2))

    def function(a, b):
        return TRANSFORMS[how](lambda x, y: hta.homotopy_penalty(x, y, None, None, 0.3), a, b)

    actual = torch.compile(function, backend="aot_eager")(theta, eta)
    for a, b in zip(tree_leaves(actual), tree_leaves(function(theta, eta)), strict=True):
        assert relative_error(a, b) < 1e-13
