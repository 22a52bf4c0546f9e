"""A step's buffers in formats of their own, and a call of the op over them: for the tests of formats on all backends."""

import torch

from hta_fused import kernels, ops
from hta_fused.kernels.formats import SCALED, packed
from hta_fused.rules import rules_of

F32, BF16, F16, U8 = torch.float32, torch.bfloat16, torch.float16, torch.uint8
SPLIT = {"split bf16": BF16, "split fp16": F16}
COPIES = {"fp32": F32, "bf16": BF16, "fp16": F16, **SPLIT}
STATES = {"fp32": F32, "bf16": BF16, "fp16": F16, "8 bits": U8}
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def stored(values, dtype, split=False, square=False):
    """Rows [m, n] of float32 in a format: what holds them, and their corrections or scales, or None."""
    m, n = values.shape
    rows = torch.zeros(m, n, dtype=dtype)
    more = torch.zeros(m, n, dtype=torch.int8) if split else torch.zeros(m, -(-n // SCALED)) if dtype == U8 else None
    for j in range(m):
        for at, wanted in zip((rows,) if more is None else (rows, more), packed(values[j], rows[j], None if more is None else more[j], square=square), strict=True):  # fmt: skip
            at[j] = wanted
    return rows, more


def tensors_of(m, n, proposal, copies="fp32", states="fp32", anchor=F32, grads=BF16, low=False):
    """Fresh buffers of a step."""
    x, corrections = stored(torch.randn(m, n) * 10 ** (torch.rand(m, n) * 4 - 3), COPIES[copies], copies in SPLIT)
    buffers = [
        stored(torch.rand(m, n) ** 4 if b else torch.randn(m, n), STATES[states], square=bool(b))
        for b in range(len(proposal.buffers))
    ]
    return {
        "copies": [x],
        "grads": [torch.randn(m, n).to(grads)],
        "states": [rows for rows, _ in buffers],
        "low": [torch.zeros(m, n, dtype=grads)] if low else [],
        "anchor": None if anchor is None else torch.randn(n).to(anchor),
        "corrections": [] if corrections is None else [corrections],
        "scales": [scales for _, scales in buffers if scales is not None],
        "stats": torch.zeros(4, dtype=torch.float64),
    }


def clones(tensors):
    return {
        k: [t.clone() for t in v] if isinstance(v, list) else None if v is None else v.clone()
        for k, v in tensors.items()
    }


def run(
    backend,
    used,
    proposal,
    coupling,
    labels=None,
    noise=77,
    phase=3,
    sums=None,
    found_inf=None,
    guard=True,
    grad_scale=None,
):
    """One call of the op, over `used`; the coupling's own `moves_anchor` says whether the anchor moves."""
    first = used["copies"][0]
    m, n = used.get("shape", first.shape)
    codes, bytes_, seed = ops._pattern(labels, torch.empty(n, device=first.device), m)
    rules = rules_of(proposal, coupling, m, 3)[None].to(first.device, F32)
    moved = used["anchor"] if coupling.moves_anchor and phase & 2 else None
    kernels.BACKENDS[backend].ops.step_(
        used["copies"], used["grads"] if phase & 1 else [], used["states"] if phase & 1 else [], used["low"], used["anchor"], moved,
        sums, codes, bytes_, seed, rules, grad_scale, found_inf, used["stats"], proposal.kernel, coupling.explicit,
        guard, phase, used["corrections"], used["scales"] if phase & 1 else [],
        None if noise is None else torch.tensor([noise], device=first.device),
    )  # fmt: skip


def assert_same(ours, theirs):
    """The same bits, NaNs aside, which have several; the same statistics but for their last digits."""
    for name, wanted in theirs.items():
        for a, b in zip(*((t if isinstance(t, list) else [t]) for t in (ours[name], wanted)), strict=True):
            if name == "stats":
                assert torch.allclose(a, b, rtol=1e-5, equal_nan=True), name
            elif a is not None:
                same = a.view(BITS[a.element_size()]) == b.view(BITS[b.element_size()])
                same |= a.isnan() & b.isnan() if a.is_floating_point() else False
                assert same.all(), f"{name}: {(~same).sum()} differ"


def check(backend, tensors, *arguments, **options):
    ours, theirs = clones(tensors), clones(tensors)
    run(backend, ours, *arguments, **options)
    run("reference", theirs, *arguments, **options)
    assert_same(ours, theirs)
    return ours
