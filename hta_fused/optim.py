"""HomotopySGD: SGD with momentum on both copies, coupled by equation (3), as a torch.optim.Optimizer.

Owns the momentum and the settings; the buffers are the Replicas', the arithmetic is the step op's.
"""

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .ops import step_buffers
from .replicas import Replicas
from .tables import check_hyper, check_L, step_coefficients

_OWN = ("L", "mode")  # the settings that torch.optim.SGD's groups do not have


class StepStats(NamedTuple):
    """What the last step left behind."""

    penalty: float  # the quadratic terms of equation (3) after the step; NaN before the first
    distance: float  # ‖θ − η‖ after the step; NaN before the first
    skipped: int  # steps skipped so far for a gradient that was not finite


class HomotopySGD(torch.optim.Optimizer):
    """SGD on θ and η at once, the two pulled together as `L` falls.

    With equal gradients, no anchor and L = 0 it is torch.optim.SGD. A parameter without a gradient counts as having a
    gradient of zero, since the coupling moves it all the same. A step in which any gradient is inf or NaN is skipped.

    Args:
        replicas: the two copies.
        lr, momentum, weight_decay, nesterov: as in torch.optim.SGD, and held in param_groups as there.
        L: the homotopy parameter, 0 ≤ L ≤ ∞; assign `.L` at any time. Smaller is closer; 0 merges the copies.
        mode: "implicit" (stable for every L and lr) or "explicit" (equation (7); warns where it is bound to diverge).
        groups: parameter groups with settings of their own: dicts whose "params" is a function of a parameter's
            name, or an iterable of names or of θ's parameters. What no group takes is in the first group of
            `param_groups`. Each group of `param_groups` lists θ's parameters, then η's.
        skip_nonfinite: look at all gradients before the step and skip it if any is inf or NaN; costs one more read of
            the gradients. With a GradScaler its own check serves.
        capturable: `step` may be captured in a CUDA graph, which then reads the settings from the device: after
            changing any (lr, L, …) call `refresh` before the next replay. Assigning `.L` does so by itself.

    Raises:
        ValueError: a setting outside its range, a name that the model does not have, a parameter in two groups.
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
        groups: Iterable[Mapping[str, Any]] = (),
        skip_nonfinite: bool = True,
        capturable: bool = False,
    ):
        self.replicas = replicas
        self.skip_nonfinite = skip_nonfinite
        self.capturable = capturable
        self._step_supports_amp_scaling = True  # GradScaler hands over grad_scale and found_inf
        device = replicas.params.device
        self._codes = replicas.partition.codes.clone()  # (group, label) of each tile
        self._momentum = torch.zeros_like(replicas.params)
        self._stats = torch.tensor([float("nan"), float("nan"), 0.0, 0.0], dtype=torch.float64, device=device)
        self._known: tuple[Any, ...] | None = None  # the settings that the coefficients were made from
        self._warned = False
        theta, eta, momentum_theta, momentum_eta = [*replicas.params, *self._momentum]
        self._momentum_views = [replicas.layout.views(row) for row in (momentum_theta, momentum_eta)]
        # What the step reads and writes, without and with momentum; and what it writes, under every name: the
        # parameters share the buffer's memory but not its version counter.
        self._buffers = [
            (theta, eta, *replicas.grads, *buffers, *(replicas.low if replicas.low is not None else (None, None)))
            for buffers in ((None, None), (momentum_theta, momentum_eta))
        ]
        self._mutated = [*replicas.parameters[0], *replicas.parameters[1], theta, momentum_theta, self._stats]
        self._index_of = {id(p): i for i, p in enumerate(replicas.parameters[0])}  # in the layout, by θ's parameter
        defaults = dict(lr=lr, momentum=momentum, dampening=0.0, weight_decay=weight_decay, nesterov=nesterov, L=L,
                        mode=mode)  # fmt: skip
        super().__init__(self._split(groups), defaults)
        # All groups' rows of the op's `hyper`, then their tables: one buffer, one copy to the device.
        count = len(self.param_groups)
        self.coefficients = torch.zeros(count * (6 + 18), dtype=torch.float64, device=device)
        self._hyper = self.coefficients[: 6 * count].view(count, 6)
        self._tables = self.coefficients[6 * count :].view(count, 3, 2, 3)
        for index, group in enumerate(self.param_groups):
            _check(group)
            for i in self._indices(group):
                self._codes[replicas.layout.tiles(i), 0] = index

    @property
    def L(self) -> float:
        """The homotopy parameter of all groups (of the first, should they differ)."""
        return self.param_groups[0]["L"]

    @L.setter
    def L(self, value: float) -> None:
        for group in self.param_groups:
            check_L(value, group["mode"])
        for group in self.param_groups:
            group["L"] = value
        if self.capturable:
            self.refresh()

    @property
    def stats(self) -> StepStats:
        """What the last step left behind. Reading it waits for the device."""
        anchor, distance, _, skipped = self._stats.tolist()
        # At the ends of the path a term's factor is infinite where the term itself is 0.
        penalty = (self.L * anchor if anchor else 0.0) + (distance / self.L if distance and self.L else 0.0)
        return StepStats(penalty if anchor == anchor else anchor, distance**0.5, int(skipped))

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Zeroes the flat gradient buffer; `set_to_none` is there for callers and changes nothing."""
        self.replicas.zero_grad()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Only for the constructor: the copies' parameters are all in groups from the start; see `groups`."""
        if getattr(self, "_complete", False):
            raise ValueError("param_groups is complete: pass groups= to HomotopySGD instead")
        super().add_param_group(param_group)
        held = sum(len(group["params"]) for group in self.param_groups)
        self._complete = held == 2 * len(self.replicas.layout.names)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of both copies.

        Args:
            closure: re-evaluates the model, fills the gradients and returns the loss.

        Returns:
            What closure returned, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.replicas.collect_grads()
        if self.replicas.params.is_cuda and torch.cuda.is_current_stream_capturing():
            if not self.capturable:
                raise RuntimeError("a CUDA graph captures HomotopySGD.step(), which needs capturable=True")
            if self._known is None:
                raise RuntimeError("call HomotopySGD.refresh() before a CUDA graph captures step()")
        else:
            self.refresh()
        uses_momentum = any(group["momentum"] for group in self.param_groups)
        found_inf = getattr(self, "found_inf", None)
        step_buffers(
            self._mutated, *self._buffers[uses_momentum],
            self.replicas.anchor, self._codes, self.replicas.partition.labels, self._hyper, self._tables,
            getattr(self, "grad_scale", None), found_inf, self._stats, self.skip_nonfinite and found_inf is None,
        )  # fmt: skip
        if uses_momentum and not self.state:
            self._show_momentum()
        return loss

    def refresh(self) -> None:
        """Brings the coefficients on the device up to date with param_groups; `step` does so unless it is captured."""
        settings = self._settings()
        if settings == self._known:
            return
        for group in self.param_groups:
            check_L(group["L"], group["mode"])
        values = self._coefficients_of(settings)
        if self.coefficients.is_cuda:
            values = values.pin_memory()  # so that the copy waits for nothing
        self.coefficients.copy_(values, non_blocking=True)
        self._known = settings
        self._warn_if_unstable(settings)

    def coefficients_at(self, **changed: Any) -> Tensor:
        """What `coefficients` would hold, on the CPU, were some settings changed in every group (lr=0.1, say)."""
        return self._coefficients_of(self._settings(**changed))

    # ------------------------------------------------------------------------------------------------- state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch.optim.Optimizer.load_state_dict; the momentum goes into the flat buffer."""
        super().load_state_dict(state_dict)
        # The saved momenta themselves: torch has cast its copies to the parameters' dtype.
        keys = [key for group in state_dict["param_groups"] for key in group["params"]]
        saved = dict(zip([p for group in self.param_groups for p in group["params"]], keys, strict=True))
        for row, parameters in enumerate(self.replicas.parameters):
            for parameter, view in zip(parameters, self._momentum_views[row], strict=True):
                buffer = state_dict["state"].get(saved[parameter], {}).get("momentum_buffer")
                view.zero_() if buffer is None else view.copy_(buffer)
        if self.state:
            self._show_momentum()

    def sgd_state_dict(self, copy: str) -> dict[str, Any]:
        """The state_dict that torch.optim.SGD over one copy's parameters (in param_groups' order) would have.

        Args:
            copy: "theta", "eta", or "mean" for the merged model's.
        """
        rows = {"theta": self._momentum_views[0], "eta": self._momentum_views[1]}
        if copy == "mean":
            views = self.replicas.layout.views(self._momentum.mean(0))
        elif copy in rows:
            views = rows[copy]
        else:
            raise ValueError(f"copy must be 'theta', 'eta' or 'mean', got {copy!r}")
        groups, state, count = [], {}, 0
        for group in self.param_groups:
            indices = self._indices(group)
            settings = {k: v for k, v in group.items() if k != "params" and k not in _OWN}
            groups.append({**_SGD_DEFAULTS, **settings, "params": list(range(count, count + len(indices)))})
            for i in indices:
                if self.state:
                    state[count] = {"momentum_buffer": views[i].clone()}
                count += 1
        return {"state": state, "param_groups": groups}

    def load_sgd_state_dict(self, copy: str, state_dict: dict[str, Any]) -> None:
        """Takes one copy's momentum, and the settings, from a torch.optim.SGD's state_dict.

        Args:
            copy: "theta" or "eta".
            state_dict: of an SGD over parameters of the same shapes in param_groups' order.
        """
        if copy not in ("theta", "eta"):
            raise ValueError(f"copy must be 'theta' or 'eta', got {copy!r}")
        views = self._momentum_views[copy == "eta"]
        groups = state_dict["param_groups"]
        sizes, expected = [len(g["params"]) for g in groups], [len(g["params"]) // 2 for g in self.param_groups]
        if sizes != expected:
            raise ValueError(f"state_dict has groups of {sizes} parameters, but this optimizer has {expected}")
        plan = []
        for group, saved in zip(self.param_groups, groups, strict=True):
            if saved.get("dampening") or saved.get("maximize"):
                raise ValueError("state_dict has dampening or maximize set, which HomotopySGD does not have")
            for i, key in zip(self._indices(group), saved["params"], strict=True):
                buffer = state_dict["state"].get(key, {}).get("momentum_buffer")
                if buffer is not None and buffer.shape != views[i].shape:
                    raise ValueError(
                        f"state_dict's momentum_buffer {key} has shape {tuple(buffer.shape)}, "
                        f"but {self.replicas.layout.names[i]!r} has {tuple(views[i].shape)}"
                    )
                plan.append((views[i], buffer))
        for view, buffer in plan:
            view.zero_() if buffer is None else view.copy_(buffer)
        for group, saved in zip(self.param_groups, groups, strict=True):
            group.update({k: v for k, v in saved.items() if k != "params" and k in {*group, "initial_lr"}})
        self._show_momentum()

    # ------------------------------------------------------------------------------------------------- private

    def _split(self, groups: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """torch's param_groups from ours: the rest first, then each of `groups`; θ's parameters, then η's."""
        names, (theta, eta) = self.replicas.layout.names, self.replicas.parameters
        taken: set[int] = set()
        result = []
        for group in groups:
            wanted = group["params"]
            if callable(wanted):
                indices = [i for i, name in enumerate(names) if wanted(name)]
            else:
                indices = []
                for item in [wanted] if isinstance(wanted, str | Tensor) else wanted:
                    if isinstance(item, str) and item in names:
                        indices.append(names.index(item))
                    elif isinstance(item, Tensor) and id(item) in self._index_of:
                        indices.append(self._index_of[id(item)])
                    else:
                        what = (
                            repr(item)
                            if isinstance(item, str)
                            else f"a tensor of shape {tuple(getattr(item, 'shape', ()))}"
                        )
                        raise ValueError(
                            f"groups name {what}, which is no trainable parameter of θ; there are {', '.join(names)}"
                        )
            if not indices:
                raise ValueError("groups hold a group whose params match no parameter")
            if taken & set(indices) or len(set(indices)) < len(indices):
                raise ValueError(f"groups name {names[min(taken & set(indices) or set(indices))]!r} more than once")
            taken |= set(indices)
            result.append({**group, "params": [theta[i] for i in indices] + [eta[i] for i in indices]})
        rest = [i for i in range(len(names)) if i not in taken]
        if rest:
            result.insert(0, {"params": [theta[i] for i in rest] + [eta[i] for i in rest]})
        return result

    def _indices(self, group: dict[str, Any]) -> list[int]:
        """The layout's numbers of a group's parameters."""
        params: list[nn.Parameter] = group["params"]
        return [self._index_of[id(p)] for p in params[: len(params) // 2]]

    @staticmethod
    def _coefficients_of(settings: tuple[tuple[Any, ...], ...]) -> Tensor:
        rows = [step_coefficients(*setting) for setting in settings]
        parts = (torch.tensor([row[i] for row in rows], dtype=torch.float64, device="cpu").flatten() for i in (0, 1))
        return torch.cat(list(parts))

    def _settings(self, **changed: Any) -> tuple[tuple[Any, ...], ...]:
        return tuple(
            (
                float(g["L"]),
                float(g["lr"]),
                float(g["momentum"]),
                float(g["weight_decay"]),
                bool(g["nesterov"]),
                g["mode"],
            )
            for g in ({**group, **changed} for group in self.param_groups)
        )

    def _warn_if_unstable(self, settings: tuple[tuple[Any, ...], ...]) -> None:
        for L, lr, momentum, _, nesterov, mode in settings:
            # Heavy ball on a quadratic of curvature h is stable for lr·h < 2(1+μ); Nesterov for 2(1+μ)/(1+2μ).
            bound = 2 * (1 + momentum) / (1 + 2 * momentum if nesterov else 1)
            if mode == "explicit" and lr * 4 / L > bound and not self._warned:
                self._warned = True
                warnings.warn(
                    f"explicit steps diverge here: lr·4/L = {lr * 4 / L:.3g} exceeds {bound:.3g} (lr={lr:.3g}, L={L:.3g}); "
                    "mode='implicit' is stable for every lr and L",
                    stacklevel=4,
                )

    def _show_momentum(self) -> None:
        """Makes the views of the flat momentum the optimizer's state, in torch.optim.SGD's own layout."""
        for parameters, views in zip(self.replicas.parameters, self._momentum_views, strict=True):
            for parameter, view in zip(parameters, views, strict=True):
                self.state[parameter] = {"momentum_buffer": view}


_SGD_DEFAULTS: dict[str, Any] = {
    k: v for k, v in torch.optim.SGD([nn.Parameter(torch.empty(0))]).param_groups[0].items() if k != "params"
}


def _check(group: dict[str, Any]) -> None:
    check_hyper(group["lr"], group["momentum"], group["weight_decay"], group["nesterov"])
    check_L(group["L"], group["mode"])
