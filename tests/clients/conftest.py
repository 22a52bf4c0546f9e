"""What must stand before the clients are imported. The files beside this one are examples too: each is one client's own
quickstart with our optimizer in it, and `# glue` marks the lines that are there because of us."""

import os
import sys
from importlib.util import find_spec

import torch

os.environ["HF_HUB_OFFLINE"] = "1"  # no test downloads anything
CLIENTS = (
    "lightning",
    "accelerate",
    "transformers",
    "timm",
    "safetensors",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "pytorch_optimizer",
)
collect_ignore_glob = [] if all(map(find_spec, CLIENTS)) else ["test_*.py"]  # `make test` has none of them

if find_spec("torchvision"):  # which timm and Lightning import
    try:
        import torchvision  # noqa: F401
    except RuntimeError:  # its wheel is for CUDA, torch's for the CPU: its operators are missing, and no test calls one
        for name in [name for name in sys.modules if name.startswith("torchvision")]:
            del sys.modules[name]
        operators = torch.library.Library("torchvision", "DEF")  # they go when this does
        for name in ("nms", "qnms"):
            operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
