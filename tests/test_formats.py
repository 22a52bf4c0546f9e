"""Buffers in formats of their own: how numbers are kept, that every backend leaves the same bits, and that it trains."""

import copy
import math

import formatted
import pytest
import torch
import torch.nn.functional as F
from conftest import pattern
from formatted import BF16, F16, assert_same, check, clones, run, tensors_of
from torch import nn

import hta_fused as hta
from hta_fused.kernels import formats

SPLIT = {"split": torch.bfloat16, "split half": torch.float16}


def empty_like(values: torch.Tensor, name: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A row of a format, and what goes with it."""
    if name in SPLIT:
        return values.to(SPLIT[name]), torch.zeros(len(values), dtype=torch.int8)
    if name in ("codes", "squares"):
        return torch.zeros(len(values), dtype=torch.uint8), torch.zeros(-(-len(values) // formats.SCALED))
    return values.to(getattr(torch, name)), None


def kept(values: torch.Tensor, name: str, noise: torch.Tensor | None = None) -> torch.Tensor:
    """What comes back of values that are kept in a format."""
    row, more = empty_like(values, name)
    parts = formats.packed(values, row, more, noise, name == "squares")
    return formats.unpack(parts[0], parts[1] if more is not None else None, name == "squares")


def awkward() -> torch.Tensor:
    """Of many magnitudes, and what floating point has at its ends."""
    wide = torch.randn(100_000) * 10 ** (torch.rand(100_000) * 60 - 35)
    tiny, huge = torch.finfo(torch.float32).tiny, 3.3e38
    return torch.cat(
        [wide, torch.tensor([0.0, -0.0, tiny, -tiny, tiny / 2, 1e-45, -1e-45, huge, -huge, 1.0, -1.0, 2.0, 65504.0])]
    )


def test_a_split_bfloat16_is_off_by_2_to_the_minus_16_at_most():
    x = awkward()
    normal = x.abs() >= torch.finfo(torch.float32).tiny
    off = (kept(x, "split").double() - x.double()).abs()
    assert (off[normal] <= x[normal].double().abs() * 2.0**-16).all()
    assert (off[~normal] <= 2.0**-142).all()  # half of the last place that is kept
    assert kept(torch.tensor([math.inf, -math.inf]), "split").tolist() == [math.inf, -math.inf]


def test_a_split_float16_is_off_by_2_to_the_minus_17_at_most_within_its_range():
    x = awkward()
    x = x[x.abs() <= 65504]
    off = (kept(x, "split half").double() - x.double()).abs()
    assert (off <= (x.double().abs() * 2.0**-17).clamp(min=2.0**-32)).all()


@pytest.mark.parametrize("name", SPLIT)
def test_what_a_network_reads_is_the_nearest_number_and_what_comes_back_is_kept_as_it_is(name):
    x = torch.randn(100_000) * 10 ** (torch.rand(100_000) * 6 - 4)
    row, more = formats.packed(x, *empty_like(x, name))
    nearest = (x.to(SPLIT[name]).double() - x.double()).abs()
    off = x.double().abs() * 2.0**-15
    off = off.clamp(min=2.0**-32) if name == "split half" else off  # a subnormal's last place that is kept
    assert ((row.double() - x.double()).abs() <= nearest + off).all()
    again = formats.packed(formats.unpack(row, more), row, more)
    assert torch.equal(again[0], row)
    assert torch.equal(again[1], more)


@pytest.mark.parametrize("name", [*SPLIT, "bfloat16", "codes", "squares"])
def test_what_is_not_finite_shows(name):
    x = torch.randn(256).abs()
    x[3] = math.nan
    back = kept(x, name)
    assert back[3].isnan()
    assert (back.isnan() | (torch.arange(256) >= 128) | (name not in ("codes", "squares"))).all()  # all under one scale


@pytest.mark.parametrize("name", ["codes", "squares"])
def test_codes_are_off_by_a_step_at_most_and_leave_their_scale(name):
    """A step is a 16th of the magnitude's binade, or near zero of the least one's."""
    x = torch.randn(128 * 1000) * 10 ** (torch.rand(128 * 1000) * 8 - 6)
    x = x * x if name == "squares" else x
    scale = x.view(-1, 128).abs().amax(1).repeat_interleave(128)
    least = 2.0 ** (-16 if name == "squares" else -8)
    for noise in (None, formats.noise_of(torch.tensor([5]), 0, len(x))):
        back = kept(x, name, noise)
        step = (x.abs() + least * scale) / (16 * 0.96)
        off = (back - x).abs()
        lifted = least * scale / 16 if name == "squares" else 0 * scale  # what is above 0 stays so
        assert (off <= step * (1 if noise is not None else 0.5) + lifted).all()
        top = x.abs() == scale
        assert torch.equal(back[top], x[top])
    if name == "squares":
        assert (back[x > 0] > 0).all()  # a root of it divides


@pytest.mark.parametrize("name", ["codes", "squares"])
def test_codes_that_come_back_are_kept_as_they_are(name):
    """So that a state_dict, which holds float32, resumes to the bit."""
    x = torch.randn(128 * 500) * 10 ** (torch.rand(128 * 500) * 4 - 30)
    x = x.abs() if name == "squares" else x
    row, scale = formats.packed(
        x, *empty_like(x, name), formats.noise_of(torch.tensor([1]), 3, len(x)), name == "squares"
    )
    again = formats.packed(formats.unpack(row, scale, name == "squares"), row, scale, None, name == "squares")
    assert torch.equal(again[0], row)
    assert torch.equal(again[1], scale)


@pytest.mark.parametrize("value", [0.0, 1.0, -2.5e-3, 1e-38])
@pytest.mark.parametrize("name", ["codes", "squares", "bfloat16", "split"])
def test_tiles_of_one_value_come_back(name, value):
    x = torch.full((1024,), abs(value) if name == "squares" else value)
    back = kept(x, name, formats.noise_of(torch.tensor([2]), 1, 1024))
    assert torch.allclose(back, x, rtol=2.0**-7, atol=1e-38)
    if name != "bfloat16":
        assert torch.allclose(back, x, rtol=2.0**-15, atol=1e-38)


@pytest.mark.parametrize("name", ["bfloat16", "codes", "squares", *SPLIT])
def test_rounding_at_random_is_right_on_average(name):
    """Ten million draws: the mean lies within four standard errors of the number."""
    draws = 10_000
    x = (torch.rand(1024) + 0.01) * (1 if name == "squares" else torch.randn(1024).sign())
    total, squares = torch.zeros(1024, dtype=torch.float64), torch.zeros(1024, dtype=torch.float64)
    for step in range(0, draws, 100):
        noise = torch.cat([formats.noise_of(torch.tensor([step + k]), 4, 1024) for k in range(100)])
        off = (kept(x.repeat(100), name, noise).double() - x.repeat(100).double()).view(100, 1024)
        total += off.sum(0)
        squares += off.square().sum(0)
    bound = 4 * float(squares.sum().sqrt())
    assert abs(float(total.sum())) <= bound
    step = (x.abs().double() + 2.0**-8) / 15 if name in ("codes", "squares") else x.abs().double() * 2.0**-6
    assert (total.abs() <= 6 * draws**0.5 * step / 2).all()  # of a thousand numbers, each
    assert float(squares.sum()) > 0


def test_random_bits_of_two_rows_and_two_steps_have_nothing_in_common():
    draws = [
        formats.noise_of(torch.tensor([noise]), row, 100_000).double() / 2**32 - 0.5
        for noise, row in ((0, 0), (0, 1), (1, 0))
    ]
    for i, a in enumerate(draws):
        assert abs(float(a.mean())) < 5 * (1 / 12 / 100_000) ** 0.5
        for b in draws[:i]:
            assert abs(float((a * b).mean())) < 0.01


# ------------------------------------------------------------------------------------------------------------- kernels


PROPOSED = [hta.SGD(0.1, 0.9, 1e-3, nesterov=True), hta.AdamW(0.01)]
COUPLED = [hta.Homotopy(0.1), hta.EMA(0.9), hta.Explicit(0.5)]


@pytest.mark.parametrize("copies", [*formatted.SPLIT, "fp32"])
@pytest.mark.parametrize("states", ["fp32", "bf16", "8 bits"])
@pytest.mark.parametrize("proposal", PROPOSED, ids=["sgd", "adamw"])
def test_kernels_leave_the_references_bits_in_every_format(backend, copies, states, proposal):
    n = 1500 if backend in ("triton", "nvrtc") else 40_000
    grads = F16 if copies == "split fp16" else BF16
    for m in (1, 2, 3):
        tensors = tensors_of(m, n, proposal, copies, states, BF16, grads, low=copies == "fp32")
        check(backend, tensors, proposal, COUPLED[m - 1], guard=False)


@pytest.mark.parametrize("n", [0, 1, 127, 128, 129, 1023, 1024, 1025, 20_000])
def test_awkward_sizes_in_formats(backend, n):
    if backend == "triton" and n > 2000:
        pytest.skip("Triton's interpreter is slow")
    check(backend, tensors_of(2, n, PROPOSED[1], "split bf16", "8 bits", BF16), PROPOSED[1], hta.EMA(0.9), guard=False)


@pytest.mark.parametrize("kind", ["bytes", "structural", "mixed", "hashed"])
def test_every_kind_of_label_in_formats(backend, kind):
    n = 6000 if backend not in ("triton", "nvrtc") else 3000
    labels, _ = pattern(kind, n, 3)
    tensors = tensors_of(3, n, PROPOSED[0], "split bf16", "8 bits", grads=torch.float32)
    check(backend, tensors, PROPOSED[0], hta.Homotopy(0.1), labels, guard=False)


def test_a_gradient_that_is_not_finite_changes_nothing(backend):
    tensors = tensors_of(2, 2000, PROPOSED[0], "split bf16", "8 bits", BF16)
    tensors["grads"][0][1, 1500] = math.nan
    before = clones(tensors)
    run(backend, tensors, PROPOSED[0], COUPLED[1], guard=True)
    assert tensors.pop("stats").tolist()[2:] == [1, 1]
    del before["stats"]
    assert_same(tensors, before)


def test_a_step_cut_at_its_sum_is_the_whole_step_but_for_one_rounding(backend):
    tensors = tensors_of(2, 2000, PROPOSED[0], "split bf16", "8 bits", BF16)
    whole, sums = clones(tensors), torch.zeros(2000)
    run(backend, whole, PROPOSED[0], COUPLED[0], guard=False)
    run(backend, tensors, PROPOSED[0], COUPLED[0], phase=1, sums=sums, guard=False)
    rounded = clones(tensors)  # the proposal, which may be larger than what it is shared into
    run(backend, tensors, PROPOSED[0], COUPLED[0], phase=2, sums=sums, guard=False)
    assert all(torch.equal(x, y) for x, y in zip(tensors["states"], whole["states"], strict=True))
    got, expected, proposal = (
        formats.unpack(c["copies"][0][0], c["corrections"][0][0]) for c in (tensors, whole, rounded)
    )
    assert ((got - expected).abs() <= 2.0**-15 * (expected.abs() + proposal.abs()) + 1e-6).all()


@pytest.mark.parametrize("wrong", ["scales", "noise", "corrections"])
def test_the_op_refuses_formats_that_lack_a_part(wrong):
    if not hta.backends()["cpu"].startswith("available"):
        pytest.skip("the extension was not built")
    tensors = tensors_of(2, 300, PROPOSED[0], "split bf16", "8 bits", None)
    if wrong != "noise":
        tensors[wrong] = [t[:, :1].contiguous() for t in tensors[wrong]]
    with pytest.raises(RuntimeError, match=wrong):
        run("cpu", tensors, PROPOSED[0], COUPLED[0], noise=None if wrong == "noise" else 77)


# ------------------------------------------------------------------------------------------- Replicas and optimizers


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10))


EVERY = [
    {"compute_dtype": torch.bfloat16, "master_format": "split", "state_format": "full"},
    {
        "compute_dtype": torch.bfloat16,
        "master_format": "split",
        "anchor_format": "bfloat16",
        "state_format": "bfloat16",
    },
    {"compute_dtype": torch.bfloat16, "master_format": "split", "anchor_format": "bfloat16", "state_format": "8bit"},
    {"compute_dtype": torch.float16, "master_format": "split", "state_format": "8bit"},
    {"state_format": "8bit"},
    {"anchor_format": "bfloat16", "state_format": "bfloat16"},
]
IDS = ["-".join(str(v).removeprefix("torch.") for v in options.values()) for options in EVERY]
X, Y = torch.randn(256, 1, 8, 8), torch.randint(10, (256,))


def made(model: nn.Module, options: dict, proposal, coupling=None) -> tuple[hta.Replicas, hta.CoupledOptimizer]:
    options = dict(options)
    state = options.pop("state_format", "full")
    replicas = hta.Replicas(model, 2, **options)
    return replicas, hta.CoupledOptimizer(replicas, proposal, coupling or hta.Homotopy(0.05), state_format=state)


def train(replicas, optimizer, steps) -> float:
    dtype = replicas.compute_dtype or torch.float32
    for s in steps:
        batch = X.split(32)[s % 8].to(dtype), Y.split(32)[s % 8]
        optimizer.zero_grad()
        losses = replicas.backward(lambda net, b: F.cross_entropy(net(b[0]).float(), b[1]), batch)
        optimizer.step()
    return float(sum(losses))


@pytest.mark.parametrize("options", EVERY, ids=IDS)
@pytest.mark.parametrize("proposal", [hta.SGD(0.05, 0.9, 1e-4), hta.AdamW(1e-3)], ids=["sgd", "adamw"])
def test_a_state_dict_resumes_to_the_bit_and_goes_to_full_precision_and_back(options, proposal):
    model = network()
    replicas, optimizer = made(copy.deepcopy(model), options, proposal, hta.EMA(0.9))
    train(replicas, optimizer, range(6))
    saved = copy.deepcopy((replicas.state_dict(), optimizer.state_dict()))
    assert all(v.dtype in (torch.float32, torch.bfloat16, torch.int64) for v in saved[0].values())
    train(replicas, optimizer, range(6, 12))

    again = made(network(), options, proposal, hta.EMA(0.9))
    for part, state in zip(again, saved, strict=True):
        part.load_state_dict(copy.deepcopy(state))
    train(*again, range(6, 12))
    assert torch.equal(again[0].params, replicas.params)
    assert torch.equal(again[0].anchor, replicas.anchor)

    full = made(network(), {}, proposal, hta.EMA(0.9))
    for part, state in zip(full, saved, strict=True):
        part.load_state_dict(copy.deepcopy(state))
    back = made(network(), options, proposal, hta.EMA(0.9))
    for part, source in zip(back, full, strict=True):
        part.load_state_dict(copy.deepcopy(source.state_dict()))
    for copy_ in (0, 1):  # torch's own layout, both ways
        back[1].load_torch_state_dict(copy_, full[1].torch_state_dict(copy_))
    train(*back, range(6, 12))
    assert torch.equal(back[0].params, replicas.params)


@pytest.mark.parametrize("options", EVERY, ids=IDS)
def test_copies_pickles_and_merges(options):
    replicas, optimizer = made(network(), options, hta.AdamW(1e-3))
    train(replicas, optimizer, range(3))
    twin_replicas, twin = copy.deepcopy((replicas, optimizer))
    for pair in ((replicas, optimizer), (twin_replicas, twin)):
        train(*pair, range(3, 6))
    assert torch.equal(twin_replicas.params, replicas.params)
    merged = replicas.merge()
    mean = replicas.layout.views(replicas.params.mean(0))
    for parameter, value in zip(merged.parameters(), mean, strict=True):
        assert torch.allclose(parameter.float(), value, rtol=2.0**-7)
    assert replicas.distance() > 0


def test_assigned_states_count_where_they_are_kept_in_bytes():
    replicas, optimizer = made(network(), {"state_format": "8bit"}, hta.SGD(0.05, 0.9))
    train(replicas, optimizer, range(2))
    parameter = replicas.trained[1][4]
    assert "momentum_buffer" not in optimizer.state[parameter]
    before = optimizer.torch_state_dict(0)
    optimizer.state[parameter]["momentum_buffer"] = torch.ones_like(parameter)
    optimizer.step()
    saved = optimizer.state_dict()["state"]
    assert set(saved[0]) == {"momentum_buffer"}
    after = optimizer.torch_state_dict(0)["state"][0]["momentum_buffer"]
    grad = replicas.trained[0][0].grad
    assert torch.allclose(after, before["state"][0]["momentum_buffer"] * 0.9 + grad, atol=float(grad.abs().max()) / 4)
    mine = optimizer.torch_state_dict(1)["state"][4]["momentum_buffer"]
    assert torch.allclose(mine, 0.9 + parameter.grad, rtol=0.1)


def test_what_others_write_to_a_parameter_counts_with_split_masters():
    replicas, optimizer = made(network(), EVERY[0], hta.SGD(0.05, 0.9))
    train(replicas, optimizer, range(2))
    with torch.no_grad():
        replicas.theta[4].weight.fill_(0.5)
        replicas.theta[1].weight.fill_(0.123456789)  # a normalisation's is float32
    state = replicas.state_dict()
    assert torch.equal(state["copies.0.4.weight"], torch.full((10, 512), 0.5))
    assert torch.allclose(state["copies.0.1.weight"], torch.full((8,), 0.123456789), rtol=2.0**-16)
    assert replicas.theta[1].weight.dtype == torch.float32
    assert replicas.theta[4].weight.dtype == torch.bfloat16


@pytest.mark.parametrize("proposal", [hta.SGD(1e-3, 0.0), hta.AdamW(1e-5, weight_decay=0.0)], ids=["sgd", "adamw"])
def test_small_steps_stop_plain_bfloat16_and_no_split_master(proposal):
    """Steps of a thousandth of a bfloat16's last place: rounded to nearest each is lost."""
    target = torch.full((64, 64), 0.5)

    def run(dtype, **options) -> float:
        model = nn.Linear(64, 64, bias=False)
        nn.init.ones_(model.weight)
        replicas = hta.Replicas(model.to(dtype), 1, **{k: v for k, v in options.items() if k != "state_format"})
        optimizer = hta.CoupledOptimizer(
            replicas, proposal, hta.Homotopy(math.inf), state_format=options.get("state_format", "full")
        )
        for _ in range(400):
            optimizer.zero_grad()
            replicas.backward(lambda net: 0.5 * (net.weight.float() - target).square().sum())
            optimizer.step()
        return float((1 - replicas.params.float()).mean())

    exact = run(torch.float32)
    assert run(torch.bfloat16) == 0
    for state in ("full", "bfloat16", "8bit"):
        moved = run(torch.float32, compute_dtype=torch.bfloat16, master_format="split", state_format=state)
        assert moved == pytest.approx(exact, rel=0.35 if isinstance(proposal, hta.AdamW) else 0.02), state


def test_an_average_in_bfloat16_follows_through_steps_below_its_last_place():
    model = nn.Linear(32, 32, bias=False)
    nn.init.ones_(model.weight)
    replicas = hta.Replicas(model, 1, anchor_format="bfloat16")
    optimizer = hta.CoupledOptimizer(replicas, hta.SGD(0.1), hta.EMA(0.999))
    replicas.theta.weight.data.fill_(1.5)
    for _ in range(500):
        optimizer.zero_grad()
        optimizer.step()
    assert float(replicas.anchor.float().mean()) == pytest.approx(1.5 - 0.5 * 0.999**500, abs=0.01)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"master_format": "split"}, "master_format='split' needs a compute_dtype"),
        (
            {"master_format": "int4", "compute_dtype": torch.bfloat16},
            "master_format must be 'full' or 'split', got 'int4'",
        ),
        ({"anchor_format": "float8"}, "anchor_format must be 'full' or 'bfloat16', got 'float8'"),
        ({"state_format": "4bit"}, "state_format must be 'full', 'bfloat16', '8bit', got '4bit'"),
        ({"master_format": []}, "master_format must be 'full' or 'split', got a list"),
        ({"anchor_format": {}}, "anchor_format must be 'full' or 'bfloat16', got a dict"),
        ({"state_format": []}, "state_format must be 'full', 'bfloat16', '8bit', got a list"),
        ({"communicate": []}, "communicate must be 'float32' or 'bfloat16', got a list"),
        ({"communicate": "pigeon"}, "communicate must be 'float32' or 'bfloat16', got 'pigeon'"),
    ],
)
def test_formats_that_do_not_exist_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        made(network(), options, hta.SGD(0.1, 0.9))


@pytest.mark.parametrize("options", [{"anchor_format": "bfloat16"}, {"state_format": "8bit"}])
def test_formats_are_for_float32(options):
    with pytest.raises(ValueError, match="needs (parameters|copies) of float32, got torch.float64"):
        made(network().double(), options, hta.SGD(0.1, 0.9))
