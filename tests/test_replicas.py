"""Replicas: two networks over one buffer, and still ordinary modules."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune

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


@pytest.mark.parametrize("loader", [iter([]), [], torch.utils.data.DataLoader([])])
def test_merge_refuses_a_loader_without_a_batch(loader):
    replicas = hta.Replicas(conv_net())
    with pytest.raises(ValueError, match="loader must give at least one batch, got none"):
        replicas.merge(loader)


@pytest.mark.parametrize("norm", [parametrizations.spectral_norm, nn.utils.spectral_norm])
@pytest.mark.parametrize("signs", [1, -1])  # of singular vectors, whose mean may be 0
def test_merging_finds_spectral_norms_anew(norm, signs):
    nets = [nn.Sequential(norm(nn.Linear(6, 5)), nn.Tanh(), norm(nn.ConvTranspose1d(2, 3, 3))).eval() for _ in range(2)]
    for buffer in nets[1].buffers():
        buffer.mul_(signs)
    replicas = hta.Replicas(nets[0], 2, {}, start=nets[1:])
    merged = replicas.merge()
    assert not any(module.training for module in merged.modules())
    for hook in merged[0]._forward_pre_hooks.values():  # of the former one, which makes the weight
        hook(merged[0], None)
    for layer, dim in ((merged[0], 0), (merged[2], 1)):
        matrix = layer.weight.detach().transpose(0, dim).flatten(1)
        assert torch.linalg.matrix_norm(matrix, 2) == pytest.approx(1.0, abs=0.05)
    for vector in merged.buffers():
        assert vector.norm() == pytest.approx(1.0, rel=1e-5)
    alone = hta.Replicas(norm(nn.Linear(6, 5)), 1, {})
    for was, now in zip(alone.theta.buffers(), alone.merge().buffers(), strict=True):
        assert torch.equal(was, now)


def test_merging_refuses_orthogonal_bases_that_differ():
    nets = [nn.Sequential(parametrizations.orthogonal(nn.Linear(4, 4))) for _ in range(2)]
    replicas = hta.Replicas(nets[0], 2, {}, start=nets[1:])
    with pytest.raises(
        ValueError, match=r"buffer '0\.parametrizations\.weight\.0\.base' must be the same in all copies"
    ):
        replicas.merge()
    weight = hta.Replicas(nets[0], 2, {}).merge()[0].weight
    torch.testing.assert_close(weight @ weight.T, torch.eye(4), atol=1e-5, rtol=0)


class Complex(nn.Linear):
    def __init__(self):
        super().__init__(2, 2)
        self.register_buffer("phase", torch.ones(3, dtype=torch.complex64))
        self.register_buffer("small", torch.ones(3, dtype=torch.complex32))
        self.spectrum = nn.Parameter(torch.ones(3, dtype=torch.complex128), requires_grad=False)


@pytest.mark.filterwarnings("ignore:ComplexHalf")
def test_merging_takes_the_mean_of_complex_numbers_too():
    replicas = hta.Replicas(Complex(), 2, {})
    for name in ("phase", "small", "spectrum"):
        getattr(replicas.eta, name).data = torch.full_like(getattr(replicas.eta, name), 3j)
    merged = replicas.merge()
    for name in ("phase", "small", "spectrum"):
        assert getattr(merged, name).tolist() == [0.5 + 1.5j] * 3


ALONE = {
    "buffer": lambda net: net.register_buffer("extra", torch.ones(2)),
    "complex buffer": lambda net: net.register_buffer("extra", torch.ones(2, dtype=torch.complex64)),
    "parameter": lambda net: net.register_parameter("extra", nn.Parameter(torch.ones(2), False)),
}


@pytest.mark.parametrize("what", ALONE)
@pytest.mark.parametrize("row", [0, 1])
def test_merging_names_what_one_copy_alone_has(what, row):
    replicas = hta.Replicas(conv_net())
    ALONE[what](replicas.copies[row])
    got = r"\(2,\) in copy 0, None in copy 1" if row == 0 else r"None in copy 0, \(2,\) in copy 1"
    message = f"{what.split()[-1]} 'extra' must be the same in all copies, got {got}"
    with pytest.raises(ValueError, match=message):
        replicas.merge()
    ALONE[what](replicas.copies[1 - row])
    assert torch.equal(replicas.merge().extra, replicas.theta.extra)
    replicas.eta.extra.data = torch.ones(3)
    with pytest.raises(ValueError, match=r"got \(2,\) in copy 0, \(3,\) in copy 1"):
        replicas.merge()


def test_buffers_in_another_order_are_merged_by_name():
    replicas = hta.Replicas(nn.Linear(2, 2), 2, {})
    for net, names in zip(replicas, ("ab", "ba"), strict=True):
        for name in names:
            net.register_buffer(name, torch.full((2,), float(ord(name))))
    merged = replicas.merge()
    assert (merged.a[0], merged.b[0]) == (ord("a"), ord("b"))


def test_replicas_of_one_hashed_partition_draw_each_their_own():
    net = conv_net()
    partition = hta.Partition.hashed(net, seed=3)
    one, other = hta.Replicas(copy.deepcopy(net), 2, partition), hta.Replicas(net, 2, partition)
    state = one.state_dict()
    one.partition.resample()
    other.partition.resample(77)
    assert [int(of.seed) for of in (partition, one.partition, other.partition)] == [3, 4, 77]
    other.load_state_dict(one.state_dict() | state)
    assert [int(of.seed) for of in (partition, one.partition, other.partition)] == [3, 4, 3]


@pytest.mark.parametrize("state", [torch.full((2,), torch.nan), torch.ones(2), torch.ones(3).long(), [1, 2], None])
def test_a_state_that_is_no_digest_is_refused(state):
    replicas = hta.Replicas(conv_net(), 2, "hashed")
    saved = copy.deepcopy(replicas.state_dict())
    before = replicas.partition.flat()
    with pytest.raises(RuntimeError, match=r"^state must be int64 of shape \(2,\)"):
        replicas.set_extra_state(state)
    if state is not None:
        with pytest.raises(RuntimeError, match=r"'_extra_state'"):
            replicas.load_state_dict({**saved, "_extra_state": state})
    assert torch.equal(replicas.partition.flat(), before)


class Sparse(nn.Module):
    def __init__(self, layout):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.weight = nn.Parameter(torch.eye(3).to_sparse(layout=layout))


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
@pytest.mark.parametrize(
    "make", [lambda net: hta.Replicas(net, 1), hta.Layout.of, hta.Partition.auto, hta.Partition.none]
)
def test_a_sparse_parameter_is_named(layout, make):
    with pytest.raises(TypeError, match=f"model's parameter 'weight' must be dense, got one of {layout}"):
        make(Sparse(layout))
    frozen = Sparse(layout)
    frozen.weight.requires_grad_(False)
    make(frozen)


# ----------------------------------------------------------------------------------------------------- inference mode

MADE: dict[str, Callable] = {
    "a coupling": lambda o: setattr(o, "coupling", hta.Parle(every=2)),
    "a state": lambda o: o.load_state_dict(copy.deepcopy(o.state_dict())),
    "a coupling and a state": lambda o: (MADE["a coupling"](o), MADE["a state"](o)),
    "torch's state": lambda o: o.load_torch_state_dict(0, o.torch_state_dict(0)),
    "a plan": lambda o: o.plan([0.1] * 3),
    "another dtype": lambda o: o.replicas.double(),
    "a step in another dtype": lambda o: (o.replicas.double(), o.step()),
    "a step with something frozen": lambda o: ([n[0].bias.requires_grad_(False) for n in o.replicas], o.step()),
    "cleared state": lambda o: (o.state.clear(), o.step()),
    "another parameter": lambda o: (
        setattr(o.replicas.theta[0], "bias", nn.Parameter(torch.ones(4))),
        o.replicas.rebind(),
    ),
}


@pytest.mark.parametrize("proposal", [hta.SGD(0.1, 0.9), hta.AdamW(0.1)])
@pytest.mark.parametrize("what", MADE)
def test_what_is_made_in_inference_mode_trains(what, proposal):
    replicas = hta.Replicas(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), 2, {})
    optimizer = hta.CoupledOptimizer(replicas, proposal, hta.EMA())
    with torch.inference_mode():
        MADE[what](optimizer)
    trains(optimizer)


def trains(optimizer):
    replicas = optimizer.replicas
    for _ in range(2):
        optimizer.zero_grad()
        replicas.backward(lambda net: net(torch.randn(5, 3, dtype=replicas.dtype)).square().sum())
        before = replicas.params.clone()
        optimizer.step()
        assert not torch.equal(before, replicas.params)
        optimizer.load_state_dict(optimizer.state_dict())


def test_replicas_and_optimizers_made_in_inference_mode_train():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    with torch.inference_mode():
        optimizer = hta.HomotopySGD(hta.Replicas(model, 3, {}, anchor="random"), 0.1, 0.9)
        made_there = nn.Linear(3, 3)
    trains(optimizer)
    with pytest.raises(TypeError, match="parameter 'weight' of copy 0 must be one that can train, got one made under"):
        hta.Replicas(made_there)


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
