"""What the trainer and the ops survive: kills, altered checkpoints, faults of the disk, bad inputs; counted by class.

    python tests/stress.py            some three minutes
    python tests/stress.py --quick    a third of that; the tests run it, and the mistakes one by one
    --seed N                          the same moments and alterations again

Prints a table, and a line for each case that was not as it should be.
"""

import argparse
import contextlib
import copy
import errno
import io
import json
import os
import pickle
import random
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from bad_command_lines import CASES as COMMAND_LINES
from bad_inputs import CASES as INPUTS

from hta_fused.train import Settings, Trainer, cli, data
from hta_fused.train.folder import sealed, unsealed
from hta_fused.train.settings import OF_THE_MACHINE

Case = tuple[str, Callable[[], None]]  # what is tried, and a call that raises AssertionError where it goes wrong

TINY = Settings(
    method="hta",
    dataset="synthetic",
    width=0.125,
    epochs=3,
    L_stop=0.009,
    batch_size=128,
    seeds=1,
    threads=1,
    device="cpu",
)


def silent(_: object) -> None:
    pass


def flags(settings: Settings) -> list[str]:
    """hta-train's flags for the settings that differ from its defaults."""
    changed = {k: v for k, v in vars(settings).items() if v != getattr(Settings(), k)}
    onoff = {True: "--", False: "--no-"}
    return [
        part
        for k, v in changed.items()
        for part in ([onoff[v] + cli.FLAGS[k][2:]] if isinstance(v, bool) else [cli.FLAGS[k], str(v)])
    ]


def results(out: Path) -> dict[str, Any]:
    """All that a finished folder holds and that a clock has no part in."""
    clock = ("seconds", "images_per_second", "date")

    def timeless(content: Any) -> Any:
        if isinstance(content, dict):
            return {k: timeless(v) for k, v in content.items() if k not in clock and k != "out"}
        return [timeless(v) for v in content] if isinstance(content, list) else content

    found: dict[str, Any] = {}
    for file in sorted(out.iterdir()):
        if file.suffix == ".pt":
            found[file.name] = timeless(torch.load(file, weights_only=True))
        elif file.suffix == ".json":
            found[file.name] = timeless(json.loads(file.read_text()))
        elif file.suffix == ".jsonl":
            found[file.name] = [timeless(json.loads(line)) for line in file.read_text().splitlines()]
        else:
            found[file.name] = None
    return found


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return a == b or (a != a and b != b)  # NaN is the L of a coupling that has none


def raises(kind: type[BaseException] | tuple[type[BaseException], ...], words: str, call: Callable[[], Any]) -> None:
    """Whether a call raises an error of one line with some words in it."""
    said = None
    try:
        call()
    except kind as error:
        said = str(error)
    assert said is not None, "was taken"
    assert "\n" not in said, f"several lines: {said}"
    assert words in said, f"does not say {words!r}: {said}"


# --------------------------------------------------------------------------------------------------------------- kills

KILLED = {
    "HTA": replace(TINY, epochs=4, batch_size=64),
    "SGD": replace(TINY, method="sgd", epochs=5, batch_size=64),
    "compare, two seeds": replace(TINY, method="compare", seeds=2),
    "HTA, one copy, hashed": replace(TINY, copies=1, partition="hashed", batch_size=64),
    "HTA, three copies, own batches": replace(TINY, copies=3, batches="own", precision="bf16"),
}


def start(out: Path, settings: Settings) -> subprocess.Popen:
    """A new run in a folder, or one that goes on, whichever there is need of."""
    command = [sys.executable, "-m", "hta_fused.train"]
    command += ["--resume", str(out)] if out.exists() else [*flags(settings), "--out", str(out)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen) -> None:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output.strip().splitlines()[-1] if output.strip() else process.returncode


