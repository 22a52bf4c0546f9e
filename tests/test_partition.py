"""Partitions and layouts: which element gets which label, however it lies in memory."""

import copy

import pytest
import torch
from torch import nn

import hta_fused as hta
from hta_fused import Layout, Partition
from hta_fused.couplings import free_block
from hta_fused.train import data
from hta_fused.train.vgg import VGG


def small(channels_last=False):
    model = nn.Sequential(
        nn.Conv2d(3, 10, 3), nn.BatchNorm2d(10), nn.ReLU(), nn.Conv2d(10, 300, 3), nn.Flatten(),
        nn.Linear(300, 20), nn.ReLU(), nn.Linear(20, 20), nn.Linear(20, 5),
    )  # fmt: skip
    return model.to(memory_format=torch.channels_last) if channels_last else model


@pytest.mark.parametrize("channels_last", [False, True])
def test_conv_halves_labels_output_channels(channels_last):
    labels = Partition.conv_halves(small(channels_last)).by_name()
    for name, channels in (("0.weight", 10), ("3.weight", 300)):
        assert (labels[name][: channels // 2] == 1).all()
        assert (labels[name][channels // 2 :] == 2).all()
    assert not any(labels[n].any() for n in labels if n not in ("0.weight", "3.weight"))


def test_conv_halves_knows_transposed_convolutions():
    labels = Partition.conv_halves(nn.Sequential(nn.ConvTranspose2d(4, 6, 3))).by_name()["0.weight"]
    assert labels.shape == (4, 6, 3, 3)
    assert (labels[:, :3] == 1).all()
    assert (labels[:, 3:] == 2).all()


def test_layer_halves_labels_whole_layers():
    labels = Partition.layer_halves(small()).by_name()
    assert (labels["5.weight"] == 1).all()
    assert (labels["7.weight"] == 2).all()
    assert (labels["8.weight"] == 2).all()
    assert not labels["5.bias"].any()
    assert not labels["0.weight"].any()


def test_random_by_element_is_seeded_and_has_its_probability():
    model = nn.Linear(300, 300)
    first = Partition.random(model, p=0.3, seed=5)
    labels = first.by_name()["weight"]
    assert torch.equal(labels, Partition.random(model, p=0.3, seed=5).by_name()["weight"])
    assert not torch.equal(labels, Partition.random(model, p=0.3, seed=6).by_name()["weight"])
    assert float((labels == 1).float().mean()) == pytest.approx(0.3, abs=0.02)
    assert set(labels.unique().tolist()) == {1, 2}


def test_random_by_unit_keeps_a_units_weights_together():
    labels = Partition.random(small(), by="unit").by_name()["3.weight"]
    per_unit = labels.flatten(1)
    assert (per_unit == per_unit[:, :1]).all()
    assert set(per_unit[:, 0].tolist()) == {1, 2}


@pytest.mark.parametrize(
    ("part", "labelled"),
    [
        ("conv", {"0.weight", "3.weight"}),
        ("classifier", {"5.weight", "7.weight", "8.weight"}),
        (lambda name: name.startswith("7"), {"7.weight"}),
    ],
)
def test_part_restricts(part, labelled):
    labels = Partition.random(small(), part).by_name()
    assert {name for name, label in labels.items() if label.any()} == labelled


def test_own_labels_broadcast_and_the_rest_is_zero():
    mine = torch.tensor([[1], [2], [0], [1], [2]])
    labels = Partition.own(small(), {"8.weight": mine, "0.bias": 2}).by_name()
    assert torch.equal(labels["8.weight"], mine.expand(5, 20).byte())
    assert (labels["0.bias"] == 2).all()
    assert not labels["5.weight"].any()


def test_no_labels_of_your_own_couple_everything_and_anchor_nothing():
    assert not Partition.own(small(), {}).flat().any()


def test_structural_partitions_need_next_to_no_bytes():
    partition = Partition.conv_halves(VGG("vgg11"))
    mixed = 0 if partition.labels is None else partition.labels.numel()
    assert (partition.codes.numel() * 4 + mixed) / partition.numel < 0.02


def test_flat_labels_survive_their_encoding():
    for n in (0, 1, 1023, 1024, 1025, 10_000):
        labels = (torch.arange(n) // 1500 % 3).byte()
        assert torch.equal(Partition(labels).flat(), labels)


def test_describe_counts_every_element(capsys):
    Partition.conv_halves(small()).describe()
    text = capsys.readouterr().out.splitlines()
    assert text[0].split()[:2] == ["tensor", "shape"]
    assert text[1].split() == ["0.weight", "10×3×3×3", "0", "135", "135"]
    total = sum(p.numel() for p in small().parameters())
    assert sum(int(c.replace(",", "")) for c in text[-3].split()[1:]) == total
    assert text[-2] == "partition: conv_blocks"
    assert text[-1] == f"anchored of {total:,} elements: 13,635 in copy 0, 13,635 in copy 1"


def test_a_layout_keeps_memory_formats_and_aligns_parameters():
    model = small(channels_last=True)
    layout = Layout.of(model)
    flat = torch.arange(layout.numel, dtype=torch.float32)
    assert all(offset % 1024 == 0 for offset in layout.offsets)
    for view, parameter in zip(layout.views(flat), model.parameters(), strict=True):
        assert view.shape == parameter.shape
        assert view.is_contiguous(memory_format=torch.channels_last) or view.dim() != 4
    used = torch.cat([v.flatten() for v in layout.views(flat)])
    assert len(used.unique()) == len(used)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Partition.conv_halves(nn.Linear(2, 2)), ValueError, "found no convolution"),
        (lambda: Partition.layer_halves(nn.Conv2d(2, 2, 1)), ValueError, "found no fully connected layer"),
        (lambda: Partition.random(small(), p=1.5), ValueError, "p must be a probability, got 1.5"),
        (lambda: Partition.none(small(), "head"), ValueError, "part must be one of conv, classifier"),
        (lambda: Partition.random(small(), by="row"), ValueError, "by must be 'element' or 'unit', got 'row'"),
        (lambda: Partition.random(small(), "head"), ValueError, "part must be one of conv, classifier"),
        (lambda: Partition.own(small(), {"9.weight": 1}), ValueError, "'9.weight', which is no trainable parameter"),
        (lambda: Partition.own(small(), {"8.weight": torch.ones(3, 3)}), ValueError, r"'8.weight' have shape \(3, 3\)"),
        (
            lambda: Partition.own(small(), {"8.weight": 3}),
            ValueError,
            "labels must be at most 2, the number of blocks, got 3",
        ),
        (lambda: Partition.make(small(), "halves"), ValueError, "must be one of auto, conv_blocks, .*got 'halves'"),
        (lambda: Partition.auto(nn.LayerNorm(4)), ValueError, "'auto' found no weight .*; give labels by name instead"),
        (lambda: Partition.auto(Matrix(0, 4)), ValueError, "'auto' found no weight of two or more dimensions"),
        (lambda: Partition.auto(nn.Linear(4, 4), "conv"), ValueError, "'auto' found no .* in the model part 'conv'"),
        (lambda: Partition.auto(small(), blocks="2"), TypeError, "blocks must be a whole number, got '2'"),
        (lambda: Partition.layer_blocks(small(), blocks="2"), TypeError, "blocks must be a whole number, got '2'"),
        (lambda: Partition.random(small(), blocks=3).anchored(2), ValueError, "copies must be .* from 3 to 255, got 2"),
        (lambda: Partition.make(small(True), Partition.conv_halves(small())), ValueError, "made for another model"),
        (lambda: Partition(torch.zeros(4)), TypeError, "labels must be a 1-D uint8 tensor"),
        (lambda: Partition(torch.zeros(4, dtype=torch.uint8)).describe(), ValueError, "knows no parameters"),
    ],
)
def test_nonsense_is_named(make, error, message):
    with pytest.raises(error, match=message):
        make()


class Matrix(nn.Module):
    """A linear layer of another library's, as Hugging Face's Conv1D: weight [in, out]."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs)), nn.Parameter(torch.zeros(outputs))


def linears(count, *others):
    return nn.Sequential(*others, *(nn.Linear(4, 4) for _ in range(count)))


def encoder():
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 2, enable_nested_tensor=False)


def tied():
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 7))
    model[3].weight = model[0].weight
    return model


def frozen():
    model = linears(3)
    model[0].requires_grad_(False)
    return model


def lenet():
    return linears(3, nn.Conv2d(1, 6, 5), nn.Conv2d(6, 16, 5))


NETS = {  # what auto chooses for two blocks, and the parameters that get block 1
    "convolutions": (small, "conv_blocks", {"0.weight", "3.weight"}),
    "LeNet": (lenet, "conv_blocks", {"0.weight", "1.weight"}),
    "channels-last": (lambda: small(True), "conv_blocks", {"0.weight", "3.weight"}),
    "transposed": (lambda: nn.ConvTranspose1d(4, 6, 3), "conv_blocks", {"weight"}),
    "a quarter": (lambda: linears(3, nn.Conv1d(1, 4, 3)), "conv_blocks", {"0.weight"}),
    "less than a quarter, as a ViT": (lambda: linears(4, nn.Conv2d(3, 4, 2)), "layer_blocks", {"1.weight", "2.weight"}),
    "MLP": (lambda: linears(3), "layer_blocks", {"0.weight"}),
    "transformer": (
        encoder, "layer_blocks",
        {f"layers.0.{n}.weight" for n in ("self_attn.out_proj", "linear1", "linear2")} | {"layers.0.self_attn.in_proj_weight"},
    ),
    "another library's": (lambda: nn.Sequential(Matrix(4, 8), Matrix(8, 2)), "layer_blocks", {"0.weight"}),
    "LSTM": (lambda: linears(1, nn.LSTM(4, 4)), "layer_blocks", {"0.weight_ih_l0", "0.weight_hh_l0"}),
    "tied": (tied, "layer_blocks", {"1.weight"}),
    "frozen": (frozen, "layer_blocks", {"1.weight"}),
    "normalised": (lambda: linears(2, nn.LayerNorm((4, 4))), "layer_blocks", {"1.weight"}),
    "of no elements": (lambda: linears(2, Matrix(0, 4)), "layer_blocks", {"1.weight"}),
    "one layer": (lambda: nn.Linear(40, 40), "random", {"weight"}),
    "embedding": (lambda: nn.Embedding(90, 40), "random", {"weight"}),
}  # fmt: skip


@pytest.mark.parametrize("net", NETS)
def test_auto_fits_the_model(net):
    make, name, first = NETS[net]
    partition = Partition.auto(make())
    assert partition.name == name
    assert torch.equal(partition.flat(), Partition.make(make(), name).flat())
    assert {n for n, labels in partition.by_name().items() if (labels == 1).any()} == first
    assert f"partition: {name}, chosen by auto (convolutions: " in partition.table()
    alone = Partition.auto(make(), blocks=1)
    assert alone.flat().amax() == 1
    assert alone.anchored() == (0,)


@pytest.mark.parametrize(
    ("part", "blocks", "name"),
    [("conv", 2, "conv_blocks"), ("classifier", 2, "layer_blocks"), ("classifier", 3, "layer_blocks"),
     ("classifier", 4, "random"), (lambda name: name == "2.weight", 2, "random")],
)  # fmt: skip
def test_auto_and_layers_look_at_the_part_alone(part, blocks, name):
    partition = Partition.auto(lenet(), part, blocks=blocks)
    assert partition.name == name
    assert set(partition.flat().unique().tolist()) == set(range(blocks + 1))


@pytest.mark.parametrize("blocks", [1, 2, 3])
@pytest.mark.parametrize("make", ["auto", "conv_blocks", "layer_blocks", "random", "random_units", "hashed"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_anchored_elements_are_counted_and_padding_is_not(blocks, make, channels_last):
    partition = Partition.make(small(channels_last), make, blocks)
    assert partition.name == ("conv_blocks" if make == "auto" else make)
    labels = torch.cat([labels.flatten() for labels in partition.by_name().values()])
    for copies in (blocks, blocks + 2):
        expected = [sum(b not in (0, free_block(j, copies)) for b in labels.tolist()) for j in range(copies)]
        assert list(partition.anchored(copies)) == expected
    assert len(partition.anchored()) == blocks


def test_bare_labels_are_counted_and_named():
    partition = Partition(torch.tensor([0, 1, 1, 2, 1], dtype=torch.uint8))
    assert partition.anchored() == (3, 1)
    assert repr(partition) == "Partition(labels, 5 elements, 1 tiles, 1 of them mixed)"
    assert partition.to("meta").name == "labels"


def test_a_digest_is_the_partitions():
    def of(partition=None, **how):
        return int((partition or Partition.random(small(), **how)).digest())

    own = {"8.weight": torch.ones(5, 20, dtype=torch.uint8), "0.bias": 2}
    mine = of(Partition.own(small(), own))
    hashed = Partition.hashed(small())
    renamed = nn.Sequential(*small()[:-1], nn.Sequential(small()[-1]))
    before = of(hashed)
    hashed.resample()
    assert of() == of() == of(copy.deepcopy(Partition.random(small())))
    assert of(hashed) == before == of(Partition.hashed(small(), seed=9))
    assert of(Partition.auto(small())) == of(Partition.conv_halves(small()))
    own["8.weight"][3, 7] = 0
    others = [mine, of(Partition.own(small(), own)), of(), of(seed=1), of(blocks=3), before,
              of(Partition.hashed(small(), blocks=3)), *(of(Partition.conv_blocks(m)) for m in
              (small(), small(True), renamed)), of(Partition.conv_blocks(small(), blocks=3)),
              of(Partition(Partition.conv_blocks(small()).flat()))]  # fmt: skip
    assert len(set(others)) == len(others)


def test_a_digest_is_the_same_on_every_machine():
    digest = Partition.own(nn.Linear(3, 2), {"weight": torch.tensor([[1], [2]])}).digest()
    assert (digest.dtype, digest.shape) == (torch.int64, (1,))
    assert int(digest) == 8004619786502011504


def test_nothing_depends_on_the_default_device():
    """A user's torch.set_default_device("cuda") must not scatter the pieces; "meta" stands in for it here."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 2))
    torch.set_default_device("meta")
    try:
        for maker in (hta.Partition.auto, hta.Partition.conv_halves, hta.Partition.layer_halves, hta.Partition.random):
            assert maker(model).codes.device.type == maker(model).digest().device.type == "cpu"
        assert hta.tables.implicit(0.1, 0.1).device.type == "cpu"
        hta.HomotopySGD(hta.Replicas(model), 0.1, 0.9).step()
        images = data.synthetic(20, 10)
        for x, _ in data.Batches(images, 8).epoch(0):
            assert x.isfinite().all()
    finally:
        torch.set_default_device(None)


def test_labels_are_as_many_as_their_layouts_elements():
    layout = hta.Layout.of(nn.Linear(40, 40))
    for count in (10, layout.numel + 5000):
        with pytest.raises(ValueError, match=f"labels must be one for each of the layout's {layout.numel} elements"):
            hta.Partition(torch.zeros(count, dtype=torch.uint8), layout)


def test_transposed_convolutions_are_divided_by_their_output_channels():
    grouped = hta.Partition.conv_blocks(nn.ConvTranspose2d(4, 8, 1, groups=2)).by_name()["weight"][..., 0, 0]
    assert grouped.tolist() == [[1, 1, 1, 1]] * 2 + [[2, 2, 2, 2]] * 2  # channels 0-3, then 4-7
    depthwise = hta.Partition.conv_blocks(nn.ConvTranspose2d(8, 8, 1, groups=8)).by_name()["weight"].flatten()
    assert depthwise.tolist() == [1, 1, 1, 1, 2, 2, 2, 2]
    units = hta.Partition.random(nn.ConvTranspose2d(40, 60, 2), by="unit").by_name()["weight"]
    assert (units == units[:1, :, :1, :1]).all()  # all that feeds an output channel
    assert len(units[0, :, 0, 0].unique()) == 2
