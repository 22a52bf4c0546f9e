"""The phases of a run: Coupled trains copies apart, Merged trains one network; a run asks both the same questions.

Imports the package's optimizer and copies; knows nothing of batches and runs.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..optim import HomotopySGD
from ..partition import BY_NAME
from ..replicas import Replicas
from .graphs import Plan
from .settings import Settings

State = dict[str, Any]
Scale = Callable[[Tensor], Tensor]


class Coupled:
    """Trains copies of a network, pulled together as L falls, until L_schedule is over.

    Attributes:
        networks: what is trained.
        optimizer: steps all of them.
        L: of this epoch; 0 where there is one network.
        distance: between the copies; 0 where there is one network.
        skipped: steps so far that a gradient which was not finite kept from being taken.
    """

    def __init__(self, settings: Settings, model: nn.Module):
        self.settings = s = settings
        partition = BY_NAME[s.partition](model, None if s.part == "all" else s.part, blocks=s.copies)
        self.replicas = Replicas(model, s.copies, partition, s.anchor, s.start, compute_dtype=s.compute_dtype)
        self.networks = self.replicas.copies
        self.optimizer = HomotopySGD(
            self.replicas, s.lr, s.momentum, s.weight_decay, L=s.L_schedule(0), mode=s.mode, capturable=s.captures
        )

    @property
    def L(self) -> float:
        return self.optimizer.L

    @property
    def distance(self) -> float:
        return self.replicas.distance()

    @property
    def skipped(self) -> int:
        return self.optimizer.stats.skipped

    def start_epoch(self, epoch: int) -> None:
        """To be called before an epoch's first step, and after `load_state`."""
        self.optimizer.L = self.settings.L_schedule(epoch)
        if self.settings.partition == "hashed":
            self.replicas.partition.resample(self.settings.seed + epoch)

    def plan(self, lrs: list[float], start: int) -> None:
        """Sends the learning rates of an epoch's steps ahead, of which number `start` is the next: steps that are
        captured cannot ask the host."""
        self.optimizer.plan(lrs, start)

    def set_lr(self, lr: float) -> None:
        """Of the next step, where none are planned."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def backward(self, loss: Callable[[nn.Module, Any], Tensor], batches: list[Any], scale: Scale) -> list[Tensor]:
        """Fills every network's gradients, from one batch or one each; the losses, detached and not scaled."""
        return list(self.replicas.backward(loss, *batches, scale=scale, concurrent=self.settings.captures))

    def step(self, scaler: torch.amp.GradScaler) -> None:
        scaler.step(self.optimizer)

    def mean(self) -> nn.Module:
        """One network from all, as it is tested."""
        return self.replicas.merge()

    def following(self, epoch: int, inputs: Iterable[Tensor]) -> "Phase":
        """The phase that trains `epoch`, the next: this one, or where it is over Merged with the copies' mean.

        Args:
            inputs: batches of images from which the mean's batch norms take statistics of their own.
        """
        if epoch < self.settings.L_schedule.epochs:
            return self
        merged = Merged(self.settings, self.replicas.merge(inputs if self.settings.batch_norm else None))
        momentum = self.optimizer.torch_state_dict("mean")["state"]
        merged.optimizer.load_state_dict(merged.optimizer.state_dict() | {"state": momentum})
        return merged

    def state(self) -> State:
        return {"networks": self.replicas.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state(self, state: State) -> None:
        self.replicas.load_state_dict(state["networks"])
        self.optimizer.load_state_dict(state["optimizer"])


class Merged:
    """Trains one network by SGD: what a homotopy run does once L is 0, and an SGD run from the start. See Coupled."""

    L = 0.0
    distance = 0.0
    skipped = 0  # torch's SGD takes every step that no GradScaler withholds

    def __init__(self, settings: Settings, model: nn.Module):
        self.settings = s = settings
        self.networks = [model]
        lr = torch.tensor(s.lr, device=s.torch_device) if s.captures else s.lr
        self.optimizer = torch.optim.SGD(
            model.parameters(), lr, momentum=s.momentum, weight_decay=s.weight_decay, fused=True
        )
        self._plan: Plan | None = None

    def start_epoch(self, epoch: int) -> None:
        """Nothing to do: there is no L."""

    def plan(self, lrs: list[float], start: int) -> None:
        if self._plan is None:
            self._plan = Plan(self.optimizer.param_groups[0]["lr"].view(1), len(lrs))
        self._plan.begin(torch.tensor(lrs, device="cpu")[:, None], start)

    def set_lr(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def backward(self, loss: Callable[[nn.Module, Any], Tensor], batches: list[Any], scale: Scale) -> list[Tensor]:
        value = loss(self.networks[0], batches[0])
        scale(value).backward()
        return [value.detach()]

    def step(self, scaler: torch.amp.GradScaler) -> None:
        if self._plan is not None:
            self._plan.advance()
        scaler.step(self.optimizer)

    def mean(self) -> nn.Module:
        return self.networks[0]

    def following(self, epoch: int, inputs: Iterable[Tensor]) -> "Phase":
        return self

    def state(self) -> State:
        return {"networks": self.networks[0].state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state(self, state: State) -> None:
        self.networks[0].load_state_dict(state["networks"])
        self.optimizer.load_state_dict(state["optimizer"])
        self._plan = None
        if self.settings.captures:  # the graph reads lr on the device; it was saved from the CPU, or as a float
            for group in self.optimizer.param_groups:
                group["lr"] = torch.as_tensor(group["lr"]).to(self.settings.torch_device)


Phase = Coupled | Merged


def phase_at(settings: Settings, method: str, epoch: int, model: nn.Module) -> Phase:
    """The phase that trains `epoch` of a run by `method` ("hta" or "sgd"), around a new model."""
    coupled = method == "hta" and epoch < settings.L_schedule.epochs
    return Coupled(settings, model) if coupled else Merged(settings, model)
