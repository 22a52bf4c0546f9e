"""Replicas as a module of torch: what holds for any nn.Module holds for them, and their state says all."""

import copy
import io
import math
import pickle
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import relative_error
from torch import nn
from torch.nn.utils import prune

import hta_fused as hta
from hta_fused.layout import trainable

PROPOSALS = {"SGD": hta.SGD(0.05, 0.9, 1e-3), "AdamW": hta.AdamW(0.01)}
COUPLINGS = [hta.Homotopy(0.05), hta.Explicit(1.0), hta.EMA(0.9), hta.Lookahead(0.5, every=2), hta.Elastic(0.1),
             hta.Parle(every=2), hta.Average(0.1, every=3)]  # fmt: skip


class Net(nn.Module):
    """A convolution, norms of both kinds, tied weights, a frozen layer and a parameter of one element."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8)
        self.fc, self.tied = nn.Linear(32, 32), nn.Linear(32, 32)
        self.tied.weight = self.fc.weight
        self.frozen = nn.Linear(32, 32).requires_grad_(False)
        self.layer_norm, self.gain = nn.LayerNorm(32), nn.Parameter(torch.ones(()))

    def forward(self, x):
        x = self.norm(self.conv(x.to(self.conv.weight.dtype)).to(self.norm.weight.dtype)).flatten(1)
        x = self.tied(torch.relu(self.fc(x.to(self.fc.weight.dtype))))
        x = self.frozen(x.to(self.frozen.weight.dtype))
        return (self.layer_norm(x.to(self.layer_norm.weight.dtype)) * self.gain).float()


def batch(n=8):
    return torch.randn(n, 1, 4, 4), torch.randint(0, 32, (n,))


def loss(net, batch):
    return F.cross_entropy(net(batch[0]), batch[1])


def train(optimizer, batches):
    for one in batches:
        optimizer.zero_grad()
        optimizer.replicas.backward(loss, one)
        optimizer.step()
    return optimizer.replicas.params.clone()


def pair(copies=2, proposal="SGD", coupling=COUPLINGS[0], **options):
    replicas = hta.Replicas(Net(), copies, **options)
    return hta.CoupledOptimizer(replicas, PROPOSALS[proposal], coupling)


# -------------------------------------------------------------------------------------------------------- storages


@pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("channels_last", [False, True])
def test_every_tensor_that_can_be_saved_has_a_storage_of_its_own(channels_last, compute_dtype):
    model = Net().to(memory_format=torch.channels_last) if channels_last else Net()
    replicas = hta.Replicas(model, compute_dtype=compute_dtype)
    optimizer = hta.CoupledOptimizer(replicas, hta.AdamW(), hta.Homotopy())
    tensors = [
        *replicas.parameters(),
        *(replicas.masters.read(row, i) for row in (0, 1) for i in range(len(replicas.trained[0]))),
    ]
    tensors += [v for entry in optimizer.state.values() for k, v in entry.items() if k != "step"]
    distinct = {t.data_ptr(): t for t in tensors}.values()
    for t in distinct:
        assert t.untyped_storage().nbytes() == t.nbytes
        assert t.storage_offset() == 0
    for p, shape, stride in zip(replicas.trained[0], replicas.layout.shapes, replicas.layout.strides, strict=True):
        assert (p.shape, p.stride()) == (shape, stride)
    file = io.BytesIO()
    torch.save(replicas.theta.state_dict(), file)
    plain = io.BytesIO()
    torch.save(copy.deepcopy(replicas.theta).state_dict(), plain)
    assert file.tell() == plain.tell()


def test_the_buffer_lives_as_long_as_a_parameter():
    parameter = hta.Replicas(Net()).theta.fc.weight
    before = parameter.clone()
    _ = [torch.full((100_000,), math.pi) for _ in range(20)]
    assert torch.equal(parameter, before)


# ------------------------------------------------------------------------------------------------------- as a module


@pytest.mark.parametrize("how", ["zeroed", "set to None", "by Replicas", "alone", "both", "clipped", "none"])
def test_who_trains_one_copy_alone_is_told_once(how):
    """As a Trainer does that is given copy 0 as its model."""
    optimizer = pair()
    replicas = optimizer.replicas
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for one in [batch() for _ in range(3)]:
            optimizer.zero_grad() if how != "set to None" else replicas.theta.zero_grad()
            if how in ("both", "by Replicas", "clipped"):
                replicas.backward(loss, one) if how != "both" else [loss(net, one).backward() for net in replicas]
            elif how != "none":
                loss(replicas.theta, one).backward()
            if how == "clipped":
                nn.utils.clip_grad_norm_(replicas.theta.parameters(), 0.1)
            optimizer.step()
    told = [str(w.message) for w in caught if "no gradient reached copy 1" in str(w.message)]
    assert len(told) == (how in ("zeroed", "set to None", "alone"))


def test_forward_is_each_copys():
    replicas = hta.Replicas(Net(), 3, start="independent", factory=Net).eval()
    x, _ = batch()
    outputs = replicas(x)
    assert len(outputs) == 3
    for output, net in zip(outputs, replicas, strict=True):
        assert torch.equal(output, net(x))
    assert not any(net.training for net in replicas)
    assert all(net.training for net in replicas.train())


class WithLoss(Net):
    def forward(self, x, labels=None, scale=1.0):
        logits = super().forward(x)
        return (
            {"logits": logits}
            if labels is None
            else {"loss": scale * F.cross_entropy(logits, labels), "logits": logits}
        )


def test_a_loss_among_the_outputs_is_summed():
    replicas = hta.Replicas(WithLoss(), start="independent", factory=WithLoss).eval()
    x, y = batch()
    outputs = replicas(x, labels=y, scale=2.0)
    alone = [net(x, labels=y, scale=2.0) for net in replicas]
    assert torch.equal(outputs["loss"], torch.stack([o["loss"] for o in alone]).sum())
    assert all(torch.equal(a, b["logits"]) for a, b in zip(outputs["logits"], alone, strict=True))
    outputs["loss"].backward()
    together = replicas.grads.clone()
    replicas.zero_grad()
    replicas.backward(lambda net: net(x, labels=y, scale=2.0)["loss"])
    assert relative_error(together, replicas.grads) < 1e-5
    assert isinstance(replicas(x), tuple)


def test_hooks_names_and_parameters():
    replicas = hta.Replicas(Net(), 2)
    calls = []
    replicas.register_forward_hook(lambda module, args, out: calls.append(len(out)))
    replicas(batch()[0])
    assert calls == [2]
    names = dict(replicas.named_parameters())
    assert names["copies.1.fc.weight"] is replicas.eta.fc.weight
    assert len(names) == 2 * len(dict(Net().named_parameters()))
    assert replicas.get_submodule("copies.0") is replicas.theta
    assert not hasattr(hta.Replicas(Net(), 1), "eta")


MOVES = {"double": lambda m: m.double(), "half": lambda m: m.half(), "bfloat16": lambda m: m.to(torch.bfloat16),
         "to_empty": lambda m: m.to_empty(device="cpu"), "type": lambda m: m.type(torch.float64),
         "nothing": lambda m: m.to("cpu"), "float": lambda m: m.float()}  # fmt: skip


@pytest.mark.parametrize(
    "when", ["before the optimizer", "after the optimizer", "in the middle", "inside another module"]
)
@pytest.mark.parametrize("how", MOVES)
@pytest.mark.parametrize("proposal", PROPOSALS)
def test_moved_replicas_train_as_those_that_were_made_there(how, when, proposal):
    batches = [batch() for _ in range(3)]
    replicas = hta.Replicas(Net(), 2, "hashed")
    move = MOVES[how]
    make = lambda r: hta.CoupledOptimizer(r, PROPOSALS[proposal], hta.Homotopy(0.05))  # noqa: E731
    holder = nn.ModuleList([replicas]) if when == "inside another module" else replicas
    if when == "before the optimizer":
        move(replicas)
        optimizer = make(replicas)
    else:
        optimizer = make(replicas)
        if when == "in the middle":
            train(optimizer, batches)
        move(holder)
    with torch.no_grad():
        for p in replicas.parameters():  # to_empty leaves anything
            p.copy_(torch.randn_like(p))
    anchor = torch.zeros_like(replicas.anchor)
    for view in replicas.layout.views(anchor):
        view.copy_(torch.randn_like(view))
    replicas.anchor.copy_(anchor)
    dtype = {"double": torch.float64, "half": torch.float16, "bfloat16": torch.bfloat16, "type": torch.float64}.get(how)
    assert replicas.params.dtype == (dtype or torch.float32) == replicas.anchor.dtype
    twin = hta.Replicas(copy.deepcopy(replicas.theta), 2, "hashed", anchor, [copy.deepcopy(replicas.eta)])
    other = make(twin)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for net in (*replicas, *twin):
        net.norm.reset_running_stats()
    assert torch.equal(train(optimizer, batches), train(other, batches))
    for row in (0, 1):
        for p, view in zip(replicas.trained[row], replicas.layout.views(replicas.params[row]), strict=True):
            assert p.data_ptr() == view.data_ptr()


def test_moving_keeps_gradients_and_masters():
    replicas = hta.Replicas(Net(), compute_dtype=torch.bfloat16)
    replicas.params.add_(1e-4)  # digits that bfloat16 lacks, as if by steps
    replicas.to("cpu")
    before, low = replicas.params.clone(), replicas.low.clone()
    replicas._apply(lambda t: t.clone())
    assert torch.equal(replicas.params, before)
    assert not torch.equal(replicas.low, low)
    replicas = hta.Replicas(Net())
    replicas.backward(loss, batch())
    grads = replicas.grads.double()
    assert torch.equal(replicas.double().grads, grads)
    assert replicas.theta.fc.weight.grad.dtype == torch.float64


# ------------------------------------------------------------------------------------------------------------- state


@pytest.mark.parametrize("partition", ["auto", "hashed"])
@pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("coupling", COUPLINGS, ids=lambda c: type(c).__name__)
@pytest.mark.parametrize("proposal", PROPOSALS)
def test_the_two_state_dicts_are_all_that_the_next_step_reads(proposal, coupling, compute_dtype, partition):
    """Into fresh ones, whose anchor, seed, settings and values all differ: the same bits."""
    make = lambda: pair(3, proposal, coupling, partition=partition, compute_dtype=compute_dtype)  # noqa: E731
    optimizer, fresh = make(), make()
    if partition == "hashed":
        optimizer.replicas.partition.resample(5)
    train(optimizer, [batch() for _ in range(5)])
    train(fresh, [batch()])
    file = io.BytesIO()
    torch.save({"replicas": optimizer.replicas.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    assert all(isinstance(v, torch.Tensor) for v in saved["replicas"].values())
    fresh.replicas.load_state_dict(saved["replicas"])
    fresh.load_state_dict(saved["optimizer"])
    batches = [batch() for _ in range(5)]
    assert torch.equal(train(optimizer, batches), train(fresh, batches))
    if optimizer.replicas.anchor is not None:
        assert torch.equal(optimizer.replicas.anchor, fresh.replicas.anchor)


def test_state_dict_nests_and_assigns():
    class Untied(Net):
        def __init__(self):
            super().__init__()
            self.tied.weight = nn.Parameter(torch.randn(32, 32))

    for make, assign in ((Untied, True), (Untied, False), (Net, False)):
        holder, other = (nn.ModuleDict({"net": hta.Replicas(make())}) for _ in range(2))
        state = copy.deepcopy(holder.state_dict())
        assert "net.copies.1.conv.weight" in state
        assert "net.anchor" in state
        other.load_state_dict(state, assign=assign)
        assert torch.equal(other["net"].params, holder["net"].params)
        other["net"].check()  # the parameters lie in the buffer again
        assert torch.equal(other["net"].anchor, holder["net"].anchor)
        alone = hta.Replicas(make())
        alone.load_state_dict(holder["net"].state_dict(), assign=True)
        alone.check()
        assert torch.equal(alone.params, holder["net"].params)
    wrong = nn.ModuleDict({"net": hta.Replicas(Net(), partition="random")})
    with pytest.raises(RuntimeError, match="saved with another partition than these Replicas'"):
        wrong.load_state_dict(state)


def test_another_partition_or_seed_is_another_state():
    state = hta.Replicas(Net(), partition="hashed").state_dict()
    for partition in ("conv_blocks", "random", "hashed"):
        replicas = hta.Replicas(Net(), partition=partition)
        if partition == "hashed":
            replicas.partition.resample(99)
            replicas.load_state_dict(state)
            assert int(replicas.partition.seed) == 0
        else:
            with pytest.raises(RuntimeError, match="another partition"):
                replicas.load_state_dict(state)


@pytest.mark.parametrize("how", ["load_state_dict", "copy_", "init", "optimizer"])
def test_what_is_written_to_low_precision_parameters_counts(how):
    optimizer = pair(compute_dtype=torch.bfloat16)
    train(optimizer, [batch()])
    net, new = optimizer.replicas.eta, Net()
    before = optimizer.replicas.params.clone()
    with torch.no_grad():
        if how == "load_state_dict":
            net.load_state_dict(new.state_dict())
        elif how == "copy_":
            net.fc.weight.copy_(new.fc.weight)
        elif how == "init":
            nn.init.zeros_(net.fc.weight)
        else:
            torch.optim.SGD([net.fc.weight], 1.0).step()  # does nothing
            net.fc.weight.mul_(2)
    value = net.fc.weight.detach().clone()
    master = optimizer.replicas.state_dict()["copies.1.fc.weight"]  # may hold more digits of what stayed as it was
    assert torch.equal(master.bfloat16(), value)
    assert torch.equal(optimizer.replicas.params[0], before[0])
    optimizer.coupling = hta.Homotopy(math.inf)
    optimizer.param_groups[0].update(lr=0.0, weight_decay=0.0)
    optimizer.step()
    assert torch.equal(net.fc.weight.detach(), value)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_keep_hooks_modes_and_frozen_ones(again):
    replicas = hta.Replicas(Net(), 2, compute_dtype=torch.bfloat16).eval()
    for net in replicas:
        net.gain.requires_grad_(False)
    other = again(replicas)
    assert not other.theta.training
    assert not other.eta.gain.requires_grad
    assert torch.equal(other.params, replicas.params)
    assert other.layout == replicas.layout
    assert set(trainable(other.theta)) == set(trainable(replicas.theta))
    other.check()
    assert other.frozen == [other.layout.names.index("gain")]


# ----------------------------------------------------------------------------------------------- state is what counts


def test_clearing_the_state_is_a_fresh_start():
    for proposal in PROPOSALS:
        optimizer = pair(proposal=proposal)
        train(optimizer, [batch() for _ in range(3)])
        fresh = hta.CoupledOptimizer(copy.deepcopy(optimizer.replicas), PROPOSALS[proposal], COUPLINGS[0])
        optimizer.state.clear()
        batches = [batch() for _ in range(3)]
        assert torch.equal(train(optimizer, batches), train(fresh, batches))


EDITS = {
    "assigned": lambda entry, name, value: entry.__setitem__(name, value.clone()),
    "in place": lambda entry, name, value: entry[name].copy_(value),
    "float64": lambda entry, name, value: entry.__setitem__(name, value.double()),
}


@pytest.mark.parametrize("how", EDITS)
@pytest.mark.parametrize("proposal", PROPOSALS)
def test_edited_state_is_used_and_shown(proposal, how):
    optimizer, other = pair(proposal=proposal), None
    train(optimizer, [batch() for _ in range(2)])
    other = copy.deepcopy(optimizer)
    for one in (optimizer, other):
        for row in range(2):
            for parameter in one.replicas.trained[row]:
                for name in PROPOSALS[proposal].all_buffers:
                    value = torch.full_like(parameter, 0.125).detach()
                    if one is optimizer:
                        EDITS[how](one.state[parameter], name, value)
                    else:
                        one.state[parameter][name].copy_(value)
    batches = [batch() for _ in range(2)]
    assert torch.equal(train(optimizer, batches), train(other, batches))
    entry = optimizer.state[optimizer.replicas.theta.fc.weight]
    for name in PROPOSALS[proposal].all_buffers:
        where = optimizer._buffers[name][0]
        assert where.data_ptr() <= entry[name].data_ptr() < where.data_ptr() + where.nbytes


def test_swapped_entries_are_swapped():
    optimizer = pair()
    train(optimizer, [batch()])
    one, two = optimizer.replicas.theta.fc.weight, optimizer.replicas.eta.fc.weight
    first, second = (optimizer.state[p]["momentum_buffer"].clone() for p in (one, two))
    first.fill_(3)
    optimizer.state[one]["momentum_buffer"].fill_(3)
    optimizer.state[one], optimizer.state[two] = optimizer.state[two], optimizer.state[one]
    optimizer.coupling = hta.Homotopy(0.1)  # the settings are looked at, and so is the state
    assert torch.equal(optimizer.state[two]["momentum_buffer"], first)
    assert torch.equal(optimizer.state[one]["momentum_buffer"], second)


def test_what_others_keep_in_the_state_stays():
    """As optimizers around optimizers do, timm's Lookahead for example."""
    optimizer = pair()
    parameter = optimizer.replicas.theta.fc.weight
    optimizer.state[parameter]["slow"] = slow = torch.ones(3)
    optimizer.state["mine"] = {"a": 1}
    train(optimizer, [batch()])
    optimizer.coupling = hta.EMA()
    train(optimizer, [batch()])
    assert optimizer.state[parameter]["slow"] is slow
    assert optimizer.state["mine"] == {"a": 1}
    del optimizer.state["mine"]
    fresh = pair()
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert torch.equal(fresh.state[fresh.replicas.theta.fc.weight]["slow"], slow)


