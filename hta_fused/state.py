"""An optimizer's state over flat buffers: shown in torch's own layout, and whatever is done to it there is what counts.

Owns the buffers' meaning, and no arithmetic. Imports checks.py, couplings.py, groups.py, kernels/formats.py, proposals.py and replicas.py.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from . import couplings
from .checks import number, plain, shown
from .couplings import Coupling, Parle
from .groups import settings_of
from .kernels.formats import SCALED, packed, unpack
from .proposals import SGD, Proposal
from .replicas import Replicas

STATE_FORMATS = {"full": None, "bfloat16": torch.bfloat16, "8bit": torch.uint8}


class FlatState(torch.optim.Optimizer):
    """What CoupledOptimizer is apart from stepping: buffers of [m, N], the `state` that shows them, and state_dicts."""

    _replicas: Replicas
    _proposal: Proposal
    _coupling_class: type[Coupling]
    _buffers: dict[str, Tensor]  # [m, N] each, by torch's names
    _idle: dict[str, Tensor]  # those of which there is no need at the moment
    _scales: dict[str, Tensor]  # of those in bytes, [m, N / SCALED], by the same names
    _format: torch.dtype | None  # the proposal's buffers' where it is not the values'
    _state_rows: list[Tensor]  # the proposal's among _buffers
    _index_of: dict[int, int]  # the layout's number of copy 0's parameters, by id
    _steps: int  # done so far, skipped ones included
    _noise: Tensor  # the same on the device
    _step_tensor: Tensor  # the same, as torch's AdamW shows it
    _planned: Tensor | None  # the rules of steps to come, of which _cursor is the next
    _cursor: Tensor
    _plan_start: int
    _known: Any  # what the rules on the device were made from

    @property
    def replicas(self) -> Replicas:
        """The copies, those it was made with."""
        return self._replicas

    @property
    def proposal(self) -> Proposal:
        """The proposal it was made with; param_groups say what its settings are now."""
        return self._proposal

    def _make_buffers(self) -> None:
        raise NotImplementedError

    def _check_groups(self, name: str, groups: list[dict[str, Any]]) -> None:
        raise NotImplementedError

    def _proposal_of(self, group: Mapping[str, Any], **changed: Any) -> Proposal:
        raise NotImplementedError

    @property
    def steps(self) -> int:
        """How many steps were taken, skipped ones included. After planned steps, reading it waits for the device."""
        if self._planned is not None:
            self._steps = self._plan_start + int(self._cursor)
            self._show_step()
        return self._steps

    def _new_buffer(self, name: str, number: int) -> Tensor:
        """Zeros for a buffer of the proposal's, [m, N]."""
        if self._format == torch.uint8:
            like = self.replicas.grads
            self._scales[name] = torch.zeros(
                len(like), like.shape[1] // SCALED, dtype=torch.float32, device=like.device
            )
        return self.replicas.rows(number, self._format)

    def _is_square(self, name: str) -> bool:
        """Whether a buffer in bytes holds squares, as csrc/args.h's state_row has it."""
        return name in self.proposal.all_buffers[1:]

    def _read(self, name: str) -> Tensor:
        """A buffer's numbers, [m, N]: itself, or where it is in bytes made anew."""
        buffer = self._buffers.get(name, self._idle.get(name))
        assert buffer is not None
        if name not in self._scales:
            return buffer
        square = self._is_square(name)
        return torch.stack([unpack(row, scale, square) for row, scale in zip(buffer, self._scales[name], strict=True)])

    def _write(self, name: str, values: Tensor) -> None:
        """Puts numbers [m, N] into a buffer in bytes; what `_read` gave comes back to the bit."""
        buffer = self._buffers.get(name, self._idle.get(name))
        assert buffer is not None
        for row, scale, of in zip(buffer, self._scales[name], values, strict=True):
            for kept, wanted in zip((row, scale), packed(of, row, scale, None, self._is_square(name)), strict=True):
                kept.copy_(wanted)

    def state_dict(self) -> dict[str, Any]:
        """As torch.optim.Optimizer.state_dict; buffers in bytes come as float32. Each group holds the coupling's settings and
        how many `steps` were done."""
        for group in self.param_groups:
            group["steps"] = self.steps
        if self._scales:
            self._take_edits()

        def fill(optimizer: Any, state: dict[str, Any]) -> None:  # before the user's own hooks have their say
            for group in state["param_groups"]:  # where schedulers may have put NumPy's numbers
                group |= {name: plain(value) for name, value in group.items() if name != "params"}
            numbers = {
                id(p): key
                for group, saved in zip(self.param_groups, state["param_groups"], strict=True)
                for p, key in zip(group["params"], saved["params"], strict=True)
            }
            for name in self._scales:
                for parameters, row in zip(self.replicas.trained, self._read(name), strict=True):
                    for parameter, view in zip(parameters, self.replicas.layout.views(row), strict=True):
                        key = numbers[id(parameter)]
                        state["state"][key] = {**state["state"].get(key, {}), name: view.clone()}

        hook = self.register_state_dict_post_hook(fill, prepend=True)
        try:
            return super().state_dict()
        finally:
            hook.remove()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch.optim.Optimizer.load_state_dict; what it holds goes into the flat buffers.

        Raises:
            ValueError, TypeError: groups or a buffer's shape differ, or settings are missing or not in their range; nothing is
                changed then.
        """
        if not isinstance(state_dict, Mapping):  # what is one, the user's hooks may still bring into form
            _check_form(state_dict)
        final, kept = state_dict, [dict(group) for group in self.param_groups]

        def catch(optimizer: Any, loaded: dict[str, Any]) -> None:  # after the user's own hooks have had their say
            nonlocal final
            _check_form(loaded)
            # As many as both have: torch counts them.
            groups = [self._with_coupling(*both) for both in zip(loaded["param_groups"], kept, strict=False)]
            self._check_groups("state_dict's param_groups", groups)
            self._check_entries("state_dict", self._by_parameter(loaded), groups[0]["coupling"] if groups else None)
            final = {**loaded, "param_groups": groups + loaded["param_groups"][len(groups) :]}

        def take(optimizer: Any) -> None:
            for group, wanted in zip(self.param_groups, final["param_groups"], strict=True):
                group.update({name: value for name, value in wanted.items() if name not in group})
            self._take_state(final)

        hooks = [
            self.register_load_state_dict_pre_hook(catch),
            self.register_load_state_dict_post_hook(take, prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()

    def torch_state_dict(self, copy: int | str) -> dict[str, Any]:
        """The state_dict that torch's own optimizer (SGD, AdamW) over one copy's parameters, in param_groups' order,
        would have.

        Args:
            copy: its number, "theta" or "eta", or "mean" for the merged model's.
        """
        row = self._row(copy, "mean")
        self._take_edits()
        groups, state, count = [], {}, 0
        views = {
            name: self.replicas.layout.views(self.replicas.mean(values) if row is None else values[row])
            for name, values in ((name, self._read(name)) for name in (self._idle | self._buffers))
        }
        one = self.proposal.torch_optimizer([nn.Parameter(torch.empty(0))], lr=self.proposal.lr)
        defaults = {k: v for k, v in one.param_groups[0].items() if k != "params"}
        for group in self.param_groups:
            indices = self._indices(group)
            settings = {k: plain(v) for k, v in group.items() if k in {*defaults, "initial_lr"}}
            groups.append({**defaults, **settings, "params": list(range(count, count + len(indices)))})
            for i in indices:
                state[count] = {
                    name: views[name][i].to(self.replicas.dtype, copy=True) for name in self._proposal_of(group).buffers
                }
                if not isinstance(self.proposal, SGD):
                    state[count]["step"] = torch.tensor(float(self.steps), device="cpu")
                count += 1
        return {"state": state, "param_groups": groups}

    def load_torch_state_dict(self, copy: int | str, state_dict: dict[str, Any]) -> None:
        """Takes one copy's buffers, and the settings, from the state_dict of torch's own optimizer.

        Args:
            copy: its number, "theta" or "eta".
            state_dict: of an optimizer over parameters of the same shapes in param_groups' order.
        """
        row = self._row(copy)
        _check_form(state_dict)
        self._take_edits()
        layout = self.replicas.layout
        groups = state_dict["param_groups"]
        sizes, expected = [len(g["params"]) for g in groups], [len(self._indices(g)) for g in self.param_groups]
        if sizes != expected:
            raise ValueError(f"state_dict has groups of {sizes} parameters, but this optimizer has {expected}")
        names = self.proposal.all_buffers
        plan, steps = [], set()
        for group, saved in zip(self.param_groups, groups, strict=True):
            check_foreign(saved)
            lacks = [key for key in settings_of(self.proposal) if key not in saved and key != "maximize"]
            if lacks:
                raise ValueError(f"{lacks[0]} is missing in state_dict's param_groups: it is of another optimizer")
            self._proposal_of({**group, **{k: v for k, v in saved.items() if k in settings_of(self.proposal)}})
            for i, key in zip(self._indices(group), saved["params"], strict=True):
                entry = state_dict["state"].get(key, {})
                if not isinstance(entry, Mapping):
                    raise TypeError(f"state_dict's entry of parameter {key} must be a dict, got {shown(entry)}")
                steps |= (
                    {steps_of(f"state_dict's step of parameter {key}", entry["step"])} if "step" in entry else set()
                )
                _check_whole(f"state_dict's parameter {key}", entry, names)
                for name in names:
                    buffer = entry.get(name)
                    if buffer is not None:
                        self._check_shape(f"state_dict's {name} {key}", buffer, i)
                    plan.append((name, i, buffer))
        if len(steps) > 1:
            raise ValueError(f"state_dict's parameters have taken different numbers of steps, {sorted(steps)}")
        for group, saved in zip(self.param_groups, groups, strict=True):
            kept = {*settings_of(self.proposal), "initial_lr"}
            group.update({k: v.clone() if isinstance(v, Tensor) else v for k, v in saved.items() if k in kept})
        self._make_buffers()
        values = {name: self._read(name) for name in self._buffers}
        views = {name: layout.views(of[row]) for name, of in values.items()}
        for name, i, buffer in plan:
            if name in views:
                views[name][i].zero_() if buffer is None else views[name][i].copy_(buffer)
        for name in values.keys() & self._scales.keys():
            self._write(name, values[name])
        self._set_steps(_exactly(steps.pop(), self.steps) if steps else self.steps)

    def _row(self, copy: int | str, *more: str) -> int | None:
        """A copy's row; None for "mean"."""
        if isinstance(copy, bool) or not isinstance(copy, int | str):
            raise TypeError(f"copy must be a name or a number, got {shown(copy)}")
        names = {"theta": 0, "eta": 1} if len(self.replicas) > 1 else {"theta": 0}
        if copy in more:
            return None
        row = names.get(copy, -1) if isinstance(copy, str) else copy
        if not 0 <= row < len(self.replicas):
            known = ", ".join(map(repr, (*names, *more)))
            raise ValueError(f"copy must be {known} or a number below {len(self.replicas)}, got {copy!r}")
        return row

    def _set_steps(self, steps: int) -> None:
        self._steps, self._planned, self._known = steps, None, None
        self._noise.fill_(steps)
        self._show_step()

    def _show_step(self) -> None:
        """Shows the number of steps in `state`, where torch's AdamW has it."""
        if not isinstance(self.proposal, SGD):
            self._step_tensor.fill_(self._steps)
            self._step_was = self._step_tensor.item()

    def _check_shape(self, what: str, buffer: Any, index: int) -> None:
        """Refuses a buffer that is not of the shape of parameter number `index` of the layout."""
        layout = self.replicas.layout
        if not isinstance(buffer, Tensor) or buffer.is_complex():
            raise TypeError(f"{what} must be a real tensor, got {shown(buffer)}")
        if buffer.is_meta or buffer.layout != torch.strided:
            raise TypeError(f"{what} must be a dense tensor in memory, got a {buffer.layout} one on {buffer.device}")
        if buffer.shape != layout.shapes[index]:
            raise ValueError(
                f"{what} has shape {tuple(buffer.shape)}, but {layout.names[index]!r} has {tuple(layout.shapes[index])}"
            )

    def _with_coupling(self, group: Mapping[str, Any], kept: Mapping[str, Any]) -> dict[str, Any]:
        """A state_dict's group with what it lacks of its coupling: torch's own has none. That stays as it was, else is
        the default."""
        name = group.get("coupling", kept["coupling"])
        of = fields(self._coupling_named(name))
        settings = {f.name: f.default for f in of if f.default is not MISSING}
        if name == kept["coupling"]:
            settings |= {f.name: kept[f.name] for f in of if f.name in kept}
        return {"coupling": name, **settings, **group}

    def _coupling_named(self, name: Any) -> type[Coupling]:
        """The coupling that a state_dict names: this optimizer's own, which may be anyone's, or one of ours."""
        known = {**couplings.BY_NAME, self._coupling_class.__name__: self._coupling_class}
        if not isinstance(name, str) or name not in known:
            raise ValueError(f"state_dict's coupling must be one of {', '.join(known)}, got {shown(name)}")
        return known[name]

    def _check_entries(
        self, name: str, entries: Mapping[Any, Mapping[str, Any]], coupling: str | None = None
    ) -> int | None:
        """Refuses state that is not of the parameters' shapes, and returns what it says of AdamW's steps, if anything.
        coupling: another one's name than that of now."""
        more = (self._coupling_named(coupling) if coupling else self._coupling_class).buffers
        steps, layout = set(), self.replicas.layout
        for row, parameters in enumerate(self.replicas.trained):
            for i, parameter in enumerate(parameters):
                entry = entries.get(parameter, {})
                if not isinstance(entry, Mapping):
                    raise TypeError(f"{name} of {layout.names[i]!r} must be a dict, got {shown(entry)}")
                steps.add(steps_of(f"{name}'s step", entry["step"]) if "step" in entry else None)
                if name == "state_dict":
                    _check_whole(f"state_dict's entry of {layout.names[i]!r}", entry, self.proposal.all_buffers)
                for key in (*self.proposal.all_buffers, *more):
                    if entry.get(key) is not None:
                        self._check_shape(f"{name}'s {key} of copy {row}", entry[key], i)
        if isinstance(self.proposal, SGD):
            return None
        if len(steps) > 1:
            raise ValueError(f"{name}'s step must be the same for all parameters, got {', '.join(map(str, steps))}")
        return steps.pop()

    @torch.no_grad()  # what others put there may require gradients
    def _take_entries(self, entries: Mapping[Any, Mapping[str, Any]], shown: bool) -> None:
        """Copies what state holds for each parameter into the buffers: zero for what it lacks, for Parle's the copies.

        shown: whether it is `self.state`, which does not show buffers in bytes.
        """
        ours = {id(tensor) for tensor in self._shown}
        replicas, layout = self.replicas, self.replicas.layout
        named = {name for row in replicas.trained for p in row for name in entries.get(p, {})}
        kept = [
            name
            for name in self.proposal.all_buffers
            if name in named | self._idle.keys() and name not in self._buffers
        ]
        for name in kept:  # of no use until a momentum is set
            if name not in self._idle:
                self._idle[name] = self._new_buffer(name, len(self._state_rows) + 2)
        plan = []
        values = {name: self._read(name) for name in (*self._buffers, *kept)}
        for name, buffer in values.items():
            for row, parameters in enumerate(replicas.trained):
                for i, (parameter, view) in enumerate(zip(parameters, layout.views(buffer[row]), strict=True)):
                    value = entries.get(parameter, {}).get(name)
                    if value is None and shown and name in self._scales:
                        continue
                    if value is None:
                        value = (
                            replicas.masters.read(row, i)
                            if name in self._coupling_class.buffers
                            else torch.zeros((), device="cpu")
                        )
                    elif id(value) in ours:
                        if value.data_ptr() == view.data_ptr():
                            continue
                        value = value.clone()  # another parameter's, which may be written before it is read
                    plan.append((view, value))
        for view, value in plan:
            view.copy_(value)
        for name in values.keys() & self._scales.keys():
            self._write(name, values[name])

    def _take_state(self, state_dict: dict[str, Any]) -> None:
        """Brings what a state_dict holds (itself: torch has cast its copies to the parameters' dtype) into the buffers."""
        self._coupling_class = self._coupling_named(self.param_groups[0]["coupling"])
        clock = max((int(group.pop("steps")) for group in self.param_groups if "steps" in group), default=0)
        self._make_buffers()
        entries = self._by_parameter(state_dict)
        steps = self._check_entries("state_dict", entries)
        self._take_entries(entries, shown=False)
        self._set_steps(clock if steps is None else _exactly(steps, clock))

    def _by_parameter(self, state_dict: Mapping[str, Any]) -> dict[Any, Mapping[str, Any]]:
        keys = [key for group in state_dict["param_groups"] for key in group["params"]]
        held = [p for group in self.param_groups for p in group["params"]]
        return {p: state_dict["state"].get(key, {}) for p, key in zip(held, keys, strict=False)}  # torch counts them

    def _take_edits(self) -> None:
        """Brings what others put into `state`, or took from it, into the buffers, and shows these there again."""
        try:
            values = chain.from_iterable(map(dict.values, self.state.values()))
            edited = list(map(id, values)) != self._value_ids
        except TypeError:  # an entry that is no dict
            edited = True
        if edited:
            done = self.steps  # which shows them in `state`, where a plan counts them on the device
            steps = self._check_entries("state", self.state)
            steps = steps and _exactly(steps, done)
            if self._planned is not None and not isinstance(self.proposal, SGD) and steps != done:
                raise RuntimeError("state's step must not change between planned steps; plan again")
            self._take_entries(self.state, shown=True)
            self._show_state()
            if not isinstance(self.proposal, SGD) and steps != done:
                self._set_steps(steps or 0)
        elif not isinstance(self.proposal, SGD) and self._planned is None:
            step = self._step_tensor.item()
            if step != self._step_was:
                self._set_steps(steps_of("state's step", step))  # edited in place

    def _show_state(self) -> None:
        """Makes the views of the flat buffers the optimizer's state, in torch's own layout, beside what others keep there."""
        step = {} if isinstance(self.proposal, SGD) else {"step": self._step_tensor}
        ours = {"step", *self.proposal.all_buffers, *Parle.buffers}
        self._shown = []
        for row, parameters in enumerate(self.replicas.trained):
            tensors = {
                name: self.replicas.layout.tensors(buffer[row])
                for name, buffer in (self._buffers | self._idle).items()
                if name not in self._scales
            }
            for i, parameter in enumerate(parameters):
                theirs = {name: value for name, value in self.state.get(parameter, {}).items() if name not in ours}
                self.state[parameter] = step | {name: of[i] for name, of in tensors.items()} | theirs
                self._shown += [of[i] for of in tensors.values()]
        self._values = [
            value for entry in self.state.values() for value in entry.values()
        ]  # held: an id may come again
        self._value_ids = list(map(id, self._values))

    def _indices(self, group: dict[str, Any]) -> list[int]:
        """The layout's numbers of a group's parameters."""
        params: list[nn.Parameter] = group["params"]
        return [self._index_of[id(p)] for p in params[: len(params) // len(self.replicas)]]


def steps_of(name: str, value: Any) -> int:
    """A number of steps, which torch keeps in a float."""
    steps = number(name, value)
    if not (0 <= steps < math.inf and steps == int(steps)):
        raise ValueError(f"{name} must be a whole number, at least 0, got {steps}")
    if steps >= 2**53:
        raise ValueError(f"{name} must be below 2^53, got {steps:g}")
    return int(steps)


def _check_form(state_dict: Any) -> None:
    """Refuses what has not the form of an optimizer's state_dict.

    Raises:
        TypeError, ValueError: it is no dict, or its `state` or `param_groups` are missing or not what torch has there.
    """
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict must be a dict, got {shown(state_dict)}")
    for name, kind, what in (("param_groups", list | tuple, "a list"), ("state", Mapping, "a dict")):
        if name not in state_dict:
            raise ValueError(f"{name} is missing in state_dict: it is no optimizer's")
        if not isinstance(state_dict[name], kind):
            raise TypeError(f"{name} of state_dict must be {what}, got {shown(state_dict[name])}")
    for group in state_dict["param_groups"]:
        if not isinstance(group, Mapping) or not isinstance(group.get("params"), list | tuple):
            raise TypeError(f"param_groups of state_dict must be dicts with a list 'params', got {shown(group)}")


def _exactly(shown: int, clock: int) -> int:
    """A number of steps of which `state` shows what float32 holds, every whole number up to 2^24 and ever fewer beyond: the
    clock's, unless another one was put there."""
    return clock if torch.tensor(clock, dtype=torch.float32, device="cpu").item() == shown else shown


def _check_whole(what: str, entry: Mapping[str, Any], names: Sequence[str]) -> None:
    """Refuses an entry with some of the proposal's buffers: it is of another optimizer, or cut."""
    held = [name for name in names if entry.get(name) is not None]
    if held and len(held) < len(names):
        (lacks, *_) = [name for name in names if name not in held]
        raise ValueError(f"{what} has {held[0]} but no {lacks}: it is of another optimizer")


def check_foreign(saved: Mapping[str, Any]) -> None:
    """Refuses a group of torch's own optimizers with what these here do not have."""
    if saved.get("dampening") or saved.get("amsgrad"):
        raise ValueError("state_dict has dampening or amsgrad set, which this optimizer does not have")
    if "decoupled_weight_decay" in saved and not {"amsgrad", "momentum_decay"} & saved.keys():
        raise ValueError("state_dict has the groups of torch.optim.RAdam, not of AdamW: it is of another optimizer")
    if "momentum_decay" in saved:
        raise ValueError("state_dict has momentum_decay, of torch.optim.NAdam, which this optimizer does not have")
    if saved.get("decoupled_weight_decay") is False and saved.get("weight_decay"):
        raise ValueError("state_dict has the weight_decay of torch.optim.Adam, not of AdamW: it must be 0")
