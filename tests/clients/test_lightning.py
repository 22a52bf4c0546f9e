"""Lightning: Replicas in a LightningModule, trained by `Trainer.fit` with automatic optimization.

One loss reaches both copies, so precision plugins, gradient clipping and checkpoints are Lightning's own. To resume, make
the Replicas in `__init__`: Lightning loads the weights before it calls `configure_optimizers`.
"""

import copy

import lightning
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import hta_fused as hta


class Classifier(lightning.LightningModule):
    def __init__(self, net):
        super().__init__()
        self.replicas = hta.Replicas(net)  # glue

    def training_step(self, batch, batch_idx):
        x, y = batch
        return self.replicas.loss(lambda net: F.cross_entropy(net(x), y))  # glue

    def configure_optimizers(self):
        # unscale: in mixed precision Lightning clips no gradients that the optimizer is to divide by a loss's scale
        optimizer = hta.HomotopySGD(self.replicas, lr=0.05, momentum=0.9, unscale=False)  # glue
        lr = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.8)
        L = hta.CouplingScheduler(optimizer, L=hta.schedule.linear(0.1, 0.02, step=0.02))  # glue
        return [optimizer], [lr, L]

    def lr_scheduler_step(self, scheduler, metric):  # glue: Lightning asks for it where one is no torch scheduler
        scheduler.step()  # glue


class Late(Classifier):
    """The other way: a module that is an ordinary one until training begins."""

    def __init__(self, net):
        lightning.LightningModule.__init__(self)
        self.net = net

    def configure_optimizers(self):
        self.replicas = hta.Replicas(self.net)  # glue
        return super().configure_optimizers()


def network():
    return nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.BatchNorm1d(32), nn.Linear(32, 2))


def batches():
    x = torch.randn(256, 20)
    return DataLoader(TensorDataset(x, (x.sum(1) > 0).long()), batch_size=32)


def fit(module, loader, folder, epochs=4, checkpoint=None, **options):
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=1,
        default_root_dir=folder,
        gradient_clip_val=0.5,
        **quiet,
        **options,
    )
    trainer.fit(module, loader, ckpt_path=checkpoint)
    return trainer


def equal(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def loss(net, loader):
    x, y = loader.dataset.tensors
    with torch.no_grad():
        return F.cross_entropy(copy.deepcopy(net).float().eval()(x), y).item()


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
@pytest.mark.parametrize("module", [Classifier, Late])
def test_both_copies_train(module, precision, tmp_path):
    net, loader = network(), batches()
    start = copy.deepcopy(net)
    trained = module(net)
    optimizer = fit(trained, loader, tmp_path, precision=precision).optimizers[0]
    kind = torch.bfloat16 if precision == "bf16-true" else torch.float32
    assert {p.dtype for p in trained.replicas.parameters()} == {kind}
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05 * 0.8**4)
    assert optimizer.param_groups[0]["L"] == pytest.approx(0.02)
    for each in (*trained.replicas, trained.replicas.merge()):
        assert loss(each, loader) < loss(start, loader)


def test_it_is_the_loop_without_lightning(tmp_path):
    net, loader = network(), batches()
    module, replicas = Classifier(copy.deepcopy(net)), hta.Replicas(net)
    fit(module, loader, tmp_path, epochs=2)

    optimizer = hta.HomotopySGD(replicas, lr=0.05, momentum=0.9)
    for epoch in range(2):
        for group in optimizer.param_groups:
            group.update(L=0.1 - 0.02 * epoch, lr=0.05 * 0.8**epoch)
        for x, y in loader:
            optimizer.zero_grad()
            sum(F.cross_entropy(net(x), y) for net in replicas).backward()
            torch.nn.utils.clip_grad_norm_(replicas.parameters(), 0.5)
            optimizer.step()
    equal(module.replicas.state_dict(), replicas.state_dict())


def test_a_resumed_run_has_the_bits_of_an_unbroken_one(tmp_path):
    net, loader = network(), batches()
    unbroken, broken, resumed = Classifier(copy.deepcopy(net)), Classifier(net), Classifier(network())
    fit(broken, loader, tmp_path, epochs=2).save_checkpoint(tmp_path / "half.ckpt")
    optimizer = fit(resumed, loader, tmp_path, epochs=4, checkpoint=tmp_path / "half.ckpt").optimizers[0]
    fit(unbroken, loader, tmp_path, epochs=4)
    assert optimizer.param_groups[0]["L"] == pytest.approx(0.02)
    equal(unbroken.state_dict(), resumed.state_dict())
