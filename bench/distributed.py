"""One copy for each process: ours beside DDP, local SGD, DiLoCo and processes that share nothing; and a model of both.

All ways train in the same processes on the same batches, taking turns step by step, in random order, each after a
barrier. A round is a period of steps; the slowest process's time counts. Each way is first checked to leave what it
leaves when one process holds all copies, and to hand to all-reduce the bytes that are claimed. Where every process finds
a GPU of its own they talk over NCCL, elsewhere over gloo.

The model: N elements, m workers, a network of B bytes/s and a latency of t for each hop, a memory of M bytes/s, n calls
of all-reduce (a ring) in which b bytes are sent:

    all-reduce    R = 2(m − 1)/m · b/B + 2(m − 1)·t·n
    plain step    forward + backward + 20N/M, which reads x, g, v and writes x, v
    DDP           forward + max(backward + R/n, backward/n + R) + 28N/M: what is left when the backward ends is one
                  bucket of 25 MiB, and the gradients are divided by m
    ours, coupled forward + backward + 4N/M + max(P, P/n + R), P = 40N/M: look at the gradients; read x, g, v and write x,
                  v, the sum; read x, sum, anchor and write x. All but a piece of 8 MiB of these passes hides R.
                  In bfloat16 b is half and P is 68N/M: the change of the sum is made, and added to it.
    between       forward + backward + 24N/M; a period is a coupled step and every − 1 of these
    local SGD     as between, without the look; 16N/M and R at the period's end, and for DiLoCo 48N/M and R

Where the processors that compute are those that send, as with gloo, nothing hides anything, and every max is a sum. A
step that sends waits for the slowest worker, which is measured here and nothing in the picture.
"""

import os
import random
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from datetime import timedelta
from math import ceil
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import hta_fused as hta
from hta_fused.distributed import PIECE
from hta_fused.train.rivals import OUTER_LR, OUTER_MOMENTUM, OuterSGD, data_parallel
from hta_fused.train.vgg import VGG, parameter_count

from . import measure
from .rivals import MOMENTUM, WEIGHT_DECAY

LR, L = 0.01, 0.01
IMAGES = 50_000  # in an epoch, shared out over the processes
AGREEMENT = 12  # bytes: a flag and two numbers, before each coupled step
BUCKET = 25 * 2**20  # bytes: DDP's
Batch = tuple[Tensor, Tensor]


@dataclass
class Task:
    """What every way trains: a VGG11 of some width, in `processes`, with batches of its own in each."""

    processes: int
    threads: int = 1
    width: float = 0.25
    batch: int = 64
    period: int = 16

    def network(self, device: torch.device) -> nn.Module:
        torch.manual_seed(0)
        return VGG("vgg11", width=self.width).to(device)

    def batches(self, rank: int, device: torch.device, count: int, size: int) -> list[Batch]:
        draw = torch.Generator().manual_seed(rank)
        images = torch.randn(count, size, 3, 32, 32, generator=draw)
        labels = torch.randint(10, (count, size), generator=draw)
        return list(zip(images.to(device), labels.to(device), strict=True))


def loss(net: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(net(batch[0]), batch[1])


def sgd(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), LR, MOMENTUM, weight_decay=WEIGHT_DECAY, fused=True)


# ------------------------------------------------------------------------------------------------------------- the ways


@dataclass
class Job:
    """One process's part in a way of training."""

    step: Callable[[Batch], None]  # forward, backward, step
    net: nn.Module
    sends: float  # bytes that a step hands to all-reduce, the mean over a period
    ddp: DistributedDataParallel | None = None


def plain(net: nn.Module, optimizer: torch.optim.Optimizer, then: Callable[[], object] | None = None) -> Any:
    """The usual step."""

    def step(batch: Batch) -> None:
        optimizer.zero_grad()
        loss(net, batch).backward()
        optimizer.step()
        if then:
            then()

    return step


def independent(net: nn.Module, period: int) -> Job:
    return Job(plain(net, sgd(net)), net, 0)


