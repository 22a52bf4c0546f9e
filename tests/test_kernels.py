"""Every backend's kernels: the reference's bits for any number of copies, proposal, coupling, dtype and labels; what is
particular to GPUs (alignment, low precision, their compilers); the choice between backends.

Without a GPU they run here in Triton's interpreter and in the emulator (conftest.py), and are compiled for real cards.
"""

import collections
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
from conftest import AVAILABLE, GPU, GPU_BACKENDS, LABELS, guarded, needs_emulator, pattern, relative_error

import hta_fused as hta
from hta_fused import kernels, ops
from hta_fused.kernels import nvrtc, reference
from hta_fused.rules import rules_of

ROOT = Path(__file__).parent.parent
LOW = (torch.bfloat16, torch.float16)
KERNELS = [name for name in AVAILABLE if name != "reference"]
PROPOSALS = {
    "sgd": hta.SGD(0.1, weight_decay=1e-3),
    "momentum": hta.SGD(0.1, 0.9, 1e-3),
    "nesterov, maximize": hta.SGD(0.1, 0.9, 1e-3, nesterov=True, maximize=True),
    "adamw": hta.AdamW(0.01, weight_decay=0.1),
}
COUPLINGS = {
    "homotopy": hta.Homotopy(0.05),
    "merged": hta.Homotopy(0.0),
    "decoupled": hta.Homotopy(float("inf")),
    "explicit": hta.Explicit(0.5),
    "elastic": hta.Elastic(0.05),
    "elastic, explicit": hta.Elastic(0.05, mode="explicit"),
    "lookahead": hta.Lookahead(0.5, every=3),
    "between": hta.Average(every=2),
}
needs_gpu_backend = pytest.mark.parametrize("backend", GPU_BACKENDS, indirect=True)
each_kernel = pytest.mark.parametrize("backend", KERNELS, indirect=True)


def tensors_of(m, n, dtype, proposal, low=None, anchor=True):
    """Fresh arguments of coupled_step_."""
    tensors = {
        "copies": torch.randn(m, n).to(dtype),
        "grads": torch.randn(m, n).to(low or dtype),
        "states": [torch.rand(m, n).to(dtype) for _ in proposal.buffers],
        "anchor": torch.randn(n).to(dtype) if anchor else None,
        "stats": torch.zeros(4, dtype=torch.float64),
    }
    return tensors | ({} if low is None else {"low": torch.zeros(m, n, dtype=low)})


def clones(tensors):
    return {
        k: v.clone() if isinstance(v, torch.Tensor) else [t.clone() for t in v] if isinstance(v, list) else v
        for k, v in tensors.items()
    }


def both(tensors, labels, proposal, coupling, **options):
    """The step by the backend and by the reference, over clones: what each leaves."""
    name, results = kernels._wanted, []
    for backend in (name, "reference"):
        hta.use_backend(backend)
        used = clones(tensors)
        hta.coupled_step_(**used, labels=labels, proposal=proposal, coupling=coupling, step=3, **options)
        results.append(used)
    hta.use_backend(name)
    return results


def assert_same(ours, theirs, rounding=False):
    """The same bits, or the neighbouring number where Triton's interpreter rounds to bfloat16 in its own way."""
    for name, wanted in theirs.items():
        rows = zip(*((t if isinstance(t, list) else [t]) for t in (ours[name], wanted)), strict=True)
        for tensor, expected in rows:
            if name == "stats":
                assert torch.allclose(tensor, expected, rtol=2e-2 if rounding else 1e-5), name
            elif tensor is not None and rounding and tensor.dtype in LOW:
                assert relative_error(tensor, expected) < 2**-7, name
            elif tensor is not None:
                assert torch.equal(tensor, expected), name


def skip_slow(backend, *conditions):
    """Triton's interpreter takes a second for 30,000 elements; it is given a part of the product of all cases."""
    if backend == "triton" and not GPU and not all(conditions):
        pytest.skip("a case that Triton's interpreter is spared")


@each_kernel
@pytest.mark.parametrize("kind", LABELS)
@pytest.mark.parametrize("proposal", PROPOSALS)
@pytest.mark.parametrize("m", [1, 2, 3, 4, 5, 8, 9, 16])
def test_kernels_leave_the_references_bits(backend, m, proposal, kind):
    skip_slow(backend, m in (1, 2, 3, 5), proposal in ("momentum", "adamw"), kind in ("mixed", "hashed"))
    n = {"triton": 1028}.get(backend, 6148)  # rows that start at 16 bytes; other sizes below
    tensors = tensors_of(m, n, torch.float32, PROPOSALS[proposal])
    assert_same(*both(tensors, pattern(kind, n, m)[0], PROPOSALS[proposal], hta.Homotopy(0.05)))


