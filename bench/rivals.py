"""Other ways to do the coupled step, each as an expert would write it, over the same buffers and settings.

Every rival is a function of a Problem that returns the step as a callable, for any number of copies and either
proposal. `measure.py` checks that each leaves the buffers that hta_fused leaves before it times any. A sceptic reads
this file.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

import hta_fused as hta

LR, MOMENTUM, WEIGHT_DECAY = 0.05, 0.9, 5e-4
Proposal = hta.SGD | hta.AdamW
PROPOSALS: dict[str, Proposal] = {"SGD": hta.SGD(LR, MOMENTUM, WEIGHT_DECAY), "AdamW": hta.AdamW(1e-3)}
STEP = 10  # the step that is timed, of a run in progress; rivals keep its bias corrections
Step = Callable[[], None]
Factor = Any  # a number, or tensors where elements have their own: one, or one for each tensor of a list
Rule = tuple[Factor, Factor, Factor, Factor]  # read, keep, share, pull


@dataclass
class Problem:
    """m copies, their gradients and states, the anchor (None: zero), all as lists of tensors.

    `labels` holds each tensor's label, or a tensor of labels where its elements have their own. A tensor that is part
    block 1, part block 2, … stands in the lists as so many views: no rival has to look structural labels up.
    """

    proposal: Proposal
    coupling: hta.couplings.Coupling
    copies: list[list[Tensor]]  # [copy][tensor]
    grads: list[list[Tensor]]
    states: dict[str, list[list[Tensor]]]  # by the name that torch.optim gives them
    anchor: list[Tensor] | None
    labels: list[int | Tensor]
    whole: "Problem | None" = None  # the same memory with no tensor split, as a model has it
    low: list[list[Tensor]] | None = None  # where gradients are in low precision: the copies in it, to be written

    def anchors(self) -> list[Tensor | None]:
        return [None] * len(self.labels) if self.anchor is None else list(self.anchor)

    def table(self) -> Tensor:
        """The coupling's rules, float64 [labels, copies, 5]."""
        return self.coupling.rules(len(self.copies), self.proposal.step_size)[:, : len(self.copies)]

    def rules(self, label: int | Tensor) -> list[Rule]:
        """Each copy's rule: four numbers; or, where elements have their own labels, tensors, looked up once."""
        table, like = self.table(), self.copies[0][0]

        def factor(numbers: Tensor) -> Factor:  # of one copy, by label
            if isinstance(label, int) or numbers.min() == numbers.max():
                return float(numbers[label if isinstance(label, int) else 0])
            return numbers.to(like)[label.long()]

        return [tuple(factor(table[:, j, k]) for k in range(4)) for j in range(len(self.copies))]

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """torch's own, fused, over each copy, with its gradients and states in place."""
        result = []
        for j, row in enumerate(self.copies):
            parameters = [nn.Parameter(t) for t in row]
            optimizer = plain(self.proposal, parameters)
            for i, (p, g) in enumerate(zip(parameters, self.grads[j], strict=True)):
                p.grad = g
                optimizer.state[p] = {name: rows[j][i] for name, rows in self.states.items()}
                if isinstance(self.proposal, hta.AdamW):
                    optimizer.state[p]["step"] = torch.tensor(STEP - 1.0)
            result.append(optimizer)
        return result


