"""`make gpu` rehearsed on the CPU: every stage's control flow, what a limit, a crash and a failure leave, and the page."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from itertools import count
from pathlib import Path

import pytest
import torch

import hta_fused as hta

try:
    from hta_fused_bench import measure
    from hta_fused_bench.gpu import check, cli, counters, kernels, launches, report, session, stages, steps
except ImportError:  # a checkout that was not installed, as `make gpu` has it
    from bench import measure
    from bench.gpu import check, cli, counters, kernels, launches, report, session, stages, steps

PACKAGE = cli.__package__
PLANTED = f"""
import os, signal, sys, time
from pathlib import Path
from {PACKAGE} import cli

def noted(name, then=lambda s: dict(passed=True)):
    def parts(s):
        def do():
            with open(s.out / "done", "a") as file:
                file.write(name + " ")
            return then(s)
        return do
    return parts

def fails(s): raise RuntimeError("planted")
def dies(s): os.kill(os.getpid(), signal.SIGSEGV)
def hangs(s): time.sleep(60)
def hangs_once(s):
    if (s.out / "hung").exists():
        return dict(passed=True)
    (s.out / "hung").touch()
    time.sleep(60)
def misses(s): return dict(passed=False, claims=[dict(what="speed", value=0.5, wanted="at least 1", met=False)])
def lacks(s): return dict(skipped="no such tool")

def stage(**parts):
    return lambda s: {{name: noted(name, then)(s) for name, then in parts.items()}}

def good(s): return dict(passed=True, rows={{"": {{"ms": "1.5"}}}})
def unnamed(s): raise ValueError("no parts")

cli.STAGES = {{
    "check": (stage(a=fails, b=dies, c=good), ""),
    "kernels": (stage(d=good, e=hangs_once, f=good), ""),
    "step": (stage(g=good, h=lacks), ""),
    "table2": (stage(i=misses, j=good), ""),
    "hang": (stage(k=hangs), ""),
    "unnamed": (unnamed, ""),
}}
cli.main(sys.argv[1:])
"""


@pytest.fixture
def planted(tmp_path, monkeypatch):
    """Runs stages of which some fail; returns the exit status and each stage's JSON."""
    program, out = tmp_path / "planted.py", tmp_path / "out"
    program.write_text(PLANTED)
    monkeypatch.setattr(cli, "PROGRAM", [sys.executable, str(program)])
    monkeypatch.setattr(
        cli, "STAGES", dict.fromkeys(("check", "kernels", "step", "table2", "hang", "unnamed"), (None, ""))
    )

    def perform(*only, limit=60.0, more=()):
        with pytest.raises(SystemExit) as exit_:
            cli.main(["--rehearse", "--out", str(out), "--limit", str(limit), "--only", *only, *more])
        return exit_.value.code, {p.stem: json.loads(p.read_text()) for p in out.glob("*.json")}

    perform.done = lambda: (out / "done").read_text().split()
    perform.page = lambda: (out / "report.md").read_text()
    return perform


def test_a_stage_that_fails_does_not_stop_the_next(planted):
    status, found = planted("check", "step", "unnamed", "table2")
    assert status == 1
    parts = found["check"]["parts"]
    assert parts["a"]["error"] == "RuntimeError: planted"
    assert parts["b"]["error"] == "its process was ended by SIGSEGV"
    assert parts["c"]["passed"]  # a crash does not take what comes after it along
    assert found["check"]["passed"] is False
    assert "FAILED: a (RuntimeError: planted); b (its process was ended by SIGSEGV)" in found["check"]["verdict"]
    assert found["step"]["passed"] is None
    assert found["step"]["verdict"] == "1 of 2 passed. left out: h (no such tool)"
    assert found["unnamed"]["passed"] is False
    assert found["table2"]["verdict"] == "1 of 2 passed. MISSED: i: speed 0.5, wanted at least 1"
    page = planted.page()
    assert "| step | **incomplete**: 1 of 2 passed. left out: h (no such tool) |" in page
    assert "| c | passed | 1.5 |" in page
    assert len(page.splitlines()) < 60
    assert planted.done() == list("abcghij")
    planted("check", "table2")  # finished, if not well: nothing is done again
    assert planted.done() == list("abcghij")
    status, found = planted("table2", more=["--again"])
    assert (status, planted.done()) == (1, list("abcghijij"))