@each_kernel
@pytest.mark.parametrize("coupling", COUPLINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *LOW])
@pytest.mark.parametrize("m", [1, 2, 3, 6])
def test_every_coupling_in_every_dtype(backend, m, dtype, coupling):
    if backend == "cpu" and dtype in LOW:
        pytest.skip("on the CPU the reference serves low precision")
    skip_slow(backend, m in (2, 3), dtype != torch.float16, coupling not in ("merged", "decoupled"))
    for proposal in (PROPOSALS["momentum"], PROPOSALS["adamw"]):
        for kind, anchor in (("mixed", True), ("none", COUPLINGS[coupling].moves_anchor)):
            tensors = tensors_of(m, 2500, dtype, proposal, anchor=anchor)
            assert_same(*both(tensors, pattern(kind, 2500, m)[0], proposal, COUPLINGS[coupling]), backend == "triton")


@each_kernel
@pytest.mark.parametrize("n", [0, 1, 7, 1023, 1024, 1025, 8192, 8193, 100_003])
def test_awkward_sizes(backend, n):
    skip_slow(backend, n < 8000)
    for m, proposal in ((2, "momentum"), (5, "adamw")):
        tensors = tensors_of(m, n, torch.float32, PROPOSALS[proposal])
        assert_same(*both(tensors, pattern("mixed", n, m)[0], PROPOSALS[proposal], hta.Homotopy(0.05)))


