"""The package as people meet it: the README's code, wheels in a clean environment, an install without a compiler."""

import email
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import hta_fused as hta
from hta_fused.extras import EXTRAS

ROOT = Path(__file__).parent.parent
SMOKE = """
import sys, torch, hta_fused as hta
assert sys.prefix in hta.__file__, hta.__file__
theta, eta, g, h = (torch.randn(3000) for _ in range(4))
hta.homotopy_step_(theta, eta, g, h, None, None, None, None, L=0.0, lr=0.1)
assert torch.equal(theta, eta)
model = torch.nn.Linear(4, 4)
replicas = hta.Replicas(model, partition={"weight": 1})
hta.HomotopySGD(replicas, 0.1, 0.9).step()
print(hta.backends()["cpu"])
"""


def test_the_readmes_code_runs_and_is_short():
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len([line for line in block.splitlines() if line.strip()]) < 25
    scope: dict = {}
    exec(block, scope)
    assert scope["optimizer"].stats.distance == 0
    assert scope["merged"](scope["inputs"]).shape == (256, 2)


def test_every_public_name_is_documented():
    for name in hta.__all__:
        assert (getattr(hta, name).__doc__ or "").strip(), name
    assert (ROOT / "hta_fused" / "py.typed").exists()


@pytest.mark.parametrize("command", ["train", "paper", "bench"])
def test_an_import_brings_neither_torchs_compiler_nor_what_an_extra_installs(command):
    """They would make every start one or two seconds longer, --help too."""
    package = "hta_fused_bench" if command == "bench" else f"hta_fused.{command}"
    heavy = {"torch._dynamo", "torch._inductor", "sympy", "triton", "scipy", "matplotlib", "sklearn"}
    code = f"import sys, torch; torchs = set(sys.modules); import {package}.cli; print(*({heavy} & (sys.modules.keys() - torchs)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def build_wheel(source: Path, folder: Path, **environment: str) -> tuple[Path, str]:
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-v",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(folder),
        str(source),
    ]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = folder.glob("*.whl")
    return wheel, done.stdout + done.stderr


@pytest.fixture
def source(tmp_path):
    """The sources as a clean checkout has them."""
    for name in ("csrc", "hta_fused", "bench"):
        shutil.copytree(ROOT / name, tmp_path / "source" / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / "source" / name)
    return tmp_path / "source"


def install_and_smoke(wheel: Path, folder: Path) -> subprocess.CompletedProcess:
    """A new environment that shares this one's torch and nothing else of ours."""
    venv.create(folder, with_pip=False, symlinks=True)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(site), str(wheel)], check=True
    )
    (site / "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "HTA_"))}
    return subprocess.run(
        [str(folder / "bin" / "python"), "-c", SMOKE], capture_output=True, text=True, cwd=folder, env=environment
    )


def test_without_a_compiler_the_install_succeeds_and_says_so(source, tmp_path):
    wheel, log = build_wheel(source, tmp_path / "dist", CXX="no-such-compiler")
    assert "no C++ compiler ('no-such-compiler' is not on the PATH)" in log
    assert "slower pure-PyTorch backend will serve" in log
    done = install_and_smoke(wheel, tmp_path / "env")
    assert done.returncode == 0, done.stderr
    assert "the extension was not built" in done.stdout
    assert "several times slower" in done.stderr


@pytest.fixture(scope="module")
def project() -> dict:
    """pyproject.toml's [project]."""
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 reads pyproject.toml")
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def extra(project: dict, name: str) -> list[Requirement]:
    """What an extra installs, through other extras too."""
    found = []
    for wanted in map(Requirement, project["optional-dependencies"][name]):
        if wanted.name != "hta_fused":
            found.append(wanted)
        for other in wanted.extras:
            found += extra(project, other)
    return found


def test_the_extras_bring_what_the_package_imports(project):
    for name, modules in EXTRAS.items():
        assert {r.name for r in extra(project, name)} == {"scikit-learn" if m == "sklearn" else m for m in modules}


@pytest.mark.parametrize(
    ("file", "extras"), [("requirements.txt", ("dev",)), ("tests/clients/requirements.txt", ("clients",))]
)
def test_the_pins_lie_in_the_ranges_that_the_metadata_state(project, file, extras):
    pins = dict(line.split("==") for line in (ROOT / file).read_text().splitlines() if not line.startswith("#"))
    wanted = [*map(Requirement, project["dependencies"]), *(r for name in extras for r in extra(project, name))]
    for requirement in wanted:
        assert requirement.specifier.contains(pins[requirement.name]), requirement


def test_the_sdist_is_whole_and_its_metadata_are_the_projects(source, project, tmp_path):
    """Made where there is no compiler, as anybody might: the sources must be in it all the same."""
    shutil.copytree(ROOT / "tests", source / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    (source / "hta_fused" / "_C.so").touch()  # left by a build in place
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(tmp_path)!r})"
    environment = {**os.environ, "CXX": "no-such-compiler"}
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("*.tar.gz")
    assert path.name == f"hta_fused-{hta.__version__}.tar.gz"
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
        metadata = email.message_from_bytes(archive.extractfile(f"{path.name[:-7]}/PKG-INFO").read())
    for folder in ("csrc", "hta_fused", "tests"):
        for file in (ROOT / folder).rglob("*.*"):
            if file.suffix not in (".so", ".pyc"):
                assert str(file.relative_to(ROOT)) in names
    assert {"setup.py", "pyproject.toml", "LICENSE", "bench/triad.cpp", "bench/gpu/cli.py"} <= names
    assert not [name for name in names if name.endswith((".so", ".pyc"))]
    assert metadata["Version"] == hta.__version__
    assert metadata["License-Expression"] == "MIT"
    assert metadata["Requires-Python"] == project["requires-python"]
    assert set(metadata.get_all("Provides-Extra")) == {*EXTRAS, "clients", "dev"}
    required = [Requirement(text) for text in metadata.get_all("Requires-Dist") if "extra ==" not in text]
    assert {str(r) for r in required} == set(project["dependencies"])


