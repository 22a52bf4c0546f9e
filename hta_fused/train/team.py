"""The processes that torchrun started, a copy in each, and what they do together; or this process alone.

Owns the process group. Imports distributed.py; knows nothing of networks and of the disk.
"""

import gc
import os
import platform
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from ..distributed import Processes

T = TypeVar("T")

_NOTICING = 3.0  # seconds that are given to torchrun to see a process's end


def of_torchrun() -> bool:
    """Whether torchrun started this process."""
    return {"RANK", "WORLD_SIZE", "LOCAL_RANK"} <= os.environ.keys()


class Team:
    """All processes of a run. One alone, which is what `Team()` is, waits for nobody.

    Attributes:
        rank, size: this one's number, and how many there are.
        local_rank: its number on this machine.
        group: the torch.distributed group of all, or None if this process is alone.
    """

    rank, size, local_rank = 0, 1, 0
    group: Any = None
    _store: dist.Store  # that of torchrun, which outlives any of them
    _members: list[tuple[str, int]]  # each one's machine and process

    @classmethod
    def gathered(cls, cuda: bool, timeout: float) -> "Team":
        """All that torchrun started, once they are there.

        Args:
            cuda: sums are taken on GPUs, each process on its own, by NCCL; else on the CPU, by gloo.
            timeout: seconds that a process waits for another, here and later.

        Raises:
            ConnectionError: they do not come.
        """
        team = cls()
        team.rank, team.size, team.local_rank = (int(os.environ[k]) for k in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        limit = timedelta(seconds=timeout)
        if cuda:
            torch.cuda.set_device(team.local_rank)
        try:
            store, _, _ = next(dist.rendezvous("env://", timeout=limit))
            team._store = dist.PrefixStore(_meeting(store, team.rank, team.size, timeout), store)
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if cuda else "gloo",  # what the host asks others goes over gloo, past the GPU
                store=dist.PrefixStore("group", team._store), rank=team.rank, world_size=team.size, timeout=limit,
            )  # fmt: skip
            team.group = dist.group.WORLD
            team._members = team.gather((platform.node(), os.getpid()))
        except RuntimeError as error:  # torch.distributed's own errors are such
            why = str(error).splitlines()[0]
            raise ConnectionError(
                f"rank {team.rank} did not reach all {team.size} processes, which have {timeout:g} s to come: {why}"
            ) from error
        return team

    @property
    def leads(self) -> bool:
        """Whether it is for this process to write and to speak."""
        return self.rank == 0

    def close(self) -> None:
        """To be called when all are done, and nothing is left that holds the group, but for cycles: gloo's threads end with
        it, and the process would be aborted if the interpreter ended before them."""
        if self.group is not None:
            self.group = None
            dist.destroy_process_group()
            gc.collect()

    # ------------------------------------------------------------------------------------- all processes must ask these

    def lead(self, call: Callable[[], T]) -> T:
        """What rank 0's call returns or raises, in every process; it is called there alone."""
        outcome = _outcome(call) if self.leads else (None, None)
        if self.group is not None:
            box = [outcome]
            dist.broadcast_object_list(box, src=0)
            outcome = outcome if self.leads else box[0]  # an error of this process's has its traceback
        return _result(outcome)

    def together(self, call: Callable[[], T]) -> T:
        """What the call returns here; where it raises in any process, the first one's error, in all."""
        outcome = _outcome(call)
        for rank, error in enumerate(self.gather(outcome[1])):
            if error is not None:
                if rank:
                    said = f"rank {rank}: {_text(error)}"
                    raise OSError(said) if isinstance(error, OSError) else type(error)(said)
                raise outcome[1] or error
        return outcome[0]

    def gather(self, value: T) -> list[T]:
        """Every process's value, by rank."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def gather_for_rank_0(self, value: T) -> list[T]:
        """Every process's value, by rank; in all but rank 0 only its own."""
        if self.group is None:
            return [value]
        values: list[Any] | None = [None] * self.size if self.leads else None
        dist.gather_object(value, values, dst=0)
        return [value] if values is None else values

    def largest(self, value: int) -> int:
        """The largest of all processes' values."""
        if self.group is None:
            return value
        on_host = torch.tensor(value, device="cpu")
        dist.all_reduce(on_host, dist.ReduceOp.MAX)
        return int(on_host)

    def agree(self, what: Mapping[str, Any]) -> None:
        """See Processes.agree."""
        if self.group is not None:
            Processes(self.group).agree(what)

    # ------------------------------------------------------------------------------------------------------- those gone

    def missed(self, error: BaseException) -> str | None:
        """What is to be said of an error that comes from another process's end; which processes those are, as far as
        this machine knows. "" where a process beside this one says it, None for any other error."""
        if self.group is None or not (isinstance(error, dist.DistError) or "gloo/" in str(error)):
            return None
        host, speaks = platform.node(), True
        with suppress(RuntimeError):  # the store may be gone with its machine
            self._store.set_timeout(timedelta(seconds=_NOTICING))
            self._store.set(f"leaving/{self.rank}", "")  # so that nobody takes this one for the one that is missed
            speaks = self._store.add(f"noticed/{host}", 1) == 1
        gone: list[int] = []
        deadline = time.monotonic() + _NOTICING
        # A process that was killed is there until torchrun has seen its end, which is to be the first that it sees.
        while not gone and time.monotonic() < deadline:
            time.sleep(0.1)
            missing = [rank for rank in range(self.size) if rank != self.rank and not self._leaves(rank)]
            gone = [rank for rank in missing if self._members[rank][0] == host and not _runs(self._members[rank][1])]
        if not speaks:
            return ""
        if gone:
            return f"{self._named(gone)} {'has' if len(gone) == 1 else 'have'} ended, killed or for want of memory"
        return f"no word from {self._named(missing) or 'others'} ({str(error).splitlines()[0]})"

    def _named(self, ranks: list[int]) -> str:
        which = ", ".join(f"{rank} (process {pid} on {host})" for rank in ranks for host, pid in [self._members[rank]])
        return f"rank{'s' if len(ranks) > 1 else ''} {which}" if ranks else ""

    def _leaves(self, rank: int) -> bool:
        try:
            return self._store.check([f"leaving/{rank}"])
        except RuntimeError:
            return False


