"""Networks in low precision over float32 masters, and training steps that are captured in a CUDA graph."""

import contextlib
import json
from dataclasses import replace

import pytest
import torch
from conftest import relative_error

import hta_fused as hta
from hta_fused.train import Settings, Trainer, data, graphs, run


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8)
        self.head = torch.nn.Linear(8 * 36, 4)

    def forward(self, x):
        return self.head(self.norm(self.conv(x)).relu().flatten(1))


def low_replicas(low=torch.bfloat16):
    return hta.Replicas(Net(), compute_dtype=low)


def loss_of(x, y):
    def loss(net):
        with torch.autocast("cpu", torch.bfloat16):
            return torch.nn.functional.cross_entropy(net(x), y)

    return loss


def test_low_networks_follow_their_float32_masters():
    replicas = low_replicas()
    assert {p.dtype for p in replicas.theta.conv.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in replicas.theta.norm.parameters()} == {torch.float32}
    optimizer = hta.HomotopySGD(replicas, 0.05, 0.9, L=0.01)
    x, y = torch.randn(64, 3, 8, 8), torch.randint(4, (64,))
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        losses.append(float(sum(replicas.backward(loss_of(x, y)))))
        optimizer.step()
        for net, masters in zip(replicas, replicas.params, strict=True):
            views = dict(zip(replicas.layout.names, replicas.layout.views(masters), strict=True))
            for name, parameter in net.named_parameters():
                assert torch.equal(parameter.detach(), views[name].to(parameter.dtype)), name
    assert losses[-1] < 0.5 * losses[0]
    optimizer.L = 0.0
    optimizer.step()
    merged = replicas.merge()
    assert {p.dtype for p in merged.parameters()} == {torch.float32}
    assert torch.equal(merged.conv.weight, replicas.layout.views(replicas.params[1])[0])


def test_low_gradients_are_those_of_autocast_but_for_their_rounding():
    torch.manual_seed(0)
    low, full = low_replicas(), None
    full = hta.Replicas(Net())
    full.load_state_dict(low.state_dict())
    x, y = torch.randn(32, 3, 8, 8), torch.randint(4, (32,))
    for replicas in (low, full):
        for net in replicas:  # the low copies' own values, so that both networks are the same function
            for p in net.parameters():
                p.data.copy_(p.data.bfloat16())
        replicas.zero_grad()
        replicas.backward(loss_of(x, y))
        replicas.collect_grads()
    assert relative_error(low.grads[0], full.grads[0]) < 2**-7
    assert low.grads.dtype == torch.bfloat16


def test_a_low_run_resumes_from_full_precision(tmp_path):
    x, y = torch.randn(32, 3, 8, 8), torch.randint(4, (32,))

    def train(replicas, optimizer, steps):
        for _ in range(steps):
            optimizer.zero_grad()
            replicas.backward(loss_of(x, y))
            optimizer.step()

    replicas = low_replicas()
    optimizer = hta.HomotopySGD(replicas, 0.05, 0.9, L=0.01)
    train(replicas, optimizer, 3)
    torch.save((replicas.state_dict(), optimizer.state_dict(), replicas.anchor), tmp_path / "saved.pt")
    train(replicas, optimizer, 3)

    copies, state, anchor = torch.load(tmp_path / "saved.pt")
    again = hta.Replicas(Net(), anchor=anchor, compute_dtype=torch.bfloat16)
    again.load_state_dict(copies)
    optimizer = hta.HomotopySGD(again, 0.05, 0.9, L=0.01)
    optimizer.load_state_dict(state)
    train(again, optimizer, 3)
    assert torch.equal(again.params, replicas.params)
    assert torch.equal(again.low, replicas.low)


def test_compute_dtype_needs_float32_beside_it():
    with pytest.raises(TypeError, match="compute_dtype must be bfloat16 or float16 beside float32"):
        hta.Replicas(Net().double(), compute_dtype=torch.bfloat16)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a real graph is captured in test_a_captured_step_follows")
def test_a_step_captured_without_capturable_is_refused(monkeypatch):
    replicas = hta.Replicas(Net())
    optimizer = hta.HomotopySGD(replicas, 0.1)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    optimizer.step()  # on the CPU nothing is captured


def test_refresh_is_what_a_captured_step_reads():
    replicas = hta.Replicas(Net())
    optimizer = hta.HomotopySGD(replicas, 0.1, 0.9, L=0.1, capturable=True)
    optimizer.refresh()
    at, before = optimizer.rules.data_ptr(), optimizer.rules.clone()
    optimizer.L = 0.05  # refreshes by itself
    assert not torch.equal(optimizer.rules, before)
    optimizer.param_groups[0]["lr"] = 0.02
    expected = optimizer.values_at()
    assert not torch.equal(optimizer.rules, expected)
    optimizer.refresh()
    assert torch.equal(optimizer.rules, expected)
    assert torch.equal(optimizer.values_at(lr=0.1, L=0.1), before)
    assert optimizer.rules.data_ptr() == at


class Pretended:
    """Stands in for graphs.Graphed where there is no GPU: calls the steps as a graph would, with nobody at the host."""

    def __init__(self):
        self.whole = self.others = 0

    def __call__(self, step):
        self.whole += 1
        step()

    def uncaptured(self, step):
        self.others += 1
        step()


