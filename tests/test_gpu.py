"""What is particular to the kernels for GPUs: low precision, alignment, their compilers, the choice between them.

Without a GPU they run here in Triton's interpreter and in the emulator (conftest.py), and are compiled for real cards.
"""

import collections
import contextlib
import dataclasses
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import emulation
import pytest
import torch
from conftest import AVAILABLE, GPU_BACKENDS, LABELS, pattern, relative_error

import hta_fused as hta
from hta_fused import nvrtc_ops, ops, reference
from hta_fused.train import Settings, Trainer, graphs, run

LOW = (torch.bfloat16, torch.float16)
USUAL = dict(L=0.05, lr=0.1, momentum=0.9, weight_decay=1e-3)
needs_gpu_backend = pytest.mark.parametrize("backend", GPU_BACKENDS, indirect=True)


def both(tensors, labels, **settings):
    """The step by the backend and by the reference, over clones: the buffers each leaves, and its stats."""
    name, results = ops._wanted, []
    for backend in (name, "reference"):
        hta.use_backend(backend)
        used = {k: None if t is None else t.clone() for k, t in tensors.items()}
        stats = torch.zeros(4, dtype=torch.float64)
        hta.homotopy_step_(**used, labels=labels, stats=stats, **settings)
        results.append((used, stats))
    hta.use_backend(name)
    return results


def step_tensors(n, dtype, low=None):
    names = ("theta", "eta", "grad_theta", "grad_eta", "momentum_theta", "momentum_eta", "anchor")
    tensors = {name: torch.randn(n).to(dtype) for name in names}
    if low is not None:
        for name in ("grad_theta", "grad_eta"):
            tensors[name] = tensors[name].to(low)
        tensors |= {"low_theta": torch.zeros(n, dtype=low), "low_eta": torch.zeros(n, dtype=low)}
    return tensors


def assert_same(ours, theirs, rounding: bool):
    """The same bits, or the neighbouring number where Triton's interpreter rounds to bfloat16 in its own way."""
    for name, tensor in ours[0].items():
        wanted = theirs[0][name]
        if tensor is not None and rounding and tensor.dtype in LOW:
            assert relative_error(tensor, wanted) < 2**-7, name
        elif tensor is not None:
            assert torch.equal(tensor, wanted), name
    assert torch.allclose(ours[1], theirs[1], rtol=1e-6)


@pytest.mark.parametrize("backend", [name for name in AVAILABLE if name != "reference"], indirect=True)
@pytest.mark.parametrize("kind", LABELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *LOW])
@pytest.mark.parametrize("n", [1, 1025, 4097, 9001])
def test_kernels_leave_the_references_bits(backend, n, dtype, kind):
    if backend == "cpu" and dtype in LOW:
        pytest.skip("on the CPU the reference serves low precision")
    ours, theirs = both(step_tensors(n, dtype), pattern(kind, n)[0], **USUAL)
    assert_same(ours, theirs, rounding=backend == "triton")


@needs_gpu_backend
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("low", LOW)
@pytest.mark.parametrize("n", [3, 1024, 5000])
def test_low_gradients_step_float32_masters_and_their_low_copies(backend, n, low, momentum):
    tensors = step_tensors(n, torch.float32, low)
    ours, theirs = both(tensors, pattern("mixed", n)[0], **{**USUAL, "momentum": momentum}, grad_scale=4.0)
    assert_same(ours, theirs, rounding=backend == "triton")
    assert relative_error(ours[0]["low_eta"], ours[0]["eta"]) < 2**-7
    assert not torch.equal(ours[0]["theta"], tensors["theta"])


@pytest.mark.parametrize("low", LOW)
def test_without_low_copies_none_are_written(low):
    tensors = step_tensors(2000, torch.float32, low)
    del tensors["low_theta"], tensors["low_eta"]
    wide = {k: v.double() for k, v in tensors.items()}
    hta.homotopy_step_(**tensors, labels=None, **USUAL)
    hta.homotopy_step_(**wide, labels=None, **USUAL)
    assert relative_error(tensors["theta"], wide["theta"]) < 1e-6


