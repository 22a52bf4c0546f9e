"""What is changed between steps: settings of groups, plans, what is loaded, copied or moved. Nothing of it is lost silently."""

import copy
import io
import pickle
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

import hta_fused as hta


def optimizer_of(coupling=None, proposal=None, groups=(), copies=2, **options):
    torch.manual_seed(0)
    replicas = hta.Replicas(nn.Linear(4, 4), copies, {}, start=[nn.Linear(4, 4) for _ in range(copies - 1)])
    return hta.CoupledOptimizer(
        replicas, proposal or hta.SGD(0.1), coupling or hta.Homotopy(0.1), groups=groups, **options
    )


def step(optimizer, gradient=1.0):
    for row in optimizer.replicas.grads:
        for view in optimizer.replicas.layout.views(row):
            view.fill_(gradient)
    optimizer.step()


BIAS = [{"params": ["bias"], "lr": 0.01}]


# --------------------------------------------------------------------------------------------------------------- groups


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_coupling_and_L_are_assigned_to_all_groups(count):
    optimizer = optimizer_of(hta.Homotopy(1.0), groups=[{"params": ["bias"]}, {"params": ["weight"]}][: count - 1])
    optimizer.L = 0.5
    assert [group["L"] for group in optimizer.param_groups] == [0.5] * len(optimizer.param_groups)
    step(optimizer)
    optimizer.coupling = hta.Elastic(0.2)
    assert all(group["coupling"] == "Elastic" and "L" not in group for group in optimizer.param_groups)
    step(optimizer)
    optimizer.coupling = hta.Homotopy(0.0)
    step(optimizer)
    assert optimizer.replicas.distance() == 0


def test_L_leaves_the_groups_other_settings_and_is_checked_for_all_first():
    optimizer = optimizer_of(hta.Homotopy(1.0), groups=[{"params": ["bias"], "every": 3}])
    optimizer.L = 0.5
    assert [group["every"] for group in optimizer.param_groups] == [1, 3]
    with pytest.raises(ValueError, match="L must be in"):
        optimizer.L = -1.0
    assert [group["L"] for group in optimizer.param_groups] == [0.5, 0.5]


@pytest.mark.parametrize(("name", "value"), [("eta", 0.4), ("rho", 9.0), ("every", 3)])
def test_parles_points_move_alike_in_all_groups(name, value):
    coupling = hta.Parle(scope=1.0, eta=0.1, every=2)
    with pytest.raises(ValueError, match=f"{name} of Parle must be the same in all param_groups, got "):
        optimizer_of(coupling, groups=[{"params": ["bias"], name: value}])
    optimizer = optimizer_of(coupling, groups=BIAS)
    state = copy.deepcopy(optimizer.state_dict())
    state["param_groups"][1][name] = value
    state["param_groups"][0]["lr"] = 0.7
    with pytest.raises(ValueError, match=f"{name} of Parle must be the same"):
        optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["lr"] == 0.1
    step(optimizer)


def test_the_penalty_is_that_of_equation_3_or_unknown():
    L = 2.0
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    replicas = hta.Replicas(model, start="independent")
    optimizer = hta.CoupledOptimizer(replicas, hta.SGD(0.1), hta.Homotopy(L, every=2))
    labels = replicas.partition.flat()
    for number in range(1, 5):
        replicas.zero_grad()
        optimizer.step()
        theta, eta = replicas.params.double()
        anchored = sum(
            ((x - replicas.anchor) ** 2 * (labels == block)).sum() for x, block in ((theta, 1), (eta, 2))
        )  # label 1 is anchored in θ, 2 in η
        expected = L * anchored + (theta - eta).square().sum() / L
        if number % 2:
            assert optimizer.stats.penalty != optimizer.stats.penalty
        else:
            assert optimizer.stats.penalty == pytest.approx(float(expected), rel=1e-6)
    optimizer = hta.HomotopySGD(replicas, 0.1, L=L, groups=[{"params": ["1.weight"], "L": 0.1}])
    optimizer.step()
    assert optimizer.stats.penalty != optimizer.stats.penalty


