"""What must work beside the plain way: replaced parameters taken back, copies and pickles, sparse gradients, fake
tensors."""

import copy
import io
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bad_inputs import REPLACED, Net, Wrapped, assign, trained
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.func import functional_call
from torch.nn.utils import parametrizations, prune

import hta_fused as hta
from hta_fused.layout import trainable

# --------------------------------------------------------------------------------------------------- replaced parameters


def task(n=8):
    x, y = torch.randn(n, 1, 4, 4), torch.randint(0, 16, (n,))
    return lambda net: F.cross_entropy(net(x), y)


def train(optimizer, loss, steps=3):
    for _ in range(steps):
        optimizer.zero_grad()
        optimizer.replicas.backward(loss)
        optimizer.step()
    return optimizer.replicas.params.clone()


SAME_NAMES = ("a parameter assigned", "a bias assigned", "to(float64)", "half()",
              "one element assigned, of the same value", "a parameter put into _parameters", "data assigned")  # fmt: skip


@pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("how", SAME_NAMES)
def test_rebind_takes_replaced_parameters_back(how, compute_dtype):
    optimizer, loss = trained(compute_dtype=compute_dtype), task()
    replicas = optimizer.replicas
    twin = copy.deepcopy(optimizer)
    before = replicas.params.clone()
    REPLACED[how](replicas.eta)
    with pytest.raises(RuntimeError, match="rebind"):
        optimizer.step()
    replicas.rebind()
    if how != "half()" and compute_dtype is None:
        assert torch.equal(replicas.params, before)
    twin.replicas.params.copy_(replicas.params)
    for row, net in enumerate(replicas):
        for p, mine in zip(trainable(net).values(), replicas.trained[row], strict=True):
            assert p is mine
        assert net.tied.weight is net.fc.weight
    if compute_dtype is None:
        replicas.eta.norm.float()  # its statistics
        assert torch.equal(train(optimizer, loss), train(twin, loss))
        for p, view in zip(replicas.trained[1], replicas.layout.views(replicas.params[1]), strict=True):
            assert p.data_ptr() == view.data_ptr()


def test_rebind_after_load_state_dict_that_assigns():
    replicas = hta.Replicas(Plain(), partition={})
    optimizer, loss = hta.HomotopySGD(replicas, 0.1, 0.9), task()
    train(optimizer, loss)
    twin = copy.deepcopy(optimizer)
    for one in (replicas, twin.replicas):
        for i, net in enumerate(one):
            torch.manual_seed(i)
            net.load_state_dict({k: torch.randn_like(v) for k, v in net.state_dict().items()}, assign=one is replicas)
    replicas.rebind()
    assert torch.equal(train(optimizer, loss), train(twin, loss))


def test_rebind_takes_new_values_and_gradients():
    optimizer = trained()
    net = optimizer.replicas.eta
    net.fc.bias = nn.Parameter(torch.full((16,), 3.0))
    net.fc.bias.grad = torch.full((16,), 5.0)
    optimizer.replicas.rebind()
    index = optimizer.replicas.layout.names.index("fc.bias")
    assert (optimizer.replicas.layout.views(optimizer.replicas.params[1])[index] == 3).all()
    assert (optimizer.replicas.layout.views(optimizer.replicas.grads[1])[index] == 5).all()


def test_rebind_keeps_the_digits_of_masters_that_were_not_replaced():
    optimizer = trained(compute_dtype=torch.bfloat16)
    before = optimizer.replicas.params.clone()
    net = optimizer.replicas.theta
    net.fc.bias = nn.Parameter(net.fc.bias.detach().clone())
    optimizer.replicas.rebind()
    index = optimizer.replicas.layout.names.index("fc.bias")
    where = optimizer.replicas.layout.views(torch.zeros_like(before[0]))[index].fill_(1)._base.reshape(-1) > 0
    assert torch.equal(optimizer.replicas.params[:, ~where[: before.shape[1]]], before[:, ~where[: before.shape[1]]])


