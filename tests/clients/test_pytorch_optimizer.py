"""pytorch_optimizer: its wrappers do around the coupled optimizer what they do around torch's SGD."""

import copy

import pytest
import torch
import torch.nn.functional as F
from pytorch_optimizer import SAM, Lookahead, PCGrad, ScheduleFreeWrapper

import hta_fused as hta


def handed(optimizer):
    """What SAM, which would make an optimizer of the class it is given, takes in its place."""

    def make(groups):
        optimizer.param_groups[0] |= {key: groups[0][key] for key in ("rho", "adaptive")}  # glue
        return optimizer  # glue

    return make


WRAPPERS = {
    "Lookahead": lambda optimizer, parameters: Lookahead(optimizer, k=3),
    "Lookahead, momentum reset": lambda optimizer, parameters: Lookahead(optimizer, k=3, pullback_momentum="reset"),
    "Lookahead, momentum too": lambda optimizer, parameters: Lookahead(optimizer, k=3, pullback_momentum="pullback"),
    "ScheduleFreeWrapper": lambda optimizer, parameters: ScheduleFreeWrapper(optimizer, momentum=0.9),
    "PCGrad": lambda optimizer, parameters: PCGrad(optimizer),
    "SAM": lambda optimizer, parameters: SAM(parameters, handed(optimizer)),
}


def net():
    return torch.nn.Sequential(torch.nn.Linear(20, 16), torch.nn.Tanh(), torch.nn.Linear(16, 2))


def data():
    images, labels = torch.randn(64, 20), torch.arange(64) % 2
    return images + labels.view(-1, 1), labels


def train(module, optimizer, images, labels, steps=9):
    if isinstance(optimizer, ScheduleFreeWrapper):
        optimizer.train()

    def closure():
        optimizer.zero_grad()
        outputs = module(images)
        loss = sum(F.cross_entropy(output, labels) for output in outputs)  # glue
        loss.backward()
        return loss

    for _ in range(steps):
        if isinstance(optimizer, SAM):
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()


class Alone(torch.nn.Module):
    """A network whose outputs are a tuple of one, as those of one copy are."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return (self.inner(x),)


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_one_uncoupled_copy_is_torchs_sgd(wrap):
    alone, (images, labels) = Alone(net()), data()
    replicas = hta.Replicas(copy.deepcopy(alone.inner), copies=1)
    ours = hta.CoupledOptimizer(replicas, hta.SGD(0.1, 0.9, weight_decay=0.01), hta.Average(every=1))
    torchs = torch.optim.SGD(alone.parameters(), 0.1, 0.9, weight_decay=0.01)
    train(replicas, wrap(ours, replicas.parameters()), images, labels)
    train(alone, wrap(torchs, alone.parameters()), images, labels)
    for ours, theirs in zip(replicas.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_two_coupled_copies_train(wrap):
    model, (images, labels) = net(), data()
    replicas = hta.Replicas(model)  # glue
    before = F.cross_entropy(replicas.theta(images), labels).item()
    optimizer = hta.HomotopySGD(replicas, lr=0.1, momentum=0.9, L=0.1)
    train(replicas, wrap(optimizer, replicas.parameters()), images, labels)
    for trained in replicas:
        assert F.cross_entropy(trained(images), labels) < before
    assert 0 < optimizer.stats.distance < 1


def test_lookaheads_checkpoint_goes_on_with_the_same_bits():
    images, labels = data()
    replicas = hta.Replicas(net())
    lookahead = Lookahead(hta.HomotopySGD(replicas, lr=0.1, momentum=0.9, L=0.1), k=3)
    train(replicas, lookahead, images, labels, steps=4)
    saved = copy.deepcopy((replicas.state_dict(), lookahead.state_dict()))
    train(replicas, lookahead, images, labels, steps=4)
    again = hta.Replicas(net())
    resumed = Lookahead(hta.HomotopySGD(again, lr=0.1, momentum=0.9, L=0.1), k=3)
    again.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    train(again, resumed, images, labels, steps=4)
    for ours, theirs in zip(again.parameters(), replicas.parameters(), strict=True):
        assert torch.equal(ours, theirs)
