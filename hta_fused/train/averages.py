"""Averages of one network's weights over its training, by torch.optim.swa_utils: EMA over steps, SWA over epochs."""

from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

from .data import Batches
from .settings import Settings


class Averages:
    """The averages of a network that the settings ask for, kept up beside its training, which they leave as it is.

    The exponential moving average takes in batch norms' statistics too; the mean of epochs has them estimated anew.

    Args:
        settings: `ema` is the decay, `swa` the part of the run's epochs, at the end, that are averaged.
        model: the network; None while copies are apart, when there is nothing to average.
        epochs: of the run.
    """

    def __init__(self, settings: Settings, model: nn.Module | None, epochs: int):
        self.settings, self.model = settings, model
        self.first = epochs - max(1, round(settings.swa * epochs))  # epoch whose end is averaged
        self.averaged: dict[str, AveragedModel] = {}
        if model is not None and settings.ema:
            ema = get_ema_multi_avg_fn(settings.ema)
            self.averaged["ema"] = AveragedModel(model, multi_avg_fn=ema, use_buffers=True)
        if model is not None and settings.swa:
            self.averaged["swa"] = AveragedModel(model)

    @property
    def networks(self) -> dict[str, nn.Module]:
        """Those that there are by now, by "ema" and "swa"."""
        return {name: averaged.module for name, averaged in self.averaged.items() if averaged.n_averaged > 0}

    def after_step(self) -> None:
        """To be called after every step, outside a captured one: torch counts the steps on the host."""
        if "ema" in self.averaged and self.model is not None:
            self.averaged["ema"].update_parameters(self.model)

    def end_epoch(self, epoch: int, batches: Batches, tests: bool) -> None:
        """To be called after an epoch's last step, with the number of that epoch and whether it ends with a test."""
        if "swa" not in self.averaged or self.model is None or epoch < self.first:
            return
        swa, device = self.averaged["swa"], self.settings.torch_device
        swa.update_parameters(self.model)
        if not tests:
            return
        # Dropout draws numbers that a captured step would miss: its generator goes on by itself.
        with torch.random.fork_rng([device] if device.type == "cuda" else []), self.settings.autocast():
            update_bn((images for images, _ in batches.unaugmented("train")), swa.module)

    def state(self) -> dict[str, Any]:
        return {name: averaged.state_dict() for name, averaged in self.averaged.items()}

    def load_state(self, state: dict[str, Any]) -> None:
        for name, averaged in self.averaged.items():
            averaged.load_state_dict(state[name])
