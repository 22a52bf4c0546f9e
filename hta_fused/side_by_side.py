"""Calls side by side on the CPU, torch's threads shared out among them. Imports torch only."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from threading import Barrier
from typing import TypeVar

import torch

T = TypeVar("T")
_pools: dict[
    tuple[int, int], ThreadPoolExecutor
] = {}  # by workers and threads of each; kept, as starting them takes long
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pools.clear)  # a child has none of the threads


def side_by_side(calls: list[Callable[[], T]]) -> list[T]:
    """What the calls return. As many as torch has threads go at once, with a thread each; what is left over shares all threads
    evenly. So each call's number of threads, on which its bits depend, follows from theirs and torch's. Under what torch keeps
    for the caller's thread alone (a dispatch or function mode, such as FlopCounterMode or a default device; hooks of saved
    tensors; inference mode) they go in turn.

    Grad mode and autocast are the caller's. All calls have ended when the first error, in their order, is raised.
    """
    threads = torch.get_num_threads()
    left = len(calls) % threads
    first = len(calls) - left
    if threads == 1 or len(calls) == 1 or _has_modes():
        return [call() for call in calls]
    return _at_once(calls[:first], threads, 1) + _at_once(calls[first:], left, threads // max(left, 1))


def _has_modes() -> bool:
    """Whether something is on that workers would not have."""
    return bool(
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._autograd._top_saved_tensors_default_hooks(True)
        or torch.is_inference_mode_enabled()
    )


def _at_once(calls: list[Callable[[], T]], workers: int, threads: int) -> list[T]:
    """The calls, by so many workers with so many threads each."""
    if len(calls) < 2:
        return [call() for call in calls]
    grad, autocast, dtype = torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")

    def in_worker(call: Callable[[], T]) -> T:
        # Without autocast's cache, which all threads share and whichever leaves autocast empties: whether a weight that is
        # used twice is cast once, and its gradients summed in low precision, would be a matter of chance.
        with torch.set_grad_enabled(grad), torch.autocast("cpu", dtype, autocast, cache_enabled=False):
            return call()

    pool = _pool(workers, threads)
    futures = [pool.submit(in_worker, call) for call in calls]
    wait(futures)
    return [future.result() for future in futures]


def _pool(workers: int, threads: int) -> ThreadPoolExecutor:
    if (workers, threads) not in _pools:
        everyones, all_there = torch.get_num_threads(), Barrier(workers)

        def begin() -> None:
            torch.get_num_threads()  # a thread's first question sets its number to everyone's
            torch.set_num_threads(threads)
            all_there.wait()

        pool = ThreadPoolExecutor(workers, "hta_fused")
        wait([pool.submit(begin) for _ in range(workers)])
        torch.set_num_threads(everyones)  # in a worker it was set for the worker, and for threads that are yet to come
        _pools[workers, threads] = pool
    return _pools[workers, threads]