def test_adamws_step_can_be_set_and_is_shown():
    optimizer = pair(proposal="AdamW")
    train(optimizer, [batch() for _ in range(2)])
    optimizer.state[optimizer.replicas.theta.gain]["step"].fill_(40)
    train(optimizer, [batch()])
    assert optimizer.steps == 41
    assert all(entry["step"] == 41 for entry in optimizer.state.values())
    for entry in optimizer.state.values():
        entry["step"] = torch.tensor(7.0)
    train(optimizer, [batch()])
    assert optimizer.steps == 8


def test_momentum_waits_while_it_is_zero_as_torchs():
    optimizer = pair()
    twin = copy.deepcopy(optimizer)
    train(optimizer, [batch()])
    kept = optimizer.state[optimizer.replicas.theta.fc.weight]["momentum_buffer"].clone()
    optimizer.param_groups[0]["momentum"] = 0.0
    train(optimizer, [batch()])
    optimizer.param_groups[0]["momentum"] = 0.9
    optimizer.step()  # makes the buffers again; with the gradients of the step before
    gradient = optimizer.replicas.theta.fc.weight.grad
    now = optimizer.state[optimizer.replicas.theta.fc.weight]["momentum_buffer"]
    assert not torch.allclose(now, gradient)
    assert kept.any()
    twin.param_groups[0]["momentum"] = 0.0
    twin.step()
    value = torch.full((32, 32), 2.0)
    twin.state[twin.replicas.theta.fc.weight]["momentum_buffer"] = value.clone()  # before there is a use for it
    twin.param_groups[0].update(momentum=0.5, weight_decay=0.0)
    twin.zero_grad()
    twin.step()
    assert torch.equal(twin.state[twin.replicas.theta.fc.weight]["momentum_buffer"], value / 2)


