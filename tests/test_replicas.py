"""Replicas: two networks over one buffer, and still ordinary modules."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

import hta_fused as hta


class Awkward(nn.Module):
    """Tied, frozen, integer, half-used: what real models are made of."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight
        self.norm = nn.BatchNorm1d(8)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.index = nn.Parameter(torch.arange(3), requires_grad=False)
        self.unused = nn.Parameter(torch.ones(5))
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, x):
        return self.head(self.frozen(self.norm(self.embed(x))) * self.scale)


def conv_net():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4))


def cross_entropy(net, batch):
    return F.cross_entropy(net(batch[0]), batch[1])


def image_batch(n=6):
    return torch.randn(n, 3, 8, 8), torch.randint(0, 4, (n,))


def test_theta_is_the_model_and_eta_a_copy_of_the_same_values():
    model = conv_net()
    before = copy.deepcopy(model.state_dict())
    replicas = hta.Replicas(model)
    assert replicas.theta is model
    for net in replicas:
        for name, value in net.state_dict().items():
            assert torch.equal(value, before[name])
    assert torch.equal(replicas.params[0], replicas.params[1])
    assert torch.equal(replicas.params[0], replicas.anchor)


def test_writing_the_buffer_writes_the_networks():
    replicas = hta.Replicas(conv_net())
    replicas.params[1].fill_(0.25)
    assert all((p == 0.25).all() for p in replicas.eta.parameters())
    assert not any((p == 0.25).all() for p in replicas.theta.parameters() if p.numel() > 8)


@pytest.mark.parametrize("channels_last", [False, True])
def test_backward_fills_the_gradient_buffer(channels_last):
    model = conv_net()
    model = model.to(memory_format=torch.channels_last) if channels_last else model
    plain = copy.deepcopy(model)
    replicas = hta.Replicas(model)
    batch = image_batch()
    replicas.loss(cross_entropy, batch).backward()
    cross_entropy(plain, batch).backward()
    for row in (0, 1):
        for name, view, p in zip(
            replicas.layout.names, replicas.layout.views(replicas.grads[row]), plain.parameters(), strict=True
        ):
            assert torch.allclose(view, p.grad, rtol=1e-5, atol=1e-7), name
        for p, view in zip(replicas.trained[row], replicas.layout.views(replicas.grads[row]), strict=True):
            assert p.grad.data_ptr() == view.data_ptr()
            assert p.stride() == view.stride()
    if channels_last:
        assert replicas.trained[0][0].is_contiguous(memory_format=torch.channels_last)


def test_tied_frozen_and_integer_parameters():
    model = Awkward()
    replicas = hta.Replicas(model, partition={"scale": 1})
    assert set(replicas.layout.names) == {"embed.weight", "norm.weight", "norm.bias", "unused", "scale"}
    for net in replicas:
        assert net.head.weight is net.embed.weight
    frozen = model.frozen.weight.clone()
    optimizer = hta.HomotopySGD(replicas, lr=0.1, momentum=0.9, L=0.01)
    x = torch.randint(0, 11, (20,))
    for _ in range(3):
        optimizer.zero_grad()
        replicas.backward(lambda net: F.cross_entropy(net(x), x))
        optimizer.step()
    assert torch.equal(model.frozen.weight, frozen)
    assert torch.equal(replicas.eta.index, torch.arange(3))
    assert torch.allclose(model.unused, torch.ones(5), rtol=1e-6)  # equal copies stay where they are, to a rounding
    assert not torch.equal(model.scale, torch.tensor(1.5))
    assert model.head.weight.data_ptr() == model.embed.weight.data_ptr()


