"""Couplings: each against a plain loop of its docstring's formulas, against its paper, and as an optimizer's setting."""

import copy
import io
import itertools
import math
import pickle
from dataclasses import dataclass, field, make_dataclass

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import hta_fused as hta
from hta_fused.path import QuadraticTerms, exact_minimiser, random_quadratic

COPIES = (1, 2, 3, 4)
EVERY = (1, 3)
PROPOSALS = {"SGD": hta.SGD(0.02, 0.9, 0.05), "AdamW": hta.AdamW(0.02, (0.8, 0.95), 1e-6, 0.1)}
PLAIN_SGD = hta.SGD(0.02)


# ------------------------------------------------------------------------------------------------- a task, and a loop


class Bowl(nn.Module):
    """A convex quadratic of parameters of awkward shapes: f(x) = ½·xᵀAx − xᵀb, another b for each batch."""

    def __init__(self, x: Tensor, A: Tensor):
        super().__init__()
        self.a, self.b, self.c = (nn.Parameter(part.clone()) for part in Bowl.parts(x).values())
        self.A = A

    @staticmethod
    def parts(x: Tensor) -> dict[str, Tensor]:
        return {"a": x[:15].view(3, 5), "b": x[15:22], "c": x[22].view(())}

    def forward(self, b: Tensor) -> Tensor:
        x = flat(self.parameters())
        return 0.5 * x @ self.A @ x - x @ b


N = 23


def flat(tensors) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])


@dataclass
class Task:
    """What a run of m copies starts from, and what it meets."""

    m: int
    steps: int = 12
    A: Tensor = field(init=False)
    x: Tensor = field(init=False)  # [m, N]
    anchor: Tensor = field(init=False)
    labels: Tensor = field(init=False)  # uint8 [N], of 0 … m
    bs: Tensor = field(init=False)  # [steps, m, N]

    def __post_init__(self):
        root = torch.randn(N, N, dtype=torch.float64)
        self.A = root @ root.T / N + 0.5 * torch.eye(N, dtype=torch.float64)
        self.x = torch.randn(self.m, N, dtype=torch.float64)
        self.anchor = torch.randn(N, dtype=torch.float64)
        self.labels = torch.randint(0, self.m + 1, (N,), dtype=torch.uint8)
        self.bs = torch.randn(self.steps, self.m, N, dtype=torch.float64)

    def replicas(self) -> hta.Replicas:
        first, *others = (Bowl(x, self.A) for x in self.x)
        return hta.Replicas(first, self.m, Bowl.parts(self.labels), Bowl.parts(self.anchor), start=others)

    def optimizer(self, proposal, coupling) -> hta.CoupledOptimizer:
        return hta.CoupledOptimizer(self.replicas(), proposal, coupling)

    def gradient(self, x: Tensor, t: int) -> Tensor:
        return x @ self.A - self.bs[t - 1]


def advance(optimizer, task, start=1, stop=None):
    """Steps number `start` to `stop` of all copies, each on its own batches."""
    for bs in task.bs[start - 1 : stop]:
        optimizer.zero_grad()
        optimizer.replicas.backward(lambda net, b: net(b), *(list(bs) if task.m > 1 else [bs[0]]))
        optimizer.step()
    return optimizer


def copies_of(optimizer) -> Tensor:
    return torch.stack([flat(net.parameters()) for net in optimizer.replicas]).detach()


def anchor_of(optimizer) -> Tensor:
    return flat(optimizer.replicas.layout.views(optimizer.replicas.anchor))


def trained(task, proposal, coupling) -> tuple[Tensor, Tensor]:
    """The copies and the anchor after all of the task's steps."""
    optimizer = advance(task.optimizer(proposal, coupling), task)
    return copies_of(optimizer), anchor_of(optimizer)


def inner_of(proposal, params):
    """torch's own optimizer with the settings of a proposal; on one [m, N] parameter it is m optimizers."""
    return proposal.torch_optimizer(params, **{k: v for k, v in vars(proposal).items() if k != "maximize"})


def assert_close(actual, expected, tolerance=1e-12):
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


# ---------------------------------------------------------------------------------------- the docstrings, written out


@dataclass
class Loop:
    """A plain-PyTorch run that each reference below moves: `before` adds to the gradient, `after` follows the proposals."""

    x: Tensor  # [m, N]
    z: Tensor  # [N], the anchor or centre
    labels: Tensor
    gamma: float
    t: int = 0
    memory: dict = field(default_factory=dict)

    def due(self, coupling) -> bool:
        return self.t % coupling.every == 0

    def anchored(self) -> Tensor:
        m = len(self.x)
        free = torch.tensor([1 + (j + 1) % m for j in range(m)])[:, None]
        return ((self.labels != 0) & (self.labels != free)).double()


def quadratic_terms(x: Tensor, z: Tensor, anchored: Tensor, L: float) -> Tensor:
    """All of H but f, for m copies."""
    pairs = sum(((x[i] - x[j]) ** 2).sum() for i, j in itertools.combinations(range(len(x)), 2))
    return L * (anchored * (x - z) ** 2).sum() + pairs / L


def homotopy(loop, coupling):
    """The dense solve of the proximal problem, an m×m system for each element."""
    if not loop.due(coupling):
        return
    m, L, gamma = len(loop.x), coupling.L, loop.gamma * coupling.every
    anchored = loop.anchored()
    eye = torch.eye(m, dtype=torch.float64)
    matrix = torch.diag_embed((1 / gamma + 2 * L * anchored).T) + 2 / L * (m * eye - 1)
    loop.x[:] = torch.linalg.solve(matrix, (loop.x / gamma + 2 * L * anchored * loop.z).T).T


