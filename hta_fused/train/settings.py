"""What is trained and how: every flag of hta-train, the recipes, and what follows from them (schedules, dtypes, device).

Knows nothing of networks and of the machine. Imports checks.py, files.py, schedule.py, and what the step refuses.
"""

import math
import re
from dataclasses import asdict, dataclass, field
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch

from .. import schedule as L_schedules
from ..checks import number, shown
from ..couplings import Average, Coupling, Explicit, Homotopy
from ..files import is_path
from ..kernels.reference import MAX_COPIES
from ..proposals import SGD
from ..rules import rules_of
from .rivals import OUTER_LR, OUTER_MOMENTUM

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
OF_THE_MACHINE = ("data_dir", "download", "device", "graph", "threads", "timeout")  # may change where a run goes on
MOST = 10**6  # epochs, images in a batch, ...: beyond it a number is a slip of the keyboard


def flag(default: Any, group: str, metavar: str, help: str) -> Any:
    """A setting, with what hta-train's help says of it beside its choices and its default."""
    return field(default=default, metadata={"group": group, "metavar": metavar, "help": help})


@dataclass(frozen=True)
class Settings:
    """Train a VGG by homotopy (HTA), by SGD, or both beside each other.

    HTA trains coupled copies while L falls, then merges them and goes on with one. Two copies cost twice the work, so
    `compare` sets it beside SGD at equal epochs and SGD at equal work. `ddp` is SGD by torch's DistributedDataParallel:
    `copies` processes, each with a batch, average their gradients.

    Raises:
        ValueError: a setting that makes no sense; the message begins with its name.
    """

    method: Literal["hta", "sgd", "compare", "ddp"] = flag(
        "compare", "method", "METHOD", "what to train; ddp: SGD in processes that average gradients"
    )
    recipe: Literal["none", "paper"] = flag("none", "method", "RECIPE", "all other flags' defaults")

    model: Literal["vgg11", "vgg13", "vgg16", "vgg19"] = flag("vgg11", "network", "MODEL", "the network")
    batch_norm: bool = flag(True, "network", "", "a batch norm after each convolution")
    width: float = flag(0.125, "network", "FACTOR", "on the number of channels; 1: all")
    dropout: float = flag(0.5, "network", "P", "of the classifier's inputs, in training")

    dataset: Literal["digits", "cifar10", "synthetic"] = flag("digits", "data", "DATASET", "the images")
    data_dir: Path = flag(Path("data"), "data", "FOLDER", "where CIFAR-10 lies, packed or not")  # noqa: RUF009
    download: bool = flag(False, "data", "", "fetch CIFAR-10 if it is not there")
    train_images: int = flag(0, "data", "IMAGES", "drawn anew by each seed; 0: all")
    validate: bool = flag(False, "data", "", "test on training images left out")
    flip: Literal["random", "alternating"] = flag(
        "random", "data", "HOW", "images are mirrored: at random, or every other epoch"
    )
    tta: bool = flag(False, "data", "", "test by the mean logits of an image and its mirror image")

    copies: int = flag(2, "homotopy", "COPIES", "networks that HTA trains while L falls")
    batches: Literal["shared", "own"] = flag("shared", "homotopy", "WHOSE", "one for all copies or one each")
    partition: Literal[
        "conv_blocks", "layer_blocks", "random", "random_units", "hashed", "none", "conv_halves", "layer_halves"
    ] = flag(
        "conv_blocks",
        "homotopy",
        "PARTITION",
        "elements to blocks, as many as copies; a copy is free on one and anchored on the others",
    )
    part: Literal["all", "conv", "classifier"] = flag("all", "homotopy", "PART", "what is partitioned")
    anchor: Literal["init", "zero", "random"] = flag("init", "homotopy", "ANCHOR", "where blocks are pulled")
    start: Literal["copy", "independent"] = flag("copy", "homotopy", "START", "copies start equal or not")
    resample: Literal["epoch", "step"] = flag("epoch", "homotopy", "WHEN", "hashed blocks are drawn anew")
    coupling: Literal["homotopy", "average", "diloco"] = flag(
        "homotopy", "homotopy", "COUPLING", "average: local SGD; diloco: SGD on what their mean has moved; no L"
    )
    every: int = flag(1, "homotopy", "STEPS", "couple at each STEPS-th")
    outer_lr: float = flag(OUTER_LR, "homotopy", "LR", "of diloco's outer SGD")
    outer_momentum: float = flag(OUTER_MOMENTUM, "homotopy", "MOMENTUM", "of diloco's outer SGD, Nesterov's")
    mode: Literal["implicit", "explicit"] = flag("implicit", "homotopy", "MODE", "of the coupling's step")
    schedule: Literal["linear", "geometric", "constant", "tight-loose-merge"] = flag(
        "linear", "homotopy", "SCHEDULE", "how L falls; tight-loose-merge: L start, then L stop, above it"
    )
    L_start: float = flag(0.01, "homotopy", "L", "the first L")
    L_stop: float = flag(0.005, "homotopy", "L", "where L ends, or the last step above it")
    L_step: float = flag(0.001, "homotopy", "STEP", "linear: L - STEP; geometric: L * (1 - STEP)")
    epochs_per_L: int = flag(1, "homotopy", "EPOCHS", "at each value of L")
    decoupled: int = flag(0, "homotopy", "EPOCHS", "at L = inf before the schedule")

    epochs: int = flag(9, "optimisation", "EPOCHS", "in all, those before the merge too")
    lr: float = flag(0.05, "optimisation", "LR", "the (highest) learning rate")
    lr_schedule: Literal["constant", "halve", "cosine", "one-cycle"] = flag(
        "cosine", "optimisation", "SCHEDULE", "LR falls"
    )
    warmup: int = flag(0, "optimisation", "EPOCHS", "at the start, in which LR rises from 0 to its schedule")
    halve_every: int = flag(30, "optimisation", "EPOCHS", "between two halvings")
    momentum: float = flag(0.9, "optimisation", "MOMENTUM", "SGD's momentum")
    weight_decay: float = flag(5e-4, "optimisation", "DECAY", "SGD's weight decay")
    ema: float = flag(
        0.0, "optimisation", "DECAY", "of a moving average of the one network's weights, from the merge on; 0: none"
    )
    swa: float = flag(
        0.0, "optimisation", "PART", "of the epochs, the last, whose weights are averaged, from the merge on; 0: none"
    )
    label_smoothing: float = flag(0.0, "optimisation", "PART", "of the training loss; the test loss is plain")
    batch_size: int = flag(64, "optimisation", "IMAGES", "in a batch, of every copy")
    evaluate_every: int = flag(1, "optimisation", "EPOCHS", "test at each EPOCHS-th, and the last")
    seed: int = flag(0, "optimisation", "SEED", "of weights, order, crops, dropout")
    seeds: int = flag(3, "optimisation", "SEEDS", "runs of everything, from --seed on")

    precision: Literal["fp32", "bf16", "fp16"] = flag("fp32", "machine", "DTYPE", "of autocast")
    master_format: Literal["full", "split"] = flag(
        "full", "machine", "FORMAT", "split: 24 bits of each master, of which coupled networks hold 16"
    )
    anchor_format: Literal["full", "bfloat16"] = flag("full", "machine", "FORMAT", "of the anchor")
    state_format: Literal["full", "bfloat16", "8bit"] = flag("full", "machine", "FORMAT", "of the momentum")
    memory_format: Literal["auto", "channels_last", "contiguous"] = flag(
        "auto", "machine", "FORMAT", "of images and kernels; auto: what is fastest"
    )
    device: str = flag("auto", "machine", "DEVICE", "auto, cpu, cuda or cuda:N")
    graph: bool = flag(True, "machine", "", "capture a GPU's step in a CUDA graph")
    concurrent: bool = flag(True, "machine", "", "copies' passes side by side")
    threads: int = flag(0, "machine", "THREADS", "on the CPU; 0: torch's choice")
    timeout: float = flag(600.0, "machine", "SECONDS", "under torchrun, how long to wait for others")

    out: Path | None = flag(None, "output", "FOLDER", "for results; by default a new one in runs/")  # noqa: RUF009

    def __post_init__(self) -> None:
        for name, hint in HINTS.items():
            object.__setattr__(self, name, _of_type(name, hint, getattr(self, name)))
        counts = ("epochs", "batch_size", "seeds", "halve_every", "epochs_per_L", "copies", "every", "evaluate_every")
        for name in counts:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        least_0 = (
            "decoupled",
            "warmup",
            "threads",
            "train_images",
            "momentum",
            "outer_momentum",
            "weight_decay",
            "seed",
            "L_start",
            "L_stop",
        )
        for name in least_0:
            if not 0 <= getattr(self, name) < math.inf:
                wanted = "not be negative" if getattr(self, name) < 0 else "be finite"
                raise ValueError(f"{name} must {wanted}, got {getattr(self, name)}")
        for name in ("lr", "outer_lr", "width", "L_step", "timeout"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)}")
        limits = {"copies": MAX_COPIES, "seed": 2**32 - 1, "width": 10**12, "timeout": MOST, "train_images": MOST}
        for name, most in ({name: MOST for name in (*counts, "decoupled")} | limits).items():
            if getattr(self, name) > most:
                raise ValueError(f"{name} must be at most {most}, got {getattr(self, name)}")
        if self.seed + self.seeds > 2**32:
            raise ValueError(
                f"seed must be at most {2**32 - self.seeds} where there are {self.seeds} seeds, got {self.seed}"
            )
        if not self.warmup < self.epochs:
            raise ValueError(f"warmup must be under epochs, {self.epochs}, got {self.warmup}")
        for name in ("momentum", "outer_momentum"):
            if not getattr(self, name) < 1:
                raise ValueError(f"{name} must be under 1, got {getattr(self, name)}")
        if self.validate and not self.train_images:
            raise ValueError("validate must have images to test on: give train_images, fewer than there are")
        if self.master_format == "split" and self.coupling == "diloco":
            raise ValueError("master_format must be full where the coupling is diloco, got 'split'")
        if not 0 <= self.swa <= 1:
            raise ValueError(f"swa must be from 0 to 1, got {self.swa}")
        for name in ("dropout", "label_smoothing", "ema"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 0 and under 1, got {getattr(self, name)}")
        if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", self.device):
            raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {self.device!r}")
        if self.dataset == "digits" and (self.flip == "alternating" or self.tta):
            setting = "tta must be False" if self.tta else "flip must be random"
            raise ValueError(f"{setting} where the dataset is digits, which are never mirrored")
        self._check_schedule()
        self._check_numbers()

    def _check_schedule(self) -> None:
        values = 1.0  # before any of them is made: there may be no end to them
        if self.schedule in ("linear", "geometric") and self.L_start < self.L_stop:
            raise ValueError(f"L_start must be at least L_stop, {self.L_stop}, got {self.L_start}")
        if self.schedule == "tight-loose-merge":
            values += 1
            if self.L_start > self.L_stop:
                raise ValueError(f"L_start must be at most L_stop, {self.L_stop}, where the schedule is {self.schedule}, "
                                 f"got {self.L_start}")  # fmt: skip
            if self.trains_copies and self.partition != "none":
                raise ValueError(f"partition must be none where the schedule is {self.schedule}, whose large L would hold "
                                 f"anchored blocks in place, got {self.partition!r}")  # fmt: skip
        if self.schedule == "linear":
            values += (self.L_start - self.L_stop) / self.L_step
        elif self.schedule == "geometric":
            if not self.L_stop > 0:
                raise ValueError(f"L_stop must be positive where the schedule is geometric, got {self.L_stop}")
            if not 0 < 1 - self.L_step < 1:
                raise ValueError(f"L_step must be between 0 and 1 where the schedule is geometric, got {self.L_step}")
            values += (math.log(self.L_stop) - math.log(self.L_start)) / math.log(1 - self.L_step)
        if values * self.epochs_per_L > MOST:
            raise ValueError(f"L_step must leave at most {MOST} epochs before the merge, got {self.L_step}")
        if self.trains_copies and self.L_schedule.epochs > self.epochs:
            least = self.L_schedule.epochs
            raise ValueError(f"epochs must be at least {least}, which the schedule of L takes, got {self.epochs}")
        for name in ("ema", "swa"):
            if getattr(self, name) and self.trains_copies and self.L_schedule.epochs == self.epochs:
                raise ValueError(f"{name} must be 0 where no epoch is left after the merge, got {getattr(self, name)}")

    def _check_numbers(self) -> None:
        """Refuses what the coupled step would refuse when it comes to it."""
        if not self.trains_copies:
            return
        for part, kind in (("conv", "layer"), ("classifier", "conv")):
            if self.part == part and self.partition.startswith(f"{kind}_"):
                raise ValueError(
                    f"part must have what partition {self.partition} divides, got {part!r}, which has no such layer"
                )
        if self.coupling != "homotopy" and self.partition != "none":
            raise ValueError(f"partition must be none where the coupling is {self.coupling}, got {self.partition!r}")
        if self.coupling == "diloco" and self.start != "copy":
            raise ValueError(f"start must be copy where the coupling is diloco, got {self.start!r}")
        for L in (self.L_schedule.values[0], self.L_schedule.values[-1]):
            try:
                sgd = SGD(self.lr, self.momentum, self.weight_decay)
                rules_of(sgd, self.coupling_at(L), self.copies, self.every, dtype=torch.float32)
            except ValueError as error:
                limit = str(error).partition(" must give ")[2]
                why = f"they must give {limit}" if limit else error
                numbers = f"lr {self.lr:g} and weight_decay {self.weight_decay:g}"
                raise ValueError(f"{numbers} cannot go with L {L:g} and mode {self.mode}: {why}") from None

    @property
    def trains_copies(self) -> bool:
        """Whether some run trains copies, by HTA or by another coupling."""
        return self.method in ("hta", "compare")

    @property
    def L_schedule(self) -> L_schedules.Schedule:
        """L over the epochs before the merge."""
        if self.schedule == "linear":
            falling = L_schedules.linear(self.L_start, self.L_stop, self.L_step, self.epochs_per_L)
        elif self.schedule == "geometric":
            falling = L_schedules.geometric(self.L_start, self.L_stop, 1 - self.L_step, self.epochs_per_L)
        elif self.schedule == "tight-loose-merge":
            tight, loose = (L_schedules.constant(L, self.epochs_per_L) for L in (self.L_start, self.L_stop))
            falling = tight + loose
        else:
            falling = L_schedules.constant(self.L_start, self.epochs_per_L)
        return L_schedules.decoupled(self.decoupled) + falling if self.decoupled else falling

    @property
    def equal_work_epochs(self) -> int:
        """Epochs of one network that are the work of a homotopy run: an epoch counts once for each copy."""
        return self.epochs + (self.copies - 1) * self.L_schedule.epochs

    def L_at(self, epoch: int) -> float:
        """L before the merge; NaN where the coupling has none."""
        return self.L_schedule(epoch) if self.coupling == "homotopy" else math.nan

    def coupling_at(self, L: float) -> Coupling:
        """What pulls the copies together in an epoch of this L; nothing where DiLoCo's outer step does."""
        if self.coupling == "average":
            return Average(every=self.every)
        if self.coupling == "diloco":
            return Homotopy(math.inf)
        return (Explicit if self.mode == "explicit" else Homotopy)(L, every=self.every)

    def lr_at(self, progress: float, total: int, step: float = 0.0) -> float:
        """The learning rate after `progress` of `total` epochs.

        Args:
            progress, total: in epochs.
            step: the part of an epoch that the next step is. A warm-up of n steps begins with 1/n and ends with 1.
        """
        risen = min(1.0, (progress + step) / self.warmup) if self.warmup else 1.0
        return risen * self._schedule_at(progress, total)

    def _schedule_at(self, progress: float, total: int) -> float:
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
        """Whether the training step is to be captured in a CUDA graph. DiLoCo's periods are the host's to count."""
        return self.graph and self.torch_device.type == "cuda" and self.coupling != "diloco"

    @property
    def chosen_format(self) -> Literal["channels_last", "contiguous"]:
        """The memory format; for "auto" the one that convolutions are fastest in on the device."""
        if self.memory_format != "auto":
            return self.memory_format
        on_gpu = self.torch_device.type == "cuda"
        return "contiguous" if on_gpu and self.precision == "fp32" else "channels_last"

    @property
    def torch_memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.chosen_format == "channels_last" else torch.contiguous_format

    @property
    def compute_dtype(self) -> torch.dtype:
        """Of coupled networks' parameters: a GPU's kernels write what is computed in; on the CPU autocast casts. Of split
        masters the networks hold one part."""
        if self.master_format == "split" and self.precision == "fp32":
            return torch.bfloat16
        written = self.torch_device.type == "cuda" or self.master_format == "split"
        return PRECISIONS[self.precision] if written else torch.float32

    @property
    def batch_dtype(self) -> torch.dtype:
        return torch.float32 if self.precision == "fp32" else self.compute_dtype

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.torch_device.type, PRECISIONS[self.precision], enabled=self.precision != "fp32")

    def to_json(self) -> dict[str, Any]:
        """The settings as JSON holds them."""
        return {k: str(v) if isinstance(v, Path) else v for k, v in asdict(self).items()}

    def difference(self, other: "Settings") -> str | None:
        """The first setting in which another run's differ, leaving aside what may change where a run goes on."""
        names = (name for name in HINTS if name not in ("out", *OF_THE_MACHINE))
        return next((name for name in names if getattr(self, name) != getattr(other, name)), None)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Settings":
        """The inverse of `to_json`."""
        unknown = [name for name in values if name not in HINTS]
        if unknown:
            raise ValueError(f"{unknown[0]} is no setting of this version")
        return cls(**values)


