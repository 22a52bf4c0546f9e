"""Real processes for tests: `run(function, size, *arguments)` calls function(rank, size, *arguments) in each, over gloo."""

import multiprocessing
import os
import tempfile
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _process(
    rank: int, size: int, folder: str, environ: dict[str, str], function: Any, arguments: tuple[Any, ...]
) -> None:
    os.environ.update(environ)  # the server's is of when it began
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = dist.FileStore(f"{folder}/store", size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=60))
    try:
        result: Any = function(rank, size, *arguments)
    except Exception as error:  # to be looked at by the test
        Path(f"{folder}/{rank}.trace").write_text(traceback.format_exc())
        result = error.with_traceback(None)
        result.__cause__ = result.__context__ = None
    torch.save(result, f"{folder}/{rank}.pt")
    store.set(f"done {rank}", "")
    if not isinstance(result, Exception):  # then the others are about to end as well: nobody hangs up while they listen
        store.wait([f"done {other}" for other in range(size)], timedelta(seconds=60))
    dist.destroy_process_group()


def run(function: Any, size: int, *arguments: Any) -> list[Any]:
    """What each process returned; an exception that it raised is raised here."""
    results = attempt(function, size, *arguments)
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results


def attempt(function: Any, size: int, *arguments: Any) -> list[Any]:
    """What each process returned or raised."""
    # Forked from a server that has imported what takes seconds; the compiler, too, which comes with an optimizer.
    multiprocessing.set_forkserver_preload([__name__, function.__module__, "torch._dynamo"])
    with tempfile.TemporaryDirectory() as folder:
        what = size, folder, dict(os.environ), function, arguments
        mp.start_processes(_process, what, nprocs=size, start_method="forkserver")
        for rank in range(size):
            trace = Path(f"{folder}/{rank}.trace")
            if trace.exists():
                print(f"rank {rank}:\n{trace.read_text()}")
        return [torch.load(f"{folder}/{rank}.pt", weights_only=False) for rank in range(size)]