def settings(tmp_path, **changed):
    return Settings(
        dataset="synthetic", width=0.0625, epochs=3, epochs_per_L=1, L_start=0.01, L_stop=0.009, batch_size=60, seeds=1,
        out=tmp_path, device="cpu", **changed,
    )  # fmt: skip


class FakeStream:
    device = None

    def wait_stream(self, other):
        pass


class FakeGraph:
    replays = 0

    def replay(self):
        FakeGraph.replays += 1


@pytest.fixture
def fake_cuda(monkeypatch):
    """As much of torch.cuda as graphs.Graphed calls, doing nothing."""
    FakeGraph.replays = 0
    for name, fake in (
        ("Stream", lambda device: FakeStream()),
        ("CUDAGraph", FakeGraph),
        ("current_stream", lambda device: FakeStream()),
        ("synchronize", lambda: None),
        ("stream", lambda stream: contextlib.nullcontext()),
        ("graph", lambda graph: contextlib.nullcontext()),
    ):
        monkeypatch.setattr(torch.cuda, name, fake)


@pytest.mark.parametrize("fails", [False, True])
def test_a_step_is_captured_after_its_warm_up_or_goes_on_and_says_why(fake_cuda, fails):
    said, calls = [], []

    def step():
        calls.append(graphed.calls)
        if fails and len(calls) == graphs.WARM_UP + 1:
            raise RuntimeError("cannot be captured")

    graphed = graphs.Graphed(torch.device("cuda"), said.append)
    for _ in range(6):
        graphed(step)
    graphed.uncaptured(step)
    if fails:  # the attempt, then every step uncaptured
        assert said == ["no CUDA graph, going on without one: cannot be captured"]
        assert calls == [1, 2, 3, 4, 4, 5, 6, 6]
        assert FakeGraph.replays == 0
    else:  # warmed up, captured once, replayed
        assert said == []
        assert calls == [1, 2, 3, 4, 6]
        assert FakeGraph.replays == 3


@pytest.mark.parametrize("method", ["hta", "sgd"])
def test_the_planned_step_of_a_graph_is_the_step_that_the_host_directs(tmp_path, monkeypatch, method):
    finished = []
    for planned in (False, True):
        if planned:
            monkeypatch.setattr(Settings, "captures", True)
            pretended = Pretended()
            monkeypatch.setattr(run, "Graphed", lambda device, on_failure, pretended=pretended: pretended)
        folder = tmp_path / f"{method}{planned}"
        assert Trainer(settings(folder, method=method, ema=0.9, swa=0.1)).train()
        networks = {name: torch.load(folder / f"{method}-seed0{name}.pt") for name in ("", "-ema", "-swa")}
        finished.append({f"{name} {k}": tensor for name, state in networks.items() for k, tensor in state.items()})
    assert (pretended.whole, pretended.others) == (3 * 8, 3)  # 512 images: 8 batches of 60, one of 32
    for name, tensor in finished[0].items():
        # SGD's planned lr is a float32 tensor
        assert torch.allclose(tensor.double(), finished[1][name].double(), rtol=1e-4, atol=1e-5), name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_captured_step_follows_its_settings():
    model = Net().cuda()
    replicas = hta.Replicas(model)
    optimizer = hta.HomotopySGD(replicas, 0.1, 0.9, L=0.1, capturable=True)
    other = hta.Replicas(Net().cuda(), anchor=replicas.anchor)
    other.params.copy_(replicas.params)
    eager = hta.HomotopySGD(other, 0.1, 0.9, L=0.1)
    gradients = torch.randn_like(replicas.grads)
    for copies, o in ((replicas, optimizer), (other, eager)):  # warmed up
        copies.grads.copy_(gradients)
        o.step()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        optimizer.step()
    for L, lr in ((0.1, 0.1), (0.05, 0.02), (0.0, 0.3)):
        replicas.grads.copy_(gradients)
        other.grads.copy_(gradients)
        optimizer.L = eager.L = L
        for o in (optimizer, eager):
            o.param_groups[0]["lr"] = lr
        optimizer.refresh()
        graph.replay()
        eager.step()
        assert torch.equal(replicas.params, other.params)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("graph", [True, False])
def test_training_on_the_gpu_learns(tmp_path, precision, graph):
    said = []
    of_the_run = dict(method="compare", precision=precision, graph=graph, ema=0.9, swa=0.25)
    s = replace(settings(tmp_path, **of_the_run), device="cuda", epochs=12)
    assert Trainer(s, report=said.append).train()
    assert not any("no CUDA graph" in line for line in said), said
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert all(r["accuracy_mean"] > 30 for r in summary["runs"].values()), summary


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_averages_beside_a_captured_step_are_those_of_its_steps(tmp_path):
    s = replace(settings(tmp_path, method="sgd", ema=0.9), device="cuda")
    training = run.Run(s, run.Job("SGD", "sgd", 3, 0), run.batches_of(data.synthetic(), s, 0))
    wanted = None
    for _ in range(3):
        training.start_epoch()
        while training.batch < len(training.batches):
            training.advance()
            weights = [p.detach().clone() for p in training.phase.networks[0].parameters()]
            wanted = weights if wanted is None else [a.lerp(b, 0.1) for a, b in zip(wanted, weights, strict=True)]
        training.end_epoch(1.0)
    assert training.graphed.graph is not None
    torch.testing.assert_close(list(training.averages.networks["ema"].parameters()), wanted)
