"""Packages that are not installed: all else imports and works, and one line names the extra that brings them."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import hta_fused as hta
from hta_fused import extras
from hta_fused.paper import cli as reproduce
from hta_fused.paper import convergence, report, runs
from hta_fused.train import cli, data
from hta_fused.train.report import curves

ROOT = Path(__file__).parent.parent
OWN = {"hta_fused", "hta_fused_bench", "bench"}
REQUIRED = {"torch", "numpy"}
# What a backend finds or does without, and a benchmark for pytest itself.
OTHERS = {
    "kernels/triton.py": {"triton"},
    "kernels/triton_rows.py": {"triton"},
    "kernels/nvrtc.py": {"nvidia"},
    "bench/machine_code.py": {"triton"},
}
OTHERS |= {"bench/test_micro.py": {"pytest"}}
OPTIONAL = sorted({module for modules in extras.EXTRAS.values() for module in modules})


def hide(monkeypatch, *modules: str) -> None:
    """As if they were not installed, and nothing had imported them."""
    for module in modules:
        inside = [name for name in sys.modules if name.startswith(f"{module}.")]
        for name in (module, *inside):
            monkeypatch.setitem(sys.modules, name, None)


def imports(path: Path):
    """(module, extra) of every import in a file: the extra of the `with needs(...)` around it, or None."""

    def walk(node, extra):
        for child in ast.iter_child_nodes(node):
            inner = extra
            if isinstance(child, ast.With):
                call = child.items[0].context_expr
                if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "needs":
                    inner = call.args[0].value
            if isinstance(child, ast.Import):
                yield from ((alias.name.split(".")[0], extra) for alias in child.names)
            elif isinstance(child, ast.ImportFrom) and not child.level:
                yield child.module.split(".")[0], extra
            yield from walk(child, inner)

    return list(walk(ast.parse(path.read_text(encoding="utf-8")), None))


@pytest.mark.parametrize("path", sorted([*ROOT.glob("hta_fused/**/*.py"), *ROOT.glob("bench/**/*.py")]), ids=str)
def test_every_import_of_what_may_be_missing_names_its_extra(path):
    room = "bench" if path.is_relative_to(ROOT / "bench") else path.parent.name
    others = next((modules for end, modules in OTHERS.items() if str(path).endswith(end)), set())
    for module, extra in imports(path):
        if module in sys.stdlib_module_names or module in OWN | REQUIRED | others:
            continue
        assert extra == room, f"{path} imports {module} under {extra}"
        assert module in extras.EXTRAS[extra]


def test_the_scan_sees_an_import_wherever_it_stands(tmp_path):
    file = tmp_path / "x.py"
    file.write_text("import a.b\ndef f():\n  with needs('path'):\n    from c.d import e\n  import g, h\n")
    assert imports(file) == [("a", None), ("c", "path"), ("g", None), ("h", None)]


def test_everything_imports_and_steps_without_the_optional_packages():
    code = f"""
import importlib, pkgutil, sys
sys.modules.update(dict.fromkeys({OPTIONAL}))
import torch, hta_fused as hta
for module in pkgutil.walk_packages(hta.__path__, "hta_fused."):
    if module.name not in ("hta_fused.kernels.triton", "hta_fused._C") and not module.name.endswith("__main__"):
        importlib.import_module(module.name)
replicas = hta.Replicas(torch.nn.Linear(4, 4), partition={{"weight": 1}})
hta.HomotopySGD(replicas, 0.1, 0.9).step()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("module", "extra", "call"),
    [
        ("scipy", "path", lambda: hta.path.track(hta.problems.chow, x0=[5.0, 0.0], Ls=[1.0, 0.1])),
        ("scipy", "paper", lambda: runs.interval([1.0, 2.0])),
        ("sklearn", "paper", convergence.cancer),
        ("sklearn", "train", data.digits),
        ("tqdm", "train", lambda: data.fetch("file:///nowhere", Path("nowhere"), "")),
        ("tqdm", "paper", lambda: report.say("a line")),
        ("matplotlib", "paper", report.pyplot),
        ("matplotlib", "train", lambda: curves([], Path("nowhere"))),
    ],
)
def test_what_is_missing_is_named_with_its_extra(module, extra, call, monkeypatch):
    hide(monkeypatch, module)
    with pytest.raises(ModuleNotFoundError) as caught:
        call()
    assert str(caught.value) == f"hta_fused.{extra} needs {module}: pip install 'hta_fused[{extra}]'"
    assert caught.value.name.split(".")[0] == module


def test_many_starts_are_tracked_without_scipy(monkeypatch):
    hide(monkeypatch, "scipy")
    assert hta.path.track_many(lambda x: x.square().sum(-1), torch.tensor([[5.0, 0.0]]), Ls=[1.0, 0.1]).x.shape == (
        1,
        2,
    )


def test_an_error_inside_an_optional_package_is_its_own():
    with pytest.raises(ImportError, match="undefined symbol"), extras.needs("path"):
        raise ImportError("undefined symbol")


def commands():
    yield "hta-train", "train", lambda: cli.main([])
    yield "hta-reproduce", "paper", lambda: reproduce.main(["table1", "--out", "nowhere"])
    try:
        import hta_fused_bench.cli as bench
    except ImportError:  # a checkout that was not installed
        return
    yield "hta-bench", "bench", lambda: bench.main(["ops", "--out", "nowhere"])


@pytest.mark.parametrize(("name", "extra", "call"), list(commands()))
def test_commands_refuse_to_begin_without_what_they_need(name, extra, call, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for module in extras.EXTRAS[extra]:
        with monkeypatch.context() as patch:
            hide(patch, module)
            with pytest.raises(SystemExit) as caught:
                call()
        package = "hta_fused_bench" if extra == "bench" else f"hta_fused.{extra}"
        assert caught.value.code == 1
        assert capsys.readouterr().err == f"{name}: {package} needs {module}: pip install 'hta_fused[{extra}]'\n"
    assert not list(tmp_path.iterdir())