def _of_type(name: str, hint: Any, value: Any) -> Any:
    """The value, as its field holds it: of Python's own types, since a checkpoint that held NumPy's would not be read."""
    if get_origin(hint) is Literal:
        if isinstance(value, str) and value in get_args(hint):
            return next(choice for choice in get_args(hint) if choice == value)
        wanted = f"one of {', '.join(get_args(hint))}"
    elif hint in (Path, Path | None):
        if value is None and hint is not Path:
            return None
        if is_path(value):
            return Path(value)
        wanted = "a path"
    else:
        kind = {int: Integral, float: Real}.get(hint, hint)
        if isinstance(value, kind) and (hint is bool or not isinstance(value, bool)):
            return number(name, value) if hint is float else hint(value)
        wanted = {int: "a whole number", float: "a number", bool: "True or False", str: "a text"}[hint]
    raise ValueError(f"{name} must be {wanted}, got {shown(value)}")


HINTS: dict[str, Any] = get_type_hints(Settings)  # each field's type

# Table 2's networks: batch norm, lr 0.05 halved every 30 of 300 epochs; L = 0.01 … 0.005, four epochs each.
PAPER = Settings(
    recipe="paper",
    dataset="cifar10",
    width=1.0,
    epochs=300,
    seeds=1,
    lr_schedule="halve",
    batch_size=128,
    epochs_per_L=4,
)
RECIPES = {"none": Settings(), "paper": PAPER}
