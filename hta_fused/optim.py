"""Optimizers of coupled copies, as torch.optim.Optimizers: a proposal for each copy, a coupling between them.

Owns the proposals' buffers and the settings; the copies are the Replicas', the arithmetic is the step op's.
"""

import copy
import warnings
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, replace
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from . import proposals
from .checks import choice, fakes, flag, number, shown, whole
from .couplings import Coupling, Explicit, Homotopy, Parle
from .distributed import StepAcross
from .groups import check_coupling, check_together, coupling_settings, picked, settings_of, split
from .kernels.formats import SCALED, TILE
from .kernels.reference import NUMBERS, PROPOSE, RULE, SHARE, arithmetic
from .ops import as_scalar, check_apart, step_buffers
from .proposals import SGD, Proposal
from .replicas import Replicas
from .rules import rules_of
from .state import STATE_FORMATS, FlatState, check_foreign, steps_of


class StepStats(NamedTuple):
    """What the last step left behind."""

    # The quadratic terms of equation (3) after the step; NaN before the first, between coupling steps, where groups differ in L
    # or how often they couple, and for other couplings.
    penalty: float
    distance: float  # √Σ_{i<j} ‖x_i − x_j‖² after the step; NaN before the first
    skipped: int  # steps skipped so far for a gradient that was not finite