def test_betas_edited_in_place_count():
    edited, made = (optimizer_of(proposal=hta.AdamW(0.1, betas)) for betas in ((0.9, 0.999), (0.5, 0.999)))
    edited.param_groups[0]["betas"] = [0.9, 0.999]
    edited.refresh()
    edited.param_groups[0]["betas"][0] = 0.5
    for number in range(3):
        for optimizer in (edited, made):
            step(optimizer, 1.0 - number)
    assert torch.equal(edited.replicas.params, made.replicas.params)


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64, np.int64])
def test_numpys_numbers_are_pythons(kind):
    value = kind(0.25 if kind is not np.int64 else 1)
    adam, sgd = hta.AdamW(value, weight_decay=value), hta.SGD(value, weight_decay=value)
    couplings = hta.Homotopy(value), hta.Explicit(value)
    numbers = (adam.lr, adam.weight_decay, sgd.lr, sgd.weight_decay, *(coupling.L for coupling in couplings))
    assert {type(x) for x in numbers} == {float}
    assert adam.numbers(1) == hta.AdamW(float(value), weight_decay=float(value)).numbers(1)


@pytest.mark.parametrize("proposal", [hta.SGD(0.1, 0.9), hta.AdamW(0.1)])
@pytest.mark.parametrize("state_format", ["full", "8bit"])
def test_state_dicts_hold_no_numbers_of_numpys(proposal, state_format):
    coupling = hta.Elastic(np.float64(0.1), np.str_("implicit"), every=np.int64(2))
    optimizer = optimizer_of(coupling, proposal, [{"params": ["bias"], "weight_decay": np.float64(0.01)}],
                             state_format=np.str_(state_format))  # fmt: skip
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: np.geomspace(1, 0.1, 3)[min(epoch, 2)])
    if isinstance(proposal, hta.AdamW):
        optimizer.param_groups[0]["betas"] = (np.float64(0.9), np.float32(0.5))
    step(optimizer)
    schedule.step()
    assert type(optimizer.param_groups[0]["lr"]) is np.float64
    for state in (optimizer.state_dict(), optimizer.torch_state_dict(0)):
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=True)
        assert loaded["param_groups"] == state["param_groups"]
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.coupling = hta.Homotopy(1.0)
    for value in (np.geomspace(1, 0.1, 3)[1], np.float32(0.5), 1, torch.tensor(0.5)):
        optimizer.L = value
        assert type(optimizer.L) is float
        assert float(value) == optimizer.L


def test_betas_in_tensors_that_are_filled_count():
    edited, made = (optimizer_of(proposal=hta.AdamW(0.1, betas)) for betas in ((0.9, 0.5), (0.1, 0.5)))
    first = torch.tensor(0.9, dtype=torch.float64)
    edited.param_groups[0]["betas"] = (first, torch.tensor(0.5))
    edited.refresh()
    first.fill_(0.1)
    for number in range(3):
        for optimizer in (edited, made):
            step(optimizer, 1.0 - number)
    assert torch.equal(edited.replicas.params, made.replicas.params)
    edited.plan([0.1] * 2)
    first.fill_(0.2)
    with pytest.raises(RuntimeError, match="must not change between planned steps"):
        step(edited)


@pytest.mark.parametrize(("of", "name", "value"), [("optimizer", "state_format", "8bit"),
                         ("replicas", "master_format", "split"), ("replicas", "anchor_format", "bfloat16"),
                         ("replicas", "compute_dtype", torch.bfloat16), ("replicas", "partition", None),
                         ("optimizer", "proposal", None), ("optimizer", "replicas", None)])  # fmt: skip
def test_what_is_settled_when_made_cannot_be_assigned(of, name, value):
    optimizer = optimizer_of()
    owner = optimizer if of == "optimizer" else optimizer.replicas
    was = getattr(owner, name)
    with pytest.raises(AttributeError):
        setattr(owner, name, value)
    assert getattr(copy.deepcopy(owner), name) == was or value is None


def test_values_at_takes_settings_only():
    optimizer = optimizer_of(hta.Elastic(0.1, every=2))
    assert not torch.equal(optimizer.values_at(lr=9.0, alpha=0.2), optimizer.values_at())
    for name in ("lR", "nonsense", "L", "betas", "params", "steps"):
        with pytest.raises(ValueError, match=f"changed must name settings, lr, .*, every.*, got '{name}'"):
            optimizer.values_at(lr=0.1, **{name: 1.0})


@dataclass(frozen=True)
class Steady(hta.couplings.Coupling):
    """Of one's own, with a setting that has no default."""

    strength: float
    mode: str = "implicit"

    def _rules(self, copies, step_size):
        return hta.Toward(self.strength, self.mode)._rules(copies, step_size)


