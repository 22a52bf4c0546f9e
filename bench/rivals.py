"""Other ways to do the coupled step, each as an expert would write it, over the same buffers and settings.

Every rival is a function of a Problem that returns the step as a callable. `bench.py` checks that each leaves the
buffers that hta_fused leaves before it times any. A sceptic reads this file.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

import hta_fused as hta

LR, MOMENTUM, WEIGHT_DECAY = 0.05, 0.9, 5e-4
Step = Callable[[], None]


@dataclass
class Problem:
    """The copies, their gradients and momenta, the anchor, all as lists of tensors; `labels[i]` is a tensor's label.

    A convolution kernel that is half block 1, half block 2 stands in the lists as two views, so that every tensor has
    one label and no rival has to look labels up.
    """

    theta: list[Tensor]
    eta: list[Tensor]
    grads: tuple[list[Tensor], list[Tensor]]
    momenta: tuple[list[Tensor], list[Tensor]]
    anchor: list[Tensor]
    labels: list[int]
    L: float = 0.01
    whole: tuple[list[Tensor], list[Tensor]] = field(default=([], []))  # the unsplit parameters, where they were split

    def state(self) -> list[Tensor]:
        """What a step changes."""
        return [*self.theta, *self.eta, *self.momenta[0], *self.momenta[1]]

    def parameters(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """θ and η as parameters with their gradients, for torch.optim."""
        copies = []
        for values, grads in ((self.theta, self.grads[0]), (self.eta, self.grads[1])):
            row = [nn.Parameter(t) for t in values]
            for p, g in zip(row, grads, strict=True):
                p.grad = g
            copies.append(row)
        return copies[0], copies[1]


def autograd_and_sgd(p: Problem) -> Step:
    """The naive way: write equation (3) down, let autograd differentiate it, step torch.optim.SGD (explicit mode)."""
    theta, eta = p.parameters()
    for row, momenta in ((theta, p.momenta[0]), (eta, p.momenta[1])):
        for q, m in zip(row, momenta, strict=True):
            q.momentum = m  # type: ignore[attr-defined]
    optimizer = torch.optim.SGD([*theta, *eta], LR, MOMENTUM, weight_decay=WEIGHT_DECAY, fused=True)
    for q in (*theta, *eta):
        optimizer.state[q]["momentum_buffer"] = q.momentum  # type: ignore[attr-defined]

    def step() -> None:
        penalty = sum(((a - b) ** 2).sum() for a, b in zip(theta, eta, strict=True)) / p.L
        for row, label in ((theta, 1), (eta, 2)):
            pulled = [((q - t) ** 2).sum() for q, t, own in zip(row, p.anchor, p.labels, strict=True) if own == label]
            penalty = penalty + p.L * sum(pulled)
        penalty.backward()  # type: ignore[union-attr]
        optimizer.step()

    return step


def eager(p: Problem) -> Step:
    """Implicit step by hand: in-place eager PyTorch, tensor by tensor."""
    tables = hta.tables.implicit(p.L, LR).tolist()
    rows = list(zip(p.theta, p.eta, *p.grads, *p.momenta, p.anchor, p.labels, strict=True))

    @torch.no_grad()
    def step() -> None:
        for theta, eta, g_theta, g_eta, v_theta, v_eta, anchor, label in rows:
            _update(theta, eta, g_theta, g_eta, v_theta, v_eta, anchor, tables[label])

    return step


def _update(theta, eta, g_theta, g_eta, v_theta, v_eta, anchor, table) -> None:
    (tt, te, ta), (et, ee, ea) = table
    v_theta.mul_(MOMENTUM).add_(g_theta).add_(theta, alpha=WEIGHT_DECAY)
    v_eta.mul_(MOMENTUM).add_(g_eta).add_(eta, alpha=WEIGHT_DECAY)
    theta.add_(v_theta, alpha=-LR)  # now a_θ
    eta.add_(v_eta, alpha=-LR)  # now a_η
    new_theta = (theta * tt).add_(eta, alpha=te)
    eta.mul_(ee).add_(theta, alpha=et)
    if ta or ea:
        new_theta.add_(anchor, alpha=ta)
        eta.add_(anchor, alpha=ea)
    theta.copy_(new_theta)


def foreach(p: Problem) -> Step:
    """The same with torch._foreach_*: a handful of calls for all tensors of one label."""
    tables = hta.tables.implicit(p.L, LR).tolist()
    thetas, etas = [t.detach() for t in p.theta], [t.detach() for t in p.eta]
    groups = []
    for label in range(3):
        chosen = [i for i, own in enumerate(p.labels) if own == label]
        if chosen:
            groups.append((*([x[i] for i in chosen] for x in (thetas, etas, p.anchor)), tables[label]))

    @torch.no_grad()
    def step() -> None:
        for x, g, v in ((thetas, p.grads[0], p.momenta[0]), (etas, p.grads[1], p.momenta[1])):
            torch._foreach_mul_(v, MOMENTUM)
            torch._foreach_add_(v, g)
            torch._foreach_add_(v, x, alpha=WEIGHT_DECAY)
            torch._foreach_add_(x, v, alpha=-LR)
        for theta, eta, anchor, ((tt, te, ta), (et, ee, ea)) in groups:
            new_theta = torch._foreach_mul(theta, tt)
            torch._foreach_add_(new_theta, eta, alpha=te)
            torch._foreach_mul_(eta, ee)
            torch._foreach_add_(eta, theta, alpha=et)
            if ta or ea:
                torch._foreach_add_(new_theta, anchor, alpha=ta)
                torch._foreach_add_(eta, anchor, alpha=ea)
            torch._foreach_copy_(theta, new_theta)

    return step


def compiled(p: Problem) -> Step:
    """torch.compile of the whole list's update, written out of place so that it can fuse all of it."""
    tables = hta.tables.implicit(p.L, LR).tolist()
    labels = p.labels

    def update(thetas, etas, grads_theta, grads_eta, momenta_theta, momenta_eta, anchors) -> None:
        for i, label in enumerate(labels):
            (tt, te, ta), (et, ee, ea) = tables[label]
            v_theta = MOMENTUM * momenta_theta[i] + grads_theta[i] + WEIGHT_DECAY * thetas[i]
            v_eta = MOMENTUM * momenta_eta[i] + grads_eta[i] + WEIGHT_DECAY * etas[i]
            a_theta, a_eta = thetas[i] - LR * v_theta, etas[i] - LR * v_eta
            new_theta, new_eta = tt * a_theta + te * a_eta, et * a_theta + ee * a_eta
            if label:
                new_theta, new_eta = new_theta + ta * anchors[i], new_eta + ea * anchors[i]
            momenta_theta[i].copy_(v_theta)
            momenta_eta[i].copy_(v_eta)
            thetas[i].copy_(new_theta)
            etas[i].copy_(new_eta)

    fast = torch.compile(update, fullgraph=True)

    @torch.no_grad()
    def step() -> None:
        fast(p.theta, p.eta, *p.grads, *p.momenta, p.anchor)

    return step


def two_plain_sgds(p: Problem) -> Step:
    """No homotopy at all: two torch.optim.SGD(fused=True) steps. The floor that a user thinks of, at 40 bytes."""
    optimizers = []
    for row, momenta in zip(p.parameters(), p.momenta, strict=True):
        optimizer = torch.optim.SGD(row, LR, MOMENTUM, weight_decay=WEIGHT_DECAY, fused=True)
        for q, m in zip(row, momenta, strict=True):
            optimizer.state[q]["momentum_buffer"] = m
        optimizers.append(optimizer)

    def step() -> None:
        for optimizer in optimizers:
            optimizer.step()

    return step
