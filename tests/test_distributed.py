"""One copy for each process: the result is that of one process with all copies."""

import math
import os
import subprocess
import sys
import textwrap
from copy import deepcopy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from processes import run
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

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
                assert close(part["merged"][name], value, 30 * tolerance) or not value.is_floating_point(), (case, name)
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


# ------------------------------------------------------------------------------------------------- refused and skipped


def make(rank, size, **options):
    return hta.Replicas(seeded(), group=dist.group.WORLD, **options)


def differing(rank, size, what):
    if what == "model":
        return hta.Replicas(Net() if rank else Smooth(), group=dist.group.WORLD)
    if what == "shape":
        net = Net()
        net.fc = nn.Linear(32, 16 + rank)
        return hta.Replicas(net, group=dist.group.WORLD)
    if what == "buffer":
        net = Net()
        net.norm.running_var = net.norm.running_var.to(torch.float64 if rank else torch.float32)
        return hta.Replicas(net, group=dist.group.WORLD)
    if what == "version":
        hta.__version__ = f"0.2.{rank}"
    if what in ("partition", "anchor", "start", "communicate", "compute_dtype"):
        one, other = {"partition": ("conv_blocks", "random"), "anchor": ("init", "zero"), "start": ("copy", "independent"),
                      "communicate": ("float32", "bfloat16"), "compute_dtype": (None, torch.bfloat16)}[what]  # fmt: skip
        return make(rank, size, **{what: other if rank else one})
    if what == "seed":
        return make(rank, size, partition=hta.Partition.hashed(seeded(), seed=rank))
    replicas = make(rank, size, partition="hashed" if what == "seed, later" else "auto")
    proposal, coupling, groups, looks = hta.SGD(0.1), hta.Homotopy(0.1), [], True
    if what.startswith("Parle"):
        coupling = hta.Parle(every=1)
    if what == "L unlooked, later":
        looks = False
    if what == "proposal":
        proposal = hta.AdamW(0.1) if rank else proposal
    elif what == "lr":
        proposal = hta.SGD(0.1 + 0.1 * rank)
    elif what == "coupling":
        coupling = hta.EMA() if rank else coupling
    elif what == "groups":
        groups = [{"params": ["fc.bias"]}] if rank else []
    optimizer = hta.CoupledOptimizer(replicas, proposal, coupling, groups=groups, skip_nonfinite=looks)
    if what in ("L, later", "L unlooked, later"):
        optimizer.coupling = hta.Homotopy(0.1 + rank)
    if what == "Parle's lr, later":
        optimizer.param_groups[0]["lr"] += rank
    if what == "Parle's eta, later":
        optimizer.param_groups[0]["eta"] -= rank / 4
    if what == "steps, later":
        optimizer.state_dict()
        optimizer._set_steps(rank)
    if what == "seed, later":
        replicas.partition.resample(rank)
    if what == "frozen, later":
        (replicas.theta.fc if rank else replicas.theta.conv).requires_grad_(False)
    if what == "merge, later":
        if rank:
            replicas.theta.register_buffer("extra", torch.ones(2))
        return replicas.merge()
    steps = optimizer.steps
    try:
        optimizer.step()
    finally:
        assert optimizer.steps == steps  # none was made


NAMES = {
    "model": "the model's class",
    "shape": "parameter 'fc.weight'",
    "buffer": "buffer 'norm.running_var'",
    "version": "the version of hta_fused",
    "partition": "the partition",
    "seed": "the partition's seed",
    "proposal": "the proposal",
    "lr": "lr of param_groups[0]",
    "coupling": "coupling of param_groups[0]",
    "groups": "the parameters of param_groups",
    "L, later": "lr, L and all other settings",
    "L unlooked, later": "lr, L and all other settings",
    "Parle's lr, later": "lr, L and all other settings",
    "Parle's eta, later": "lr, L and all other settings",
    "steps, later": "lr, L and all other settings",
    "seed, later": "the partition's seed",
    "frozen, later": "what is frozen",
    "merge, later": "buffer 'extra'",
} | {name: name for name in ("anchor", "start", "communicate", "compute_dtype")}


def all_differing(rank, size):
    results = {}
    for what in NAMES:
        try:
            results[what] = differing(rank, size, what)
        except (ValueError, RuntimeError) as error:
            results[what] = str(error)
        hta.__version__ = "the same"
    return {what: message if isinstance(message, str) else None for what, message in results.items()}


def test_what_differs_between_processes_is_named_by_all_of_them():
    for messages in run(all_differing, 2):
        for what, wanted in NAMES.items():
            assert messages[what] is not None, what
            assert wanted in messages[what], what
            assert "must be the same in all processes" in messages[what]
            assert "\n" not in messages[what]


