"""What HTA is compared with in the trainer: local SGD, DiLoCo, a schedule that couples tightly, then loosely, few images, masks."""

import math
from dataclasses import replace

import pytest
import torch

import hta_fused as hta
from hta_fused.train import Job, Run, Settings, Trainer, data
from hta_fused.train.run import batches_of, network

TINY = Settings(
    dataset="synthetic",
    width=0.125,
    epochs=2,
    method="hta",
    seeds=1,
    threads=1,
    device="cpu",
    schedule="constant",
    batch_size=128,
)
JOB = Job("HTA", "hta", 2, 0)


def run_of(settings, epochs=None):
    images = data.load(settings.dataset)
    return Run(settings, replace(JOB, epochs=epochs or settings.epochs), batches_of(images, settings, 0))


def flat(net):
    return torch.cat([p.detach().reshape(-1) for p in net.parameters()])


def by_hand(coupling, meet):
    """Two copies of torch.optim.SGD on their own batches, which meet every second step; beside the trainer's.

    Args:
        meet: the parameters' mean, flat, to the point from which both go on.
    """
    settings = replace(TINY, coupling=coupling, every=2, partition="none", batches="own", dropout=0.0, batch_norm=False)
    run = run_of(settings)
    nets = [network(settings) for _ in range(2)]
    for net in nets:
        net.load_state_dict(run.phase.networks[0].state_dict())
    optimizers = [torch.optim.SGD(n.parameters(), settings.lr, settings.momentum, weight_decay=5e-4) for n in nets]
    streams = [batches_of(data.load("synthetic"), settings, 0).of_copy(j) for j in range(2)]
    run.start_epoch()
    for stream in streams:
        stream.begin(0)
    for step in range(1, 5):
        run.advance()
        for net, optimizer, stream in zip(nets, optimizers, streams, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = settings.lr_at((step - 1) / 4, settings.epochs)
            images, labels = stream.next(128)
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(net(images), labels).backward()
            optimizer.step()
        if step % 2 == 0:
            mean = meet(torch.stack([flat(net) for net in nets]).mean(0))
            for net in nets:
                for p, part in zip(net.parameters(), mean.split([p.numel() for p in net.parameters()]), strict=True):
                    p.data.copy_(part.view(p.shape))
        for ours, theirs in zip(run.phase.networks, nets, strict=True):
            torch.testing.assert_close(flat(ours), flat(theirs), rtol=2e-5, atol=2e-6)
    assert math.isnan(run.phase.L)


def test_average_is_local_sgd_by_hand():
    by_hand("average", lambda mean: mean)


def test_diloco_is_sgd_on_what_the_mean_has_moved_by_hand():
    """v ← 0.9 v + d, x ← x − 0.7 (d + 0.9 v), where d is by how much the mean has fallen short of x, the last common point."""
    torch.manual_seed(JOB.seed)
    x = flat(network(replace(TINY, batch_norm=False)))
    v = torch.zeros_like(x)

    def meet(mean):
        nonlocal x, v
        d = x - mean
        v = 0.9 * v + d
        x = x - 0.7 * (d + 0.9 * v)
        return x

    by_hand("diloco", meet)


def test_diloco_goes_on_where_it_was(tmp_path):
    settings = replace(TINY, coupling="diloco", every=3, partition="none", batches="own", epochs_per_L=2)
    assert Trainer(replace(settings, out=tmp_path / "whole"), report=lambda _: None).train()
    cut, batches = replace(settings, out=tmp_path / "cut"), iter(range(100))
    assert not Trainer(cut, report=lambda _: None, stop=lambda: next(batches) == 4).train()  # between two meetings
    assert Trainer.resume(cut.out, report=lambda _: None).train()
    whole, again = (torch.load(tmp_path / of / "diloco-seed0.pt") for of in ("whole", "cut"))
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())


def test_tight_then_loose_then_merged():
    settings = replace(TINY, epochs=5, schedule="tight-loose-merge", L_start=0.01, L_stop=50.0, epochs_per_L=2,
                       partition="none", batches="own")  # fmt: skip
    assert settings.L_schedule.values == (0.01, 0.01, 50.0, 50.0)
    run = run_of(settings)
    apart = []
    for _ in range(5):
        run.train_epoch(lambda: False)
        apart.append(run.end_epoch(1.0)["distance"])
    assert 0 < apart[1] * 5 < apart[2], apart
    assert apart[4] == 0
    assert run.phase.count == 1