class EMA(hta.Toward):
    """Of one's own, with the name of one of ours."""


@pytest.mark.parametrize("coupling", [Steady(0.5, every=2), EMA(0.5, "explicit")])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_a_coupling_of_ones_own_is_copied_and_loaded(coupling, copied):
    optimizer, other = (optimizer_of(coupling, hta.AdamW(0.1)) for _ in range(2))
    for number in range(3):
        step(optimizer, 1.0 - number)
    twin = copied(optimizer)
    other.param_groups[0]["strength"] = 0.0
    other.load_state_dict(optimizer.state_dict())
    other.replicas.load_state_dict(optimizer.replicas.state_dict())
    bare = copy.deepcopy(optimizer.state_dict())
    for group in bare["param_groups"]:
        for name in ("coupling", "strength", "mode", "every"):
            del group[name]
    other.load_state_dict(bare)  # as torch's own
    for each in (optimizer, twin, other):
        step(each, 0.5)
        assert each.coupling == coupling
        assert torch.equal(each.replicas.params, optimizer.replicas.params)
    stranger = optimizer_of()
    state = optimizer.state_dict()
    state["param_groups"][0]["coupling"] = "Steady"
    with pytest.raises(ValueError, match="state_dict's coupling must be one of Homotopy, .*, got 'Steady'"):
        stranger.load_state_dict(state)


@pytest.mark.parametrize("capturable", [False, True])
def test_an_assignment_that_raises_changes_nothing(capturable):
    optimizer = optimizer_of(hta.Explicit(1.0), capturable=capturable)
    step(optimizer)
    before = copy.deepcopy(optimizer.state_dict()["param_groups"])
    for coupling in (
        hta.Explicit(1e-38),
        hta.Explicit(1e-38, every=5),
        hta.Toward(1e300, "explicit"),
        hta.Elastic(0.6),
    ):
        with pytest.raises(ValueError, match="must (give numbers of at most|be at most 1/copies)"):
            optimizer.coupling = coupling
    for L in (1e-38, 0.0) if capturable else (0.0,):
        with pytest.raises(ValueError, match="must (give numbers of at most|be positive)"):
            optimizer.L = L
    assert optimizer.state_dict()["param_groups"] == before
    step(optimizer)
    for coupling in (hta.Explicit(1e-38), hta.Explicit(1e-38, every=5)):
        with pytest.raises(ValueError, match="must give numbers of at most"):
            optimizer_of(coupling)


@pytest.mark.parametrize("state_format", ["full", "bfloat16", "8bit"])
@pytest.mark.parametrize("way", ["steps", "plans"])
def test_a_momentum_that_begins_beside_another_begins_at_zero_as_torchs_does(state_format, way):
    ours = optimizer_of(hta.Average(every=100), hta.SGD(0.1, 0.9), [{"params": ["bias"], "momentum": 0.0}], 1,
                        state_format=state_format)  # fmt: skip
    net = copy.deepcopy(ours.replicas.theta)
    theirs = torch.optim.SGD([{"params": [net.weight]}, {"params": [net.bias], "momentum": 0.0}], 0.1, 0.9)
    for number in range(6):
        if number == 3:
            for optimizer in (ours, theirs):
                optimizer.param_groups[1]["momentum"] = 0.9
        if way == "plans":
            ours.plan([0.1])
        step(ours, 1.0)
        net.weight.grad, net.bias.grad = torch.ones(4, 4), torch.ones(4)
        theirs.step()
    error = 1e-6 if state_format == "full" else 2e-2
    torch.testing.assert_close(ours.replicas.theta.bias, net.bias, rtol=error, atol=error)


def test_a_momentum_that_was_assigned_as_it_begins_counts():
    one, other = (optimizer_of(hta.Average(every=100), hta.SGD(0.1, 0.9), [{"params": ["bias"], "momentum": 0.0}])
                  for _ in range(2))  # fmt: skip
    for optimizer in (one, other):
        step(optimizer)
        optimizer.param_groups[1]["momentum"] = 0.9
    one.state[one.replicas.theta.bias]["momentum_buffer"] = torch.ones(4)
    before = one.replicas.params.clone()
    step(one)
    step(other)
    moved = before[0] - one.replicas.params[0], before[0] - other.replicas.params[0]
    views = [one.replicas.layout.views(of)[one.replicas.layout.names.index("bias")] for of in moved]
    torch.testing.assert_close(views, [torch.full((4,), 0.19), torch.full((4,), 0.1)])