def ddp(net: nn.Module, period: int) -> Job:
    wrapped = data_parallel(net, dist.group.WORLD)
    wrapped._set_ddp_runtime_logging_sample_rate(1)  # its own account of the time that it waits
    return Job(plain(wrapped, sgd(net)), net, size_of(net), wrapped)


def local_sgd(net: nn.Module, period: int) -> Job:
    averager = PeriodicModelAverager(period, warmup_steps=period - 1)  # at each period's end
    return Job(plain(net, sgd(net), lambda: averager.average_parameters(net.parameters())), net, size_of(net) / period)


def diloco(net: nn.Module, period: int) -> Job:
    outer = OuterSGD([list(net.parameters())], period, group=dist.group.WORLD)
    return Job(plain(net, sgd(net), outer.step), net, size_of(net) / period)


def ours(net: nn.Module, period: int, *, every: bool = False, communicate: str = "float32") -> Job:
    """Each step coupled, or, with `every`, the last of each period."""
    replicas = hta.Replicas(net, group=dist.group.WORLD, communicate=communicate)
    between = period if every else 1
    sent = replicas.params.nbytes // (2 if communicate == "bfloat16" else 1) + AGREEMENT
    return Job(coupled(replicas, between), net, sent / between)


def coupled(replicas: hta.Replicas, every: int) -> Callable[..., None]:
    """Our step, of all copies here."""
    optimizer: hta.CoupledOptimizer
    if every == 1:
        optimizer = hta.HomotopySGD(replicas, LR, MOMENTUM, WEIGHT_DECAY, L=L)
    else:
        optimizer = hta.CoupledOptimizer(replicas, hta.SGD(LR, MOMENTUM, WEIGHT_DECAY), hta.Homotopy(L, every=every))

    def step(*batches: Batch) -> None:
        optimizer.zero_grad()
        replicas.backward(loss, *batches)
        optimizer.step()

    return step


def size_of(net: nn.Module) -> int:
    return sum(p.nbytes for p in net.parameters())


OURS, OURS_BF16, OURS_EVERY = "ours, every step", "ours, every step, sent as bfloat16", "ours, once a period"
DDP, LOCAL, DILOCO, INDEPENDENT = "DDP", "local SGD (PeriodicModelAverager)", "DiLoCo", "independent processes"
WAYS: dict[str, Callable[[nn.Module, int], Job]] = {
    OURS: ours,
    OURS_BF16: lambda net, period: ours(net, period, communicate="bfloat16"),
    OURS_EVERY: lambda net, period: ours(net, period, every=True),
    DDP: ddp,
    LOCAL: local_sgd,
    DILOCO: diloco,
    INDEPENDENT: independent,
}
COMPUTE = "forward and backward alone"
SMALL, LARGE, LARGE_BF16, COPY = "all-reduce, 4 bytes", "all-reduce, all parameters", "the same as bfloat16", "copy"


# ---------------------------------------------------------------------------------------------------------- the checks


@torch.no_grad()
def flat(net: nn.Module) -> Tensor:
    return parameters_to_vector(net.parameters()).clone()


def by_hand(name: str, net: nn.Module, steps: list[list[Batch]], period: int) -> list[Tensor]:
    """What a way leaves of each copy, all of them in this process; ours by Replicas that hold all, the others in plain
    PyTorch over flat vectors.

    Args:
        steps: each step's batches, one for each copy.
    """
    m = len(steps[0])
    if name in (OURS, OURS_BF16, OURS_EVERY):
        replicas = hta.Replicas(net, m)
        step = coupled(replicas, period if name == OURS_EVERY else 1)
        for batches in steps:
            step(*batches)
        return [flat(copy) for copy in replicas]
    x, v = [flat(net) for _ in range(m)], [torch.zeros_like(flat(net)) for _ in range(m)]
    point, speed = flat(net), torch.zeros_like(flat(net))
    for number, batches in enumerate(steps, 1):
        gradients = []
        for own, batch in zip(x, batches, strict=True):
            vector_to_parameters(own, net.parameters())
            gradients.append(parameters_to_vector(torch.autograd.grad(loss(net, batch), list(net.parameters()))))
        if name == DDP:
            gradients = [torch.stack(gradients).mean(0)] * m
        for j in range(m):
            v[j] = MOMENTUM * v[j] + gradients[j] + WEIGHT_DECAY * x[j]
            x[j] = x[j] - LR * v[j]
        if number % period == 0 and name in (LOCAL, DILOCO):
            mean = torch.stack(x).mean(0)
            if name == DILOCO:
                speed = OUTER_MOMENTUM * speed + (point - mean)
                mean = point = point - OUTER_LR * ((point - mean) + OUTER_MOMENTUM * speed)
            x = [mean] * m
    return x


