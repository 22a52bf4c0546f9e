"""The commands on a terminal: their help, errors before any work, what is printed as they run, signals."""

import errno
import io
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from bad_command_lines import CASES
from stress import TINY, flags

from hta_fused import terminal
from hta_fused.paper import cli as paper_cli
from hta_fused.train import Settings, Trainer, cli, machine, report

FLAGS = flags(TINY)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    assert Trainer(replace(TINY, out=out), report=lambda _: None).train()
    return out


def refused(argv: list[str], capsys) -> tuple[int, str]:
    """The exit status and the one line of a command that does not begin."""
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("hta-train: ")
    assert printed.err.count("\n") == 1
    return stop.value.code, printed.err


# ---------------------------------------------------------------------------------------------------------------- help


@pytest.mark.parametrize("command", [cli, paper_cli])
def test_help_fits_80_columns(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit, match="0"):
        command.main(["--help"])
    text = capsys.readouterr().out
    assert "examples:" in text
    assert max(map(len, text.splitlines())) <= 80


def test_every_setting_is_a_flag_with_a_line_of_help():
    text = cli.parser().format_help()
    for field in fields(Settings):
        assert re.search(rf"^  {cli.FLAGS[field.name]}[ ,]", text, re.MULTILINE), field.name
    groups = ["method", "network", "data", "homotopy", "optimisation", "machine", "output"]
    assert re.findall(r"^(\w+):$", text, re.MULTILINE)[1:-1] == groups
    words = " ".join(text.split())
    assert (
        "--method METHOD what to train; ddp: SGD in processes that average gradients: hta, sgd, [compare], ddp "
        in words
    )
    assert "--batch-norm, --no-batch-norm " in text
    assert "--L-start L " in text
    assert sum(line.startswith("  --") for line in text.splitlines()) >= len(fields(Settings))


def test_the_examples_in_the_help_are_understood():
    for line in cli.EXAMPLES.splitlines()[1:]:
        words = re.split(r" {2,}", line.strip())[0].split()
        cli.parser().parse_args(words[1:])


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(("what", "argv"), CASES, ids=[what for what, _ in CASES])
def test_a_bad_command_line_is_answered_in_one_line_and_makes_nothing(tmp_path, monkeypatch, capsys, what, argv):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch, "set_num_threads", None)  # 9999 of them would take the machine down
    status, line = refused(argv, capsys)
    assert status in (1, 2)
    named = [word.split("=")[0].replace("--no-", "--") for word in argv]
    assert "--epochs" in line or any(word and word.replace("\0", "\\x00") in line for word in named)
    assert not any(tmp_path.iterdir())


def test_there_are_many_bad_command_lines_and_no_two_alike():
    assert len({tuple(argv) for _, argv in CASES}) == len({what for what, _ in CASES}) == len(CASES) > 60


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (["--epochs", "1e99"], "--epochs must be a whole number, got '1e99'"),
        (["--epochs", "3"], "--epochs must be at least 6, which the schedule of L takes, got 3"),
        (["--L-start", "0.001"], "--L-start must be at least --L-stop, 0.005, got 0.001"),
        (["--batch_size", "3"], "unknown flag --batch_size: did you mean --batch-size?"),
        (["--l-start", "3"], "unknown flag --l-start: did you mean --L-start?"),
        (["--threads", "9999"], f"--threads must be at most {os.cpu_count()}, this machine's cores, got 9999"),
        (["--lr"], "--lr takes a value, and has none"),
        (["--resume", "x", "--epochs", "9"], "--epochs is the run's own and cannot change when --resume goes on with it"),
    ],
)  # fmt: skip
def test_errors_name_flags_as_they_are_typed(argv, line, capsys):
    assert refused(argv, capsys) == (2, f"hta-train: {line}\n")


def test_a_network_that_does_not_fit_is_refused_with_its_size(capsys):
    _, line = refused(["--width", "1e9"], capsys)
    assert re.search(r"vgg11 has 9.74e\+24 parameters and needs over \S+ GiB, where \S+ GiB are", line)
    assert machine.memory(replace(TINY, copies=4)) == 13 * machine.memory(replace(TINY, method="sgd")) // 3


