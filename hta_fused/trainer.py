"""Trains VGG by homotopy and by SGD: settings, one run, and the list of runs that a comparison is made of.

Everything that a run needs to go on is in one checkpoint; a run stopped at any moment and resumed ends with the same
bits. Knows nothing of the command line; draws its picture with plots.py.
"""

import json
import math
import platform
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import data
from . import schedule as schedules
from .files import save_atomically, write_json
from .graphs import Graphed
from .optim import HomotopySGD
from .partition import BY_NAME
from .replicas import Replicas
from .vgg import VGG


@dataclass(frozen=True)
class Settings:
    """Train a VGG by homotopy (HTA), by SGD, or both beside each other.

    HTA trains two coupled copies while L falls, then merges them and goes on with one. Two copies cost twice the work,
    so `compare` sets it beside SGD at equal epochs and SGD at equal work.
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

    partition: Literal["conv_halves", "layer_halves", "random", "random_units"] = "conv_halves"
    """Which elements are block 1 (anchored in θ) and block 2 (anchored in η)."""
    part: Literal["all", "conv", "classifier"] = "all"
    """The part of the network that the partition covers."""
    anchor: Literal["init", "zero", "random"] = "init"
    """The point θ̃ that the blocks are pulled to."""
    eta: Literal["copy", "independent"] = "copy"
    """Whether η starts equal to θ or from an initialisation of its own."""
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
    """Images in a batch; both copies see the same batch."""

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
        positive = ("epochs", "batch_size", "seeds", "halve_every", "epochs_per_L")
        for name in positive:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("decoupled", "threads", "momentum", "weight_decay", "seed"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        for name in ("lr", "width"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)}")
        if self.method != "sgd" and self.homotopy.epochs > self.epochs:
            raise ValueError(f"epochs is {self.epochs}, but the schedule of L takes {self.homotopy.epochs}")

    @property
    def homotopy(self) -> schedules.Schedule:
        """L over the epochs before the merge."""
        if self.schedule == "linear":
            falling = schedules.linear(self.L_start, self.L_stop, self.L_step, self.epochs_per_L)
        elif self.schedule == "geometric":
            falling = schedules.geometric(self.L_start, self.L_stop, 1 - self.L_step, self.epochs_per_L)
        else:
            falling = schedules.constant(self.L_start, self.epochs_per_L)
        return schedules.decoupled(self.decoupled) + falling if self.decoupled else falling

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
    def layout(self) -> torch.memory_format:
        """The memory format of images and kernels."""
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def to_json(self) -> dict[str, Any]:
        """The settings as JSON holds them."""
        return {k: str(v) if isinstance(v, Path) else v for k, v in asdict(self).items()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Settings":
        """The inverse of `to_json`."""
        paths = {k: Path(values[k]) for k in ("data_dir", "out") if values.get(k)}
        return cls(**{**values, **paths})


# Table 2's networks: batch norm, lr 0.05 halved every 30 of 300 epochs; L = 0.01 … 0.005, four epochs each.
PAPER = Settings(recipe="paper", dataset="cifar10", width=1.0, epochs=300, lr_schedule="halve", batch_size=128,
                 epochs_per_L=4)  # fmt: skip
RECIPES = {"none": Settings(), "paper": PAPER}


# --------------------------------------------------------------------------------------------------------------- a run


@dataclass(frozen=True)
class Job:
    """One training run of a comparison."""

    label: str  # "HTA", "SGD", "SGD, equal work"
    method: str  # "hta" or "sgd"
    epochs: int
    seed: int

    @property
    def name(self) -> str:
        return f"{self.label.lower().replace(',', '').replace(' ', '-')}-seed{self.seed}"


def jobs(settings: Settings) -> list[Job]:
    """The runs that the settings ask for, in order."""
    work = settings.epochs + (settings.homotopy.epochs if settings.method != "sgd" else 0)
    kinds = {
        "sgd": [("SGD", "sgd", settings.epochs)],
        "hta": [("HTA", "hta", settings.epochs)],
        "compare": [
            ("SGD", "sgd", settings.epochs),
            ("SGD, equal work", "sgd", work),
            ("HTA", "hta", settings.epochs),
        ],
    }[settings.method]
    return [Job(*kind, seed) for seed in range(settings.seed, settings.seed + settings.seeds) for kind in kinds]


PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Run:
    """The state of one job in training: the networks, their optimizer, and how far it has come."""

    settings: Settings
    job: Job
    batches: data.Batches
    report: Callable[[str], None] = print
    epoch: int = 0
    batch: int = 0
    replicas: Replicas | None = None  # while there are two copies
    losses: Tensor = field(init=False)  # of θ, of η, images so far
    model: nn.Module = field(init=False)  # θ, or the only copy
    optimizer: torch.optim.Optimizer = field(init=False)

    def __post_init__(self) -> None:
        s = self.settings
        torch.manual_seed(self.job.seed)
        device = resolve_device(s.device)
        self.losses = torch.zeros(3, dtype=torch.float64, device=device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=s.precision == "fp16")
        self.captures = can_capture(s, device)
        self.model = in_layout(vgg(s).to(device), s.layout)
        if self.job.method == "hta":
            part = None if s.part == "all" else s.part
            low = PRECISIONS[s.precision] if device.type == "cuda" else None
            partition = BY_NAME[s.partition](self.model, part)
            self.replicas = Replicas(self.model, partition, s.anchor, s.eta, compute_dtype=low)
            self.optimizer = HomotopySGD(
                self.replicas, s.lr, s.momentum, s.weight_decay, L=s.homotopy(0), mode=s.mode, capturable=self.captures
            )
        else:
            self.optimizer = self._sgd()
        self._forget_graph()

    def _sgd(self) -> torch.optim.SGD:
        s = self.settings
        lr = torch.tensor(s.lr, device=self.losses.device) if self.captures else s.lr  # a graph reads it there
        return torch.optim.SGD(
            self.model.parameters(), lr, momentum=s.momentum, weight_decay=s.weight_decay, fused=True
        )

    @property
    def copies(self) -> list[nn.Module]:
        return [self.model] if self.replicas is None else list(self.replicas)

    @property
    def L(self) -> float:
        """The homotopy parameter of this epoch; 0 once there is one copy."""
        return 0.0 if self.replicas is None else self.settings.homotopy(self.epoch)

    def _lr_at(self, batch: int) -> float:
        return self.settings.lr_at(self.epoch + batch / len(self.batches), self.job.epochs)

    def loss(self, net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, labels = batch
        with self._autocast():
            return F.cross_entropy(net(images), labels)

    def step(self, size: int) -> None:
        """One batch: forward and backward of every copy, and the update. Waits for nothing, so that it can be captured."""
        batch = self.batches.next(size)
        self.optimizer.zero_grad()
        if self.replicas is None:
            loss = self.loss(self.model, batch)
            self.scaler.scale(loss).backward()
            losses = [loss.detach(), loss.detach()]
        else:
            losses = list(self.replicas.backward(self.loss, batch, scale=self.scaler.scale, beside=self.captures))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.losses[:2] += size * torch.stack(losses)
        self.losses[2] += size

    def start_epoch(self) -> None:
        """Makes this epoch's next batch, its L and its learning rates ready."""
        if isinstance(self.optimizer, HomotopySGD):
            self.optimizer.L = self.L
        for net in self.copies:
            net.train()
        self.batches.begin(self.epoch, self.batch)
        if self.graphed is not None:
            self._plan()

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

    # ------------------------------------------------------------------------------------------------ the CUDA graph

    def advance(self) -> None:
        """The next batch, through the graph if there is one and the batch is a whole one."""
        size = self.batches.size(self.batch)
        if self.graphed is None:
            self._set_lr()
            self.step(size)
        elif size == self.settings.batch_size:
            self.graphed(self._planned_step)
        else:
            self.graphed.as_it_is(lambda: self._planned_step(size))
        self.batch += 1

    def _planned_step(self, size: int | None = None) -> None:
        """A step whose learning rate the plan holds; a whole batch by default."""
        self._target.copy_(self._schedule.index_select(0, self._next)[0])
        self._next += 1
        self.step(self.settings.batch_size if size is None else size)

    def _forget_graph(self) -> None:
        """To be called where the networks or the optimizer are new."""
        self.graphed = self._graphed() if self.captures else None
        if self.captures:
            own = isinstance(self.optimizer, HomotopySGD)
            self._target = self.optimizer.coefficients if own else self.optimizer.param_groups[0]["lr"].view(1)  # type: ignore[attr-defined]
            self._schedule = self._target.new_zeros(len(self.batches), len(self._target))
            self._next = torch.zeros(1, dtype=torch.int64, device=self._target.device)

    def _graphed(self) -> Graphed:
        return Graphed(self.losses.device, lambda why: self.report(f"{self.job.name}: {why}"))

    def _plan(self) -> None:
        """Puts what the learning rate decides, for each batch of the epoch, on the device: a graph cannot ask the host."""
        rates = [self._lr_at(batch) for batch in range(len(self.batches))]
        if isinstance(self.optimizer, HomotopySGD):
            rows = torch.stack([self.optimizer.coefficients_at(lr=lr) for lr in rates])
        else:
            rows = torch.tensor(rates, device="cpu")[:, None]
        self._schedule.copy_(rows)
        self._next.fill_(self.batch)

    def _set_lr(self) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self._lr_at(self.batch)

    def end_epoch(self, seconds: float) -> dict[str, Any]:
        """Measures, moves on to the next epoch, and merges the copies when their schedule is over."""
        images = int(self.losses[2])
        row: dict[str, Any] = {
            "run": self.job.label, "seed": self.job.seed, "epoch": self.epoch + 1, "copies": len(self.copies),
            "L": self.L, "lr": self._lr_at(len(self.batches) - 1),
            "train_loss_theta": float(self.losses[0] / images), "train_loss_eta": float(self.losses[1] / images),
        }  # fmt: skip
        row["test_loss_theta"], row["test_accuracy_theta"] = self.evaluate(self.model)
        if self.replicas is None:
            row["test_loss"], row["test_accuracy"], row["distance"] = (
                row["test_loss_theta"],
                row["test_accuracy_theta"],
                0.0,
            )
        else:
            row["test_loss_eta"], row["test_accuracy_eta"] = self.evaluate(self.replicas.eta)
            row["distance"] = self.replicas.distance()
            if self.epoch + 1 == self.settings.homotopy.epochs:
                self._merge()
                row["test_loss"], row["test_accuracy"] = self.evaluate(self.model)
            else:
                row["test_loss"], row["test_accuracy"] = self.evaluate(self.replicas.merge())
        # Counted once for each copy that an image went through.
        row["images_per_second"] = row["copies"] * images / seconds if seconds > 0 else 0.0
        row["seconds"] = seconds
        self.epoch, self.batch = self.epoch + 1, 0
        self.losses.zero_()
        return row

    def _merge(self) -> None:
        """L = 0: goes on with the mean of the copies, their mean momentum, and statistics of its own."""
        assert self.replicas is not None
        assert isinstance(self.optimizer, HomotopySGD)
        statistics_from = (x for x, _ in self.batches.plain("train")) if self.settings.batch_norm else None
        with self._autocast():
            self.model = self.replicas.merge(statistics_from)
        state = self.optimizer.sgd_state_dict("mean")
        self.optimizer, self.replicas = self._sgd(), None
        own = self.optimizer.state_dict()
        self.optimizer.load_state_dict({"state": state["state"], "param_groups": own["param_groups"]})
        self._forget_graph()

    def _autocast(self) -> torch.autocast:
        precision = self.settings.precision
        return torch.autocast(self.losses.device.type, PRECISIONS[precision], enabled=precision != "fp32")

    def evaluate(self, net: nn.Module) -> tuple[float, float]:
        """Loss and accuracy (in %) on the test set."""
        with self._autocast():
            return evaluate(net, self.batches)

    # A checkpoint's tensors are the run's own: whoever saves them does so at once.
    def state(self) -> dict[str, Any]:
        copies = self.replicas.state_dict() if self.replicas is not None else {"model": self.model.state_dict()}
        return {
            "epoch": self.epoch,
            "batch": self.batch,
            "losses": self.losses,
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state() if self.losses.is_cuda else None,
            "networks": copies,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        if self.replicas is not None and "model" in state["networks"]:  # it was saved after the merge
            self.replicas, self.optimizer = None, self._sgd()
        self.epoch, self.batch = state["epoch"], state["batch"]
        self.losses.copy_(state["losses"])
        if self.replicas is None:
            self.model.load_state_dict(state["networks"]["model"])
        else:
            self.replicas.load_state_dict(state["networks"])
        self.optimizer.load_state_dict(state["optimizer"])
        for group in self.optimizer.param_groups:
            if self.captures and not isinstance(self.optimizer, HomotopySGD):
                group["lr"] = torch.as_tensor(group["lr"]).to(self.losses.device)
        self.scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["random"])
        if self.losses.is_cuda and state["random_cuda"] is not None:
            torch.cuda.set_rng_state(state["random_cuda"])
        self._forget_graph()