def test_one_batch_two_batches_and_the_cheap_backward_agree():
    replicas = hta.Replicas(conv_net().eval())
    first, second = image_batch(), image_batch()
    both = replicas.loss(cross_entropy, first, second)
    assert float(both) == pytest.approx(
        float(cross_entropy(replicas.theta, first) + cross_entropy(replicas.eta, second))
    )
    assert float(replicas.loss(cross_entropy, first)) == pytest.approx(2 * float(cross_entropy(replicas.theta, first)))
    both.backward()
    grads = replicas.grads.clone()
    replicas.zero_grad()
    losses = replicas.backward(cross_entropy, first, second)
    assert torch.allclose(replicas.grads, grads, atol=1e-7)
    assert float(sum(losses)) == pytest.approx(float(both))
    with pytest.raises(ValueError, match="batches must be none, one for all copies or one for each of 2, got 3"):
        replicas.loss(cross_entropy, first, first, first)


def test_gradients_that_were_put_elsewhere_are_collected():
    replicas = hta.Replicas(conv_net())
    replicas.theta.zero_grad()  # sets .grad to None
    batch = image_batch()
    cross_entropy(replicas.theta, batch).backward()
    expected = [p.grad.clone() for p in replicas.theta.parameters()]
    replicas.grads[1] = 7.0
    replicas.eta[0].weight.grad = None
    replicas.collect_grads()
    for view, grad in zip(replicas.layout.views(replicas.grads[0]), expected, strict=True):
        assert torch.equal(view, grad)
    assert not replicas.layout.views(replicas.grads[1])[0].any()
    assert (replicas.layout.views(replicas.grads[1])[1] == 7).all()


def test_a_model_moved_afterwards_is_refused():
    replicas = hta.Replicas(conv_net())
    optimizer = hta.HomotopySGD(replicas, lr=0.1)
    replicas.eta.double()
    with pytest.raises(RuntimeError, match=r"'0.weight' of copy 1 no longer lies in the flat buffer"):
        optimizer.step()


def test_merge_is_the_mean_and_stands_alone():
    replicas = hta.Replicas(conv_net(), start="independent")
    replicas.theta[1].running_mean.fill_(1.0)
    replicas.eta[1].running_mean.fill_(3.0)
    merged = replicas.merge()
    for m, a, b in zip(merged.parameters(), replicas.theta.parameters(), replicas.eta.parameters(), strict=True):
        assert torch.allclose(m, (a + b) / 2)
    assert (merged[1].running_mean == 2).all()
    before = replicas.params.clone()
    with torch.no_grad():
        for p in merged.parameters():
            p.zero_()
    assert torch.equal(replicas.params, before)


def test_merge_estimates_batch_norm_statistics_anew():
    replicas = hta.Replicas(conv_net(), start="independent")
    inputs = [torch.randn(50, 3, 8, 8) for _ in range(3)]
    merged = replicas.merge(inputs)
    activations = torch.cat([merged[0](x) for x in inputs])
    assert torch.allclose(merged[1].running_mean, activations.mean((0, 2, 3)), atol=1e-4)


def test_anchors():
    model = conv_net()
    state = {k: torch.full_like(v, 2) for k, v in model.state_dict().items()}
    assert hta.Replicas(copy.deepcopy(model), anchor="zero").anchor is None
    views = hta.Replicas(copy.deepcopy(model), anchor=state)
    assert all((v == 2).all() for v in views.layout.views(views.anchor))
    other = hta.Replicas(copy.deepcopy(model), anchor="random")
    assert other.anchor.any()
    assert not torch.equal(other.anchor, other.params[0])
    flat = torch.randn(views.layout.numel)
    taken = hta.Replicas(copy.deepcopy(model), anchor=flat).anchor
    assert all(map(torch.equal, views.layout.views(taken), views.layout.views(flat)))
    assert taken.count_nonzero() == sum(p.numel() for p in model.parameters())  # nothing between the parameters


