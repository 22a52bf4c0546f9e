"""HomotopySGD as an optimizer of the ecosystem, and as the homotopy."""

import copy
import io
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from conftest import relative_error
from torch import nn

import hta_fused as hta
from hta_fused import optim


def network():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.Flatten(), nn.Linear(16 * 16, 5))


def task(n=16):
    x, y = torch.randn(n, 3, 8, 8), torch.randint(0, 5, (n,))
    return lambda net: F.cross_entropy(net(x.to(net[0].weight.dtype)), y)


def run(optimizer, loss, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        optimizer.replicas.backward(loss)
        optimizer.step()


def run_sgd(optimizer, net, loss):
    optimizer.zero_grad()
    loss(net).backward()
    optimizer.step()


def test_decoupled_free_copies_are_two_torch_sgds():
    model = network().double()  # in float32 rounding may carry an activation over ReLU's kink
    twins = [copy.deepcopy(model) for _ in range(2)]
    replicas = hta.Replicas(model, 2, {"0.bias": 0}, "zero")
    ours = hta.HomotopySGD(replicas, 0.05, 0.9, 1e-3, nesterov=True, L=math.inf)
    theirs = [torch.optim.SGD(t.parameters(), 0.05, 0.9, weight_decay=1e-3, nesterov=True) for t in twins]
    losses = [task(), task()]
    for _ in range(6):
        ours.zero_grad()
        for net, loss in zip(replicas, losses, strict=True):
            loss(net).backward()
        ours.step()
        for twin, loss, optimizer in zip(twins, losses, theirs, strict=True):
            run_sgd(optimizer, twin, loss)
    for net, twin in zip(replicas, twins, strict=True):
        for a, b in zip(net.parameters(), twin.parameters(), strict=True):
            assert relative_error(a.detach(), b.detach()) < 1e-10


def test_the_copies_come_together_as_L_falls_and_merge_at_zero():
    replicas = hta.Replicas(network(), start="independent")
    optimizer = hta.HomotopySGD(replicas, lr=0.05, momentum=0.9, L=1.0)
    loss, distances = task(), []
    for L in (1.0, 0.1, 0.01, 1e-3):
        optimizer.L = L
        run(optimizer, loss, 20)
        distances.append(optimizer.stats.distance)
    assert distances == sorted(distances, reverse=True)
    optimizer.L = 0.0
    run(optimizer, loss, 1)
    assert torch.equal(replicas.params[0], replicas.params[1])
    assert optimizer.stats == (0.0, 0.0, 0)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_implicit_steps_are_stable_at_the_papers_L(momentum):
    """Where plain SGD on H diverges, which the explicit mode shows beside it."""
    start = network()
    loss = task()
    finals = {}
    for mode in ("implicit", "explicit"):
        replicas = hta.Replicas(copy.deepcopy(start), start="independent")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer = hta.HomotopySGD(replicas, lr=0.05, momentum=momentum, L=0.005, mode=mode)
            run(optimizer, loss, 30)
        finals[mode] = replicas.loss(loss).item()
    assert finals["implicit"] < 2 * math.log(5)
    assert not finals["explicit"] < 100


def test_explicit_mode_warns_once_where_it_diverges():
    optimizer = hta.HomotopySGD(hta.Replicas(network()), lr=0.05, momentum=0.9, L=0.01, mode="explicit")
    with pytest.warns(UserWarning, match="explicit steps diverge here: lr·4/L = 20 exceeds 3.8"):
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.L = 0.009
        optimizer.step()
        hta.HomotopySGD(hta.Replicas(network()), lr=0.005, momentum=0.9, L=0.01, mode="explicit").step()


def test_stats_describe_the_state_after_the_step():
    replicas = hta.Replicas(network(), start="independent")
    optimizer = hta.HomotopySGD(replicas, lr=0.05, L=0.3)
    assert math.isnan(optimizer.stats.penalty)
    run(optimizer, task(), 2)
    expected = hta.homotopy_penalty(
        replicas.params[0].double(), replicas.params[1].double(), replicas.anchor.double(), replicas.partition, 0.3
    )
    assert optimizer.stats.penalty == pytest.approx(float(expected), rel=1e-6)
    assert optimizer.stats.distance == pytest.approx(replicas.distance(), rel=1e-6)


def test_a_bad_gradient_skips_the_step_and_is_counted():
    replicas = hta.Replicas(network())
    optimizer = hta.HomotopySGD(replicas, lr=0.05, momentum=0.9, L=0.1)
    run(optimizer, task(), 2)
    before = replicas.params.clone(), {k: v["momentum_buffer"].clone() for k, v in optimizer.state.items()}
    optimizer.zero_grad()
    replicas.backward(task())
    replicas.eta[0].weight.grad[0, 0, 0, 0] = math.inf
    optimizer.step()
    assert torch.equal(replicas.params, before[0])
    assert all(torch.equal(optimizer.state[k]["momentum_buffer"], v) for k, v in before[1].items())
    assert optimizer.stats.skipped == 1


def test_param_groups_have_their_own_settings():
    model = network()
    twin = copy.deepcopy(model)
    replicas = hta.Replicas(model, 2, {"0.weight": 0}, "zero")
    optimizer = hta.HomotopySGD(replicas, lr=0.1, momentum=0.9, weight_decay=0.1, L=math.inf,
                                groups=[{"params": lambda n: n.endswith("bias"), "weight_decay": 0.0, "lr": 0.02},
                                        {"params": ["4.weight"], "momentum": 0.0}])  # fmt: skip
    names = dict(twin.named_parameters())
    biases = [p for n, p in names.items() if n.endswith("bias")]
    sgd = torch.optim.SGD(
        [{"params": [names["0.weight"], names["2.weight"]]}, {"params": biases, "weight_decay": 0.0, "lr": 0.02},
         {"params": [names["4.weight"]], "momentum": 0.0}], lr=0.1, momentum=0.9, weight_decay=0.1)  # fmt: skip
    loss = task()
    for _ in range(4):
        run(optimizer, loss, 1)
        run_sgd(sgd, twin, loss)
    for (name, a), b in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert relative_error(a.detach(), b.detach()) < 1e-5, name
    assert [len(g["params"]) for g in optimizer.param_groups] == [4, 6, 2]


def test_groups_hold_for_mixed_and_random_labels():
    model = network()
    plain, grouped = (hta.Replicas(copy.deepcopy(model), 2, hta.Partition.random(model)) for _ in range(2))
    one = hta.HomotopySGD(plain, lr=0.1, L=0.1)
    two = hta.HomotopySGD(grouped, lr=0.1, L=0.1, groups=[{"params": ["2.weight"]}])
    loss = task()
    run(one, loss, 3)
    run(two, loss, 3)
    assert torch.equal(plain.params, grouped.params)


@pytest.mark.parametrize(
    "make",
    [
        lambda o: torch.optim.lr_scheduler.StepLR(o, 2, 0.5),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 6),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.2, total_steps=8, cycle_momentum=True),
        lambda o: torch.optim.lr_scheduler.LinearLR(o, 0.1, total_iters=3),
    ],
)
def test_lr_schedulers(make):
    model = network()
    twin = copy.deepcopy(model)
    replicas = hta.Replicas(model, 2, {"0.weight": 0}, "zero")
    ours = hta.HomotopySGD(replicas, 0.1, 0.9, L=math.inf)
    theirs = torch.optim.SGD(twin.parameters(), 0.1, 0.9)
    schedulers = make(ours), make(theirs)
    loss = task()
    for _ in range(6):
        run(ours, loss, 1)
        run_sgd(theirs, twin, loss)
        for s in schedulers:
            s.step()
        assert ours.param_groups[0]["lr"] == theirs.param_groups[0]["lr"]
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert relative_error(a.detach(), b.detach()) < 1e-5