class Wire:
    """Counts the bytes that this process hands to all-reduce, and the seconds that it waits for their sums."""

    def __enter__(self) -> "Wire":
        self.all_reduce = dist.all_reduce
        dist.all_reduce = self
        self.clear()
        return self

    def __exit__(self, *_: object) -> None:
        dist.all_reduce = self.all_reduce

    def clear(self) -> None:
        self.bytes, self.waited = 0, 0.0

    def __call__(self, tensor: Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False) -> Any:
        self.bytes += tensor.nbytes
        begin = time.perf_counter()
        work = self.all_reduce(tensor, op, group, async_op)
        if async_op:
            return _Sent(work, self)
        self.waited += time.perf_counter() - begin
        return work


class _Sent:
    """A sum on its way, whose wait() is timed."""

    def __init__(self, work: Any, wire: Wire):
        self._work, self._wire = work, wire

    def wait(self) -> Any:
        begin = time.perf_counter()
        result = self._work.wait()
        self._wire.waited += time.perf_counter() - begin
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


def check(task: Task, rank: int, device: torch.device, names: list[str]) -> None:
    """Raises unless each way leaves what it leaves by hand, equal copies where it shall, and sends the bytes it says.

    A smaller net, without dropout, over two short periods: in the second all that is sent is counted.
    """
    period, size = 3, 8
    small = replace(task, width=min(task.width, 0.0625))
    everyones = [small.batches(j, device, 2 * period, size) for j in range(task.processes)]
    steps = [list(batches) for batches in zip(*everyones, strict=True)]
    for name in names:
        net = small.network(device).eval()
        start, wanted = flat(net), by_hand(name, deepcopy(net), steps, period)[rank]
        job = WAYS[name](net, period)
        for batch in everyones[rank][:period]:
            job.step(batch)
        if job.ddp is not None:
            job.ddp.register_comm_hook(None, allreduce_hook)  # what it does by itself, where it can be seen
        with Wire() as wire:
            for batch in everyones[rank][period:]:
                job.step(batch)
        if wire.bytes != round(job.sends * period):
            raise AssertionError(f"{name} sent {wire.bytes} bytes in {period} steps, not {job.sends * period:.0f}")
        left = flat(net)
        if name == OURS_BF16:
            measure.agree(name, [left], [wanted], 2e-2)  # to the digits that were sent
        else:
            measure.agree(name, [left - start], [wanted - start], 1e-3)
        if name in (DDP, LOCAL, DILOCO):
            copies = [torch.empty_like(left) for _ in range(task.processes)]
            dist.all_gather(copies, left)
            if not all(torch.equal(copy, left) for copy in copies):
                raise AssertionError(f"{name} left processes that differ")


# ---------------------------------------------------------------------------------------------------------- the timing


