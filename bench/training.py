"""Training steps: the trainer's own and the usual script's, copies in turn, side by side, and as one batched network."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call, grad_and_value, stack_module_state, vmap
from torch.utils.data import DataLoader, TensorDataset

import hta_fused as hta
from hta_fused.train import Job, Run, Settings, data
from hta_fused.train.run import batches_of
from hta_fused.train.vgg import VGG

from . import measure
from .rivals import MOMENTUM, WEIGHT_DECAY

MOST = {2: 1.9, 8: 7.6}  # plain steps that a step of so many copies side by side may take


def of_trainer(settings: Settings, method: str, images: data.Images) -> Run:
    """A run in its first epoch."""
    job = Job(method, method, settings.epochs, 0)
    run = Run(settings, job, batches_of(images, settings, job.seed))
    run.start_epoch()
    return run


def advance(run: Run) -> None:
    """The trainer's step, its batches among it."""
    if run.batch == len(run.batches) - 1:  # the last may be smaller
        run.batch = 0
        run.start_epoch()
    run.advance()


def training(
    name: str, precision: str, rounds: int, batch: int = 128, width: float = 1.0, usual: bool = True
) -> dict[str, Any]:
    """A training step of HTA (both copies) beside plain SGD's and the usual script's, and the update's share in it."""
    torch.manual_seed(0)
    bf16 = precision == "bf16"
    layout = torch.channels_last if bf16 else torch.contiguous_format
    images = torch.randn(batch, 3, 32, 32).to(memory_format=layout)
    classes = torch.randint(10, (batch,))

    def loss(net: torch.nn.Module) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            return F.cross_entropy(net(images), classes)

    def network() -> VGG:
        return VGG(name, width=width).to(memory_format=layout)  # type: ignore[call-overload]  # torch's stubs lack it

    plain = network()
    sgd = torch.optim.SGD(plain.parameters(), 1e-3, MOMENTUM, weight_decay=WEIGHT_DECAY, fused=True)
    replicas = hta.Replicas(network())
    homotopy = hta.HomotopySGD(replicas, 1e-3, MOMENTUM, WEIGHT_DECAY, L=0.01)

    def sgd_step() -> None:
        sgd.zero_grad()
        loss(plain).backward()
        sgd.step()

    def hta_step() -> None:
        homotopy.zero_grad()
        replicas.backward(loss)
        homotopy.step()

    script = VGG(name, width=width)
    script_sgd = torch.optim.SGD(script.parameters(), 1e-3, MOMENTUM, weight_decay=WEIGHT_DECAY)
    dataset = TensorDataset(torch.randn(4 * batch, 3, 32, 32), torch.randint(10, (4 * batch,)))
    loader = DataLoader(dataset, batch, shuffle=True)
    stream = iter(loader)

    def usual_step() -> None:
        nonlocal stream
        try:
            x, y = next(stream)
        except StopIteration:
            stream = iter(loader)
            x, y = next(stream)
        script_sgd.zero_grad()
        F.cross_entropy(script(x), y).backward()
        script_sgd.step()

    both, one, usual_name = "HTA, both copies", "SGD(fused=True)", "the usual script (DataLoader, float32)"
    steps = {both: hta_step, one: sgd_step, **({usual_name: usual_step} if usual else {})}
    times = measure.measure({**steps, "the update alone": homotopy.step}, rounds)
    ratio = times.over(both, one)[0]
    return {
        "title": f"Training {name.upper()}{f' at width {width:g}' if width != 1 else ''}, batch {batch}, "
        + ("bf16, channels-last" if bf16 else "float32"),
        "base": both,
        "times": times,
        "ratios": times.all_over(both),
        "images_per_second": {n: (2 if n == both else 1) * batch / times[n][0] for n in steps},
        "update_share": times.over("the update alone", both)[0],
        "claims": [
            measure.claim("HTA's step over SGD's", ratio, 2.02, "at most"),
            measure.claim("images/s per copy over SGD's", 2 / ratio, 0.95, "at least"),
        ],
    }


def side_by_side(precision: str, rounds: int, batch: int = 128, width: float = 0.25) -> dict[str, Any]:
    """The trainer's step of several copies, in turn and side by side, over its step of one."""
    images = data.synthetic(train=8 * batch, test=64)
    chosen: dict[str, Any] = {"precision": precision, "batch_size": batch, "width": width}
    plain = Settings(dataset="synthetic", device="cpu", **chosen)
    steps: dict[str, Callable[[], Any]] = {"SGD": partial(advance, of_trainer(plain, "sgd", images))}
    for m in MOST:
        for whose in ("shared", "own"):
            for concurrent in (False, True):
                settings = replace(plain, copies=m, batches=whose, concurrent=concurrent)
                steps[_name(m, whose, concurrent)] = partial(advance, of_trainer(settings, "hta", images))
    times = measure.measure(steps, rounds)
    ratios = times.all_over("SGD")
    return {
        "title": f"Copies side by side, VGG11 at width {width:g}, batch {batch}, {precision}, {plain.chosen_format}",
        "base": "SGD",
        "times": times,
        "ratios": ratios,
        "claims": [
            measure.claim(f"{name} over SGD", ratios[name][0], most, "at most")
            for m, most in MOST.items()
            for name in (_name(m, whose, True) for whose in ("shared", "own"))
        ],
    }


def _name(copies: int, whose: str, concurrent: bool) -> str:
    return f"{copies} copies, {whose} batches, {'side by side' if concurrent else 'in turn'}"


def batched(copies: int, rounds: int, batch: int = 128, width: float = 0.125) -> dict[str, Any]:
    """Losses and gradients of small networks, one batch for all: in turn, side by side, and by vmap as one network."""
    torch.manual_seed(0)
    images, classes = torch.randn(batch, 3, 32, 32), torch.randint(10, (batch,))
    replicas = hta.Replicas(VGG("vgg11", width=width, dropout=0.0), copies, start="independent")
    params, buffers = stack_module_state(list(replicas))
    shape = VGG("vgg11", width=width, dropout=0.0).to("meta")

    def loss(net: torch.nn.Module) -> Tensor:
        return F.cross_entropy(net(images), classes)

    def of_one(params: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(functional_call(shape, (params, buffers), (images,)), classes)

    gradients = vmap(grad_and_value(of_one), randomness="different")

    def one_by_one(concurrent: bool) -> None:
        replicas.zero_grad()
        replicas.backward(loss, concurrent=concurrent)

    one_by_one(False)
    stacked = gradients(params, buffers)[0]
    for name, parameters in zip(stacked, zip(*replicas.trained, strict=True), strict=True):
        torch.testing.assert_close(list(stacked[name]), [p.grad for p in parameters], rtol=1e-3, atol=1e-5)
    steps = {
        "in turn": lambda: one_by_one(False),
        "side by side": lambda: one_by_one(True),
        "vmap, one network": lambda: gradients(params, buffers),
    }
    times = measure.measure(steps, rounds)
    return {
        "title": f"{copies} small networks' gradients, VGG11 at width {width:g} without batch norm, batch {batch}",
        "base": "in turn",
        "times": times,
        "ratios": times.all_over("in turn"),
    }
