"""Partitions and layouts: which element gets which label, however it lies in memory."""

import pytest
import torch
from torch import nn

import hta_fused as hta
from hta_fused import Layout, Partition
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
    assert sum(int(c.replace(",", "")) for c in text[-1].split()[1:]) == total


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
        (lambda: Partition.random(small(), by="row"), ValueError, "by must be 'element' or 'unit', got 'row'"),
        (lambda: Partition.random(small(), "head"), ValueError, "part must be one of conv, classifier"),
        (lambda: Partition.own(small(), {"9.weight": 1}), ValueError, "'9.weight', which is no trainable parameter"),
        (lambda: Partition.own(small(), {"8.weight": torch.ones(3, 3)}), ValueError, r"'8.weight' have shape \(3, 3\)"),
        (
            lambda: Partition.own(small(), {"8.weight": 3}),
            ValueError,
            "labels must be at most 2, the number of blocks, got 3",
        ),
        (lambda: Partition.make(small(), "halves"), ValueError, "partition must be one of conv_blocks, .*got 'halves'"),
        (lambda: Partition.make(small(True), Partition.conv_halves(small())), ValueError, "made for another model"),
        (lambda: Partition(torch.zeros(4)), TypeError, "labels must be a 1-D uint8 tensor"),
        (lambda: Partition(torch.zeros(4, dtype=torch.uint8)).describe(), ValueError, "knows no parameters"),
    ],
)
def test_nonsense_is_named(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_nothing_depends_on_the_default_device():
    """A user's torch.set_default_device("cuda") must not scatter the pieces; "meta" stands in for it here."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 2))
    torch.set_default_device("meta")
    try:
        for maker in (hta.Partition.conv_halves, hta.Partition.layer_halves, hta.Partition.random):
            assert maker(model).codes.device.type == "cpu"
        assert hta.tables.implicit(0.1, 0.1).device.type == "cpu"
        hta.HomotopySGD(hta.Replicas(model), 0.1, 0.9).step()
        images = data.synthetic(20, 10)
        for x, _ in data.Batches(images, 8).epoch(0):
            assert x.isfinite().all()
    finally:
        torch.set_default_device(None)