HARMLESS: dict[str, Any] = {
    "nothing": lambda net: None,
    "pruning, which renames": lambda net: prune.l1_unstructured(net.fc, "bias", 0.5),
    "spectral_norm": lambda net: parametrizations.spectral_norm(net.conv),
    "a frozen parameter added": lambda net: net.register_parameter("extra", nn.Parameter(torch.ones(2), False)),
    "a buffer added": lambda net: net.register_buffer("extra", torch.ones(2)),
    "a layer without parameters replaced": lambda net: setattr(net, "relu", nn.Tanh()),
    "a layer wrapped as it is": lambda net: setattr(net, "fc", nn.Sequential(net.fc)),
    "the same parameter assigned": lambda net: setattr(net.conv, "weight", net.conv.weight),
    "load_state_dict": lambda net: net.load_state_dict(copy.deepcopy(net.state_dict())),
    "a parameter frozen": lambda net: net.gain.requires_grad_(False),
}  # fmt: skip


@pytest.mark.parametrize("how", HARMLESS)
def test_what_leaves_the_trained_parameters_in_place_goes_on(how):
    optimizer, loss = trained(), task()
    for net in optimizer.replicas:
        HARMLESS[how](net)
    before = optimizer.replicas.params.clone()
    optimizer.zero_grad()
    optimizer.replicas.backward(loss)
    assert optimizer.replicas.grads[:, 1024:].abs().sum(1).all()
    optimizer.step()
    assert not torch.equal(before, optimizer.replicas.params)
    if "pruning" in how:  # torch cannot copy such a module
        return
    merged = optimizer.replicas.merge()
    assert merged(torch.randn(2, 1, 4, 4)).isfinite().all()


# ----------------------------------------------------------------------------------------------------- copies and pickles


def deep(optimizer):
    return copy.deepcopy(optimizer)


def pickled(optimizer):
    return pickle.loads(pickle.dumps(optimizer))


