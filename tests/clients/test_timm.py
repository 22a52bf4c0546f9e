"""timm: models by `create_model`, timm's schedule of the learning rate, and its exponential moving average of the copies."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.optim import Lookahead
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3

import hta_fused as hta

MODELS = {
    "vit_tiny_patch16_224": {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2},
    "convnext_atto": {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)},
    "resnet10t": {},
}


def create(name):
    return timm.create_model(name, pretrained=False, num_classes=2, **MODELS[name])


def data():
    images, labels = torch.randn(64, 3, 32, 32), torch.arange(64) % 2
    return images + labels.view(-1, 1, 1, 1), labels


def train(replicas, images, labels, epochs=4):
    optimizer = hta.HomotopySGD(replicas, lr=0.01, momentum=0.9, L=0.1)
    scheduler = CosineLRScheduler(optimizer, t_initial=epochs, warmup_t=1, warmup_lr_init=0.005)
    ema = ModelEmaV3(replicas, decay=0.9)
    for epoch in range(epochs):
        for x, y in zip(images.split(16), labels.split(16), strict=True):
            optimizer.zero_grad()
            sum(F.cross_entropy(output, y) for output in replicas(x)).backward()  # glue
            optimizer.step()
            ema.update(replicas)
        scheduler.step(epoch + 1)
    return optimizer, ema


@pytest.mark.parametrize("name", MODELS)
def test_both_copies_train(name):
    net, (images, labels) = create(name), data()
    start = copy.deepcopy(net)
    replicas = hta.Replicas(net)  # glue
    optimizer, _ = train(replicas, images, labels)
    assert optimizer.param_groups[0]["lr"] < 0.01  # the schedule's end, reached through param_groups
    for trained in replicas:
        assert F.cross_entropy(trained(images), labels) < F.cross_entropy(start(images), labels)
    replicas.merge([images])(images)  # with batch-norm statistics of its own


def test_copies_start_where_timm_initialises_them():
    name = "convnext_atto"
    replicas = hta.Replicas(create(name), start="independent", factory=lambda: create(name))  # glue
    before = copy.deepcopy(replicas)
    assert replicas.distance() > 1
    train(replicas, *data())
    assert 0 < replicas.distance() < before.distance()


def test_the_average_follows_every_copy():
    images, labels = data()
    replicas = hta.Replicas(create("resnet10t"))
    _, ema = train(replicas, images, labels, epochs=1)
    expected = {name: value.clone() for name, value in ema.module.state_dict().items()}
    ema.update(replicas)
    for name, value in replicas.state_dict().items():
        follows = expected[name].lerp(value, 0.1) if value.is_floating_point() else value
        torch.testing.assert_close(ema.module.state_dict()[name], follows)
    averaged = ema.module.merge()  # an ordinary model
    weight = torch.stack([net.conv1[0].weight for net in ema.module]).mean(0)
    torch.testing.assert_close(averaged.conv1[0].weight, weight)


def test_timms_lookahead_goes_around_the_optimizer():
    """Its slow weights begin where the fast ones are after k steps, and lie in the optimizer's state."""
    net = torch.nn.Linear(20, 2)
    wrapped, plain = hta.Replicas(copy.deepcopy(net)), hta.Replicas(net)
    lookahead = Lookahead(hta.HomotopySGD(wrapped, lr=0.1, momentum=0.9, L=0.1), alpha=0.5, k=3)
    optimizer = hta.HomotopySGD(plain, lr=0.1, momentum=0.9, L=0.1)
    slow = None
    for step in range(1, 10):
        x = torch.randn(32, 20)
        for replicas, one in ((wrapped, lookahead), (plain, optimizer)):
            one.zero_grad()
            sum(output.square().mean() for output in replicas(x)).backward()
            one.step()
        if step % 3 == 0:
            with torch.no_grad():
                slow = slow or [p.clone() for p in plain.parameters()]
                for at, p in zip(slow, plain.parameters(), strict=True):
                    p.copy_(at.add_(p - at, alpha=0.5))
    assert all("lookahead_slow_buff" in entry for entry in lookahead.state_dict()["state"].values())
    for p, expected in zip(wrapped.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p, expected)
