"""Two copies of a model as the rows of one flat buffer: θ, η, their gradients and their anchor.

Owns the buffers and nothing else: no optimizer, no schedule, no data. Imports partition.py.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from .partition import Layout, Partition, owners_of, trainable
from .reference import LOW

_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


class Replicas:
    """The coupled copies θ and η of a model.

    `theta` is the model itself, whose parameters now live in a flat buffer; `eta` is a second module of the same kind.
    Both are ordinary modules: call them, hook them, put them in eval mode. Their `.grad`s are views of a flat buffer
    that backward() fills; empty it with `zero_grad()` (or the optimizer's). Move the model to its device, dtype and
    memory format before, not after.

    Tied parameters stay tied, frozen ones and those of integer dtype stay out of the buffer, buffers (running
    statistics and the like) stay each copy's own.

    Args:
        model: any module with trainable parameters of one floating dtype on one device.
        partition: a Partition of the model, the name of one ("conv_halves", "layer_halves", "random", "random_units"),
            or labels by parameter name.
        anchor: θ̃: "init" (the parameters as they are now), "zero", "random" (a fresh initialisation), a flat
            tensor in `layout`'s order, or a state_dict.
        eta: "copy" (η starts equal to θ), "independent" (a fresh initialisation), or a module to be η.
        compute_dtype: torch.bfloat16 or torch.float16: the modules' parameters are copies in this dtype of float32
            masters, brought up to date by the optimizer's step, so that autocast has nothing left to cast. Those of
            normalisation layers stay float32. All gradients are kept in this dtype. The masters are what
            `state_dict`, `merge` and the optimizer work with.

    Attributes:
        theta, eta: the two modules.
        params, grads: [2, N] buffers, row 0 θ's, row 1 η's.
        low: [2, N] in compute_dtype, or None.
        anchor: [N], or None for zero.
        layout, partition: where each parameter lies, and each element's label.

    Raises:
        ValueError: an unknown name, a partition or anchor that does not match the model, nothing to train.
        TypeError: trainable parameters of several dtypes or devices, or a compute_dtype beside others than float32.
    """

    def __init__(
        self,
        model: nn.Module,
        partition: str | Partition | Mapping[str, Tensor | int] = "conv_halves",
        anchor: str | Tensor | Mapping[str, Tensor] = "init",
        eta: str | nn.Module = "copy",
        compute_dtype: torch.dtype | None = None,
    ):
        first = trainable(model)
        if not first:
            raise ValueError("model has no parameter that requires a gradient")
        kinds = {(p.dtype, p.device) for p in first.values()}
        if len(kinds) > 1:
            found = ", ".join(f"{dtype} on {device}" for dtype, device in sorted(kinds, key=str))
            raise TypeError(f"model's trainable parameters must share one dtype and device, got {found}")
        dtype, device = kinds.pop()
        if compute_dtype == dtype:
            compute_dtype = None
        if compute_dtype is not None and (compute_dtype not in LOW or dtype != torch.float32):
            raise TypeError(
                f"compute_dtype must be bfloat16 or float16 beside float32, got {compute_dtype} for {dtype}"
            )

        self.layout = Layout.of(model)
        self.partition = Partition.make(model, partition).to(device)
        if isinstance(eta, nn.Module):
            if {n: p.shape for n, p in trainable(eta).items()} != {n: p.shape for n, p in first.items()}:
                raise ValueError("eta's trainable parameters do not match the model's in name and shape")
            if eta is model:
                raise ValueError("eta must be a module of its own, got the model itself")
            self.eta = eta
        elif eta == "copy":
            self.eta = copy.deepcopy(model)
        elif eta == "independent":
            self.eta = reinitialised(model)
        else:
            raise ValueError(f"eta must be 'copy', 'independent' or a module, got {eta!r}")
        self.theta = model
        self.anchor = self._anchor(anchor, dtype, device)

        self.params = torch.zeros(2, self.layout.numel, dtype=dtype, device=device)
        self.low = None if compute_dtype is None else torch.zeros_like(self.params, dtype=compute_dtype)
        self.grads = torch.zeros_like(self.params, dtype=compute_dtype)
        self.parameters: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
        self._grad_views: tuple[list[Tensor], list[Tensor]] = ([], [])
        owners = owners_of(model)
        norms = [isinstance(owners[id(first[name])], _NORMS) for name in self.layout.names]
        for row, net in enumerate(self):
            by_name = trainable(net)
            self.parameters[row].extend(by_name[name] for name in self.layout.names)
            self._grad_views[row].extend(self.layout.views(self.grads[row]))
            lows = None if self.low is None else self.layout.views(self.low[row])
            for i, (parameter, view) in enumerate(zip(self.parameters[row], self._masters(row), strict=True)):
                view.copy_(parameter.detach())
                parameter.grad = None  # of the old dtype
                parameter.data = view if lows is None or norms[i] else lows[i].copy_(view)
        self._addresses = [[p.data_ptr() for p in row] for row in self.parameters]
        self._side: torch.cuda.Stream | None = None
        self.zero_grad()

    def __iter__(self) -> Iterator[nn.Module]:
        """θ, then η."""
        return iter((self.theta, self.eta))

    # ------------------------------------------------------------------------------------------- losses, gradients

    def loss(self, fn: Callable[..., Tensor], *batches: Any) -> Tensor:
        """f(θ) + f(η).

        Args:
            fn: fn(net) or fn(net, batch), the loss of one copy.
            batches: none; one, on which both copies are evaluated (the paper's one ξ); or two, θ's and η's.
        """
        theta_args, eta_args = self._arguments(batches)
        return fn(self.theta, *theta_args) + fn(self.eta, *eta_args)

    def backward(
        self,
        fn: Callable[..., Tensor],
        *batches: Any,
        scale: Callable[[Tensor], Tensor] = lambda loss: loss,
        beside: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """`loss(fn, *batches).backward()` in half the memory: one copy's graph is gone before the other's is built.

        Args:
            fn, batches: as in `loss`.
            scale: applied to each loss before its backward(), such as a GradScaler's `scale`.
            beside: on a GPU, run η's pass on a stream of its own beside θ's: one copy's kernels fill what the other's
                leave idle, and both graphs are in memory at once.

        Returns:
            f(θ) and f(η), detached and not scaled.
        """
        losses = []
        side = main = None
        if beside and self.params.is_cuda:
            if self._side is None:
                self._side = torch.cuda.Stream(self.params.device)
            side, main = self._side, torch.cuda.current_stream(self.params.device)
            side.wait_stream(main)  # before θ's work is queued: η's need not wait for it
        for net, args, stream in zip(self, self._arguments(batches), (None, side), strict=True):
            with torch.cuda.stream(stream):  # None changes nothing
                value = fn(net, *args)
                scale(value).backward()
                losses.append(value.detach())
        if main is not None and side is not None:
            main.wait_stream(side)
        return losses[0], losses[1]

    def zero_grad(self) -> None:
        """Zeroes the flat gradient buffer, and makes it the parameters' `.grad` again where something else was."""
        self.grads.zero_()
        for parameters, views in zip(self.parameters, self._grad_views, strict=True):
            for parameter, view in zip(parameters, views, strict=True):
                if parameter.dtype != view.dtype:  # a float32 parameter among low ones: collect_grads() casts
                    parameter.grad = None
                elif parameter.grad is not view:
                    parameter.grad = view

    def collect_grads(self) -> None:
        """Brings gradients that were put elsewhere (by `model.zero_grad()`, say) into the flat buffer; None counts as 0.

        Raises:
            RuntimeError: a parameter was moved out of the buffer, by `model.to(...)` for example.
        """
        views_of_others, others = [], []
        for row, (parameters, views) in enumerate(zip(self.parameters, self._grad_views, strict=True)):
            for i, (parameter, view) in enumerate(zip(parameters, views, strict=True)):
                if parameter.data_ptr() != self._addresses[row][i]:
                    raise RuntimeError(
                        f"parameter {self.layout.names[i]!r} of {('theta', 'eta')[row]} no longer lies in the flat buffer; "
                        "change a model's device, dtype or memory format before making its Replicas"
                    )
                if parameter.grad is view:
                    continue
                if parameter.grad is None:
                    view.zero_()
                else:
                    views_of_others.append(view)
                    others.append(parameter.grad)
                if parameter.dtype == view.dtype:
                    parameter.grad = view
        if others:
            torch._foreach_copy_(views_of_others, others)

    # ---------------------------------------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """Both modules' state_dicts, as "theta" and "eta"; with a compute_dtype, of the float32 masters."""
        states = {}
        for row, (key, net) in enumerate(zip(("theta", "eta"), self, strict=True)):
            masters = {id(p): m for p, m in zip(self.parameters[row], self._masters(row), strict=True)}
            # keep_vars: the parameters themselves, tied ones under each of their names
            states[key] = {
                name: masters.get(id(value), value).detach() if isinstance(value, Tensor) else value
                for name, value in net.state_dict(keep_vars=True).items()
            }
        return states

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """The inverse of `state_dict`.

        Raises:
            RuntimeError: names or shapes differ, as nn.Module.load_state_dict.
        """
        for row, (key, net) in enumerate(zip(("theta", "eta"), self, strict=True)):
            net.load_state_dict(state[key])
            names = {id(p): name for name, p in net.named_parameters()}
            for parameter, master in zip(self.parameters[row], self._masters(row), strict=True):
                master.copy_(state[key][names[id(parameter)]])

    # -------------------------------------------------------------------------------------------------------- results

    def distance(self) -> float:
        """‖θ − η‖."""
        return float(torch.linalg.vector_norm((self.params[0] - self.params[1]).double()))

    @torch.no_grad()
    def merge(self, loader: Iterable[Any] | None = None) -> nn.Module:
        """A new module with the copies' mean: (θ + η)/2, floating-point buffers too. At L = 0 the copies are equal.

        Args:
            loader: batches of inputs (or tuples that start with them) over which batch-norm statistics are estimated
                anew, by torch.optim.swa_utils.update_bn; the mean of two networks has statistics of its own.
        """
        merged = copy.deepcopy(self.theta)
        mean = self.layout.views(self.params.mean(0))
        for parameter, view in zip((trainable(merged)[n] for n in self.layout.names), mean, strict=True):
            parameter.grad = None  # a copy of theta's, of no use
            parameter.data = view.clone()
        for buffer, other in zip(merged.buffers(), self.eta.buffers(), strict=True):
            if buffer.is_floating_point():
                buffer.lerp_(other, 0.5)
        if loader is not None:
            update_bn(loader, merged, device=self.params.device)
        return merged

    # -------------------------------------------------------------------------------------------------------- private

    def _masters(self, row: int) -> list[Tensor]:
        """One copy's parameters in full precision."""
        return self.layout.views(self.params[row])

    def _arguments(self, batches: tuple[Any, ...]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        if len(batches) > 2:
            raise ValueError(f"batches must be none, one for both copies or one for each, got {len(batches)}")
        return batches[:1], batches[-1:]

    def _anchor(
        self, anchor: str | Tensor | Mapping[str, Tensor], dtype: torch.dtype, device: torch.device
    ) -> Tensor | None:
        source: Mapping[str, Tensor]
        if isinstance(anchor, Tensor):
            if anchor.shape != (self.layout.numel,):
                raise ValueError(f"anchor has shape {tuple(anchor.shape)}, but the layout has ({self.layout.numel},)")
            return anchor.detach().to(device, dtype).clone()
        if isinstance(anchor, Mapping):
            source = anchor
        elif anchor == "zero":
            return None
        elif anchor == "init":
            source = trainable(self.theta)
        elif anchor == "random":
            source = trainable(reinitialised(self.theta))
        else:
            raise ValueError(f"anchor must be 'init', 'zero', 'random', a tensor or a state_dict, got {anchor!r}")
        flat = torch.zeros(self.layout.numel, dtype=dtype, device=device)
        for name, view in zip(self.layout.names, self.layout.views(flat), strict=True):
            if name not in source:
                raise ValueError(f"anchor has no entry {name!r}")
            if source[name].shape != view.shape:
                raise ValueError(
                    f"anchor's {name!r} has shape {tuple(source[name].shape)}, but the model's has {tuple(view.shape)}"
                )
            view.copy_(source[name].detach())
        return flat


def reinitialised(model: nn.Module) -> nn.Module:
    """A deep copy whose parameters are drawn anew, by the model's own `reset_parameters` or by its submodules'.

    Raises:
        ValueError: a trainable parameter belongs to a module that cannot reset itself.
    """
    fresh = copy.deepcopy(model)
    if callable(getattr(fresh, "reset_parameters", None)):
        fresh.reset_parameters()  # type: ignore[operator]
        return fresh
    for name, module in fresh.named_modules():
        if callable(getattr(module, "reset_parameters", None)):
            module.reset_parameters()
        elif any(p.requires_grad for p in module.parameters(recurse=False)):
            raise ValueError(
                f"module {name or 'model'!r} ({type(module).__name__}) holds parameters but has no reset_parameters(); "
                "pass eta as a module, or anchor as a state_dict"
            )
    return fresh