def test_independent_copies_differ():
    replicas = hta.Replicas(conv_net(), start="independent")
    assert not torch.equal(replicas.theta[0].weight, replicas.eta[0].weight)
    twin = conv_net()
    assert hta.Replicas(conv_net(), start=[twin]).eta is twin


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: hta.Replicas(nn.ReLU()), ValueError, "no parameter that requires a gradient"),
        (lambda: hta.Replicas(nn.Sequential(nn.Conv2d(1, 1, 1), nn.Linear(1, 1).double())), TypeError, "share one dtype"),
        (lambda: hta.Replicas(conv_net(), partition="nope"), ValueError, "partition must be one of"),
        (lambda: hta.Replicas(conv_net(), anchor="nope"), ValueError, "anchor must be 'init', 'zero', 'random'"),
        (lambda: hta.Replicas(conv_net(), anchor=torch.zeros(3)), ValueError, r"anchor has shape \(3,\)"),
        (lambda: hta.Replicas(conv_net(), anchor={}), ValueError, "anchor has no entry '0.weight'"),
        (lambda: hta.Replicas(conv_net(), anchor={"0.weight": torch.zeros(1)}), ValueError, "'0.weight' has shape"),
        (lambda: hta.Replicas(conv_net(), start="twin"), ValueError, "start must be 'copy', 'independent' or a list of modules"),
        (lambda: hta.Replicas(conv_net(), start=[nn.Linear(2, 2)]), ValueError, "0..s trainable parameters do not match"),
        (lambda: hta.Replicas(Awkward(), 2, {"scale": 1}, start="independent"), ValueError, "has no reset_parameters"),
    ],
)  # fmt: skip
def test_nonsense_is_named(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("copies", [1, 2, 3])
@pytest.mark.parametrize("partition", ["conv_blocks", "random", "random_units", "hashed"])
def test_there_are_no_more_blocks_than_copies(copies, partition):
    """One copy over tiles of a block of their own, which a second copy would have been free on."""
    replicas = hta.Replicas(nn.Conv2d(16, 256, 3), copies, partition)
    assert replicas.partition.flat().amax() == copies
    before = replicas.params.clone()
    hta.HomotopySGD(replicas, 0.1, L=1.0).step()
    assert torch.allclose(replicas.params, before, rtol=1e-6)  # no gradient, and every copy is the anchor


class Scaled(nn.Module):
    """Draws a part of itself anew only."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.gain = nn.Parameter(torch.ones(4))

    def reset_parameters(self):
        nn.init.normal_(self.gain)


@pytest.mark.parametrize(
    ("make", "left"),
    [
        (lambda: nn.Sequential(torch.nn.utils.weight_norm(nn.Linear(4, 4))), "0.weight_g"),
        (lambda: nn.Sequential(torch.nn.utils.spectral_norm(nn.Linear(4, 4))), "0.weight_orig"),
        (lambda: nn.Sequential(prune.l1_unstructured(nn.Linear(4, 4), "weight", 0.5)), "0.weight_orig"),
        (Scaled, "fc.weight"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*")
def test_what_reset_parameters_leaves_is_named(make, left):
    for options in ({"start": "independent"}, {"anchor": "random"}):
        with pytest.raises(ValueError, match=f"parameter '{left}' is not drawn anew by reset_parameters"):
            hta.Replicas(make(), 2, {}, **options)


def test_hooks_that_a_deep_copy_lacks_are_said():
    for hook in ("register_hook", "register_post_accumulate_grad_hook"):
        net = nn.Linear(4, 4)
        getattr(net.weight, hook)(lambda grad: None)
        with pytest.warns(UserWarning, match="hooks of parameter 'weight' are copy 0's alone"):
            hta.Replicas(net, 2, {})


def test_a_flat_anchor_pulls_at_parameters_only():
    net = nn.Linear(4, 4, bias=False)
    layout = hta.Layout.of(net)
    partition = hta.Partition.own(net, {"weight": 1})
    replicas = hta.Replicas(net, 2, partition, anchor=torch.ones(layout.numel))
    optimizer = hta.HomotopySGD(replicas, 0.1, L=1.0)
    optimizer.step()
    theta, eta = (copy.weight.detach() for copy in replicas)
    assert optimizer.stats.distance == pytest.approx(float((theta - eta).norm()), rel=1e-5, abs=1e-6)
