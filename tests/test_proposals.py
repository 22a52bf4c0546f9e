"""Proposals: one copy that nothing pulls at is torch's own optimizer, to the last option and through its state_dict."""

import copy
import io
import itertools
import math
from dataclasses import fields

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hta_fused as hta

NOTHING = (hta.Homotopy(L=math.inf), hta.Average(every=10**9))  # on elements of label 0
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
SGD_OPTIONS = [
    {"momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay, "maximize": maximize}
    for momentum, nesterov, weight_decay, maximize in itertools.product(
        (0.0, 0.9), (False, True), (0.0, 0.02), (False, True)
    )
    if momentum or not nesterov
]
ADAMW_OPTIONS = [
    {"betas": betas, "eps": eps, "weight_decay": weight_decay, "maximize": maximize}
    for betas, eps, weight_decay, maximize in itertools.product(
        ((0.9, 0.999), (0.0, 0.9), (0.6, 0.8)), (1e-8, 1e-3), (0.0, 0.1), (False, True)
    )
]
OPTIONS = [(hta.SGD, options) for options in SGD_OPTIONS] + [(hta.AdamW, options) for options in ADAMW_OPTIONS]
BOTH = [hta.SGD(0.05, 0.9, 1e-3, nesterov=True), hta.AdamW(0.02, (0.8, 0.95), 1e-6, 0.05)]


def network(dtype=torch.float64):
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.LayerNorm(9), nn.Linear(9, 4)).to(dtype)


def batch(dtype=torch.float64, n=12):
    return torch.randn(n, 6, dtype=dtype), torch.randint(0, 4, (n,))


def loss(net, data):
    x, y = data
    return F.cross_entropy(net(x), y)


def twin_of(proposal, params):
    """torch's own optimizer with the settings of a proposal."""
    settings = {field.name: getattr(proposal, field.name) for field in fields(proposal)}
    return proposal.torch_optimizer(params, **settings)


def step(optimizer, net, data):
    optimizer.zero_grad()
    loss(net, data).backward()
    optimizer.step()


def steps(optimizer, count, twins=(), theirs=(), dtype=torch.float64):
    """Steps of all copies, each on a batch of its own, and of torch's optimizers over the twins on the same batches."""
    copies = optimizer.replicas.copies
    for _ in range(count):
        batches = [batch(dtype) for _ in copies]
        optimizer.zero_grad()
        optimizer.replicas.backward(loss, *batches)
        optimizer.step()
        for net, their, data in zip(twins, theirs, batches, strict=bool(twins)):
            step(their, net, data)


def error(net, twin):
    """The largest relative error of a parameter, over its largest element."""
    pairs = zip(net.parameters(), twin.parameters(), strict=True)
    return max(float(((a - b).abs().max() / b.abs().max()).detach()) for a, b in pairs)


# --------------------------------------------------------------------------------------------- one copy, many copies


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("proposal", "options"), OPTIONS)
def test_one_copy_that_nothing_pulls_at_is_torchs_optimizer(proposal, options, dtype):
    """Under gradients that do not depend on where it is, so that rounding is not amplified."""
    for coupling in NOTHING:
        model = network(dtype)
        twin = copy.deepcopy(model)
        optimizer = hta.CoupledOptimizer(hta.Replicas(model, 1, {}), proposal(lr=0.01, **options), coupling)
        theirs = optimizer.proposal.torch_optimizer(twin.parameters(), lr=0.01, **options)
        for _ in range(50):
            for p, q in zip(model.parameters(), twin.parameters(), strict=True):
                q.grad = torch.randn_like(q)
                p.grad.copy_(q.grad)
            optimizer.step()
            theirs.step()
        assert error(model, twin) < TOLERANCE[dtype]


@pytest.mark.parametrize("coupling", NOTHING)
@pytest.mark.parametrize("proposal", BOTH)
@pytest.mark.parametrize("m", [2, 3, 5])
def test_decoupled_copies_are_as_many_torch_optimizers(m, proposal, coupling):
    replicas = hta.Replicas(network(), m, {}, start="independent")
    twins = [copy.deepcopy(net) for net in replicas]
    theirs = [twin_of(proposal, twin.parameters()) for twin in twins]
    steps(hta.CoupledOptimizer(replicas, proposal, coupling), 12, twins, theirs)
    assert max(error(net, twin) for net, twin in zip(replicas, twins, strict=True)) < 1e-12


