"""The ops in plain PyTorch: the specification that every kernel is tested against, and the fallback without one.

Any dtype, any device, no speed. Same arguments as the ops, whose schemas stand in kernels/__init__.py; the public
functions in ops.py check them. The equations are those of csrc/arithmetic.h. Imports formats.py.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .formats import TILE, noise_of, packed, random_bits, unpack

LOW = (torch.float16, torch.bfloat16)  # kernels compute in float32 on them
DTYPES = (torch.float32, torch.float64, *LOW)
MAX_COPIES = 32  # csrc/arithmetic.h's kMaxCopies
HASHED = 1 << 20  # the label of a tile whose elements draw theirs by hash, as csrc/args.h's kHashed
NUMBERS, RULE = 8, 5  # what a proposal is given, and what a label gives each copy: read, keep, share, pull, anchored
PROPOSE, SHARE = 1, 2  # the phases of a step


def arithmetic(dtype: torch.dtype) -> torch.dtype:
    """What a kernel computes in over buffers of `dtype`."""
    return torch.float32 if dtype in LOW else dtype


def blocks_of(rules: Tensor, m: int) -> int:
    """How many blocks the rules of m copies know: as many, but where the copies are one process's."""
    return (rules.shape[1] - NUMBERS) // ((m + 1) * RULE) - 1


def rules_of_copy(rules: Tensor, m: int, copy: int) -> Tensor:
    """What one copy of m is given, and the centre: for a process that holds this copy alone."""
    rule = rules[:, NUMBERS:].view(len(rules), m + 1, m + 1, RULE)[:, :, [copy, m]]
    return torch.cat([rules[:, :NUMBERS], rule.flatten(1)], 1)


def rows_of(tensors: list[Tensor]) -> list[Tensor]:
    """The rows of a list: a 1-D tensor is one, a 2-D tensor holds several."""
    return [row for t in tensors for row in (t.unbind() if t.dim() > 1 else [t])]


# ------------------------------------------------------------------------------------------------------------- labels


def hashed_labels(seed: Tensor, tiles: int, copies: int) -> Tensor:
    """What the hash of (seed, element) gives every element of so many tiles: int64 [tiles, TILE] of 1 … copies."""
    return ((random_bits(seed, tiles) >> 16) * copies >> 16) + 1


def expand(
    codes: Tensor | None, labels: Tensor | None, seed: Tensor | None, n: int, copies: int, device
) -> tuple[Tensor, Tensor]:
    """The parameter group and the label of each of n elements, as int64."""
    if codes is None:
        group = torch.zeros(n, dtype=torch.int64, device=device)
        label = group if labels is None else labels.reshape(-1).long()
        return group, label.clamp(max=copies)
    per_tile = codes[:, 1].long()[:, None]
    label = per_tile.expand(-1, TILE)
    if labels is not None and labels.numel():
        bytes_ = labels.reshape(-1, TILE).long()[(-1 - per_tile[:, 0]).clamp(min=0)]
        label = torch.where(per_tile < 0, bytes_, label)
    if seed is not None:
        label = torch.where(per_tile == HASHED, hashed_labels(seed, len(codes), copies), label)
    return codes[:, 0].long().repeat_interleave(TILE)[:n], label.clamp(max=copies).reshape(-1)[:n]


# ------------------------------------------------------------------------------------------------------------ proposals


def sgd(x, g, state, number) -> tuple[Tensor, list[Tensor]]:
    """torch.optim.SGD: the proposal, and the new state."""
    _, weight_decay, lr_grad, lr_momentum, momentum, *_ = number
    g = g + weight_decay * x
    if not state:
        return x - lr_grad * g, []
    v = momentum * state[0] + g
    return x - (lr_grad * g + lr_momentum * v), [v]


def square_root(x: Tensor) -> Tensor:
    """Correctly rounded, as every kernel's is; torch.sqrt on the CPU is MKL's, which is off by one in a fifth of all cases."""
    return torch.from_numpy(np.sqrt(x.numpy())) if x.device.type == "cpu" else x.sqrt()