@pytest.mark.parametrize("groups", [[], [{"params": "bias", "momentum": 0.9}]], ids=["all", "one of two"])
def test_a_momentum_that_was_zero_for_a_while_is_torchs(groups):
    """Alone or beside another group's, with a copy and a resumed one made while it was zero."""
    net = torch.nn.Linear(4, 4).double()
    optimizer = hta.CoupledOptimizer(
        hta.Replicas(net, 1, {}), hta.SGD(0.1, 0.9), hta.Average(every=1000), groups=groups
    )
    twin = copy.deepcopy(net)
    torchs = torch.optim.SGD(
        [{"params": [twin.weight]}, {"params": [twin.bias]}] if groups else twin.parameters(), lr=0.1, momentum=0.9
    )
    ours = [optimizer]
    for step, momentum in enumerate([0.9, 0.9, 0.0, 0.0, 0.9, 0.9]):
        if step == 4:
            ours.append(copy.deepcopy(optimizer))
            resumed = hta.CoupledOptimizer(
                copy.deepcopy(optimizer.replicas), hta.SGD(0.1, 0.9), hta.Average(every=1000), groups=groups
            )
            resumed.load_state_dict(optimizer.state_dict())
            ours.append(resumed)
        gradients = [torch.randn_like(p) for p in twin.parameters()]
        for parameter, gradient in zip(twin.parameters(), gradients, strict=True):
            parameter.grad = gradient
        torchs.param_groups[0]["momentum"] = momentum
        torchs.step()
        for one in ours:
            for parameter, gradient in zip(one.replicas.theta.parameters(), gradients, strict=True):
                parameter.grad = gradient.clone()
            one.param_groups[0]["momentum"] = momentum
            one.step()
            for parameter, expected in zip(one.replicas.theta.parameters(), twin.parameters(), strict=True):
                assert relative_error(parameter, expected) < 1e-12, step


