"""One run: its epochs, batches and losses, and all that it needs to go on, as a checkpoint holds it.

Stopped at any moment and resumed, it ends with the same bits. What the two phases do apart stands in phases.py.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .averages import Averages
from .data import Batches, Images, mixed
from .graphs import Graphed
from .phases import Merged, Phase, phase_at
from .settings import Settings
from .team import ALONE, Team
from .vgg import VGG


@dataclass(frozen=True)
class Job:
    """What one run is to do."""

    label: str  # "HTA", "local SGD", "DiLoCo", "SGD", "SGD, equal work", "DDP"
    method: str  # "hta", "sgd" or "ddp"
    epochs: int
    seed: int

    @property
    def name(self) -> str:
        return f"{self.label.lower().replace(',', '').replace(' ', '-')}-seed{self.seed}"


class Run:
    """A job in training.

    Args:
        settings, job: what to train.
        batches: the data.
        report: takes a line of text for the user.
        saved: a `state` to go on from.
        team: the processes that train the copies, one each.
    """

    def __init__(
        self,
        settings: Settings,
        job: Job,
        batches: Batches,
        report: Callable[[str], None] = print,
        saved: dict[str, Any] | None = None,
        team: Team = ALONE,
    ):
        self.settings, self.job, self.batches, self.report = settings, job, batches, report
        self.epoch: int = saved["epoch"] if saved else 0
        self.batch: int = saved["batch"] if saved else 0  # the next one's number
        self.skipped = 0  # steps of the phase, when the epoch began
        torch.manual_seed(job.seed)
        self.scaler = torch.amp.GradScaler(settings.torch_device.type, enabled=settings.precision == "fp16")
        own = replace(settings, seed=job.seed)
        self._enter(phase_at(own, job.method, self.epoch, network(settings), team))
        if saved is not None:
            self._load(saved)

    # A checkpoint's tensors are the run's own: whoever saves them does so at once.
    def state(self) -> dict[str, Any]:
        return {
            "epoch": self.epoch,
            "batch": self.batch,
            "skipped": self.phase.skipped - self.skipped,
            "losses": torch.tensor(self.phase.everyones(self.losses.tolist()), dtype=torch.float64, device="cpu"),
            "random_cuda": torch.cuda.get_rng_state() if self.losses.is_cuda else None,
            "phase": self.phase.state(),
            "averages": self.averages.state(),
            "scaler": self.scaler.state_dict(),
        }

    def _load(self, saved: dict[str, Any]) -> None:
        self.phase.load_state(saved["phase"])
        self._enter(self.phase)  # its learning rate may lie elsewhere now
        self.averages.load_state(saved["averages"])
        if saved["losses"].shape != (self.phase.count,):  # which copy_ might repeat
            raise ValueError(f"losses has shape {tuple(saved['losses'].shape)}, expected {(self.phase.count,)}")
        self.losses.copy_(saved["losses"][self.phase.numbers])
        self.skipped = -saved["skipped"]  # the phase counts from here
        self.scaler.load_state_dict(saved["scaler"])
        if self.losses.is_cuda and saved["random_cuda"] is not None:
            torch.cuda.set_rng_state(saved["random_cuda"])

    def _enter(self, phase: Phase) -> None:
        """Goes on with other networks, whose step is to be captured anew."""
        self.phase = phase
        own = self.settings.batches == "own"
        self.streams = [self.batches.of_copy(number) for number in phase.numbers] if own else [self.batches]
        self.losses = torch.zeros(len(phase.networks), dtype=torch.float64, device=self.settings.torch_device)
        one = phase.networks[0] if isinstance(phase, Merged) else None
        self.averages = Averages(self.settings, one, self.job.epochs)
        self.graphed: Graphed | None = None
        if self.settings.captures:
            self.graphed = Graphed(self.losses.device, lambda why: self.report(f"{self.job.name}: {why}"))

    @property
    def images_seen(self) -> int:
        """The images of this epoch so far."""
        return min(self.batch * self.batches.batch_size, len(self.batches.images.train))

    def _lr_at(self, batch: int) -> float:
        steps = len(self.batches)
        return self.settings.lr_at(self.epoch + batch / steps, self.job.epochs, 1 / steps)

    # ------------------------------------------------------------------------------------------------------- steps

    def start_epoch(self) -> None:
        """Makes this epoch's next batch, its L and its learning rates ready."""
        self.phase.start_epoch(self.epoch, self.batch)
        for net in self.phase.networks:
            net.train()
        for stream in self.streams:
            stream.begin(self.epoch, self.batch)
        if self.graphed is not None:
            self.phase.plan([self._lr_at(batch) for batch in range(len(self.batches))], self.batch)

    def train_epoch(self, on_batch: Callable[[], bool]) -> bool:
        """The rest of this epoch's batches. False if `on_batch` asked to stop."""
        self.start_epoch()
        while self.batch < len(self.batches):
            self.advance()
            if on_batch():
                return False
        if self.losses.is_cuda:
            torch.cuda.synchronize()  # so that the epoch's time is its own
        return True

    def advance(self) -> None:
        """The next batch, through the graph if there is one and the batch is a whole one."""
        size = self.batches.size(self.batch)
        if self.graphed is None:
            self.phase.set_lr(self._lr_at(self.batch))
            self.step(size)
        elif size == self.settings.batch_size:
            self.graphed(lambda: self.step(size))
        else:
            self.graphed.uncaptured(lambda: self.step(size))
        self.averages.after_step()
        self.batch += 1

    def step(self, size: int) -> None:
        """One batch: forward and backward of every network, and the update. Waits for nothing, so that it can be captured."""
        batches = [stream.next(size) for stream in self.streams]

        def loss(net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
            # Dropout's: the same, whichever process or thread has the copy. A graph's generator goes on by itself.
            seed = mixed(self.job.seed, self.epoch, self.phase.draws[id(net)], self.batch)
            if not self.losses.is_cuda:
                vgg: Any = getattr(net, "module", net)  # DDP may have wrapped it
                vgg.seed(seed)
            elif not self.settings.captures:
                torch.manual_seed(seed)
            return self.loss(net, batch)

        self.phase.optimizer.zero_grad()
        losses = self.phase.backward(loss, batches, self.scaler.scale)
        self.phase.step(self.scaler)
        self.scaler.update()
        self.losses += size * torch.stack(losses)

    def loss(self, net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, labels = batch
        with self.settings.autocast():
            return F.cross_entropy(
                outputs(net, images, self.settings), labels, label_smoothing=self.settings.label_smoothing
            )

    # ---------------------------------------------------------------------------------------------------- an epoch's end

    def end_epoch(self, seconds: float) -> dict[str, Any]:
        """Measures, and moves on to the next epoch and its phase.

        Returns:
            A row of metrics. Keys that end in a number are one network's; `test_loss` and `test_accuracy` are those of
            the networks' mean, None in an epoch without a test; `train_loss` is the mean of theirs; those that end in `_ema`
            and `_swa` are the averages', where there is a test.
        """
        phase, settings, copies = self.phase, self.settings, self.phase.count
        tests = (self.epoch + 1) % settings.evaluate_every == 0 or self.epoch + 1 == self.job.epochs
        measured = phase.everyones(
            [
                (loss, *(evaluate(net, self.batches, settings) if tests else (None, None)))
                for net, loss in zip(phase.networks, (self.losses / self.images_seen).tolist(), strict=True)
            ]
        )
        row: dict[str, Any] = {
            "run": self.job.label,
            "seed": self.job.seed,
            "epoch": self.epoch + 1,
            "copies": copies,
            "L": phase.L,
            "lr": self._lr_at(len(self.batches) - 1),
            "distance": phase.distance,
            # Counted once for each copy that an image went through.
            "images_per_second": copies * self.images_seen / seconds if seconds > 0 else 0.0,
            "seconds": seconds,
            "skipped": phase.skipped - self.skipped,  # steps, for a gradient that was not finite
            "train_loss": sum(loss for loss, _, _ in measured) / copies,
        }
        for number, of_copy in enumerate(measured):
            row[f"train_loss_{number}"], row[f"test_loss_{number}"], row[f"test_accuracy_{number}"] = of_copy
        self.averages.end_epoch(self.epoch, self.batches, tests)
        for name, net in self.averages.networks.items() if tests else ():
            row[f"test_loss_{name}"], row[f"test_accuracy_{name}"] = evaluate(net, self.batches, settings)
        self.epoch, self.batch = self.epoch + 1, 0
        with settings.autocast():
            following = phase.following(self.epoch, (images for images, _ in self.batches.unaugmented("train")))
        if copies == 1:
            row["test_loss"], row["test_accuracy"] = row["test_loss_0"], row["test_accuracy_0"]
        else:
            tested = evaluate(following.mean(), self.batches, settings) if tests else (None, None)
            row["test_loss"], row["test_accuracy"] = tested
        self.losses.zero_()
        if following is not phase:
            self._enter(following)
        self.skipped = self.phase.skipped
        return row


def network(settings: Settings) -> nn.Module:
    """A new network, where and in the memory format that the settings say."""
    model = VGG(settings.model, settings.batch_norm, settings.width, dropout=settings.dropout).to(settings.torch_device)
    return model.to(memory_format=settings.torch_memory_format)  # type: ignore[call-overload]  # torch's stubs lack it


def batches_of(images: Images, settings: Settings, seed: int) -> Batches:
    """Of a run of this seed."""
    s = settings
    if s.train_images:
        images = images.drawn(s.train_images, seed, s.validate)
    return Batches(images, s.batch_size, seed, s.torch_device, s.torch_memory_format, s.batch_dtype, s.flip)


def outputs(net: nn.Module, images: Tensor, settings: Settings) -> Tensor:
    """A network's logits. Where it holds bfloat16 numbers but is computed in float32, it reads them as such."""
    if settings.compute_dtype == settings.batch_dtype:
        return net(images)
    return torch.func.functional_call(net, {name: p.float() for name, p in net.named_parameters()}, (images,))


@torch.no_grad()
def evaluate(net: nn.Module, batches: Batches, settings: Settings) -> tuple[float, float]:
    """Mean cross-entropy and accuracy (in %) of a network on the test set, with `tta` of the mean logits of two views."""
    was_training = net.training
    net.eval()
    sums = []
    with settings.autocast():
        for images, labels in batches.unaugmented("test"):
            logits = outputs(net, images, settings).float()
            if settings.tta and batches.images.flip:
                logits = (logits + outputs(net, images.flip(3), settings).float()) / 2
            loss = F.cross_entropy(logits, labels, reduction="sum")
            sums.append(torch.stack([loss.double(), (logits.argmax(1) == labels).sum().double()]))
    net.train(was_training)
    loss, right = torch.stack(sums).sum(0).tolist()
    count = len(batches.images.test)
    return loss / count, 100 * right / count