@needs_gpu_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_penalty_in_any_dtype(backend, dtype):
    theta, eta, anchor = (torch.randn(5003).to(dtype) for _ in range(3))
    labels, per_element = pattern("mixed", 5003)
    value, *grads = ops.kernels(theta).penalty(theta, eta, anchor, *ops._pattern(labels, theta), 0.3)
    wanted = reference.penalty(theta, eta, anchor, None, per_element, 0.3)
    tolerance = 1e-6 if dtype == torch.float32 else 2**-7
    for ours, theirs in zip((value, *grads), wanted, strict=True):
        assert ours.dtype == dtype
        assert relative_error(ours, theirs) < tolerance


@needs_gpu_backend
@pytest.mark.parametrize("shift", [1, 2, 5])
@pytest.mark.parametrize("which", ["all", "theta", "anchor"])
@pytest.mark.parametrize("n", [1, 1024, 4099])
def test_buffers_may_start_anywhere_and_nothing_beyond_them_is_touched(backend, n, which, shift):
    tensors = step_tensors(n, torch.float32)
    framed = {}
    for name, tensor in tensors.items():
        frame = torch.full((n + 32,), 7.0)
        start = 8 + (shift if which in ("all", name) else 0)
        frame[start : start + n] = tensor
        framed[name] = frame, start
    labels = torch.randint(0, 3, (n + 1,), dtype=torch.uint8)[1:]
    views = {name: frame[start : start + n] for name, (frame, start) in framed.items()}
    for shifted, tensor in ((views, views), (tensors, None)):
        hta.use_backend(backend if tensor is not None else "reference")
        hta.homotopy_step_(**shifted, labels=labels, **USUAL)
    for name, (frame, start) in framed.items():
        assert torch.equal(frame[start : start + n], tensors[name]), name
        assert (frame[:start] == 7).all(), name
        assert (frame[start + n :] == 7).all(), name


@needs_gpu_backend
def test_codes_that_name_nothing_are_read_as_harmless(backend):
    """On a GPU nobody can look at the codes without waiting; they must not lead outside the tables."""
    n = 3 * 1024
    theta, eta, g, h = (torch.randn(n) for _ in range(4))
    codes = torch.tensor([[99, 1], [0, 77], [-5, -9]], dtype=torch.int32)
    stats = torch.zeros(4, dtype=torch.float64)
    hyper, tables = (t.to(stats.device) for t in ops._coefficients(0.1, 0.1, 0.0, 0.0, False, "implicit"))
    ops.kernels(theta).step_(
        theta, eta, g, h, None, None, None, None, None, codes, None, hyper, tables, None, None, stats, False
    )
    assert theta.isfinite().all()
    assert stats[2] == 0


# -------------------------------------------------------------------------------------------------- the emulator itself

needs_emulator = pytest.mark.skipif(emulation.COMPILER is None, reason="no C++ compiler")


@needs_emulator
@pytest.mark.parametrize(
    ("was", "planted"),
    [
        ("  __syncthreads();\n\n  double sums[3]", "  double sums[3]"),  # no barrier before the coefficients are read
        ("int distance = 16; distance > 0", "int distance = 8; distance > 0"),  # half a warp's sums are lost
        ("const int slot = int((i - begin) / kTile);\n    const A*", "const int slot = 0;\n    const A*"),  # another tile's rule
        ("for (int64_t i = whole + threadIdx.x; i < end", "for (int64_t i = whole + threadIdx.x; i < end - 1"),  # a tail's end
    ],
    ids=["barrier", "warp", "tile", "tail"],
)  # fmt: skip
def test_a_planted_mistake_shows_in_the_emulator(monkeypatch, tmp_path, was, planted):
    for name in ("homotopy.h", "kernels.h", "cuda.cuh"):
        text = (nvrtc_ops.SOURCE / name).read_text()
        if name == "cuda.cuh":
            assert text.count(was) == 1
            text = text.replace(was, planted)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(nvrtc_ops, "SOURCE", tmp_path)
    broken = emulation.library.__wrapped__()
    monkeypatch.setattr(emulation, "library", lambda: broken)
    monkeypatch.setattr(nvrtc_ops, "launch", emulation.launch)
    monkeypatch.setattr(nvrtc_ops, "why_not", lambda device: "")
    hta.use_backend("nvrtc")
    try:
        ours, theirs = both(step_tensors(5001, torch.float32), pattern("mixed", 5001)[0], **USUAL)
    finally:
        hta.use_backend(None)
    with pytest.raises(AssertionError):
        assert_same(ours, theirs, rounding=False)