def nonsense(rank, size):
    net, messages = seeded(), []
    group = dist.group.WORLD
    for options in (
        {"group": "world"}, {"group": 3}, {"group": group, "copies": 3}, {"group": group, "communicate": "float16"},
        {"group": group, "communicate": None}, {"group": group, "partition": hta.Partition.conv_blocks(net, blocks=3)},
        {"group": group, "start": [seeded(), seeded()]},
    ):  # fmt: skip
        try:
            hta.Replicas(net, **options)
        except (ValueError, TypeError) as error:
            messages.append(str(error))
    replicas = hta.Replicas(net, group=group)
    for call in (
        lambda: hta.HomotopySGD(replicas, 0.1, capturable=True),
        lambda: hta.HomotopySGD(replicas, 0.1, unscale=False),
        lambda: hta.HomotopySGD(replicas, 0.1).plan([0.1]),
        lambda: hta.HomotopySGD(replicas, 0.1).torch_state_dict("eta"),
        lambda: torch.save(replicas, "/dev/null"),
        lambda: replicas.backward(loss, 1, 2),
    ):
        try:
            call()
        except (ValueError, TypeError) as error:
            messages.append(str(error))
    return messages


def test_nonsense_is_named():
    for messages in run(nonsense, 2):
        assert len(messages) == 13
        assert not any("\n" in message for message in messages)
    with pytest.raises(RuntimeError, match="group needs torch.distributed"):
        hta.Replicas(Net(), group="world")


def bad_gradients(rank, size, cases):
    return [bad_gradient(rank, size, *case) for case in cases]


def bad_gradient(rank, size, proposal, coupling, bad):
    replicas = make(rank, size)
    optimizer = hta.CoupledOptimizer(replicas, PROPOSALS[proposal], COUPLINGS[coupling])
    x, y = data(3, size)
    for step in range(3):
        optimizer.zero_grad()
        replicas.backward(loss, (x[step, rank], y[step, rank]))
        before = [t.clone() for t in (replicas.params, *optimizer._buffers.values())]
        if step == 1 and rank == 1:
            replicas.grads[0, 5] = bad
        optimizer.step()
        after = [replicas.params, *optimizer._buffers.values()]
        if step == 1:
            assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        else:
            assert not torch.equal(before[0], after[0])
    return optimizer.stats.skipped, optimizer.steps


def test_a_bad_gradient_in_one_process_is_skipped_by_all():
    bad = (math.nan, math.inf, -math.inf)
    cases = [(*of, value) for of in (("SGD", "Homotopy"), ("AdamW", "Elastic"), ("SGD", "Explicit")) for value in bad]
    assert run(bad_gradients, 2, cases) == [[(1, 3)] * len(cases)] * 2


# ----------------------------------------------------------------------------------------------- what is sent, and how


def counted(rank, size, cases):
    return [counted_one(rank, size, *case) for case in cases]


def counted_one(rank, size, coupling, communicate):
    """Bytes handed to all-reduce in each of six steps."""
    replicas = make(rank, size, communicate=communicate)
    optimizer = hta.CoupledOptimizer(replicas, hta.SGD(0.1), COUPLINGS[coupling])
    sent, original = [], dist.all_reduce

    def all_reduce(tensor, *args, **options):
        sent[-1] += tensor.nbytes
        return original(tensor, *args, **options)

    dist.all_reduce = all_reduce
    for _ in range(6):
        sent.append(0)
        optimizer.step()
    dist.all_reduce = original
    return sent, replicas.layout.numel


def test_bytes_sent():
    flag = 12  # whether to skip, and two numbers that agree
    couples = {"Homotopy": [1] * 6, "Homotopy every 3": [0, 0, 1] * 2, "decoupled": [0] * 6,
               "Average": [0, 0, 0, 1, 0, 0], "Toward": [0] * 6, "Parle": [0, 0, 1] * 2}  # fmt: skip
    cases = [(coupling, communicate) for coupling in couples for communicate in ("float32", "bfloat16")]
    for results in run(counted, 2, cases):
        for (coupling, communicate), (sent, n) in zip(cases, results, strict=True):
            sizes = iter([4, *[4 if communicate == "float32" or coupling == "Parle" else 2] * 6])  # the first is whole
            assert sent == [c and n * next(sizes) + flag for c in couples[coupling]], coupling