def saved(optimizer):
    file = io.BytesIO()
    torch.save(optimizer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


class Plain(nn.Module):
    """Runs in any dtype."""

    def __init__(self):
        super().__init__()
        self.one, self.norm, self.two = nn.Linear(16, 8), nn.LayerNorm(8), nn.Linear(8, 16)

    def forward(self, x):
        x = self.one(x.flatten(1).to(self.one.weight.dtype))
        return self.two(self.norm(x.float()).to(x.dtype)).float()


GROUPS = [{"params": lambda name: name.endswith("bias"), "weight_decay": 0.0}]
PROPOSALS = {"SGD": hta.SGD(0.05, 0.9, 1e-3), "AdamW": hta.AdamW(0.01)}
COUPLINGS = [hta.Homotopy(0.05), hta.Explicit(1.0), hta.EMA(0.9), hta.Lookahead(0.5, every=2), hta.Elastic(0.1),
             hta.Parle(every=2), hta.Average(0.1, every=3)]  # fmt: skip


@pytest.mark.parametrize("again", [deep, pickled, saved])
@pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("coupling", COUPLINGS, ids=lambda c: type(c).__name__)
@pytest.mark.parametrize("proposal", PROPOSALS)
def test_copies_train_on_to_the_same_bits(proposal, coupling, compute_dtype, again):
    replicas = hta.Replicas(Plain(), 3, "hashed", "init", compute_dtype=compute_dtype)
    groups = [] if again is not deep else GROUPS  # a function in them need not pickle
    optimizer = hta.CoupledOptimizer(replicas, PROPOSALS[proposal], coupling, groups=groups)
    losses = [task() for _ in range(3)]
    for loss in losses:
        train(optimizer, loss)
    replicas.partition.resample(77)
    other = again(optimizer)
    assert other.replicas is not replicas
    assert other.replicas.params.data_ptr() != replicas.params.data_ptr()
    assert torch.equal(other.replicas.partition.flat(), replicas.partition.flat())
    for loss in losses:
        assert torch.equal(train(optimizer, loss), train(other, loss))
    assert str(optimizer.stats) == str(other.stats)  # NaN too
    assert optimizer.steps == other.steps
    if replicas.anchor is not None:
        assert torch.equal(replicas.anchor, other.replicas.anchor)


@pytest.mark.parametrize("again", [deep, pickled, saved])
def test_replicas_alone_are_copied_with_anchor_and_gradients(again):
    replicas = hta.Replicas(Net(), 2, "hashed", "zero")
    replicas.backward(task())
    other = again(replicas)
    assert other.anchor is None
    assert torch.equal(other.grads, replicas.grads)
    assert torch.equal(other.params, replicas.params)
    assert all(p.grad is not None for net in other for p in trainable(net).values())


# --------------------------------------------------------------------------------------------------- sparse gradients


class Sparse(nn.Module):
    def __init__(self, sparse):
        super().__init__()
        self.embed = nn.Embedding(11, 8, sparse=sparse)
        self.head = nn.Linear(8, 11)

    def forward(self, x):
        return self.head(self.embed(x))


def no_zero(optimizer):
    pass


def by_optimizer(optimizer):
    optimizer.zero_grad()


def by_model(optimizer):
    for net in optimizer.replicas:
        net.zero_grad(set_to_none=True)


@pytest.mark.parametrize("clear", [no_zero, by_optimizer, by_model])
@pytest.mark.parametrize("passes", [1, 2])
def test_sparse_gradients_are_as_good_as_dense(clear, passes):
    x = torch.randint(0, 11, (20,))
    results, model = [], Sparse(True)
    for sparse in (True, False):
        net = copy.deepcopy(model)
        net.embed.sparse = sparse
        optimizer = hta.HomotopySGD(hta.Replicas(net, partition={}), 0.1, 0.9)
        for _ in range(4):
            clear(optimizer)
            for _ in range(passes):
                optimizer.replicas.backward(lambda net: F.cross_entropy(net(x), x))
            optimizer.step()
        results.append(optimizer.replicas.params.clone())
    assert torch.allclose(results[0], results[1], rtol=1e-5, atol=1e-6)


# -------------------------------------------------------------------------------------------------------- fake tensors


def test_fake_tensors_pass_through_the_ops():
    with FakeTensorMode():
        theta, eta, g, h = (torch.randn(50) for _ in range(4))
        labels = torch.zeros(50, dtype=torch.uint8)
        assert hta.homotopy_penalty(theta, eta, None, labels, 0.1).shape == ()
        assert hta.homotopy_penalty_accumulate_(g, h, theta, eta, None, labels, 0.1).shape == ()
        hta.homotopy_step_(theta, eta, g, h, None, None, None, labels, L=0.1, lr=0.1)


def test_fake_tensors_are_refused_by_replicas():
    with FakeTensorMode(), pytest.raises(TypeError, match="must be a real tensor, got a fake one"):
        hta.Replicas(nn.Linear(3, 3))
    optimizer = hta.HomotopySGD(hta.Replicas(Net()), 0.1)
    before = optimizer.replicas.params.clone()
    with FakeTensorMode(), pytest.raises(RuntimeError, match="FakeTensorMode"):
        optimizer.step()
    assert torch.equal(optimizer.replicas.params, before)
    assert optimizer.steps == 0


def test_functional_calls_leave_the_copies_alone():
    """torch.func.functional_call swaps parameters and puts them back."""
    optimizer = trained()
    net = optimizer.replicas.theta
    values = {name: p.detach() * 2 for name, p in net.named_parameters()}
    functional_call(net, values, (torch.randn(2, 1, 4, 4),))
    optimizer.step()


def test_adapters_train_in_new_replicas():
    model = Net().requires_grad_(False)
    model.fc = Wrapped(model.fc)
    assign(model)
    replicas = hta.Replicas(model, partition={})
    assert replicas.layout.names == ("fc.down",)