# ------------------------------------------------------------------------------------------------------- the compilers


def resources(cubin: bytes, folder: Path) -> dict[str, int]:
    """Registers, stack and local memory of the one kernel in a cubin."""
    triton = pytest.importorskip("triton")
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    (folder / "kernel.cubin").write_bytes(cubin)
    text = subprocess.run([tool, "-res-usage", folder / "kernel.cubin"], capture_output=True, text=True, check=True)
    found = re.findall(r"(REG|STACK|LOCAL):(\d+)", text.stdout)
    assert len(found) == 3
    return {key: int(value) for key, value in found}


def nvrtc_targets() -> list[str]:
    try:
        nvrtc_ops.nvrtc()
    except OSError:
        return []
    known = []
    for capability in ((6, 0), (7, 0), (7, 5), (8, 0), (9, 0)):
        try:
            known.append(nvrtc_ops.target(capability))
        except RuntimeError:
            continue
    return known


@needs_emulator
@pytest.mark.parametrize("arch", nvrtc_targets())
def test_nvrtc_compiles_every_kernel_without_spills(arch, tmp_path, monkeypatch):
    monkeypatch.setenv("HTA_CACHE_DIR", str(tmp_path / "cache"))
    for name in emulation.library().kernel_names().decode().split():
        expression = "hta::gpu::" + re.sub(r"\b(Half|BFloat16)\b", r"hta::\1", name)
        _, cubin = nvrtc_ops.compile_kernel(expression, arch)
        used = resources(cubin, tmp_path)
        assert used["STACK"] == used["LOCAL"] == 0, name
        # 256 threads: three blocks on a multiprocessor for float32, two for all others.
        assert used["REG"] <= (80 if name.startswith("step_kernel<float") else 128), name


@pytest.mark.skipif(not nvrtc_targets(), reason="no NVRTC")
@pytest.mark.parametrize(
    ("kernel", "loads", "stores"),
    [("step_kernel<float, float, true>", 7, 4), ("penalty_kernel<float>", 5, 2), ("guard_kernel<float, float>", 2, 0),
     ("step_kernel<hta::BFloat16, hta::BFloat16, true>", 7, 4), ("step_kernel<float, hta::Half, true>", 5, 4)],
)  # fmt: skip
def test_nvrtc_kernels_move_16_bytes_at_a_time(kernel, loads, stores, tmp_path, monkeypatch):
    monkeypatch.setenv("HTA_CACHE_DIR", str(tmp_path))
    _, ptx = nvrtc_ops.compile_kernel(f"hta::gpu::{kernel}", nvrtc_targets()[0], ptx=True)
    wide = collections.Counter(re.findall(r"(ld|st)\.global\.(?:nc\.)?(?:v4\.[a-z]32|v2\.[a-z]64)", ptx.decode()))
    # Twice where labels may mix: the walk has a body for tiles of one label and one for mixed tiles.
    assert wide["ld"] >= loads
    assert wide["st"] >= stores
    assert "fma.rn" not in ptx.decode()


@pytest.mark.skipif(not nvrtc_targets(), reason="no NVRTC")
def test_nvrtc_keeps_what_it_compiled_and_says_what_it_cannot(tmp_path, monkeypatch):
    monkeypatch.setenv("HTA_CACHE_DIR", str(tmp_path / "cache"))
    arguments = "hta::gpu::guard_kernel<float, float>", nvrtc_targets()[0]
    first = nvrtc_ops.compile_kernel(*arguments)
    (kept,) = (tmp_path / "cache").iterdir()
    stamp = kept.stat().st_mtime_ns
    assert nvrtc_ops.compile_kernel(*arguments) == first
    assert kept.stat().st_mtime_ns == stamp
    with pytest.raises(RuntimeError, match="no_such_kernel"):
        nvrtc_ops.compile_kernel("hta::gpu::no_such_kernel<float>", nvrtc_targets()[0])
    (tmp_path / "file").touch()
    monkeypatch.setenv("HTA_CACHE_DIR", str(tmp_path / "file" / "below"))  # cannot be made: compiles all the same
    assert nvrtc_ops.compile_kernel(*arguments)[0] == first[0]
    with pytest.raises(RuntimeError, match="compiles for compute capability .* this card has 3.5"):
        nvrtc_ops.target((3, 5))
    assert nvrtc_ops.target((99, 0)).startswith("compute_")