def test_a_stage_that_its_limit_cut_goes_on_when_called_again(planted):
    status, found = planted("kernels", limit=12)
    assert status == 0
    assert found["kernels"]["passed"] is None
    assert found["kernels"]["parts"]["e"]["unfinished"] == "stopped by the stage's limit"
    assert found["kernels"]["verdict"] == "1 of 3 passed. to be done: e (stopped by the stage's limit); f"
    assert planted.done() == ["d", "e"]
    status, found = planted("kernels")
    assert (status, found["kernels"]["passed"]) == (0, True)
    assert planted.done() == ["d", "e", "e", "f"]


def test_a_part_that_no_limit_is_enough_for_has_failed(planted):
    status, found = planted("hang", limit=10)
    assert status == 1
    assert found["hang"]["parts"]["k"]["error"] == "takes longer than the stage's limit of 10 s"


def test_another_machines_results_are_not_mixed_in(planted, tmp_path):
    planted("step")
    file = tmp_path / "out" / "step.json"
    content = json.loads(file.read_text())
    content["machine"]["processor"] = "another"
    file.write_text(json.dumps(content))
    status, _ = planted("table2")
    assert "has another machine" in status


def tool(folder: Path, name: str, text: str) -> None:
    file = folder / name
    file.write_text("#!/bin/sh\n" + text)
    file.chmod(0o755)


def test_every_stage_runs_on_the_cpu(tmp_path, monkeypatch):
    """With stand-ins for the two tools; table2 is cut by its limit, and goes on."""
    bin_, out = tmp_path / "bin", tmp_path / "out"
    bin_.mkdir()
    monkeypatch.setenv("PATH", f"{bin_}{os.pathsep}{os.environ['PATH']}")
    tool(bin_, "compute-sanitizer", 'while [ "$1" != "' + sys.executable + '" ]; do shift; done\nexec "$@"\n')
    table = ['"ID","Metric Name","Metric Unit","Metric Value"']
    for launch in range(16):
        proposal, m = counters.CASES[launch // 2]
        bytes_ = counters.needed(proposal, m) * counters.elements_of(proposal, m, 10**6)
        table += [
            f'"{launch}","dram__bytes_read.sum","byte","{bytes_}"',
            f'"{launch}","dram__bytes_write.sum","byte","0"',
        ]
    (tmp_path / "table.csv").write_text("\n".join(table) + "\n")
    tool(
        bin_,
        "ncu",
        'case "$*" in *"--print-units base"*) ;; *) exit 1;; esac\nwhile [ "$1" != "'
        + sys.executable
        + f'" ]; do shift; done\n"$@" && cat {tmp_path}/table.csv\n',
    )

    def called(*more):
        with pytest.raises(SystemExit) as exit_:
            cli.main(["--rehearse", "--out", str(out), *more])
        return exit_.value.code, {p.stem: json.loads(p.read_text()) for p in out.glob("*.json")}

    status, found = called("--only", "check", "kernels", "step")
    assert status == 0
    assert {name: content["passed"] for name, content in found.items()} == {
        "check": None,
        "kernels": True,
        "step": True,
    }
    assert found["check"]["verdict"] == "3 of 4 passed. left out: build (there is no card to build for)"
    assert list(found["check"]["parts"])[1].startswith("memcheck")
    assert " passed in " in (out / "tests" / "test_schedule.txt").read_text()
    (part,) = found["step"]["parts"].values()
    speed, (claim,) = part["images_per_second"], (c for c in part["claims"] if "a copy" in c["what"])
    assert claim["value"] == pytest.approx(speed["HTA, graph"] / 2 / speed[steps.SCRIPT])  # two copies
    # Each call has time for a part of the training; the next, with a little more of it, goes on.
    metrics = out / "table2" / "vgg11-seed0" / "metrics.jsonl"
    rows = 0
    for limit in range(9, 29):
        status, found = called("--only", "table2", "--limit", str(limit))
        assert status == 0, found["table2"]["verdict"]
        now = len(metrics.read_text().splitlines()) if metrics.exists() else 0
        assert now >= rows
        rows = now
        if found["table2"]["passed"]:
            break
    assert found["table2"]["parts"]["vgg16, seed 0"]["rows"]["HTA"]["epochs"] == "4 of 4"
    page = (out / "report.md").read_text()
    assert page.startswith("# Rehearsal: figures mean nothing")
    assert "| vgg11, seed 0: SGD | passed | 4 of 4 |" in page
    assert "| DRAM bytes, cpu: SGD, m = 2 | passed |" in page
    assert len(page.splitlines()) < 70


def test_table2_stops_within_an_epoch_and_says_where(tmp_path):
    from importlib import import_module

    table2 = import_module(f"{PACKAGE}.table2")
    stopped = session.Session(tmp_path, tmp_path, "cpu", rehearsal=True, asked_to_stop=True)
    result = table2.train(stopped, "vgg11", 0)
    assert result["unfinished"] == "stopped in epoch 1 of sgd-seed0"
    result = table2.train(session.Session(tmp_path, tmp_path, "cpu", rehearsal=True), "vgg11", 0)
    assert result["passed"]
    assert result["rows"]["SGD"]["epochs"] == "4 of 4"


def test_table2_without_its_images_is_left_out(tmp_path):
    from importlib import import_module

    table2 = import_module(f"{PACKAGE}.table2")
    result = table2.train(session.Session(tmp_path, tmp_path, "cpu"), "vgg11", 0)
    assert "CIFAR-10 is not in" in result["skipped"]


def test_the_gpu_command_says_so_where_there_is_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="sees no CUDA device"):
        cli.main([])


