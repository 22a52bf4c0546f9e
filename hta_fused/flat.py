"""Parameters of several modules of one kind over the rows of a flat buffer, and their gradients over another.

What is done to the modules meanwhile, moved, replaced, frozen, written, is followed or refused here. Imports checks.py, layout.py
and masters.py.
"""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from operator import attrgetter, methodcaller
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.nn.parameter import is_lazy
from torch.utils.hooks import RemovableHandle

from .checks import choice, shown
from .kernels.reference import DTYPES, LOW
from .layout import Layout, check_dense, owners_of, trainable
from .masters import FORMATS, Masters

_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
_TRAINS, _VERSION, _ADDRESS = attrgetter("requires_grad"), attrgetter("_version"), methodcaller("data_ptr")
# What _bind and _diagnose make anew, and copies and pickles do without.
_DERIVED = frozenset((
    "masters", "frozen", "_grad_views", "_streams", "_held", "_were", "_single", "_all", "_trains",
    "_flat", "_addresses", "_half_frozen", "_grad_versions", "_warned", "_hooks",
))  # fmt: skip


class Numbered(nn.ModuleList):
    """Modules whose names begin at a number of their own: with one copy for each process it is the rank."""

    def __init__(self, modules: Iterable[nn.Module] = (), first: int = 0):
        super().__init__()
        self.first = first
        for i, module in enumerate(modules, first):
            self.add_module(str(i), module)

    def _get_abs_string_index(self, idx: Any) -> str:
        return str(int(super()._get_abs_string_index(idx)) + self.first)