TRITON = """
import collections, json, re, sys
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from hta_fused import triton_ops as t

TYPES = dict(codes="*i32", labels="*u8", hyper="*fp64", tables="*fp64", grad_scale="*fp32", found_inf="*fp32", nonfinite="*i32",
             partial="*fp64", L="*fp64", n="i64", groups="i32", rows="i32", programs="i32", stats="*fp64", out_labels="*i64",
             images="*u8", order="*i64", offsets="*i64", mirrored="*i1", scale="*fp32", shift="*fp32", position="*i64",
             count="i64", size="i64", s_n="i64", s_c="i64", s_h="i64", s_w="i64")
def compile(kernel, cc, constants, **types):
    types = {n: types.get(n, TYPES.get(n, "*fp32")) for n in kernel.arg_names if n not in constants}
    # What the JIT finds out by itself: pointers and, in Replicas' buffers, sizes are multiples of 16.
    hints = {(kernel.arg_names.index(n),): [["tt.divisibility", 16]] for n, k in types.items() if k[0] == "*" or n == "n"}
    source = ASTSource(kernel, {**types, **{n: "constexpr" for n in constants}}, constexprs=constants, attrs=hints)
    return triton.compile(source, target=GPUTarget("cuda", cc, 32), options=t.OPTIONS)

W = tl.float32
flags = dict(WORK=W, MOMENTUM=True, ANCHOR=True, CODES=True)
CASES = [(t.step_kernel, {**flags, "LOW": low, "LABELS": labels, "SCALE": low, "FOUND": low, "GUARD": not low},
          {"low_theta": "*bf16", "low_eta": "*bf16", **({"g_theta": "*bf16", "g_eta": "*bf16"} if low else {})}, (5 if low else 7, 4))
         for low in (False, True) for labels in (False, True)]
CASES += [(t.penalty_kernel, dict(WORK=W, ACCUMULATE=True, ANCHOR=True, CODES=True, LABELS=labels), {}, (5, 2)) for labels in (False, True)]
CASES += [(t.guard_kernel, dict(WORK=W), {}, (2, 0)), (t.step_end_kernel, dict(FOUND=True, GUARD=True, FINISH=1024), {}, (0, 0)),
          (t.penalty_end_kernel, dict(WORK=W, FINISH=1024), {}, (0, 0)),
          (t.batch_kernel, dict(CHANNELS=3, HEIGHT=32, WIDTH=32, PADDING=4, BLOCK=256), {"labels": "*i64", "out": "*bf16"}, (0, 0))]
folder = sys.argv[1]
found = []
for cc in (70, 80, 90):
    for number, (kernel, constants, types, wanted) in enumerate(CASES):
        done = compile(kernel, cc, constants, **types)
        open(f"{folder}/{cc}-{number}.cubin", "wb").write(done.asm["cubin"])
        wide = collections.Counter(re.findall(r"(ld|st)\\.global\\.(?:v4\\.b32|v2\\.b64)", done.asm["ptx"]))
        found.append([f"{cc}-{number}", kernel.__name__, wide["ld"], wide["st"], *wanted, "fma.rn" in done.asm["ptx"]])
print(json.dumps(found))
"""


def test_triton_compiles_every_kernel_without_spills_and_16_bytes_wide(tmp_path):
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", TRITON, str(tmp_path)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) == 3 * 10
    for name, kernel, loads, stores, wanted_loads, wanted_stores, contracted in found:
        used = resources((tmp_path / f"{name}.cubin").read_bytes(), tmp_path)
        assert used["STACK"] == used["LOCAL"] == 0, (name, kernel)
        assert used["REG"] <= 128, (name, kernel)
        assert loads >= wanted_loads, (name, kernel)
        assert stores >= wanted_stores, (name, kernel)
        assert not contracted, (name, kernel)


