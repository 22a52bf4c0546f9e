"""The phases of a run: Coupled trains copies apart, Merged and DataParallel train one network; a run asks all of them the
same questions.

Imports the package's optimizer and copies; knows nothing of batches and runs.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..optim import CoupledOptimizer
from ..partition import BY_NAME
from ..proposals import SGD
from ..replicas import Replicas
from .data import mixed
from .graphs import Plan
from .rivals import OuterSGD, data_parallel
from .settings import Settings
from .team import Team

State = dict[str, Any]
Scale = Callable[[Tensor], Tensor]


class Coupled:
    """Trains copies of a network, pulled together as L falls, until L_schedule is over; in a team one in each process.

    Attributes:
        networks: what is trained here.
        numbers: theirs, among all `count` of them.
        draws: for what a loss is taken of, by its id, whose random numbers it draws: a copy's, or a process's.
        optimizer: steps all of them.
        L: of this epoch; NaN where the coupling has none, 0 where there is one network.
        distance: between the copies; 0 where there is one network.
        skipped: steps so far that a gradient which was not finite kept from being taken.
    """

    def __init__(self, settings: Settings, model: nn.Module, team: Team):
        self.settings = s = settings
        self.team = team
        partition = BY_NAME[s.partition](model, None if s.part == "all" else s.part, blocks=s.copies)
        self.replicas = Replicas(
            model, s.copies, partition, s.anchor, s.start, compute_dtype=s.compute_dtype,
            master_format=s.master_format, anchor_format=s.anchor_format, group=team.group,
        )  # fmt: skip
        self.networks = self.replicas.copies
        self.count = s.copies
        self.numbers = range(s.copies) if team.group is None else range(team.rank, team.rank + 1)
        self.draws = dict(zip(map(id, self.networks), self.numbers, strict=True))
        self.L = s.L_at(0)
        sgd = SGD(s.lr, s.momentum, s.weight_decay)
        self.optimizer = CoupledOptimizer(
            self.replicas, sgd, s.coupling_at(self.L), capturable=s.captures, state_format=s.state_format
        )
        self.outer: OuterSGD | None = None
        if s.coupling == "diloco":
            rows = [[row] for row in self.replicas.params]
            self.outer = OuterSGD(rows, s.every, s.outer_lr, s.outer_momentum, team.group)

    @property
    def distance(self) -> float:
        return self.replicas.distance()

    @property
    def skipped(self) -> int:
        return self.optimizer.stats.skipped

    def start_epoch(self, epoch: int, batch: int) -> None:
        """To be called before the step of an epoch's batch number `batch`: of its first, and after `load_state`."""
        s = self.settings
        self.L = s.L_at(epoch)
        self.optimizer.coupling = s.coupling_at(self.L)
        if s.partition == "hashed":
            seed = s.seed + epoch
            self.replicas.partition.resample(seed if s.resample == "epoch" else mixed(seed) + batch)

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
        s = self.settings
        concurrent = s.concurrent and (s.captures or s.torch_device.type == "cpu")
        return list(self.replicas.backward(loss, *batches, scale=scale, concurrent=concurrent))

    def step(self, scaler: torch.amp.GradScaler) -> None:
        if self.team.group is not None and (scaler.is_enabled() or math.isinf(self.L)):
            self._spoil_together()
        scaler.step(self.optimizer)
        if self.outer is not None and self.outer.step() and self.replicas.low is not None:
            self.replicas.low.copy_(self.replicas.params)
            self.replicas.written()
        if self.settings.partition == "hashed" and self.settings.resample == "step":
            self.replicas.partition.resample()

    def _spoil_together(self) -> None:
        """Makes every copy's gradient infinite where one copy's is not finite: all scalers are to come down, and copies that
        do not meet are to skip the step too, as they do in one process."""
        assert self.replicas.processes is not None
        grads = self.replicas.grads
        finite = torch.linalg.vector_norm(grads, math.inf).isfinite()
        spoilt = self.replicas.processes.largest_((~finite).float().reshape(1)) > 0
        grads[0, :1] = torch.where(spoilt, math.inf, grads[0, :1])

    def everyones(self, of_each: list[Any]) -> list[Any]:
        """What is said of each network here, of all."""
        return [of_one for part in self.team.gather(of_each) for of_one in part]

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
        """Of all copies, one process's or a team's; in a team rank 0's counts."""
        own: State = {"networks": self.replicas.state_dict(), "optimizer": self.optimizer.state_dict()}
        own |= {"outer": self.outer.state_dict()} if self.outer is not None else {}
        return own if self.team.group is None else _united(self.team.gather_for_rank_0(_on_host(own)))

    def load_state(self, state: State) -> None:
        if self.team.group is not None:
            state = _part(state, self.numbers[0], self.count)
        self.replicas.load_state_dict(state["networks"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.outer is not None:
            self.outer.load_state_dict(state["outer"])


def _on_host(state: Any) -> Any:
    if isinstance(state, dict):
        return {key: _on_host(value) for key, value in state.items()}
    return state.cpu() if isinstance(state, Tensor) else state


# torch numbers an optimizer's parameters: copy 0's come first, then copy 1's, and so on.
def _united(parts: list[State]) -> State:
    """One process's state with all copies, from the states of processes with one each."""
    (group,) = parts[0]["optimizer"]["param_groups"]
    count = len(group["params"])
    state = {
        rank * count + key: entry
        for rank, part in enumerate(parts)
        for key, entry in part["optimizer"]["state"].items()
    }
    return parts[0] | {
        "networks": {key: value for part in parts for key, value in part["networks"].items()},
        "optimizer": {"state": state, "param_groups": [group | {"params": list(range(count * len(parts)))}]},
    }


def _part(state: State, rank: int, copies: int) -> State:
    """The inverse of `_united`: what is of copy number `rank`, of so many, and of all."""
    (group,) = state["optimizer"]["param_groups"]
    count = len(group["params"]) // copies
    entries = state["optimizer"]["state"]
    own = {key: entries[rank * count + key] for key in range(count) if rank * count + key in entries}
    prefix = f"copies.{rank}."
    return state | {
        "networks": {k: v for k, v in state["networks"].items() if k.startswith((prefix, "anchor", "_extra_state"))},
        "optimizer": {"state": own, "param_groups": [group | {"params": list(range(count))}]},
    }


class Merged:
    """Trains one network by SGD: what a homotopy run does once L is 0, and an SGD run from the start. See Coupled.

    In a team all processes do the same, and what rank 0's say counts.
    """

    count, numbers = 1, range(1)
    L = 0.0
    distance = 0.0
    skipped = 0  # torch's SGD takes every step that no GradScaler withholds

    def __init__(self, settings: Settings, model: nn.Module):
        self.settings = s = settings
        self.networks = [model]
        self.draws = {id(model): 0}
        lr = torch.tensor(s.lr, device=s.torch_device) if s.captures else s.lr
        self.optimizer = torch.optim.SGD(
            model.parameters(), lr, momentum=s.momentum, weight_decay=s.weight_decay, fused=True
        )
        self._plan: Plan | None = None

    def start_epoch(self, epoch: int, batch: int) -> None:
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

    def everyones(self, of_each: list[Any]) -> list[Any]:
        return of_each

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


class DataParallel(Merged):
    """Trains one network by SGD in all processes of a team: each takes a part of every batch, and DDP averages their gradients.

    The batch is one process's, so that the result is that of SGD on all of it, but for batch norms, whose statistics are
    those of a part; rank 0's are kept.
    """

    def __init__(self, settings: Settings, model: nn.Module, team: Team):
        super().__init__(settings, model)
        self.team = team
        self.wrapped = data_parallel(model, team.group)
        self.draws = {id(self.wrapped): team.rank}

    def backward(self, loss: Callable[[nn.Module, Any], Tensor], batches: list[Any], scale: Scale) -> list[Tensor]:
        ((images, labels),) = batches
        rank, size = self.team.rank, self.team.size
        part = [of.tensor_split(size)[rank] for of in (images, labels)]
        weight = len(part[0]) * size / len(images)  # DDP counts every process alike
        value = weight * loss(self.wrapped, part if weight else (images[:1], labels[:1]))
        scale(value).backward()
        mean = value.detach() / size
        dist.all_reduce(mean, group=self.team.group)
        return [mean]


Phase = Coupled | Merged


def phase_at(settings: Settings, method: str, epoch: int, model: nn.Module, team: Team) -> Phase:
    """The phase that trains `epoch` of a run by `method` ("hta", "sgd" or "ddp"), around a new model."""
    if method == "ddp":
        return DataParallel(settings, model, team)
    coupled = method == "hta" and epoch < settings.L_schedule.epochs
    return Coupled(settings, model, team) if coupled else Merged(settings, model)