def explicit(loop, coupling):
    if not loop.due(coupling):
        return torch.zeros_like(loop.x)
    with torch.enable_grad():
        x = loop.x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(quadratic_terms(x, loop.z, loop.anchored(), coupling.L), x)
    return coupling.every * grad


def ema(loop, coupling):
    if loop.due(coupling):
        loop.z[:] = coupling.decay * loop.z + (1 - coupling.decay) * loop.x.mean(0)


def lookahead(loop, coupling):
    if loop.due(coupling):
        loop.z += coupling.alpha * (loop.x.mean(0) - loop.z)
        loop.x[:] = loop.z


def elastic(loop, coupling):
    if loop.due(coupling):
        pull = coupling.alpha * (loop.x - loop.z)
        loop.x -= pull
        loop.z += pull.sum(0)


def elastic_explicit(loop, coupling):
    if not loop.due(coupling):
        return torch.zeros_like(loop.x)
    pull = coupling.alpha * (loop.x - loop.z)
    loop.z += pull.sum(0)
    return pull / loop.gamma


def parle(loop, coupling):
    m, memory = len(loop.x), loop.memory
    points, averages = memory["points"], memory["averages"]
    pull = loop.gamma / coupling.scope
    loop.x[:] = (loop.x + pull * points) / (1 + pull)
    averages[:] = coupling.decay * averages + (1 - coupling.decay) * loop.x
    if loop.due(coupling):
        mean = points.sum(0) / m
        new = points - coupling.eta * (points - averages) - coupling.eta / coupling.rho * (points - mean)
        for tensor in (points, averages, loop.x):
            tensor[:] = new


def toward(loop, coupling):
    if loop.due(coupling):
        pull = loop.gamma * coupling.every * coupling.strength
        loop.x[:] = (loop.x + pull * loop.z) / (1 + pull)


def toward_explicit(loop, coupling):
    return loop.due(coupling) * coupling.every * coupling.strength * (loop.x - loop.z)


def average(loop, coupling):
    if loop.due(coupling):
        loop.x[:] = loop.x.mean(0)


def average_toward(loop, coupling):
    if loop.due(coupling):
        loop.x[:] = loop.z[:] = loop.x.mean(0)
    else:
        pull = loop.gamma * coupling.toward
        loop.x[:] = (loop.x + pull * loop.z) / (1 + pull)


@dataclass
class Case:
    make: object  # of the period
    after: object = None
    before: object = None


CASES = {
    "homotopy": Case(lambda every: hta.Homotopy(0.3, every=every), after=homotopy),
    "explicit": Case(lambda every: hta.Explicit(2.0, every=every), before=explicit),
    "EMA": Case(lambda every: hta.EMA(0.7, every=every), after=ema),
    "lookahead": Case(lambda every: hta.Lookahead(0.3, every=every), after=lookahead),
    "elastic": Case(lambda every: hta.Elastic(0.15, every=every), after=elastic),
    "elastic explicit": Case(lambda every: hta.Elastic(0.15, "explicit", every=every), before=elastic_explicit),
    "parle": Case(lambda every: hta.Parle(0.4, 2.0, 0.6, 0.7, every=every), after=parle),
    "toward": Case(lambda every: hta.Toward(0.8, every=every), after=toward),
    "toward explicit": Case(lambda every: hta.Toward(0.8, "explicit", every=every), before=toward_explicit),
    "average": Case(lambda every: hta.Average(every=every), after=average),
    "average toward": Case(lambda every: hta.Average(0.8, every=every), after=average_toward),
}


def plain(task, proposal, plan) -> tuple[Tensor, Tensor]:
    """The copies and the anchor after a plain loop; plan(t) is the (case, coupling) of step t."""
    x = nn.Parameter(task.x.clone())
    inner = inner_of(proposal, [x])
    loop = Loop(x.data, task.anchor.clone(), task.labels, proposal.step_size)
    last = None
    for t in range(1, task.steps + 1):
        case, coupling = plan(t)
        if coupling is not last:
            loop.memory, last = {"points": loop.x.clone(), "averages": loop.x.clone()}, coupling
        loop.t = t
        x.grad = task.gradient(loop.x, t)
        if case.before:
            x.grad += case.before(loop, coupling)
        inner.step()
        if case.after:
            case.after(loop, coupling)
    return loop.x, loop.z


@pytest.mark.parametrize("proposal", PROPOSALS.values(), ids=PROPOSALS)
@pytest.mark.parametrize("every", EVERY)
@pytest.mark.parametrize("m", COPIES)
@pytest.mark.parametrize("name", CASES)
def test_every_coupling_is_the_loop_that_its_docstring_tells(name, m, every, proposal):
    task, case = Task(m), CASES[name]
    coupling = case.make(every)
    for actual, expected in zip(
        trained(task, proposal, coupling), plain(task, proposal, lambda t: (case, coupling)), strict=True
    ):
        assert_close(actual, expected)