# ---------------------------------------------------------------------------------------------------------------- plans


def test_a_plan_follows_what_was_set_before_it():
    stepped, planned = (optimizer_of(hta.Average(every=100)) for _ in range(2))
    for optimizer in (stepped, planned):
        optimizer.param_groups[0]["momentum"] = 0.9
    planned.plan([0.1] * 3)
    for _ in range(3):
        step(stepped)
        step(planned)
    assert torch.equal(stepped.replicas.params, planned.replicas.params)
    for optimizer in (stepped, planned):
        for net in optimizer.replicas:
            net.bias.requires_grad_(False)
    planned.plan([0.1] * 3)
    for _ in range(3):
        step(stepped)
        step(planned)
    assert torch.equal(stepped.replicas.params, planned.replicas.params)


CHANGES = {
    "L": lambda o: setattr(o, "L", 0.0),
    "coupling": lambda o: setattr(o, "coupling", hta.Explicit(10.0)),
    "Parle": lambda o: setattr(o, "coupling", hta.Parle()),
    "momentum": lambda o: o.param_groups[0].update(momentum=0.5),
    "frozen": lambda o: [net.bias.requires_grad_(False) for net in o.replicas],
}


@pytest.mark.parametrize("what", CHANGES)
def test_what_is_changed_between_planned_steps_is_refused(what):
    optimizer = optimizer_of(hta.Homotopy(10.0))
    optimizer.plan([0.1] * 5)
    step(optimizer)
    CHANGES[what](optimizer)
    before = optimizer.replicas.params.clone()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="between planned steps; plan again"):
            step(optimizer)
    assert torch.equal(optimizer.replicas.params, before)
    if what != "Parle":
        optimizer.plan([0.1] * 5, start=1)
        step(optimizer)


@pytest.mark.parametrize("frozen", [False, True])
def test_a_plan_that_raises_leaves_the_one_in_force(frozen):
    planned, other = (optimizer_of(hta.Homotopy(10.0)) for _ in range(2))
    for optimizer in (planned, other):
        optimizer.plan([0.1, 0.2, 0.3])
        step(optimizer)
    for lrs in ([0.1, 1e308], [-1.0], []):
        with pytest.raises(ValueError, match="lr"):
            planned.plan(lrs)
    planned.param_groups[0]["momentum"] = 2.0
    with pytest.raises(ValueError, match="momentum"):
        planned.plan([0.1])
    planned.param_groups[0]["momentum"] = 0.0
    for optimizer in (planned, other):
        step(optimizer)
    assert planned.steps == 2
    assert torch.equal(planned.replicas.params, other.replicas.params)
    if frozen:
        for net in planned.replicas:
            net.bias.requires_grad_(False)
        with pytest.raises(ValueError, match="lr=1e\\+308"):
            planned.plan([1e308])
        for _ in range(2):
            with pytest.raises(RuntimeError, match="between planned steps; plan again"):
                step(planned)
        planned.plan([0.1])
        copied = copy.deepcopy(planned)
        for optimizer in (planned, copied):
            step(optimizer)
        assert torch.equal(planned.replicas.params, copied.replicas.params)


def test_a_plan_that_follows_a_move_has_its_digits():
    planned, other = (optimizer_of(hta.Homotopy(10.0)) for _ in range(2))
    planned.plan([0.1])
    for optimizer in (planned, other):
        optimizer.replicas.double()
    planned.plan([0.1])
    for optimizer in (planned, other):
        step(optimizer)
    assert torch.equal(planned.replicas.params, other.replicas.params)


@pytest.mark.parametrize(
    ("coupling", "planned"), [(hta.Homotopy(1.0), False), (hta.Homotopy(1.0), True), (hta.Parle(every=2), False)]
)
def test_a_step_that_no_backend_serves_is_not_counted(coupling, planned):
    replicas = hta.Replicas(nn.Linear(4, 4).half(), 2, {})
    optimizer = hta.CoupledOptimizer(replicas, hta.AdamW(0.1), coupling)
    twin = copy.deepcopy(optimizer)
    if planned:
        for each in (optimizer, twin):
            each.plan([0.1, 0.2])
    hta.use_backend("cpu")
    try:
        for _ in range(2):
            with pytest.raises(TypeError, match="backend 'cpu' cannot serve"):
                step(optimizer)
    finally:
        hta.use_backend(None)
    assert optimizer.steps == 0
    for _ in range(2):
        for each in (optimizer, twin):
            step(each)
    assert optimizer.steps == 2
    assert torch.equal(replicas.params, twin.replicas.params)


