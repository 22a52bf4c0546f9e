"""FSDP2 is refused: `fully_shard` puts a DTensor in every parameter's place, where the copies' flat memory would be."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

import hta_fused as hta


@pytest.fixture(autouse=True)
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def network():
    return nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 2))


@pytest.fixture
def mesh(one_process):
    return dist.init_device_mesh("cpu", (1,))


def test_a_sharded_model_is_refused_at_once(mesh):
    with pytest.raises(TypeError, match="(?i)DTensor|fully_shard|FSDP"):
        hta.Replicas(fully_shard(network(), mesh=mesh))


@pytest.mark.parametrize("what", ["replicas", "a copy"])
def test_sharding_afterwards_is_refused_at_the_next_step(what, mesh):
    replicas = hta.Replicas(network())
    optimizer = hta.HomotopySGD(replicas, lr=0.05)
    fully_shard(replicas if what == "replicas" else replicas.theta, mesh=mesh)
    sum(output.square().sum() for output in replicas(torch.randn(4, 20))).backward()
    with pytest.raises((RuntimeError, TypeError), match="(?i)DTensor|fully_shard|FSDP"):
        optimizer.step()