@pytest.mark.parametrize("state_format", ["full", "bfloat16", "8bit"])
def test_a_buffer_without_a_momentum_keeps_its_bytes(state_format):
    optimizer = hta.CoupledOptimizer(
        hta.Replicas(Net(), 2),
        hta.SGD(0.1, 0.9),
        hta.Homotopy(),
        groups=[{"params": "fc.weight"}],
        state_format=state_format,
    )
    train(optimizer, [batch() for _ in range(2)])
    optimizer.param_groups[1]["momentum"] = 0.0
    tiles = optimizer.replicas.layout.tiles(optimizer.replicas.layout.names.index("fc.weight"))
    before = [buffer[:, tiles.start * 1024 : tiles.stop * 1024].clone() for buffer in optimizer._state_rows]
    train(optimizer, [batch() for _ in range(2)])
    for was, buffer in zip(before, optimizer._state_rows, strict=True):
        assert torch.equal(was, buffer[:, tiles.start * 1024 : tiles.stop * 1024])
        assert was.any()


def test_a_buffer_that_waits_is_found_where_the_replicas_went():
    optimizer = hta.CoupledOptimizer(
        hta.Replicas(Net(), 2), hta.SGD(0.1, 0.9), hta.Homotopy(), groups=[{"params": "fc.weight", "momentum": 0.0}]
    )
    optimizer.plan([0.1] * 4)
    for move in (lambda r: r, lambda r: r.double(), lambda r: r.float()):
        move(optimizer.replicas)
        optimizer.replicas.grads.fill_(1.0)
        optimizer.step()
        assert not optimizer.state[optimizer.replicas.theta.fc.weight]["momentum_buffer"].any()
        assert optimizer.state[optimizer.replicas.theta.conv.weight]["momentum_buffer"].all()


@pytest.mark.parametrize("first", [hta.Toward(0.0), hta.Average(every=100)])
def test_a_setting_in_a_tensor_that_changes_in_place_is_noticed(first):
    optimizer = hta.CoupledOptimizer(hta.Replicas(torch.nn.Linear(4, 4), 2, {}, anchor="zero"), hta.SGD(1.0), first)
    optimizer.coupling = hta.Toward(0.0)
    optimizer.param_groups[0]["strength"] = strength = torch.tensor(0.0)
    optimizer.param_groups[0]["mine"] = np.zeros(3)  # is nobody's business
    optimizer.step()
    before = optimizer.replicas.theta.weight.clone()
    strength.fill_(1.0)
    optimizer.param_groups[0]["mine"] = np.zeros(3)
    optimizer.step()
    assert not torch.equal(optimizer.replicas.theta.weight, before)


def test_the_penalty_is_the_last_steps_whatever_is_assigned_since():
    optimizer = pair(coupling=hta.Homotopy(2.0))
    train(optimizer, [batch() for _ in range(2)])
    before = optimizer.stats.penalty
    optimizer.L = 0.5
    assert optimizer.stats.penalty == before
    optimizer.coupling = hta.EMA()
    assert optimizer.stats.penalty == before
    train(optimizer, [batch()])
    assert math.isnan(optimizer.stats.penalty)
    optimizer.coupling = hta.Homotopy(0.5)
    assert math.isnan(optimizer.stats.penalty)


@pytest.mark.parametrize("foreign", [torch.optim.Adamax, torch.optim.NAdam, torch.optim.RAdam])
def test_the_state_of_another_optimizer_is_refused(foreign):
    net = torch.nn.Linear(4, 4)
    theirs = foreign(net.parameters(), lr=0.01)
    net(torch.ones(2, 4)).sum().backward()
    theirs.step()
    optimizer = hta.CoupledOptimizer(hta.Replicas(net, 1, {}), hta.AdamW(0.01), hta.Average(every=100))
    for load in (optimizer.load_state_dict, lambda state: optimizer.load_torch_state_dict(0, state)):
        with pytest.raises(ValueError, match="another optimizer|NAdam|missing"):
            load(theirs.state_dict())


@pytest.mark.parametrize(
    "spoil",
    [
        lambda state: {},
        lambda state: None,
        lambda state: [state],
        lambda state: {**state, "state": None},
        lambda state: {**state, "param_groups": None},
        lambda state: {**state, "param_groups": [3]},
        lambda state: {**state, "param_groups": [{k: v for k, v in state["param_groups"][0].items() if k != "params"}]},
        lambda state: {**state, "param_groups": [{**state["param_groups"][0], "params": 0}]},
        lambda state: {**state, "state": {0: 3}},
        lambda state: {k: v for k, v in state.items() if k != "state"},
    ],
)
def test_what_is_no_state_dict_is_named(spoil):
    net = torch.nn.Linear(4, 4)
    optimizer = hta.CoupledOptimizer(hta.Replicas(net, 1, {}), hta.AdamW(0.01), hta.Average(every=100))
    for load in (optimizer.load_state_dict, lambda state: optimizer.load_torch_state_dict(0, state)):
        with pytest.raises((TypeError, ValueError), match="state_dict") as error:
            load(spoil(torch.optim.AdamW(net.parameters()).state_dict()))
        assert "\n" not in str(error.value)
    scheduler = hta.schedule.CouplingScheduler(optimizer, toward=lambda epoch: 0.0)
    for wrong in ({}, None, []):
        with pytest.raises(ValueError, match="state_dict must be a CouplingScheduler's"):
            scheduler.load_state_dict(wrong)


def test_params_that_a_group_has_lost_are_named():
    optimizer = pair()
    del optimizer.param_groups[0]["params"]
    with pytest.raises(ValueError, match="params of param_groups must stay those"):
        optimizer.step()