def adamw(x, g, state, number) -> tuple[Tensor, list[Tensor]]:
    """torch.optim.AdamW: the proposal, and the new state."""
    _, decay, fresh_mean, beta_square, fresh_square, lr, root, eps = number
    mean = state[0] + fresh_mean * (g - state[0])
    square = beta_square * state[1] + fresh_square * (g * g)
    return decay * x - lr * mean / (square_root(square) * root + eps), [mean, square]


PROPOSALS = (sgd, adamw)  # by their numbers in csrc/args.h

# ----------------------------------------------------------------------------------------------------------------- step


def step_(copies, grads, states, low, anchor, centre, sums, codes, labels, seed, rules, grad_scale, found_inf, stats,
          proposal: int, explicit_mode: bool, skip_nonfinite: bool, phase: int, corrections=(), scales=(), noise=None) -> None:  # fmt: skip
    """One step of all copies: propose, sum, share."""
    copies, grads, states, low, corrections, scales = map(rows_of, (copies, grads, states, low, corrections, scales))
    m, n, work = len(copies), copies[0].numel(), arithmetic(copies[0].dtype)
    corrections, scales = corrections or [None] * m, scales or [None] * len(states)
    finite = torch.stack(
        [torch.ones((), dtype=torch.bool, device=stats.device), *(g.isfinite().all() for g in grads)]
    ).all()
    skip = ~finite if skip_nonfinite else torch.zeros_like(finite)
    if found_inf is not None:
        skip = skip | (found_inf.reshape(()) != 0)

    blocks = blocks_of(rules, m)
    group, label = expand(codes, labels, seed, n, blocks, copies[0].device)
    number = rules[:, :NUMBERS][group].unbind(-1)
    # For copy j, and for the centre as the last: read, keep, share, pull, anchored of each element.
    rule = rules[:, NUMBERS:].view(-1, blocks + 1, m + 1, RULE)[group, label].permute(1, 2, 0)
    x = [unpack(copy, more) for copy, more in zip(copies, corrections, strict=True)]
    z = torch.zeros((), dtype=work, device=stats.device) if anchor is None else anchor.to(work)
    written: list[tuple[Tensor, Tensor]] = []

    def write(
        values: Tensor, row: Tensor, more: Tensor | None = None, number: int | None = None, square: bool = False
    ) -> None:
        """Notes what a row is to hold. number: of the row, whose values are rounded at random."""
        bits = None if noise is None or number is None else noise_of(noise, number, n)
        wanted = packed(values.expand(n), row, more, bits, square)
        written.extend(zip([row] if more is None else [row, more], wanted, strict=True))

    if phase & PROPOSE:
        scale = number[0] if grad_scale is None else (1.0 / grad_scale.double()).to(work) * number[0]
        g = [grad.to(work) * scale for grad in grads]
        finite = torch.stack([finite, *(scaled.isfinite().all() for scaled in g)]).all()
        if explicit_mode:
            quadratic, s = quadratic_gradients(x, z, rule), sum(rule[i, 0] * x[i] for i in range(m))
            g = [a + b for a, b in zip(g, quadratic, strict=True)]
        proposals = []
        for j in range(m):
            rows = range(j, len(states), m)
            old = [unpack(states[i], scales[i], i >= m) for i in rows]
            a, new = PROPOSALS[proposal](x[j], g[j], old, number)
            proposals.append(a)
            for i, values in zip(rows, new, strict=True):
                write(values, states[i], scales[i], m + i, i >= m)
        if not explicit_mode:
            s = sum(rule[i, 0] * proposals[i] for i in range(m))
        if sums is not None:
            written.append((sums, s))
        x = proposals
    else:
        s = sums.to(work)
    if phase & SHARE:
        if not explicit_mode:
            x = [rule[j, 1] * x[j] + rule[j, 2] * s + rule[j, 3] * z for j in range(m)]
        if centre is not None:
            write(rule[m, 1] * centre.to(work) + rule[m, 2] * s + rule[m, 3] * z, centre, None, 3 * m)
    for j, values in enumerate(x):
        write(values, copies[j], corrections[j], j)
    written += zip(low, x, strict=bool(low))
    squares = torch.stack([((x[j] - z).double().square() * rule[j, 4]).sum() for j in range(m)]).sum()
    for was, now in written:
        was.copy_(torch.where(skip, was, now.to(was.dtype)))
    new_stats = torch.stack([squares, pairs(x), (~finite).double()])
    new_stats = torch.where(skip, torch.cat([stats[:2], torch.ones_like(stats[:1])]), new_stats)
    stats.copy_(torch.cat([new_stats, stats[3:] + skip]))


