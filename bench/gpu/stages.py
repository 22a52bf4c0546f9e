"""A stage in a process of its own, under a time limit: what a crash, a hang or the limit leaves is kept, and told apart.

The stage's JSON is whole at any moment. The child writes each part's result to it, and before that the part's name as
"under_way"; the parent, which outlives it, says what became of a part that was left under way.
"""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from hta_fused.files import write_json

from .report import Content, finished, judge, settled
from .session import ROOT, Part, Session, Stopped, die_with_parent, tail

START = "start"  # what stands in the place of a part where a stage could not name its parts
AGAIN = 3  # the child's exit status where its CUDA context is of no use any more
LONGEST_GRACE = 30.0  # seconds before the limit, at which the child is asked to end


def read(file: Path) -> Content:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {"wanted": [], "parts": {}, "seconds": 0.0}


# ------------------------------------------------------------------------------------------------------------ the child


def work(name: str, make: Callable[[Session], Mapping[str, Part]], session: Session) -> int:
    """Does a stage's parts that are left. Returns the process's exit status."""
    file = session.out / f"{name}.json"
    content = read(file)
    results = content["parts"]
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, session.on_signal)
    try:
        results.pop(START, None)
        content["under_way"] = START
        write_json(file, content)
        parts = make(session)
        content["wanted"] = list(parts)
        for part, do in parts.items():
            if settled(results.get(part)):
                continue
            if session.asked_to_stop:
                break
            content["under_way"] = part
            write_json(file, content)
            print(f"-- {part}", flush=True)
            start, status = time.perf_counter(), 0
            try:
                result = do()
            except Exception as error:
                result = {"passed": False, "error": f"{type(error).__name__}: {tail(str(error))}"}
                status = AGAIN if _spoilt(session, error) else 0
            results[part] = {**result, "seconds": round(time.perf_counter() - start, 1)}
            content["under_way"] = None
            write_json(file, content)
            if status:
                return status
        content["under_way"] = None
        write_json(file, content)
    except Stopped:  # the parent says what becomes of the part under way
        return 0
    return 0


def _spoilt(session: Session, error: Exception) -> bool:
    """Whether an error has left no CUDA context to go on in, which not every message says."""
    if "CUDA error" in str(error):
        return True
    try:
        if session.device == "cuda":
            torch.cuda.synchronize()
    except Exception:
        return True
    return False


# ----------------------------------------------------------------------------------------------------------- the parent


def perform(name: str, command: list[str], file: Path, limit: float, about: Content) -> Content:
    """Runs a stage's command, again where it crashed in one of its parts, until it is done or the limit is reached.

    Args:
        about: what its JSON says beside the results.

    Raises:
        KeyboardInterrupt: after the child has ended and its JSON is in order.
    """
    start, end = time.monotonic(), time.monotonic() + limit
    write_json(file, {**read(file), **about, "stage": name, "under_way": None})
    settled_before = _settled(read(file))
    while True:
        status, cut = supervise(command, end)
        content = read(file)
        progress = _settled(content) > settled_before
        left = content.pop("under_way", None)
        if left is not None:
            content["parts"][left] = _of_part_under_way(status, cut, progress, limit)
        elif status not in (0, AGAIN) and cut is None:  # before the stage began
            content["parts"][START] = {"passed": False, "error": _ended(status)}
        again = cut is None and (status == AGAIN or (left not in (None, START))) and not finished(content)
        if not again:
            break
        write_json(file, content)
    content["seconds"] = round(content["seconds"] + time.monotonic() - start, 1)
    content["date"] = datetime.now().isoformat(timespec="seconds")
    content["passed"], content["verdict"] = judge(content)
    write_json(file, content)
    if cut == "interrupt":
        raise KeyboardInterrupt
    return content


def supervise(command: list[str], end: float) -> tuple[int, str | None]:
    """A command's exit status, and what cut it short: "limit", "interrupt" or nothing. Nothing that it started stays."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    # What a killed parent left behind would write to the next call's results.
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path}, start_new_session=True,
                               preexec_fn=die_with_parent)  # fmt: skip
    cut: str | None = None
    grace = min(LONGEST_GRACE, 0.25 * max(0.0, end - time.monotonic()))
    try:
        process.wait(max(0.0, end - grace - time.monotonic()))
    except subprocess.TimeoutExpired:
        cut = "limit"
    except KeyboardInterrupt:
        cut, end = "interrupt", time.monotonic() + LONGEST_GRACE
    if cut is not None:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, end - time.monotonic()))
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    return process.wait(), cut


def _settled(content: Content) -> int:
    return sum(map(settled, content["parts"].values()))


def _of_part_under_way(status: int, cut: str | None, progress: bool, limit: float) -> dict[str, Any]:
    if cut is None:
        return {"passed": False, "error": _ended(status)}
    if cut == "limit" and not progress:  # it had the stage's time to itself, and would not end the next time either
        return {"passed": False, "error": f"takes longer than the stage's limit of {limit:g} s"}
    return {"unfinished": "stopped by the stage's limit" if cut == "limit" else "interrupted"}


def _ended(status: int) -> str:
    if status < 0:
        return f"its process was ended by {signal.Signals(-status).name}"
    return f"its process ended with status {status}"