def test_a_gpu_is_refused_where_there_is_none_or_too_few(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "--device must be cpu or auto where torch sees no CUDA device" in refused(["--device", "cuda"], capsys)[1]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert "--device must be from cuda:0 to cuda:1, got 'cuda:7'" in refused(["--device", "cuda:7"], capsys)[1]


def test_a_package_that_is_missing_is_named(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "sklearn" else name)
    assert refused([], capsys) == (1, "hta-train: hta_fused.train needs sklearn: pip install 'hta_fused[train]'\n")


# ---------------------------------------------------------------------------------------------------------- evaluating


def test_evaluating_takes_the_runs_own_data(tmp_path, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(cli, "evaluate_file", lambda file, settings: asked.append(settings) or (0.5, 80.0))
    (tmp_path / "config.json").write_text('{"data_dir": "elsewhere", "width": 0.5, "out": "there"}')
    cli.main(["--evaluate", str(tmp_path / "x.pt")])
    assert "x.pt: test accuracy 80.00%, test loss 0.5000" in capsys.readouterr().out
    cli.main(["--evaluate", str(tmp_path / "x.pt"), "--data-dir", "here"])
    assert [str(settings.data_dir) for settings in asked] == ["elsewhere", "here"]
    assert {settings.width for settings in asked} == {0.5}


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("checkpoint.pt", [], "holds no state_dict, where a state_dict of vgg11 at width 0.125, .* is expected .*--resume"),
        ("config.json", [], "is no file that torch.save wrote"),
        ("empty.pt", [], "is no file that torch.save wrote"),
        ("cut.pt", [], "is no file that torch.save wrote"),
        ("", [], "is a folder"),
        ("none.pt", [], "No such file"),
        ("hta-seed0.pt", ["--width", "0.25"], r"another network: features.0.weight is \(8, 3, 3, 3\), not \(16, 3, 3, 3\)"),
        ("hta-seed0.pt", ["--model", "vgg13"], "another network: features.* missing"),
        ("hta-seed0.pt", ["--no-batch-norm"], "another network"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_network_of_the_run_is_named(run, tmp_path, capsys, name, flags, message):
    shutil.copytree(run, tmp_path / "copy")
    (tmp_path / "copy" / "empty.pt").touch()
    (tmp_path / "copy" / "cut.pt").write_bytes((run / "hta-seed0.pt").read_bytes()[:5000])
    file = tmp_path / "copy" / name
    status, line = refused(["--evaluate", str(file), *flags], capsys)
    assert status == 1
    assert line.startswith(f"hta-train: {file}")
    assert re.search(message, line)


def nested(weight):
    return torch.nested.nested_tensor([weight[0].flatten(), weight[0, 0].flatten()])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weight: weight.to_sparse(), "features.0.weight is torch.sparse_coo, not torch.strided"),
        (lambda weight: weight.to("meta"), "features.0.weight is meta, not cpu"),
        (lambda weight: weight * (1 + 1j), "features.0.weight is torch.complex64, not torch.float32"),
        (lambda weight: weight.half(), "features.0.weight is torch.float16, not torch.float32"),
        (lambda weight: weight > 0, "features.0.weight is torch.bool, not torch.float32"),
        (nested, "holds no state_dict"),
        (None, "is no file that torch.save wrote"),
    ],
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_network_whose_tensors_would_not_be_taken_as_they_are_is_refused(run, tmp_path, capsys, change, message):
    state, file = torch.load(run / "hta-seed0.pt", weights_only=True), tmp_path / "hta-seed0.pt"
    shutil.copy(run / "config.json", tmp_path)
    if change is None:
        file.write_text(".")  # an empty stack, to an unpickler
    else:
        torch.save(state | {"features.0.weight": change(state["features.0.weight"])}, file)
    assert message in refused(["--evaluate", str(file)], capsys)[1]


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory"), KeyError()]
)
def test_memory_that_runs_out_in_a_test_is_said_in_a_line(tmp_path, monkeypatch, capsys, error):
    def fails(file, settings):
        raise error

    monkeypatch.setattr(cli, "evaluate_file", fails)
    if isinstance(error, KeyError):  # a bug keeps its traceback
        with pytest.raises(KeyError):
            cli.main(["--evaluate", str(tmp_path / "x.pt")])
        return
    assert refused(["--evaluate", str(tmp_path / "x.pt")], capsys)[1].startswith("hta-train: no memory left")