def test_parameters_that_would_be_replaced_as_they_move_are_refused():
    replicas = hta.Replicas(Net())
    before = [p.dtype for p in replicas.parameters()]
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with pytest.raises(RuntimeError, match="set_overwrite_module_params_on_conversion must be False"):
            replicas.double()
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
    assert [p.dtype for p in replicas.parameters()] == before
    assert replicas.double().dtype == torch.float64


@pytest.mark.parametrize("step", [-3, 2.5, math.nan, 1e30])
def test_a_number_of_steps_that_is_none_is_refused(step):
    net = torch.nn.Linear(4, 4)
    theirs = torch.optim.AdamW(net.parameters(), lr=0.01)
    net(torch.ones(2, 4)).sum().backward()
    theirs.step()
    state = theirs.state_dict()
    for entry in state["state"].values():
        entry["step"] = torch.tensor(step)
    optimizer = hta.CoupledOptimizer(hta.Replicas(net, 1, {}), hta.AdamW(0.01), hta.Average(every=100))
    with pytest.raises(ValueError, match="step of parameter 0 must be"):
        optimizer.load_torch_state_dict(0, state)
    assert optimizer.steps == 0


def test_load_hooks_count():
    optimizer = pair()
    train(optimizer, [batch()])
    state = copy.deepcopy(optimizer.state_dict())

    def before(optimizer, state):
        return {
            **state,
            "state": {k: {"momentum_buffer": v["momentum_buffer"] * 0 + 5} for k, v in state["state"].items()},
        }

    def after(optimizer):
        optimizer.state[optimizer.replicas.theta.fc.weight]["momentum_buffer"].fill_(6)
        optimizer.state[optimizer.replicas.eta.fc.weight]["momentum_buffer"] = torch.full((32, 32), 7.0)

    optimizer.register_load_state_dict_pre_hook(before)
    optimizer.register_load_state_dict_post_hook(after)
    optimizer.load_state_dict(state)
    optimizer.zero_grad()
    optimizer.param_groups[0]["weight_decay"] = 0.0
    optimizer.step()
    for net, fc in zip(optimizer.replicas, (6, 7), strict=True):
        for name, p in trainable(net).items():
            wanted = 0.9 * (fc if name == "fc.weight" else 5)
            assert torch.allclose(optimizer.state[p]["momentum_buffer"], torch.full_like(p, wanted)), name


# ----------------------------------------------------------------------------------------------------------- freezing


@pytest.mark.parametrize(
    "coupling", [c for c in COUPLINGS if not isinstance(c, hta.Parle)], ids=lambda c: type(c).__name__
)
@pytest.mark.parametrize("proposal", PROPOSALS)
def test_a_frozen_parameter_is_moved_by_the_coupling_alone(proposal, coupling):
    """As if its proposal were itself; with one copy, and copies that agree with their anchor, it stays to the bit."""
    for copies in (1, 2):
        if copies == 1 and isinstance(coupling, hta.Explicit):
            continue
        optimizer = pair(copies, proposal, coupling, partition={})
        replicas = optimizer.replicas
        train(optimizer, [batch() for _ in range(2)])
        with torch.no_grad():
            for row in range(copies):
                replicas.params[row] += 0.1 * torch.randn_like(replicas.params[row])
        for net in replicas:
            net.fc.requires_grad_(False)
        frozen = [i for i, name in enumerate(replicas.layout.names) if name.startswith("fc.")]
        before, anchor = replicas.params.clone(), replicas.anchor.clone()
        state = {name: buffer.clone() for name, buffer in optimizer._buffers.items()}
        step = optimizer.steps + 1
        gamma = PROPOSALS[proposal].step_size
        train(optimizer, [batch()])
        rules = coupling.rules(copies, gamma, step)[0]
        layout = replicas.layout
        for i in frozen:
            old = [layout.views(row)[i].double() for row in before]
            theta = layout.views(anchor)[i].double()
            read, keep, share, pull, _ = rules[:copies].unbind(-1)
            for j in range(copies):
                if coupling.explicit:
                    gap = sum(read[k] * (old[j] - old[k]) for k in range(copies))
                    wanted = old[j] - gamma * (pull[j] * (old[j] - theta) + share[j] * gap)
                else:
                    s = sum(read[k] * old[k] for k in range(copies))
                    wanted = keep[j] * old[j] + share[j] * s + pull[j] * theta
                assert relative_error(layout.views(replicas.params[j])[i], wanted) < 1e-5
                if not coupling.explicit:
                    for name, buffer in state.items():
                        now = layout.views(optimizer._buffers[name][j])[i]
                        assert torch.equal(now, layout.views(buffer[j])[i]), name
        moved = layout.names.index("conv.weight")
        assert not torch.equal(layout.views(replicas.params[0])[moved], layout.views(before[0])[moved])


def test_a_frozen_parameter_moves_exactly_in_float64():
    replicas = hta.Replicas(torch.nn.Linear(3, 3).double(), copies=2, partition={})
    optimizer = hta.CoupledOptimizer(replicas, hta.SGD(0.1), hta.Explicit(0.7))
    for net in replicas:
        net.weight.requires_grad_(False)
    with torch.no_grad():
        replicas.params.copy_(torch.randn_like(replicas.params))
    theta, eta = (net.weight.clone() for net in replicas)
    optimizer.step()
    assert relative_error(replicas.theta.weight, theta - 0.1 * 2 * (theta - eta) / 0.7) < 1e-14


@pytest.mark.parametrize("proposal", PROPOSALS)
def test_rules_kept_between_steps_are_those_made_anew(proposal):
    """A period's ends, groups, what is frozen, and settings that change on the way."""
    kept, anew = pairs = [
        hta.CoupledOptimizer(
            hta.Replicas(Net().double(), 2),
            PROPOSALS[proposal],
            hta.Homotopy(0.3, every=3),
            groups=[{"params": "gain", "lr": 0.02}],
        )
        for _ in range(2)
    ]
    for step in range(12):
        for optimizer in pairs:
            if step == 5:
                for net in optimizer.replicas:
                    net.conv.requires_grad_(False)
            if step == 8:
                optimizer.param_groups[1]["L"] = 0.1
        anew._known = None
        for optimizer in pairs:
            optimizer.step()
        assert torch.equal(kept.rules, anew.rules), step


@pytest.mark.parametrize("proposal", PROPOSALS)
def test_a_frozen_parameter_of_copies_that_agree_stays(proposal):
    optimizer = pair(2, proposal, hta.Homotopy(math.inf))
    train(optimizer, [batch()])
    for net in optimizer.replicas:
        net.conv.requires_grad_(False)
    before = optimizer.replicas.theta.conv.weight.clone()
    train(optimizer, [batch() for _ in range(3)])
    assert torch.equal(optimizer.replicas.theta.conv.weight, before)
    for net in optimizer.replicas:
        net.conv.requires_grad_(True)
    train(optimizer, [batch()])
    assert not torch.equal(optimizer.replicas.theta.conv.weight, before)


