"""One copy for each process: the result is that of one process with all copies."""

import copy
import math

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from processes import attempt, run
from torch import nn

import hta_fused as hta

PROPOSALS = {"SGD": hta.SGD(0.05, 0.9, 1e-3), "AdamW": hta.AdamW(0.01)}
COUPLINGS = {
    "Homotopy": hta.Homotopy(0.05),
    "Homotopy every 3": hta.Homotopy(0.05, every=3),
    "merged": hta.Homotopy(0.0),
    "decoupled": hta.Homotopy(math.inf),
    "Explicit": hta.Explicit(1.0),
    "Explicit every 2": hta.Explicit(1.0, every=2),
    "EMA": hta.EMA(0.9),
    "Lookahead": hta.Lookahead(0.5, every=2),
    "Elastic": hta.Elastic(0.1),
    "Elastic explicit": hta.Elastic(0.1, mode="explicit"),
    "Parle": hta.Parle(every=3),
    "Toward": hta.Toward(0.1),
    "Toward explicit": hta.Toward(0.1, mode="explicit"),
    "Average": hta.Average(every=4),
    "FedProx": hta.Average(0.1, every=3),
}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.Linear(32, 16)

    def forward(self, x):
        x = torch.relu(self.norm(self.conv(x.to(self.conv.weight.dtype)).float())).flatten(1)
        return self.fc(x.to(self.fc.weight.dtype)).float()


class Smooth(nn.Module):
    """Without kinks, over which a rounding could carry a run."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(1, 8, 3), nn.Linear(32, 16)

    def forward(self, x):
        return self.fc(torch.tanh(self.conv(x)).flatten(1))


def loss(net, batch):
    return F.cross_entropy(net(batch[0]), batch[1])


def data(steps, m):
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(steps, m, 8, 1, 4, 4, generator=generator)
    return x, torch.randint(0, 16, (steps, m, 8), generator=generator)


def seeded(kind=Net, seed=0):
    torch.manual_seed(seed)
    return kind()


def trained(m, group, kind, steps, proposal, coupling, options, groups=()):
    """What `steps` steps leave, each copy on batches of its own; of all copies, or of one process's."""
    replicas = hta.Replicas(seeded(kind), None if group else m, group=group, **options)
    optimizer = hta.CoupledOptimizer(replicas, PROPOSALS[proposal], COUPLINGS[coupling], groups=groups)
    x, y = data(steps, m)
    for step in range(steps):
        optimizer.zero_grad()
        batches = list(zip(x[step], y[step], strict=True))
        replicas.backward(loss, *(batches[replicas.first : replicas.first + 1] if group else batches))
        optimizer.step()
    merged = replicas.merge()
    return {
        "params": replicas.params.clone(),
        "anchor": replicas.anchor,
        "state": {k: v.clone() for k, v in optimizer._buffers.items()},
        "stats": tuple(optimizer.stats),
        "distance": replicas.distance(),
        "merged": merged.state_dict(),
        "mean": optimizer.torch_state_dict("mean")["state"],
        "keys": [k for k in replicas.state_dict() if k.startswith("copies")],
        "low": None if replicas.low is None else replicas.low.clone(),
    }


def across(rank, size, kind, steps, cases):
    group = dist.group.WORLD
    hta.distributed.PIECE = 2048  # several, even of a small net
    return [trained(size, group, kind, steps, *case) for case in cases]


def compare(kind, steps, cases, m, tolerance):
    of_each = run(across, m, kind, steps, cases)
    for i, case in enumerate(cases):
        whole = trained(m, None, kind, steps, *case)
        parts = [results[i] for results in of_each]

        def close(a, b, tolerance=tolerance):
            return torch.equal(a, b) if not tolerance else float((a - b).norm()) <= tolerance * float(b.norm())

        for j, part in enumerate(parts):
            assert close(part["params"][0], whole["params"][j]), case
            assert part["anchor"] is whole["anchor"] is None or close(part["anchor"], whole["anchor"]), case
            for name, buffer in whole["state"].items():
                assert close(part["state"][name][0], buffer[j], 30 * tolerance), (case, name)
            for name, value in whole["merged"].items():
                assert close(part["merged"][name], value) or not value.is_floating_point(), (case, name)
            for key, entry in whole["mean"].items():
                for name, value in entry.items():
                    assert close(part["mean"][key][name], value, 30 * tolerance), (case, name)
            assert part["stats"] == pytest.approx(whole["stats"], rel=1e-4, abs=1e-5, nan_ok=True), case
            assert part["distance"] == pytest.approx(whole["distance"], rel=1e-4, abs=1e-5)
            assert part["low"] is whole["low"] is None or torch.equal(part["low"][0], whole["low"][j]) or tolerance
        assert [key for part in parts for key in part["keys"]] == whole["keys"]


CASES = [(proposal, coupling, {}) for proposal in PROPOSALS for coupling in COUPLINGS]
CASES += [("SGD", "Homotopy", {"partition": partition}) for partition in ("random", "hashed", {"fc.bias": 2})]
CASES += [("SGD", "Homotopy", {"anchor": "zero"}), ("AdamW", "Homotopy", {"start": "independent"}),
          ("SGD", "Homotopy", {"anchor": "random", "start": "independent"})]  # fmt: skip
CASES += [(proposal, coupling, {"compute_dtype": torch.bfloat16})
          for proposal in PROPOSALS for coupling in ("Homotopy", "Explicit", "Parle", "Elastic explicit")]  # fmt: skip
CASES += [("SGD", coupling, {}, [{"params": ["fc.bias", "conv.bias"], "weight_decay": 0.0}])
          for coupling in ("Homotopy", "Explicit", "Parle")]  # fmt: skip


def test_two_processes_are_one_with_two_copies_to_the_bit():
    compare(Net, 12, CASES, 2, 0)


@pytest.mark.parametrize("m", [3, 4])
def test_more_processes_are_one_with_as_many_copies(m):
    compare(Smooth, 100, [case for case in CASES if "compute_dtype" not in case[2]], m, 1e-6)