GROUPS = {
    hta.SGD: (
        {"momentum": 0.5, "weight_decay": 0.1},
        [{"lr": 0.02, "momentum": 0.9, "nesterov": True}, {"momentum": 0.0, "maximize": True}],
    ),
    hta.AdamW: (
        {"betas": (0.8, 0.9), "weight_decay": 0.1},
        [{"lr": 0.02, "betas": (0.5, 0.99)}, {"eps": 1e-2, "weight_decay": 0.0, "maximize": True}],
    ),
}


@pytest.mark.parametrize("proposal", GROUPS)
def test_parameter_groups_have_settings_of_their_own(proposal):
    defaults, (first, second) = GROUPS[proposal]
    model = network()
    twin = copy.deepcopy(model)
    names = ("0.bias", "3.weight"), ("2.weight",)
    groups = [{"params": list(part), **settings} for part, settings in zip(names, (first, second), strict=True)]
    optimizer = hta.CoupledOptimizer(
        hta.Replicas(model, 1, {}), proposal(lr=0.01, **defaults), NOTHING[0], groups=groups
    )
    theirs = dict(twin.named_parameters())
    rest = [p for name, p in theirs.items() if name not in sum(names, ())]
    torch_groups = [{**group, "params": [theirs[name] for name in group["params"]]} for group in groups]
    torch_optimizer = optimizer.proposal.torch_optimizer([{"params": rest}, *torch_groups], lr=0.01, **defaults)
    steps(optimizer, 20, [twin], [torch_optimizer])
    assert error(model, twin) < 1e-12


SCHEDULERS = {
    "step": lambda o: torch.optim.lr_scheduler.StepLR(o, 4, 0.5),
    "cosine to zero": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 8),
    "from zero": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda t: min(1.0, t / 4)),
    "one cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.05, total_steps=15, cycle_momentum=True),
}


@pytest.mark.parametrize("make", SCHEDULERS.values(), ids=SCHEDULERS)
@pytest.mark.parametrize("proposal", BOTH)
def test_learning_rate_schedulers_drive_both_alike(proposal, make):
    model = network()
    twin = copy.deepcopy(model)
    optimizer = hta.CoupledOptimizer(hta.Replicas(model, 1, {}), proposal, NOTHING[0])
    theirs = twin_of(proposal, twin.parameters())
    schedulers = make(optimizer), make(theirs)
    for _ in range(12):
        steps(optimizer, 1, [twin], [theirs])
        for scheduler in schedulers:
            scheduler.step()
        assert optimizer.param_groups[0]["lr"] == theirs.param_groups[0]["lr"]
    assert error(model, twin) < 1e-12


def test_a_momentum_that_is_set_later_is_used():
    model = network()
    twin = copy.deepcopy(model)
    optimizer = hta.CoupledOptimizer(hta.Replicas(model, 1, {}), hta.SGD(0.05), NOTHING[0])
    theirs = torch.optim.SGD(twin.parameters(), 0.05)
    optimizer.param_groups[0]["momentum"] = theirs.param_groups[0]["momentum"] = 0.9
    steps(optimizer, 5, [twin], [theirs])
    assert error(model, twin) < 1e-12


# --------------------------------------------------------------------------------------------------------- state_dicts


def grouped(proposal, m, **options):
    """An optimizer of m decoupled copies whose biases are a group of their own."""
    groups = [{"params": lambda name: name.endswith("bias"), "lr": 0.01, "weight_decay": 0.0}]
    replicas = hta.Replicas(network(), m, {}, start="independent")
    return hta.CoupledOptimizer(replicas, proposal, NOTHING[0], groups=groups, **options)


def torchs_twin(optimizer, j):
    """A copy of copy j, and torch's optimizer over it with the same groups at other settings."""
    twin = copy.deepcopy(optimizer.replicas.copies[j])
    named = list(twin.named_parameters())
    groups = [[p for name, p in named if name.endswith("bias") == biases] for biases in (False, True)]
    return twin, optimizer.proposal.torch_optimizer([{"params": group} for group in groups], lr=1.0)


@pytest.mark.parametrize("proposal", [*BOTH, hta.SGD(0.05)])
def test_torchs_optimizer_goes_on_from_any_copys_state(proposal):
    optimizer = grouped(proposal, 3)
    steps(optimizer, 4)
    twins, theirs = zip(*(torchs_twin(optimizer, j) for j in range(3)), strict=True)
    for j, their in enumerate(theirs):
        their.load_state_dict(optimizer.torch_state_dict(j))
    steps(optimizer, 6, twins, theirs)
    assert max(error(net, twin) for net, twin in zip(optimizer.replicas, twins, strict=True)) < 1e-12