def test_a_backend_that_is_not_there_is_left_out(capsys):
    if torch.cuda.is_available():
        pytest.skip("it may be there")
    with pytest.raises(SystemExit) as exit_:
        launches.main("cuda", "cuda")
    assert session.outcome(exit_.value.code, capsys.readouterr().out)["skipped"].startswith("cuda: ")


@pytest.mark.parametrize("said", ["cuLaunchKernel: an illegal address", "the kernel was not launched: unknown error"])
@pytest.mark.parametrize("dead", [False, True])
def test_an_error_after_which_the_card_does_not_answer_ends_the_process(tmp_path, monkeypatch, said, dead):
    def synchronize():
        if dead:
            raise RuntimeError(said)

    def part():
        raise RuntimeError(said)

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    status = stages.work("s", lambda s: {"a": part, "b": part}, session.Session(tmp_path, tmp_path, "cuda"))
    assert status == (stages.AGAIN if dead else 0)
    assert list(stages.read(tmp_path / "s.json")["parts"]) == (["a"] if dead else ["a", "b"])


STARTED = """
import sys, time
from {package} import session, stages
command = [sys.executable, "-c", "import os, time; print(os.getpid(), flush=True); time.sleep(60)"]
{start}
"""


@pytest.mark.parametrize("start", ["stages.supervise(command, time.monotonic() + 60)", "session.run(command, session.Path(sys.argv[1]))"])  # fmt: skip
def test_what_a_killed_process_has_started_ends_with_it(tmp_path, start):
    log, text = tmp_path / "log", STARTED.format(package=PACKAGE, start=start)
    environment = {**os.environ, "PYTHONPATH": str(session.ROOT)}
    with log.open("w") as file:
        parent = subprocess.Popen([sys.executable, "-c", text, str(log)], stdout=file, env=environment)
    try:
        until(lambda: log.read_text().endswith("\n"))
        child = int(log.read_text())
        assert running(child)
    finally:
        parent.kill()
        parent.wait()
    until(lambda: not running(child))