def check_changes(m, proposal, cases):
    """Each case for four steps, its period three: the clock and the momentum go on."""
    task = Task(m, steps=4 * len(cases))
    couplings = [case.make(3) for case in cases]
    optimizer = task.optimizer(proposal, couplings[0])
    for k, coupling in enumerate(couplings):
        optimizer.coupling = coupling
        assert optimizer.coupling == coupling
        advance(optimizer, task, 4 * k + 1, 4 * k + 4)
    x, z = plain(task, proposal, lambda t: (cases[(t - 1) // 4], couplings[(t - 1) // 4]))
    assert_close(copies_of(optimizer), x)
    assert_close(anchor_of(optimizer), z)


@pytest.mark.parametrize("proposal", PROPOSALS.values(), ids=PROPOSALS)
@pytest.mark.parametrize("m", COPIES)
def test_the_coupling_can_be_set_at_any_time(m, proposal):
    cases = [case for name, case in CASES.items() if name != "parle"]
    check_changes(m, proposal, [cases[i] for i in torch.randperm(len(cases))])


@pytest.mark.parametrize("proposal", PROPOSALS.values(), ids=PROPOSALS)
def test_parle_can_be_set_at_any_time_for_one_copy(proposal):
    check_changes(1, proposal, [CASES[name] for name in ("homotopy", "parle", "elastic", "parle")])


@pytest.mark.parametrize("names", [("homotopy", "parle"), ("parle", "homotopy")])
def test_parle_can_be_set_at_any_time(names):
    check_changes(3, PROPOSALS["SGD"], [CASES[name] for name in names])


def test_a_state_dict_of_parle_sets_the_coupling():
    task = Task(3)
    optimizer = advance(task.optimizer(PROPOSALS["SGD"], hta.Parle()), task, 1, 4)
    other = task.optimizer(PROPOSALS["SGD"], hta.Homotopy())
    other.load_state_dict(optimizer.state_dict())
    advance(other, task, 5, 5)


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("parle", "average toward")])
@pytest.mark.parametrize("proposal", [hta.SGD(0.05), *PROPOSALS.values()], ids=["plain SGD", *PROPOSALS])
def test_between_coupling_steps_the_copies_are_independent(name, proposal):
    task = Task(3, steps=4)
    x, z = trained(task, proposal, CASES[name].make(5))
    alone, _ = plain(task, proposal, lambda t: (Case(None), None))
    assert_close(x, alone)
    assert torch.equal(z, task.anchor)


def test_a_plan_of_learning_rates_keeps_the_period():
    for name in ("homotopy", "elastic", "average toward"):
        task = Task(2)
        lrs = torch.rand(task.steps).tolist()
        stepped, planned = (task.optimizer(hta.AdamW(), CASES[name].make(3)) for _ in range(2))
        for t, lr in enumerate(lrs, start=1):
            stepped.param_groups[0]["lr"] = lr
            advance(stepped, task, t, t)
        planned.plan(lrs)
        advance(planned, task)
        assert torch.equal(stepped.replicas.params, planned.replicas.params)


def test_hashed_labels_are_drawn_anew_at_every_step():
    """The coupling with dropout: θ̃ = 0 and other labels each time."""
    task = Task(3)
    task.anchor.zero_()
    x = nn.Parameter(task.x.clone())
    loop = Loop(x.data, task.anchor, task.labels, 0.02)
    inner = inner_of(PLAIN_SGD, [x])
    first, *others = (Bowl(row, task.A) for row in task.x)
    replicas = hta.Replicas(first, 3, "hashed", "zero", start=others)
    optimizer = hta.CoupledOptimizer(replicas, PLAIN_SGD, hta.Homotopy(0.3))
    seen = []
    for t in range(1, task.steps + 1):
        replicas.partition.resample()
        loop.t, loop.labels = t, flat(replicas.partition.by_name().values())
        seen.append(loop.labels)
        x.grad = task.gradient(loop.x, t)
        inner.step()
        homotopy(loop, optimizer.coupling)
        advance(optimizer, task, t, t)
    assert_close(copies_of(optimizer), loop.x)
    assert len({tuple(labels.tolist()) for labels in seen}) == task.steps
    assert {label for labels in seen for label in labels[:15].tolist()} == {1, 2, 3}
    assert not any(labels[15:].any() for labels in seen)  # one-dimensional parameters are coupled only


# ---------------------------------------------------------------------------------------------------------- the papers


def modules(task):
    return [Bowl(x, task.A) for x in task.x]


def torch_steps(nets, optimizers, task, t, loss=lambda net, b: net(b)):
    for net, inner, b in zip(nets, optimizers, task.bs[t - 1], strict=True):
        inner.zero_grad()
        loss(net, b).backward()
        inner.step()


def torch_average(nets):
    """The nets' mean, put into each of them."""
    for parameters in zip(*(net.parameters() for net in nets), strict=True):
        mean = torch.stack([p.detach() for p in parameters]).mean(0)
        for p in parameters:
            p.data.copy_(mean)


def rows(nets) -> Tensor:
    return torch.stack([flat(net.parameters()) for net in nets]).detach()


def gap_ratio(m, coupling, paper, at_anchor=False, lr=2e-3) -> float:
    """How much smaller the distance between our run and the paper's gets when lr is halved. SGD without momentum."""
    task = Task(m)
    if at_anchor:
        task.x[:] = task.anchor
    gaps = [(trained(task, hta.SGD(rate), coupling)[0] - paper(task, rate)).norm() for rate in (lr, lr / 2)]
    return float(gaps[0] / gaps[1])


def easgd(task, lr, alpha, every=1) -> Tensor:
    """Zhang, Choromanska, LeCun 2015, equations (5) and (6): all forces at time t."""
    x, c = task.x.clone(), task.anchor.clone()
    for t in range(1, task.steps + 1):
        elastic_force = alpha * (x - c) if t % every == 0 else torch.zeros_like(x)
        x = x - lr * task.gradient(x, t) - elastic_force
        c = c + elastic_force.sum(0)
    return torch.cat([x, c[None]])


@pytest.mark.parametrize("every", EVERY)
@pytest.mark.parametrize("m", COPIES)
def test_explicit_elastic_is_easgd(m, every):
    task = Task(m)
    x, c = trained(task, PLAIN_SGD, hta.Elastic(0.2, "explicit", every=every))
    assert_close(torch.cat([x, c[None]]), easgd(task, PLAIN_SGD.lr, 0.2, every))


@pytest.mark.parametrize("m", COPIES)
def test_implicit_elastic_is_easgd_up_to_alpha_times_lr(m):
    ratio = gap_ratio(m, hta.Elastic(0.2), lambda task, lr: easgd(task, lr, 0.2)[:m])
    assert ratio == pytest.approx(2, rel=0.1)


@pytest.mark.parametrize("proposal", PROPOSALS.values(), ids=PROPOSALS)
def test_lookahead_is_zhang_and_others_2019(proposal):
    task = Task(1)
    (fast,) = modules(task)
    slow = [part.clone() for part in Bowl.parts(task.anchor).values()]
    inner = inner_of(proposal, fast.parameters())
    for t in range(1, task.steps + 1):
        torch_steps([fast], [inner], task, t)
        if t % 5 == 0:
            for phi, theta in zip(slow, fast.parameters(), strict=True):
                phi += 0.5 * (theta.detach() - phi)
                theta.data.copy_(phi)
    x, z = trained(task, proposal, hta.Lookahead(0.5))
    assert_close(x, rows([fast]))
    assert_close(z, flat(slow))


@pytest.mark.parametrize("proposal", PROPOSALS.values(), ids=PROPOSALS)
def test_ema_is_the_mean_teacher_of_tarvainen_and_valpola_2017(proposal):
    task = Task(1)
    (student,) = modules(task)
    task.anchor = rows([student])[0]
    average = torch.optim.swa_utils.AveragedModel(student, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    average.update_parameters(student)  # the first copies
    inner = inner_of(proposal, student.parameters())
    for t in range(1, task.steps + 1):
        torch_steps([student], [inner], task, t)
        average.update_parameters(student)
    x, z = trained(task, proposal, hta.EMA(0.9))
    assert_close(x, rows([student]))
    assert_close(z, rows([average.module])[0])


@pytest.mark.parametrize("m", COPIES)
def test_parle_is_chaudhari_and_others_2017_to_first_order_in_lr(m):
    """Their equations (8a) to (8d), whose pull to the point is a gradient step."""
    scope, rho, eta, decay, every = 0.5, 2.0, 0.4, 0.75, 4

    def paper(task, lr):
        point, y, average = task.x.clone(), task.x.clone(), task.x.clone()
        for t in range(1, task.steps + 1):
            y = y - lr * (task.gradient(y, t) + (y - point) / scope)
            average = decay * average + (1 - decay) * y
            if t % every == 0:
                reference = point.mean(0)
                point = point - eta * (point - average) - eta / rho * (point - reference)
                y, average = point.clone(), point.clone()
        return y

    assert gap_ratio(m, hta.Parle(scope, rho, eta, decay, every=every), paper) == pytest.approx(4, rel=0.1)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_explicit_toward_is_a_penalty_in_the_loss(momentum):
    """L2-SP, Li, Grandvalet, Davoine 2018."""
    task = Task(2)
    nets = modules(task)
    inner = [torch.optim.SGD(net.parameters(), 0.02, momentum) for net in nets]
    for t in range(1, task.steps + 1):
        torch_steps(
            nets,
            inner,
            task,
            t,
            lambda net, b: net(b) + 0.8 / 2 * ((flat(net.parameters()) - task.anchor) ** 2).sum(),
        )
    assert_close(trained(task, hta.SGD(0.02, momentum), hta.Toward(0.8, "explicit"))[0], rows(nets))


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("mode", ["implicit", "explicit"])
def test_toward_comes_to_rest_where_loss_and_penalty_balance(mode, nesterov):
    task = Task(1, steps=600)
    task.bs[:] = task.bs[0]
    x, _ = trained(task, hta.SGD(0.05, 0.9, nesterov=nesterov), hta.Toward(0.8, mode))
    eye = torch.eye(N, dtype=torch.float64)
    assert_close(x[0], torch.linalg.solve(task.A + 0.8 * eye, task.bs[0, 0] + 0.8 * task.anchor), 1e-9)


@pytest.mark.parametrize("every", EVERY)
@pytest.mark.parametrize("m", COPIES)
def test_average_is_local_sgd(m, every):
    """McMahan and others 2017, Stich 2019: optimizers of their own, whose momenta are not averaged."""
    task = Task(m)
    nets = modules(task)
    inner = [inner_of(PROPOSALS["SGD"], net.parameters()) for net in nets]
    for t in range(1, task.steps + 1):
        torch_steps(nets, inner, task, t)
        if t % every == 0:
            torch_average(nets)
    assert_close(trained(task, PROPOSALS["SGD"], hta.Average(every=every))[0], rows(nets))


@pytest.mark.parametrize("m", COPIES)
def test_average_toward_is_fedprox_to_second_order_in_lr(m):
    """Li and others 2020: every client takes SGD steps on its loss plus (μ/2)·‖x − c‖², c the last mean.

    Their pull of a local step is, but for O(lr³), our proximal one at the end of the step before; so the step that
    averages has none of its own.
    """

    def paper(task, lr):
        nets = modules(task)
        inner = [torch.optim.SGD(net.parameters(), lr) for net in nets]
        c = task.anchor.clone()
        for t in range(1, task.steps + 1):
            torch_steps(nets, inner, task, t, lambda net, b: net(b) + 0.4 * ((flat(net.parameters()) - c) ** 2).sum())
            if t % 4 == 0:
                torch_average(nets)
                c.copy_(rows(nets)[0])
        return rows(nets)

    assert gap_ratio(m, hta.Average(0.8, every=4), paper, at_anchor=True) == pytest.approx(8, rel=0.1)


@pytest.mark.parametrize("m", [2, 3, 4])
@pytest.mark.parametrize("L", [1e-3, 0.1, 1.0, 30.0])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_homotopy_step_minimises_the_proximal_problem(m, L, momentum):
    """By autograd: at the new copies the objective's gradient vanishes."""
    task = Task(m, steps=1)
    proposals, _ = plain(task, hta.SGD(0.1, momentum), lambda t: (Case(None), None))
    x = trained(task, hta.SGD(0.1, momentum), hta.Homotopy(L))[0].requires_grad_()
    anchored = Loop(task.x, task.anchor, task.labels, 0.0).anchored()
    gamma = 0.1 / (1 - momentum)
    terms = ((x - proposals) ** 2).sum() / (2 * gamma), quadratic_terms(x, task.anchor, anchored, L)
    gradients = [torch.autograd.grad(term, x)[0] for term in terms]
    scale = max(1 / gamma, L, 1 / L)  # of what cancels
    assert sum(gradients).abs().max() < 1e-12 * scale


@pytest.mark.parametrize("m", [2, 3, 4])
@pytest.mark.parametrize("nesterov", [False, True])
def test_explicit_is_sgd_on_equation_3(m, nesterov):
    task = Task(m)
    nets = modules(task)
    anchored = Loop(task.x, task.anchor, task.labels, 0.0).anchored()
    parameters = [p for net in nets for p in net.parameters()]
    inner = torch.optim.SGD(parameters, 0.02, 0.9, weight_decay=0.05, nesterov=nesterov)
    for bs in task.bs:
        inner.zero_grad()
        x = torch.stack([flat(net.parameters()) for net in nets])
        losses = sum(net(b) for net, b in zip(nets, bs, strict=True))
        (losses + quadratic_terms(x, task.anchor, anchored, 0.7)).backward()
        inner.step()
    x, _ = trained(task, hta.SGD(0.02, 0.9, 0.05, nesterov), hta.Explicit(0.7))
    assert_close(x, rows(nets))


# ---------------------------------------------------------------------------------------------------- where steps rest


class Vector(nn.Module):
    def __init__(self, x):
        super().__init__()
        self.x = nn.Parameter(torch.as_tensor(x).clone())


def at_rest(A, b, anchor, labels, m, L, nesterov, steps=1000) -> np.ndarray:
    """The copies after HomotopySGD has come to rest on f(x) = ½·xᵀAx − bᵀx."""
    A, b, n = torch.as_tensor(A), torch.as_tensor(b), len(b)
    nets = [Vector(torch.randn(n, dtype=torch.float64)) for _ in range(m)]
    replicas = hta.Replicas(nets[0], m, {"x": labels}, {"x": torch.as_tensor(anchor)}, start=nets[1:])
    optimizer = hta.HomotopySGD(replicas, 0.1, 0.9, nesterov=nesterov, L=L)
    x, grads = replicas.params[:, :n], replicas.grads[:, :n]
    for _ in range(steps):
        torch.sub(x @ A, b, out=grads)
        optimizer.step()
    return x.numpy()


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("L", [1.0, 0.1, 0.01])
@pytest.mark.parametrize("m", COPIES)
def test_steps_come_to_rest_on_the_exact_minimiser(m, L, nesterov, seed):
    A, b, anchor = random_quadratic(8, seed)
    labels = torch.randperm(8).remainder(m + 1).byte()
    free = np.array([1 + (j + 1) % m for j in range(m)])[:, None]
    anchored = ((labels.numpy() != 0) & (labels.numpy() != free)).astype(np.float64)
    exact = exact_minimiser(A, b, QuadraticTerms(anchored, anchor), L)
    np.testing.assert_allclose(at_rest(A, b, anchor, labels, m, L, nesterov), exact, rtol=0, atol=1e-9)


def test_three_trained_copies_are_where_the_path_tracker_is(seed):
    A, b, anchor = random_quadratic(9, seed)
    blocks = np.arange(9) % 3
    Ls = [1.0, 0.3, 0.1]
    result = hta.path.track(
        (lambda x: 0.5 * x @ A @ x - b @ x, lambda x: A @ x - b),
        anchor,
        Ls,
        anchor,
        copies=3,
        blocks=blocks,
        tolerance=1e-10,
    )
    for point in result.per_L:
        labels = torch.from_numpy(blocks + 1).byte()
        trained_copies = at_rest(A, b, anchor, labels, 3, point.L, nesterov=False)
        np.testing.assert_allclose(trained_copies, point.x, rtol=0, atol=1e-8)


# ---------------------------------------------------------------------------------------------------------- the tables


def direct_table(L: float, gamma: float, anchored: list[bool]) -> Tensor:
    """One label's dense m×(m+1) table, in closed form."""
    m = len(anchored)
    q, r = L / (L + 2 * gamma), 2 * gamma / (L + 2 * gamma)
    alpha = torch.tensor([2 * gamma * L if a else 0.0 for a in anchored], dtype=torch.float64)
    W = 1 / (q * (1 + alpha) + m * r)
    D = (W * (1 + alpha)).sum() / m
    copies = W[:, None] * (q * torch.eye(m, dtype=torch.float64) + r * W[None] / D)
    anchor = W * (q * alpha + r * (W * alpha).sum() / D)
    return torch.cat([copies, anchor[:, None]], 1)


@pytest.mark.parametrize("m", range(1, 9))
@pytest.mark.parametrize("L", [0.0, 1e-6, 0.01, 0.5, 1.0, 10.0, 100.0])
def test_the_table_is_the_direct_formula(m, L):
    gamma = float(torch.rand(())) + 1e-3
    table = hta.tables.implicit(L, gamma, m)
    assert table.shape == (m + 1, m, m + 1)
    for label, ours in enumerate(table):
        anchored = [label not in (0, 1 + (j + 1) % m) for j in range(m)]
        assert (ours - direct_table(L, gamma, anchored)).abs().max() <= 4e-16


@pytest.mark.parametrize("m", range(1, 9))
@pytest.mark.parametrize("L", [0.0, 1e-300, 1e-6, 0.01, 1.0, 1e6, 1e308, math.inf])
@pytest.mark.parametrize("gamma", [1e-8, 0.1, 1e3])
def test_the_tables_rows_are_weighted_means(m, L, gamma):
    table = hta.tables.implicit(L, gamma, m)
    assert (table >= 0).all()
    assert (table.sum(-1) - 1).abs().max() < 4e-15


@pytest.mark.parametrize("m", range(1, 9))
def test_the_table_at_L_zero_is_the_merge(m):
    merge = torch.tensor([1 / m] * m + [0.0], dtype=torch.float64)
    assert torch.equal(hta.tables.implicit(0.0, 0.1, m), merge.expand(m + 1, m, m + 1))


@pytest.mark.parametrize("m", range(1, 9))
def test_the_table_at_L_infinite_decouples(m):
    for label, table in enumerate(hta.tables.implicit(math.inf, 0.1, m)):
        for j, row in enumerate(table):
            anchored = label not in (0, 1 + (j + 1) % m)
            assert row.tolist() == [float(i == (m if anchored else j)) for i in range(m + 1)]


@pytest.mark.parametrize("m", range(1, 9))
@pytest.mark.parametrize("L", [0.0, 0.02, 3.0, math.inf])
def test_the_table_is_homotopys_rules_multiplied_out(m, L):
    gamma = 0.3
    a, anchor = torch.randn(m, dtype=torch.float64), torch.randn((), dtype=torch.float64)
    for rules, table in zip(hta.Homotopy(L).rules(m, gamma), hta.tables.implicit(L, gamma, m), strict=True):
        read, keep, share, pull, _ = rules[:m].unbind(-1)
        x = keep * a + share * (read * a).sum() + pull * anchor
        assert (x - table @ torch.cat([a, anchor[None]])).abs().max() < 1e-14


# --------------------------------------------------------------------------------------------------------------- state


def resumed(task, proposal, optimizer):
    """A new optimizer that has only been handed the state_dicts of another, by way of a file."""
    file = io.BytesIO()
    torch.save({"replicas": optimizer.replicas.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    coupling = hta.Parle() if isinstance(optimizer.coupling, hta.Parle) else hta.Homotopy(0.5)
    other = task.optimizer(type(proposal)(lr=1.0), coupling)
    other.replicas.params.normal_()
    other.replicas.anchor.normal_()
    other.replicas.load_state_dict(saved["replicas"])
    other.load_state_dict(saved["optimizer"])
    return other


def copied(task, proposal, optimizer):
    return copy.deepcopy((optimizer.replicas, optimizer))[1]


def pickled(task, proposal, optimizer):
    replicas, again = pickle.loads(pickle.dumps((optimizer.replicas, optimizer)))
    assert again.replicas is replicas
    return again


@pytest.mark.parametrize("again", [resumed, copied, pickled])
@pytest.mark.parametrize("proposal", PROPOSALS.values(), ids=PROPOSALS)
@pytest.mark.parametrize("name", CASES)
def test_a_run_goes_on_with_the_same_bits(name, proposal, again):
    task = Task(3)
    optimizer = advance(task.optimizer(proposal, CASES[name].make(3)), task, 1, 4)
    other = again(task, proposal, optimizer)
    assert other.coupling == optimizer.coupling
    assert other.steps == optimizer.steps == 4
    for one in (optimizer, other):
        advance(one, task, 5)
    assert torch.equal(copies_of(other), copies_of(optimizer))
    assert torch.equal(anchor_of(other), anchor_of(optimizer))


def test_the_state_dict_holds_the_couplings_settings_and_the_clock():
    task = Task(2)
    optimizer = advance(task.optimizer(hta.AdamW(), hta.Parle(0.4, 2.0, every=3)), task, 1, 4)
    saved = optimizer.state_dict()
    (group,) = saved["param_groups"]
    assert {"coupling": "Parle", "scope": 0.4, "rho": 2.0, "every": 3, "steps": 4}.items() <= group.items()
    assert {"point", "average", "exp_avg", "exp_avg_sq", "step"} == set(saved["state"][0])


def test_parles_points_are_saved_without_momentum_too():
    task = Task(3)
    optimizer = advance(task.optimizer(PLAIN_SGD, CASES["parle"].make(3)), task, 1, 4)
    other = resumed(task, PLAIN_SGD, optimizer)
    for one in (optimizer, other):
        advance(one, task, 5)
    assert torch.equal(copies_of(other), copies_of(optimizer))


def test_parles_points_are_saved_after_a_change_of_coupling():
    task = Task(1)
    optimizer = advance(task.optimizer(PROPOSALS["SGD"], hta.Homotopy(1.0)), task, 1, 2)
    optimizer.coupling = CASES["parle"].make(3)
    advance(optimizer, task, 3, 4)
    other = resumed(task, PROPOSALS["SGD"], optimizer)
    for one in (optimizer, other):
        advance(one, task, 5)
    assert torch.equal(copies_of(other), copies_of(optimizer))


def test_parles_steps_cannot_be_planned():
    optimizer = hta.CoupledOptimizer(hta.Replicas(torch.nn.Linear(3, 2), 2, {}), hta.SGD(0.02), hta.Parle())
    with pytest.raises(ValueError, match="plan cannot hold Parle's steps"):
        optimizer.plan([0.02] * 4)


def test_parles_distance_is_in_the_statistics():
    task = Task(3)
    optimizer = advance(task.optimizer(PROPOSALS["SGD"], hta.Parle()), task)
    assert optimizer.stats.distance == pytest.approx(optimizer.replicas.distance())


def test_one_bad_gradient_skips_a_whole_step_of_parle():
    task = Task(2)
    optimizer = advance(task.optimizer(PROPOSALS["SGD"], hta.Parle()), task, 1, 2)
    before = optimizer.replicas.params.clone()
    optimizer.replicas.grads.normal_()
    optimizer.replicas.theta.b.grad[3] = math.nan
    optimizer.step()
    assert torch.equal(optimizer.replicas.params, before)


@pytest.mark.parametrize("name", [name for name in CASES if name != "parle"])
def test_one_bad_gradient_skips_a_whole_step(name):
    task = Task(3)
    optimizer = advance(task.optimizer(PROPOSALS["AdamW"], CASES[name].make(1)), task, 1, 2)
    before = optimizer.replicas.params.clone(), optimizer.replicas.anchor.clone()
    optimizer.replicas.grads.normal_()
    optimizer.replicas.copies[1].b.grad[3] = math.nan
    optimizer.step()
    assert torch.equal(optimizer.replicas.params, before[0])
    assert torch.equal(optimizer.replicas.anchor, before[1])
    assert optimizer.stats.skipped == 1
    assert optimizer.steps == 3


# -------------------------------------------------------------------------------------------------------- bad settings

NONSENSE = [
    (hta.Homotopy, {"L": -1.0}, "L"),
    (hta.Homotopy, {"L": math.nan}, "L"),
    (hta.Explicit, {"L": 0.0}, "L"),
    (hta.Explicit, {"L": math.inf}, "L"),
    (hta.Explicit, {"L": math.nan}, "L"),
    (hta.EMA, {"decay": 1.1}, "decay"),
    (hta.EMA, {"decay": -0.1}, "decay"),
    (hta.Lookahead, {"alpha": 1.5}, "alpha"),
    (hta.Lookahead, {"alpha": math.nan}, "alpha"),
    (hta.Elastic, {"alpha": -0.1}, "alpha"),
    (hta.Elastic, {"mode": "sideways"}, "mode"),
    (hta.Parle, {"scope": 0.0}, "scope"),
    (hta.Parle, {"scope": math.inf}, "scope"),
    (hta.Parle, {"rho": -1.0}, "rho"),
    (hta.Parle, {"eta": 1.5}, "eta"),
    (hta.Parle, {"decay": math.nan}, "decay"),
    (hta.Toward, {"strength": -1.0}, "strength"),
    (hta.Toward, {"strength": math.inf}, "strength"),
    (hta.Toward, {"mode": "Explicit"}, "mode"),
    (hta.Average, {"toward": -1.0}, "toward"),
    (hta.Average, {"toward": math.nan}, "toward"),
    *(
        (case, {"every": every}, "every")
        for case in (hta.Average, hta.Homotopy, hta.Parle)
        for every in (0, -1, 1.5, "2")
    ),
]


@pytest.mark.parametrize(("coupling", "settings", "name"), NONSENSE)
def test_bad_settings_are_named(coupling, settings, name):
    with pytest.raises(ValueError, match=f"^{name} must"):
        coupling(**settings)


@pytest.mark.parametrize(("coupling", "settings", "name"), NONSENSE)
def test_bad_settings_of_a_group_are_named(coupling, settings, name):
    with pytest.raises(ValueError, match=f"^{name} must"):
        hta.CoupledOptimizer(Task(2).replicas(), PLAIN_SGD, coupling(), groups=[{"params": ["b"], **settings}])


@pytest.mark.parametrize(("settings", "name"), [({"eta": 0.0}, "eta"), ({"decay": 1.0}, "decay")])
def test_the_ends_of_parles_ranges_are_refused(settings, name):
    with pytest.raises(ValueError, match=f"^{name} must"):
        hta.Parle(**settings)


def test_an_elastic_pull_that_overshoots_is_refused_where_the_copies_are_known():
    with pytest.raises(ValueError, match="^alpha must be at most 1/copies = 0.333"):
        Task(3).optimizer(PLAIN_SGD, hta.Elastic(0.4))
    optimizer = Task(3).optimizer(PLAIN_SGD, hta.Elastic(0.3))
    with pytest.raises(ValueError, match="^alpha must be at most"):
        optimizer.coupling = hta.Elastic(0.4)
    assert optimizer.coupling == hta.Elastic(0.3)


@pytest.mark.parametrize(
    "coupling", [hta.EMA(), hta.Lookahead(), hta.Elastic(), hta.Average(0.1)], ids=lambda c: type(c).__name__
)
def test_a_coupling_that_moves_the_anchor_needs_one(coupling):
    first, *others = modules(Task(3))
    replicas = hta.Replicas(first, 3, {}, "zero", start=others)
    with pytest.raises(ValueError, match=f"^coupling {type(coupling).__name__} moves the anchor"):
        hta.CoupledOptimizer(replicas, PLAIN_SGD, coupling)
    x = torch.randn(3, 5)
    with pytest.raises(ValueError, match="^anchor must be a tensor"):
        hta.coupled_step_(x, x.clone(), None, None, proposal=PLAIN_SGD, coupling=coupling)


@pytest.mark.parametrize("taken", ["momentum", "lr", "betas", "params", "steps", "initial_lr"])
def test_a_field_that_param_groups_have_already_is_refused(taken):
    fields = [(taken, float, field(default=0.0))]
    own = make_dataclass("Own", fields, bases=(hta.couplings.Coupling,), frozen=True)()
    task = Task(2)
    with pytest.raises(ValueError, match=f"^coupling Own must not have a field '{taken}'"):
        task.optimizer(PLAIN_SGD, own)
    optimizer = task.optimizer(PLAIN_SGD, hta.EMA())
    before = dict(optimizer.param_groups[0])
    with pytest.raises(ValueError, match=f"^coupling Own must not have a field '{taken}'"):
        optimizer.coupling = own
    assert optimizer.param_groups[0] == before


def test_a_group_that_averages_toward_nothing_leaves_its_anchor():
    replicas = hta.Replicas(nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1)), partition={})
    name = replicas.layout.names[0]
    optimizer = hta.CoupledOptimizer(
        replicas, PLAIN_SGD, hta.Average(every=2), groups=[{"params": [name], "toward": 1.0}]
    )
    start = replicas.anchor.clone()
    for _ in range(4):
        replicas.grads.normal_()
        optimizer.step()
    moved = replicas.layout.views(replicas.anchor != start)
    assert moved[0].all()
    assert not any(view.any() for view in moved[1:])


def test_what_is_no_coupling_is_refused():
    with pytest.raises(TypeError, match="^coupling must be one of Homotopy, "):
        Task(2).optimizer(PLAIN_SGD, "homotopy")
    x = torch.randn(2, 5)
    with pytest.raises(ValueError, match="^coupling must not be Parle"):
        hta.coupled_step_(x, x.clone(), None, None, proposal=PLAIN_SGD, coupling=hta.Parle())


def test_the_tables_keep_their_digits_in_float32():
    for L in (1e-6, 1e-3, 1.0, 100.0):
        table = hta.tables.implicit(L, 0.05)
        x = torch.randn(1000, 3)
        error = (x @ table.float().view(6, 3).T).double() - x.double() @ table.view(6, 3).T
        assert error.abs().max() < 1e-6


@pytest.mark.parametrize(("L", "lr", "name"), [(-1, 0.1, "L"), (math.nan, 0.1, "L"), (1, 0, "lr"), (1, math.inf, "lr")])
def test_a_table_of_nonsense_is_named(L, lr, name):
    with pytest.raises(ValueError, match=f"^{name} must"):
        hta.tables.implicit(L, lr)


def test_a_learning_rate_of_zero_on_the_way_changes_nothing():
    """Schedulers pass through 0; the optimizer then leaves the copies where they are."""
    copies = torch.randn(3, 50, dtype=torch.float64)
    before = copies.clone()
    hta.coupled_step_(copies, torch.randn_like(copies), None, None, proposal=hta.SGD(0.0), coupling=hta.Homotopy(0.01))
    assert torch.equal(copies, before)


@pytest.mark.parametrize("proposal", [hta.SGD, hta.AdamW])
@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("lr", [0.0, 1e-21, 1e-300, 5e-324])
def test_an_explicit_pull_without_a_step_to_make_it_leaves_the_centre_too(proposal, every, lr):
    task = Task(2)
    optimizer = task.optimizer(proposal(lr), hta.Elastic(0.1, "explicit", every=every))
    optimizer.replicas.float()
    before = optimizer.replicas.params.clone(), optimizer.replicas.anchor.clone()
    for _ in range(2):
        optimizer.step()
    torch.testing.assert_close((optimizer.replicas.params, optimizer.replicas.anchor), before, rtol=1e-6, atol=1e-6)
    assert optimizer.stats.distance > 0
    optimizer.param_groups[0]["lr"] = 1e-6
    for _ in range(2):
        optimizer.step()
    assert not torch.allclose(optimizer.replicas.anchor, before[1])
    if proposal is hta.SGD:
        assert not torch.allclose(optimizer.replicas.params, before[0])


@pytest.mark.parametrize("coupling", [hta.Homotopy(0.1), hta.Explicit(1.0), hta.Toward(0.1), hta.Toward(0.1, "explicit"),
                                      hta.Average(0.1, every=100), hta.Parle(every=100)], ids=str)  # fmt: skip
@pytest.mark.parametrize("lr", [0.0, 1e-21, 5e-324])
def test_pulls_by_the_step_size_vanish_with_it(coupling, lr):
    optimizer = Task(2).optimizer(hta.SGD(lr), coupling)
    optimizer.replicas.float()
    before = optimizer.replicas.params.clone(), optimizer.replicas.anchor.clone()
    optimizer.step()
    torch.testing.assert_close((optimizer.replicas.params, optimizer.replicas.anchor), before, rtol=1e-6, atol=1e-6)


def test_a_period_is_a_whole_number_of_any_kind():
    assert type(hta.Lookahead(every=np.int64(5)).every) is int
    for wrong in (np.float64(5), True, 0, 2.0, 10**400, "5"):
        with pytest.raises(ValueError, match="every must be a whole number of steps"):
            hta.Lookahead(every=wrong)


@pytest.mark.parametrize("eps", [1e-46, 1e-40])
def test_an_eps_that_the_arithmetic_takes_for_zero_is_refused(eps):
    x = torch.ones(1, 4)
    with pytest.raises(ValueError, match="eps must be at least 1.18e-38 in torch.float32"):
        hta.coupled_step_(
            x, torch.zeros(1, 4), [torch.zeros(1, 4)] * 2, None, proposal=hta.AdamW(eps=eps), coupling=hta.Average()
        )
    with pytest.raises(ValueError, match="eps must be at least"):
        hta.CoupledOptimizer(hta.Replicas(torch.nn.Linear(2, 2), 1, {}), hta.AdamW(eps=eps), hta.Average())
    hta.CoupledOptimizer(hta.Replicas(torch.nn.Linear(2, 2).double(), 1, {}), hta.AdamW(eps=eps), hta.Average())