@pytest.mark.parametrize("proposal", [*BOTH, hta.SGD(0.05)])
def test_the_copies_go_on_from_torchs_states(proposal):
    other = grouped(proposal, 3)
    twins, theirs = zip(*(torchs_twin(other, j) for j in range(3)), strict=True)
    for twin, their in zip(twins, theirs, strict=True):
        for group in their.param_groups:
            group["lr"] = 0.03
        for _ in range(4):
            step(their, twin, batch())
    replicas = hta.Replicas(copy.deepcopy(twins[0]), 3, {}, start=[copy.deepcopy(twin) for twin in twins[1:]])
    groups = [{"params": lambda name: name.endswith("bias")}]
    optimizer = hta.CoupledOptimizer(replicas, type(proposal)(lr=0.5), NOTHING[0], groups=groups)
    for j, their in enumerate(theirs):
        optimizer.load_torch_state_dict(j, their.state_dict())
    steps(optimizer, 6, twins, theirs)
    assert max(error(net, twin) for net, twin in zip(replicas, twins, strict=True)) < 1e-12


def test_a_group_with_a_momentum_of_its_own_is_in_torchs_state():
    model = network()
    groups = [{"params": ["0.weight"], "momentum": 0.9}]
    optimizer = hta.CoupledOptimizer(hta.Replicas(model, 1, {}), hta.SGD(0.05), NOTHING[0], groups=groups)
    steps(optimizer, 4)
    twin = copy.deepcopy(model)
    weight, *rest = twin.parameters()
    theirs = torch.optim.SGD([{"params": rest}, {"params": [weight]}], lr=1.0)
    theirs.load_state_dict(optimizer.torch_state_dict(0))
    steps(optimizer, 4, [twin], [theirs])
    assert error(model, twin) < 1e-12


@pytest.mark.parametrize("proposal", BOTH)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_saved_run_goes_on_with_the_same_bits(proposal, dtype):
    coupling = hta.Elastic(0.2, every=3)
    replicas = hta.Replicas(network(dtype), 3, {}, start="independent")
    optimizer = hta.CoupledOptimizer(replicas, proposal, coupling)
    steps(optimizer, 4, dtype=dtype)
    file = io.BytesIO()
    torch.save({"replicas": replicas.state_dict(), "optimizer": optimizer.state_dict()}, file)
    seed = torch.random.get_rng_state()
    steps(optimizer, 5, dtype=dtype)

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = hta.Replicas(network(dtype), 3, {}, anchor="random")
    other = hta.CoupledOptimizer(resumed, type(proposal)(lr=1.0), hta.Elastic(0.1))
    resumed.load_state_dict(saved["replicas"])
    other.load_state_dict(saved["optimizer"])
    assert other.steps == 4
    torch.random.set_rng_state(seed)
    steps(other, 5, dtype=dtype)
    assert torch.equal(resumed.params, replicas.params)
    assert torch.equal(resumed.anchor, replicas.anchor)


# ------------------------------------------------------------------------------------------------------- coupled_step_


class Single(nn.Module):
    """A model of one parameter."""

    def __init__(self, value):
        super().__init__()
        self.x = nn.Parameter(value.clone())


FUNCTIONAL = [
    hta.Homotopy(0.3, every=2),
    hta.Explicit(2.0, every=2),
    hta.EMA(0.8),
    hta.Lookahead(0.4, every=3),
    hta.Elastic(0.2, every=2),
    hta.Elastic(0.2, "explicit"),
    hta.Toward(0.7),
    hta.Toward(0.7, "explicit", every=2),
    hta.Average(every=2),
    hta.Average(0.6, every=3),
]


