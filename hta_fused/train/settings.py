"""What is trained and how: every flag of hta-train, the recipes, and what follows from them (schedules, dtypes, device).

Knows nothing of networks. Imports schedule.py, and the ops' limit on copies.
"""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from .. import schedule as L_schedules
from ..ops import MAX_COPIES

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Settings:
    """Train a VGG by homotopy (HTA), by SGD, or both beside each other.

    HTA trains coupled copies while L falls, then merges them and goes on with one. Two copies cost twice the work, so
    `compare` sets it beside SGD at equal epochs and SGD at equal work.
    """

    method: Literal["hta", "sgd", "compare"] = "compare"
    """What to train: HTA, SGD, or HTA beside SGD at equal epochs and SGD at equal work."""
    recipe: Literal["none", "paper"] = "none"
    """"paper" makes the paper's CIFAR-10 recipe the default of every other flag."""

    model: Literal["vgg11", "vgg13", "vgg16", "vgg19"] = "vgg11"
    """The network."""
    batch_norm: bool = True
    """A batch norm after each convolution."""
    width: float = 0.25
    """Factor on the number of channels; 1 is the full network."""

    dataset: Literal["digits", "cifar10", "synthetic"] = "digits"
    """digits: scikit-learn's 1,797 scanned digits. cifar10: see data_dir. synthetic: made on the spot."""
    data_dir: Path = Path("data")
    """Where CIFAR-10 lies, as an official archive or unpacked (binary or Python layout)."""
    download: bool = False
    """Fetch CIFAR-10 into data_dir if it is not there."""

    copies: int = 2
    """How many networks HTA trains while L falls."""
    batches: Literal["shared", "own"] = "shared"
    """Whether all copies see the same batch, or each its own: every epoch all images in an order of its own."""
    partition: Literal[
        "conv_blocks", "layer_blocks", "random", "random_units", "hashed", "conv_halves", "layer_halves"
    ] = "conv_blocks"
    """Which elements are in which of as many blocks as there are copies; each copy is free on one and anchored on the
    others. hashed: random, and drawn anew each epoch."""
    part: Literal["all", "conv", "classifier"] = "all"
    """The part of the network that the partition covers."""
    anchor: Literal["init", "zero", "random"] = "init"
    """The point θ̃ that the blocks are pulled to."""
    start: Literal["copy", "independent"] = "copy"
    """Whether all copies start equal or from initialisations of their own."""
    mode: Literal["implicit", "explicit"] = "implicit"
    """How the quadratic terms are stepped: by their proximal map (stable) or the paper's equation (7)."""

    schedule: Literal["linear", "geometric", "constant"] = "linear"
    """How L falls from L_start to L_stop."""
    L_start: float = 0.01
    """The first L."""
    L_stop: float = 0.005
    """The last L before the copies are merged."""
    L_step: float = 0.001
    """What linear takes off each time; geometric multiplies by 1 - L_step."""
    epochs_per_L: int = 1
    """Epochs at each value of L."""
    decoupled: int = 0
    """Epochs at L = ∞ before the schedule."""

    epochs: int = 15
    """Epochs over the training set, those before the merge included."""
    lr: float = 0.05
    """The (highest) learning rate."""
    lr_schedule: Literal["constant", "halve", "cosine", "one-cycle"] = "cosine"
    """How the learning rate falls."""
    halve_every: int = 30
    """Epochs between two halvings."""
    momentum: float = 0.9
    """SGD's momentum."""
    weight_decay: float = 5e-4
    """SGD's weight decay."""
    batch_size: int = 64
    """Images in a batch, of every copy."""

    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """bf16, fp16: forward and backward under autocast, on float32 parameters; fp16 with a scaled loss. On a GPU HTA's
    step writes the copy of the parameters that the next forward uses."""
    channels_last: bool = False
    """Keep images and kernels in channels-last order."""
    device: str = "auto"
    """"cpu", "cuda", or "auto"."""
    graph: bool = True
    """On a GPU, capture the training step in a CUDA graph."""
    threads: int = 0
    """CPU threads; 0 leaves torch's choice."""
    seed: int = 0
    """Of the initialisation, the order of the images, and dropout."""
    seeds: int = 1
    """Run everything for this many seeds, from `seed` on."""
    out: Path | None = None
    """The folder for results; by default a new one under runs/."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "seeds", "halve_every", "epochs_per_L", "copies"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("decoupled", "threads", "momentum", "weight_decay", "seed"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.copies > MAX_COPIES:
            raise ValueError(f"copies must be at most {MAX_COPIES}, got {self.copies}")
        if not self.momentum < 1:
            raise ValueError(f"momentum must be under 1, got {self.momentum}")
        for name in ("lr", "width"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)}")
        if self.method != "sgd" and self.L_schedule.epochs > self.epochs:
            raise ValueError(f"epochs is {self.epochs}, but the schedule of L takes {self.L_schedule.epochs}")

    @property
    def L_schedule(self) -> L_schedules.Schedule:
        """L over the epochs before the merge."""
        if self.schedule == "linear":
            falling = L_schedules.linear(self.L_start, self.L_stop, self.L_step, self.epochs_per_L)
        elif self.schedule == "geometric":
            falling = L_schedules.geometric(self.L_start, self.L_stop, 1 - self.L_step, self.epochs_per_L)
        else:
            falling = L_schedules.constant(self.L_start, self.epochs_per_L)
        return L_schedules.decoupled(self.decoupled) + falling if self.decoupled else falling

    def lr_at(self, progress: float, total: int) -> float:
        """The learning rate after `progress` of `total` epochs."""
        if self.lr_schedule == "halve":
            return self.lr * 0.5 ** (int(progress) // self.halve_every)
        if self.lr_schedule == "cosine":
            return self.lr * 0.5 * (1 + math.cos(math.pi * progress / total))
        if self.lr_schedule == "one-cycle":
            rise = 0.3
            part = progress / total
            return self.lr * (0.04 + 0.96 * part / rise if part < rise else max(1e-3, (1 - part) / (1 - rise)))
        return self.lr

    @property
    def torch_device(self) -> torch.device:
        return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if self.device == "auto" else self.device)

    @property
    def captures(self) -> bool:
        """Whether the training step is to be captured in a CUDA graph."""
        return self.graph and self.torch_device.type == "cuda"

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format

    @property
    def compute_dtype(self) -> torch.dtype:
        """Of batches and coupled networks: a GPU's kernels write what is computed in; on the CPU autocast casts."""
        return PRECISIONS[self.precision] if self.torch_device.type == "cuda" else torch.float32

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.torch_device.type, PRECISIONS[self.precision], enabled=self.precision != "fp32")

    def to_json(self) -> dict[str, Any]:
        """The settings as JSON holds them."""
        return {k: str(v) if isinstance(v, Path) else v for k, v in asdict(self).items()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Settings":
        """The inverse of `to_json`."""
        paths = {k: Path(values[k]) for k in ("data_dir", "out") if values.get(k)}
        return cls(**{**values, **paths})


# Table 2's networks: batch norm, lr 0.05 halved every 30 of 300 epochs; L = 0.01 … 0.005, four epochs each.
PAPER = Settings(
    recipe="paper", dataset="cifar10", width=1.0, epochs=300, lr_schedule="halve", batch_size=128, epochs_per_L=4
)
RECIPES = {"none": Settings(), "paper": PAPER}
