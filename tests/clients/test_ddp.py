"""DistributedDataParallel over Replicas: each process has all copies and a part of the batch.

On one machine this is `torchrun --nproc-per-node=2`; here `spawn` starts the processes.
"""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import hta_fused as hta


def train(replicas, optimizer, forward, batches):
    for x, y in batches:
        optimizer.zero_grad()
        sum(F.cross_entropy(output, y) for output in forward(x)).backward()  # glue
        optimizer.step()
    return replicas.state_dict()


def process(rank, port, folder, view):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.TCPStore("127.0.0.1", port), rank=rank, world_size=2)
    net, batches = torch.load(folder / "start.pt", weights_only=False)
    if rank:
        nn.init.zeros_(net[0].weight)  # DDP brings the first process's parameters
    replicas = hta.Replicas(net)  # glue
    ddp = DistributedDataParallel(replicas, gradient_as_bucket_view=view)
    optimizer = hta.HomotopySGD(replicas, lr=0.1, momentum=0.9, L=0.1)
    own = [(x.chunk(2)[rank], y.chunk(2)[rank]) for x, y in batches]
    torch.save(train(replicas, optimizer, ddp, own), folder / f"{rank}.pt")
    del ddp  # first: torch's DDP, collected after its process group is gone, now and then waits for ever
    dist.destroy_process_group()


@pytest.mark.parametrize("view", [False, True], ids=["copied", "gradient_as_bucket_view"])
def test_two_processes_train_like_one(view, tmp_path):
    net = nn.Sequential(nn.Linear(20, 32), nn.Tanh(), nn.Linear(32, 2))
    batches = [(torch.randn(32, 20), torch.randint(2, (32,))) for _ in range(10)]
    torch.save((copy.deepcopy(net), batches), tmp_path / "start.pt")
    meeting = dist.TCPStore("127.0.0.1", 0, is_master=True)  # on a port that is free
    torch.multiprocessing.spawn(process, (meeting.port, tmp_path, view), nprocs=2)

    replicas = hta.Replicas(net)
    whole = train(replicas, hta.HomotopySGD(replicas, lr=0.1, momentum=0.9, L=0.1), replicas, batches)
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for name, value in whole.items():
        assert torch.equal(one[name], other[name]), name
        torch.testing.assert_close(one[name], value, rtol=0, atol=1e-6)
