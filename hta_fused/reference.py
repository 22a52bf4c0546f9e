"""The ops in plain PyTorch: the specification that every kernel is tested against, and the fallback without one.

Any dtype, any device, no speed. Same arguments as the ops in ops.py, whose public functions check them. Imports torch
only. θ, η: the two copies; θ̃: the anchor; equation (3): H = f(θ) + L‖θ₁−θ̃₁‖² + f(η) + L‖η₂−θ̃₂‖² + ‖θ−η‖²/L.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

LOW = (torch.float16, torch.bfloat16)  # kernels compute in float32 on them
TILE = 1024  # elements that share one code, as csrc/homotopy.h's kTile


def expand(codes: Tensor | None, labels: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor]:
    """The parameter group and the label of each element, as int64 of `like`'s shape."""
    n = like.numel()
    if codes is None:
        group = torch.zeros(n, dtype=torch.int64, device=like.device)
        label = group if labels is None else labels.reshape(-1).long()
    else:
        group = codes[:, 0].long().repeat_interleave(TILE)[:n]
        per_tile = codes[:, 1].long()
        label = per_tile.repeat_interleave(TILE)
        if labels is not None and labels.numel():
            rows = labels.reshape(-1, TILE).long()[(-1 - per_tile).clamp(min=0)]
            label = torch.where(label < 0, rows.reshape(-1), label)
        label = label[:n]
    return group.view(like.shape), label.clamp(max=2).view(like.shape)


def arithmetic(dtype: torch.dtype) -> torch.dtype:
    """What a kernel computes in over buffers of `dtype`."""
    return torch.float32 if dtype in LOW else dtype


def step_(theta, eta, grad_theta, grad_eta, momentum_theta, momentum_eta, low_theta, low_eta, anchor, codes, labels,
          hyper, tables, grad_scale, found_inf, stats, skip_nonfinite) -> None:  # fmt: skip
    """See ops.homotopy_step_. hyper: [groups, 6], tables: [groups, 3, 2, 3], stats: [4], all float64."""
    work = arithmetic(theta.dtype)
    finite = torch.stack([g.isfinite().all() for g in (grad_theta, grad_eta)]).all()
    skip = ~finite if skip_nonfinite else torch.zeros_like(finite)
    if found_inf is not None:
        skip = skip | (found_inf.reshape(()) != 0)

    group, label = expand(codes, labels, theta)
    lr_grad, lr_momentum, momentum, weight_decay, pull, couple = hyper.to(work)[group].unbind(-1)
    k = tables.to(work)[group, label]
    anchored = label == 1, label == 2
    reached = torch.zeros_like(theta, dtype=work) if anchor is None else anchor.to(work)
    scale = 1.0 if grad_scale is None else (1.0 / grad_scale.double()).to(work)
    copies = theta.to(work), eta.to(work)

    proposals, buffers = [], []
    for x, other, g, v, feels in (
        (*copies, grad_theta, momentum_theta, anchored[0]),
        (*copies[::-1], grad_eta, momentum_eta, anchored[1]),
    ):
        g = (
            g.to(work) * scale + weight_decay * x + (pull * (feels * (x - reached)) + couple * (x - other))
        )  # equation (7)
        if v is None:
            proposals.append(x - lr_grad * g)
        else:
            buffers.append(momentum * v.to(work) + g)
            proposals.append(x - (lr_grad * g + lr_momentum * buffers[-1]))
    a_theta, a_eta = proposals
    new = [k[..., j, 0] * a_theta + k[..., j, 1] * a_eta + k[..., j, 2] * reached for j in (0, 1)]

    old = [theta, eta] + ([] if momentum_theta is None else [momentum_theta, momentum_eta])
    if low_theta is not None:
        old, buffers = [*old, low_theta, low_eta], [*buffers, *new]
    for was, now in zip(old, new + buffers, strict=True):
        was.copy_(torch.where(skip, was, now.to(was.dtype)))
    sums = torch.stack([*squares(new[0], new[1], anchor, anchored), (~finite).double()])
    sums = torch.where(skip, torch.cat([stats[:2], torch.ones_like(stats[:1])]), sums)
    stats.copy_(torch.cat([sums, stats[3:] + skip]))


def squares(theta, eta, anchor, anchored) -> tuple[Tensor, Tensor]:
    """‖θ₁−θ̃₁‖² + ‖η₂−θ̃₂‖² and ‖θ−η‖², summed in float64."""
    to_anchor = [(x if anchor is None else x - anchor).double().square() for x in (theta, eta)]
    pulled = (to_anchor[0] * anchored[0]).sum() + (to_anchor[1] * anchored[1]).sum()
    return pulled, (theta - eta).double().square().sum()


def penalty(theta, eta, anchor, codes, labels, L: float) -> tuple[Tensor, Tensor, Tensor]:
    """The quadratic terms of equation (3), and their gradients in θ and η."""
    _, label = expand(codes, labels, theta)
    anchored = label == 1, label == 2
    dtype, work = theta.dtype, arithmetic(theta.dtype)
    theta, eta = theta.to(work), eta.to(work)
    pulled, distance = squares(theta, eta, anchor, anchored)
    coupling = (2 / L) * (theta - eta)
    to_anchor = [x if anchor is None else x - anchor for x in (theta, eta)]
    grad_theta = (2 * L) * (anchored[0] * to_anchor[0]) + coupling
    grad_eta = (2 * L) * (anchored[1] * to_anchor[1]) - coupling
    return (L * pulled + distance / L).to(dtype), grad_theta.to(dtype), grad_eta.to(dtype)


def penalty_accumulate_(grad_theta, grad_eta, theta, eta, anchor, codes, labels, L: float) -> Tensor:
    """`penalty` whose gradients are added to those given."""
    value, add_theta, add_eta = penalty(theta, eta, anchor, codes, labels, L)
    grad_theta.add_(add_theta)
    grad_eta.add_(add_eta)
    return value


def batch_(out, out_labels, images, labels, order, offsets, mirrored, scale, shift, position, padding: int) -> None:
    """See ops.batch_."""
    part = slice(int(position), int(position) + len(out))
    chosen, (height, width) = order[part], images.shape[2:]
    windows = F.pad(images[chosen], (padding,) * 4).unfold(2, height, 1).unfold(3, width, 1)
    crops = windows[torch.arange(len(out), device=out.device), :, offsets[0, part], offsets[1, part]]
    pixels = torch.where(mirrored[part].view(-1, 1, 1, 1), crops.flip(-1), crops)
    out.copy_(torch.addcmul(shift.view(1, -1, 1, 1), pixels.float(), scale.view(1, -1, 1, 1)))
    out_labels.copy_(labels[chosen])
