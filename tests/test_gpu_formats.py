"""The GPU kernels over buffers in formats of their own: the reference's bits for every format, proposal, coupling and size.

Without a GPU they run here in Triton's interpreter and in the emulator (conftest.py).
"""

import itertools

import pytest
import torch
from conftest import AVAILABLE, GPU, GPU_BACKENDS, guarded, needs_emulator, pattern
from formatted import BF16, COPIES, F16, F32, SPLIT, STATES, assert_same, check, clones, run, tensors_of

import hta_fused as hta
from hta_fused.kernels import reference

PROPOSALS = {"momentum": hta.SGD(0.1, 0.9, 1e-3), "adamw": hta.AdamW(0.01, weight_decay=0.1)}
COUPLINGS = {
    "homotopy": hta.Homotopy(0.05),
    "explicit": hta.Explicit(0.5),
    "elastic": hta.Elastic(0.05),
    "elastic, explicit": hta.Elastic(0.05, mode="explicit"),
}
each_backend = pytest.mark.parametrize("backend", GPU_BACKENDS, indirect=True)


def few(backend):
    """Whether a backend is so slow here that it is given a part of the product of all cases."""
    return backend == "triton" and not GPU


CASES = [
    (copies, states, anchor, grads)
    for copies, states, anchor, grads in itertools.product(COPIES, STATES, (F32, BF16, F16), (F32, BF16, F16))
    if copies in SPLIT or states != copies or {F32: "fp32", BF16: "bf16", F16: "fp16"}[anchor] != copies
]


COPIES_OF_A_STEP = [1, 2, 3, 5, 9]


def chosen(backend, m, gpu=GPU):
    """A number of copies' part of the cases: on a card Triton compiles for seconds for each, here it is interpreted."""
    triton = backend == "triton"
    return CASES[m % 3 :: (40 if triton else 5) if gpu else (97 if triton else 9)]


@pytest.mark.parametrize("backend", ["cuda", "triton", "nvrtc"])
def test_a_card_meets_every_format(backend):
    met = {case for m in COPIES_OF_A_STEP for case in chosen(backend, m, gpu=True)}
    for place, formats in enumerate((COPIES, STATES, (F32, BF16, F16), (F32, BF16, F16))):
        assert {case[place] for case in met} == set(formats)


@each_backend
@pytest.mark.parametrize("m", COPIES_OF_A_STEP)
@pytest.mark.parametrize("proposal", PROPOSALS)
@pytest.mark.parametrize("coupling", COUPLINGS)
def test_every_format_leaves_the_references_bits(backend, coupling, proposal, m):
    """Every number of copies, proposal and coupling meets a part of the cases."""
    for number, (copies, states, anchor, grads) in enumerate(chosen(backend, m)):
        kind = ("none", "bytes", "mixed", "hashed")[number % 4]
        tensors = tensors_of(m, 1500, PROPOSALS[proposal], copies, states, anchor, grads, low=number % 3 == 0)
        noise = None if states != "8 bits" and number % 5 == 0 else -number * 2**40
        check(backend, tensors, PROPOSALS[proposal], COUPLINGS[coupling], pattern(kind, 1500, m)[0], noise)


@pytest.mark.skipif(GPU, reason="a card has compute-sanitizer")
@pytest.mark.parametrize("backend", [b for b in AVAILABLE if b != "reference"], indirect=True)
@pytest.mark.parametrize("m", [1, 2, 3, 5])
def test_nothing_is_read_beyond_a_buffers_end(backend, m):
    if few(backend) and m != 2:
        pytest.skip("a case that Triton's interpreter is spared")
    for number, (copies, states, anchor, grads) in enumerate(CASES[m :: 97 if few(backend) else 13]):
        n, proposal = (1, 131, 1025, 1500)[number % 4], PROPOSALS["adamw" if number % 3 else "momentum"]
        tensors = tensors_of(m, n, proposal, copies, states, anchor, grads, low=number % 3 == 0)
        held = {k: list(map(guarded, v)) if isinstance(v, list) else guarded(v) for k, v in tensors.items()}
        run(backend, held, proposal, COUPLINGS["elastic"])