def kills(name: str, moments: random.Random, uniform: int, aimed: int) -> tuple[int, list[str]]:
    """Kills a run again and again, at uniformly random moments from the process's start on, and as soon as its folder or
    a half-written checkpoint is there; then lets it end. How many kills it took, and what went wrong."""
    with tempfile.TemporaryDirectory() as folder:
        whole, broken = Path(folder) / "whole", Path(folder) / "broken"
        began = time.monotonic()
        finish(start(whole, KILLED[name]))
        length = time.monotonic() - began
        taken = 0
        targets = [broken, broken / ".part-checkpoint.pt"]
        for kill in [*["aimed"] * aimed, *["uniform"] * uniform]:
            process = start(broken, KILLED[name])
            deadline = time.monotonic() + moments.uniform(0, length)
            target = targets[taken % 2] if kill == "aimed" else None
            if target is not None and not target.exists():
                deadline = time.monotonic() + 2 * length
                while not target.exists() and process.poll() is None and time.monotonic() < deadline:
                    time.sleep(0.0005)
            else:
                time.sleep(max(0.0, deadline - time.monotonic()))
            process.kill()
            output, _ = process.communicate()
            if process.returncode > 0:
                return taken, [f"{name}, after kill {taken}: {output.strip().splitlines()[-1]}"]
            taken += 1
        try:
            finish(start(broken, KILLED[name]))
            expected, found = results(whole), results(broken)
            differing = [k for k in {**expected, **found} if not same(expected.get(k), found.get(k))]
            assert not differing, f"other content: {', '.join(differing)}"
        except AssertionError as error:
            return taken, [f"{name}: {error}"]
        return taken, []


# --------------------------------------------------------------------------------------------------------- checkpoints


class Stopped:
    """A run that was stopped in the middle of an epoch of its coupled phase, to be damaged."""

    def __init__(self, folder: Path, settings: Settings = TINY, batches: int = 7):
        asked = iter(range(10**6))
        self.out = folder / "run"
        self.settings = replace(settings, batch_size=64, out=self.out)
        Trainer(self.settings, stop=lambda: next(asked) == batches, report=silent).train()
        self.payload = (self.out / "checkpoint.pt").read_bytes()
        self.content = unsealed(self.out / "checkpoint.pt")

    def refuses(self, payload: bytes) -> None:
        """Whether a checkpoint is refused in one line that names it, and nothing else is touched."""
        newest, previous = self.out / "checkpoint.pt", self.out / "checkpoint.previous.pt"
        newest.write_bytes(payload)
        for other in (previous, self.out / "config.json"):  # which would speak first
            other.unlink(missing_ok=True)
        before = {p: p.read_bytes() for p in self.out.rglob("*") if p.is_file() and p.name != ".lock"}
        raises((ValueError, OSError), str(newest), lambda: Trainer.resume(self.out, report=silent))
        after = {p: p.read_bytes() for p in self.out.rglob("*") if p.is_file() and p.name != ".lock"}
        assert before == after, "wrote something"