@pytest.mark.parametrize("coupling", FUNCTIONAL, ids=repr)
@pytest.mark.parametrize("proposal", [*BOTH, hta.SGD(0.05)])
@pytest.mark.parametrize("shape", [(), (7,), (3, 5), (2, 3, 4), (1025,)])
@pytest.mark.parametrize("form", ["list", "tensor"])
def test_coupled_step_is_the_optimizers_step(form, shape, proposal, coupling):
    m = int(torch.randint(1, 5, ()))
    starts = [torch.randn(shape) for _ in range(m)]
    labels = torch.randint(0, m + 1, shape, dtype=torch.uint8)
    models = [Single(start) for start in starts]
    anchor = torch.randn(shape)
    replicas = hta.Replicas(models[0], m, {"x": labels}, {"x": anchor}, start=models[1:])
    optimizer = hta.CoupledOptimizer(replicas, proposal, coupling)
    copies = [start.clone() for start in starts]
    states = [[torch.zeros_like(row) for row in copies] for _ in proposal.buffers]
    if form == "tensor":
        copies, states = torch.stack(copies), [torch.stack(rows) for rows in states]
    for t in range(1, 8):
        grads = [torch.randn(shape) for _ in range(m)]
        for net, grad in zip(replicas, grads, strict=True):
            net.x.grad.copy_(grad)
        optimizer.step()
        hta.coupled_step_(
            copies,
            grads if form == "list" else torch.stack(grads),
            states,
            anchor,
            labels,
            proposal=proposal,
            coupling=coupling,
            step=t,
        )
    for row, net in zip(copies, replicas, strict=True):
        assert torch.equal(row, net.x)
    assert torch.equal(anchor, replicas.layout.views(replicas.anchor)[0])


def test_coupled_step_takes_betas_as_a_list_as_torch_does():
    x, g = torch.randn(2, 5), torch.randn(2, 5)
    states = [torch.zeros(2, 5), torch.zeros(2, 5)]
    hta.coupled_step_(x, g, states, None, proposal=hta.AdamW(betas=[0.9, 0.99]), coupling=hta.Homotopy(1.0))


def test_coupled_step_follows_a_learning_rate_that_is_a_tensor():
    x, rate = torch.zeros(1, 5), torch.tensor(0.25)
    proposal = hta.SGD(rate)
    for lr in (0.25, 0.5):
        rate.fill_(lr)
        hta.coupled_step_(x, torch.ones(1, 5), None, None, proposal=proposal, coupling=hta.Toward(0.0))
    assert torch.equal(x, torch.full((1, 5), -0.75))


# -------------------------------------------------------------------------------------------------------- bad settings

NONSENSE = [
    (hta.SGD, {"lr": -1.0}, "lr"),
    (hta.SGD, {"lr": math.nan}, "lr"),
    (hta.SGD, {"lr": math.inf}, "lr"),
    (hta.SGD, {"lr": 0.1, "momentum": 1.0}, "momentum"),
    (hta.SGD, {"lr": 0.1, "momentum": -0.1}, "momentum"),
    (hta.SGD, {"lr": 0.1, "momentum": math.nan}, "momentum"),
    (hta.SGD, {"lr": 0.1, "weight_decay": -0.1}, "weight_decay"),
    (hta.SGD, {"lr": 0.1, "weight_decay": math.inf}, "weight_decay"),
    (hta.SGD, {"lr": 0.1, "nesterov": True}, "nesterov"),
    (hta.AdamW, {"lr": -1.0}, "lr"),
    (hta.AdamW, {"lr": math.nan}, "lr"),
    (hta.AdamW, {"betas": (0.9, 1.0)}, "betas"),
    (hta.AdamW, {"betas": (-0.1, 0.9)}, "betas"),
    (hta.AdamW, {"betas": (0.9,)}, "betas"),
    (hta.AdamW, {"betas": (0.9, math.nan)}, "betas"),
    (hta.AdamW, {"eps": -1e-8}, "eps"),
    (hta.AdamW, {"eps": math.nan}, "eps"),
    (hta.AdamW, {"weight_decay": -0.1}, "weight_decay"),
]


@pytest.mark.parametrize(("proposal", "settings", "name"), NONSENSE)
def test_bad_settings_are_named(proposal, settings, name):
    with pytest.raises(ValueError, match=f"^{name} "):
        proposal(**settings)


@pytest.mark.parametrize(("proposal", "settings", "name"), NONSENSE)
def test_bad_settings_of_a_group_are_named(proposal, settings, name):
    replicas = hta.Replicas(network(), 1, {})
    with pytest.raises(ValueError, match=f"^{name} "):
        hta.CoupledOptimizer(replicas, proposal(lr=0.1), NOTHING[0], groups=[{"params": ["0.bias"], **settings}])


@pytest.mark.parametrize("proposal", [hta.SGD(0.1, 0.9), hta.AdamW()])
def test_missing_buffers_are_named(proposal):
    x = torch.randn(2, 5)
    for states in (None, [], [[x[0], x[1]]] * 3):
        with pytest.raises(ValueError, match="^(states|momentum_buffer) must hold"):
            hta.coupled_step_(x, x.clone(), states, None, proposal=proposal, coupling=hta.Homotopy(1.0))