def test_a_plan_ends_with_a_word():
    optimizer = optimizer_of()
    optimizer.plan([0.1])
    step(optimizer)
    with pytest.raises(RuntimeError, match="a plan of 1 steps has been taken to its end; plan again"):
        step(optimizer)
    assert optimizer.steps == 1


@pytest.mark.parametrize("proposal", [hta.SGD(0.1, 0.9), hta.AdamW(0.1)])
def test_a_plan_outlives_edits_of_state_and_copies(proposal):
    stepped, planned = (optimizer_of(hta.Average(every=100), proposal) for _ in range(2))
    planned.plan([0.01, 0.02, 0.03, 0.04])
    for number, lr in enumerate([0.01, 0.02, 0.03, 0.04]):
        stepped.param_groups[0]["lr"] = lr
        for optimizer in (stepped, planned):
            if number == 2:
                name = proposal.all_buffers[0]
                optimizer.state[optimizer.replicas.trained[0][0]][name] = torch.ones(4, 4)
            step(optimizer)
        if number == 0:
            planned = copy.deepcopy(planned)
    assert planned.steps == 4
    assert torch.equal(stepped.replicas.params, planned.replicas.params)


# ------------------------------------------------------------------------------------------------- what is loaded, copied


@pytest.mark.parametrize("steps", [float("nan"), float("inf"), -3, 2.5, 2**70, "3"])
@pytest.mark.parametrize("proposal", [hta.SGD(0.1, 0.9), hta.AdamW(0.1)])
def test_a_state_dict_of_impossible_steps_changes_nothing(proposal, steps):
    optimizer = optimizer_of(proposal=proposal)
    state = copy.deepcopy(optimizer.state_dict())
    for group in state["param_groups"]:
        group |= {"steps": steps, "lr": 0.5}
    with pytest.raises((ValueError, TypeError), match="^steps must be (a|below)"):
        optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["lr"] == 0.1
    step(optimizer)


def test_a_state_dict_of_impossible_steps_of_parameters_changes_nothing():
    optimizer = optimizer_of(proposal=hta.AdamW(0.1))
    state = copy.deepcopy(optimizer.state_dict())
    for entry in state["state"].values():
        entry["step"] = torch.tensor(1e30)
    with pytest.raises(ValueError, match=r"state_dict's step must be below 2\^53, got 1e\+30"):
        optimizer.load_state_dict(state)
    step(optimizer)


def test_steps_beyond_float32s_whole_numbers_are_kept():
    steps = 2**24 + 2
    optimizer = optimizer_of(hta.EMA(every=3), hta.AdamW(0.1, (0.9, 0.999999)))
    step(optimizer)
    optimizer._set_steps(steps)
    step(optimizer)  # 2^24 + 3, which float32 does not hold
    other, torchs = (optimizer_of(hta.EMA(every=3), hta.AdamW(0.1)) for _ in range(2))
    other.load_state_dict(optimizer.state_dict())
    torchs._set_steps(steps + 1)
    torchs.load_torch_state_dict(0, optimizer.torch_state_dict(0))
    twins = [copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer)), other, torchs]
    first = optimizer.replicas.trained[0][0]
    optimizer.state[first]["exp_avg"] = optimizer.state[first]["exp_avg"].clone()  # an edit of something else
    step(optimizer)
    assert optimizer.steps == steps + 2
    assert [twin.steps for twin in twins] == [steps + 1] * 4
    for wanted in (5, 2**25, steps + 3):  # an edit of the step
        for twin in twins[:3]:
            for entry in twin.state.values():
                entry["step"] = wanted
            twin.state_dict()
            step(twin)
            assert twin.steps == wanted + 1
    twin.state[twin.replicas.trained[0][0]]["step"].fill_(7)
    step(twin)
    assert twin.steps == 8