def until(condition, seconds=30.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def running(process: int) -> bool:
    """Whether a process has yet to end; one that nobody has asked about since has."""
    with suppress(FileNotFoundError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def test_a_commands_output_is_in_its_log_before_it_ends(tmp_path):
    program = "import sys; print('first', flush=True); print(open(sys.argv[1]).read())"
    log = tmp_path / "folder" / "log"
    assert session.run([sys.executable, "-c", program, str(log)], log) == (0, "first\nfirst\n\n")


@pytest.mark.parametrize(
    "said",
    ["========= Error: Device not supported. Please refer to the documentation", "==ERROR== LibraryNotLoaded",
     "==ERROR== ERR_NVGPUCTRPERM - The user does not have permission to access NVIDIA GPU Performance Counters"],
)  # fmt: skip
@pytest.mark.parametrize("status", [0, 1])
def test_a_tool_that_the_machine_does_not_let_in_is_left_out_and_why(tmp_path, monkeypatch, said, status):
    for name in ("compute-sanitizer", "ncu"):
        tool(tmp_path, name, f"echo before\necho '{said}'\necho after\nexit {status}\n")
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    here = session.Session(tmp_path, tmp_path, "cpu", rehearsal=True)
    wanted = {"skipped": said.strip("= ")}
    assert check.sanitizer(here, "memcheck", "cpu") == counters.dram(here, "cpu") == wanted


def arguments_of(file: str) -> dict[str, list[str]]:
    """What each test of a file takes."""
    text = Path(__file__).with_name(f"{file}.py").read_text()
    tests = re.findall(r"^def (test_\w+)\(([^)]*)\)", text, re.MULTILINE)
    return {name: re.split(r",\s*", arguments) for name, arguments in tests}


def test_what_runs_on_a_card_are_the_tests_that_use_one():
    files = {path.stem: arguments_of(path.stem) for path in Path(__file__).parent.glob("test_*.py")}
    using = {file for file, tests in files.items() if any("backend" in taken for taken in tests.values())}
    assert {*check.FIRST, *check.OTHERS} == using | {"test_gpu"}
    for word in check.ON_THE_CPU.split(" or "):
        named = [taken for file in using for name, taken in files[file].items() if word in name]
        assert named
        assert not any("backend" in taken for taken in named)


def test_every_backend_does_a_step_after_the_build(monkeypatch):
    assert check.first_steps("cpu") == hta.backends()
    step = hta.coupled_step_

    def wrong(x, *arguments, **options):
        step(x, *arguments, **options)
        x += hta.kernels._wanted == "cpu"

    monkeypatch.setattr(hta, "coupled_step_", wrong)
    found = check.first_steps("cpu")
    if hta.backends()["cpu"].startswith("available"):
        assert found["cpu"].startswith(f"{check.FAILS}AssertionError: ")
    assert hta.kernels._wanted is None


def test_triton_is_watched_in_few_shapes(monkeypatch):
    launched = []
    monkeypatch.setattr(hta, "coupled_step_", lambda *_, **__: launched.append(1))
    counted = []
    for shapes in (launches.FEW, launches.ALL):
        for dtypes in shapes.dtypes:
            launches.steps(shapes, *dtypes)
        counted.append(len(launched))
        launched.clear()
    assert counted == [48, 1080]


def test_a_backends_kernels_are_timed_without_choosing_it_each_time(monkeypatch):
    chosen = []

    class Graphed:
        def __init__(self, device, on_failure):
            self.on_failure = on_failure

        def __call__(self, step):
            step()
            chosen.append(hta.kernels._wanted)

    monkeypatch.setattr(kernels, "Graphed", Graphed)
    monkeypatch.setattr(measure, "on_gpu", lambda: True)
    step = kernels.replayed("reference", measure.workloads.flat(100).optimizer)
    assert chosen == (kernels.WARM_UP + 1) * ["reference"]  # the last is captured
    monkeypatch.setattr(hta, "use_backend", None)
    step()
    assert chosen[-1] is None
    with pytest.raises(RuntimeError, match="reference: cannot"):
        step.func.on_failure("cannot")


def test_the_scripts_steps_are_timed_in_a_row_and_once_its_workers_have_nothing_in_store():
    calls = count()

    def step():
        if next(calls) >= steps.IN_STORE:
            time.sleep(0.02)

    seconds, _ = steps.consecutive(step, 5)
    assert 0.02 <= seconds < 0.1
    assert next(calls) == steps.IN_STORE + 5


def test_dram_bytes_are_read_from_nsight_computes_table():
    header = '"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"\n'
    rows = '"0","7","step_kernel","dram__bytes_read.sum","Gbyte","4.2"\n"0","7","step_kernel","dram__bytes_write.sum","Mbyte","2,400.5"\n'
    assert counters.dram_bytes("==PROF== Connected\n" + header + rows) == [pytest.approx(6.6005e9)]
    base = rows.replace("Gbyte", "byte").replace('"4.2"', '"4,200,000,000"')  # as --print-units base has it
    assert counters.dram_bytes(header + base) == [pytest.approx(6.6005e9)]
    assert counters.dram_bytes("==ERROR== no counters") == []


def test_the_formula_of_the_bytes_is_what_a_workload_has():
    for proposal, m in counters.CASES:
        load = measure.workloads.flat(2048, copies=m, proposal=proposal)
        assert load.moved == counters.needed(proposal, m)


def test_the_usual_scripts_images_are_those_of_ours_but_for_their_luck():
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    mean, std = torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1), torch.tensor([0.2, 0.25, 0.3]).view(3, 1, 1)
    image, label = steps.UsualDataset(images, torch.arange(4), mean, std)[2]
    assert image.shape == (3, 32, 32)
    assert label == 2
    assert image.min() >= ((0 - mean) / std).min()


def test_a_stage_that_has_yet_to_run_has_not_passed():
    assert report.judge({"wanted": [], "parts": {}}) == (None, "0 of 0 passed")
