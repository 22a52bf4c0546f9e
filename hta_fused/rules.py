"""Settings objects into the kernels' numbers, eager and under torch.compile. Imports checks, couplings, proposals, kernels."""

from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from . import couplings, proposals
from .checks import concrete
from .couplings import Coupling, Explicit, Homotopy
from .kernels import library, reference
from .proposals import SGD, AdamW, Proposal


def rules_of(
    proposal: Proposal, coupling: Coupling, copies: int, step: int = 1, dtype: torch.dtype = torch.float64
) -> Tensor:
    """One parameter group's row of the kernels' `rules` at a step: the proposal's numbers, then the coupling's rules.

    On the CPU, in the dtype that the kernel computes in; csrc/args.h has the layout.

    Raises:
        ValueError: a number is not finite there, or so large that its square is not; AdamW's eps is 0 there.
    """
    numbers = torch.tensor(proposal.numbers(step), dtype=torch.float64, device="cpu")
    rules = torch.cat([numbers, coupling.rules(copies, proposal.step_size, step).flatten()])
    if concrete(rules):  # else `checked` does it
        check_size(rules, dtype, f"{proposal} and {coupling}")
    if isinstance(proposal, AdamW) and not isinstance(proposal.eps, Tensor) and proposal.eps < torch.finfo(dtype).tiny:
        raise ValueError(f"eps must be at least {torch.finfo(dtype).tiny:.3g} in {dtype}, got {proposal.eps}")
    return rules.to(dtype)


def check_size(rules: Tensor, dtype: torch.dtype, made_of: str) -> None:
    limit = torch.finfo(dtype).max ** 0.5
    if not (worst := float(rules.abs().amax())) <= limit:  # NaN too
        raise ValueError(f"{made_of} must give numbers of at most {limit:.2g} in {dtype}, got {worst:.3g}")


# Under torch.compile the rules are made at run time by an op, from numbers in tensors: the compiler would make a constant
# of a float that Python computes with or that an op takes, and compile anew for each L.
library.define(
    "rules(Tensor[] numbers, str proposal, str coupling, str mode, SymInt every, SymInt step, int copies, "
    "ScalarType dtype) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.register_fake("hta_fused::rules", lib=library)
def _(numbers, proposal, coupling, mode, every, step, copies, dtype):
    width = reference.NUMBERS + (copies + 1) ** 2 * reference.RULE
    return torch.empty((1, width), dtype=dtype, device="cpu")


def _numbered_rules(numbers, proposal, coupling, mode, every, step, copies, dtype) -> Tensor:
    """`rules_of` settings objects that are given by their classes' names and their numbers in the fields' order."""
    values = map(float, numbers)
    made_of = _remade(proposals.BY_NAME[proposal], values)
    coupled_by = _remade(couplings.BY_NAME[coupling], values, mode=mode, every=every)
    return rules_of(made_of, coupled_by, copies, step, dtype)[None]


library.impl("rules", _numbered_rules, "CompositeExplicitAutograd")


def _numbers(of: Proposal | Coupling) -> list[Any]:
    """The inverse of `_remade`."""
    values: list[Any] = []
    for f in fields(of):
        if f.name not in ("mode", "every"):
            value = getattr(of, f.name)
            values += value if isinstance(value, tuple) else [value]
    return values


def _remade(kind: type, values: Iterator[float], **others: Any) -> Any:
    settings = {}
    for f in fields(kind):
        if f.name in others:
            settings[f.name] = others[f.name]
        elif f.type in (float, bool):
            settings[f.name] = f.type(next(values))
        else:  # AdamW's betas
            settings[f.name] = next(values), next(values)
    return kind(**settings)


def _as_tensors(values: list[Any]) -> list[Tensor]:
    zero = torch.zeros((), dtype=torch.float64, device="cpu")  # adding lets a float vary; filling makes it a constant
    return [v.detach().cpu() if isinstance(v, Tensor) else zero + v for v in values]


def _sgd_rules(
    L: float, lr: float, momentum: float, weight_decay: float, nesterov: bool, explicit_mode: bool, copies: int,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """`rules_of` SGD and equation (3)."""
    coupling = Explicit(L) if explicit_mode else Homotopy(L)
    return rules_of(SGD(lr, momentum, weight_decay, nesterov), coupling, copies, 1, dtype)[None]


def _cached(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Keeps what was made last, as plain tensors: under inference_mode or a transform of torch.func it would be theirs alone."""

    @lru_cache(maxsize=64)
    def plain(*arguments: Any) -> Tensor:
        with torch.inference_mode(False):
            return make(*arguments)

    def cached(*arguments: Any) -> Tensor:
        return make(*arguments) if torch._C._are_functorch_transforms_active() else plain(*arguments)

    return cached


_cached_sgd_rules = _cached(_sgd_rules)


def homotopy_rules(like: Tensor, L, lr, momentum, weight_decay, nesterov, explicit_mode, copies, dtype) -> Tensor:
    if concrete(like):
        return _cached_sgd_rules(L, lr, momentum, weight_decay, nesterov, explicit_mode, copies, dtype)
    numbers = _as_tensors([lr, momentum, weight_decay, nesterov, False, L])  # False: not maximize
    coupling = "Explicit" if explicit_mode else "Homotopy"
    return torch.ops.hta_fused.rules(numbers, "SGD", coupling, "", 1, 1, copies, dtype)


_cached_rules = _cached(rules_of)


def coupled_rules(
    like: Tensor, proposal: Proposal, coupling: Coupling, copies: int, step: int, dtype: torch.dtype
) -> Tensor:
    name = type(coupling).__name__
    known = couplings.BY_NAME.get(name) is type(coupling)  # a user's own may be anything
    if concrete(like):
        if isinstance(proposal.lr, Tensor):
            proposal = replace(proposal, lr=float(proposal.lr))
        return (_cached_rules if known else rules_of)(proposal, coupling, copies, step, dtype)[None]
    if not known:  # the compiler traces its rules
        return rules_of(proposal, coupling, copies, step, dtype)[None]
    numbers = _as_tensors([*_numbers(proposal), *_numbers(coupling)])
    mode = getattr(coupling, "mode", "")
    return torch.ops.hta_fused.rules(numbers, type(proposal).__name__, name, mode, coupling.every, step, copies, dtype)
