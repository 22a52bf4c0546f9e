"""torch's param_groups: the settings of proposals and couplings in them, and what of them goes together.

Imports checks.py, couplings.py, proposals.py and replicas.py.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any

from torch import Tensor

from . import couplings
from .checks import shown
from .couplings import Coupling, Parle
from .proposals import KINDS, Proposal
from .replicas import Replicas

# What param_groups hold beside a coupling's settings, which share their names with none of it.
TAKEN = {f.name for kind in KINDS for f in fields(kind)} | {"params", "coupling", "steps", "dampening", "initial_lr"}


def settings_of(of: Proposal | Coupling) -> dict[str, Any]:
    """Its fields, as param_groups hold them."""
    return {f.name: getattr(of, f.name) for f in fields(of)}


def coupling_settings(coupling: Coupling) -> dict[str, Any]:
    return {"coupling": type(coupling).__name__, **settings_of(coupling)}


def picked(values: Mapping[str, Any], of: Any) -> dict[str, Any]:
    """The settings of a proposal or coupling among those of a group."""
    for f in fields(of):
        if f.name not in values:
            raise ValueError(f"{f.name} is missing in param_groups")
    return {f.name: values[f.name] for f in fields(of)}


def check_together(name: str, of_groups: Sequence[Coupling], replicas: Replicas) -> None:
    """Refuses couplings of groups, all of one class, that one step cannot do."""
    for coupling in of_groups:
        check_coupling(coupling, replicas)
    if len({coupling.explicit for coupling in of_groups}) > 1:
        raise ValueError(f"mode must be the same in all {name}, got 'implicit' and 'explicit'")
    if isinstance(of_groups[0], Parle):  # whose points move together
        for key in ("eta", "rho", "every"):
            values = sorted({getattr(coupling, key) for coupling in of_groups})
            if len(values) > 1:
                raise ValueError(f"{key} of Parle must be the same in all {name}, got {', '.join(map(str, values))}")


def check_coupling(coupling: Coupling, replicas: Replicas) -> None:
    if not isinstance(coupling, Coupling):
        raise TypeError(f"coupling must be one of {', '.join(couplings.BY_NAME)}, got {type(coupling).__name__}")
    taken = [f.name for f in fields(coupling) if f.name in TAKEN]
    if taken:
        raise ValueError(
            f"coupling {type(coupling).__name__} must not have a field {taken[0]!r}: param_groups have one"
        )
    coupling.rules(replicas.count, 1.0, coupling.every)  # raises for what this number of copies cannot have
    if coupling.moves_anchor and replicas.anchor is None:
        raise ValueError(
            f"coupling {type(coupling).__name__} moves the anchor, which is zero in these Replicas; pass anchor='init'"
        )


def split(groups: Iterable[Mapping[str, Any]], replicas: Replicas, index_of: Mapping[int, int]) -> list[dict[str, Any]]:
    """torch's param_groups from ours: the rest first, then each of `groups`; copy 0's parameters, then copy 1's, …

    index_of: the layout's number of copy 0's parameters, by id.
    """
    names, rows = replicas.layout.names, replicas.trained
    taken: set[int] = set()
    result = []
    if isinstance(groups, str | Mapping) or not isinstance(groups, Iterable):
        raise TypeError(f"groups must be a list of dicts, got {shown(groups)}")
    for group in groups:
        if not isinstance(group, Mapping) or "params" not in group:
            raise TypeError(f"groups must hold dicts with 'params', got {shown(group)}")
        wanted = group["params"]
        if not (callable(wanted) or isinstance(wanted, str | Tensor | Iterable)):
            raise TypeError(f"params of a group must be a function, names or parameters, got {shown(wanted)}")
        if callable(wanted):
            indices = [i for i, name in enumerate(names) if wanted(name)]
        else:
            indices = []
            for item in [wanted] if isinstance(wanted, str | Tensor) else wanted:
                if isinstance(item, str) and item in names:
                    indices.append(names.index(item))
                elif isinstance(item, Tensor) and id(item) in index_of:
                    indices.append(index_of[id(item)])
                else:
                    what = f"a tensor of shape {tuple(item.shape)}" if isinstance(item, Tensor) else shown(item)
                    raise ValueError(
                        f"groups name {what}, which is no trainable parameter of copy 0; there are {', '.join(names)}"
                    )
        if not indices:
            raise ValueError("groups hold a group whose params match no parameter")
        if taken & set(indices) or len(set(indices)) < len(indices):
            raise ValueError(f"groups name {names[min(taken & set(indices) or set(indices))]!r} more than once")
        taken |= set(indices)
        result.append({**group, "params": [row[i] for row in rows for i in indices]})
    rest = [i for i in range(len(names)) if i not in taken]
    if rest:
        result.insert(0, {"params": [row[i] for row in rows for i in rest]})
    return result