def can_capture(settings: Settings, device: torch.device) -> bool:
    return settings.graph and device.type == "cuda"


def vgg(settings: Settings) -> VGG:
    return VGG(settings.model, settings.batch_norm, settings.width)


def in_layout(model: nn.Module, layout: torch.memory_format) -> nn.Module:
    return model.to(memory_format=layout)  # type: ignore[call-overload]  # torch's stubs lack it


def resolve_device(name: str) -> torch.device:
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


@torch.no_grad()
def evaluate(net: nn.Module, batches: data.Batches) -> tuple[float, float]:
    """Mean cross-entropy and accuracy (in %) of a network on the test set."""
    was_training = net.training
    net.eval()
    sums = []
    for images, labels in batches.plain("test"):
        logits = net(images).float()
        loss = F.cross_entropy(logits, labels, reduction="sum")
        sums.append(torch.stack([loss.double(), (logits.argmax(1) == labels).sum().double()]))
    net.train(was_training)
    loss, right = torch.stack(sums).sum(0).tolist()
    count = len(batches.images.test)
    return loss / count, 100 * right / count


# ----------------------------------------------------------------------------------------------------- a list of runs


class Trainer:
    """Works through a comparison's jobs and keeps its folder.

    The folder holds config.json, metrics.jsonl (a line per epoch), checkpoint.pt, one state_dict per finished run,
    summary.json and curves.png. Each file is written beside and renamed.

    Args:
        settings: what to train; `out` must be set.
        resume: go on from the folder's checkpoint.
        stop: asked after every batch; once it says True, a checkpoint is written and `train` returns.
        progress: wraps an epoch's batches for display: (job, epoch, done, total) after every batch.
        report: takes each line of text for the user.
    """

    def __init__(
        self,
        settings: Settings,
        resume: bool = False,
        stop: Callable[[], bool] = lambda: False,
        progress: Callable[[Job, int, int, int], None] = lambda *_: None,
        report: Callable[[str], None] = print,
    ):
        assert settings.out is not None
        self.settings, self.stop, self.progress, self.report = settings, stop, progress, report
        self.out = settings.out
        self.checkpoint = self.out / "checkpoint.pt"
        if self.checkpoint.exists() and not resume:
            raise FileExistsError(
                f"{self.out} already holds a run: --resume {self.out} goes on with it, or choose another --out"
            )
        if resume and not self.checkpoint.exists():
            raise FileNotFoundError(f"{self.out} holds no checkpoint.pt to resume from")
        if settings.threads:
            torch.set_num_threads(settings.threads)
        self.images = data.load(settings.dataset, settings.data_dir, settings.download)
        self.fingerprint = self.images.fingerprint()
        self.jobs = jobs(settings)
        self.rows: list[dict[str, Any]] = []
        self.done = 0
        self._saved_run: dict[str, Any] | None = None
        if resume:
            self._load()
        else:
            self.out.mkdir(parents=True, exist_ok=True)
            write_json(self.out / "config.json", settings.to_json())
        self._write_metrics()
        self._tensorboard = _tensorboard(self.out)

    def train(self) -> bool:
        """Runs what is left. False if it was asked to stop before the end; then a checkpoint holds all there is."""
        while self.done < len(self.jobs):
            job = self.jobs[self.done]
            run = Run(self.settings, job, self._batches(job), self.report)
            if self._saved_run is not None:
                run.load_state(self._saved_run)
                self._saved_run = None
            while run.epoch < job.epochs:
                finished = self._epoch(run)
                self._save(run)
                if not finished:
                    return False
            self.done += 1
            # An HTA run whose schedule filled all its epochs was merged at the end of the last.
            save_atomically(self.out / f"{job.name}.pt", lambda path, run=run: torch.save(run.model.state_dict(), path))  # type: ignore[misc]
            self._save(None)
        self._finish()
        return True

    def _batches(self, job: Job) -> data.Batches:
        s = self.settings
        device = resolve_device(s.device)
        # On the CPU autocast casts; a GPU's kernel writes what the network computes in.
        dtype = PRECISIONS[s.precision] if device.type == "cuda" else torch.float32
        return data.Batches(self.images, s.batch_size, job.seed, device, s.layout, dtype)

    def _epoch(self, run: Run) -> bool:
        total, start, already = len(run.batches), time.perf_counter(), run.losses[2].item()

        def on_batch() -> bool:
            self.progress(run.job, run.epoch, run.batch, total)
            return self.stop()

        if not run.train_epoch(on_batch):
            return False
        seconds = time.perf_counter() - start
        fresh = 1 - already / run.losses[2].item()  # the part of the epoch that this process trained
        row = run.end_epoch(seconds / fresh if fresh > 0 else 0.0)
        self.rows.append(_finite(row))
        with open(self.out / "metrics.jsonl", "a", encoding="utf-8") as log:
            log.write(json.dumps(self.rows[-1]) + "\n")
        if self._tensorboard is not None:
            for key in ("train_loss_theta", "test_loss", "test_accuracy", "distance", "lr", "L"):
                self._tensorboard.add_scalar(f"{run.job.name}/{key}", row[key], row["epoch"])
        self.report(describe(row, run.job.epochs))
        return True

    # The checkpoint is the truth; metrics.jsonl is written again from it on resuming, since the last lines may be lost
    # or ahead of it.
    def _save(self, run: Run | None) -> None:
        content = {"settings": self.settings.to_json(), "data": self.fingerprint, "rows": self.rows,
                   "done": self.done, "run": None if run is None else run.state()}  # fmt: skip
        save_atomically(self.checkpoint, lambda path: torch.save(content, path))

    def _load(self) -> None:
        content = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
        if content["data"] != self.fingerprint:
            raise ValueError(f"the images are not those that {self.out} was trained on (fingerprint {self.fingerprint}, "
                             f"was {content['data']})")  # fmt: skip
        self.rows, self.done, self._saved_run = content["rows"], content["done"], content["run"]

    def _write_metrics(self) -> None:
        text = "".join(json.dumps(row) + "\n" for row in self.rows)
        save_atomically(self.out / "metrics.jsonl", lambda path: path.write_text(text, encoding="utf-8"))

    def _finish(self) -> None:
        from .plots import curves

        if self._tensorboard is not None:
            self._tensorboard.close()
        summary = summarise(self.rows, self.settings, self.fingerprint)
        write_json(self.out / "summary.json", summary)
        save_atomically(self.out / "curves.png", lambda path: curves(self.rows, path))
        self.report("\n" + table(summary) + f"\n\n{self.out}: " + ", ".join(sorted(p.name for p in self.out.iterdir())))