def test_a_configuration_that_is_none_is_named(tmp_path, capsys):
    for text in ("no JSON", "[]", '{"warmth": 1}', '{"lr": "high"}', '{"method": ["hta"]}', "[" * 200_000, "\ufeff{}"):
        (tmp_path / "config.json").write_text(text)
        line = refused(["--evaluate", str(tmp_path / "x.pt")], capsys)[1]
        assert f"{tmp_path / 'config.json'} is no run's configuration: " in line


# ------------------------------------------------------------------------------------------------------ epochs in lines


def row(**changes) -> report.Row:
    copies = changes.get("copies", 2)
    row = {"run": "HTA", "seed": 0, "epoch": 2, "copies": copies, "L": 0.01, "lr": 0.05, "images_per_second": 9.0}
    row |= {"test_accuracy": 63.0, "distance": 0.12, "train_loss": 1.25}
    return row | {f"test_accuracy_{i}": 60.0 + i for i in range(copies)} | changes


@pytest.mark.parametrize(
    "changes",
    [
        dict(copies=1, L=0.0, distance=0.0),
        dict(copies=2),
        dict(copies=8, L=math.inf),
        dict(copies=32, L=1e-5, lr=1.234e-7, distance=123456.0, train_loss=1e30, images_per_second=1234567.0),
        dict(train_loss=math.nan, skipped=390),
        dict(train_loss=math.inf, epoch=300, test_accuracy=100.0, test_accuracy_0=100.0, test_accuracy_1=100.0),
    ],
)
def test_an_epochs_line_stands_in_its_columns(changes):
    line = report.describe(row(**changes), 300)
    assert len(line) <= 79
    title = report.heading("HTA", 0).splitlines()[-1]
    for name in ("epoch", "test, %", "loss", "lr", "images/s", "skipped"):
        end = title.index(name) + len(name)
        assert line[end - 1] != " ", name  # right-aligned below its title
        assert line[end : end + 1] in ("", " "), name


def test_an_epochs_line_tells_what_went_wrong():
    assert report.describe(row(copies=3, L=math.inf), 9).split() == [
        "2/9", "inf", "0.12", "60.0..62.0", "63.00", "1.2500", "0.05", "9", "0"
    ]  # fmt: skip
    assert report.describe(row(train_loss=math.nan, skipped=7), 9).split()[-4:] == ["nan", "0.05", "9", "7"]
    assert report.describe(row(train_loss=math.inf), 9).split()[-4:] == ["inf", "0.05", "9", "0"]


def test_a_runs_first_line_stands_below_a_heading():
    assert report.describe(row(epoch=1), 9).splitlines()[:2] == ["", "HTA, seed 0"]
    assert "\n" not in report.describe(row(), 9)


def test_the_table_fits_80_columns():
    of_a_run = {"epochs": 300, "work": 2400, "accuracy_mean": 100.0, "accuracy_deviation": 10.12, "seconds": 12345.0}
    of_a_run |= {"test_loss_mean": math.nan, "images_per_second": 123456.0}
    lines = report.table({"runs": {"SGD, equal work": of_a_run, "HTA": of_a_run}}).splitlines()
    assert len(lines) == 4
    assert {len(line) for line in lines} == {len(lines[0])}
    assert len(lines[0]) <= 80


def test_the_table_says_whose_loss_it_has():
    of_a_run = {"epochs": 3, "work": 5, "accuracy_mean": 99.996, "accuracy_deviation": 0.1, "seconds": 1.0}
    of_a_run |= {"test_loss_mean": 0.25, "images_per_second": 10.0}
    head, _, line = (
        [cell.strip() for cell in line.split("|")] for line in report.table({"runs": {"SGD": of_a_run}}).splitlines()
    )
    assert dict(zip(head, line, strict=True))["test loss"] == "0.2500"
    assert dict(zip(head, line, strict=True))["test, %"] == "100.0 ± 0.10"