class FlatCopies(nn.Module):
    """The parts of Replicas that know of memory only: no anchor, no partition, no losses.

    Args:
        copies: modules of one kind, whose trainable parameters are of one dtype, on one device.
        layout: of those.
        compute_dtype: float16 or bfloat16 where the modules' parameters are copies of float32 masters, else None.
        first: the number of the first of them.
        master_format: "full" or, with a compute_dtype, "split": see masters.py.
    """

    _grad_versions: list[int]
    _warned: bool  # of a copy that no gradient reaches

    masters: Masters
    _hooks: Sequence[RemovableHandle] = ()

    def __init__(
        self,
        copies: list[nn.Module],
        layout: Layout,
        compute_dtype: torch.dtype | None,
        first: int = 0,
        master_format: str = "full",
    ):
        super().__init__()
        self.copies = Numbered(copies, first)
        self.first = first
        self.layout = layout
        self._compute_dtype = compute_dtype
        self._master_format = master_format
        self.trained = [[trainable(net)[name] for name in layout.names] for net in copies]
        for row, parameters in enumerate(self.trained):
            for name, parameter in zip(layout.names, parameters, strict=True):
                _check_plain(f"parameter {name!r} of copy {row + self.first}", parameter)
                if parameter.is_inference():
                    raise TypeError(
                        f"parameter {name!r} of copy {row + self.first} must be one that can train, got one made under inference_mode"
                    )
        owners = owners_of(copies[0])
        self._in_norm = [isinstance(owners[id(p)], _NORMS) for p in self.trained[0]]  # stays float32
        for net in copies:
            net.zero_grad()  # gradients of the old dtype, and of no use
        self._bind(self.trained[0][0].detach())

    def __len__(self) -> int:
        return len(self.copies)

    @property
    def compute_dtype(self) -> torch.dtype | None:
        """The modules' where it is not the values', or None; for another one make new Replicas."""
        return self._compute_dtype

    @property
    def master_format(self) -> str:
        """Of the values; for another one make new Replicas."""
        return self._master_format

    @property
    def params(self) -> Tensor:
        """[m, N]: all copies' values. With split masters they are made anew, and writing to them changes nothing."""
        return self.masters.values

    @property
    def low(self) -> Tensor | None:
        """[m, N] in compute_dtype, which the modules read, or None."""
        return self.masters.rows if self.masters.corrections is not None else self.masters.low

    @property
    def device(self) -> torch.device:
        """Where the buffers are."""
        return self.grads.device

    @property
    def dtype(self) -> torch.dtype:
        """The values'."""
        return torch.float32 if self.masters.corrections is not None else self.masters.rows.dtype

    def rows(self, number: int, dtype: torch.dtype | None = None) -> Tensor:
        """A further [m, N] buffer of zeros, of the values' dtype or another; number 2 and up: see Layout.rows."""
        return self.layout.rows(len(self), self.grads, dtype or self.dtype, number)

    # ------------------------------------------------------------------------------------------------------ gradients

    @_disable_dynamo
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Zeroes the flat gradient buffer, and makes it the parameters' `.grad` again where something else was.

        `set_to_none` is there for callers and changes nothing for what the buffer holds.
        """
        self.grads.zero_()
        for parameters, views in zip(self.trained, self._grad_views, strict=True):
            for parameter, view in zip(parameters, views, strict=True):
                if parameter.dtype != view.dtype:  # a float32 parameter among low ones: collect_grads() casts
                    parameter.grad = None
                elif parameter.grad is not view:
                    parameter.grad = view

    def collect_grads(self) -> None:
        """Brings gradients that were put elsewhere (by `model.zero_grad()`, say) into the flat buffer; None counts as 0.

        Raises:
            RuntimeError: a parameter was moved out of the buffer, by a copy's own `to(...)` for example, or replaced or
                added, or is frozen in some copies only.
        """
        self.check()
        self.collect_grads_unchecked()

    @torch.no_grad()  # backward(create_graph=True) leaves gradients with a graph
    def collect_grads_unchecked(self) -> None:
        """As `collect_grads`, for those who have just called `check`."""
        views_of_others, others, moved = [], [], []
        versions = self._versions_of_grads()
        reached = [before != now for before, now in zip(self._grad_versions, versions, strict=True)]
        for row, (parameters, views) in enumerate(zip(self.trained, self._grad_views, strict=True)):
            for parameter, view in zip(parameters, views, strict=True):
                grad = parameter.grad
                if grad is not view:
                    moved.append((parameter, view, grad))
                    reached[row] |= grad is not None
        for parameter, view, grad in moved:
            if grad is None:
                view.zero_()
            else:
                views_of_others.append(view)
                # Another parameter's view, say, would be written before it is read.
                others.append(grad.clone() if _lies_in(grad, self.grads) else _dense(grad))
            if parameter.dtype == view.dtype:
                parameter.grad = view
        if others:
            torch._foreach_copy_(views_of_others, others)
        self._grad_versions = self._versions_of_grads() if moved else versions
        if any(reached) and not all(reached) and not self._warned:
            self._warned = True
            lone, trained = reached.index(False) + self.first, reached.index(True) + self.first
            warnings.warn(
                f"no gradient reached copy {lone} in a step in which one reached copy {trained}, so that only the coupling moves it; "
                "to train all copies use the Replicas themselves (their forward, loss or backward), not one copy",
                stacklevel=3,
            )

    def _versions_of_grads(self) -> list[int]:
        """For each copy a number that grows as its gradients are written."""
        return [sum(map(_VERSION, views)) for views in self._grad_views]

    # ---------------------------------------------------------------------------------------------------------- memory

    @torch.inference_mode(False)  # what is made there could not be trained
    @torch.no_grad()
    def _bind(self, like: Tensor, masters: Tensor | None = None) -> None:
        """Takes the trained parameters, and their gradients, into new flat buffers of the dtype and device of `like`.

        masters: [m, N], the values, where the parameters are in low precision.
        """
        self.grads = self.layout.rows(len(self), like, self.compute_dtype, 1)
        self.masters = FORMATS[self.master_format](self.layout, len(self), like, self.compute_dtype, self._in_norm)
        self._grad_views = [self.layout.tensors(row) for row in self.grads]  # each with a version of its own
        self._warned = False
        if masters is not None:
            self.masters.write_all(masters)
            self.masters.refresh()
        for row, parameters in enumerate(self.trained):
            for i, parameter in enumerate(parameters):
                if masters is None:
                    self.masters.write(row, i, parameter)
                self._lay(row, i, parameter.grad)
        self._show_overflow()
        self._grad_versions = self._versions_of_grads()
        self._streams: list[torch.cuda.Stream] = []
        self._flat = [p for row in self.trained for p in row]
        self._addresses = [home.data_ptr() for row in self.masters.homes for home in row]
        self._remember()
        self.written()

    def _lay(self, row: int, i: int, grad: Tensor | None) -> None:
        """Lays a parameter over its home, which holds its value, and gives it this gradient."""
        parameter, view = self.trained[row][i], self._grad_views[row][i]
        parameter.grad = None  # whose dtype may differ
        parameter.data = self.masters.homes[row][i]
        view.zero_() if grad is None else view.copy_(_dense(grad))
        if parameter.dtype == view.dtype:
            parameter.grad = view
        elif grad is not None:  # a float32 parameter among low ones: collect_grads() casts
            parameter.grad = view.to(parameter.dtype)

    def _show_overflow(self) -> None:
        """Lets a float32 gradient among float16 ones be what it will be when it is cast: a GradScaler, which looks before
        that, must see what overflows."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        for parameter in chain.from_iterable(self.trained):
            if parameter.dtype != self.grads.dtype == torch.float16:
                trains = parameter.requires_grad
                parameter.requires_grad_(True)  # else there can be no hook
                self._hooks.append(parameter.register_post_accumulate_grad_hook(_through_float16))
                parameter.requires_grad_(trains)

    def _grads_as_stepped(self) -> Tensor:
        """A copy of all gradients as a step would find them, with those that were put elsewhere."""
        grads = self.grads.clone()
        for row, parameters in enumerate(self.trained):
            places = zip(parameters, self._grad_views[row], self.layout.tensors(grads[row]), strict=True)
            for parameter, own, place in places:
                if parameter.grad is None:
                    place.zero_()
                elif parameter.grad is not own:
                    place.copy_(_dense(parameter.grad))
        return grads

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FlatCopies":
        """What nn.Module does by `to`, `half`, `cuda` and the like: the copies move, and the buffers with them."""
        if torch.__future__.get_overwrite_module_params_on_conversion():
            raise RuntimeError(
                "torch.__future__.set_overwrite_module_params_on_conversion must be False where Replicas are moved, got "
                "True: their parameters lie in one buffer"
            )
        self.masters.take(self._flat)
        probe = torch.empty(2, 2, 2, 2, dtype=self.dtype, device=self.device)
        moved = fn(probe)
        if moved.dtype not in DTYPES or moved.is_meta:
            raise TypeError(
                f"Replicas must be float16, bfloat16, float32 or float64 in real memory, got {moved.dtype} on {moved.device}"
            )
        if moved.stride() != probe.stride():
            raise ValueError("memory_format of Replicas must stay as it is; set the model's before making its Replicas")
        if moved.device.type == "cpu" and moved.is_shared():
            raise ValueError("Replicas must not be moved to shared memory; make them in the process that trains")
        if self.low is not None and (moved.dtype != self.dtype or fn(self.low.new_empty(0)).dtype != self.low.dtype):
            raise TypeError(
                f"dtype of Replicas with a compute_dtype ({self.compute_dtype}) must stay as it is; make new Replicas"
            )
        masters = None if self.low is None else self.params
        super()._apply(fn, recurse)
        if not self._in_place():
            self._bind(moved, masters)
        return self

    def __copy__(self) -> "FlatCopies":
        raise TypeError(
            "Replicas cannot be copied without their parameters, which lie in one buffer only: use copy.deepcopy"
        )

    def __getstate__(self) -> dict[str, Any]:
        self.masters.take(self._flat)
        state = {name: value for name, value in self.__dict__.items() if name not in _DERIVED}
        # Without low precision the parameters say all.
        return state | {"params": None if self.low is None else self.params, "grads": self._grads_as_stepped()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        grads, masters = state["grads"], state["params"]
        super().__setstate__(state)
        for parameters, row in zip(self.trained, grads, strict=True):  # which _bind takes
            for parameter, view in zip(parameters, self.layout.views(row), strict=True):
                parameter.grad = view.to(parameter.dtype)
        self._bind(grads.new_empty(0, dtype=self.trained[0][0].dtype) if masters is None else masters, masters)

    @torch.inference_mode(False)
    @torch.no_grad()
    def rebind(self) -> None:
        """Takes the values (and gradients) of parameters that were replaced or moved after the Replicas were made, by
        `load_state_dict(assign=True)`, `module.weight = nn.Parameter(...)` or a copy's own `to(...)`, into the flat
        buffers.

        The parameters that the Replicas and the optimizer know stand in the modules again, as views of the buffers.

        Raises:
            RuntimeError: a copy's trainable parameters are not those of the layout any more, in name, shape, floating
                dtype or device; nothing is changed then, and new Replicas are needed.
        """
        nets = [dict(net.named_parameters()) for net in self.copies]
        for row, by_name in enumerate(nets):
            self._check_same(row, by_name)
        for row, (net, by_name) in enumerate(zip(self.copies, nets, strict=True)):
            mine: dict[int, nn.Parameter] = {}
            for i, name in enumerate(self.layout.names):
                now, parameter = by_name[name], self.trained[row][i]
                mine[id(now)] = parameter
                if now is parameter and now.data_ptr() == self.masters.homes[row][i].data_ptr():
                    continue  # its master may hold more digits
                self.masters.write(row, i, now)
                self._grad_views[row][i] = self.layout.tensors(self.grads[row])[i]  # a copy's to() moves .grad in place
                self._lay(row, i, now.grad)
                parameter.requires_grad_(now.requires_grad)
            for module in net.modules():
                for key, value in module._parameters.items():
                    if id(value) in mine:
                        setattr(module, key, mine[id(value)])  # an LSTM keeps a list of its parameters besides
        self._remember()
        self.written()

    def _check_same(self, row: int, by_name: Mapping[str, nn.Parameter]) -> None:
        """Raises where a copy's parameters cannot be taken into the buffers."""
        shapes = dict(zip(self.layout.names, self.layout.shapes, strict=True))
        for name, now in by_name.items():
            if name not in shapes and now.requires_grad and id(now) not in map(id, self.trained[row]):
                raise RuntimeError(
                    f"parameter {name!r} of copy {row + self.first} was not there when rebind() looked; make new Replicas"
                )
        for name, shape in shapes.items():
            if name not in by_name:
                raise RuntimeError(
                    f"parameter {name!r} of copy {row + self.first} is gone when rebind() looked; make new Replicas"
                )
            now, device = by_name[name], self.device
            _check_plain(f"parameter {name!r} of copy {row + self.first}", now, RuntimeError)
            if now.shape != shape or now.device != device or not now.is_floating_point():
                raise RuntimeError(
                    f"parameter {name!r} of copy {row + self.first} must be floating, of shape {tuple(shape)} on {device}, got "
                    f"{now.dtype} {tuple(now.shape)} on {now.device}; make new Replicas"
                )

    # ------------------------------------------------------------------------------------------------- what others did

    def _remember(self) -> None:
        """Notes which parameters and modules the modules hold, and which train, for `check`."""
        self._held = [held for m in self.modules() for held in (m._parameters, m._modules)]
        self._were: list[dict[str, Any]] = [dict(held) for held in self._held]
        # Dicts are compared by identity first, then by value: of one element, another parameter may equal the old one.
        self._single = [
            (held, k, p) for held in self._held for k, p in held.items() if isinstance(p, Tensor) and p.numel() < 2
        ]
        self._all = list(self.parameters())
        self._trains: list[bool] | None = None  # unknown: the next check looks

    def _unchanged(self) -> bool:
        """Whether all modules hold the same parameters and modules as before, as frozen or not as they were; in a few
        microseconds."""
        try:
            return (
                self._trains == list(map(_TRAINS, self._all))
                and self._held == self._were
                and all(held[k] is p for held, k, p in self._single)
            )
        except Exception:  # another tensor, and == gave many values or none
            return False

    def _in_place(self) -> bool:
        """Whether the parameters lie where they were laid."""
        return list(map(_ADDRESS, self._flat)) == self._addresses

    def check(self) -> None:
        """Notices what was done to the parameters since it last looked; `step` and `collect_grads` call it.

        Raises:
            RuntimeError: a trained parameter was replaced, sharded, moved out of the buffer or frozen in some copies only, or a
                trainable one was added.
        """
        self.settle()
        if self._half_frozen:
            raise RuntimeError(
                f"parameter {self._half_frozen!r} is frozen in some copies and trained in others; freeze it in all (the "
                "coupling moves it still) or in none"
            )

    def settle(self) -> None:
        """As `check`, for those who only read the buffers: copies may be frozen as they like."""
        if not self._unchanged():
            self._diagnose()
        if not self._in_place():
            where = list(map(_ADDRESS, self._flat))
            row, i = divmod(
                [a == b for a, b in zip(where, self._addresses, strict=True)].index(False), len(self.layout.names)
            )
            raise RuntimeError(
                f"parameter {self.layout.names[i]!r} of copy {row + self.first} no longer lies in the flat buffer; call rebind(), or move "
                "the Replicas, not a copy (its memory format before making them)"
            )
        self.masters.take(self._flat)

    def _diagnose(self) -> None:
        """Raises where a trained parameter was replaced or a trainable one added, and else notes what is there now."""
        if len(self.copies) != len(self.trained):
            raise RuntimeError(
                f"copies must stay {len(self.trained)} modules, got {len(self.copies)}; make new Replicas"
            )
        for row, net in enumerate(self.copies):
            there = {id(p) for p in net.parameters()}
            now = dict(net.named_parameters())
            for name, parameter in zip(self.layout.names, self.trained[row], strict=True):
                if id(parameter) not in there:
                    if name in now:
                        _check_plain(f"parameter {name!r} of copy {row + self.first}", now[name], RuntimeError)
                    raise RuntimeError(
                        f"parameter {name!r} of copy {row + self.first} was replaced or removed after the Replicas were made, so that "
                        "no gradient reaches it; call rebind() on the Replicas if names and shapes are as before, else "
                        "make new Replicas"
                    )
            known = {id(p) for p in self.trained[row]}
            for name, parameter in now.items():
                if parameter.requires_grad and id(parameter) not in known:
                    raise RuntimeError(
                        f"parameter {name!r} of copy {row + self.first} was added, or set to train, after the Replicas were made, so "
                        "that no step would train it; make new Replicas, or set its requires_grad to False"
                    )
        self._remember()
        self._trains = list(map(_TRAINS, self._all))
        of_each = list(zip(*([p.requires_grad for p in row] for row in self.trained), strict=True))
        self.frozen = [i for i, trains in enumerate(of_each) if not any(trains)]
        mixed = [i for i, trains in enumerate(of_each) if any(trains) and not all(trains)]
        self._half_frozen = self.layout.names[mixed[0]] if mixed else None

    def written(self) -> None:
        """Says that what was written to the parameters until now came from the masters."""
        self.masters.written(self._flat)

    def _low_entries(self, prefix: str) -> dict[str, tuple[int, int]]:
        """Copy and number of low-precision parameters, by their keys in a state_dict; tied ones under each of their names."""
        if self.low is None:
            return {}
        entries = {}
        for row, net in enumerate(self.copies):
            numbers = {id(p): i for i, p in enumerate(self.trained[row])}
            for name, parameter in net.named_parameters(remove_duplicate=False):
                if id(parameter) in numbers:
                    entries[f"{prefix}copies.{row + self.first}.{name}"] = row, numbers[id(parameter)]
        return entries


def check_model(
    model: nn.Module, compute_dtype: torch.dtype | None, master_format: str
) -> tuple[Tensor, torch.dtype | None]:
    """Raises where a model's trainable parameters cannot lie in one buffer; returns one of them, and the compute_dtype where it
    is not theirs."""
    first = trainable(model)
    if any(isinstance(module, FlatCopies) for module in model.modules()):
        raise TypeError("model must not hold Replicas, whose parameters lie in a flat buffer already, got some")
    if not first:
        raise ValueError("model has no parameter that requires a gradient")
    for name, parameter in first.items():
        _check_plain(f"model's parameter {name!r}", parameter)
    kinds = {(p.dtype, p.device) for p in first.values()}
    if len(kinds) > 1:
        found = ", ".join(f"{dtype} on {device}" for dtype, device in sorted(kinds, key=str))
        raise TypeError(f"model's trainable parameters must share one dtype and device, got {found}")
    ((dtype, _),) = kinds
    if dtype not in DTYPES:
        raise TypeError(f"model's trainable parameters must be float16, bfloat16, float32 or float64, got {dtype}")
    if compute_dtype == dtype:
        compute_dtype = None
    if compute_dtype is not None and (compute_dtype not in LOW or dtype != torch.float32):
        got = compute_dtype if isinstance(compute_dtype, torch.dtype) else shown(compute_dtype)
        raise TypeError(f"compute_dtype must be bfloat16 or float16 beside float32, got {got} for {dtype}")
    choice("master_format", master_format, *FORMATS)
    if master_format == "split" and compute_dtype is None:
        raise ValueError("master_format='split' needs a compute_dtype, bfloat16 or float16, got None")
    return next(iter(first.values())), compute_dtype


def _lies_in(grad: Tensor, buffer: Tensor) -> bool:
    """Whether a gradient lies in the memory of a buffer."""
    start = buffer.untyped_storage().data_ptr()
    return grad.layout == torch.strided and start <= grad.data_ptr() < start + buffer.untyped_storage().nbytes()


def _through_float16(parameter: Tensor) -> None:
    assert parameter.grad is not None
    parameter.grad.copy_(parameter.grad.half())


def _dense(grad: Tensor) -> Tensor:
    return grad if grad.layout == torch.strided else grad.to_dense()


def _check_plain(what: str, parameter: Tensor, error: type[Exception] = TypeError) -> None:
    """Raises where a parameter cannot lie in a flat buffer."""
    if hasattr(parameter, "fake_mode") or parameter.is_meta:
        kind = "a fake one (FakeTensorMode)" if hasattr(parameter, "fake_mode") else "one on the meta device"
        raise error(f"{what} must be a real tensor, got {kind}, which has no memory")
    if is_lazy(parameter):
        raise error(f"{what} has no shape yet: run the lazy module once first")
    if not issubclass(type(parameter), nn.Parameter):  # isinstance says yes to every tensor that was made a parameter
        sharded = ": FSDP2's shards cannot lie in a flat buffer" if type(parameter).__name__ == "DTensor" else ""
        raise error(f"{what} must be a plain torch.nn.Parameter, got a {type(parameter).__name__}{sharded}")
    check_dense(what, parameter, error)
