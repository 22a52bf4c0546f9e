"""ONNX: the merged model by `torch.onnx.export`, run by ONNX Runtime."""

import numpy as np
import onnx
import onnxruntime
import torch
import torch.nn.functional as F
from torch import nn

import hta_fused as hta


def loss(net, batch):
    x, y = batch
    return F.cross_entropy(net(x), y)


def test_the_graph_computes_what_the_merged_model_does(tmp_path):
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4))
    replicas = hta.Replicas(net)  # glue
    optimizer = hta.HomotopySGD(replicas, lr=0.05, momentum=0.9, L=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        replicas.backward(loss, (torch.randn(16, 3, 8, 8), torch.randint(4, (16,))))  # glue
        optimizer.step()

    model, path = replicas.merge().eval(), tmp_path / "model.onnx"  # glue
    batch = {0: torch.export.Dim("batch")}
    torch.onnx.export(model, (torch.randn(2, 3, 8, 8),), path, dynamo=True, dynamic_shapes=(batch,), verbose=False)
    onnx.checker.check_model(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    x = torch.randn(5, 3, 8, 8)
    (output,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    np.testing.assert_allclose(output, model(x).detach(), rtol=1e-4, atol=1e-5)