def summary_of(batches="shared", **accuracies):
    """A comparison's, with accuracies for each seed."""
    runs = {
        name.replace("_", " "): {"accuracies": of, "accuracy_mean": sum(of) / len(of)}
        for name, of in accuracies.items()
    }
    if "SGD equal work" in runs:
        runs["SGD, equal work"] = runs.pop("SGD equal work")
        runs["HTA"] = runs.pop("HTA")
    return {"runs": runs, "test_images": 400, "settings": {"dataset": "digits", "batches": batches, "epochs": 9}}


def words(summary):
    said = report.in_words(summary, Path("runs/x"), "hta-seed0.pt", "hta-train")
    assert max(map(len, said.splitlines())) <= 79
    return " ".join(said.split())


def test_the_words_call_a_difference_one_where_it_is_twice_its_paired_error():
    said = words(summary_of(SGD=[90.0, 91.0, 92.0], SGD_equal_work=[95.0, 96.5, 97.5], HTA=[90.5, 90.5, 93.5]))
    # Differences to SGD 0.5, −0.5, 1.5: mean 0.5, deviation 1; to equal work −4.5, −6, −4: mean −4.83, deviation 1.04.
    assert (
        "HTA is level with SGD at equal epochs (+0.5 ± 0.6 points), and 4.8 ± 0.6 points below SGD at equal work."
        in said
    )
    assert "standard error over 3 seeds" in said
    assert "in runs/x, curves.png shows every epoch, and hta-seed0.pt holds a trained network" in said


def test_the_words_of_one_run_have_the_error_of_an_accuracy_on_so_many_images():
    said = words(summary_of(SGD=[90.0], SGD_equal_work=[80.0], HTA=[90.0]))
    # √(90·10/400) = 1.5 and √(80·20/400) = 2 points.
    assert "level with SGD at equal epochs (+0.0 ± 2.1 points), and 10.0 ± 2.5 points above SGD at equal work" in said
    assert "one run's accuracy on 400 test images" in said
    said = words(summary_of(SGD=[90.0]))
    assert "SGD reaches 90.0 ± 1.5 %." in said
    assert said.endswith("hta-train --method compare")


@pytest.mark.parametrize("batches", ["shared", "own"])
def test_what_the_words_say_to_try_is_understood(batches):
    said = words(summary_of(batches, SGD=[90.0], HTA=[90.0])).replace(" \\", "").partition("hta-train ")[2]
    given = vars(cli.parser().parse_args(said.split()))
    assert (
        cli.anew({name: value for name, value in given.items() if name not in ("resume", "evaluate")}).batches == "own"
    )


def test_a_command_that_the_path_does_not_find_is_named_as_it_was_typed(monkeypatch):
    monkeypatch.setattr(sys, "argv", [".venv/bin/hta-train"])
    monkeypatch.setattr(shutil, "which", lambda command: None)
    assert terminal.called("hta-train") == ".venv/bin/hta-train"
    monkeypatch.setattr(shutil, "which", lambda command: "/usr/bin/hta-train")
    assert terminal.called("hta-train") == "hta-train"
    monkeypatch.setattr(sys, "argv", ["/x/pytest"])
    assert terminal.called("hta-train") == "hta-train"


# ------------------------------------------------------------------------------- where it writes, and how to go on there


