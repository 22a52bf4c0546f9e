"""accelerate: `prepare(replicas, optimizer, loader, scheduler)`, and the training loop of its quickstart.

Calling the replicas gives one output for each copy. It is the prepared module's own forward, so that mixed precision (and
DDP, on several processes) apply.
"""

import copy

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import hta_fused as hta


def network():
    return nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.BatchNorm1d(32), nn.Dropout(0.1), nn.Linear(32, 2))


def data():
    x = torch.randn(256, 20)
    return TensorDataset(x, (x.sum(1) > 0).long())


class Run:
    def __init__(self, net, dataset, batch_size=32, **options):
        self.accelerator = Accelerator(cpu=True, **options)
        replicas = hta.Replicas(net)  # glue
        optimizer = hta.HomotopySGD(replicas, lr=0.05, momentum=0.9)
        loader = DataLoader(dataset, batch_size)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=8, gamma=0.8)
        prepared = self.accelerator.prepare(replicas, optimizer, loader, scheduler)
        self.replicas, self.optimizer, self.loader, self.scheduler = prepared
        self.coupling = hta.CouplingScheduler(self.optimizer, L=hta.schedule.linear(0.1, 0.02, step=0.02))  # glue
        self.accelerator.register_for_checkpointing(self.coupling)  # glue

    def train(self, epochs):
        self.replicas.train()
        for _ in range(epochs):
            for x, y in self.loader:
                with self.accelerator.accumulate(self.replicas):
                    loss = sum(F.cross_entropy(output, y) for output in self.replicas(x))  # glue
                    self.accelerator.backward(loss)
                    if self.accelerator.sync_gradients:
                        self.accelerator.clip_grad_norm_(self.replicas.parameters(), 0.5)
                    self.optimizer.step()
                    self.scheduler.step()
                    self.optimizer.zero_grad()
            self.coupling.step()  # glue
        return self


@pytest.fixture(autouse=True)
def fresh():
    """An Accelerator's precision is the process's; each test has its own."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def equal(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_both_copies_train(precision):
    net, dataset = network(), data()
    x, y = dataset.tensors
    start = copy.deepcopy(net)
    run = Run(net, dataset, mixed_precision=precision).train(4)
    assert run.optimizer.param_groups[0]["L"] == pytest.approx(0.02)
    assert run.optimizer.param_groups[0]["lr"] == pytest.approx(0.05 * 0.8**4)
    for trained in (*run.replicas, run.accelerator.unwrap_model(run.replicas).merge()):
        assert {p.dtype for p in trained.parameters()} == {torch.float32}
        assert F.cross_entropy(trained.eval()(x), y) < F.cross_entropy(start.eval()(x), y)


def test_it_is_the_loop_without_accelerate():
    net, dataset = network(), data()
    run_net = copy.deepcopy(net)
    torch.manual_seed(1)
    run = Run(run_net, dataset).train(2)

    replicas = hta.Replicas(net)
    optimizer = hta.HomotopySGD(replicas, lr=0.05, momentum=0.9)
    torch.manual_seed(1)
    for epoch in range(2):
        for group in optimizer.param_groups:
            group.update(L=0.1 - 0.02 * epoch, lr=0.05 * 0.8**epoch)
        for x, y in DataLoader(dataset, 32):
            optimizer.zero_grad()
            sum(F.cross_entropy(output, y) for output in replicas(x)).backward()
            torch.nn.utils.clip_grad_norm_(replicas.parameters(), 0.5)
            optimizer.step()
    equal(run.replicas.state_dict(), replicas.state_dict())


def test_accumulated_gradients_are_those_of_the_whole_batch():
    net, dataset = nn.Linear(20, 2), data()
    whole = Run(copy.deepcopy(net), dataset, batch_size=64).train(2).replicas.state_dict()
    GradientState._reset_state()
    parts = Run(net, dataset, batch_size=16, gradient_accumulation_steps=4).train(2).replicas.state_dict()
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], rtol=0, atol=1e-6)


def test_a_resumed_run_has_the_bits_of_an_unbroken_one(tmp_path):
    dataset = data()
    run = Run(network(), dataset).train(2)
    run.accelerator.save_state(tmp_path)
    run.train(2)
    resumed = Run(network(), dataset)
    resumed.accelerator.load_state(tmp_path)  # the generators of random numbers too
    resumed.train(2)
    equal(run.replicas.state_dict(), resumed.replicas.state_dict())
    assert resumed.optimizer.param_groups[0]["L"] == pytest.approx(0.02)


def test_every_tensor_is_saved(tmp_path):
    run = Run(network(), data()).train(1)
    run.accelerator.save_model(run.replicas, tmp_path)
    saved = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert sum(name.startswith("copies.") for name in saved) == 2 * len(network().state_dict())
    equal(saved, run.replicas.state_dict())
