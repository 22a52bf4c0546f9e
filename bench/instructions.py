"""Instructions that a call executes, counted one by one as a debugger counts them; Linux on x86-64.

Where a processor's own counters are out of reach, in a virtual machine for instance, this is exact all the same.
"""

import ctypes
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence

_TRACE_ME, _CONTINUE, _SINGLE_STEP = 0, 7, 9  # ptrace's requests


def available() -> bool:
    """Whether this is Linux on x86-64, where a process may be traced."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return False
    code = f"import ctypes, sys; sys.exit(ctypes.CDLL(None).ptrace({_TRACE_ME}, 0, None, None) != 0)"
    return subprocess.run([sys.executable, "-S", "-c", code]).returncode == 0


def counted(code: str, calls: int, **environment: str) -> list[int]:
    """How many instructions each of so many calls executes, in a process of one thread.

    Args:
        code: Python that ends in `traced(...)` of these calls.

    Raises:
        RuntimeError: the process ended before that.
    """
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"} | environment,
    )
    ptrace = ctypes.CDLL(None).ptrace
    ptrace.argtypes = [ctypes.c_long, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p]
    counts = [0] * calls
    for number in range(calls):
        _stopped(process.pid)
        while True:
            ptrace(_SINGLE_STEP, process.pid, None, None)
            if _stopped(process.pid) == signal.SIGSTOP:
                break
            counts[number] += 1
        ptrace(_CONTINUE, process.pid, None, None)
    process.wait()
    return counts


def traced(calls: Sequence[Callable[[], object]]) -> None:
    """In the process that is counted: each call between two stops, and all of them once before, for what a first call looks up."""
    for call in calls:
        call()
    ctypes.CDLL(None).ptrace(_TRACE_ME, 0, None, None)
    for call in calls:
        os.kill(os.getpid(), signal.SIGSTOP)
        call()
        os.kill(os.getpid(), signal.SIGSTOP)


def _stopped(pid: int) -> int:
    """The signal by which a process stops next."""
    _, status = os.waitpid(pid, 0)
    if not os.WIFSTOPPED(status):
        raise RuntimeError("the process whose instructions are counted has ended")
    return os.WSTOPSIG(status)
