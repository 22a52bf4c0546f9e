"""The ops in plain PyTorch: the specification that every kernel is tested against, and the fallback without one.

Any dtype, any device, no speed. Same arguments as the ops in ops.py, whose public functions check them. Imports torch
only. θ, η: the two copies; θ̃: the anchor; equation (3): H = f(θ) + L‖θ₁−θ̃₁‖² + f(η) + L‖η₂−θ̃₂‖² + ‖θ−η‖²/L.
"""

import torch
from torch import Tensor

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


def step_(theta, eta, grad_theta, grad_eta, momentum_theta, momentum_eta, anchor, codes, labels, hyper, tables,
          grad_scale, found_inf, stats, skip_nonfinite) -> None:  # fmt: skip
    """See ops.homotopy_step_. hyper: [groups, 6], tables: [groups, 3, 2, 3], stats: [4], all float64."""
    finite = torch.stack([g.isfinite().all() for g in (grad_theta, grad_eta)]).all()
    skip = ~finite if skip_nonfinite else torch.zeros_like(finite)
    if found_inf is not None:
        skip = skip | (found_inf.reshape(()) != 0)

    group, label = expand(codes, labels, theta)
    lr_grad, lr_momentum, momentum, weight_decay, pull, couple = hyper.to(theta.dtype)[group].unbind(-1)
    k = tables.to(theta.dtype)[group, label]
    anchored = label == 1, label == 2
    reached = torch.zeros_like(theta) if anchor is None else anchor
    scale = 1.0 if grad_scale is None else (1.0 / grad_scale.double()).to(theta.dtype)

    proposals, buffers = [], []
    for x, other, g, v, feels in (
        (theta, eta, grad_theta, momentum_theta, anchored[0]),
        (eta, theta, grad_eta, momentum_eta, anchored[1]),
    ):
        g = g * scale + weight_decay * x + (pull * (feels * (x - reached)) + couple * (x - other))  # equation (7)
        if v is None:
            proposals.append(x - lr_grad * g)
        else:
            buffers.append(momentum * v + g)
            proposals.append(x - (lr_grad * g + lr_momentum * buffers[-1]))
    a_theta, a_eta = proposals
    new = [k[..., j, 0] * a_theta + k[..., j, 1] * a_eta + k[..., j, 2] * reached for j in (0, 1)]

    old = [theta, eta] + ([] if momentum_theta is None else [momentum_theta, momentum_eta])
    for was, now in zip(old, new + buffers, strict=True):
        was.copy_(torch.where(skip, was, now))
    sums = torch.stack([*squares(theta, eta, anchor, anchored), (~finite).double()])
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
    pulled, distance = squares(theta, eta, anchor, anchored)
    coupling = (2 / L) * (theta - eta)
    to_anchor = [x if anchor is None else x - anchor for x in (theta, eta)]
    grad_theta = (2 * L) * (anchored[0] * to_anchor[0]) + coupling
    grad_eta = (2 * L) * (anchored[1] * to_anchor[1]) - coupling
    return (L * pulled + distance / L).to(theta.dtype), grad_theta, grad_eta


def penalty_accumulate_(grad_theta, grad_eta, theta, eta, anchor, codes, labels, L: float) -> Tensor:
    """`penalty` whose gradients are added to those given."""
    value, add_theta, add_eta = penalty(theta, eta, anchor, codes, labels, L)
    grad_theta.add_(add_theta)
    grad_eta.add_(add_eta)
    return value
