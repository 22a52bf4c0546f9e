"""Instructions that a step executes for each element, counted one by one as a debugger counts them; Linux on x86-64.

Where a processor's own counters are out of reach, in a virtual machine for instance, this is exact all the same. What a
call costs whatever its size drops out: two sizes are counted, and their difference divided.
"""

import ctypes
import os
import platform
import signal
import subprocess
import sys
from functools import partial
from typing import Any

import torch

from hta_fused.kernels import BACKENDS
from hta_fused.kernels.formats import TILE

_TRACE_ME, _CONTINUE, _SINGLE_STEP = 0, 7, 9  # ptrace's requests
SMALL, LARGE = 4, 12  # tiles


def available() -> bool:
    return sys.platform == "linux" and platform.machine() == "x86_64"


def per_element(name: str, proposal: str, copies: int, isa: str) -> float:
    """Instructions for each element of each copy, in a format of formats.FORMATS, on a thread of its own.

    Args:
        isa: HTA_ISA's "plain", "avx2" or "avx512".

    Raises:
        RuntimeError: a process may not be traced here.
    """
    code = f"from {__package__} import instructions; instructions.steps({name!r}, {proposal!r}, {copies})"
    environment = {**os.environ, "HTA_ISA": isa, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment)
    small, large = _counted(process.pid)
    return (large - small) / ((LARGE - SMALL) * TILE * copies)


def steps(name: str, proposal: str, copies: int) -> None:
    """In the traced process: a step over few elements, and one over many, each between two stops."""
    from .formats import FORMATS, flat

    torch.set_num_threads(1)
    ops, calls = BACKENDS["cpu"].ops, []
    op = ops.step_

    def noted(*arguments: Any) -> None:  # the op alone: what Python does around it takes longer than to count
        op(*arguments)
        calls.append(partial(op, *arguments))

    ops.step_ = noted
    for tiles in (SMALL, LARGE):
        flat(tiles * TILE, copies, proposal, FORMATS[name])
    for call in calls:
        call()  # what a first call looks up
    if ctypes.CDLL(None).ptrace(_TRACE_ME, 0, None, None):
        raise RuntimeError("this process may not be traced")
    for call in calls:
        os.kill(os.getpid(), signal.SIGSTOP)
        call()
        os.kill(os.getpid(), signal.SIGSTOP)


def _counted(pid: int) -> list[int]:
    """Single steps from each odd stop of a process to the even one after it."""
    ptrace, counts = ctypes.CDLL(None).ptrace, [0, 0]
    ptrace.argtypes = [ctypes.c_long, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p]
    for number in range(2):
        _stopped(pid)
        while True:
            ptrace(_SINGLE_STEP, pid, None, None)
            if _stopped(pid) == signal.SIGSTOP:
                break
            counts[number] += 1
        ptrace(_CONTINUE, pid, None, None)
    os.waitpid(pid, 0)
    return counts


def _stopped(pid: int) -> int:
    """The signal by which a process stops next."""
    _, status = os.waitpid(pid, 0)
    if not os.WIFSTOPPED(status):
        raise RuntimeError("the process that was to be counted has ended; may processes be traced here?")
    return os.WSTOPSIG(status)