def test_masks_are_drawn_anew_at_each_step_and_go_on_where_they_were():
    settings = replace(TINY, partition="hashed", part="classifier", anchor="zero", resample="step")
    run, seeds = run_of(settings), []
    run.start_epoch()
    for _ in range(3):
        seeds.append(int(run.phase.replicas.partition.seed))
        run.advance()
    assert seeds == list(range(seeds[0], seeds[0] + 3))
    again = Run(settings, JOB, run.batches, saved=run.state())
    again.start_epoch()
    assert int(again.phase.replicas.partition.seed) == seeds[0] + 3
    once = run_of(replace(settings, resample="epoch"))
    once.start_epoch()
    first = int(once.phase.replicas.partition.seed)
    once.advance()
    assert int(once.phase.replicas.partition.seed) == first
    other = Run(settings, replace(JOB, seed=1), run.batches)
    other.start_epoch()
    assert int(other.phase.replicas.partition.seed) != seeds[0]


def test_images_drawn_by_each_seed_and_others_to_validate_on():
    images = data.load("synthetic")
    drawn, again, other = (images.drawn(100, seed) for seed in (3, 3, 4))
    assert len(drawn.train) == len(drawn.train_labels) == 100
    assert torch.equal(drawn.train, again.train)
    assert not torch.equal(drawn.train, other.train)
    assert drawn.test is images.test
    held_out = images.drawn(100, 3, validate=True)
    assert torch.equal(held_out.train, drawn.train)
    assert len(held_out.test) == len(images.test)
    rows = {row.numpy().tobytes() for row in held_out.train}
    assert rows.isdisjoint(row.numpy().tobytes() for row in held_out.test)
    assert {row.numpy().tobytes() for row in held_out.test} <= {row.numpy().tobytes() for row in images.train}
    assert len(images.drawn(500, 0, validate=True).test) == 12  # all that are left
    with pytest.raises(ValueError, match="train_images must be at most 511 to leave some to validate on, got 512"):
        images.drawn(512, 0, validate=True)
    with pytest.raises(ValueError, match="train_images must be at most 512, got 513"):
        images.drawn(513, 0)


def test_tests_can_be_seldom_and_the_last_epoch_always_has_one(tmp_path):
    settings = replace(TINY, epochs=5, evaluate_every=3, epochs_per_L=2, ema=0.5, swa=1.0, out=tmp_path / "seldom")
    seldom = Trainer(settings, report=lambda _: None)
    assert seldom.train()
    often = Trainer(replace(settings, evaluate_every=1, out=tmp_path / "often"), report=lambda _: None)
    assert often.train()
    for row, whole in zip(seldom.rows, often.rows, strict=True):
        tested = row["epoch"] in (3, 5)
        keys = [key for key in whole if key.startswith("test_")]
        assert keys
        assert [row.get(key) for key in keys] == [whole[key] if tested else None for key in keys]
        assert row["train_loss"] == whole["train_loss"]
    assert (tmp_path / "seldom" / "curves.png").exists()


def test_dropouts_probability_is_the_networks():
    drops = [m.p for m in network(replace(TINY, dropout=0.25)).modules() if isinstance(m, torch.nn.Dropout)]
    assert drops == [0.25, 0.25]


def test_no_blocks_anchor_nothing():
    partition = hta.Partition.none(torch.nn.Linear(3, 4), blocks=3)
    assert partition.anchored() == (0, 0, 0)
    assert not partition.flat().any()
    assert hta.Replicas(torch.nn.Linear(3, 4), 3, partition="none").partition.name == "none"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(coupling="average"), "partition must be none where the coupling is average, got 'conv_blocks'"),
        (
            dict(schedule="tight-loose-merge", L_stop=1.0),
            "partition must be none where the schedule is tight-loose-merge",
        ),
        (dict(schedule="tight-loose-merge", L_start=2.0, L_stop=1.0), "L_start must be at most L_stop, 1.0"),
        (dict(coupling="diloco"), "partition must be none where the coupling is diloco, got 'conv_blocks'"),
        (
            dict(coupling="diloco", partition="none", start="independent"),
            "start must be copy where the coupling is diloco, got 'independent'",
        ),
        (dict(outer_lr=0.0), "outer_lr must be positive and finite, got 0.0"),
        (dict(outer_momentum=1.0), "outer_momentum must be under 1, got 1.0"),
        (dict(validate=True), "validate must have images to test on: give train_images"),
        (dict(dropout=1.0), "dropout must be at least 0 and under 1, got 1.0"),
        (dict(dropout=math.nan), "dropout must be at least 0 and under 1, got nan"),
        (dict(train_images=-1), "train_images must not be negative, got -1"),
        (dict(every=0), "every must be at least 1, got 0"),
        (dict(evaluate_every=0), "evaluate_every must be at least 1, got 0"),
        (dict(resample="never"), "resample must be one of epoch, step, got 'never'"),
    ],
)
def test_bad_settings_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(TINY, **changes)
