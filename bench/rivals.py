"""Other ways to do the coupled step, each as an expert would write it, over the same buffers and settings.

Every rival is a function of a Problem that returns the step as a callable. `measure.py` checks that each leaves the
buffers that hta_fused leaves before it times any. A sceptic reads this file.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import hta_fused as hta

LR, MOMENTUM, WEIGHT_DECAY = 0.05, 0.9, 5e-4
Step = Callable[[], None]


@dataclass
class Problem:
    """The copies, their gradients and momenta, the anchor (None: zero), all as lists of tensors.

    `labels` holds each tensor's label, or a tensor of labels where its elements have their own. A tensor that is half
    block 1 and half block 2 stands in the lists as two views.
    """

    theta: list[Tensor]
    eta: list[Tensor]
    grads: tuple[list[Tensor], list[Tensor]]
    momenta: tuple[list[Tensor], list[Tensor]]
    anchor: list[Tensor] | None
    labels: list[int | Tensor]
    L: float
    whole: "Problem | None" = None  # the same memory with no tensor split, as a model has it

    def state(self) -> list[Tensor]:
        """What a step changes."""
        return [*self.theta, *self.eta, *self.momenta[0], *self.momenta[1]]

    def anchors(self) -> list[Tensor | None]:
        return [None] * len(self.theta) if self.anchor is None else list(self.anchor)

    def sgds(self) -> tuple[torch.optim.SGD, torch.optim.SGD]:
        """A torch.optim.SGD(fused=True) over each copy, with its gradients and momenta in place."""
        result = []
        for values, grads, momenta in zip((self.theta, self.eta), self.grads, self.momenta, strict=True):
            parameters = [nn.Parameter(t) for t in values]
            optimizer = torch.optim.SGD(parameters, LR, MOMENTUM, weight_decay=WEIGHT_DECAY, fused=True)
            for p, g, v in zip(parameters, grads, momenta, strict=True):
                p.grad = g
                optimizer.state[p]["momentum_buffer"] = v
            result.append(optimizer)
        return result[0], result[1]


def autograd_and_sgd(p: Problem) -> Step:
    """The naive way: write equation (3) down, let autograd differentiate it, step torch.optim.SGD (explicit mode)."""
    sgds = p.sgds()
    theta, eta = (sgd.param_groups[0]["params"] for sgd in sgds)
    masks = [  # floats, since a product with a bool tensor would convert it every time
        label if isinstance(label, int) else [(label == own).to(theta[0].dtype) for own in (1, 2)] for label in p.labels
    ]

    def step() -> None:
        total = sum(((a - b) ** 2).sum() for a, b in zip(theta, eta, strict=True)) / p.L
        for copy, (row, own) in enumerate(((theta, 1), (eta, 2))):
            for x, anchor, mask in zip(row, p.anchors(), masks, strict=True):
                if isinstance(mask, int) and mask != own:
                    continue
                squares = (x if anchor is None else x - anchor) ** 2
                total = total + p.L * (squares if isinstance(mask, int) else squares * mask[copy]).sum()
        total.backward()
        for sgd in sgds:
            sgd.step()

    return step


def coefficients(p: Problem, label: int | Tensor) -> Tensor:
    """Each element's own table, [..., 6]: what a rival without a kernel for labels keeps beside them."""
    table = hta.tables.implicit(p.L, LR).to(p.theta[0].dtype)[torch.as_tensor(label).long()].flatten(-2)
    return table.movedim(-1, 0).contiguous().movedim(0, -1)  # each coefficient contiguous


def eager(p: Problem) -> Step:
    """Implicit step by hand: in-place eager PyTorch, tensor by tensor."""
    tables = hta.tables.implicit(p.L, LR)
    rows = []
    for *tensors, anchor, label in zip(p.theta, p.eta, *p.grads, *p.momenta, p.anchors(), p.labels, strict=True):
        if isinstance(label, int):
            rows.append((tensors, anchor, tables[label].flatten().tolist()))
        else:  # six tensors of coefficients, looked up once
            rows.append((tensors, anchor, list(coefficients(p, label).unbind(-1))))

    @torch.no_grad()
    def step() -> None:
        for (theta, eta, g_theta, g_eta, v_theta, v_eta), anchor, (tt, te, ta, et, ee, ea) in rows:
            v_theta.mul_(MOMENTUM).add_(g_theta).add_(theta, alpha=WEIGHT_DECAY)
            v_eta.mul_(MOMENTUM).add_(g_eta).add_(eta, alpha=WEIGHT_DECAY)
            theta.add_(v_theta, alpha=-LR)  # now a_θ
            eta.add_(v_eta, alpha=-LR)  # now a_η
            new_theta = theta * tt
            if isinstance(tt, float):
                new_theta.add_(eta, alpha=te)
                eta.mul_(ee).add_(theta, alpha=et)
                if anchor is not None and (ta or ea):
                    new_theta.add_(anchor, alpha=ta)
                    eta.add_(anchor, alpha=ea)
            else:
                new_theta.addcmul_(eta, te)
                eta.mul_(ee).addcmul_(theta, et)
                if anchor is not None:
                    new_theta.addcmul_(anchor, ta)
                    eta.addcmul_(anchor, ea)
            theta.copy_(new_theta)

    return step