def halved(rank, size):
    """Steps whose sums travel in bfloat16."""
    results = []
    for communicate in ("float32", "bfloat16"):
        replicas = make(rank, size, communicate=communicate)
        optimizer = hta.HomotopySGD(replicas, 0.05, 0.9, L=0.05)
        x, y = data(10, size)
        for step in range(10):
            optimizer.zero_grad()
            replicas.backward(loss, (x[step, rank], y[step, rank]))
            optimizer.L = 0.05 if step < 9 else 0.0
            optimizer.step()
        results.append(replicas.params[0].clone())
    return results


def test_bfloat16_sums_are_close_and_merge():
    (one, low), (other, other_low) = run(halved, 2)
    assert torch.equal(one, other)
    assert torch.equal(low, other_low)  # at L = 0 all have what was sent
    assert not torch.equal(one, low)
    assert float((one - low).norm()) < 2e-2 * float(one.norm())


def crept(rank, size, skips):
    """Many small steps of copies that are held tightly together, from sums in float32 and in bfloat16."""
    results = []
    for communicate in ("float32", "bfloat16"):
        replicas = hta.Replicas(seeded(Smooth), group=dist.group.WORLD, communicate=communicate)
        start = replicas.params[0].clone()
        optimizer = hta.HomotopySGD(replicas, 1e-4, 0.9, L=1e-5)
        x, y = data(10, size)
        for step in range(300):
            optimizer.zero_grad()
            replicas.backward(loss, (x[step % 10, rank], y[step % 10, rank]))
            if step % 50 in skips and rank == 1:
                replicas.grads[0, 5] = math.nan
            optimizer.step()
        results.append(replicas.params[0] - start)
    return (*results, optimizer.stats.skipped)


@pytest.mark.parametrize("skips", [(), (7, 8), (0, 1)])
def test_bfloat16_sums_keep_small_changes(skips):
    """A step changes the weights by less than a ten-thousandth, where bfloat16 has steps of thousandths."""
    for whole, halved, skipped in run(crept, 2, skips):
        assert float((whole - halved).norm()) < 1e-3 * float(whole.norm())
        assert skipped == (12 if skips else 0)


def on_a_mesh(rank, size):
    """Two copies, each by two processes that share its batch."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("copy", "data"))
    replicas = hta.Replicas(seeded(Smooth), group=mesh["copy"])
    net = nn.parallel.DistributedDataParallel(replicas.theta, process_group=mesh["data"].get_group())
    optimizer = hta.HomotopySGD(replicas, 0.05, 0.9, L=0.05)
    x, y = data(6, 2)
    copy, part = replicas.first, slice(4 * mesh.get_local_rank("data"), 4 * mesh.get_local_rank("data") + 4)
    for step in range(6):
        optimizer.zero_grad()
        loss(net, (x[step, copy, part], y[step, copy, part])).backward()
        optimizer.step()
    del net
    return copy, replicas.params[0].clone()


def test_ddp_inside_a_copy():
    whole = hta.Replicas(seeded(Smooth))
    optimizer = hta.HomotopySGD(whole, 0.05, 0.9, L=0.05)
    x, y = data(6, 2)
    for step in range(6):
        optimizer.zero_grad()
        whole.backward(loss, *zip(x[step], y[step], strict=True))
        optimizer.step()
    for copy, params in run(on_a_mesh, 4):
        assert float((params - whole.params[copy]).norm()) < 1e-6 * float(params.norm())


def resumed(rank, size, saved):
    replicas = make(rank, size)
    optimizer = hta.CoupledOptimizer(replicas, PROPOSALS["AdamW"], COUPLINGS["Homotopy every 3"])
    x, y = data(8, size)
    state = of_optimizer = None
    for step in range(8):
        if saved and step == 4:
            replicas = make(rank, size, anchor="random")
            optimizer = hta.CoupledOptimizer(replicas, PROPOSALS["AdamW"], COUPLINGS["Homotopy every 3"])
            replicas.load_state_dict(state)
            optimizer.load_state_dict(of_optimizer)
        optimizer.zero_grad()
        replicas.backward(loss, (x[step, rank], y[step, rank]))
        optimizer.step()
        state, of_optimizer = deepcopy(replicas.state_dict()), deepcopy(optimizer.state_dict())
    return replicas.params.clone()


def go_on(replicas, rank, size, steps):
    """So many steps of a process's copy."""
    optimizer = hta.CoupledOptimizer(replicas, PROPOSALS["SGD"], COUPLINGS["Homotopy"])
    x, y = data(steps, size)
    for step in range(steps):
        optimizer.zero_grad()
        replicas.backward(loss, (x[step, rank], y[step, rank]))
        optimizer.step()