@each_backend
@pytest.mark.parametrize("n", [0, 1, 127, 128, 1023, 1024, 1025, 5000])
@pytest.mark.parametrize("m", [1, 2, 3, 5])
def test_awkward_sizes(backend, m, n):
    if few(backend) and (m != 2 or n > 1025):
        pytest.skip("a case that Triton's interpreter is spared")
    cases = list(itertools.product(PROPOSALS.values(), (COUPLINGS["homotopy"], COUPLINGS["elastic"])))
    for proposal, coupling in cases[-1:] if few(backend) else cases:
        tensors = tensors_of(m, n, proposal, "split bf16", "8 bits", BF16)
        check(backend, tensors, proposal, coupling, pattern("mixed", n, m)[0])


@each_backend
@pytest.mark.parametrize("proposal", PROPOSALS)
def test_a_phase_by_itself(backend, proposal):
    """What one process does with its own copies: they are left proposed, with their part of the sum; then they take their share."""
    proposal, m, n = PROPOSALS[proposal], 3, 1100
    tensors = tensors_of(m, n, proposal, "split fp16", "8 bits", BF16)
    results = []
    for name in (backend, "reference"):
        used, sums = clones(tensors), torch.zeros(n)
        for phase in (reference.PROPOSE, reference.SHARE):
            run(name, used, proposal, COUPLINGS["elastic"], pattern("mixed", n, m)[0], phase=phase, sums=sums)
        used["sums"] = sums
        results.append(used)
    del results[0]["stats"], results[1]["stats"]  # the reference counts what is proposed too
    assert_same(*results)


@each_backend
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite(backend, bad):
    """Skips the step where it is guarded, and leaves what the reference does, the tile's scale included, where it is not."""
    for proposal, copies in (("momentum", "split bf16"), ("adamw", "split fp16")):
        tensors = tensors_of(2, 1030, PROPOSALS[proposal], copies, "8 bits", BF16)
        tensors["grads"][0][1, 1027] = bad
        ours = check(backend, tensors, PROPOSALS[proposal], COUPLINGS["elastic"], guard=True)
        assert ours["stats"].tolist()[2:] == [1, 1]
        del ours["stats"], tensors["stats"]
        assert_same(ours, tensors)
        tensors["stats"] = torch.zeros(4, dtype=torch.float64)
        ours = check(backend, tensors, PROPOSALS[proposal], COUPLINGS["elastic"], guard=False)
        assert ours["scales"][0][1].isfinite().tolist() == [True] * 8 + [False]


@each_backend
def test_rows_may_start_anywhere_and_nothing_beyond_them_is_touched(backend):
    proposal, n = PROPOSALS["momentum"], 700
    tensors = tensors_of(2, n, proposal, "split bf16", "8 bits", BF16, low=True)
    frames = []

    def framed(tensor):
        frame = torch.full((tensor.shape[-1] + 32,), 7, dtype=tensor.dtype)
        frames.append((frame, tensor.shape[-1]))
        return frame[9 : 9 + tensor.shape[-1]].copy_(tensor)

    shifted = {
        k: [framed(row) for t in v for row in t] if isinstance(v, list) else v if k == "stats" else framed(v)
        for k, v in clones(tensors).items()
    }
    run(backend, {**shifted, "shape": (2, n)}, proposal, COUPLINGS["elastic"])
    run("reference", tensors, proposal, COUPLINGS["elastic"])
    flat = {k: [row for t in v for row in t] if isinstance(v, list) else v for k, v in tensors.items()}
    assert_same(shifted, flat)
    for frame, size in frames:
        assert (frame[:9] == 7).all()
        assert (frame[9 + size :] == 7).all()


PLANTED = {
    "half a warp's magnitudes": ("distance = 16; distance > 0; distance /= 2) larger", "distance = 8; distance > 0; distance /= 2) larger"),
    "a scale nobody writes": ("if (threadIdx.x % 32 == 0) static_cast", "if (threadIdx.x > 255) static_cast"),
    "another row's bits": ("of_row = key(row + 2, tile)", "of_row = key(2, tile)"),
    "another tile's keys": ("int(i / kTile % kTiles)", "0"),
    "lanes beyond the end": ("first < count; at +=", "at < count; at +="),
}  # fmt: skip


@needs_emulator
@pytest.mark.parametrize("planted", PLANTED)
def test_a_planted_mistake_shows_in_the_emulator(emulated, planted):
    emulated(*PLANTED[planted], few="Packed")
    tensors = tensors_of(2, 2350, PROPOSALS["momentum"], "split bf16", "8 bits", BF16)
    with pytest.raises(AssertionError):
        check("nvrtc", tensors, PROPOSALS["momentum"], COUPLINGS["elastic"])