@pytest.mark.skipif(not hta.backends()["cpu"].startswith("available"), reason="no C++ compiler")
@pytest.mark.parametrize("found", ["", "2.9.1", "this one"])
def test_pip_is_asked_for_torch_only_where_there_is_none_that_serves(source, tmp_path, found):
    """As under build isolation: setuptools is on the path, and what is installed here is not."""
    here, place = Path(sysconfig.get_path("purelib")), tmp_path / "site"
    place.mkdir()
    if found:
        (place / "torch.dist-info").mkdir()
        (place / "torch.dist-info" / "METADATA").write_text(f"Name: torch\nVersion: {found}\n")
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "setuptools").symlink_to(here / "setuptools")
    code = f"""
import site, sys
sys.path = [path for path in sys.path if not path.endswith("-packages")]
site.getsitepackages, site.getusersitepackages = list, lambda: {str(here if found == "this one" else place)!r}
from setuptools import build_meta
print(build_meta.get_requires_for_build_wheel())
"""
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "tools")}
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == ("[]" if found == "this one" else "['torch>=2.10']")


def setup_py(**environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "setup.py", "build_ext", "--build-temp", "/nowhere/temp", "--build-lib", "/nowhere/lib"]
    environment = {**os.environ, **environment}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)


def test_hta_cuda_1_fails_where_there_is_no_nvcc(tmp_path):
    path = {name: str(tmp_path) for name in ("CUDACXX", "CUDA_HOME", "CUDA_PATH")}
    for tool in ("c++", "gcc", "g++", "ninja", "which"):
        if shutil.which(tool):
            (tmp_path / tool).symlink_to(shutil.which(tool))
    if Path("/usr/local/cuda/bin/nvcc").exists():
        pytest.skip("setup.py finds this machine's nvcc whatever the PATH says")
    done = setup_py(HTA_CUDA="1", PATH=str(tmp_path), **path)
    assert done.returncode != 0
    assert "HTA_CUDA=1, but there is no nvcc" in done.stderr


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
@pytest.mark.parametrize("asked", ["1.3", "Volta", "9.0;3.5"])
def test_a_target_that_the_toolkit_cannot_serve_is_named(asked):
    done = setup_py(HTA_CUDA="1", TORCH_CUDA_ARCH_LIST=asked)
    assert done.returncode != 0
    assert f"TORCH_CUDA_ARCH_LIST asks for {asked.split(';')[-1]!r}, which" in done.stderr


def test_an_unknown_hta_cuda_is_refused():
    done = setup_py(HTA_CUDA="yes")
    assert done.returncode != 0
    assert "HTA_CUDA must be auto, 1 or 0, got 'yes'" in done.stderr


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_the_extension_has_its_cuda_kernels_beside_any_torch():
    """The build that these tests run has them, and has loaded, whether this torch knows CUDA or not."""
    state = hta.backends()["cuda"]
    assert state == "available" or re.search(r"the extension has kernels for .*\d\d|kernels for", state), state
