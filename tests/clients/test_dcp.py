"""torch.distributed.checkpoint: the recipe of its tutorial, with Replicas as the model and our optimizer as the optimizer."""

import copy

import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.stateful import Stateful

import hta_fused as hta


class AppState(Stateful):
    def __init__(self, model, optimizer):
        self.model, self.optimizer = model, optimizer

    def state_dict(self):
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer}

    def load_state_dict(self, state):
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


def network():
    return nn.Sequential(nn.Linear(20, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 2))


def loss(net, batch):
    x, y = batch
    return F.cross_entropy(net(x), y)


def made(proposal):
    replicas = hta.Replicas(network())  # glue
    return replicas, hta.CoupledOptimizer(replicas, proposal, hta.Lookahead(alpha=0.5, every=4))


def train(replicas, optimizer, batches):
    for batch in batches:
        optimizer.zero_grad()
        replicas.backward(loss, batch)  # glue
        optimizer.step()


@pytest.mark.parametrize("proposal", [hta.SGD(lr=0.05, momentum=0.9), hta.AdamW(lr=0.01)], ids=["SGD", "AdamW"])
def test_a_loaded_run_goes_on_to_the_bit(proposal, tmp_path):
    batches = [(torch.randn(32, 20), torch.randint(2, (32,))) for _ in range(12)]
    replicas, optimizer = made(proposal)
    train(replicas, optimizer, batches[:6])  # the moving anchor's period is 4: its clock must come back too
    dcp.save({"app": AppState(replicas, optimizer)}, checkpoint_id=tmp_path)
    saved = copy.deepcopy(optimizer.state_dict())

    fresh, fresh_optimizer = made(proposal)
    dcp.load({"app": AppState(fresh, fresh_optimizer)}, checkpoint_id=tmp_path)
    assert fresh_optimizer.steps == 6
    for key, entry in fresh_optimizer.state_dict()["state"].items():
        for name, value in entry.items():
            assert torch.equal(value, saved["state"][key][name]), name

    train(replicas, optimizer, batches[6:])
    train(fresh, fresh_optimizer, batches[6:])
    state = fresh.state_dict()
    assert state.keys() == replicas.state_dict().keys()
    for name, value in replicas.state_dict().items():  # the anchor is among them
        assert torch.equal(value, state[name]), name