def alterations(stopped: Stopped, moments: random.Random, flips: int) -> Iterator[tuple[str, bytes]]:
    whole = stopped.payload
    size = len(whole)
    for _ in range(flips):
        at, bit = moments.randrange(size), moments.randrange(8)
        yield f"bit {bit} of byte {at} flipped", whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :]
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        records = [info.header_offset for info in archive.infolist()]
        directory = archive.start_dir
    edges = {0, 1, size - 1, size - 73, size - 74, size - 75, directory, directory + 1, size // 2, *records[:16]}
    for at in sorted(edges):
        yield f"cut off at byte {at}", whole[:at]
    for _ in range(16):
        at, length = moments.randrange(size), moments.choice((1, 64, 512, 4096))
        yield f"{length} bytes of zeros at {at}", whole[:at] + b"\0" * length + whole[at + length :]
        yield f"{length} bytes gone at {at}", whole[:at] + whole[at + length :]
    yield "a byte more", whole + b"\n"
    yield "twice itself", whole + whole


def others(stopped: Stopped) -> Iterator[tuple[str, bytes]]:
    """Other programs' files."""
    buffer = io.BytesIO()
    torch.save({"model": torch.zeros(3)}, buffer)
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("a.txt", "a")
    yield from {
        "empty": b"",
        "text": b"epoch 3 of 15\n" * 50,
        "JSON": json.dumps({"settings": {}, "rows": []}).encode(),
        "a PNG": b"\x89PNG\r\n\x1a\n" + bytes(500),
        "random bytes": random.Random(1).randbytes(5000),
        "a torch file": buffer.getvalue(),
        "a zip": archive.getvalue(),
        "a pickle": pickle.dumps({"settings": {}, "run": None}),
        "safetensors": (2).to_bytes(8, "little") + b"{}",
        "the seal alone": stopped.payload[-74:],
        "a sealed list": bytes(sealed([1, 2])),  # type: ignore[arg-type]
        "a sealed state_dict": bytes(sealed({"0.weight": torch.zeros(3)})),
        "a sealed pickle of a program": bytes(sealed({"settings": print})),
    }.items()


def forgeries(stopped: Stopped) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """Whole checkpoints whose content is not a run's: a key gone, of another kind, a tensor of another shape."""

    def forged(*path: Any, value: Any = None, drop: bool = False) -> Callable[[], bytes]:
        def make() -> bytes:
            content = copy.deepcopy(stopped.content)
            place = content
            for key in path[:-1]:
                place = place[key]
            if drop:
                del place[path[-1]]
            else:
                place[path[-1]] = value
            return bytes(sealed(content))

        return make

    for key in stopped.content:
        yield f"without {key}", forged(key, drop=True)
        yield f"{key} is a word", forged(key, value="word" if key != "data" else 7)
    for key in stopped.content["run"]:
        if key != "random_cuda":
            yield f"run without {key}", forged("run", key, drop=True)
    for key in stopped.content["settings"]:
        yield f"settings with {key}_", forged("settings", f"{key}_", value=1)
    yield "other data", forged("data", value="0" * 16)
    yield "more runs done than there are", forged("done", value=9)
    yield "fewer than none", forged("done", value=-1)
    yield "another width", forged("settings", "width", value=0.25)
    yield "another model", forged("settings", "model", value="vgg13")
    yield "more copies", forged("settings", "copies", value=3)
    yield "fewer epochs than the schedule", forged("settings", "epochs", value=1)

    def tensors(place: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], torch.Tensor]]:
        entries = place.items() if isinstance(place, dict) else enumerate(place) if isinstance(place, list) else ()
        for key, value in entries:
            if isinstance(value, torch.Tensor):
                yield (*path, key), value
            else:
                yield from tensors(value, (*path, key))

    for path, value in tensors(stopped.content["run"], ("run",)):
        if value.dim():
            wrong = {"one longer": torch.cat([value, value[:1]]), "one number": value.flatten()[:1].clone()}
            for what, tensor in wrong.items():
                if tensor.shape != value.shape:
                    yield f"{'.'.join(map(str, path))} {what}", forged(*path, value=tensor)


def checkpoints(moments: random.Random, quick: bool) -> Iterator[tuple[str, list[Case]]]:
    with tempfile.TemporaryDirectory() as folder:
        stopped = Stopped(Path(folder))
        altered = [
            (n, b) for n, b in alterations(stopped, moments, 60 if quick else 400) if b != stopped.payload
        ]  # zeros over zeros
        yield "checkpoints altered", [(n, lambda b=b: stopped.refuses(b)) for n, b in altered]
        yield "other programs' files", [(n, lambda b=b: stopped.refuses(b)) for n, b in others(stopped)]
        forged = list(forgeries(stopped))
        if quick:
            forged = moments.sample(forged, min(len(forged), 60))
        yield "content that is not a run's", [(n, lambda make=make: stopped.refuses(make())) for n, make in forged]


# -------------------------------------------------------------------------------------------------------------- faults


def disk_full(after: int) -> Callable[..., Any]:
    """os.fsync, on a disk that is full after some calls."""
    calls = iter(range(10**6))
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if next(calls) >= after:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    return fsync