# ------------------------------------------------------------------------------------------------- the choice of kernels


def choose(monkeypatch, capability, targets: bytes | None, dtype=torch.float32, low=None, missing=()):
    """What would serve a card of some compute capability, with an extension that has some targets."""

    class Extension:
        hta_cuda_targets = staticmethod(lambda: targets)

    monkeypatch.setattr(ops, "_extension", Extension)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    modules = {"triton_ops": importlib.import_module("hta_fused.triton_ops"), "nvrtc_ops": nvrtc_ops}
    monkeypatch.setattr(modules["triton_ops"], "_INTERPRETED", False)

    def module(name):
        if name in missing:
            raise ImportError(name=name)
        return modules[name]

    monkeypatch.setattr(ops, "_module", module)
    return ops._choose.__wrapped__(torch.device("cuda"), dtype, low or dtype)


@pytest.mark.parametrize(
    ("capability", "targets", "chosen"),
    [((9, 0), b"80 90 120+PTX", "cuda"), ((8, 6), b"80 90", "cuda"), ((12, 1), b"90+PTX", "cuda"),
     ((9, 0), None, "triton"), ((8, 0), b"90", "triton"), ((7, 0), b"75 80", "nvrtc"), ((6, 0), None, "nvrtc")],
)  # fmt: skip
@pytest.mark.skipif("sm_60" not in nvrtc_targets(), reason="no NVRTC for such cards")
def test_the_first_backend_that_serves_a_card_is_chosen(monkeypatch, capability, targets, chosen):
    assert choose(monkeypatch, capability, targets) == chosen
    assert choose(monkeypatch, capability, targets, torch.bfloat16) == chosen
    assert choose(monkeypatch, capability, targets, torch.float32, torch.float16) == chosen


def test_a_card_that_nothing_serves_gets_plain_pytorch_and_the_reasons(monkeypatch):
    with pytest.warns(
        UserWarning, match=r"several times slower \(cuda: .* kernels for 75, and this card is 35; triton: tri"
    ):
        assert choose(monkeypatch, (3, 5), b"75", missing=("triton_ops",)) == "reference"
    assert choose(monkeypatch, (9, 0), b"90", torch.complex64) == "reference"  # no kernel takes it: no warning


def test_backends_name_what_is_missing():
    state = hta.backends()
    assert list(state) == ["cpu", "cuda", "triton", "nvrtc", "reference"]
    if not torch.cuda.is_available():
        assert re.match("there is no CUDA device|the extension was", state["cuda"])
        with pytest.raises(RuntimeError, match="backend 'cuda' cannot run here"):
            hta.use_backend("cuda")


# -------------------------------------------------------------------------------------- networks in low precision, graphs


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8)
        self.head = torch.nn.Linear(8 * 36, 4)

    def forward(self, x):
        return self.head(self.norm(self.conv(x)).relu().flatten(1))


def low_replicas(low=torch.bfloat16):
    return hta.Replicas(Net(), compute_dtype=low)


def loss_of(x, y):
    def loss(net):
        with torch.autocast("cpu", torch.bfloat16):
            return torch.nn.functional.cross_entropy(net(x), y)

    return loss


def test_low_networks_follow_their_float32_masters():
    replicas = low_replicas()
    assert {p.dtype for p in replicas.theta.conv.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in replicas.theta.norm.parameters()} == {torch.float32}
    optimizer = hta.HomotopySGD(replicas, 0.05, 0.9, L=0.01)
    x, y = torch.randn(64, 3, 8, 8), torch.randint(4, (64,))
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        losses.append(float(sum(replicas.backward(loss_of(x, y)))))
        optimizer.step()
        for net, masters in zip(replicas, replicas.params, strict=True):
            views = dict(zip(replicas.layout.names, replicas.layout.views(masters), strict=True))
            for name, parameter in net.named_parameters():
                assert torch.equal(parameter.detach(), views[name].to(parameter.dtype)), name
    assert losses[-1] < 0.5 * losses[0]
    optimizer.L = 0.0
    optimizer.step()
    merged = replicas.merge()
    assert {p.dtype for p in merged.parameters()} == {torch.float32}
    assert torch.equal(merged.conv.weight, replicas.layout.views(replicas.params[1])[0])


