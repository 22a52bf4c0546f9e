"""torch.export of the merged model, and of a copy while it is trained."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hta_fused as hta


def loss(net, batch):
    x, y = batch
    return F.cross_entropy(net(x), y)


def trained():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4))
    replicas = hta.Replicas(net)  # glue
    optimizer = hta.HomotopySGD(replicas, lr=0.05, momentum=0.9, L=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        replicas.backward(loss, (torch.randn(16, 3, 8, 8), torch.randint(4, (16,))))  # glue
        optimizer.step()
    return replicas


@pytest.mark.parametrize("what", ["merged", "theta"])
def test_the_program_computes_what_the_model_does(what, tmp_path):
    replicas = trained()
    model = (replicas.merge() if what == "merged" else replicas.theta).eval()
    batch = {0: torch.export.Dim("batch")}
    program = torch.export.export(model, (torch.randn(2, 3, 8, 8),), dynamic_shapes=(batch,))
    torch.export.save(program, tmp_path / "model.pt2")
    x = torch.randn(5, 3, 8, 8)
    torch.testing.assert_close(torch.export.load(tmp_path / "model.pt2").module()(x), model(x))