# ------------------------------------------------------------------------------------------------- settings of others


def test_maximize_and_lr_zero_as_torch_has_them():
    for options in (dict(lr=0.1, momentum=0.9, maximize=True), dict(lr=0.0, momentum=0.9)):
        model = Net()
        twin = copy.deepcopy(model)
        ours = hta.HomotopySGD(hta.Replicas(model, 1, {}), L=math.inf, **options)
        theirs = torch.optim.SGD(trainable(twin).values(), **options)
        for one in [batch() for _ in range(3)]:
            train(ours, [one])
            theirs.zero_grad()
            loss(twin, one).backward()
            theirs.step()
        for a, b in zip(model.parameters(), twin.parameters(), strict=True):
            assert relative_error(a.detach(), b.detach()) < 1e-5


class Hides:
    """A wrapper that shows what all wrappers show."""

    def __init__(self, optimizer):
        self.param_groups = optimizer.param_groups
        self.step = optimizer.step


@pytest.mark.parametrize("wrap", [lambda o: o, Hides])
def test_a_scheduler_of_L(wrap):
    schedule = hta.schedule.geometric(1.0, 0.1, 0.5, epochs_per_value=2) + hta.schedule.merged()
    optimizer = pair()
    scheduler = hta.CouplingScheduler(wrap(optimizer), L=schedule)
    seen = []
    for epoch in range(schedule.epochs + 2):
        seen.append(optimizer.coupling.L)
        assert scheduler.get_last_value() == {"L": schedule(epoch)}
        train(optimizer, [batch()])
        scheduler.step()
    assert seen == [schedule(epoch) for epoch in range(len(seen))]
    again = hta.CouplingScheduler(wrap(pair()), L=schedule)
    state = hta.CouplingScheduler(wrap(optimizer), L=schedule)
    state.epoch = 3
    again.load_state_dict(pickle.loads(pickle.dumps(state.state_dict())))
    assert again.optimizer.param_groups[0]["L"] == schedule(3)


def test_a_factory_draws_the_copies_and_the_anchor():
    """Where a deep copy's reset_parameters() would draw from other distributions."""

    class Small(Net):
        def __init__(self):
            super().__init__()
            for p in self.parameters():
                nn.init.uniform_(p, 1, 2)

    replicas = hta.Replicas(Small(), 3, start="independent", anchor="random", factory=Small)
    for net in replicas:
        assert all((p >= 1).all() for p in net.parameters())
    assert len({float(net.fc.weight[0, 0]) for net in replicas}) == 3
    assert all((v >= 1).all() for v in replicas.layout.views(replicas.anchor))
    with pytest.raises(ValueError, match="pass factory="):
        hta.Replicas(Small(), start="independent")  # its gain belongs to no module that resets it


# ------------------------------------------------------------------------------------------------ what users' code does


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(4, 4)

    def forward(self, x):
        return self.lstm(x)[0]


def test_rebind_reaches_modules_that_keep_lists_of_their_parameters():
    replicas = hta.Replicas(Recurrent())
    holder = nn.ModuleList([replicas])
    holder.load_state_dict(copy.deepcopy(holder.state_dict()), assign=True)  # rebinds
    replicas.backward(lambda net: net(torch.randn(3, 4)).square().sum())
    for net in replicas:
        assert all(p.grad.any() for p in net.parameters())


def test_gradients_with_a_graph_are_gradients():
    optimizer = pair()
    other = copy.deepcopy(optimizer)
    for one in [batch() for _ in range(2)]:
        for each in (optimizer, other):
            each.zero_grad()
            each.replicas.loss(loss, one).backward(create_graph=each is optimizer)
            each.step()
    assert not optimizer.replicas.grads.requires_grad
    assert torch.equal(optimizer.replicas.params, other.replicas.params)


def test_swapped_gradients_are_swapped():
    replicas = hta.Replicas(Net())
    replicas.backward(loss, batch())
    one, two = replicas.theta.fc.weight, replicas.eta.fc.weight
    one.grad.fill_(1)
    turned = two.grad.t().clone()
    one.grad, two.grad = two.grad.t(), one.grad
    replicas.collect_grads()
    assert torch.equal(one.grad, turned)
    assert (two.grad == 1).all()


MISPLACED = {
    "moved": lambda net: net.double(),
    "data": lambda net: setattr(net.fc.weight, "data", torch.zeros(32, 32)),
    "replaced": lambda net: setattr(net, "fc", nn.Linear(32, 32)),
    "another's": lambda net: hta.Replicas(net),
}


@pytest.mark.parametrize("how", MISPLACED)
def test_what_no_longer_lies_in_the_buffer_is_not_read_from_there(how):
    replicas = hta.Replicas(Net())
    _ = MISPLACED[how](replicas.eta)
    for read in (replicas.merge, replicas.distance, replicas.check):
        with pytest.raises(RuntimeError, match="parameter '.*' of copy 1 .*rebind"):
            read()


def test_distance_reads_what_was_written_to_low_precision_parameters():
    replicas = hta.Replicas(Net(), compute_dtype=torch.bfloat16)
    for net in replicas:
        net.gain.requires_grad_(net is replicas.eta)  # as frozen as one likes
    with torch.no_grad():
        replicas.eta.fc.weight += 1
    assert replicas.distance() == pytest.approx(32, rel=1e-2)


def test_copies_stay_as_many_and_apart():
    for change in (lambda copies: copies.append(Net()), lambda copies: copies.pop(1)):
        optimizer = pair()
        change(optimizer.replicas.copies)
        with pytest.raises(RuntimeError, match="copies must stay 2 modules, got [13]"):
            optimizer.step()
    with pytest.raises(TypeError, match="model must not hold Replicas"):
        hta.Replicas(nn.Sequential(hta.Replicas(Net())))