def _meeting(store: dist.Store, rank: int, size: int, timeout: float) -> str:
    """A name for this meeting of the processes, the same in all. torchrun's store outlives them, and what those that it
    started before have written there must not be taken for news: a process is sure of what answers to its own name."""
    mine, deadline = uuid.uuid4().hex, time.monotonic() + timeout
    store.set(f"here/{rank}", mine)
    while time.monotonic() < deadline:
        if rank == 0:
            store.set("called", " ".join(store.get(f"here/{other}").decode() for other in range(size)))
            answers = [f"answer/{mine}/{other}" for other in range(1, size)]
            if not answers or store.check(answers):
                return mine
        else:
            called = store.get("called").decode().split()
            if called[rank : rank + 1] == [mine]:
                store.set(f"answer/{called[0]}/{rank}", "")
                return called[0]
        time.sleep(0.02)
    raise RuntimeError("not all of them answered")


ALONE = Team()

_Outcome = tuple[Any, Exception | None]  # what a call returned, and what it raised


def _outcome(call: Callable[[], Any]) -> _Outcome:
    """Of a call that may fail: for what is not there, altered, or asked for in vain."""
    try:
        return call(), None
    except (OSError, ValueError) as error:
        return None, error


def _result(outcome: _Outcome) -> Any:
    value, error = outcome
    if error is not None:
        raise error
    return value


def _text(error: Exception) -> str:
    """An error's text; an OSError's as the system words it."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