def test_state_dict_round_trip_goes_on_with_the_same_bits():
    model, loss = network(), task()
    replicas = hta.Replicas(copy.deepcopy(model))
    optimizer = hta.HomotopySGD(replicas, 0.05, 0.9, L=0.05)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    run(optimizer, loss, 3)
    scheduler.step()
    file = io.BytesIO()
    saved = {
        "nets": [n.state_dict() for n in replicas],
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
    }
    torch.save(saved, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    run(optimizer, loss, 3)

    again = hta.Replicas(copy.deepcopy(model))
    resumed = hta.HomotopySGD(again, 0.9, 0.1, L=7.0)
    for net, state in zip(again, loaded["nets"], strict=True):
        net.load_state_dict(state)
    resumed.load_state_dict(loaded["optimizer"])
    assert resumed.param_groups[0]["initial_lr"] == 0.05
    assert resumed.L == 0.05
    torch.optim.lr_scheduler.StepLR(resumed, 2, 0.5).load_state_dict(loaded["scheduler"])
    run(resumed, loss, 3)
    assert torch.equal(again.params, replicas.params)


def test_a_torch_sgd_state_loads_into_either_copy_and_back():
    model, loss = network(), task()
    sgd = torch.optim.SGD(model.parameters(), 0.07, 0.9, weight_decay=1e-3, nesterov=True)
    for _ in range(3):
        run_sgd(sgd, model, loss)
    state = copy.deepcopy(sgd.state_dict())
    replicas = hta.Replicas(model)
    optimizer = hta.HomotopySGD(replicas, 0.5, 0.5)
    for which, row in (("theta", 0), ("eta", 1)):
        optimizer.load_torch_state_dict(which, state)
        back = optimizer.torch_state_dict(which)
        fresh = torch.optim.SGD(replicas.trained[row], 0.1)
        fresh.load_state_dict(back)
        assert fresh.param_groups[0]["lr"] == 0.07
        assert fresh.param_groups[0]["nesterov"] is True
        for i, saved in state["state"].items():
            assert torch.equal(back["state"][i]["momentum_buffer"], saved["momentum_buffer"])
    mean = optimizer.torch_state_dict("mean")
    assert torch.allclose(mean["state"][0]["momentum_buffer"], state["state"][0]["momentum_buffer"])
    assert set(back["param_groups"][0]) == set(state["param_groups"][0])


def test_state_is_there_before_the_first_step():
    optimizer = hta.HomotopySGD(hta.Replicas(network()), 0.5, 0.5)
    assert len(optimizer.state) == 12
    assert not any(entry["momentum_buffer"].any() for entry in optimizer.state.values())


def test_one_late_parameter_does_not_reset_the_others_momentum():
    """apex's fused SGD took "first step" from the last parameter of a list."""
    model, loss = network(), task()
    replicas = hta.Replicas(model)
    optimizer = hta.HomotopySGD(replicas, 0.05, 0.9, L=0.1)
    for net in replicas:
        net[4].bias.requires_grad_(False)
    run(optimizer, loss, 2)
    momentum = optimizer.state[model[0].weight]["momentum_buffer"].clone()
    for net in replicas:
        net[4].bias.requires_grad_(True)
    optimizer.zero_grad()
    replicas.backward(loss)
    gradient = model[0].weight.grad.clone()
    optimizer.step()
    assert torch.allclose(optimizer.state[model[0].weight]["momentum_buffer"], 0.9 * momentum + gradient, atol=1e-7)


def test_grad_scaler():
    model, loss = network(), task()
    plain, scaled = (hta.Replicas(copy.deepcopy(model)) for _ in range(2))
    first, second = (hta.HomotopySGD(r, 0.05, 0.9, L=0.1) for r in (plain, scaled))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for i in range(4):
        second.zero_grad()
        scaled.backward(loss, scale=scaler.scale)
        if i == 2:
            scaled.theta[0].weight.grad[0] = math.nan
            before = scaled.params.clone()
            scaler.step(second)
            scaler.update()
            assert torch.equal(scaled.params, before)
            assert second.stats.skipped == 1
            assert scaler.get_scale() == 512.0
            continue
        scaler.unscale_(second) if i == 1 else None
        scaler.step(second)
        scaler.update()
        run(first, loss, 1)
    assert relative_error(scaled.params, plain.params) < 1e-5


def test_closures_and_clipping():
    replicas = hta.Replicas(network())
    optimizer = hta.HomotopySGD(replicas, 0.05, L=0.1)
    loss = task()

    def closure():
        optimizer.zero_grad()
        value = replicas.loss(loss)
        value.backward()
        torch.nn.utils.clip_grad_norm_(replicas.theta.parameters(), 0.1)
        return value

    values = [optimizer.step(closure).item() for _ in range(5)]
    assert values[-1] < values[0]
    assert float(torch.linalg.vector_norm(replicas.grads[0])) < 0.1001


def test_backward_through_parameters_after_a_step_is_an_error():
    replicas = hta.Replicas(network())
    optimizer = hta.HomotopySGD(replicas, 0.05)
    value = replicas.loss(task())
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


def test_fused_and_reference_backends_agree():
    model, loss = network(), task()
    results = []
    for backend in (None, "reference"):
        hta.use_backend(backend)
        replicas = hta.Replicas(copy.deepcopy(model))
        run(hta.HomotopySGD(replicas, 0.05, 0.9, 1e-3, L=0.1), loss, 4)
        results.append(replicas.params)
    hta.use_backend(None)
    assert relative_error(results[0], results[1]) < 1e-5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(lr=-1.0), "lr must be finite and not negative"),
        (dict(lr=0.1, momentum=-1.0), "momentum must be in \\[0, 1\\)"),
        (dict(lr=0.1, nesterov=True), "nesterov needs a momentum"),
        (dict(lr=0.1, L=-1.0), "L must be in"),
        (dict(lr=0.1, L=0.0, mode="explicit"), "L must be positive and finite in explicit mode"),
        (dict(lr=0.1, mode="sideways"), "mode must be 'implicit' or 'explicit', got 'sideways'"),
        (dict(lr=0.1, groups=[{"params": ["nope"]}]), "groups name 'nope'"),
        (dict(lr=0.1, groups=[{"params": [torch.zeros(3)]}]), r"a tensor of shape \(3,\)"),
        (dict(lr=0.1, groups=[{"params": lambda n: False}]), "match no parameter"),
        (dict(lr=0.1, groups=[{"params": ["0.bias"]}, {"params": ["0.bias"]}]), "'0.bias' more than once"),
        (
            dict(lr=0.1, groups=[{"params": ["0.bias"], "weight_decay": -1.0}]),
            "weight_decay must be finite and not negative",
        ),
    ],
)
def test_nonsense_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        hta.HomotopySGD(hta.Replicas(network()), **arguments)


def test_nonsense_after_construction_is_named():
    optimizer = hta.HomotopySGD(hta.Replicas(network()), 0.1)
    with pytest.raises(ValueError, match="L must be in"):
        optimizer.L = math.nan
    with pytest.raises(ValueError, match="param_groups is complete"):
        optimizer.add_param_group({"params": [torch.zeros(1)]})
    with pytest.raises(ValueError, match="copy must be"):
        optimizer.torch_state_dict("both")
    with pytest.raises(ValueError, match=r"groups of \[1\] parameters"):
        optimizer.load_torch_state_dict("eta", torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.1).state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_gradients_whose_sum_overflows_are_finite(dtype):
    largest = torch.full((2, 3000), torch.finfo(dtype).max, dtype=dtype)
    assert not optim._any_nonfinite(largest)
    for bad in (math.inf, -math.inf, math.nan):
        for where in (largest.clone(), torch.zeros_like(largest)):
            where[1, 77] = bad
            assert optim._any_nonfinite(where)