def plain(proposal: Proposal, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    if isinstance(proposal, hta.SGD):
        return torch.optim.SGD(
            parameters, proposal.lr, proposal.momentum, weight_decay=proposal.weight_decay, fused=True
        )
    return torch.optim.AdamW(
        parameters, proposal.lr, proposal.betas, proposal.eps, weight_decay=proposal.weight_decay, fused=True
    )


def is_number(factor: Factor, *values: float) -> bool:
    return isinstance(factor, float) and factor in values


# ----------------------------------------------------------------------------------------------------- eager, in place

Op = Callable[[str], Callable[..., Any]]  # by name: of tensors (torch.Tensor) or of lists of them (torch._foreach_*)


def propose(op: Op, proposal: Proposal, x: Any, g: Any, states: Sequence[Any]) -> None:
    """x and its states become what torch.optim makes of them."""
    if isinstance(proposal, hta.SGD):
        (v,) = states
        op("mul_")(v, proposal.momentum)
        op("add_")(v, g)
        op("add_")(v, x, alpha=proposal.weight_decay)
        op("add_")(x, v, alpha=-proposal.lr)
    else:
        _, decay, fresh_mean, beta_square, fresh_square, lr, root, eps = proposal.numbers(STEP)
        mean, square = states
        op("lerp_")(mean, g, fresh_mean)
        op("mul_")(square, beta_square)
        op("addcmul_")(square, g, g, value=fresh_square)
        divisor = op("sqrt")(square)
        op("add_")(divisor, eps / root)  # the correction of the root taken into the other two numbers: a pass less
        op("mul_")(x, decay)
        op("addcdiv_")(x, mean, divisor, value=-lr / root)


def add_multiple(op: Op, x: Any, y: Any, factor: Factor) -> None:
    if isinstance(factor, float):
        op("add_")(x, y, alpha=factor)
    else:
        op("addcmul_")(x, y, factor)


def couple(op: Op, copies: Sequence[Any], anchor: Any, rules: Sequence[Rule]) -> None:
    """The proposals in `copies` become the new copies; what is nothing is left out."""
    if not all(is_number(share, 0) for _, _, share, _ in rules):
        total = op("mul")(copies[0], rules[0][0])
        for x, (read, *_) in zip(copies[1:], rules[1:], strict=True):
            add_multiple(op, total, x, read)
    for x, (_, keep, share, pull) in zip(copies, rules, strict=True):
        if not is_number(keep, 1):
            op("mul_")(x, keep)
        if not is_number(share, 0):
            add_multiple(op, x, total, share)
        if anchor is not None and not is_number(pull, 0):
            add_multiple(op, x, anchor, pull)


def eager(p: Problem) -> Step:
    """By hand: in-place eager PyTorch, tensor by tensor."""
    op: Op = partial(getattr, torch.Tensor)
    m, states, rules, anchors = len(p.copies), list(p.states.values()), [p.rules(k) for k in p.labels], p.anchors()

    @torch.no_grad()
    def step() -> None:
        for i, (anchor, rule) in enumerate(zip(anchors, rules, strict=True)):
            for j in range(m):
                propose(op, p.proposal, p.copies[j][i], p.grads[j][i], [rows[j][i] for rows in states])
            couple(op, [row[i] for row in p.copies], anchor, rule)

    return step


def foreach(p: Problem) -> Step:
    """The same with torch._foreach_*: a handful of calls for all tensors of one label."""
    groups = list(by_label(p))

    def op(name: str) -> Callable[..., Any]:
        return getattr(torch, f"_foreach_{name}")

    @torch.no_grad()
    def step() -> None:
        for j, (row, grads) in enumerate(zip(p.copies, p.grads, strict=True)):
            propose(op, p.proposal, row, grads, [rows[j] for rows in p.states.values()])
        for copies, anchor, rules in groups:
            couple(op, copies, anchor, rules)

    return step


def by_label(p: Problem) -> Iterator[tuple[list[list[Tensor]], list[Tensor] | None, list[Rule]]]:
    """The tensors of each label, and of the mixed ones, with the rules in lists where elements have their own."""
    kinds = ["mixed" if isinstance(label, Tensor) else label for label in p.labels]
    for kind in dict.fromkeys(kinds):
        chosen = [i for i, own in enumerate(kinds) if own == kind]
        rules = p.rules(p.labels[chosen[0]])
        if kind == "mixed":
            several = [p.rules(p.labels[i]) for i in chosen]
            rules = [
                tuple(c if isinstance(c, float) else [own[j][k] for own in several] for k, c in enumerate(rule))  # type: ignore[misc]
                for j, rule in enumerate(rules)
            ]
        anchor = None if p.anchor is None else [p.anchor[i] for i in chosen]
        yield [[row[i] for i in chosen] for row in p.copies], anchor, rules


# -------------------------------------------------------------------------------------------------------- torch.compile


def compiled(p: Problem) -> Step:
    """torch.compile of the whole list's update, written out of place so that it can fuse all of it."""
    proposal, copies = p.proposal, range(len(p.copies))
    by_label = {label: p.rules(label) for label in p.labels if isinstance(label, int)}
    # Labels of one's own: tensors of factors, looked up once. (torch.where on the labels takes eight times as long.)
    mixed = {i: p.rules(label) for i, label in enumerate(p.labels) if isinstance(label, Tensor)}
    labels: list[Any] = p.labels
    ratio = float(p.table()[0, 0, 1] / p.table()[0, 0, 0].clamp(min=1e-30))  # of a homotopy's keep to its read

    def proposed(x: Tensor, g: Tensor, states: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        g = g.to(x.dtype)
        if isinstance(proposal, hta.SGD):
            v = proposal.momentum * states[0] + g + proposal.weight_decay * x
            return x - proposal.lr * v, [v]
        _, decay, fresh_mean, beta_square, fresh_square, lr, root, eps = proposal.numbers(STEP)
        mean = states[0] + fresh_mean * (g - states[0])
        square = beta_square * states[1] + fresh_square * g * g
        return decay * x - lr * mean / (root * square.sqrt() + eps), [mean, square]

    def update(x, low, grads, states, anchors, mixed) -> None:
        for i, anchor in enumerate(anchors):
            rules = mixed[i] if i in mixed else by_label[labels[i]]
            both = [proposed(x[j][i], grads[j][i], [rows[j][i] for rows in states]) for j in copies]
            shares = not all(is_number(share, 0) for _, _, share, _ in rules)
            total = sum(read * a for (read, *_), (a, _) in zip(rules, both, strict=True)) if shares else None
            for j, ((a, new), (read, keep, share, pull)) in enumerate(zip(both, rules, strict=True)):
                value = (keep if isinstance(keep, float) else ratio * read) * a  # a tensor less to read
                if total is not None:
                    value = value + share * total
                if anchor is not None and not is_number(pull, 0):
                    value = value + pull * anchor
                for rows, state in zip(states, new, strict=True):
                    rows[j][i].copy_(state)
                x[j][i].copy_(value)
                if low is not None:
                    low[j][i].copy_(value)

    torch._dynamo.reset()
    fast = torch.compile(update, fullgraph=True, dynamic=False)
    states, anchors = list(p.states.values()), p.anchors()

    @torch.no_grad()
    def step() -> None:
        fast(p.copies, p.low, p.grads, states, anchors, mixed)

    return step


# ------------------------------------------------------------------------------------------------------- torch.optim


def autograd(p: Problem) -> Step:
    """The naive way: write equation (3) down, let autograd differentiate it, step torch.optim (explicit mode)."""
    assert isinstance(p.coupling, hta.Explicit)
    L, optimizers, m = p.coupling.L, p.optimizers(), len(p.copies)
    rows = [optimizer.param_groups[0]["params"] for optimizer in optimizers]
    anchored = p.table()[:, :, 4].to(p.copies[0][0])
    # Floats where elements have their own, since a product with a bool tensor would convert it every time.
    masks = [anchored[label if isinstance(label, int) else label.long()].movedim(-1, 0) for label in p.labels]
    own = [mask.tolist() if mask.dim() == 1 else [] for mask in masks]

    def step() -> None:
        total = sum(((x - y) ** 2).sum() for a, b in combinations(rows, 2) for x, y in zip(a, b, strict=True)) / L
        for i, (anchor, mask) in enumerate(zip(p.anchors(), masks, strict=True)):
            for j in range(m):
                if mask.dim() > 1 or own[i][j]:
                    squares = (rows[j][i] if anchor is None else rows[j][i] - anchor) ** 2
                    total = total + L * (squares * mask[j] if mask.dim() > 1 else squares).sum()
        total.backward()
        for optimizer in optimizers:
            optimizer.step()

    return step


def plain_optimizers(p: Problem) -> Step:
    """No homotopy at all: a torch.optim step (fused=True) for each copy. The floor that a user thinks of."""
    optimizers = p.optimizers()

    def step() -> None:
        for optimizer in optimizers:
            optimizer.step()

    return step


def one_plain_optimizer(p: Problem) -> Step:
    """The same as one optimizer over all copies' tensors: the least overhead that torch.optim has to offer."""
    optimizers = p.optimizers()
    one = plain(p.proposal, [q for optimizer in optimizers for q in optimizer.param_groups[0]["params"]])
    for optimizer in optimizers:
        one.state.update(optimizer.state)
    return one.step


# ------------------------------------------------------------------------------------------------------- low precision

Rival = Callable[[Problem], Step]


def over_masters(rival: Rival, whole: bool = False) -> Rival:
    """The rival as it is; where gradients are in low precision, between the casts that it does not do itself.

    whole: it takes the tensors unsplit.
    """

    def made(p: Problem) -> Step:
        p = (p.whole or p) if whole else p
        if p.low is None:
            return rival(p)
        grads = [[torch.empty_like(x) for x in row] for row in p.copies]
        step = rival(replace(p, grads=grads, low=None))
        casts = [[t for row in rows for t in row] for rows in (grads, p.grads, p.low, p.copies)]

        @torch.no_grad()
        def cast(to: list[Tensor], of: list[Tensor]) -> None:
            torch._foreach_copy_(to, of)

        def run() -> None:
            cast(*casts[:2])
            step()
            cast(*casts[2:])

        return run

    return made


COUPLED: dict[str, Rival] = {
    "eager, in place": over_masters(eager),
    "torch._foreach_*": over_masters(foreach),
    "torch.compile": compiled,
}
NAIVE = "autograd on (3)"
FLOOR, FLOOR_IN_ONE = "plain torch.optim(fused=True), one a copy", "plain torch.optim(fused=True), one for all"
FLOORS: dict[str, Rival] = {
    FLOOR: over_masters(plain_optimizers, whole=True),
    FLOOR_IN_ONE: over_masters(one_plain_optimizer, whole=True),
}