def test_low_gradients_are_those_of_autocast_but_for_their_rounding():
    torch.manual_seed(0)
    low, full = low_replicas(), None
    full = hta.Replicas(Net())
    full.load_state_dict(low.state_dict())
    x, y = torch.randn(32, 3, 8, 8), torch.randint(4, (32,))
    for replicas in (low, full):
        for net in replicas:  # the low copies' own values, so that both networks are the same function
            for p in net.parameters():
                p.data.copy_(p.data.bfloat16())
        replicas.zero_grad()
        replicas.backward(loss_of(x, y))
        replicas.collect_grads()
    assert relative_error(low.grads[0], full.grads[0]) < 2**-7
    assert low.grads.dtype == torch.bfloat16


def test_a_low_run_resumes_from_full_precision(tmp_path):
    x, y = torch.randn(32, 3, 8, 8), torch.randint(4, (32,))

    def train(replicas, optimizer, steps):
        for _ in range(steps):
            optimizer.zero_grad()
            replicas.backward(loss_of(x, y))
            optimizer.step()

    replicas = low_replicas()
    optimizer = hta.HomotopySGD(replicas, 0.05, 0.9, L=0.01)
    train(replicas, optimizer, 3)
    torch.save((replicas.state_dict(), optimizer.state_dict(), replicas.anchor), tmp_path / "saved.pt")
    train(replicas, optimizer, 3)

    copies, state, anchor = torch.load(tmp_path / "saved.pt")
    again = hta.Replicas(Net(), anchor=anchor, compute_dtype=torch.bfloat16)
    again.load_state_dict(copies)
    optimizer = hta.HomotopySGD(again, 0.05, 0.9, L=0.01)
    optimizer.load_state_dict(state)
    train(again, optimizer, 3)
    assert torch.equal(again.params, replicas.params)
    assert torch.equal(again.low, replicas.low)


def test_compute_dtype_needs_float32_beside_it():
    with pytest.raises(TypeError, match="compute_dtype must be bfloat16 or float16 beside float32"):
        hta.Replicas(Net().double(), compute_dtype=torch.bfloat16)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a real graph is captured in test_a_captured_step_follows")
def test_a_step_captured_without_capturable_is_refused(monkeypatch):
    replicas = hta.Replicas(Net())
    optimizer = hta.HomotopySGD(replicas, 0.1)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    optimizer.step()  # on the CPU nothing is captured


def test_refresh_is_what_a_captured_step_reads():
    replicas = hta.Replicas(Net())
    optimizer = hta.HomotopySGD(replicas, 0.1, 0.9, L=0.1, capturable=True)
    optimizer.refresh()
    at, before = optimizer.coefficients.data_ptr(), optimizer.coefficients.clone()
    optimizer.L = 0.05  # refreshes by itself
    assert not torch.equal(optimizer.coefficients, before)
    optimizer.param_groups[0]["lr"] = 0.02
    expected = optimizer.coefficients_at()
    assert not torch.equal(optimizer.coefficients, expected)
    optimizer.refresh()
    assert torch.equal(optimizer.coefficients, expected)
    assert torch.equal(optimizer.coefficients_at(lr=0.1, L=0.1), before)
    assert optimizer.coefficients.data_ptr() == at


class Pretended:
    """Stands in for graphs.Graphed where there is no GPU: calls the steps as a graph would, with nobody at the host."""

    def __init__(self):
        self.whole = self.others = 0

    def __call__(self, step):
        self.whole += 1
        step()

    def uncaptured(self, step):
        self.others += 1
        step()


def settings(tmp_path, **changed):
    return Settings(
        dataset="synthetic", width=0.0625, epochs=3, epochs_per_L=1, L_start=0.01, L_stop=0.009, batch_size=60,
        out=tmp_path, device="cpu", **changed,
    )  # fmt: skip


