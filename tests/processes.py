"""Real processes for tests: `run(function, size, *arguments)` calls function(rank, size, *arguments) in each, over gloo."""

import os
import tempfile
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _process(rank: int, size: int, folder: str, function: Any, arguments: tuple[Any, ...]) -> None:
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
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_process, (size, folder, function, arguments), nprocs=size, join=True)
        for rank in range(size):
            trace = Path(f"{folder}/{rank}.trace")
            if trace.exists():
                print(f"rank {rank}:\n{trace.read_text()}")
        return [torch.load(f"{folder}/{rank}.pt", weights_only=False) for rank in range(size)]
