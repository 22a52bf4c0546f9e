"""The wheel that pip has built from the sources, in an environment that is not the checkout's."""

import sys
from importlib.metadata import distribution

import torch

import hta_fused as hta


def test_the_wheel_works_in_another_environment():
    assert "abi3" in (distribution("hta_fused").read_text("WHEEL") or "")
    assert hta.__file__.startswith(sys.prefix)
    assert hta.backends()["cpu"].startswith("available")
    copies, gradients = torch.randn(2, 3000), torch.randn(2, 3000)
    hta.coupled_step_(copies, gradients, None, None, proposal=hta.SGD(0.1), coupling=hta.Homotopy(0.0))
    assert torch.equal(*copies)