def measured(task: Task, rounds: int, claims: bool = True) -> dict[str, Any]:
    """All ways in one set of processes."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_process, (folder, task, rounds), nprocs=task.processes, join=True)
        seen: list[dict[str, Any]] = [torch.load(f"{folder}/{rank}.pt") for rank in range(task.processes)]
    steps = {name: torch.stack([of["times"][name] for of in seen]) for name in seen[0]["times"]}
    times = {name: settled(values) for name, values in steps.items()}
    per_step = {name: float(of["sends"]) for name, of in seen[0]["jobs"].items()}
    epoch = IMAGES / (task.batch * task.processes)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    place = "a GPU each" if seen[0]["gpu"] else f"{task.threads} thread{'s' * (task.threads > 1)} each, {cores} cores"
    crowded = ", OVERSUBSCRIBED" if not seen[0]["gpu"] and task.processes * task.threads > cores else ""
    straggling = settled(steps[COMPUTE].amax(0, keepdim=True))[0] - times[COMPUTE][0]
    here = _machine(task, times, seen[0]["elements"], straggling, seen[0]["gpu"])
    rows = {name: times[name] for name in (*WAYS, COMPUTE)}
    result: dict[str, Any] = {
        "title": f"{task.processes} processes ({place}{crowded}): VGG11 at width {task.width:g}, "
        f"batch {task.batch} each, period {task.period}",
        "base": OURS,
        "processes": task.processes,
        "elements": seen[0]["elements"],
        "times": rows,
        "ratios": {name: over(steps[name], steps[OURS]) for name in rows},
        "sent": per_step,
        "sent_epoch": {name: sent * epoch for name, sent in per_step.items()},
        "modelled": {name: here.step(name, task.processes, task.period) for name in rows},
    }
    result["model_error"] = {name: result["modelled"][name] / times[name][0] - 1 for name in rows}
    if not seen[0]["gpu"]:
        result["waiting"] = {
            name: statistics.mean(float(of["jobs"][name]["waiting"]) for of in seen) for name in per_step
        }
        works = {name: torch.stack([of["works"][name] for of in seen]) for name in rows}
        result["cpu"] = {name: settled(values.mean(0, keepdim=True))[0] for name, values in works.items()}
    worst = max((abs(result["model_error"][name]), name) for name in WAYS)
    result["notes"] = [
        f"all-reduce: {1e6 * here.latency:.0f} µs a hop, {here.network / 1e9:.2f} GB/s ({here.network_bf16 / 1e9:.2f} as "
        f"bfloat16); a copy through memory: {here.memory / 1e9:.1f} GB/s; waiting for the slowest: {1e3 * straggling:.2f} ms",
        f"the model's largest error: {100 * worst[0]:.1f} % ({worst[1]})",
        f"the machine's load, these processes among it: {os.getloadavg()[0]:.1f}",
    ]
    bounds = [(OURS, DDP, 1.05), (OURS_BF16, DDP, 1.05), (OURS_EVERY, INDEPENDENT, 1.02)]
    for mine, rival, bound in bounds if claims else ():
        ratio, spread = over(steps[mine], steps[rival])
        what = f"{mine}, over {rival} (± {spread:.3f})"
        if "cpu" in result:
            result["notes"].append(
                f"CPU time of {mine}, over {rival}: {result['cpu'][mine] / result['cpu'][rival]:.3f}"
            )
        result.setdefault("claims", []).append(measure.claim(what, ratio, bound, "at most"))
    return result


def settled(values: Tensor) -> tuple[float, float]:
    """The slowest process's, and the spread of single rounds, of what is [processes, rounds, steps of a period]: the median
    over the rounds of each step, as a period's last may be another than the rest, and of these the mean."""
    low, high = values.mean(2).amax(0).quantile(torch.tensor([0.25, 0.75], dtype=values.dtype)).tolist()
    return float(values.quantile(0.5, 1).mean(1).max()), (high - low) / 2


def over(ours: Tensor, theirs: Tensor) -> tuple[float, float]:
    """The median, and the spread, of single rounds' ratios of the slowest process's times."""
    return measure.middle((ours.mean(2).amax(0) / theirs.mean(2).amax(0)).tolist())