def test_it_says_first_where_it_writes_and_how_to_go_on(tmp_path, capsys):
    out = tmp_path / "a run"
    cli.main([*FLAGS, "--out", str(out)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [f"writes to {out}; to go on after a stop:", f"  hta-train --resume '{out}'"]
    assert max(map(len, lines[3:-1])) <= 80
    assert lines[3] == "HTA, seed 0"


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device", "x"),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 13107200000 bytes"),
        ZeroDivisionError("a bug"),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("epochs", [0, 1])
def test_whatever_ends_it_it_says_how_to_go_on(tmp_path, monkeypatch, capsys, error, epochs):
    original = Trainer._epoch

    def epoch(self, run):
        if run.epoch == epochs:
            raise error
        return original(self, run)

    monkeypatch.setattr(Trainer, "_epoch", epoch)
    expected = ZeroDivisionError if isinstance(error, ZeroDivisionError) else SystemExit
    with pytest.raises(expected) as stop:
        cli.main([*FLAGS, "--out", str(tmp_path / "run")])
    lines = capsys.readouterr().err.splitlines()
    if expected is SystemExit:
        assert stop.value.code == 1
        said = "x: No space left on device" if isinstance(error, OSError) else "no memory left: it takes less with "
        assert lines.pop(0).startswith(f"hta-train: {said}")
    assert len(lines) == 1
    if (tmp_path / "run" / "checkpoint.pt").exists():
        assert lines[0].endswith(f"Go on with: hta-train --resume {tmp_path / 'run'}")
    else:
        assert lines[0] == "hta-train: no checkpoint yet: start it again"


def test_a_run_that_goes_on_has_its_heading(tmp_path, capsys):
    settings = replace(TINY, out=tmp_path / "run")
    asked = iter(i == 5 for i in range(99))  # four batches an epoch
    assert not Trainer(settings, stop=lambda: next(asked), report=lambda _: None).train()
    cli.main(["--resume", str(settings.out), "--threads", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[3] == "HTA, seed 0"
    assert [line.split()[0] for line in lines[4:7]] == ["epoch", "2/3", "3/3"]


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_is_acknowledged_at_once(tmp_path, times):
    out = tmp_path / "run"
    # A batch that takes a minute: only a second signal ends it at once.
    slow = "import time\nfrom hta_fused.train import cli, run\n"
    slow += f"before = run.Run.advance\nrun.Run.advance = lambda self: (print('batch', flush=True), time.sleep({2 if times == 1 else 60}), before(self))\n"
    slow += f"cli.main({[*FLAGS, '--out', str(out)]})"
    process = subprocess.Popen([sys.executable, "-c", slow], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while process.stdout.readline() != "batch\n":
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    sent = time.monotonic()
    while not (line := process.stderr.readline()).strip():
        assert process.poll() is None
    assert line == "hta-train: stopping after this batch; Ctrl-C again to stop now\n"
    assert time.monotonic() - sent < 1.5
    if times == 2:
        process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in error
    if times == 1:
        assert (
            error == f"hta-train: stopped by SIGINT; everything so far is saved. Go on with: hta-train --resume {out}\n"
        )
    else:
        assert "hta-train: " in error


def test_handlers_are_put_back(tmp_path):
    before = signal.getsignal(signal.SIGINT)
    cli.main([*FLAGS, "--out", str(tmp_path / "run")])
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("name", ["run", "caf\xe9", "z\udcff"])
@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_what_the_terminal_cannot_show_is_escaped(tmp_path, monkeypatch, encoding, name):
    """A ± and the name of a folder that is no text end no training; what has no encoding is left alone."""
    out, said = tmp_path / name, {}
    for main, argv in (
        (cli.main, [*FLAGS, "--method", "compare", "--seeds", "2", "--out", str(out)]),
        (cli.main, ["--resume", str(out)]),
        (paper_cli.main, ["path", "--quick", "--out", str(tmp_path / f"path-{name}")]),
    ):
        stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setattr(sys, "stderr", io.StringIO())
        main(argv)
        stream.flush()
        said[argv[0]] = stream.buffer.getvalue()
        assert os.fsencode(name) in said[argv[0]] or name.encode(encoding, "backslashreplace") in said[argv[0]]
    assert "±".encode(encoding, "backslashreplace") in said["--resume"]


@pytest.mark.parametrize("blank", ["", " "])
@pytest.mark.parametrize(("main", "argv"), [(cli.main, []), (paper_cli.main, ["map", "--out", "x"])])
def test_a_blank_argument_as_from_an_unset_variable_is_refused_in_a_line(main, argv, blank, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*argv, blank])
    assert stop.value.code == 2
    assert re.fullmatch(r"hta-\w+: .*\n", capsys.readouterr().err)