def summarise(rows: list[dict[str, Any]], settings: Settings, fingerprint: str) -> dict[str, Any]:
    """Mean and deviation over the seeds of each run's last epoch."""
    runs = {}
    for label in dict.fromkeys(row["run"] for row in rows):
        mine = [row for row in rows if row["run"] == label]
        last = [
            max((r for r in mine if r["seed"] == seed), key=lambda r: r["epoch"])
            for seed in sorted({r["seed"] for r in mine})
        ]
        accuracies = [row["test_accuracy"] for row in last]
        runs[label] = {
            "epochs": last[0]["epoch"],
            "work": sum(r["copies"] for r in mine if r["seed"] == last[0]["seed"]),  # epochs, counted once per copy
            "accuracies": accuracies,
            "accuracy_mean": statistics.fmean(accuracies),
            "accuracy_deviation": statistics.stdev(accuracies) if len(accuracies) > 1 else None,
            "test_loss_mean": statistics.fmean(row["test_loss"] for row in last),
            "images_per_second": statistics.median(row["images_per_second"] for row in mine),
            "seconds": sum(row["seconds"] for row in mine) / len(last),
        }
    return {
        "runs": runs,
        "settings": settings.to_json(),
        "data": fingerprint,
        "machine": {"processor": processor(), "threads": torch.get_num_threads(), "torch": torch.__version__,
                    "python": platform.python_version(), "device": str(resolve_device(settings.device))},
        "date": datetime.now().isoformat(timespec="seconds"),
    }  # fmt: skip