def faults(folder: Path) -> Iterator[Case]:
    reference = folder / "whole"
    Trainer(replace(TINY, out=reference), report=silent).train()

    def full_disk(after: int) -> None:
        out = folder / f"full-{after}"
        with mock.patch("os.fsync", disk_full(after)):
            raises(OSError, "No space left", lambda: Trainer(replace(TINY, out=out), report=silent).train())
        assert [p.name for p in folder.iterdir() if p.name.startswith(".part")] == [], "left half a folder"
        if after == 0:
            assert not out.exists(), "left a folder without a checkpoint"
            return
        assert not list(out.glob(".part*")), "left half a file"
        Trainer.resume(out, report=silent).train()
        assert same(results(reference), results(out)), "other results"

    for after in range(12):
        yield f"the disk is full at write {after}", lambda after=after: full_disk(after)

    def file_limit(size: int) -> None:
        out = folder / f"limit-{size}"
        process = subprocess.run(
            [sys.executable, "-m", "hta_fused.train", *flags(TINY), "--out", str(out)],
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)),
            capture_output=True,
            text=True,
        )
        assert process.returncode == 1, process.stderr
        assert "File too large" in process.stderr, process.stderr
        assert str(out) in process.stderr, process.stderr
        assert "Traceback" not in process.stderr
        assert not list(out.glob(".part*"))
        if size == 1024:
            assert not out.exists()
        else:
            Trainer.resume(out, report=silent).train()
            assert same(results(reference), results(out)), "other results"

    for size in (1024, 2**16):
        yield f"no file may be longer than {size} bytes", lambda size=size: file_limit(size)

    def start_in(out: Path) -> None:
        Trainer(replace(TINY, out=out), report=silent)

    (folder / "file").write_text("")
    for name, out in {
        "out is a file": folder / "file",
        "out is in a file": folder / "file" / "run",
        "out is in a folder that takes none": Path("/proc/run"),
        "out has a name that is too long": folder / ("x" * 300),
    }.items():
        yield name, lambda out=out: raises(OSError, str(out), lambda: start_in(out))

    def vanished() -> None:
        settings = replace(TINY, dataset="cifar10", data_dir=folder / "nowhere", out=folder / "never")
        raises(FileNotFoundError, str(folder / "nowhere"), lambda: Trainer(settings))
        assert not (folder / "never").exists()

    yield "no data", vanished

    def data_changed() -> None:
        stopped = Stopped(folder / "changed")
        with mock.patch.object(data, "synthetic", data.digits):
            stopped.refuses(stopped.payload)

    yield "other data when resumed", data_changed

    def held(call: Callable[[Path], Any], words: str) -> None:
        with tempfile.TemporaryDirectory() as name:
            out = Path(name) / "run"
            process = start(out, replace(TINY, epochs=400))
            while not (out / "metrics.jsonl").exists() and process.poll() is None:
                time.sleep(0.01)
            try:
                raises(OSError, words.format(pid=process.pid), lambda: call(out))
            finally:
                process.kill()
                process.communicate()

    yield "a second process goes on with the run", lambda: held(lambda out: Trainer.resume(out), "process {pid}")
    yield "a second process starts the run", lambda: held(start_in, "process {pid}")

    def again() -> None:
        out = folder / "again"
        Trainer(replace(TINY, out=out), report=silent).train()
        before = results(out)
        raises(FileExistsError, "already holds a run", lambda: start_in(out))
        Trainer.resume(out, report=silent).train()
        assert same(before, results(out))

    yield "a run in a finished run's folder", again

    def rewritten(name: str, value: Any) -> None:
        stopped = Stopped(folder / f"config-{name}")
        config = stopped.out / "config.json"
        content = json.loads(config.read_text())
        config.write_text(json.dumps(content | {name: value}))
        raises(ValueError, f"{name} is {value!r}", lambda: Trainer.resume(stopped.out, report=silent))
        config.unlink()
        Trainer.resume(stopped.out, report=silent)
        assert json.loads(config.read_text())[name] == content.get(name)
        shutil.rmtree(folder / f"config-{name}")

    for name, value in TINY.to_json().items():
        if name not in ("out", *OF_THE_MACHINE):
            other = (
                not value
                if isinstance(value, bool)
                else value + 1
                if isinstance(value, int | float)
                else f"other {value}"
            )
            yield f"config.json says another {name}", lambda name=name, other=other: rewritten(name, other)

    def broken_record(text: str) -> None:
        stopped = Stopped(folder / "record")
        (stopped.out / "config.json").write_text(text)
        raises(ValueError, "config.json", lambda: Trainer.resume(stopped.out, report=silent))
        shutil.rmtree(folder / "record")

    for text in ("", "{", "[]", "null", "no JSON"):
        yield f"config.json is {text!r}", lambda text=text: broken_record(text)

    def the_previous_serves() -> None:
        settings = replace(TINY, batch_size=64)
        whole = folder / "previous-whole"
        Trainer(replace(settings, out=whole), report=silent).train()
        stopped = Stopped(folder / "previous", batches=12)
        (stopped.out / "checkpoint.pt").write_bytes(stopped.payload[:1000])
        said: list[str] = []
        Trainer.resume(stopped.out, report=said.append).train()
        assert any("checkpoint.previous.pt serves" in line for line in said), said
        assert (stopped.out / "checkpoint.refused.pt").read_bytes() == stopped.payload[:1000]
        (stopped.out / "checkpoint.refused.pt").unlink()
        assert same(results(whole), results(stopped.out)), "other results"

    yield "the newest checkpoint is cut off: the previous one serves", the_previous_serves

    def diverges(**changes: Any) -> None:
        out = folder / f"diverged-{len(changes)}-{changes.get('lr')}"
        raises(FloatingPointError, "--lr", Trainer(replace(TINY, out=out, **changes), report=silent).train)
        for line in (out / "metrics.jsonl").read_text().splitlines():
            json.loads(line, parse_constant=lambda name: raises(ValueError, "", lambda: None))
        shutil.rmtree(out)

    for changes in (
        {"lr": 1e15},
        {"lr": 1e30, "method": "sgd"},
        {"lr": 1e12, "epochs": 2, "precision": "bf16"},
        {"lr": 1e15, "method": "compare"},
        {"lr": 1e15, "mode": "explicit"},
    ):
        yield f"it diverges with {changes}", lambda changes=changes: diverges(**changes)