def foreach(p: Problem) -> Step:
    """The same with torch._foreach_*: a handful of calls for all tensors of one label."""
    tables = hta.tables.implicit(p.L, LR)
    groups = []
    for kind in dict.fromkeys("mixed" if isinstance(label, Tensor) else label for label in p.labels):
        chosen = [i for i, own in enumerate(p.labels) if ("mixed" if isinstance(own, Tensor) else own) == kind]
        theta, eta = [p.theta[i] for i in chosen], [p.eta[i] for i in chosen]
        anchor = None if p.anchor is None else [p.anchor[i] for i in chosen]
        if isinstance(kind, int):
            groups.append((theta, eta, anchor, tables[kind].flatten().tolist()))
        else:
            columns = zip(*(coefficients(p, p.labels[i]).unbind(-1) for i in chosen), strict=True)
            groups.append((theta, eta, anchor, [list(column) for column in columns]))

    def add(x: list[Tensor], y: list[Tensor], factor: float | list[Tensor]) -> None:
        if isinstance(factor, float):
            torch._foreach_add_(x, y, alpha=factor)
        else:
            torch._foreach_addcmul_(x, y, factor)

    @torch.no_grad()
    def step() -> None:
        for x, g, v in ((p.theta, p.grads[0], p.momenta[0]), (p.eta, p.grads[1], p.momenta[1])):
            torch._foreach_mul_(v, MOMENTUM)
            torch._foreach_add_(v, g)
            torch._foreach_add_(v, x, alpha=WEIGHT_DECAY)
            torch._foreach_add_(x, v, alpha=-LR)
        for theta, eta, anchor, (tt, te, ta, et, ee, ea) in groups:
            new_theta = list(torch._foreach_mul(theta, tt))
            add(new_theta, eta, te)
            torch._foreach_mul_(eta, ee)
            add(eta, theta, et)
            if anchor is not None and not (isinstance(ta, float) and ta == ea == 0.0):
                add(new_theta, anchor, ta)
                add(eta, anchor, ea)
            torch._foreach_copy_(theta, new_theta)

    return step


def compiled(p: Problem) -> Step:
    """torch.compile of the whole list's update, written out of place so that it can fuse all of it."""
    tables = hta.tables.implicit(p.L, LR).tolist()
    labels, anchors = p.labels, p.anchors()
    # Own labels: six tensors of coefficients, looked up once. (torch.where on the labels takes eight times as long.)
    mixed = [None if isinstance(label, int) else list(coefficients(p, label).unbind(-1)) for label in labels]

    def update(thetas, etas, grads_theta, grads_eta, momenta_theta, momenta_eta, anchors, mixed) -> None:
        for i, label in enumerate(labels):
            if mixed[i] is None:
                (tt, te, ta), (et, ee, ea) = tables[label]
            else:
                tt, te, ta, et, ee, ea = mixed[i]
            v_theta = MOMENTUM * momenta_theta[i] + grads_theta[i] + WEIGHT_DECAY * thetas[i]
            v_eta = MOMENTUM * momenta_eta[i] + grads_eta[i] + WEIGHT_DECAY * etas[i]
            a_theta, a_eta = thetas[i] - LR * v_theta, etas[i] - LR * v_eta
            new_theta, new_eta = tt * a_theta + te * a_eta, et * a_theta + ee * a_eta
            if anchors[i] is not None and not (isinstance(label, int) and label == 0):
                new_theta, new_eta = new_theta + ta * anchors[i], new_eta + ea * anchors[i]
            momenta_theta[i].copy_(v_theta)
            momenta_eta[i].copy_(v_eta)
            thetas[i].copy_(new_theta)
            etas[i].copy_(new_eta)

    torch._dynamo.reset()
    fast = torch.compile(update, fullgraph=True, dynamic=False)

    @torch.no_grad()
    def step() -> None:
        fast(p.theta, p.eta, *p.grads, *p.momenta, anchors, mixed)

    return step


def two_plain_sgds(p: Problem) -> Step:
    """No homotopy at all: two torch.optim.SGD(fused=True) steps. The floor that a user thinks of, at 40 bytes."""
    sgds = (p.whole or p).sgds()

    def step() -> None:
        for sgd in sgds:
            sgd.step()

    return step


def one_plain_sgd(p: Problem) -> Step:
    """The same as one optimizer over both copies' tensors: the least overhead that torch.optim has to offer."""
    first, second = (p.whole or p).sgds()
    both = first.param_groups[0]["params"] + second.param_groups[0]["params"]
    sgd = torch.optim.SGD(both, LR, MOMENTUM, weight_decay=WEIGHT_DECAY, fused=True)
    for q in both:
        sgd.state[q] = {**first.state, **second.state}[q]
    return sgd.step


IMPLICIT: dict[str, Callable[[Problem], Step]] = {
    "eager, in place": eager,
    "torch._foreach_*": foreach,
    "torch.compile": compiled,
}
NAIVE = "autograd on (3) + SGD"
FLOOR, FLOOR_IN_ONE = "two plain SGD(fused=True)", "one plain SGD(fused=True) over both"