def test_a_state_dict_of_several_modes_changes_nothing():
    optimizer = optimizer_of(hta.Elastic(0.1), groups=BIAS)
    state = copy.deepcopy(optimizer.state_dict())
    state["param_groups"][1]["mode"] = "explicit"
    with pytest.raises(ValueError, match="mode must be the same in all state_dict's param_groups"):
        optimizer.load_state_dict(state)
    step(optimizer)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda p: torch.optim.AdamW(p, 0.1, amsgrad=True), "amsgrad"),
        (lambda p: torch.optim.Adam(p, 0.1, weight_decay=0.1), "torch.optim.Adam, not of AdamW"),
    ],
)
def test_what_torchs_optimizers_have_and_ours_do_not_is_refused_by_either_way_in(made, message):
    optimizer = optimizer_of(proposal=hta.AdamW(0.1))
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(made(list(optimizer.replicas.parameters())).state_dict())
    with pytest.raises(ValueError, match=message):
        optimizer.load_torch_state_dict(0, made(optimizer.replicas.theta.parameters()).state_dict())


def test_a_learning_rate_in_a_tensor_is_not_shared_with_where_it_came_from():
    optimizer, net = optimizer_of(), nn.Linear(4, 4)
    theirs = torch.optim.SGD(net.parameters(), torch.tensor(0.1))
    optimizer.load_torch_state_dict(0, theirs.state_dict())
    optimizer.param_groups[0]["lr"].fill_(0.5)
    assert float(theirs.param_groups[0]["lr"]) == pytest.approx(0.1)


def test_states_in_bytes_that_were_assigned_are_in_the_next_state_dict():
    optimizer = optimizer_of(proposal=hta.SGD(0.1, 0.9), state_format="8bit")
    step(optimizer)
    optimizer.state[optimizer.replicas.trained[0][0]]["momentum_buffer"] = torch.full((4, 4), 3.0)
    held = optimizer.state_dict()["state"][0]["momentum_buffer"]
    assert torch.equal(held, torch.full((4, 4), 3.0))


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)

    def forward(self, x):  # norms in float32, as autocast has them on a GPU
        return self.norm(self.linear(x.to(self.linear.weight.dtype)).float())


@pytest.mark.parametrize("master_format", ["full", "split"])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_a_copy_between_backward_and_step_has_all_gradients(master_format, copied):
    replicas = hta.Replicas(Normed(), 2, {}, compute_dtype=torch.bfloat16, master_format=master_format)
    optimizer = hta.HomotopySGD(replicas, 0.1, L=float("inf"))
    x = torch.randn(16, 4)
    replicas.backward(lambda net: (net(x) * x).sum())
    twin = copied(optimizer)
    for each in (optimizer, twin):
        each.step()
    assert torch.equal(optimizer.replicas.params, twin.replicas.params)
    assert not torch.equal(replicas.theta.norm.bias, torch.zeros(4))


def test_a_copy_has_gradients_that_were_put_elsewhere():
    optimizer = optimizer_of()
    for net in optimizer.replicas:
        net.zero_grad()
        net(torch.ones(3, 4)).sum().backward()
    twin = copy.deepcopy(optimizer)
    for each in (optimizer, twin):
        each.step()
    assert torch.equal(optimizer.replicas.params, twin.replicas.params)