def table(summary: dict[str, Any]) -> str:
    """The summary for a terminal, as a Markdown table."""
    lines = ["| run | epochs | work (epochs × copies) | test accuracy, % | test loss | images/s per copy | s per run |",
             "| --- | ---: | ---: | ---: | ---: | ---: | ---: |"]  # fmt: skip
    for label, run in summary["runs"].items():
        spread = "" if run["accuracy_deviation"] is None else f" ± {run['accuracy_deviation']:.2f}"
        lines.append(
            f"| {label} | {run['epochs']} | {run['work']} | {run['accuracy_mean']:.2f}{spread} | "
            f"{run['test_loss_mean']:.4f} | {run['images_per_second']:.0f} | {run['seconds']:.0f} |"
        )
    return "\n".join(lines)


def describe(row: dict[str, Any], epochs: int) -> str:
    """An epoch in one line."""
    parts = [f"{row['run']} seed {row['seed']} epoch {row['epoch']}/{epochs}"]
    if row["copies"] == 2:
        parts.append(f"L {row['L']:.4g}  θ {row['test_accuracy_theta']:.2f}%  η {row['test_accuracy_eta']:.2f}%  "
                     f"mean {row['test_accuracy']:.2f}%  ‖θ−η‖ {row['distance']:.3g}")  # fmt: skip
        loss = f"loss {row['train_loss_theta']:.4f}, {row['train_loss_eta']:.4f}"
    else:
        parts.append(f"accuracy {row['test_accuracy']:.2f}%")
        loss = f"loss {row['train_loss_theta']:.4f}"
    return "  ".join([*parts, loss, f"lr {row['lr']:.4g}", f"{row['images_per_second']:.0f} images/s"])


def processor() -> str:
    """The CPU's name."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    """JSON has no infinity: L = ∞ is written as a string."""
    return {k: "inf" if v == math.inf else v for k, v in row.items()}


def _tensorboard(out: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(out / "tensorboard"))


def evaluate_file(file: Path, settings: Settings) -> tuple[float, float]:
    """Loads an exported state_dict into the plain VGG and returns its test loss and accuracy (in %).

    The settings of the run that made it are read from config.json beside it, where there is one.
    """
    config = file.with_name("config.json")
    if config.exists():
        settings = replace(Settings.from_json(json.loads(config.read_text())), data_dir=settings.data_dir)
    state = torch.load(file, map_location="cpu", weights_only=True)
    model: nn.Module = vgg(settings)
    model.load_state_dict(state)
    device = resolve_device(settings.device)
    model = in_layout(model.to(device), settings.layout)
    images = data.load(settings.dataset, settings.data_dir, settings.download)
    with torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
        return evaluate(model, data.Batches(images, settings.batch_size, 0, device, settings.layout))