def pairs(x: list[Tensor]) -> Tensor:
    """Σ_{i<j} ‖x_i − x_j‖², summed in float64."""
    gaps = torch.stack([copy - x[0] for copy in x]).double()
    return len(x) * (gaps - gaps.mean(0)).square().sum()


def quadratic_gradients(x: list[Tensor], anchor: Tensor, rule: Tensor) -> list[Tensor]:
    """pull_j·(x_j − θ̃) + share_j·Σ_i read_i·(x_j − x_i) for every copy, from differences to copy 0."""
    gaps, reads = sum(rule[i, 0] * (x[i] - x[0]) for i in range(len(x))), sum(rule[i, 0] for i in range(len(x)))
    return [rule[j, 3] * (x[j] - anchor) + rule[j, 2] * (reads * (x[j] - x[0]) - gaps) for j in range(len(x))]


# -------------------------------------------------------------------------------------------------------------- penalty


def penalty(copies, anchor, codes, labels, seed, rules) -> tuple[Tensor, Tensor]:
    """½Σ_j pull_j‖x_j − θ̃‖² + ½·share·Σ_{i<j} ‖x_i − x_j‖², and its gradients [m, n]."""
    value, grads = _penalty(copies, anchor, codes, labels, seed, rules)
    dtype = rows_of(copies)[0].dtype
    return value.to(dtype), grads.to(dtype)


def _penalty(copies, anchor, codes, labels, seed, rules) -> tuple[Tensor, Tensor]:
    """`penalty` before it is rounded to the copies' dtype."""
    x = rows_of(copies)
    m, work = len(x), arithmetic(x[0].dtype)
    group, label = expand(codes, labels, seed, x[0].numel(), m, x[0].device)
    rule = rules[:, NUMBERS:].view(-1, m + 1, m + 1, RULE)[group, label].permute(1, 2, 0)
    x = [copy.to(work) for copy in x]
    z = torch.zeros((), dtype=work, device=x[0].device) if anchor is None else anchor.to(work)
    grads = torch.stack(quadratic_gradients(x, z, rule))
    gaps = torch.stack([copy - x[0] for copy in x]).double()
    apart = m * (rule[0, 2] * (gaps - gaps.mean(0)).square()).sum()
    pulled = sum((rule[j, 3] * (x[j] - z).double().square()).sum() for j in range(m))
    return 0.5 * (pulled + apart), grads


def penalty_accumulate_(grads, copies, anchor, codes, labels, seed, rules) -> Tensor:
    """`penalty` whose gradients are added to those given."""
    value, added = _penalty(copies, anchor, codes, labels, seed, rules)
    for grad, more in zip(rows_of(grads), added, strict=True):
        grad.copy_(grad.to(more.dtype) + more)
    return value.to(rows_of(copies)[0].dtype)


def batch_(out, out_labels, images, labels, order, offsets, mirrored, scale, shift, position, padding: int) -> None:
    """See ops.batch_."""
    part = slice(int(position), int(position) + len(out))
    chosen, (height, width) = order[part], images.shape[2:]
    windows = F.pad(images[chosen], (padding,) * 4).unfold(2, height, 1).unfold(3, width, 1)
    crops = windows[torch.arange(len(out), device=out.device), :, offsets[0, part], offsets[1, part]]
    pixels = torch.where(mirrored[part].view(-1, 1, 1, 1), crops.flip(-1), crops)
    out.copy_(torch.addcmul(shift.view(1, -1, 1, 1), pixels.float(), scale.view(1, -1, 1, 1)))
    out_labels.copy_(labels[chosen])