def test_rebind_keeps_a_norms_gradient():
    replicas = hta.Replicas(Normed(), 1, {}, compute_dtype=torch.bfloat16)
    optimizer = hta.HomotopySGD(replicas, 0.1)
    x = torch.randn(16, 4)
    replicas.backward(lambda net: (net(x) * x).sum())
    old = replicas.theta.norm.bias
    replicas.theta.norm.bias = nn.Parameter(old.detach().clone())
    replicas.theta.norm.bias.grad = old.grad
    gradient = old.grad.clone()
    replicas.rebind()
    optimizer.step()
    torch.testing.assert_close(replicas.theta.norm.bias.detach(), -0.1 * gradient, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("moved", [False, True])
def test_a_scaler_sees_a_norms_gradient_overflow_in_float16(moved):
    replicas = hta.Replicas(Normed(), 2, {}, compute_dtype=torch.float16)
    optimizer = hta.HomotopySGD(replicas, 0.01, L=float("inf"))
    if moved:
        for net in replicas:
            net.norm.requires_grad_(False)
        optimizer = copy.deepcopy(optimizer)
        replicas = optimizer.replicas
        for net in replicas:
            net.norm.requires_grad_(True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    x = torch.randn(64, 4)
    for _ in range(8):
        optimizer.zero_grad()
        replicas.backward(lambda net: (net(x) * 0.5).sum(), scale=scaler.scale)  # norm.bias's gradient is 32
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 2.0**10  # 32 times that is in float16's range
    assert optimizer.stats.skipped == 2
    torch.testing.assert_close(replicas.theta.norm.bias.detach(), torch.full((4,), -0.01 * 32 * 6))


# ----------------------------------------------------------------------------------------------------- labels, buffers


@pytest.mark.parametrize(("blocks", "copies"), [(2, 4), (1, 2), (2, 3)])
def test_hashed_labels_are_of_as_many_blocks_as_copies(blocks, copies):
    net = nn.Linear(64, 64, bias=False)
    partition = hta.Partition.hashed(net, blocks=blocks)
    message = f"partition must have as many hashed blocks as there are copies, {copies}, got {blocks}"
    with pytest.raises(ValueError, match=message):
        hta.Replicas(net, copies, partition)
    x, g = torch.randn(2, copies, 4096)
    with pytest.raises(ValueError, match=message):
        hta.coupled_step_(x, g, None, torch.zeros(4096), partition, proposal=hta.SGD(0.1), coupling=hta.Homotopy())


class Buffers(nn.Linear):
    def __init__(self):
        super().__init__(4, 4)
        self.register_buffer("mask", torch.full((4, 4), torch.finfo(torch.float32).min).triu(1))
        self.register_buffer("frequencies", 1 / 10000 ** (torch.arange(0, 64, 2) / 64))
        self.register_buffer("eighths", torch.ones(4).to(torch.float8_e4m3fn))
        self.register_buffer("seen", torch.zeros(2, dtype=torch.bfloat16))


@pytest.mark.parametrize("copies", [1, 2, 3])
def test_merging_leaves_buffers_that_are_equal_and_takes_the_mean_of_others(copies):
    replicas = hta.Replicas(Buffers(), copies, {})
    for number, net in enumerate(replicas):
        net.seen.fill_(number)
    merged = replicas.merge()
    for name in ("mask", "frequencies"):
        assert torch.equal(getattr(merged, name), getattr(replicas.theta, name))
    assert torch.equal(merged.eighths.float(), torch.ones(4))
    assert merged.seen.tolist() == [(copies - 1) / 2] * 2


class Extra(nn.Linear):
    def __init__(self):
        super().__init__(4, 4)
        self.settings = {"a": 1}

    def get_extra_state(self):
        return self.settings

    def set_extra_state(self, state):
        self.settings = state


def test_a_modules_extra_state_goes_there_and_back():
    replicas = hta.Replicas(Extra(), 2, {})
    state = replicas.state_dict()
    state["copies.1._extra_state"] = {"a": 2}
    replicas.load_state_dict(state)
    assert [net.settings["a"] for net in replicas] == [1, 2]


@pytest.mark.parametrize(
    "entry",
    [
        np.zeros((4, 4)),
        torch.zeros(4, 4).to_sparse(),
        torch.zeros(4, 4).to_sparse_csr(),
        torch.quantize_per_tensor(torch.zeros(4, 4), 1.0, 0, torch.qint8),
        None,
    ],
)
def test_an_entry_that_is_no_dense_tensor_changes_nothing(entry):
    replicas = hta.Replicas(nn.Linear(4, 4), 2, {})
    state = {k: v if k == "_extra_state" else torch.zeros_like(v) for k, v in replicas.state_dict().items()}
    state["copies.1.weight"] = entry
    before = replicas.params.clone()
    with pytest.raises(RuntimeError, match=r"'copies\.1\.weight' must be a dense tensor in state_dict, got") as caught:
        replicas.load_state_dict(state)
    assert len(str(caught.value).splitlines()) == 1
    assert torch.equal(replicas.params, before)


def test_an_anchor_in_bfloat16_stays_so():
    replicas = hta.Replicas(nn.Linear(4, 4), 2, {}, anchor_format="bfloat16")
    optimizer = hta.HomotopySGD(replicas, 0.1)
    optimizer.step()
    anchor = replicas.anchor
    replicas.float()
    assert replicas.anchor is anchor
    optimizer.step()
    for move in ("double", "half"):
        with pytest.raises(TypeError, match=r"dtype of Replicas must stay torch.float32 with anchor_format='bfloat16'"):
            getattr(replicas, move)()
        assert replicas.theta.weight.dtype == torch.float32
        optimizer.step()