def refused(call: Callable[[], Any]) -> None:
    raises((RuntimeError, TypeError, ValueError), "", call)


def mistyped(argv: list[str]) -> None:
    """Whether a bad command line ends in one line, and makes nothing."""
    said, before = io.StringIO(), Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            with contextlib.redirect_stderr(said):
                cli.main(argv)
            status = None
        except SystemExit as stop:
            status = stop.code
        finally:
            os.chdir(before)
        assert status in (1, 2), f"exit status {status}"
        assert not list(Path(folder).iterdir()), "made something"
    assert re.fullmatch(r"hta-train: .*\n", said.getvalue()), said.getvalue()


# ------------------------------------------------------------------------------------------------------------ all of it


def tried(name: str, cases: list[Case]) -> tuple[str, int, list[str]]:
    print(f"{name}: {len(cases)} cases", file=sys.stderr, flush=True)
    wrong = []
    for what, call in cases:
        try:
            call()
        except Exception as error:
            wrong.append(f"{name}: {what}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
    return name, len(cases), wrong


def main(argv: list[str] | None = None) -> int:
    """Returns how many cases went wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer kills and alterations")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6), help="of what is random")
    options = parser.parse_args(argv)
    moments = random.Random(options.seed)
    torch.set_num_threads(1)
    began = time.monotonic()
    table: list[tuple[str, int, list[str]]] = []

    names = list(KILLED)[:2] if options.quick else list(KILLED)
    uniform, aimed = (3, 2) if options.quick else (8, 4)
    with ThreadPoolExecutor(2) as pool:  # a process for each core
        jobs = [pool.submit(kills, name, random.Random(moments.random()), uniform, aimed) for name in names]
        killed = [job.result() for job in jobs]
    table.append(("kills", sum(taken for taken, _ in killed), [line for _, wrong in killed for line in wrong]))
    for name, cases in checkpoints(moments, options.quick):
        table.append(tried(name, cases))
    if not options.quick:
        mistakes = [(what, lambda argv=argv: mistyped(argv)) for what, argv in COMMAND_LINES]
        table.append(tried("bad command lines", mistakes))
        for name, inputs in INPUTS.items():
            table.append(
                tried(f"bad inputs: {name}", [(what, lambda call=call: refused(call)) for what, call in inputs])
            )
    with tempfile.TemporaryDirectory() as folder:
        table.append(tried("faults of disk, folder, data and training", list(faults(Path(folder)))))

    for _, _, wrong in table:
        for line in wrong:
            print(line)
    print(f"\nseed {options.seed}, {time.monotonic() - began:.0f} s\n")
    print("| class | tried | survived, or refused in one line |\n| --- | ---: | ---: |")
    for name, count, wrong in table:
        print(f"| {name} | {count} | {count - len(wrong)} |")
    return sum(len(wrong) for _, _, wrong in table)


if __name__ == "__main__":
    sys.exit(1 if main() else 0)