def loaded(rank, size, state, steps):
    """One process's state in each of two, and on from there."""
    replicas = make(rank, size, partition="hashed", anchor="random")
    replicas.load_state_dict(state)
    go_on(replicas, rank, size, steps)
    messages = []
    for change in (
        lambda name: name.replace("copies.1", "copies.2"),
        lambda name: name.replace(f"copies.{rank}", "copies.7"),
    ):
        try:
            replicas.load_state_dict({change(name): value for name, value in state.items()})
        except RuntimeError as error:
            messages.append(str(error))
    return replicas.params[0].clone(), messages


def test_a_state_of_all_copies_loads_into_their_processes():
    whole = hta.Replicas(seeded(seed=3), partition="hashed", start="independent", factory=Net)
    whole.partition.resample(11)
    state = deepcopy(whole.state_dict())
    optimizer = hta.CoupledOptimizer(whole, PROPOSALS["SGD"], COUPLINGS["Homotopy"])
    x, y = data(4, 2)
    for step in range(4):
        optimizer.zero_grad()
        whole.backward(loss, *zip(x[step], y[step], strict=True))
        optimizer.step()
    for j, (params, messages) in enumerate(run(loaded, 2, state, 4)):
        assert torch.equal(params, whole.params[j])
        assert len(messages) == 2
        assert all("state_dict must hold copy" in message for message in messages)


def begun_anew(rank, size, state, steps):
    """A merged network, and as many copies of it as there are processes."""
    net = seeded(Smooth)
    net.load_state_dict(state)
    replicas = hta.Replicas(net, group=dist.group.WORLD)
    go_on(replicas, rank, size, steps)
    return replicas.params[0].clone(), replicas.merge().state_dict()


def test_merged_first_another_number_of_processes_goes_on():
    """Three go on with what two have merged, and one process with what three have."""
    (_, merged), _ = run(begun_anew, 2, seeded(Smooth).state_dict(), 5)
    three = run(begun_anew, 3, merged, 5)
    net = seeded(Smooth)
    net.load_state_dict(merged)
    whole = hta.Replicas(net, 3)
    optimizer = hta.CoupledOptimizer(whole, PROPOSALS["SGD"], COUPLINGS["Homotopy"])
    x, y = data(5, 3)
    for step in range(5):
        optimizer.zero_grad()
        whole.backward(loss, *zip(x[step], y[step], strict=True))
        optimizer.step()
    for params, wanted in zip(three, whole.params, strict=True):
        assert float((params[0] - wanted).norm()) < 1e-6 * float(wanted.norm())
    for name, value in whole.merge().state_dict().items():
        torch.testing.assert_close(three[0][1][name], value, rtol=1e-5, atol=1e-7)


def test_each_process_resumes_from_its_own_state():
    for one, other in zip(run(resumed, 2, True), run(resumed, 2, False), strict=True):
        assert torch.equal(one, other)


def test_the_documents_script_runs_under_torchrun(tmp_path):
    page = (Path(__file__).parent.parent / "docs" / "distributed.md").read_text(encoding="utf-8")
    (tmp_path / "train.py").write_text(page.split("```python no-test torchrun\n")[1].split("```")[0])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py"]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert len(torch.load(tmp_path / "merged.pt", weights_only=True)) == 4


def test_a_destroyed_group_is_gone_though_copies_and_optimizer_are_there():
    """What held it would leave gloo's threads to the interpreter's end, which aborts the process now and then."""
    code = """
        import weakref, torch, torch.distributed as dist
        import hta_fused as hta
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        replicas = hta.Replicas(torch.nn.Linear(4, 4), group=dist.group.WORLD)
        optimizer = hta.HomotopySGD(replicas, lr=0.1)
        replicas.backward(lambda net: net(torch.ones(1, 4)).sum())
        optimizer.step()
        merged, group = replicas.merge(), weakref.ref(dist.group.WORLD)
        dist.destroy_process_group()
        assert group() is None
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, timeout=120)


# ------------------------------------------------------------------------------------------------- what all are told


def told(rank, size):
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4).requires_grad_(False))
    replicas = hta.Replicas(net, partition={}, group=dist.group.WORLD)
    optimizer = hta.HomotopySGD(replicas, lr=0.1, L=0.0)
    replicas.grads.normal_(generator=torch.Generator().manual_seed(rank))
    optimizer.step()
    net[1].weight.data.fill_(rank)
    return replicas.distance(), replicas.merge()[1].weight.mean().item()


@pytest.mark.parametrize("m", [2, 3])
def test_equal_copies_are_at_distance_zero_and_what_is_frozen_is_merged_too(m):
    assert run(told, m) == [(0.0, (m - 1) / 2)] * m
