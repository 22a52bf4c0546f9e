"""safetensors: `save_model` and `load_model` of one copy, of all, and of the merged model; with tied weights too."""

import copy

import pytest
import torch
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import nn

import hta_fused as hta


class Tied(nn.Module):
    """An encoder whose output layer is its embedding."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(16, 8)
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 16, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.head(self.norm(self.embedding(tokens)))


def plain():
    return nn.Sequential(nn.Linear(20, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 2))


def trained(make):
    replicas = hta.Replicas(make(), partition="random")  # glue
    optimizer = hta.HomotopySGD(replicas, lr=0.05, momentum=0.9, L=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        x = torch.randint(16, (32,)) if make is Tied else torch.randn(32, 20)
        replicas.backward(lambda net, x: net(x).square().mean(), x)  # glue
        optimizer.step()
    return replicas


@pytest.mark.parametrize("make", [plain, Tied])
@pytest.mark.parametrize("what", ["theta", "replicas", "merged"])
def test_a_model_comes_back(what, make, tmp_path):
    def part(replicas):
        return {"theta": lambda: replicas.theta, "replicas": lambda: replicas, "merged": replicas.merge}[what]()

    model, fresh = part(trained(make)), part(hta.Replicas(make(), partition="random"))
    save_model(model, tmp_path / "model.safetensors")
    assert load_model(fresh, tmp_path / "model.safetensors") == (set(), [])
    loaded = fresh.state_dict()
    assert loaded.keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(value, loaded[name]), name


def test_the_state_dict_is_all_tensors_without_shared_memory(tmp_path):
    replicas = trained(plain)
    save_file(replicas.state_dict(), tmp_path / "replicas.safetensors")
    fresh = copy.deepcopy(replicas)
    optimizer = hta.HomotopySGD(fresh, lr=0.05)
    optimizer.step()
    fresh.load_state_dict(load_file(tmp_path / "replicas.safetensors"))
    for name, value in replicas.state_dict().items():
        assert torch.equal(value, fresh.state_dict()[name]), name
    assert fresh.distance() == replicas.distance()  # the flat memory is what was loaded into
