"""Copies of a model as the rows of one flat buffer, with their gradients and their anchor.

Owns the buffers and nothing else: no optimizer, no schedule, no data. Imports checks.py, layout.py and partition.py.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.optim.swa_utils import update_bn

from .checks import shown, whole
from .kernels.reference import LOW, MAX_COPIES
from .layout import Layout, owners_of, trainable
from .partition import Partition

_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


class Replicas:
    """The coupled copies of a model.

    Copy 0 is the model itself, whose parameters now live in a flat buffer; the others are modules of the same kind. All
    are ordinary modules: call them, hook them, put them in eval mode. Their `.grad`s are views of a flat buffer
    that backward() fills; empty it with `zero_grad()` (or the optimizer's). Move the model to its device, dtype and
    memory format before, not after. A parameter that is replaced or added afterwards is noticed at the next step: see
    `rebind`.

    Tied parameters stay tied, frozen ones and those of integer dtype stay out of the buffer, buffers (running
    statistics and the like) stay each copy's own.

    Args:
        model: any module with trainable parameters of one floating dtype on one device.
        copies: m, how many there are, from 1 to 32.
        partition: a Partition of the model, the name of one ("conv_blocks", "layer_blocks", "random", "random_units",
            "hashed"), made of as many blocks as there are copies, or labels by parameter name.
        anchor: θ̃: "init" (the parameters as they are now), "zero", "random" (a fresh initialisation), a flat
            tensor in `layout`'s order, or a state_dict.
        start: "copy" (all start equal), "independent" (a fresh initialisation for each but copy 0), or the other copies
            themselves, a list of copies − 1 modules.
        compute_dtype: torch.bfloat16 or torch.float16: the modules' parameters are copies in this dtype of float32
            masters, brought up to date by the optimizer's step, so that autocast has nothing left to cast. Those of
            normalisation layers stay float32. All gradients are kept in this dtype. The masters are what
            `state_dict`, `merge` and the optimizer work with.

    Attributes:
        copies: the m modules; `theta` and `eta` are the first two.
        params, grads: [m, N] buffers, a row for each copy.
        low: [m, N] in compute_dtype, or None.
        anchor: [N], or None for zero.
        layout, partition: where each parameter lies, and each element's label.

    Raises:
        ValueError: an unknown name, a partition or anchor that does not match the model, nothing to train.
        TypeError: trainable parameters of several dtypes or devices, or of another dtype than float16, bfloat16, float32
            or float64; a compute_dtype beside others than float32; an argument of another type than these.
    """

    def __init__(
        self,
        model: nn.Module,
        copies: int = 2,
        partition: str | Partition | Mapping[str, Tensor | int] = "conv_blocks",
        anchor: str | Tensor | Mapping[str, Tensor] = "init",
        start: str | Sequence[nn.Module] = "copy",
        compute_dtype: torch.dtype | None = None,
    ):
        first = trainable(model)
        if not first:
            raise ValueError("model has no parameter that requires a gradient")
        copies = whole("copies", copies, 1, MAX_COPIES)
        kinds = {(p.dtype, p.device) for p in first.values()}
        if len(kinds) > 1:
            found = ", ".join(f"{dtype} on {device}" for dtype, device in sorted(kinds, key=str))
            raise TypeError(f"model's trainable parameters must share one dtype and device, got {found}")
        dtype, device = kinds.pop()
        if dtype not in (torch.float32, torch.float64, *LOW):
            raise TypeError(f"model's trainable parameters must be float16, bfloat16, float32 or float64, got {dtype}")
        if any(hasattr(p, "fake_mode") for p in first.values()):
            raise TypeError(
                "model's parameters must be real tensors, got fake ones (FakeTensorMode): they have no memory"
            )
        if compute_dtype == dtype:
            compute_dtype = None
        if compute_dtype is not None and (compute_dtype not in LOW or dtype != torch.float32):
            got = compute_dtype if isinstance(compute_dtype, torch.dtype) else shown(compute_dtype)
            raise TypeError(f"compute_dtype must be bfloat16 or float16 beside float32, got {got} for {dtype}")

        self.layout = Layout.of(model)
        self.partition = Partition.make(model, partition, copies).to(device)
        if self.partition.blocks > copies:
            raise ValueError(f"partition has {self.partition.blocks} blocks, but there are {copies} copies")
        self.copies = [model, *self._others(model, copies - 1, start)]
        self.anchor = self._anchor(anchor, dtype, device)

        like = torch.empty(0, dtype=dtype, device=device)
        self.params = self.layout.rows(copies, like)
        self.low = None if compute_dtype is None else self.layout.rows(copies, like, compute_dtype, 4)
        self.grads = self.layout.rows(copies, like, compute_dtype, 1)
        self.parameters: list[list[nn.Parameter]] = []
        owners = owners_of(model)
        self._in_norm = [isinstance(owners[id(p)], _NORMS) for p in first.values()]  # stays float32
        self._grad_views = [self.layout.views(row) for row in self.grads]
        for row, net in enumerate(self.copies):
            by_name = trainable(net)
            self.parameters.append([by_name[name] for name in self.layout.names])
            lows = None if self.low is None else self.layout.views(self.low[row])
            for i, (parameter, view) in enumerate(zip(self.parameters[row], self._masters(row), strict=True)):
                view.copy_(parameter.detach())
                parameter.grad = None  # of the old dtype
                parameter.data = view if lows is None or self._in_norm[i] else lows[i].copy_(view)
        self._addresses = [[p.data_ptr() for p in row] for row in self.parameters]
        self._streams: list[torch.cuda.Stream] = []
        self._remember()
        self.zero_grad()

    def rows(self, number: int) -> Tensor:
        """A further [m, N] buffer like `params`, of zeros; number 2 and up: see Layout.rows."""
        return self.layout.rows(len(self), self.params, number=number)

    @property
    def theta(self) -> nn.Module:
        """Copy 0, the model itself."""
        return self.copies[0]

    @property
    def eta(self) -> nn.Module:
        """Copy 1."""
        if len(self.copies) < 2:
            raise AttributeError("there is no eta: these Replicas hold one copy")
        return self.copies[1]

    def __iter__(self) -> Iterator[nn.Module]:
        """The copies."""
        return iter(self.copies)

    def __len__(self) -> int:
        return len(self.copies)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Replicas":
        """New modules over buffers of their own."""
        rebuilt = memo[id(self)] = object.__new__(type(self))
        rebuilt.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return rebuilt

    def __getstate__(self) -> dict[str, Any]:
        # As torch saves tensors: views of one storage each would be one whole buffer.
        return {name: getattr(self, name) for name in ("copies", "partition", "anchor", "params", "grads")} | {
            "compute_dtype": None if self.low is None else self.low.dtype
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        copies = state["copies"]
        low = state["compute_dtype"]
        if low is not None:  # the modules were in low precision; the masters hold their values
            views = [state["partition"].layout.views(row) for row in state["params"]]
            for net, masters in zip(copies, views, strict=True):
                for name, master in zip(state["partition"].layout.names, masters, strict=True):
                    trainable(net)[name].data = master.clone()
        anchor = "zero" if state["anchor"] is None else state["anchor"]
        self.__init__(copies[0], len(copies), state["partition"], anchor, copies[1:], low)  # type: ignore[misc]
        self.params.copy_(state["params"])
        self.grads.copy_(state["grads"])

    def __repr__(self) -> str:
        anchor = "0" if self.anchor is None else "a point"
        return (
            f"Replicas({len(self)} copies of {type(self.theta).__name__}, {self.layout.numel:,} elements of {self.params.dtype} "
            f"on {self.params.device}, {self.partition.blocks} blocks, anchor {anchor})"
        )

    # ------------------------------------------------------------------------------------------- losses, gradients

    def loss(self, fn: Callable[..., Tensor], *batches: Any) -> Tensor:
        """Σ_j f(x_j).

        Args:
            fn: fn(net) or fn(net, batch), the loss of one copy.
            batches: none; one, on which all copies are evaluated (the paper's one ξ); or one for each copy.
        """
        losses = [fn(net, *args) for net, args in zip(self.copies, self._arguments(batches), strict=True)]
        return torch.stack(losses).sum()

    @_disable_dynamo(recursive=False)  # a graph ends at backward() anyhow; the copies' passes are compiled
    def backward(
        self,
        fn: Callable[..., Tensor],
        *batches: Any,
        scale: Callable[[Tensor], Tensor] = lambda loss: loss,
        concurrent: bool = False,
    ) -> tuple[Tensor, ...]:
        """`loss(fn, *batches).backward()` in the memory of one copy: its graph is gone before the next one's is built.

        Args:
            fn, batches: as in `loss`.
            scale: applied to each loss before its backward(), such as a GradScaler's `scale`.
            concurrent: on a GPU, run each copy's pass on a stream of its own: one copy's kernels fill what another's
                leave idle, and all graphs are in memory at once.

        Returns:
            f(x_j) of each copy, detached and not scaled.
        """
        losses = []
        streams: list[Any] = [None] * len(self)
        main = None
        if concurrent and self.params.is_cuda:
            main = torch.cuda.current_stream(self.params.device)
            while len(self._streams) < len(self) - 1:
                self._streams.append(torch.cuda.Stream(self.params.device))
            streams[1:] = self._streams
            for stream in self._streams:
                stream.wait_stream(main)  # before copy 0's work is queued: the others need not wait for it
        for net, args, stream in zip(self.copies, self._arguments(batches), streams, strict=True):
            with torch.cuda.stream(stream):  # None changes nothing
                value = fn(net, *args)
                scale(value).backward()
                losses.append(value.detach())
        if main is not None:
            for stream in self._streams:
                main.wait_stream(stream)
        return tuple(losses)

    @_disable_dynamo
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
            RuntimeError: a parameter was moved out of the buffer, by `model.to(...)` for example, or replaced or added.
        """
        if not self._unchanged():
            self._diagnose()
        views_of_others, others, moved = [], [], []
        for row, (parameters, views) in enumerate(zip(self.parameters, self._grad_views, strict=True)):
            for i, (parameter, view) in enumerate(zip(parameters, views, strict=True)):
                if parameter.data_ptr() != self._addresses[row][i]:
                    raise RuntimeError(
                        f"parameter {self.layout.names[i]!r} of copy {row} no longer lies in the flat buffer; "
                        "call rebind(), or change a model's device, dtype or memory format before making its Replicas"
                    )
                grad = parameter.grad
                if grad is not view:
                    moved.append((parameter, view, grad))
        if not moved:
            return
        for parameter, view, grad in moved:  # only now, when all parameters have been looked at
            if grad is None:
                view.zero_()
            else:
                views_of_others.append(view)
                others.append(grad if grad.layout == torch.strided else grad.to_dense())
            if parameter.dtype == view.dtype:
                parameter.grad = view
        if others:
            torch._foreach_copy_(views_of_others, others)

    # -------------------------------------------------------------------------------------- replaced parameters

    @torch.no_grad()
    def rebind(self) -> None:
        """Takes the values (and gradients) of parameters that were replaced or moved after the Replicas were made, by
        `load_state_dict(assign=True)`, `module.weight = nn.Parameter(...)` or `model.to(...)`, into the flat buffers.

        The parameters that the Replicas and the optimizer know stand in the modules again, as views of the buffers.

        Raises:
            RuntimeError: a copy's trainable parameters are not those of the layout any more, in name, shape, floating
                dtype or device; nothing is changed then, and new Replicas are needed.
        """
        nets = [trainable(net) for net in self.copies]
        for row, by_name in enumerate(nets):
            self._check_same(row, by_name)
        for row, (net, by_name) in enumerate(zip(self.copies, nets, strict=True)):
            lows = None if self.low is None else self.layout.views(self.low[row])
            mine: dict[int, nn.Parameter] = {}
            for i, (name, master) in enumerate(zip(self.layout.names, self._masters(row), strict=True)):
                now, parameter = by_name[name], self.parameters[row][i]
                mine[id(now)] = parameter
                if now is parameter and now.data_ptr() == self._addresses[row][i]:
                    continue  # its master may hold more digits
                master.copy_(now)
                grad = now.grad
                parameter.grad = None  # whose dtype may differ
                parameter.data = master if lows is None or self._in_norm[i] else lows[i].copy_(master)
                view = self._grad_views[row][i] = self.layout.views(self.grads[row])[i]
                view.zero_() if grad is None else view.copy_(grad.to_dense() if grad.layout != torch.strided else grad)
                if parameter.dtype == view.dtype:
                    parameter.grad = view
            for module in net.modules():
                for key, value in module._parameters.items():
                    if id(value) in mine:
                        module._parameters[key] = mine[id(value)]
        self._remember()

    def _check_same(self, row: int, by_name: Mapping[str, nn.Parameter]) -> None:
        """Raises where a copy's trainable parameters cannot be taken into the buffers."""
        shapes = dict(zip(self.layout.names, self.layout.shapes, strict=True))
        for name in (*shapes, *by_name):
            if name not in by_name or name not in shapes:
                what = "is trainable no more" if name in shapes else "was not there"
                raise RuntimeError(f"parameter {name!r} of copy {row} {what} when rebind() looked; make new Replicas")
            now, device = by_name[name], self.params.device
            if now.shape != shapes[name] or now.device != device or not now.is_floating_point():
                raise RuntimeError(
                    f"parameter {name!r} of copy {row} must be floating, of shape {tuple(shapes[name])} on {device}, got "
                    f"{now.dtype} {tuple(now.shape)} on {now.device}; make new Replicas"
                )

    def _remember(self) -> None:
        """Notes which parameters and modules each copy's modules hold, for `_unchanged`."""
        self._held = [held for net in self.copies for m in net.modules() for held in (m._parameters, m._modules)]
        self._were: list[dict[str, Any]] = [dict(held) for held in self._held]
        self._copies_were = list(self.copies)
        self._frozen = [p for net in self.copies for p in net.parameters() if not p.requires_grad]
        # Dicts are compared by identity first, then by value: of one element, another parameter may equal the old one.
        self._single = [
            (held, k, p) for held in self._held for k, p in held.items() if isinstance(p, Tensor) and p.numel() < 2
        ]

    def _unchanged(self) -> bool:
        """Whether all modules hold the same parameters and modules as before, and the frozen ones are frozen still; in a few
        microseconds."""
        try:
            return (
                self._held == self._were
                and self.copies == self._copies_were
                and all(held[k] is p for held, k, p in self._single)
                and not any(p.requires_grad for p in self._frozen)
            )
        except RuntimeError:  # another tensor, and == gave many values
            return False

    def _diagnose(self) -> None:
        """Raises where a trained parameter was replaced or a trainable one added, and else notes what is there now."""
        for row, net in enumerate(self.copies):
            now = {id(p): name for name, p in trainable(net).items()}
            there = {id(p) for p in net.parameters()}
            for name, parameter in zip(self.layout.names, self.parameters[row], strict=True):
                if id(parameter) not in there:
                    raise RuntimeError(
                        f"parameter {name!r} of copy {row} was replaced or removed after the Replicas were made, so that "
                        "no gradient reaches it; call rebind() on the Replicas if names and shapes are as before, else "
                        "make new Replicas"
                    )
            known = {id(p) for p in self.parameters[row]}
            for key, name in now.items():
                if key not in known:
                    raise RuntimeError(
                        f"parameter {name!r} of copy {row} was added, or set to train, after the Replicas were made, so "
                        "that no step would train it; make new Replicas, or set its requires_grad to False"
                    )
        self._remember()

    # ---------------------------------------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """All that training goes on from: "copies", each module's state_dict (with a compute_dtype, of the float32 masters),
        "anchor", and the "seed" of hashed labels."""
        states = []
        for row, net in enumerate(self.copies):
            masters = {id(p): m for p, m in zip(self.parameters[row], self._masters(row), strict=True)}
            # keep_vars: the parameters themselves, tied ones under each of their names
            states.append({
                name: masters.get(id(value), value).detach() if isinstance(value, Tensor) else value
                for name, value in net.state_dict(keep_vars=True).items()
            })  # fmt: skip
        return {"copies": states, "anchor": self.anchor, "seed": self.partition.seed}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`.

        Raises:
            ValueError: another number of copies, or an anchor where there is none or none where there is one.
            RuntimeError: names or shapes differ; nothing is changed then.
        """
        if len(state["copies"]) != len(self):
            raise ValueError(f"state_dict holds {len(state['copies'])} copies, but these Replicas hold {len(self)}")
        for name, mine in (("anchor", self.anchor), ("seed", self.partition.seed)):
            if (state[name] is None) != (mine is None):
                raise ValueError(
                    f"state_dict has {'no' if state[name] is None else 'a'} {name}, but these Replicas have {'none' if mine is None else 'one'}"
                )
            if mine is not None and state[name].shape != mine.shape:
                raise ValueError(
                    f"state_dict's {name} has shape {tuple(state[name].shape)}, but here it has {tuple(mine.shape)}"
                )
        for row, (net, saved) in enumerate(zip(self.copies, state["copies"], strict=True)):
            mine_by_name = net.state_dict()
            for name in (*mine_by_name, *saved):
                if name not in saved or name not in mine_by_name:
                    raise RuntimeError(
                        f"{name!r} of copy {row} is in {'state_dict' if name in saved else 'the model'} only"
                    )
                shapes = [tuple(getattr(of[name], "shape", ())) for of in (saved, mine_by_name)]
                if shapes[0] != shapes[1]:
                    raise RuntimeError(
                        f"{name!r} of copy {row} has shape {shapes[0]} in state_dict, but here {shapes[1]}"
                    )
        for row, (net, saved) in enumerate(zip(self.copies, state["copies"], strict=True)):
            net.load_state_dict(saved)
            names = {id(p): name for name, p in net.named_parameters()}
            for parameter, master in zip(self.parameters[row], self._masters(row), strict=True):
                master.copy_(saved[names[id(parameter)]])
        for name, mine in (("anchor", self.anchor), ("seed", self.partition.seed)):
            if mine is not None:
                mine.copy_(state[name])

    # -------------------------------------------------------------------------------------------------------- results

    def distance(self) -> float:
        """√Σ_{i<j} ‖x_i − x_j‖²; for two copies ‖θ − η‖."""
        gaps = (self.params - self.params[0]).double()
        return float(torch.linalg.vector_norm(gaps - gaps.mean(0)) * len(self) ** 0.5)

    @torch.no_grad()
    def merge(self, loader: Iterable[Any] | None = None) -> nn.Module:
        """A new module with the copies' mean, floating-point buffers too. At L = 0 the copies are equal.

        Args:
            loader: batches of inputs (or tuples that start with them) over which batch-norm statistics are estimated
                anew, by torch.optim.swa_utils.update_bn; the mean of two networks has statistics of its own.
        """
        if not self._unchanged():
            self._diagnose()
        merged = copy.deepcopy(self.theta)
        mean = self.layout.views(self.params.mean(0))
        names = {id(p): name for name, p in self.theta.named_parameters()}  # pruning and the like rename parameters
        by_name = dict(merged.named_parameters())
        for parameter, view in zip((by_name[names[id(p)]] for p in self.parameters[0]), mean, strict=True):
            parameter.grad = None  # a copy of theta's, of no use
            parameter.data = view.clone()
        for buffer, *others in zip(merged.buffers(), *(net.buffers() for net in self.copies[1:]), strict=True):
            if buffer.is_floating_point():
                for count, other in enumerate(others, start=2):
                    buffer.lerp_(other, 1 / count)
        if loader is not None:
            update_bn(loader, merged, device=self.params.device)
        return merged

    # -------------------------------------------------------------------------------------------------------- private

    def _masters(self, row: int) -> list[Tensor]:
        """One copy's parameters in full precision."""
        return self.layout.views(self.params[row])

    def _arguments(self, batches: tuple[Any, ...]) -> list[tuple[Any, ...]]:
        if len(batches) not in (0, 1, len(self)):
            raise ValueError(
                f"batches must be none, one for all copies or one for each of {len(self)}, got {len(batches)}"
            )
        return [(batch,) for batch in batches] if len(batches) > 1 else [batches] * len(self)

    @staticmethod
    def _others(model: nn.Module, count: int, start: str | Sequence[nn.Module]) -> list[nn.Module]:
        if isinstance(start, str):
            if start not in ("copy", "independent"):
                raise ValueError(f"start must be 'copy', 'independent' or a list of modules, got {start!r}")
            return [copy.deepcopy(model) if start == "copy" else reinitialised(model) for _ in range(count)]
        if not isinstance(start, Sequence):
            raise TypeError(f"start must be 'copy', 'independent' or a list of modules, got {shown(start)}")
        others: list[Any] = list(start)
        if len(others) != count:
            raise ValueError(f"start must hold {count} modules, one for each copy but the model, got {len(others)}")
        wanted = {name: (p.shape, p.dtype, p.device) for name, p in trainable(model).items()}
        taken = {id(p) for p in trainable(model).values()}
        for i, other in enumerate(others):
            if not isinstance(other, nn.Module):
                raise TypeError(f"start[{i}] must be a torch.nn.Module, got {shown(other)}")
            held = trainable(other)
            if {name: (p.shape, p.dtype, p.device) for name, p in held.items()} != wanted:
                raise ValueError(
                    f"start[{i}]'s trainable parameters do not match the model's in name and shape, dtype and device"
                )
            if not taken.isdisjoint(map(id, held.values())):
                raise ValueError(f"start[{i}] must be a module of its own, got parameters of the model or another copy")
            taken |= set(map(id, held.values()))
        return others

    def _anchor(
        self, anchor: str | Tensor | Mapping[str, Tensor], dtype: torch.dtype, device: torch.device
    ) -> Tensor | None:
        source: Mapping[str, Tensor]
        if isinstance(anchor, Tensor):
            if anchor.shape != (self.layout.numel,):
                raise ValueError(f"anchor has shape {tuple(anchor.shape)}, but the layout has ({self.layout.numel},)")
            if anchor.dtype not in (torch.float32, torch.float64, *LOW):
                raise TypeError(f"anchor must be float16, bfloat16, float32 or float64, got {anchor.dtype}")
            return anchor.detach().to(device, dtype).clone()
        if isinstance(anchor, Mapping):
            source = anchor
        elif anchor == "zero":
            return None
        elif anchor == "init":
            source = trainable(self.copies[0])
        elif anchor == "random":
            source = trainable(reinitialised(self.copies[0]))
        else:
            raise ValueError(f"anchor must be 'init', 'zero', 'random', a tensor or a state_dict, got {shown(anchor)}")
        flat = torch.zeros(self.layout.numel, dtype=dtype, device=device)
        for name, view in zip(self.layout.names, self.layout.views(flat), strict=True):
            if name not in source:
                raise ValueError(f"anchor has no entry {name!r}")
            if not isinstance(source[name], Tensor) or source[name].is_complex():
                raise TypeError(f"anchor's {name!r} must be a real tensor, got {shown(source[name])}")
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
                "pass start as modules, or anchor as a state_dict"
            )
    return fresh