@pytest.mark.parametrize("own", [False, True])
def test_independent_copies_keep_what_is_frozen(own):
    class Backbone(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.body, self.head = nn.BatchNorm1d(4), nn.Linear(4, 4), nn.Linear(4, 4)
            self.head.bias.requires_grad_(False)
            for frozen in (self.norm, self.body):
                frozen.requires_grad_(False)
            self.norm.running_mean += 3

    if own:
        Backbone.reset_parameters = lambda self: [m.reset_parameters() for m in self.children()]
    replicas = hta.Replicas(Backbone(), start="independent")
    names = [n for n, v in replicas.theta.state_dict().items() if not v.equal(replicas.eta.state_dict()[n])]
    assert names == ["head.weight"]


def test_state_that_requires_gradients_is_state():
    optimizer = pair()
    for p in optimizer.replicas.parameters():
        optimizer.state[p]["momentum_buffer"] = torch.ones_like(p).requires_grad_()
    train(optimizer, [batch() for _ in range(2)])
    assert not optimizer._buffers["momentum_buffer"].requires_grad


NO_STATE = {
    "state of 'fc.weight' must be a dict, got 3": lambda state, p: state.__setitem__(p, 3),
    "exp_avg of copy 0 must be a dense tensor in memory, got a torch.sparse_coo one": lambda state, p: state[p].update(
        exp_avg=p.detach().to_sparse()
    ),
    "exp_avg of copy 0 must be a dense tensor in memory, got a torch.strided one on meta": lambda state, p: state[
        p
    ].update(exp_avg=p.detach().to("meta")),
    "state's step must be a whole number, at least 0, got -1.0": lambda state, p: state[p]["step"].fill_(-1),
    "state's step must be a whole number, at least 0, got 2.5": lambda state, p: [
        entry.update(step=2.5) for entry in state.values()
    ],
    "state's step must be a whole number, at least 0, got nan": lambda state, p: [
        entry.update(step=math.nan) for entry in state.values()
    ],
}


@pytest.mark.parametrize("message", NO_STATE)
def test_what_is_no_state_is_named_before_anything_is_written(message):
    optimizer = pair(proposal="AdamW")
    train(optimizer, [batch()])
    before = [t.clone() for t in (optimizer.replicas.params, *optimizer._buffers.values())]
    NO_STATE[message](optimizer.state, optimizer.replicas.theta.fc.weight)
    with pytest.raises((TypeError, ValueError), match=message):
        optimizer.step()
    after = [optimizer.replicas.params, *optimizer._buffers.values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


GROUP_EDITS = {
    "lr is missing in param_groups": lambda groups: groups[0].pop("lr"),
    "L is missing in param_groups": lambda groups: groups[1].pop("L"),
    "coupling of param_groups must stay 'Homotopy', got 'EMA'; assign .coupling": lambda groups: groups[1].update(
        coupling="EMA"
    ),
    "params of param_groups must stay those of the constructor's groups": lambda groups: groups[1]["params"].pop(),
    "params of param_groups must stay those": lambda groups: groups.append({**groups[0]}),
    "params of param_groups must": lambda groups: groups.pop(),
    "params of": lambda groups: groups[1]["params"].append(groups[0]["params"].pop()),
}


@pytest.mark.parametrize("message", GROUP_EDITS)
def test_what_was_done_to_param_groups_counts_or_is_named(message):
    optimizer = hta.CoupledOptimizer(
        hta.Replicas(Net()), PROPOSALS["SGD"], COUPLINGS[0], groups=[{"params": ["fc.bias"], "lr": 0.0}]
    )
    train(optimizer, [batch()])
    before = optimizer.replicas.params.clone()
    GROUP_EDITS[message](optimizer.param_groups)
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert torch.equal(optimizer.replicas.params, before)


def test_attributes_that_no_step_would_read_cannot_be_set():
    optimizer = pair()
    for holder, name in ((optimizer, "proposal"), (optimizer, "replicas"), (optimizer.replicas, "partition")):
        with pytest.raises(AttributeError, match=name):
            setattr(holder, name, getattr(pair() if holder is optimizer else pair().replicas, name))


def test_L_can_be_set_where_there_is_one():
    optimizer = pair(proposal="AdamW")
    optimizer.L = 0.5
    assert optimizer.coupling == hta.Homotopy(0.5)
    optimizer.coupling = hta.EMA()
    with pytest.raises(AttributeError, match="there is no L: the coupling is EMA"):
        optimizer.L = 0.5
    assert not hasattr(optimizer, "L")


def everything(optimizer):
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    return groups, [b.clone() for b in optimizer._buffers.values()], optimizer.steps, optimizer.coupling


STATES = {
    "lr is missing": lambda state: state["param_groups"][0].pop("lr"),
    "coupling must be one of .*, got 'Nope'": lambda state: state["param_groups"][0].update(coupling="Nope"),
    "L must be a number, got 'x'": lambda state: state["param_groups"][0].update(L="x"),
    "steps must be a number, got 'x'": lambda state: state["param_groups"][0].update(steps="x"),
    "coupling EMA moves the anchor": lambda state: [group.update(coupling="EMA") for group in state["param_groups"]],
    "coupling must be the same in all": lambda state: state["param_groups"][1].update(coupling="EMA"),
    "point of copy 0 has shape": lambda state: (
        [group.update(coupling="Parle") for group in state["param_groups"]],
        state["state"][0].update(point=torch.ones(3)),
    ),
}


@pytest.mark.parametrize("message", STATES)
def test_a_state_dict_that_does_not_fit_changes_nothing(message):
    replicas = hta.Replicas(Net(), anchor="zero")
    optimizer = hta.CoupledOptimizer(replicas, PROPOSALS["SGD"], COUPLINGS[0], groups=[{"params": ["fc.bias"]}])
    train(optimizer, [batch()])
    state = copy.deepcopy(optimizer.state_dict())
    state["state"][0]["momentum_buffer"] += 5
    STATES[message](state)
    before = everything(optimizer)
    with pytest.raises((TypeError, ValueError), match=message):
        optimizer.load_state_dict(state)
    assert str(everything(optimizer)) == str(before)
    train(optimizer, [batch()])


@pytest.mark.parametrize("of", PROPOSALS)
def test_another_proposals_state_dict_is_refused(of):
    optimizer, other = (pair(proposal=name) for name in (of, *(PROPOSALS.keys() - {of})))
    before = everything(optimizer)
    with pytest.raises(ValueError, match="is missing in state_dict's param_groups"):
        optimizer.load_state_dict(other.state_dict())
    assert str(everything(optimizer)) == str(before)


def test_torchs_state_dict_leaves_the_coupling_as_it_is():
    optimizer = pair(coupling=hta.Homotopy(0.3, every=2))
    train(optimizer, [batch()])
    plain = torch.optim.SGD(optimizer.param_groups[0]["params"], lr=0.2, momentum=0.5)
    optimizer.load_state_dict(plain.state_dict())
    assert optimizer.coupling == hta.Homotopy(0.3, every=2)
    assert optimizer.param_groups[0]["lr"] == 0.2


OTHERS = {
    "SGD": {"betas is missing": torch.optim.SGD, "betas is": torch.optim.RMSprop,
            "weight_decay of torch.optim.Adam": lambda p: torch.optim.Adam(p, weight_decay=0.1)},
    "AdamW": {"momentum is missing": torch.optim.AdamW, "nesterov is missing": torch.optim.RMSprop},
}  # fmt: skip


@pytest.mark.parametrize(("of", "message"), [(of, message) for of in OTHERS for message in OTHERS[of]])
def test_the_state_of_another_of_torchs_optimizers_is_refused(of, message):
    optimizer = pair(proposal=next(name for name in PROPOSALS if name != of))
    train(optimizer, [batch()])
    other = OTHERS[of][message](trainable(Net()).values())
    before = everything(optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.load_torch_state_dict(0, other.state_dict())
    bad = optimizer.torch_state_dict(0)
    bad["param_groups"][0]["lr"] = "x"
    with pytest.raises(TypeError, match="lr must be a number, got 'x'"):
        optimizer.load_torch_state_dict(0, bad)
    assert str(everything(optimizer)) == str(before)


class Says(nn.Module):
    """Returns what it was told to."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(1, 1)

    def forward(self, x):
        return {k: self.fc(x).sum() if k == "loss" else v for k, v in self.says.items()}


def test_copies_whose_outputs_differ_are_named():
    whole, none, other = {"loss": 1, "y": 2}, {"loss": 1}, {"y": 2}
    for one, two, number in ((whole, none, 1), (whole, other, 1), (other, whole, 0), (none, whole, 1)):
        replicas = hta.Replicas(Says(), partition={})
        replicas.theta.says, replicas.eta.says = one, two
        with pytest.raises(ValueError, match=f"outputs must have a loss.* got .* in copy {number}"):
            replicas(torch.ones(1))


def test_what_is_no_loss_is_named():
    replicas = hta.Replicas(Net())
    for call in (replicas.loss, replicas.backward):
        for value, kind in ((None, "None"), ({"loss": 1}, "a dict"), (1.5, "1.5"), (torch.ones(3), r"shape \(3,\)")):
            with pytest.raises((TypeError, ValueError), match=f"fn must return a loss, .*, got {kind}"):
                call(lambda net, value=value: value)


def test_replicas_state_that_is_no_real_tensor_changes_nothing():
    replicas = hta.Replicas(Net())
    for value in (torch.ones(32, dtype=torch.complex64), torch.ones(32, device="meta")):
        state = {k: v + 1 for k, v in replicas.state_dict().items() if k != "_extra_state"} | {
            "copies.1.fc.bias": value
        }
        before = replicas.params.clone()
        with pytest.raises(RuntimeError, match="'copies.1.fc.bias' must be real and in memory"):
            replicas.load_state_dict(state, strict=False)
        assert torch.equal(replicas.params, before)


def test_a_scheduler_of_what_the_coupling_no_longer_has_says_so():
    optimizer = pair()
    scheduler = hta.CouplingScheduler(optimizer, L=lambda epoch: "none" if epoch == 2 else 1.0)
    scheduler.step()
    with pytest.raises(TypeError, match="L must be a number"):
        scheduler.step()
    assert scheduler.epoch == 1
    optimizer.coupling = hta.EMA()
    scheduler.settings["L"] = lambda epoch: 1.0
    with pytest.raises(ValueError, match="L must be a setting of the optimizer's coupling, which is EMA"):
        scheduler.step()


def test_state_does_not_depend_on_the_default_device():
    """A user's torch.set_default_device("cuda"); "meta" stands in for it here."""
    optimizer, other = pair(proposal="AdamW"), pair(proposal="AdamW")
    torch.set_default_device("meta")
    try:
        other.replicas.load_state_dict(optimizer.replicas.state_dict())
        other.load_state_dict(optimizer.state_dict())
        other.state.clear()
        other.step()
        copy.deepcopy(other).step()
        other.load_torch_state_dict(0, optimizer.torch_state_dict("mean"))
        other.coupling = hta.Parle(every=1)
        other.step()
        assert all(t.device.type == "cpu" for t in (other.replicas.merge().fc.weight, other.replicas.double().params))
        pickle.loads(pickle.dumps(other)).step()
    finally:
        torch.set_default_device(None)


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("how", [nn.utils.weight_norm, lambda m: prune.l1_unstructured(m, "weight", 0.5)])
def test_pruned_and_normalised_modules_are_copied_and_merged_after_a_pass(how):
    model = nn.Sequential(nn.Linear(4, 4))
    how(model[0])
    x = torch.randn(3, 4)
    model(x)
    replicas = hta.Replicas(model, partition={})
    optimizer = hta.HomotopySGD(replicas, 0.1, L=0.0)
    replicas.backward(lambda net: net(x).square().sum())
    optimizer.step()
    assert torch.allclose(replicas.merge()(x), replicas.theta(x))


def test_an_assigned_anchor_counts_or_is_named():
    optimizer = pair(coupling=hta.EMA(0.5))
    train(optimizer, [batch()])
    optimizer.replicas.anchor = anchor = torch.zeros_like(optimizer.replicas.anchor)
    version = anchor._version
    train(optimizer, [batch()])
    assert anchor.any()
    assert anchor._version > version
    for wrong in (anchor[:-1].clone(), anchor.double()):
        optimizer.replicas.anchor = wrong
        steps = optimizer.steps
        with pytest.raises(ValueError, match="anchor must be a contiguous tensor of shape"):
            optimizer.step()
        assert optimizer.steps == steps
        with pytest.raises(ValueError, match="anchor must be a contiguous tensor of shape"):
            hta.HomotopySGD(optimizer.replicas, 0.1)


@pytest.mark.parametrize("place", ["params", "grads", "momentum_buffer", "a view of params"])
def test_an_anchor_that_lies_where_a_step_writes_is_refused(place):
    optimizer = pair(coupling=hta.EMA(0.5))
    train(optimizer, [batch()])
    replicas = optimizer.replicas
    whole = {
        "params": replicas.params,
        "grads": replicas.grads,
        **optimizer._buffers,
        "a view of params": replicas.params.view_as(replicas.params),
    }
    row = whole[place][1]
    replicas.anchor = row
    before = [t.clone() for t in (replicas.params, *optimizer._buffers.values())]
    with pytest.raises(ValueError, match="anchor.* must not share memory with|must not share memory with anchor"):
        optimizer.step()
    assert all(map(torch.equal, before, (replicas.params, *optimizer._buffers.values())))
    if place != "momentum_buffer":  # which a new optimizer does not know
        with pytest.raises(ValueError, match="must not share memory with"):
            hta.CoupledOptimizer(replicas, hta.SGD(0.1), hta.EMA())
    replicas.anchor = row.clone()
    train(optimizer, [batch()])


def test_settings_of_others_in_param_groups_are_left_alone():
    optimizer = pair()
    optimizer.param_groups[0]["mine"] = torch.ones(3)
    train(optimizer, [batch()])
    assert torch.equal(optimizer.param_groups[0]["mine"], torch.ones(3))


def test_a_shallow_copy_is_refused():
    with pytest.raises(TypeError, match="use copy.deepcopy"):
        copy.copy(hta.Replicas(Net()))


def test_merge_takes_the_mean_of_frozen_parameters_that_differ():
    replicas = hta.Replicas(Net(), start=[Net()])
    merged = replicas.merge()
    theta, eta = (net.frozen.weight for net in replicas)
    assert torch.allclose(merged.frozen.weight, (theta + eta) / 2)
    assert not merged.frozen.weight.requires_grad
