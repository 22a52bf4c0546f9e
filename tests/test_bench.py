"""The benchmarks in their quick mode, so that they never rot, and the arithmetic they rest on."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from processes import run

import hta_fused as hta

try:
    from hta_fused_bench import cli, distributed, formats, measure, rivals, workloads
except ImportError:  # a checkout that was not installed, as `make gpu` has it
    from bench import cli, distributed, formats, measure, rivals, workloads


@pytest.mark.parametrize("what", ["ops", "step", "scaling", "train", "copies", "formats", "memory", "distributed"])
def test_quick_mode_leaves_a_table_a_json_and_a_picture(tmp_path, capsys, what):
    rounds = [] if what == "memory" else ["--rounds", "2"]
    cli.main([what, "--quick", *rounds, "--out", str(tmp_path)])
    assert "| ---" in capsys.readouterr().out
    content = json.loads((tmp_path / f"{what}-quick.json").read_text())
    assert {"processor", "threads", "torch", "date"} <= set(content["machine"])
    assert (tmp_path / f"{what}-quick.png").read_bytes()[:4] == b"\x89PNG"
    cli.main(["report", str(tmp_path)])
    assert f"![{what}-quick]({what}-quick.png)" in (tmp_path / "report.md").read_text()


@pytest.mark.skipif(not formats.countable(), reason="no extension, or no process may be traced here")
def test_instructions_are_counted():
    assert 2 < formats.per_element("float32", "SGD", 1, "avx2") < 8


def test_a_wrong_rival_is_caught(monkeypatch):
    def wrong(problem):
        right = rivals.eager(problem)

        def step():
            right()
            problem.copies[1][0].add_(1e-3)

        return step

    monkeypatch.setitem(rivals.COUPLED, "wrong", wrong)
    with pytest.raises(AssertionError, match="wrong and hta_fused disagree"):
        measure.contenders(lambda: workloads.flat(5000), names=["wrong"])


def complaints(rank, size):
    def sends_nothing(net, period):
        return replace(distributed.independent(net, period), sends=distributed.size_of(net) / period)

    wrong = {distributed.LOCAL: sends_nothing, distributed.OURS: distributed.independent}
    errors = []
    for name, way in wrong.items():
        distributed.WAYS[name] = way
        with pytest.raises(AssertionError) as caught:
            distributed.check(distributed.Task(size), rank, torch.device("cpu"), [name])
        errors.append(str(caught.value))
    return errors


def test_a_wrong_rival_among_processes_is_caught():
    for count, leaves in run(complaints, 2):
        assert "sent 0 bytes in 3 steps, not" in count
        assert f"{distributed.OURS} and hta_fused disagree" in leaves


def test_the_model_of_a_network_has_its_limits_right():
    fast = distributed.Machine(1e9, 0.3, 1e12, 1e30, 1e30, 0.0)
    slow = replace(fast, network=1e6, network_bf16=1e6)
    assert fast.step(distributed.DDP, 8, 1) == pytest.approx(0.3 + 28e9 / 1e12)
    assert fast.step(distributed.OURS, 8, 1) == pytest.approx(0.3 + 44e9 / 1e12)
    for name, bytes_ in ((distributed.DDP, 4e9), (distributed.OURS, 4e9), (distributed.OURS_BF16, 2e9)):
        assert slow.step(name, 8, 1) == pytest.approx(2 * 7 / 8 * bytes_ / 1e6, rel=1e-3)
    assert slow.step(distributed.OURS_EVERY, 8, 64) == pytest.approx(slow.step(distributed.OURS, 8, 1) / 64, rel=0.01)
    assert slow.step(distributed.INDEPENDENT, 8, 1) == fast.step(distributed.INDEPENDENT, 8, 1)


@pytest.mark.parametrize("labels", ["structural", "random"])
@pytest.mark.parametrize("anchor", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("copies", "proposal"), [(1, "AdamW"), (2, "SGD"), (3, "AdamW")])
def test_every_rival_does_what_ours_does(labels, anchor, dtype, copies, proposal):
    shapes = [torch.Size([6, 4, 3, 3]), torch.Size([6]), torch.Size([700, 5])]
    options = dict(copies=copies, proposal=proposal, labels=labels, anchor=anchor, dtype=dtype)
    measure.contenders(lambda: workloads.of_shapes("x", shapes, **options))


@pytest.mark.parametrize("proposal", ["SGD", "AdamW"])
def test_every_rival_keeps_low_copies_of_its_masters(proposal):
    options = dict(copies=2, proposal=proposal, compute_dtype=torch.bfloat16)
    load, steps, _ = measure.contenders(lambda: workloads.flat(3000, **options))
    for name in (*rivals.COUPLED, *rivals.FLOORS):
        load.problem.low[1][0].zero_()
        steps[name]()
        assert torch.equal(load.problem.low[1][0], load.problem.copies[1][0].bfloat16()), name


@pytest.mark.parametrize(
    ("name", "tensors", "elements"),
    [("vgg16", 32, 15_245_130), ("resnet50", 161, 25_557_032), ("transformer-124m", 148, 124_439_808)],
)
def test_workloads_have_their_models_sizes(name, tensors, elements):
    shapes = workloads.MODELS[name]()
    assert (len(shapes), sum(s.numel() for s in shapes)) == (tensors, elements)


def test_bytes_per_element_stay_within_the_budget():
    assert workloads.flat(1_000_000).bytes_per_element < 44.2
    assert workloads.flat(1_000_000, anchor=False).bytes_per_element < 40.2
    assert 45 < workloads.flat(1_000_000, labels="random").bytes_per_element < 45.2
    low = workloads.flat(
        1_000_000, compute_dtype=torch.bfloat16
    )  # gradients half as large, and copies as large as they
    assert low.bytes_per_element == pytest.approx(workloads.flat(1_000_000).bytes_per_element)


def test_times_are_compared_round_by_round():
    """The machine is twice as slow in every second round."""
    times = measure.Times({"a": [1.0, 2.0, 1.0, 2.0, 1.0], "b": [1.5, 3.0, 1.5, 3.0, 1.5]})
    assert times["a"] == (1.0, 0.5)
    assert times.all_over("a") == {"a": (1.0, 0.0), "b": (1.5, 0.0)}
    result = {"title": "", "base": "a", "times": times}
    assert "| b | 1500 ± 7.5e+02 | 1.50 ± 0.00 |" in measure.show({**result, "ratios": times.all_over("a")})
    assert "| b | 1500 ± 7.5e+02 | 1.50 ± 0.75 |" in measure.show(result)  # of a file from before


def test_a_line_fits_a_line():
    assert measure.fitted_exponent([1, 10, 100], [2.0, 20.0, 200.0]) == pytest.approx(1)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["step", "--models", "lenet"], "--models must be among vgg11"),
        (["ops", "--rounds", "1"], "--rounds must be at least 2, got 1"),
        (["copies", "--copies", "0"], "--copies must be from 1 to 32, got 0"),
        (["copies", "--proposals", "Lion"], "--proposals must be among SGD, AdamW"),
        (["copies", "--against", "/nowhere"], "--against must be a checkout of hta_fused, got /nowhere"),
        (["copies", "--against", "/tmp"], "--against must be a checkout of hta_fused, got /tmp"),
        (["copies", "--against", __file__], f"--against {__file__} is a file, not a folder"),
        (["copies", " "], "unknown argument ' '"),
        (["report", "/nowhere"], "/nowhere holds no results"),
        (["ops", "--threads", "9999"], "--threads must be at most "),
        (["distributed", "--processes", "1"], "--processes must be from 2 to 32, got 1"),
        (["distributed", "--processes", "two"], "--processes must be a whole number, got 'two'"),
        (["ops", "--round", "3"], "unknown flag --round: did you mean --rounds?"),
        (["memory", "--proposals", "SGD"], "--proposals is another command's flag: see --help"),
        (["ops", "--out", __file__], f"--out {__file__} is a file, not a folder"),
        (["ops", "--quick", "--out", ""], "--out must be a path, got ''"),
        (["copies", "--quick", "--against", ""], "--against must be a path, got ''"),
        (["report", ""], "FOLDER must be a path, got ''"),
        (
            ["opps"],
            "WHAT must be one of step, copies, ops, scaling, formats, memory, train, concurrent, distributed, report, got 'opps'",
        ),
    ],
)
def test_nonsense_is_answered_in_a_line(argv, message, capsys, monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", None)  # 9999 of them would take the machine down
    with pytest.raises(SystemExit):
        cli.main(argv)
    error = capsys.readouterr().err
    assert error.startswith("hta-bench: ")
    assert error.count("\n") == 1
    assert message in error


@pytest.mark.parametrize(
    ("error", "said"),
    [(KeyboardInterrupt(), "stopped; nothing was written"), (MemoryError(), "no memory left; nothing was written")],
)
def test_what_ends_a_measurement_is_said_in_a_line(tmp_path, monkeypatch, capsys, error, said):
    def measured(_):
        yield {"title": "x", "times": {}}
        raise error

    monkeypatch.setitem(cli.WHAT, "ops", (measured, ""))
    monkeypatch.setattr(measure, "show", str)
    with pytest.raises(SystemExit) as stop:
        cli.main(["ops", "--quick", "--out", str(tmp_path / "out")])
    assert stop.value.code == (130 if isinstance(error, KeyboardInterrupt) else 1)
    assert capsys.readouterr().err == f"hta-bench: {said}\n"
    assert not list(tmp_path.iterdir())


def test_another_checkouts_step_is_timed_in_the_same_rounds(tmp_path):
    root = Path(measure.__file__).resolve().parent.parent
    with measure.Elsewhere(root, 5000) as other:
        result = measure.copies(2, "SGD", 5000, 2, other)
    assert other.name == f"version {hta.__version__} in {root.name}"
    assert result["times"][other.name][0] > 0
    assert result["claims"][-1]["what"] == f"ours over {other.name}"
    with pytest.raises(ValueError, match="stopped with status 1"):
        measure.Elsewhere(tmp_path / "..", 5000).__enter__()


@pytest.mark.parametrize("content", ["3", "[]", '{"results": []}', '{"results": [1]}'])
def test_a_report_passes_over_what_is_none_of_ours(tmp_path, content, capsys):
    (tmp_path / "other.json").write_text(content)
    with pytest.raises(SystemExit):
        cli.main(["report", str(tmp_path)])
    assert capsys.readouterr().err.endswith("holds no results of hta-bench\n")


MACHINE = {"processor": "x", "threads": 1, "torch": "2", "date": "today"}


@pytest.mark.parametrize(
    "content",
    [
        b'{"results": [',
        b"[" * 200_000,
        b"\xff",
        {"results": [{"title": "x"}], "machine": {}, "command": "c"},
        {"results": [{"title": "x"}], "machine": "mine", "command": "c"},
        {"results": [{}], "machine": MACHINE, "command": "c"},
        {"results": [{"title": "x"}], "machine": MACHINE, "command": "c"},
        {"results": [{"title": "x", "rows": []}], "machine": MACHINE, "command": "c"},
        {"results": {"title": "x"}, "machine": MACHINE, "command": "c"},
    ],
    ids=["cut", "deep", "no text", "no machine", "a text", "untitled", "empty", "no rows", "no list"],
)
def test_a_report_names_the_file_that_it_cannot_read_and_writes_nothing(tmp_path, content, capsys):
    rows = {"title": "ours", "rows": [{"a": 1}]}
    (tmp_path / "a.json").write_text(json.dumps({"results": [rows], "machine": MACHINE, "command": "c"}))
    (tmp_path / "b.json").write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    with pytest.raises(SystemExit):
        cli.main(["report", str(tmp_path)])
    error = capsys.readouterr().err
    assert error.startswith(f"hta-bench: {tmp_path / 'b.json'} is no result of hta-bench: ")
    assert error.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"a.json", "b.json"}