@pytest.mark.skipif(GPU, reason="a card has compute-sanitizer")
@each_kernel
@pytest.mark.parametrize("kind", ["bytes", "mixed", "hashed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("m", [1, 2, 3, 6])
def test_nothing_is_read_beyond_a_buffers_end(backend, m, dtype, kind):
    skip_slow(backend, m == 2)
    for n, proposal in ((1, "momentum"), (7, "adamw"), (1028, "adamw"), (2047, "momentum"), (2500, "momentum")):
        tensors = tensors_of(m, n, dtype, PROPOSALS[proposal])
        held = {k: list(map(guarded, v)) if isinstance(v, list) else guarded(v) for k, v in tensors.items()}
        labels = pattern(kind, n, m)[0]
        if isinstance(labels, torch.Tensor):
            labels = guarded(labels)
        else:
            for name in ("codes", "labels", "seed"):
                part = getattr(labels, name)
                if part is not None and part.numel():
                    setattr(labels, name, guarded(part))
        for coupling in ("homotopy", "explicit", "elastic"):
            hta.coupled_step_(**held, labels=labels, proposal=PROPOSALS[proposal], coupling=COUPLINGS[coupling], step=3)


@each_kernel
@pytest.mark.parametrize("coupling", ["homotopy", "merged", "explicit", "between"])
@pytest.mark.parametrize("m", [1, 2, 3, 5, 8])
def test_a_gradient_that_is_not_finite_is_said_wherever_it_is(backend, m, coupling):
    """A kernel may tell it by what it leaves behind; finite numbers whose squares overflow leave as much."""
    skip_slow(backend, m == 2, coupling == "homotopy")
    for proposal in (hta.SGD(0.0), hta.SGD(0.0, 0.9), PROPOSALS["momentum"], PROPOSALS["adamw"]):
        for bad in (float("inf"), float("-inf"), float("nan"), 1e30):
            tensors = tensors_of(m, 2500, torch.float32, proposal)
            row, place = int(torch.randint(m, ())), int(torch.randint(2500, ()))
            tensors["grads" if bad != 1e30 else "copies"][row, place] = bad
            labels = pattern("mixed", 2500, m)[0]
            hta.coupled_step_(**tensors, labels=labels, proposal=proposal, coupling=COUPLINGS[coupling], step=3)
            assert tensors["stats"][2] == (bad != 1e30), (proposal, bad, row, place)


@each_kernel
@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("m", [2, 5])
def test_the_penalty_of_m_copies(backend, m, explicit):
    copies, anchor = list(torch.randn(m, 2500, dtype=torch.float64)), torch.randn(2500, dtype=torch.float64)
    labels, per_element = pattern("mixed", 2500, m)
    rules = rules_of(hta.SGD(1.0), hta.Explicit(0.3), m)[None].to(anchor.device)
    value, grads = kernels.kernels(anchor).penalty(copies, anchor, labels.codes, labels.labels, None, rules)
    wide = [x.clone().requires_grad_() for x in copies]
    expected = sum(((a - b) ** 2).sum() for i, a in enumerate(wide) for b in wide[:i]) / 0.3
    for j, x in enumerate(wide):
        anchored = (per_element != 0) & (per_element != 1 + (j + 1) % m)
        expected = expected + 0.3 * (((x - anchor) ** 2) * anchored).sum()
    assert relative_error(value, expected.detach()) < 1e-13
    for ours, theirs in zip(grads, torch.autograd.grad(expected, wide), strict=True):
        assert relative_error(ours, theirs) < 1e-13


@each_kernel
@pytest.mark.parametrize("m", [2, 3, 7])
@pytest.mark.parametrize("proposal", ["momentum", "adamw"])
def test_a_step_cut_at_its_sum_is_the_whole_step(backend, m, proposal):
    """propose, then share: in one call each, as one copy per process does it, and with the sums of others added."""
    proposal, n = PROPOSALS[proposal], 1500
    tensors = tensors_of(m, n, torch.float32, proposal)
    labels, _ = pattern("mixed", n, m)
    rules = rules_of(proposal, hta.Homotopy(0.05), m, 3)[None].to(tensors["anchor"].device, torch.float32)
    step = kernels.kernels(tensors["copies"]).step_

    def run(used, sums, phase):
        step([used["copies"]], [used["grads"]] if phase & 1 else [], used["states"] if phase & 1 else [], [], used["anchor"],
             None, sums, labels.codes, labels.labels, None, rules, None, None, used["stats"], proposal.kernel, False, True,
             phase, [], [], None)  # fmt: skip

    whole, cut, sums = clones(tensors), clones(tensors), torch.full((n,), 7.0)
    run(whole, None, 3)
    run(cut, sums, reference.PROPOSE)
    assert not torch.equal(cut["copies"], whole["copies"])
    run(cut, sums, reference.SHARE)
    assert_same(cut, whole)


@each_kernel
@pytest.mark.parametrize("kind", LABELS)
@pytest.mark.parametrize("m", [2, 3, 5])
@pytest.mark.parametrize("proposal", ["momentum", "adamw"])
@pytest.mark.parametrize("coupling", ["homotopy", "elastic"])
def test_copies_by_themselves_whose_parts_are_summed_are_the_whole_step(backend, coupling, m, proposal, kind):
    """As one process for each copy does it: each knows m blocks and its own rules only."""
    skip_slow(backend, m == 3, kind in ("mixed", "hashed"))
    proposal, coupling, n = PROPOSALS[proposal], COUPLINGS[coupling], 2500
    tensors = tensors_of(m, n, torch.float32, proposal)
    labels, _ = pattern(kind, n, m)
    codes, bytes_, seed = ops._pattern(labels, tensors["copies"][0], m)
    rules = rules_of(proposal, coupling, m, 3)[None].to(tensors["anchor"].device, torch.float32)
    step = kernels.kernels(tensors["copies"]).step_

    def run(used, rows, rules, sums, phase):
        copies, grads = used["copies"][rows], used["grads"][rows]
        states = [v for buffer in used["states"] for v in buffer[rows]] if phase & 1 else []
        moved = used["anchor"] if coupling.moves_anchor and phase & 2 else None
        step([*copies], [*grads] if phase & 1 else [], states, [], used["anchor"], moved, sums, codes, bytes_, seed,
             rules, None, None, used["stats"], proposal.kernel, False, False, phase, [], [],
             None)  # fmt: skip

    whole, cut = clones(tensors), clones(tensors)
    for used in (whole, cut):
        states = used["states"]
        used["states"] = states if isinstance(states, list) else [states]
    run(whole, slice(0, m), rules, None, 3)
    sums = torch.zeros(m, n)
    for j in range(m):
        run(cut, slice(j, j + 1), reference.rules_of_copy(rules, m, j), sums[j], reference.PROPOSE)
    total = sums[0].clone()
    for j in range(1, m):
        total += sums[j]
    for j in range(m):
        used = {**cut, "anchor": cut["anchor"].clone()}  # each process has its own
        run(used, slice(j, j + 1), reference.rules_of_copy(rules, m, j), total, reference.SHARE)
        assert torch.equal(used["anchor"], whole["anchor"])
    assert_same(cut, {name: whole[name] for name in ("copies", "states")})


@needs_gpu_backend
@pytest.mark.parametrize("proposal", ["sgd", "momentum", "adamw"])
@pytest.mark.parametrize("low", LOW)
@pytest.mark.parametrize("m", [1, 2, 3, 9])
def test_low_gradients_step_float32_masters_and_their_low_copies(backend, m, low, proposal):
    skip_slow(backend, m in (1, 2), low == torch.bfloat16)
    tensors = tensors_of(m, 2500, torch.float32, PROPOSALS[proposal], low)
    options = dict(proposal=PROPOSALS[proposal], coupling=hta.Homotopy(0.05), grad_scale=4.0)
    ours, theirs = both(tensors, pattern("mixed", 2500, m)[0], **options)
    assert_same(ours, theirs, rounding=backend == "triton")
    assert relative_error(ours["low"], ours["copies"]) < 2**-7
    assert not torch.equal(ours["copies"], tensors["copies"])


@pytest.mark.parametrize("low", LOW)
def test_without_low_copies_none_are_written(low):
    tensors = tensors_of(2, 2000, torch.float32, PROPOSALS["momentum"], low)
    del tensors["low"]
    wide = {k: [t.double() for t in v] if isinstance(v, list) else v.double() for k, v in tensors.items()}
    for used in (tensors, wide):
        hta.coupled_step_(**used, proposal=PROPOSALS["momentum"], coupling=hta.Homotopy(0.05))
    assert relative_error(tensors["copies"], wide["copies"]) < 1e-6


@needs_gpu_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_penalty_in_any_dtype(backend, dtype):
    copies, anchor = list(torch.randn(2, 5003).to(dtype)), torch.randn(5003).to(dtype)
    labels, per_element = pattern("mixed", 5003)
    rules = rules_of(hta.SGD(1.0), hta.Explicit(0.3), 2)[None].to(anchor.device, torch.float32)
    ours = kernels.kernels(anchor).penalty(copies, anchor, labels.codes, labels.labels, None, rules)
    theirs = reference.penalty(copies, anchor, None, per_element, None, rules)
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == dtype
        assert relative_error(a, b) < (1e-6 if dtype == torch.float32 else 2**-7)


@needs_gpu_backend
@pytest.mark.parametrize("shift", [1, 2, 5])
@pytest.mark.parametrize("which", ["none", "all", "copies", "anchor"])
@pytest.mark.parametrize("n", [1, 1024, 4099])
def test_buffers_may_start_anywhere_and_nothing_beyond_them_is_touched(backend, n, which, shift):
    proposal = PROPOSALS["momentum"]
    tensors = tensors_of(3, n, torch.float32, proposal)
    frames = []

    def framed(name, tensor):
        frame = torch.full((n + 32,), 7.0)
        start = 8 + (shift if which in ("all", name) else 0)
        frames.append((frame, start))
        return frame[start : start + n].copy_(tensor)

    shifted = {
        "copies": [framed("copies", row) for row in tensors["copies"]],
        "grads": [framed("grads", row) for row in tensors["grads"]],
        "states": [[framed("states", row) for row in buffer] for buffer in tensors["states"]],
        "anchor": framed("anchor", tensors["anchor"]),
    }
    labels = torch.randint(0, 4, (n + 1,), dtype=torch.uint8)[1:]
    options = dict(labels=labels, proposal=proposal, coupling=hta.Homotopy(0.05))
    hta.coupled_step_(**shifted, **options)
    hta.use_backend("reference")
    hta.coupled_step_(**tensors, **options)
    for ours, theirs in zip(
        shifted["copies"] + shifted["states"][0], [*tensors["copies"], *tensors["states"][0]], strict=True
    ):
        assert torch.equal(ours, theirs)
    for frame, start in frames:
        assert (frame[:start] == 7).all()
        assert (frame[start + n :] == 7).all()


@pytest.mark.parametrize("m", [2, 6])
def test_tiles_take_their_rows_of_labels_in_any_order(backend, m):
    """Rows follow each other, repeat, turn back, leave one out; and so do groups."""
    rows, groups = [0, 1, 2, 2, 1, 3, 4, 6, 7, 8], [0, 0, 0, 0, 0, 0, 0, 1, 1, 0]
    n, proposal, coupling = len(rows) * 1024 - 30, PROPOSALS["momentum"], hta.Homotopy(0.05)
    tensors = tensors_of(m, n, torch.float32, proposal)
    bytes_ = torch.randint(0, m + 1, (9 * 1024,), dtype=torch.uint8)
    codes = torch.tensor([[group, ~row] for group, row in zip(groups, rows, strict=True)], dtype=torch.int32)
    rules = torch.stack([rules_of(hta.SGD(lr, 0.9), coupling, m) for lr in (0.1, 0.3)]).to(bytes_.device, torch.float32)
    after = []
    for name in (backend, "reference"):
        hta.use_backend(name)
        used = clones(tensors)
        kernels.kernels(used["copies"]).step_(
            [used["copies"]], [used["grads"]], [*used["states"]], [], used["anchor"], None, None, codes, bytes_, None, rules,
            None, None, used["stats"], proposal.kernel, False, False, 3, [], [], None,
        )  # fmt: skip
        after.append(used)
    assert torch.equal(after[0]["copies"], after[1]["copies"])
    assert torch.equal(after[0]["states"][0], after[1]["states"][0])
    assert torch.allclose(after[0]["stats"], after[1]["stats"], rtol=1e-5)


@needs_gpu_backend
def test_codes_that_name_nothing_are_read_as_harmless(backend):
    """On a GPU nobody can look at the codes without waiting; they must not lead outside the rules."""
    copies, grads = torch.randn(2, 3 * 1024), torch.randn(2, 3 * 1024)
    codes = torch.tensor([[99, 1], [0, 77], [-5, -9]], dtype=torch.int32)
    stats = torch.zeros(4, dtype=torch.float64)
    rules = rules_of(hta.SGD(0.1), hta.Homotopy(0.1), 2)[None].to(stats.device, torch.float32)
    step = kernels.kernels(copies).step_
    step([copies], [grads], [], [], None, None, None, codes, None, None, rules, None, None, stats, 0, False, False, 3, [], [],
         None)  # fmt: skip
    assert copies.isfinite().all()
    assert stats[2] == 0


# -------------------------------------------------------------------------------------------------- the emulator itself

PLANTED = {
    "barrier": ("  __syncthreads();\n  if (threadIdx.x != 0) return;", "  if (threadIdx.x != 0) return;"),
    "half a warp's sums": ("distance = 16; distance > 0; distance /= 2) sums", "distance = 8; distance > 0; distance /= 2) sums"),
    "another tile's code": ("pattern.codes + 2 * (i / kTile)", "pattern.codes + 2 * (i / (2 * kTile))"),
    "a tail's end": ("for (int at = whole + threadIdx.x; at < count;", "for (int at = whole + threadIdx.x; at < count - 1;"),
    "another copy's rule": ("(label * (m + 1) + j) * kRule", "(label * (m + 1)) * kRule"),
    "a state that stays": ("      for (int buffer = 0; for_good && args.states[0]", "      for (int buffer = 1; for_good && args.states[0]"),
    "a byte of the labels": ("int32_t(packed >> (8 * lane)) & 0xff", "int32_t(packed) & 0xff"),
    "a flag nobody raises": ("if (poison != poison) args.nonfinite[1] = 1;  //", "if (poison == 1) args.nonfinite[1] = 1;  //"),
}  # fmt: skip


@needs_emulator
@pytest.mark.parametrize("planted", PLANTED)
def test_a_planted_mistake_shows_in_the_emulator(emulated, planted):
    emulated(*PLANTED[planted])
    proposal, unraised = PROPOSALS["momentum"], planted == "a flag nobody raises"

    def compare():
        for kind, n in (("mixed", 5001), ("random", 5000)):
            tensors = tensors_of(2, n, torch.float32, proposal)
            if unraised:
                tensors["grads"][1, 77] = float("nan")
            results = both(tensors, pattern(kind, n)[0], proposal, hta.Homotopy(0.05), skip_nonfinite=False)
            assert not unraised or results[0]["stats"][2] == 1
            assert_same(*results)

    with pytest.raises(AssertionError):
        compare()


@needs_emulator
def test_a_planted_access_that_is_not_aligned_shows_in_the_emulator(emulated):
    """Four labels in one load, where a thread has two: a card refuses every second one, a CPU reads on."""
    emulated("struct Bytes<2> { using type = uint16_t; }", "struct Bytes<2> { using type = uint32_t; }", few="double")
    tensors = tensors_of(2, 5000, torch.float64, PROPOSALS["momentum"])
    with pytest.raises(AssertionError, match=r"not aligned, at .*rows\.cuh:\d+"):
        both(tensors, pattern("bytes", 5000)[0], PROPOSALS["momentum"], hta.Homotopy(0.05), skip_nonfinite=False)


@needs_emulator
def test_the_mirror_of_the_arguments_follows_the_header(emulated):
    """Two pointers that change places in csrc/args.h change places in what nvrtc.py hands over."""
    emulated("  const T* anchor;\n  T* centre;", "  T* centre;\n  const T* anchor;")
    tensors = tensors_of(2, 3001, torch.float32, PROPOSALS["momentum"])
    assert_same(*both(tensors, pattern("mixed", 3001)[0], PROPOSALS["momentum"], hta.Homotopy(0.05)))


@needs_emulator
def test_a_header_that_cannot_be_mirrored_is_an_error(emulated):
    with pytest.raises(RuntimeError, match="struct PenaltyArgs has a line that nvrtc.py cannot read: T wrong, value;"):
        emulated("  T* value;\n", "  T wrong, value;\n")


# ------------------------------------------------------------------------------------------------------- the compilers


def resources(binary: Path) -> dict[tuple[str, str], dict[str, int]]:
    """Registers, stack and local memory of each kernel in a binary, by its target and lowered name."""
    triton = pytest.importorskip("triton")
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    text = subprocess.run([tool, "-res-usage", binary], capture_output=True, text=True, check=True).stdout
    parts = re.split(r"^arch = (\w+)$", text, flags=re.MULTILINE)
    return {
        (arch, name): {k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
        for arch, part in zip(["", *parts[1::2]], parts[::2], strict=True)
        for name, usage in re.findall(r"Function (\w+):\s+(.*)", part)
    }


def of_cubin(cubin: bytes, folder: Path) -> dict[str, dict[str, int]]:
    (folder / "kernel.cubin").write_bytes(cubin)
    return {name: used for (_, name), used in resources(folder / "kernel.cubin").items()}


def nvrtc_targets() -> list[str]:
    try:
        nvrtc.nvrtc()
    except OSError:
        return []
    known = []
    for capability in ((6, 0), (7, 0), (8, 0), (9, 0), (10, 0), (12, 0)):
        try:
            known.append(nvrtc.target(capability))
        except RuntimeError:
            continue
    return known


@needs_emulator
@pytest.mark.parametrize("arch", nvrtc_targets())
def test_nvrtc_compiles_every_kernel_without_spills(arch, tmp_path):
    kernel_names = emulation.library().kernel_names().decode().split()
    expressions = [
        "hta::gpu::" + re.sub(r"\b(Half|BFloat16|Packed|Sgd|AdamW)\b", r"hta::\1", name) for name in kernel_names
    ]
    lowered, cubin = nvrtc.compile_program(expressions, arch)
    used = of_cubin(cubin, tmp_path)
    for name, symbol in zip(kernel_names, lowered, strict=True):
        assert used[symbol]["STACK"] == used[symbol]["LOCAL"] == 0, name
        # 256 threads: four blocks on a multiprocessor for float32 pairs under SGD, two for most others.
        every_number = arch in ("sm_100", "sm_120") and ",0," in name
        alone = "Packed" in name and (arch == "sm_60" or every_number or name.endswith("AdamW,0,true>"))
        assert used[symbol]["REG"] <= (
            64 if name == "step_kernel<float,float,Sgd,2,false>" else 255 if alone else 128
        ), name


@pytest.mark.skipif(
    kernels._extension is None or not kernels._extension.hta_cuda_targets(), reason="an extension without CUDA kernels"
)
def test_the_extensions_kernels_do_not_spill_on_any_target():
    used = resources(Path(kernels._extension._name))
    targets = {arch for arch, _ in used}
    label = kernels._extension.hta_cuda_targets().decode()
    assert targets == {f"sm_{target}" for target in label.removesuffix("+PTX").split()}
    assert len(used) == len(targets) * len({name for _, name in used})
    assert not {key: of_one for key, of_one in used.items() if of_one["STACK"] or of_one["LOCAL"]}


STREAM = """
import ctypes, sys
torch = ctypes.CDLL(sys.argv[1], ctypes.RTLD_LOCAL)
stream = ctypes.c_void_p()
status = ctypes.CDLL(sys.argv[2]).ask(3, ctypes.byref(stream))
print(status, stream.value)
"""


@needs_emulator
@pytest.mark.parametrize(("torchs", "answer"), [("libtorch_cuda.so", "0 1003"), ("libtorch_cpu.so", "-1 None")])
def test_the_stream_is_asked_of_a_library_that_torch_keeps_to_itself(tmp_path, torchs, answer):
    """As torch's CUDA libraries are loaded; they are played by one with the same name."""
    texts = {
        torchs: "int aoti_torch_get_current_cuda_stream(int device, void** stream) { *stream = (void*)(1000L + device); return 0; }",
        "ours.so": "int ask(int device, void** stream) { auto current = hta::gpu::current_stream(); return current ? current(device, stream) : -1; }",
    }
    for name, text in texts.items():
        source = (tmp_path / name).with_suffix(".cpp")
        source.write_text(f'#include "gpu/stream.h"\nextern "C" {text}\n')
        flags = ["-std=c++20", "-shared", "-fPIC", f"-I{ROOT / 'csrc'}", f"-Wl,-soname,{name}"]
        subprocess.run([emulation.COMPILER, *flags, str(source), "-o", str(tmp_path / name), "-ldl"], check=True)
    libraries = [str(tmp_path / name) for name in texts]
    done = subprocess.run([sys.executable, "-c", STREAM, *libraries], capture_output=True, text=True)
    assert done.stdout.strip() == answer, done.stderr


@pytest.mark.skipif(not nvrtc_targets(), reason="no NVRTC")
@pytest.mark.parametrize(
    ("kernel", "loads", "stores"),
    [("step_kernel<float, float, hta::Sgd, 2, false>", 7, 4), ("step_kernel<float, float, hta::AdamW, 2, false>", 9, 6),
     ("step_kernel<float, float, hta::Sgd, 8, false>", 25, 16), ("penalty_kernel<float>", 3, 1),
     ("guard_kernel<float, float>", 1, 0), ("step_kernel<hta::BFloat16, hta::BFloat16, hta::Sgd, 2, false>", 7, 4),
     ("step_kernel<float, hta::Half, hta::Sgd, 2, false>", 5, 4)],
)  # fmt: skip
def test_nvrtc_kernels_move_16_bytes_at_a_time_and_four_labels_in_one_load(kernel, loads, stores):
    text = nvrtc.compile_program([f"hta::gpu::{kernel}"], nvrtc_targets()[0], ptx=True)[1].decode()
    wide = collections.Counter(re.findall(r"(ld|st)\.global\.(?:nc\.)?(?:v4\.[a-z]32|v2\.[a-z]64)", text))
    assert wide["ld"] >= loads
    assert wide["st"] >= stores
    assert "fma.rn" not in text
    if "step" in kernel:  # a byte at a time only in the walk over single elements
        assert len(re.findall(r"ld\.global\.(?:nc\.)?u8", text)) <= 2


@pytest.mark.skipif(not nvrtc_targets(), reason="no NVRTC")
def test_nvrtc_keeps_what_it_compiled_and_says_what_it_cannot(tmp_path, monkeypatch):
    monkeypatch.setenv("HTA_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    arguments = "hta::gpu::guard_kernel<float, float>", nvrtc_targets()[0]
    first = nvrtc.compile_kernel(*arguments)
    (kept,) = (tmp_path / "cache").iterdir()
    stamp = kept.stat().st_mtime_ns
    assert nvrtc.compile_kernel(*arguments) == first
    assert kept.stat().st_mtime_ns == stamp
    with pytest.raises(RuntimeError, match="no_such_kernel"):
        nvrtc.compile_kernel("hta::gpu::no_such_kernel<float>", nvrtc_targets()[0])
    (tmp_path / "file").touch()
    monkeypatch.setenv("HTA_CACHE_DIR", str(tmp_path / "file" / "below"))  # cannot be made: compiles all the same
    assert nvrtc.compile_kernel(*arguments)[0] == first[0]
    with pytest.raises(RuntimeError, match="compiles for compute capability .* this card has 3.5"):
        nvrtc.target((3, 5))
    assert nvrtc.target((99, 0)).startswith("compute_")


def test_an_nvrtc_of_cuda_11_is_left_alone_and_said_so(monkeypatch):
    monkeypatch.setattr(nvrtc, "version", lambda: (11, 8))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert nvrtc.why_not(torch.device("cuda")) == "NVRTC is 11.8, and its kernels need 12.0"


TRITON = """
import collections, json, re, sys
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from hta_fused.kernels import triton as t

ROWS = ("copies", "grads", "states", "low", "corrections", "scales")
TYPES = dict(corrections="*i8", noise="*i64", codes="*i32", labels="*u8", seed="*i64", grad_scale="*fp32", found_inf="*fp32", nonfinite="*i32", partial="*fp64",
             n="i64", groups="i32", rows="i32", programs="i32", stats="*fp64", out_labels="*i64", images="*u8", order="*i64",
             offsets="*i64", mirrored="*i1", scale="*fp32", shift="*fp32", position="*i64", count="i64", size="i64", s_n="i64",
             s_c="i64", s_h="i64", s_w="i64")
def compile(kernel, cc, constants, rows=0, states=1, states_type="*fp32", **types):
    types["states"] = states_type
    counts = {"copies": rows, "grads": rows, "states": rows * states, "low": rows, "corrections": rows * constants.get("SPLIT", 0),
              "scales": rows * states * (states_type == "*u8")}
    types = {n: (kind,) * counts[n] if n in ROWS else kind
             for n in kernel.arg_names if n not in constants for kind in [types.get(n, TYPES.get(n, "*fp32"))]}
    # What the JIT finds out by itself: pointers and, in Replicas' buffers, sizes are multiples of 16.
    hints = {}
    for name, kind in types.items():
        index = kernel.arg_names.index(name)
        for path in [(index, i) for i in range(len(kind))] if isinstance(kind, tuple) else [(index,)]:
            if isinstance(kind, tuple) or kind[0] == "*" or name == "n":
                hints[path] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, {**types, **{n: "constexpr" for n in constants}}, constexprs=constants, attrs=hints)
    return triton.compile(source, target=GPUTarget("cuda", cc, 32), options=t.OPTIONS)

W = tl.float32
flags = dict(WORK=W, EXPLICIT=False, PROPOSES=True, SHARES=True, STATES=True, ANCHOR=True, CENTRE=False, SUMS=False, CODES=True,
             SEED=False, SPLIT=False, RANDOM=False)
CASES = [(t.step_kernel, {**flags, "M": m, "BLOCKS": m, "ADAMW": adamw, "LOW": low, "LABELS": labels, "SCALE": low, "FOUND": low, "GUARD": not low},
          dict(rows=m, states=2 if adamw else 1, **({"low": "*bf16", "grads": "*bf16"} if low else {})),
          ((3 if adamw else 2) * m + 1 + (0 if low else m), (3 if adamw else 2) * m))
         for m, adamw, low, labels in [(2, False, False, False), (2, False, True, True), (2, True, False, True), (4, False, False, True),
                                       (8, False, False, False)]]
packed = {**flags, "M": 2, "BLOCKS": 2, "LOW": False, "LABELS": True, "SCALE": False, "FOUND": False, "GUARD": True,
          "CENTRE": True, "SPLIT": True, "RANDOM": True}
CASES += [(t.step_kernel, {**packed, "ADAMW": adamw},
           dict(rows=2, states=1 + adamw, copies=low, grads=low, anchor=low, centre=low, states_type=state), (0, 0))
          for adamw, low, state in [(False, "*bf16", "*bf16"), (False, "*bf16", "*u8"), (True, "*fp16", "*u8")]]
CASES += [(t.penalty_kernel, dict(WORK=W, M=2, ACCUMULATE=True, ANCHOR=True, CODES=True, LABELS=labels, SEED=labels),
           dict(rows=2), (5, 2)) for labels in (False, True)]
CASES += [(t.guard_kernel, dict(WORK=W, M=2), dict(rows=2), (2, 0)),
          (t.step_end_kernel, dict(FOUND=True, GUARD=True, FINISH=1024), {}, (0, 0)),
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
    assert len(found) == 3 * 14
    for name, kernel, loads, stores, wanted_loads, wanted_stores, contracted in found:
        (used,) = resources(tmp_path / f"{name}.cubin").values()
        spilled = 16 if name.endswith("-7") else 0  # AdamW over split float16 masters and bytes: two words
        assert max(used["STACK"], used["LOCAL"]) <= spilled, (name, kernel)
        assert used["REG"] <= 255, (name, kernel)
        assert loads >= wanted_loads, (name, kernel)
        assert stores >= wanted_stores, (name, kernel)
        assert not contracted, (name, kernel)


# ------------------------------------------------------------------------------------------------- the choice of kernels


def choose(monkeypatch, capability, targets: bytes | None, dtype=torch.float32, low=None, missing=()):
    """What would serve a card of some compute capability, with an extension that has some targets."""

    class Extension:
        hta_cuda_targets = staticmethod(lambda: targets)

    monkeypatch.setattr(kernels, "_extension", Extension)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    modules = {"triton": importlib.import_module("hta_fused.kernels.triton"), "nvrtc": nvrtc}
    monkeypatch.setattr(modules["triton"], "_INTERPRETED", False)

    def module(name):
        if name in missing:
            raise ImportError(name=name)
        return modules[name]

    monkeypatch.setattr(kernels, "_module", module)
    return kernels._choose.__wrapped__(torch.device("cuda"), dtype, low or dtype)


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
        assert choose(monkeypatch, (3, 5), b"75", missing=("triton",)) == "reference"
    assert choose(monkeypatch, (9, 0), b"90", torch.complex64) == "reference"  # no kernel takes it: no warning


def test_backends_name_what_is_missing():
    state = hta.backends()
    assert list(state) == ["cpu", "cuda", "triton", "nvrtc", "reference"]
    if not torch.cuda.is_available():
        assert re.match("there is no CUDA device|the extension was", state["cuda"])
        with pytest.raises(RuntimeError, match="backend 'cuda' cannot run here"):
            hta.use_backend("cuda")