class FakeStream:
    device = None

    def wait_stream(self, other):
        pass


class FakeGraph:
    replays = 0

    def replay(self):
        FakeGraph.replays += 1


@pytest.fixture
def fake_cuda(monkeypatch):
    """As much of torch.cuda as graphs.Graphed calls, doing nothing."""
    FakeGraph.replays = 0
    for name, fake in (
        ("Stream", lambda device: FakeStream()),
        ("CUDAGraph", FakeGraph),
        ("current_stream", lambda device: FakeStream()),
        ("synchronize", lambda: None),
        ("stream", lambda stream: contextlib.nullcontext()),
        ("graph", lambda graph: contextlib.nullcontext()),
    ):
        monkeypatch.setattr(torch.cuda, name, fake)


@pytest.mark.parametrize("fails", [False, True])
def test_a_step_is_captured_after_its_warm_up_or_goes_on_and_says_why(fake_cuda, fails):
    said, calls = [], []

    def step():
        calls.append(graphed.calls)
        if fails and len(calls) == graphs.WARM_UP + 1:
            raise RuntimeError("cannot be captured")

    graphed = graphs.Graphed(torch.device("cuda"), said.append)
    for _ in range(6):
        graphed(step)
    graphed.uncaptured(step)
    if fails:  # the attempt, then every step uncaptured
        assert said == ["no CUDA graph, going on without one: cannot be captured"]
        assert calls == [1, 2, 3, 4, 4, 5, 6, 6]
        assert FakeGraph.replays == 0
    else:  # warmed up, captured once, replayed
        assert said == []
        assert calls == [1, 2, 3, 4, 6]
        assert FakeGraph.replays == 3


@pytest.mark.parametrize("method", ["hta", "sgd"])
def test_the_planned_step_of_a_graph_is_the_step_that_the_host_directs(tmp_path, monkeypatch, method):
    finished = []
    for planned in (False, True):
        if planned:
            monkeypatch.setattr(Settings, "captures", True)
            pretended = Pretended()
            monkeypatch.setattr(run, "Graphed", lambda device, on_failure, pretended=pretended: pretended)
        assert Trainer(settings(tmp_path / f"{method}{planned}", method=method)).train()
        finished.append(torch.load(tmp_path / f"{method}{planned}" / f"{method}-seed0.pt"))
    assert (pretended.whole, pretended.others) == (3 * 8, 3)  # 512 images: 8 batches of 60, one of 32
    for name, tensor in finished[0].items():
        # SGD's planned lr is a float32 tensor
        assert torch.allclose(tensor.double(), finished[1][name].double(), rtol=1e-4, atol=1e-5), name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_captured_step_follows_its_settings():
    model = Net().cuda()
    replicas = hta.Replicas(model)
    optimizer = hta.HomotopySGD(replicas, 0.1, 0.9, L=0.1, capturable=True)
    other = hta.Replicas(Net().cuda(), anchor=replicas.anchor)
    other.params.copy_(replicas.params)
    eager = hta.HomotopySGD(other, 0.1, 0.9, L=0.1)
    gradients = torch.randn_like(replicas.grads)
    for copies, o in ((replicas, optimizer), (other, eager)):  # warmed up
        copies.grads.copy_(gradients)
        o.step()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        optimizer.step()
    for L, lr in ((0.1, 0.1), (0.05, 0.02), (0.0, 0.3)):
        replicas.grads.copy_(gradients)
        other.grads.copy_(gradients)
        optimizer.L = eager.L = L
        for o in (optimizer, eager):
            o.param_groups[0]["lr"] = lr
        optimizer.refresh()
        graph.replay()
        eager.step()
        assert torch.equal(replicas.params, other.params)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("graph", [True, False])
def test_training_on_the_gpu_learns(tmp_path, precision, graph):
    said = []
    s = dataclasses.replace(
        settings(tmp_path, method="compare", precision=precision, graph=graph), device="cuda", epochs=12
    )
    assert Trainer(s, report=said.append).train()
    assert not any("no CUDA graph" in line for line in said), said
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert all(r["accuracy_mean"] > 30 for r in summary["runs"].values()), summary