def _process(rank: int, folder: str, task: Task, rounds: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # which comes when the parent dies; shells ignore it in the background
    torch.set_num_threads(task.threads)
    gpu = torch.cuda.is_available() and torch.cuda.device_count() >= task.processes
    device = torch.device("cuda", rank) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    else:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # they are all on this machine
    store = dist.FileStore(f"{folder}/store", task.processes)
    dist.init_process_group(
        "nccl" if gpu else "gloo", store=store, rank=rank, world_size=task.processes, timeout=timedelta(minutes=5)
    )
    check(task, rank, device, list(WAYS))
    torch.save(_timed(task, rank, device, rounds), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def _timed(task: Task, rank: int, device: torch.device, rounds: int) -> dict[str, Any]:
    """This process's seconds a step in each round, and what it sends and waits for."""
    jobs = {name: make(task.network(device), task.period) for name, make in WAYS.items()}
    batches = task.batches(rank, device, 4, task.batch)
    alone = task.network(device)
    elements = sum(p.numel() for p in alone.parameters())
    small, large, other = torch.zeros(1), torch.zeros(elements), torch.zeros(elements)
    small, large, other, half = small.to(device), large.to(device), other.to(device), large.to(device).bfloat16()

    def compute(batch: Batch) -> None:
        alone.zero_grad()
        loss(alone, batch).backward()

    runs: dict[str, Callable[[Batch], Any]] = {name: job.step for name, job in jobs.items()} | {
        COMPUTE: compute,
        SMALL: lambda _: dist.all_reduce(small),
        LARGE: lambda _: dist.all_reduce(large),
        LARGE_BF16: lambda _: dist.all_reduce(half),
        COPY: lambda _: other.copy_(large),
    }
    times = {name: torch.zeros(rounds, task.period, dtype=torch.float64) for name in runs}
    waits, works = deepcopy(times), deepcopy(times)  # of which waiting; the CPU time of all threads
    order = random.Random(0)  # the same in all processes
    with Wire() as wire:
        for number in range(-1, rounds):  # the first warms up
            for i in range(task.period):
                # Step by step, as machines change their speed within a second; in any order, as who waited last runs first.
                for name in order.sample(list(runs), len(runs)):
                    dist.barrier()
                    wire.clear()
                    begin, worked = time.perf_counter(), time.process_time()
                    runs[name](batches[i % len(batches)])
                    if device.type == "cuda":
                        torch.cuda.synchronize()
                    if number >= 0:
                        times[name][number, i], waits[name][number, i] = time.perf_counter() - begin, wire.waited
                        works[name][number, i] = time.process_time() - worked
    of_jobs = {}
    for name, job in jobs.items():
        waiting = settled(waits[name][None])[0] / settled(times[name][None])[0]
        if job.ddp is not None:  # its sums are made and awaited in C++
            account = job.ddp._get_ddp_logging_data()
            waited = account["avg_backward_comm_time"] - account["avg_backward_compute_comm_overlap_time"]
            waiting = waited / 1e9 / settled(times[name][None])[0]
        of_jobs[name] = {"sends": job.sends, "waiting": waiting}
    return {
        "times": times,
        "works": works,
        "jobs": of_jobs,
        "elements": elements,
        "gpu": device.type == "cuda",
    }


# ----------------------------------------------------------------------------------------------------------- the model


@dataclass
class Machine:
    """What the model knows of a worker, its net and its network."""

    elements: float
    compute: float  # seconds of forward and backward, of which the backward takes two thirds
    memory: float  # bytes a second
    network: float
    network_bf16: float
    latency: float  # seconds a hop
    hides: bool = True  # whether sums are made while something else is computed
    straggling: float = 0.0  # seconds that the slowest worker of a step takes longer than the slowest of all steps

    def step(self, name: str, m: int, every: int, communicate: str = "float32") -> float:
        """Seconds of a step of one of WAYS among m workers, the mean over a period."""
        n, pass_ = 4 * self.elements, self.elements / self.memory  # bytes of float32; a byte an element
        if name == COMPUTE:
            return self.compute
        if name == INDEPENDENT:
            return self.compute + 20 * pass_
        if name == DDP:
            calls = max(1, ceil(n / BUCKET))
            backward, summing = self.compute * 2 / 3, self.all_reduce(n, m, calls)
            return self.compute - backward + self.both(backward, summing, calls) + 28 * pass_
        if name in (LOCAL, DILOCO):
            end = (16 if name == LOCAL else 48) * pass_ + self.all_reduce(n, m, 1)
            return self.compute + 20 * pass_ + end / every
        low = name == OURS_BF16 or communicate == "bfloat16"
        every = every if name == OURS_EVERY else 1
        pieces = max(1, ceil(self.elements / PIECE))
        summing = self.all_reduce(n / 2 if low else n, m, pieces, low)
        passes = (40 + 28 * low) * pass_
        met = self.compute + 4 * pass_ + self.both(passes, summing, pieces)
        if not self.hides:
            met += self.all_reduce(AGREEMENT, m, 1) - self.straggling  # who has been waited for once is there
        return (met + (every - 1) * (self.compute + 24 * pass_)) / every

    def all_reduce(self, sent: float, m: int, calls: int, low: bool = False) -> float:
        network = self.network_bf16 if low else self.network
        return self.straggling + 2 * (m - 1) / m * sent / network + 2 * (m - 1) * self.latency * calls

    def both(self, work: float, summing: float, pieces: int) -> float:
        """Work in pieces, each of which is summed while others are worked on."""
        return max(work + summing / pieces, work / pieces + summing) if self.hides else work + summing


def _machine(
    task: Task, times: Mapping[str, tuple[float, float]], elements: int, straggling: float, gpu: bool
) -> Machine:
    """This one, as it was measured."""
    m = task.processes
    small = times[SMALL][0]
    crossing = 2 * (m - 1) / m * elements

    def bandwidth(name: str, size: int) -> float:
        return crossing * size / max(1e-9, times[name][0] - small)

    return Machine(
        elements, times[COMPUTE][0], 8 * elements / times[COPY][0], bandwidth(LARGE, 4), bandwidth(LARGE_BF16, 2),
        small / (2 * (m - 1)), gpu, straggling,
    )  # fmt: skip


GBITS = (1, 2, 5, 10, 25, 50, 100, 200, 400)
MODELLED = {  # what stands in the picture, and its arguments
    "DDP": (DDP, 1, "float32"),
    "ours, k = 1": (OURS, 1, "float32"),
    "ours, k = 1, bf16": (OURS_BF16, 1, "bfloat16"),
    "ours, k = 16": (OURS_EVERY, 16, "float32"),
    "ours, k = 16, bf16": (OURS_EVERY, 16, "bfloat16"),
    "ours, k = 64": (OURS_EVERY, 64, "float32"),
    "independent": (INDEPENDENT, 1, "float32"),
}
NETS = {  # elements, and seconds of forward and backward
    "VGG16, batch 128 at 50 Tflop/s": (parameter_count("vgg16", False, 1.0), 128 * 6 * 313e6 / 50e12),
    "1.3 billion parameters, 8192 tokens at 400 Tflop/s": (1.3e9, 6 * 1.3e9 * 8192 / 400e12),
}
MEMORY, LATENCY = 2.5e12, 5e-6


def modelled(workers: tuple[int, ...] = (8, 64, 512)) -> Iterator[dict[str, Any]]:
    """Step times on networks and among workers that nobody has measured."""
    for net, (elements, compute) in NETS.items():
        for m in workers:
            result: dict[str, Any] = {
                "title": f"Modelled, not measured: {net}, {m} workers ({MEMORY / 1e12:g} TB/s of memory, "
                f"{1e6 * LATENCY:g} µs a hop)",
                "net": net.split(",")[0],
                "workers": m,
                "Gbit/s": list(GBITS),
            }
            for label, (name, every, communicate) in MODELLED.items():
                machines = [Machine(elements, compute, MEMORY, g * 1e9 / 8, g * 1e9 / 8, LATENCY) for g in GBITS]
                result[label] = [machine.step(name, m, every, communicate) for machine in machines]
            yield result