class CoupledOptimizer(FlatState):
    """Steps m copies at once: each proposes a step of its own, and the coupling pulls them together.

    With one copy and a coupling that does nothing it is torch.optim.SGD or AdamW. A parameter without a gradient counts
    as having a gradient of zero, since the coupling moves it all the same. One that is frozen (in all copies) is moved
    by the coupling alone: no momentum, no weight decay. A step in which any gradient is inf or NaN is skipped; it
    counts as a step where bias corrections and periods are concerned.

    `state` shows each parameter's buffers in torch's own layout, from the start, and is what the next step reads: an
    entry that was deleted or cleared counts as zero (AdamW's `step`, one for all parameters, too), one that was
    assigned or edited counts as it is. When the Replicas are moved, the buffers follow at the next step.

    Args:
        replicas: the copies.
        proposal: `SGD(…)` or `AdamW(…)`; its settings are held in param_groups under torch's names.
        coupling: see `couplings`; assign `.coupling` at any time. Its settings are held in param_groups too.
        groups: parameter groups with settings of their own: dicts whose "params" is a function of a parameter's
            name, or an iterable of names or of copy 0's parameters. What no group takes is in the first group of
            `param_groups`. Each group of `param_groups` lists copy 0's parameters, then copy 1's, and so on.
        skip_nonfinite: look at all gradients before the step and skip it if any is inf or NaN; costs one more read of
            the gradients. With a GradScaler its own check serves.
        capturable: `step` may be captured in a CUDA graph, which then reads the settings from the device: after
            changing any (lr, L, …) call `refresh` before the next replay, or `plan` many steps at once. Assigning
            `.coupling` refreshes by itself.
        state_format: of the proposal's buffers: "full", or beside float32 "bfloat16" (2 bytes), or "8bit" (1 byte, with a
            scale for each 128 elements, csrc/formats.h), both rounded at random such that nothing is lost on average. `state`
            does not show buffers of bytes, but takes what is assigned there; state_dicts are as those of "full".
        unscale: a GradScaler leaves it to `step` to divide the gradients, which saves a pass. Lightning clips no
            gradients of such an optimizer in mixed precision: False is for it. With a group it must be True.

    Raises:
        ValueError: a setting outside its range or too large for the parameters' dtype, a name that the model does not
            have, a parameter in two groups, a coupling that moves an anchor which is zero. `step` raises it too, before
            anything is written, for what was put into param_groups.
        TypeError: an argument or a setting of another type than these.
    """

    @torch.inference_mode(False)  # what is made there no step could write; here, and wherever buffers are made
    def __init__(
        self,
        replicas: Replicas,
        proposal: Proposal,
        coupling: Coupling,
        *,
        groups: Iterable[Mapping[str, Any]] = (),
        skip_nonfinite: bool = True,
        capturable: bool = False,
        state_format: str = "full",
        unscale: bool = True,
    ):
        if not isinstance(replicas, Replicas):
            raise TypeError(
                f"replicas must be Replicas, got {shown(replicas)}; wrap the model, not its parameters: Replicas(model)"
            )
        if not isinstance(proposal, proposals.KINDS):
            raise TypeError(f"proposal must be an SGD or AdamW, got {shown(proposal)}")
        flag("skip_nonfinite", skip_nonfinite)
        flag("capturable", capturable)
        flag("unscale", unscale)
        state_format = choice("state_format", state_format, *STATE_FORMATS)
        if state_format != "full" and replicas.dtype != torch.float32:
            raise ValueError(f"state_format={state_format!r} needs copies of float32, got {replicas.dtype}")
        if state_format != "full" and replicas.processes:
            raise ValueError(f"state_format must be 'full' where each process holds one copy, got {state_format!r}")
        if not unscale and replicas.processes:
            raise ValueError(
                "unscale must be True where each process holds one copy, got False: a GradScaler would skip in one alone"
            )
        self._state_format = state_format
        self._format = STATE_FORMATS[state_format]
        self._rounds = (self._format, replicas.anchor_format, replicas.master_format) != (
            None,
            "full",
            "full",
        )  # at random
        self._replicas = replicas
        self.skip_nonfinite = skip_nonfinite
        self.capturable = capturable
        self._proposal = proposal
        self._step_supports_amp_scaling = unscale  # GradScaler hands over grad_scale and found_inf
        device = replicas.device
        self._bound = replicas.grads  # others, once the Replicas have moved
        # How many steps were done, on the device: a number of each step's own, by which its results are rounded at random.
        self._noise = torch.zeros(1, dtype=torch.int64, device=device)
        self._codes = replicas.partition.codes.clone()  # (group, label) of each tile
        self._frozen: list[int] = []  # parameters, by the layout's number
        self._stats = torch.tensor([float("nan"), float("nan"), 0.0, 0.0], dtype=torch.float64, device=device)
        self._buffers: dict[str, Tensor] = {}  # [m, N] each
        self._idle: dict[str, Tensor] = {}  # those of which there is no need at the moment
        self._scales: dict[str, Tensor] = {}
        self._steps = 0  # done so far, skipped ones included
        self._step_tensor = torch.zeros((), dtype=torch.float32, device="cpu")  # the same, as torch's AdamW shows it
        self._step_was = 0.0
        self._shown: list[Tensor] = []  # in `state`, ours
        self._known: Any = None  # what the rules on the device were made from
        self._rules_known = _numbers([])  # these rules, on the CPU
        self._planned: Tensor | None = None
        self._made: list[tuple[Proposal, Coupling]] = []  # of each group, as the rules were made of
        self._waiting: list[Tensor] = []  # parts of the buffers that are to stay as they are
        self._warned = False
        self._index_of = {id(p): i for i, p in enumerate(replicas.trained[0])}  # in the layout, by copy 0's parameter
        check_coupling(coupling, replicas)
        self._check_anchor()
        defaults = {**settings_of(proposal), "dampening": 0.0, **coupling_settings(coupling)}
        if not isinstance(proposal, SGD):
            del defaults["dampening"]
        self._coupling_class = type(coupling)
        super().__init__(split(groups, replicas, self._index_of), defaults)
        self._grouped = self._params_of_groups()
        self._write_codes()
        # What the kernels read, a row for each group; see csrc/args.h.
        self.rules = torch.zeros(0, dtype=arithmetic(replicas.dtype))
        self._check_values(map(self._coupling_of, self.param_groups))
        self._across = StepAcross(replicas.processes) if replicas.processes else None
        if replicas.processes:
            if capturable:
                raise ValueError("capturable must be False where each process holds one copy, got True")
            replicas.processes.agree(self._identity())
        self._make_buffers()

    # ------------------------------------------------------------------------------------------------- settings

    @property
    def state_format(self) -> str:
        """Of the proposal's buffers; for another one make a new optimizer."""
        return self._state_format

    @property
    def coupling(self) -> Coupling:
        """The coupling of all groups (of the first, should they differ)."""
        return self._coupling_of(self.param_groups[0])

    @coupling.setter
    @_disable_dynamo  # else a compiled function would be compiled anew for each value
    def coupling(self, value: Coupling) -> None:
        check_coupling(value, self.replicas)
        self._check_values([value] * len(self.param_groups))
        self._take_edits()
        old, new = coupling_settings(self.coupling), coupling_settings(value)
        for group in self.param_groups:
            for name in old:
                group.pop(name, None)
            group.update(new)
        self._coupling_class = type(value)
        self._make_buffers()
        if self.capturable:
            self.refresh()

    @property
    def L(self) -> float:
        """The homotopy parameter of all groups (of the first, should they differ), where the coupling has one."""
        if "L" not in self._coupling_class.__dataclass_fields__:
            raise AttributeError(f"there is no L: the coupling is {self._coupling_class.__name__}")
        return self.param_groups[0]["L"]

    @L.setter
    @_disable_dynamo
    def L(self, value: float) -> None:
        _ = self.L
        value = number("L", value)
        of_groups = [replace(self._coupling_of(group), L=value) for group in self.param_groups]  # type: ignore[call-arg]
        for coupling in of_groups:
            check_coupling(coupling, self.replicas)
        if self.capturable:  # else `step` looks before it writes
            self._check_values(of_groups)
        for group in self.param_groups:
            group["L"] = value
        if self.capturable:
            self.refresh()

    @property
    def stats(self) -> StepStats:
        """What the last step left behind. Reading it waits for the device; with a group all processes must read it."""
        values = self._stats
        if self.replicas.processes:
            values = torch.stack(
                [self.replicas.processes.sum(values[0]), values.new_tensor(self.replicas.distance() ** 2), *values[2:]]
            )
        anchor, pairs, _, skipped = values.tolist()
        # Those of the last step, whatever was assigned since.
        now = self._planned is not None or not self._made
        of_groups = [self._coupling_of(group) for group in self.param_groups] if now else [c for _, c in self._made]
        coupling, penalty = of_groups[0], float("nan")
        coupled = all(c == coupling for c in of_groups) and self.steps % coupling.every == 0
        if anchor == anchor and coupled and isinstance(coupling, Homotopy | Explicit):
            # At the ends of the path a term's factor is infinite where the term itself is 0.
            L = coupling.L
            penalty = (L * anchor if anchor else 0.0) + (pairs / L if pairs and L else 0.0)
        return StepStats(penalty, pairs**0.5, int(skipped))

    # ------------------------------------------------------------------------------------------------- stepping

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Zeroes the flat gradient buffer; `set_to_none` is there for callers and changes nothing."""
        self.replicas.zero_grad()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Only for the constructor: the copies' parameters are all in groups from the start; see `groups`."""
        if getattr(self, "_complete", False):
            raise ValueError(f"param_groups is complete: pass groups= to {type(self).__name__} instead")
        super().add_param_group(param_group)
        held = sum(len(group["params"]) for group in self.param_groups)
        self._complete = held == len(self.replicas) * len(self.replicas.layout.names)

    @_disable_dynamo
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of all copies.

        Args:
            closure: re-evaluates the model, fills the gradients and returns the loss.

        Returns:
            What closure returned, or None.
        """
        loss = None
        if fakes():
            raise RuntimeError(
                f"{type(self).__name__}.step() must not be called under FakeTensorMode: it writes memory"
            )
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        replicas = self.replicas
        replicas.check()
        if self._params_of_groups() != self._grouped:
            raise ValueError("params of param_groups must stay those of the constructor's groups, got others")
        grad_scale = as_scalar("grad_scale", getattr(self, "grad_scale", None), replicas.grads)
        capturing = replicas.grads.is_cuda and torch.cuda.is_current_stream_capturing()
        if not capturing:
            self._take_edits()
            self._follow()
            if self._planned is None:
                self.refresh()  # raises for bad settings before anything is written
            elif self._settings_but_lr() != self._planned_of:
                raise RuntimeError("param_groups and coupling must not change between planned steps; plan again")
            elif self._cursor.is_cpu and int(self._cursor) >= len(self._planned):
                raise RuntimeError(f"a plan of {len(self._planned)} steps has been taken to its end; plan again")
        replicas.collect_grads_unchecked()
        if self._planned is not None:
            self.rules.view(-1).copy_(self._planned.index_select(0, self._cursor)[0])
        elif capturing:
            if not self.capturable:
                raise RuntimeError(f"a CUDA graph captures {type(self).__name__}.step(), which needs capturable=True")
            if self._known is None:
                raise RuntimeError(f"call {type(self).__name__}.refresh() before a CUDA graph captures step()")
        waiting = [part.clone() for part in self._waiting]
        if self._coupling_class is Parle:
            self._step_parle(grad_scale)
        elif self._across:
            self._step_across(self._across, grad_scale)
        else:
            partition, found_inf = replicas.partition, getattr(self, "found_inf", None)
            masters = replicas.masters
            step_buffers(
                self._mutated, [masters.rows], [replicas.grads], self._state_rows,
                [] if masters.low is None else [masters.low], replicas.anchor,
                replicas.anchor if self._moves_anchor else None, None, self._codes, partition.labels, partition.seed,
                self.rules, grad_scale, found_inf, self._stats, self.proposal.kernel,
                self._explicit, self.skip_nonfinite and found_inf is None, PROPOSE | SHARE,
                corrections=[] if masters.corrections is None else [masters.corrections], scales=self._state_scales,
                noise=self._noise if self._rounds else None,
            )  # fmt: skip
        # Only now: a backend may have refused these copies, or a process others' settings.
        if self._planned is not None:
            self._cursor += 1
        elif not capturing:
            self._steps += 1
            self._show_step()
        if waiting:
            torch._foreach_copy_(self._waiting, waiting)
        if self._rounds:
            self._noise += 1
        replicas.masters.refresh()
        replicas.written()
        return loss

    def _step_parle(self, grad_scale: Tensor | None) -> None:
        """Each copy by itself around its point; then, when the period ends, the points."""
        replicas, coupling, masters = self.replicas, self.coupling, self.replicas.masters
        assert isinstance(coupling, Parle)
        points, averages = self._buffers["point"], self._buffers["average"]
        ends = (self._steps + 1) % coupling.every == 0
        found_inf = self._skips(ends)
        codes = self._codes * self._codes.new_tensor([1, 0])  # groups, without labels
        stats = self._stats.expand(len(replicas), 4).contiguous()
        for j in range(len(replicas)):
            step_buffers(
                [*self._mutated, stats], [masters.rows[j]], [replicas.grads[j]], [buffer[j] for buffer in self._state_rows],
                [] if masters.low is None else [masters.low[j]], points[j], averages[j], None, codes, None, None,
                self.rules, grad_scale, found_inf, stats[j], self.proposal.kernel, False, False,
                PROPOSE | SHARE, corrections=[] if masters.corrections is None else [masters.corrections[j]],
                scales=[scales[j] for scales in self._state_scales],
                noise=self._noise + (j << 48) if self._rounds else None,
            )  # fmt: skip
        if ends and not found_inf.item():
            params = replicas.params
            coupling.move_points(params, points, averages, replicas.mean(points))
            masters.write_all(params)
        self._stats[0], self._stats[2:] = stats[:, 0].sum(), stats[0, 2:]
        replicas.written()
        if not (found_inf.item() or replicas.processes):
            self._stats[1] = replicas.distance() ** 2

    def _step_across(self, across: StepAcross, grad_scale: Tensor | None) -> None:
        """This process's copy and those of others."""
        replicas, partition, low = self.replicas, self.replicas.partition, self.replicas.low
        # Where copies meet all of them must know whether one skips; by itself this one's kernel looks, in the same pass.
        found_inf = self._skips(True) if across.meets else getattr(self, "found_inf", None)
        across(
            replicas.params[0], replicas.grads[0], [buffer[0] for buffer in self._state_rows], None if low is None else low[0],
            replicas.anchor, self._moves_anchor, self._codes, partition.labels, partition.seed, grad_scale,
            found_inf, self.skip_nonfinite and found_inf is None, self._stats, self.proposal.kernel,
        )  # fmt: skip
        torch.autograd.graph.increment_version(self._mutated)

    def _skips(self, together: bool) -> Tensor:
        """One float, not 0 where the step is to be skipped; `together`: as soon as one process of a group is to skip it.

        Raises:
            RuntimeError: the processes' settings differ, or their steps.
        """
        replicas, found_inf = self.replicas, getattr(self, "found_inf", None)
        if found_inf is None:
            found_inf = torch.zeros(1, dtype=torch.float32, device=replicas.params.device)
            if self.skip_nonfinite:
                found_inf.fill_(_any_nonfinite(replicas.grads))
        if self._across is None or not together:
            return found_inf
        seed, coupling = replicas.partition.seed, self._made[0][1]
        state = (
            zlib.crc32(self._rules_known.numpy().tobytes()),
            (float(coupling.eta), float(coupling.rho)) if isinstance(coupling, Parle) else None,  # not in the rules
            self._across.knows_sum,
            self._frozen,
            int(seed) if seed is not None and seed.is_cpu else None,
        )
        step = self._steps + 1
        same = float(zlib.crc32(repr(state).encode()) + step & 0xFFFFFF)
        asked = torch.tensor([0.0, same, -same], dtype=torch.float32, device=found_inf.device)
        asked[0] = found_inf.detach()
        self._across.processes.largest_(asked)
        if asked.is_cpu and len(set(map(abs, asked.tolist()[1:]))) > 1:
            raise RuntimeError(
                "lr, L and all other settings, what is frozen and the partition's seed must be the same in all processes, but "
                f"at step {step} they differ"
            )
        return asked[:1]

    def refresh(self) -> None:
        """Brings the rules on the device up to date with param_groups; `step` does so unless it is captured."""
        step = self._steps + 1
        settings = [self._group_settings(group) for group in self.param_groups]
        changed = self._known is None or settings != self._known[0]
        settings = _kept(settings) if changed else self._known[0]
        made = [self._made_of(group) for group in self.param_groups] if changed else self._made
        # A coupling's rules depend on whether a period ends, AdamW's numbers on the step.
        ends = [step % coupling.every == 0 for _, coupling in made]
        known = (settings, ends, [0 if isinstance(proposal, SGD) else step for proposal, _ in made])
        if known == self._known:
            return
        if changed or ends != self._known[1]:
            values = self._values_of(made, step)
        else:
            values = self._rules_known.clone()
            values[: len(made), :NUMBERS] = _numbers([proposal.numbers(step) for proposal, _ in made])
        if changed:
            self._fit_buffers()
        self._rules_known = values
        if self.rules.is_cuda:
            values = values.pin_memory()  # so that the copy waits for nothing
        if self._across and self._coupling_class is not Parle:
            self._across.take(values, self._explicit)
        self.rules.copy_(values, non_blocking=True)
        self._known, self._made = known, made
        self._warn_if_unstable()

    @torch.inference_mode(False)
    def plan(self, lrs: Sequence[float], start: int = 0) -> None:
        """Puts the rules of many steps on the device, where each `step`, captured or not, takes the next.

        Args:
            lrs: the learning rate of every step, all groups alike. A captured graph reads them where they are: the next
                plan must be as long.
            start: which of them comes next.
        """
        if self._coupling_class is Parle or self._across:
            what = (
                "Parle's steps: its points are moved"
                if self._coupling_class is Parle
                else "steps across processes, made"
            )
            raise ValueError(f"plan cannot hold {what} by the host")
        start, lrs = whole("start", start, 0, len(lrs)), [number("lrs", lr) for lr in lrs]
        if not lrs:
            raise ValueError("lrs must hold at least one learning rate")
        self.replicas.check()
        self._take_edits()
        done = self.steps
        self._follow(between=False)
        self._fit_buffers()
        first = done - start
        rows = torch.stack([self._values_at(first + i + 1, lr=lr).view(-1) for i, lr in enumerate(lrs)])
        planned = self._planned  # in force until here
        if planned is None or planned.shape != rows.shape or planned.device != self.rules.device:
            planned = torch.empty_like(rows, device=self.rules.device)
            self._cursor = torch.zeros(1, dtype=torch.int64, device=self.rules.device)
        self._planned = planned.copy_(rows)
        self._planned_of = _kept(self._settings_but_lr())
        self._plan_start = first
        self._cursor.fill_(start)
        self._noise.fill_(done)
        self._known = None

    def values_at(self, **changed: Any) -> Tensor:
        """What `rules` would hold at the next step, on the CPU, were some settings changed in every group (lr=0.1, say).

        Raises:
            ValueError: a name that is no setting of the proposal or the coupling.
        """
        known = [f.name for of in (self.proposal, self._coupling_class) for f in fields(of)]
        for name in changed:
            if name not in known:
                raise ValueError(f"changed must name settings, {', '.join(known)}, got {name!r}")
        return self._values_at(self.steps + 1, **changed)

    # ------------------------------------------------------------------------------------------------- state

    def __getstate__(self) -> dict[str, Any]:
        groups = [
            {**group, "params": [self.replicas.layout.names[i] for i in self._indices(group)]}
            for group in self.param_groups
        ]
        return {
            "replicas": self.replicas,
            "proposal": self.proposal,
            "coupling": self.coupling,
            "groups": groups,
            "skip_nonfinite": self.skip_nonfinite,
            "capturable": self.capturable,
            "state_format": self.state_format,
            "unscale": self._step_supports_amp_scaling,
            "state_dict": self.state_dict(),
            "stats": self._stats,
            "plan": None if self._planned is None else (self._planned, self._cursor, self._plan_start),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "replicas" not in state:  # torch's load_state_dict hands over its own {state, param_groups}
            super().__setstate__(state)
            return
        options = {name: value for name, value in state.items() if name not in ("state_dict", "stats", "plan")}
        CoupledOptimizer.__init__(self, **options)
        self.load_state_dict(state["state_dict"])
        self._stats.copy_(state["stats"])
        if state["plan"] is not None:
            self.replicas.settle()
            self._follow()  # what is frozen is so for the plan too
            self._planned, self._cursor, self._plan_start = state["plan"]
            self._planned_of = _kept(self._settings_but_lr())

    def __deepcopy__(self, memo: dict[int, Any]) -> "CoupledOptimizer":
        """With Replicas of its own, or, where these are copied in the same call, over those."""
        new = memo[id(self)] = object.__new__(type(self))
        new.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return new

    # ------------------------------------------------------------------------------------------------- private

    @torch.inference_mode(False)
    def _make_buffers(self) -> None:
        """Allocates what the proposal and the coupling need, keeping what is there; and says what a step writes."""
        replicas, coupling, kind = self.replicas, self.coupling, self._kind()
        self._needed = self._buffer_names()
        kept, self._buffers = self._buffers, {}
        for name in self._needed:
            known = kept.pop(name, self._idle.pop(name, None))
            self._buffers[name] = self._new_buffer(name, len(self._buffers) + 2) if known is None else known
        self._state_rows = list(self._buffers.values())
        self._state_scales = [self._scales[name] for name in self._needed if name in self._scales]
        for name in coupling.buffers:  # Parle's points and averages begin where the copies are
            self._buffers[name] = kept[name] if name in kept else replicas.params.clone()
        self._idle |= {k: v for k, v in kept.items() if k in self.proposal.all_buffers}  # momentum of 0 for a while
        self._explicit, self._moves_anchor = kind
        self._anchor = replicas.anchor
        shape = len(self.param_groups) * (2 if self._frozen else 1), NUMBERS + (self._coupled() + 1) ** 2 * RULE
        if self.rules.shape != shape:
            self.rules = torch.zeros(shape, dtype=arithmetic(replicas.dtype), device=replicas.device)
        # What a step writes, under every name: parameters and states share the buffers' memory but no version counter.
        self._show_state()
        self._mutated: list[Tensor] = [p for row in replicas.trained for p in row]
        self._mutated += [replicas.masters.rows, *self._buffers.values(), *self._shown, self._stats]
        self._mutated += [replicas.anchor] if self._moves_anchor and replicas.anchor is not None else []
        self._note_waiting()
        self._known = None

    def _fit_buffers(self) -> None:
        """Makes the buffers what new settings need: a momentum that was 0, another mode, an average that got a pull."""
        if (self._buffer_names(), self._kind()) != (self._needed, (self._explicit, self._moves_anchor)):
            self._make_buffers()
        else:
            self._note_waiting()

    def _note_waiting(self) -> None:
        """Without a momentum torch leaves a buffer as it is; the kernels fill it with gradients if another group has one."""
        self._waiting = [
            buffer[row, tiles.start * size : tiles.stop * size]
            for group in self.param_groups
            if "momentum" in group and group["momentum"] == 0
            for tiles in map(self.replicas.layout.tiles, self._indices(group))
            for buffers, size in ((self._state_rows, TILE), (self._state_scales, TILE // SCALED))
            for buffer in buffers
            for row in range(len(self.replicas))
        ]

    def _kind(self) -> tuple[bool, bool]:
        """Whether the coupling is explicit, which all groups must agree in, and whether it moves the anchor."""
        of_groups = [self._coupling_of(group) for group in self.param_groups]
        check_together("param_groups", of_groups, self.replicas)
        return of_groups[0].explicit, any(coupling.moves_anchor for coupling in of_groups)

    def _buffer_names(self) -> list[str]:
        """Which of the proposal's buffers some group needs."""
        names = {name for group in self.param_groups for name in self._proposal_of(group).buffers}
        return [name for name in self.proposal.all_buffers if name in names]

    def _proposal_of(self, group: Mapping[str, Any], **changed: Any) -> Proposal:
        values = {**group, **changed}
        own = picked(values, self.proposal)
        if isinstance(own["lr"], Tensor):  # which may change in place
            own["lr"] = number("lr", own["lr"])
        if values.get("dampening"):
            raise ValueError(f"dampening must be 0 in param_groups, got {shown(values['dampening'])}")
        return type(self.proposal)(**own)

    def _check_groups(self, name: str, groups: list[dict[str, Any]]) -> None:
        """Raises where settings that are not param_groups' yet are missing, outside their range, or of no use here."""
        if len({group["coupling"] for group in groups}) > 1:
            raise ValueError(f"coupling must be the same in all of {name}, got several")
        made = []
        for group in groups:
            of = self._coupling_named(group["coupling"])
            for key in (*settings_of(self.proposal), *(f.name for f in fields(of))):
                if key not in group:
                    raise ValueError(f"{key} is missing in {name}: they are of another optimizer")
            if "steps" in group:
                steps_of("steps", group["steps"])
            check_foreign(group)
            self._proposal_of(group)
            made.append(of(**picked(group, of)))
        check_together(name, made, self.replicas)

    def _coupling_of(self, group: Mapping[str, Any], **changed: Any) -> Coupling:
        values = {**group, **changed}
        name = self._coupling_class.__name__
        if values.get("coupling", name) != name:
            raise ValueError(
                f"coupling of param_groups must stay {name!r}, got {shown(values['coupling'])}; assign .coupling instead"
            )
        return self._coupling_class(**picked(values, self._coupling_class))

    def _group_settings(self, group: Mapping[str, Any]) -> list[Any]:
        """What the rules are made from, for a comparison."""
        read = [group.get(f.name) for of in (self.proposal, self._coupling_class) for f in fields(of)]
        read += [group.get("coupling"), group.get("dampening")]
        return [float(v) if isinstance(v, Tensor) else tuple(v) if isinstance(v, list) else v for v in read]

    def _settings_but_lr(self) -> list[list[Any]]:
        """What a plan was made from, besides the learning rates that it was given: what is frozen, and each group's."""
        return [self._frozen, *(self._group_settings({**group, "lr": 0.0}) for group in self.param_groups)]

    def _values_at(self, step: int, **changed: Any) -> Tensor:
        """The rules of every group at a step, in the kernels' arithmetic, on the CPU."""
        return self._values_of([self._made_of(group, **changed) for group in self.param_groups], step)

    def _check_values(self, of_groups: Iterable[Coupling]) -> None:
        """Raises where couplings, one for each group, give numbers too large for the kernels: at the next step, or where the
        next period ends."""
        dtype, step = arithmetic(self.replicas.dtype), self._steps + 1
        for group, coupling in zip(self.param_groups, of_groups, strict=True):
            proposal = self._proposal_of(group)
            for at in {step, -(-step // coupling.every) * coupling.every}:
                rules_of(proposal, coupling, self._coupled(type(coupling)), at, dtype)

    def _values_of(self, made: list[tuple[Proposal, Coupling]], step: int) -> Tensor:
        copies, dtype = self._coupled(), self.rules.dtype
        rows = torch.stack([rules_of(proposal, coupling, copies, step, dtype) for proposal, coupling in made])
        if not self._frozen:
            return rows
        still = rows.clone()  # each group's row for what is frozen in it
        still[:, :NUMBERS] = _numbers([proposal.frozen_numbers(coupling.explicit) for proposal, coupling in made])
        return torch.cat([rows, still])

    def _params_of_groups(self) -> list[list[int]]:
        """Which parameters are in which group, by identity."""
        return [list(map(id, group.get("params", ()))) for group in self.param_groups]

    def _write_codes(self) -> None:
        """Says for each tile which row of the rules it is given."""
        for index, group in enumerate(self.param_groups):
            for i in self._indices(group):
                row = index + (len(self.param_groups) if i in self._frozen else 0)
                self._codes[self.replicas.layout.tiles(i), 0] = row

    def _identity(self) -> dict[str, Any]:
        """What must be the same in all processes."""
        groups = [{k: v for k, v in group.items() if k != "params"} for group in self.param_groups]
        names = [[self.replicas.layout.names[i] for i in self._indices(group)] for group in self.param_groups]
        return {
            "the optimizer": type(self).__name__,
            "the proposal": type(self.proposal).__name__,
            "the parameters of param_groups": names,
            **{
                f"{name} of param_groups[{i}]": float(value) if isinstance(value, Tensor) else value
                for i, group in enumerate(groups)
                for name, value in group.items()
            },
            "skip_nonfinite": self.skip_nonfinite,
        }

    def _follow(self, between: bool = True) -> None:
        """Follows the Replicas where they were moved, and notices what was frozen, and another anchor. between: planned steps, if
        there are any."""
        replicas = self.replicas
        if replicas.anchor is not self._anchor:
            self._check_anchor()
            self._make_buffers()
        if replicas.grads is not self._bound:
            self._move()
        if replicas.frozen != self._frozen:
            if between and self._planned is not None:
                raise RuntimeError("parameters must not be frozen or set to train between planned steps; plan again")
            self._frozen = list(replicas.frozen)
            self._write_codes()
            self._make_buffers()

    def _check_anchor(self) -> None:
        """Refuses an assigned anchor that is not like a copy, or lies where copies, gradients or their buffers do: a step
        writes both."""
        replicas, anchor = self.replicas, self.replicas.anchor
        replicas.check_anchor()
        if anchor is not None:
            low = replicas.masters.low
            others = {"params": replicas.masters.rows, "grads": replicas.grads, "low": () if low is None else low}
            check_apart({"anchor": [anchor]}, {**others, **self._idle, **self._buffers}, {})

    @torch.inference_mode(False)
    def _move(self) -> None:
        """Moves what is here to where the Replicas are now."""
        replicas = self.replicas
        if self._format and replicas.dtype != torch.float32:
            raise TypeError(
                f"dtype of Replicas must stay float32 with state_format={self.state_format!r}, got {replicas.dtype}"
            )
        self._bound = replicas.grads
        device, dtype = replicas.device, arithmetic(replicas.dtype)
        self._noise = self._noise.to(device)
        self._scales = {name: scales.to(device) for name, scales in self._scales.items()}
        self._codes, self._stats = self._codes.to(device), self._stats.to(device)
        self.rules = self.rules.new_empty(0)
        if self._planned is not None:
            self._planned, self._cursor = self._planned.to(device, dtype), self._cursor.to(device)
        rows = count(2)
        self._buffers, self._idle = (
            {
                name: replicas.rows(next(rows), self._format if name in self.proposal.all_buffers else None).copy_(
                    buffer
                )
                for name, buffer in buffers.items()
            }
            for buffers in (self._buffers, self._idle)
        )
        self._make_buffers()

    def _made_of(self, group: Mapping[str, Any], **changed: Any) -> tuple[Proposal, Coupling]:
        return self._proposal_of(group, **changed), self._coupling_of(group, **changed)

    def _coupled(self, of: type[Coupling] | None = None) -> int:
        """How many copies one call of the kernel couples, by the coupling of now or another."""
        return 1 if (of or self._coupling_class) is Parle else self.replicas.count

    def _warn_if_unstable(self) -> None:
        if self._coupling_class is not Explicit or self._warned or not isinstance(self.proposal, SGD):
            return
        for group in self.param_groups:
            lr, momentum, L = float(group["lr"]), group["momentum"], group["L"]
            # Heavy ball on a quadratic of curvature h is stable for lr·h < 2(1+μ); Nesterov for 2(1+μ)/(1+2μ).
            bound = 2 * (1 + momentum) / (1 + 2 * momentum if group["nesterov"] else 1)
            stiffness = 2 * self.replicas.count
            if lr * stiffness / L > bound:
                self._warned = True
                warnings.warn(
                    f"explicit steps diverge here: lr·{stiffness}/L = {lr * stiffness / L:.3g} exceeds {bound:.3g} "
                    f"(lr={lr:.3g}, L={L:.3g}); the implicit coupling is stable for every lr and L",
                    stacklevel=4,
                )
                return


class HomotopySGD(CoupledOptimizer):
    """The paper's: SGD on every copy, pulled together by equation (3) as `L` falls.

    Args:
        replicas: the copies.
        lr, momentum, weight_decay, nesterov, maximize: as in torch.optim.SGD, and held in param_groups as there.
        L: the homotopy parameter, 0 ≤ L ≤ ∞; assign `.L` at any time. Smaller is closer; 0 merges the copies.
        mode: "implicit" (stable for every L and lr) or "explicit" (equation (7); warns where it is bound to diverge).
        groups, skip_nonfinite, capturable, state_format, unscale: as in CoupledOptimizer.

    Raises:
        ValueError: as CoupledOptimizer.
    """

    def __init__(
        self,
        replicas: Replicas,
        lr: float,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        L: float = 0.01,
        mode: str = "implicit",
        *,
        maximize: bool = False,
        groups: Iterable[Mapping[str, Any]] = (),
        skip_nonfinite: bool = True,
        capturable: bool = False,
        state_format: str = "full",
        unscale: bool = True,
    ):
        choice("mode", mode, "implicit", "explicit")
        super().__init__(
            replicas, SGD(lr, momentum, weight_decay, nesterov, maximize), Homotopy(L) if mode == "implicit" else Explicit(L),
            groups=groups, skip_nonfinite=skip_nonfinite, capturable=capturable, state_format=state_format, unscale=unscale,
        )  # fmt: skip


def _kept(settings: list[list[Any]]) -> list[list[Any]]:
    """Settings for a later comparison, as they are now: tensors in tuples (betas) may change in place."""
    return [
        [tuple(float(x) if isinstance(x, Tensor) else x for x in v) if isinstance(v, tuple) else v for v in of_group]
        for of_group in settings
    ]


def _numbers(rows: list[list[float]]) -> Tensor:
    """Exactly, wherever tensors are made by default."""
    return torch.tensor(rows, dtype=torch.float64, device="cpu")


def _any_nonfinite(grads: Tensor) -> Tensor | bool:
    """Whether any is inf or NaN; on a GPU without waiting for it."""
    if grads.is_cuda:
        return ~torch.stack(torch.aminmax(grads)).isfinite().all()
    # A sum is what PyTorch's CPU kernels do fastest, thirty times faster than this look at each. It may be infinite by itself.
    return not (
        grads.sum(dtype=torch.float64 if grads.dtype == torch.float64 else torch.float32).isfinite()
        or grads.isfinite().all()
    )
