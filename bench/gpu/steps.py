"""Stage 3: a training step of HTA and of SGD, captured in a graph and eager, beside the script that people write."""

import os
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from hta_fused.train import Settings, data
from hta_fused.train.vgg import VGG

from .. import measure
from ..training import advance, of_trainer
from .session import Part, Result, Session

STEP_OVER_SGD = {128: 1.6, 1024: 2.0}  # HTA's captured step over SGD's, by batch
IMAGES_OVER_SCRIPT = 10.0  # images/s a copy over the script's
WORKERS = min(8, os.cpu_count() or 1)  # of the script's DataLoader
IN_STORE = 2 * WORKERS  # batches that they make ahead
SGD, HTA, OWN, SCRIPT = "SGD", "HTA", "HTA, own batches", "DataLoader script"
GRAPH, EAGER = "graph", "eager"


def parts(session: Session) -> dict[str, Part]:
    cases = [(8, "fp32")] if session.rehearsal else [(b, p) for p in ("bf16", "fp32") for b in STEP_OVER_SGD]
    return {f"batch {batch}, {precision}": partial(training, session, batch, precision) for batch, precision in cases}


class UsualDataset(Dataset):
    """As training scripts have it: each image is cropped, mirrored and normalised by itself, by a worker."""

    def __init__(self, images: Tensor, labels: Tensor, mean: Tensor, std: Tensor):
        self.images, self.labels, self.mean, self.std = images, labels, mean, std

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = torch.nn.functional.pad(self.images[index].float() / 255, (4, 4, 4, 4))
        row, column = torch.randint(9, (2,)).tolist()
        image = image[:, row : row + 32, column : column + 32]
        if torch.rand(()) < 0.5:
            image = image.flip(-1)
        return (image - self.mean) / self.std, int(self.labels[index])


def training(session: Session, batch: int, precision: str) -> Result:
    """Every way to train VGG16 with batches of this size, in the same rounds; the script by itself."""
    device, rounds, count, in_a_row = session.device, 10, 50_000, 50
    chosen: dict[str, Any] = dict(model="vgg16", width=1.0)
    if session.rehearsal:
        rounds, count, in_a_row, chosen = 2, 4 * batch, 4, dict(model="vgg11", width=0.0625)
    chosen["precision"] = precision
    images = data.synthetic(train=count, test=64)
    settings = Settings(dataset="synthetic", batch_size=batch, device=device, **chosen)
    steps: dict[str, Callable[[], None]] = {}
    captured: dict[str, bool] = {}
    for graph in (True, False):
        for method, whose in (("sgd", "shared"), ("hta", "shared"), ("hta", "own")):
            name = f"{SGD if method == 'sgd' else OWN if whose == 'own' else HTA}, {GRAPH if graph else EAGER}"
            run = of_trainer(Settings(**{**vars(settings), "graph": graph, "batches": whose}), method, images)
            steps[name] = partial(advance, run)
            for _ in range(6):  # warmed up, captured
                steps[name]()
            if graph:
                captured[name] = run.graphed is not None and run.graphed.graph is not None
    times = measure.measure(steps, rounds, gpu=device == "cuda")
    times[SCRIPT] = consecutive(usual_script(images, settings), in_a_row)
    copies = {name: settings.copies if name.startswith(HTA) else 1 for name in times}
    speed = {name: copies[name] * batch / times[name][0] for name in times}
    both, one = f"{HTA}, {GRAPH}", f"{SGD}, {GRAPH}"
    claims = [
        measure.claim(
            "HTA's step over SGD's", times[both][0] / times[one][0], STEP_OVER_SGD.get(batch, 2.0), "at most"
        ),
        measure.claim(
            "images/s a copy over the script's",
            speed[both] / copies[both] / speed[SCRIPT],
            IMAGES_OVER_SCRIPT,
            "at least",
        ),
        measure.claim("steps captured in a graph", sum(captured.values()), len(captured), "at least"),
    ]
    rows = {name: {"ms": f"{1e3 * times[name][0]:.3g}", "over SGD's": f"{times[name][0] / times[one][0]:.2f}",
                   "images/s, all copies": f"{speed[name]:.0f}"} for name in times}  # fmt: skip
    return {"rows": rows, "times": times, "images_per_second": speed, "captured": captured, **session.judged(claims)}


def consecutive(step: Callable[[], None], count: int, before: int = IN_STORE) -> tuple[float, float]:
    """The mean seconds of so many steps in a row, and half the interquartile distance. What workers had in store is used
    up before, and no other step comes between in which they could make more."""
    for _ in range(before):
        step()
    seconds = [measure.seconds_of(step, 1, gpu=False) for _ in range(count)]  # the step waits for its loss
    low, _, high = statistics.quantiles(seconds, n=4)
    return statistics.mean(seconds), (high - low) / 2


def usual_script(images: data.Images, settings: Settings) -> Callable[[], None]:
    """A step of a script with a DataLoader, in float32, eager."""
    device = settings.torch_device
    net = VGG(settings.model, settings.batch_norm, settings.width).to(device)
    optimizer = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9, weight_decay=5e-4)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (images.mean, images.std))
    dataset = UsualDataset(images.train, images.train_labels, mean, std)
    loader = DataLoader(dataset, settings.batch_size, shuffle=True, pin_memory=device.type == "cuda", drop_last=True,
                        num_workers=WORKERS, persistent_workers=True)  # fmt: skip

    def endless() -> Iterator[list[Tensor]]:
        while True:
            yield from loader

    stream = endless()

    def step() -> None:
        x, y = (t.to(device, non_blocking=True) for t in next(stream))
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()
        loss.item()  # the running loss that such scripts print

    return step
