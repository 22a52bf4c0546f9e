"""The coupled copies of a model, with their anchor and their partition; itself a module.

Owns the copies and nothing else: no optimizer, no schedule, no data. Imports flat.py, merging.py, partition.py,
side_by_side.py and starts.py.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from . import merging
from .checks import choice, shown, whole
from .distributed import WIRE, Processes
from .flat import FlatCopies, check_model
from .kernels.reference import MAX_COPIES
from .layout import Layout
from .partition import Partition
from .side_by_side import side_by_side
from .starts import anchor_of, copied, others, reinitialised


class Replicas(FlatCopies):
    """The coupled copies of a model, as a module.

    Copy 0 is the model itself, whose parameters now lie in a flat buffer; the others are modules of the same kind. All
    are ordinary modules: call them, hook them, put them in eval mode. Each parameter has a storage of its own over the
    buffer's memory; its `.grad` is a view of a flat buffer that backward() fills; empty it with `zero_grad()` (or the
    optimizer's).

    The whole is a module too, with `state_dict`, `parameters`, `train`, `deepcopy` and so on, for whatever takes one.
    `to`, `half`, `cuda` and the like move all copies and their buffers, and an optimizer follows at its next step; set
    the memory format before. A parameter that is replaced or added in a copy is noticed at the next step: see `rebind`.

    Tied parameters stay tied, frozen ones and those of integer dtype stay out of the buffer, buffers (running
    statistics and the like) stay each copy's own. What is frozen later, in all copies, is moved by the coupling alone.

    Args:
        model: any module with trainable parameters of one floating dtype on one device.
        copies: m, how many there are, from 1 to 32; 2 unless a group says.
        partition: a Partition of the model, the name of one ("auto", "conv_blocks", "layer_blocks", "random",
            "random_units", "hashed", "none"), made of as many blocks as there are copies, or labels by parameter name. See
            `Partition.auto`; `describe()` prints what came of it.
        anchor: θ̃: "init" (the parameters as they are now), "zero", "random" (a fresh initialisation), a flat
            tensor in `layout`'s order, or a state_dict.
        start: "copy" (all start equal), "independent" (a fresh initialisation for each but copy 0), or the other copies
            themselves, a list of copies − 1 modules.
        compute_dtype: torch.bfloat16 or torch.float16: the modules' parameters are copies in this dtype of float32
            masters, brought up to date by the optimizer's step, so that autocast has nothing left to cast. What others
            write to them counts, but for writes through `.data`, which leave no trace. Those of normalisation layers
            stay float32. All gradients are kept in this dtype. The masters are what
            `state_dict`, `merge` and the optimizer work with.
        group: a process group, or a DeviceMesh of one dimension: each process of it holds one copy, on its own device;
            rank 0 holds copy 0. All processes must make their Replicas together, of models and with arguments that
            agree. Copy 0's values are sent to all; with start="independent" the others are drawn anew after that, into
            each process's model. `copies` is the group's size.
        communicate: "float32" or "bfloat16": what the processes send their sums in. In bfloat16 it is what has changed since
            the last sum, to eight bits; that sum is kept in memory, and in no state_dict.
        factory: returns a fresh module like the model, for start="independent" and anchor="random". Without it a deep
            copy of the model is drawn anew by the `reset_parameters` of its modules, which may differ from what
            the model's constructor does; what is frozen stays as it is.
        master_format: "full", or with a compute_dtype "split": of each master 24 bits are kept, the compute_dtype's number
            and a byte of correction (relative error 2⁻¹⁶), 3 bytes for 6. What others write to a parameter then has no
            correction.
        anchor_format: "full", or "bfloat16" beside float32.

    Attributes:
        copies: the m modules, an nn.ModuleList; `theta` and `eta` are the first two. With a group, this process's.
        count: m; `len` is how many are here.
        params, grads: [m, N] buffers, a row for each copy (with a group [1, N], and so on). With split masters `params` are
            made anew, and writing to them changes nothing.
        low: [m, N] in compute_dtype, or None.
        anchor: [N], or None for zero.
        trained: each copy's parameters in the buffer, in `layout`'s order.
        layout, partition: where each parameter lies, and each element's label.

    Raises:
        ValueError: an unknown name, a partition or anchor that does not match the model, nothing to train.
        TypeError: trainable parameters of several dtypes or devices, or of another dtype than float16, bfloat16, float32
            or float64, or sharded, fake or without memory; a compute_dtype beside others than float32; an argument of
            another type than these.
        RuntimeError: a group without torch.distributed.
    """

    anchor: Tensor | None
    _loaded: list[tuple[int, int, Tensor]]
    accepts_loss_kwargs = False  # for transformers' Trainer, which else takes forward's **kwargs for a yes

    @torch.inference_mode(False)  # whose tensors could not be trained
    def __init__(
        self,
        model: nn.Module,
        copies: int | None = None,
        partition: str | Partition | Mapping[str, Tensor | int] = "auto",
        anchor: str | Tensor | Mapping[str, Tensor] = "init",
        start: str | Sequence[nn.Module] = "copy",
        compute_dtype: torch.dtype | None = None,
        factory: Callable[[], nn.Module] | None = None,
        group: Any = None,
        communicate: str = "float32",
        master_format: str = "full",
        anchor_format: str = "full",
    ):
        like, compute_dtype = check_model(model, compute_dtype, master_format)
        anchor_format = choice("anchor_format", anchor_format, "full", "bfloat16")
        choice("communicate", communicate, *WIRE)
        if anchor_format == "bfloat16" and like.dtype != torch.float32:
            raise ValueError(f"anchor_format='bfloat16' needs parameters of float32, got {like.dtype}")
        if group is not None and (master_format, anchor_format) != ("full", "full"):
            raise ValueError(
                f"master_format and anchor_format must be 'full' with a group, got {master_format!r} and {anchor_format!r}"
            )
        processes = None if group is None else Processes(group, communicate)
        copies = (processes.size if processes else 2) if copies is None else whole("copies", copies, 1, MAX_COPIES)
        if processes and copies != processes.size:
            raise ValueError(f"copies must be the group's size, {processes.size}, or left out, got {copies}")
        if factory is not None and not callable(factory):
            raise TypeError(f"factory must be a function that returns a module, got {shown(factory)}")
        layout = Layout.of(model)
        partition = Partition.make(model, partition, copies).to(like.device).with_own_seed()
        if partition.blocks > copies:
            raise ValueError(f"partition has {partition.blocks} blocks, but there are {copies} copies")
        partition.check_hashed(copies)
        if processes:
            processes.agree(_identity(model, partition, like, compute_dtype, anchor, start, communicate))
            for tensor in (*model.parameters(), *model.buffers()):
                processes.broadcast_(tensor)
        fresh = factory or (lambda: reinitialised(model))
        more = others(model, copies - 1, start, fresh)
        point = anchor_of(anchor, model, layout, fresh)
        here = [model, *more]
        if processes:
            here = [_in_place_of(model, here[processes.rank], start)]
            if point is not None:
                processes.broadcast_(point)
        super().__init__(here, layout, compute_dtype, processes.rank if processes else 0, master_format)
        self.processes = processes
        self._partition = partition
        self._anchor_format = anchor_format
        self.register_buffer("anchor", point if point is None or anchor_format == "full" else point.bfloat16())
        self.register_load_state_dict_post_hook(_after_loading)

    @property
    def partition(self) -> Partition:
        """Each element's label; for another one make new Replicas."""
        return self._partition

    @property
    def anchor_format(self) -> str:
        """The anchor's; for another one make new Replicas."""
        return self._anchor_format

    @property
    def count(self) -> int:
        """m, in all processes."""
        return self.processes.size if self.processes else len(self)

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

    def __repr__(self) -> str:
        anchor = "0" if self.anchor is None else "a point"
        return (
            f"Replicas({len(self)} copies of {type(self.theta).__name__}, {self.layout.numel:,} elements of "
            f"{self.dtype} on {self.device}, {self.partition.blocks} blocks, anchor {anchor})"
        )

    def check_anchor(self) -> None:
        """Raises ValueError where an anchor that was assigned is not like a copy."""
        anchor = self.anchor
        if anchor is not None:
            dtype = self.dtype if self.anchor_format == "full" else torch.bfloat16
            wanted = (self.layout.numel,), dtype, self.device
            if (tuple(anchor.shape), anchor.dtype, anchor.device) != wanted or not anchor.is_contiguous():
                raise ValueError(
                    "anchor must be a contiguous tensor of shape {}, {} on {}, got {}, {} on {}".format(
                        *wanted, tuple(anchor.shape), anchor.dtype, anchor.device
                    )
                )

    @torch.inference_mode(False)
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Replicas":
        kept = self.anchor if self.anchor_format != "full" else None
        if kept is not None:  # goes to another device, but keeps its format
            moved = fn(torch.empty(0, dtype=self.dtype, device=self.device)).dtype
            if moved != self.dtype:
                raise TypeError(
                    f"dtype of Replicas must stay {self.dtype} with anchor_format={self.anchor_format!r}, got {moved}"
                )
            self.anchor = None
        try:
            super()._apply(fn, recurse)
        finally:
            if kept is not None:
                self.anchor = kept.to(self.device)
        self._partition = self.partition.to(self.device)
        return self

    def describe(self) -> None:
        """Prints the partition: what chose it, and how many elements of each tensor are in which block and anchored."""
        self.partition.describe()

    # ------------------------------------------------------------------------------------------- losses, gradients

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Each copy's output on the same input, as a tuple.

        Where copies return a mapping with a "loss" (a dict, transformers' outputs), the result is of the same type: its
        "loss" is the sum of theirs, so that each copy gets the gradient that it would get alone, and all else is a
        tuple with each copy's. All graphs are in memory at once; `backward` holds one.
        """
        outputs = [net(*args, **kwargs) for net in self.copies]
        first, have = outputs[0], [isinstance(o, Mapping) and isinstance(o.get("loss"), Tensor) for o in outputs]
        if not any(have):
            return tuple(outputs)
        for number, (output, has) in enumerate(zip(outputs, have, strict=True), self.first):
            if not has or set(output) != set(first):
                names = ", ".join(map(str, output)) if isinstance(output, Mapping) else shown(output)
                raise ValueError(
                    f"outputs must have a loss, and the same names, in all copies, got {names} in copy {number}"
                )
        together = {name: tuple(output[name] for output in outputs) for name in first}
        return type(first)(**together | {"loss": torch.stack(together["loss"]).sum()})

    def loss(self, fn: Callable[..., Tensor], *batches: Any) -> Tensor:
        """Σ_j f(x_j).

        Args:
            fn: fn(net) or fn(net, batch), the loss of one copy.
            batches: none; one, on which all copies are evaluated (the paper's one ξ); or one for each copy.
        """
        losses = [_one(fn(net, *args)) for net, args in zip(self.copies, self._arguments(batches), strict=True)]
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
                leave idle, and all graphs are in memory at once. On the CPU, run as many passes at once as torch has threads,
                with a thread each (fewer copies share all threads evenly): the same bits as in turn with as many threads for
                each copy. fn and the hooks are called from several threads, in no order; what draws from torch's own
                generator there, as nn.Dropout does, gets other numbers each time. Where a dispatch or function mode
                (FlopCounterMode, a default device) or hooks of saved tensors (save_on_cpu) are on, which are a thread's
                own, the CPU runs the passes in turn.

        Returns:
            f(x_j) of each copy, detached and not scaled.

        Raises:
            What fn raises, from several threads once all have ended.
        """

        passes = zip(self.copies, self._arguments(batches), strict=True)
        if concurrent and self.device.type == "cpu":

            def one(net: nn.Module, args: tuple[Any, ...]) -> Tensor:
                value = _one(fn(net, *args))
                scale(value).backward()
                return value.detach()

            return tuple(side_by_side([partial(one, *of_copy) for of_copy in passes]))
        losses = []
        streams: list[Any] = [None] * len(self)
        main = None
        if concurrent and self.device.type == "cuda":
            main = torch.cuda.current_stream(self.device)
            while len(self._streams) < len(self) - 1:
                self._streams.append(torch.cuda.Stream(self.device))
            streams[1:] = self._streams
            for stream in self._streams:
                stream.wait_stream(main)  # before copy 0's work is queued: the others need not wait for it
        # Not by a function of their own, which torch.compile would take for a second frame beside fn's.
        for (net, args), stream in zip(passes, streams, strict=True):
            with torch.cuda.stream(stream):  # None changes nothing
                value = _one(fn(net, *args))
                scale(value).backward()
                losses.append(value.detach())
        if main is not None:
            for stream in self._streams:
                main.wait_stream(stream)
        return tuple(losses)

    # ---------------------------------------------------------------------------------------------------------- state

    def state_dict(self, *, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> dict[str, Any]:  # type: ignore[override]
        """As nn.Module.state_dict, tensors only: "copies.0.…" and so on (with a compute_dtype, of the float32 masters), "anchor"
        where it is not zero, and "_extra_state", int64 [2]: the partition's digest and the seed of hashed labels.

        With the optimizer's state_dict it is all that the next step reads. What is written to a master in place, rather
        than by `load_state_dict`, reaches the low-precision module at the next step.
        """
        self.masters.take(self._flat)
        state = super().state_dict(destination=destination, prefix=prefix, keep_vars=keep_vars)
        for key, place in self._low_entries(prefix).items():
            if key in state:
                state[key] = self.masters.read(*place)
        return state

    def get_extra_state(self) -> Tensor:
        """The partition's digest and the seed of its hashed labels."""
        seed = self.partition.seed
        return torch.cat(
            [self.partition.digest(), torch.zeros(1, dtype=torch.int64, device="cpu") if seed is None else seed.cpu()]
        )

    def set_extra_state(self, state: Tensor) -> None:
        """The inverse of `get_extra_state`; `_load_from_state_dict` has checked the digest."""
        _check_extra("state", state)
        if self.partition.seed is not None:
            self.partition.resample(int(state[1]))

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As nn.Module.load_state_dict, but nothing is changed where it raises, and `assign` changes nothing: the values are
        copied into the buffers. With a group, the state may be this process's or that of all copies.

        Raises:
            RuntimeError: names or shapes differ, or the partition that the state was saved with.
        """
        mine = self.state_dict()
        if self.processes:
            state_dict = self._own_part(state_dict)
        for name in [n for n in (*mine, *state_dict) if strict and (n not in mine or n not in state_dict)][:1]:
            where = "state_dict" if name in state_dict else "these Replicas"
            raise RuntimeError(f"{name!r} is in {where} only: another number of copies, another model or anchor")
        self._check_state(state_dict, "", mine)
        return super().load_state_dict(state_dict, strict)

    def _own_part(self, state_dict: Mapping[str, Any]) -> dict[str, Any]:
        """What of a state of all copies is this process's."""
        numbers = {name.split(".")[1] for name in state_dict if name.startswith("copies.")}
        if numbers not in ({str(self.first)}, set(map(str, range(self.count)))):
            raise RuntimeError(
                f"state_dict must hold copy {self.first}, or all of {self.count} copies, got {', '.join(sorted(numbers))}"
            )
        own = f"copies.{self.first}."
        return {k: v for k, v in state_dict.items() if k.startswith(own) or not k.startswith("copies.")}

    @torch.no_grad()
    def _load_from_state_dict(self, state_dict: Any, prefix: str, local_metadata: dict[str, Any], *args: Any) -> None:
        """Comes before the copies' own loading."""
        self._check_state(state_dict, prefix, self.state_dict(prefix=prefix))
        # The anchor is written where it is: the optimizer and captured graphs know it.
        super()._load_from_state_dict(state_dict, prefix, {**local_metadata, "assign_to_params_buffers": False}, *args)
        self._loaded = [
            (*place, state_dict[key]) for key, place in self._low_entries(prefix).items() if key in state_dict
        ]

    def _check_state(self, state_dict: Mapping[str, Any], prefix: str, mine: Mapping[str, Any]) -> None:
        """Raises where an entry of a state_dict does not fit."""
        for name, value in mine.items():
            if not isinstance(value, Tensor):  # a module's extra state
                continue
            entry = state_dict.get(name, value)
            if not isinstance(entry, Tensor) or entry.layout != torch.strided or entry.is_quantized:
                got = shown(entry) if not isinstance(entry, Tensor) else f"one of {entry.dtype}, {entry.layout}"
                raise RuntimeError(f"{name!r} must be a dense tensor in state_dict, got {got}")
            shapes = [tuple(of.shape) for of in (entry, value)]
            if shapes[0] != shapes[1]:
                raise RuntimeError(f"{name!r} has shape {shapes[0]} in state_dict, but here {shapes[1]}")
            if entry.is_complex() > value.is_complex() or entry.is_meta:
                raise RuntimeError(
                    f"{name!r} must be real and in memory, got {entry.dtype} on {entry.device} in state_dict"
                )
        extra = state_dict.get(prefix + "_extra_state")
        if extra is None:
            return
        _check_extra("'_extra_state'", extra)
        if int(extra[0]) != int(self.partition.digest()):
            raise RuntimeError(
                f"state_dict was saved with another partition than these Replicas' ({self.partition!r}): other labels, names, "
                "shapes or memory formats"
            )

    # -------------------------------------------------------------------------------------------------------- results

    def distance(self) -> float:
        """√Σ_{i<j} ‖x_i − x_j‖²; for two copies ‖θ − η‖. With a group all processes must ask."""
        self.settle()
        if self.processes:
            params = self.params[0].double()  # in which the mean of equal float32 copies is they
            own = (params - self.processes.mean(params)).square().sum()
            return float((self.processes.sum(own) * self.count) ** 0.5)
        params = self.params
        gaps = (params - params[0]).double()
        return float(torch.linalg.vector_norm(gaps - gaps.mean(0)) * len(self) ** 0.5)

    @torch.no_grad()
    def merge(self, loader: Iterable[Any] | None = None) -> nn.Module:
        """A new module with the copies' mean, floating-point and complex buffers and frozen parameters too. At L = 0 the
        copies are equal. With a group all processes must ask, and each gets it.

        The singular vectors of a spectral_norm, whose mean would be none, are found anew where the copies' differ, by power
        iterations from copy 0's.

        Args:
            loader: batches of inputs (or tuples that start with them) over which batch-norm statistics are estimated
                anew, by torch.optim.swa_utils.update_bn; the mean of two networks has statistics of its own.

        Raises:
            ValueError: a loader without a batch (an iterator at its end, say); a buffer or frozen parameter that not all
                copies have, or in other shapes; orthogonal parametrizations with other bases, which have no mean.
        """
        self.settle()
        trained = set(map(id, chain.from_iterable(self.trained)))
        found = merging.beside(self.copies, trained, self.processes)
        merged = copied(self.theta)
        mean = self.layout.views(self.mean(self.params))
        names = {id(p): name for name, p in self.theta.named_parameters()}  # pruning and the like rename parameters
        by_name = dict(merged.named_parameters())
        for parameter, view in zip((by_name[names[id(p)]] for p in self.trained[0]), mean, strict=True):
            parameter.data = view.clone()
        merging.take_means(merged, found, self.processes)
        if loader is not None:
            merging.estimate_statistics(merged, loader, self.device)
        return merged

    def mean(self, rows: Tensor) -> Tensor:
        """The mean over all copies of what is [m, …], a row for each of those here. With a group all processes must ask."""
        return self.processes.mean(rows[0]) if self.processes else rows.mean(0)

    def _arguments(self, batches: tuple[Any, ...]) -> list[tuple[Any, ...]]:
        if len(batches) not in (0, 1, len(self)):
            raise ValueError(
                f"batches must be none, one for all copies or one for each of {len(self)}, got {len(batches)}"
            )
        return [(batch,) for batch in batches] if len(batches) > 1 else [batches] * len(self)


def _one(loss: Any) -> Tensor:
    """What fn returned, if it is a loss."""
    if not isinstance(loss, Tensor):
        raise TypeError(f"fn must return a loss, a tensor of one element, got {shown(loss)}")
    if loss.numel() != 1:
        raise ValueError(f"fn must return a loss, a tensor of one element, got shape {tuple(loss.shape)}")
    return loss


def _in_place_of(model: nn.Module, copy: nn.Module, start: Any) -> nn.Module:
    """This process's copy: its own model, with the values drawn for it, or the module that was passed for it."""
    if copy is model or not isinstance(start, str):
        return copy
    model.load_state_dict(copy.state_dict())
    return model


def _identity(model, partition, like, compute_dtype, anchor, start, communicate) -> dict[str, Any]:
    """What must be the same in all processes."""
    from . import __version__

    return {
        "the version of hta_fused": __version__,
        "the version of torch": torch.__version__,
        "the model's class": type(model).__name__,
        **{f"parameter {name!r}": (tuple(p.shape), p.dtype, p.requires_grad) for name, p in model.named_parameters()},
        **{f"buffer {name!r}": (tuple(b.shape), b.dtype) for name, b in model.named_buffers()},
        "the parameters' dtype": like.dtype,
        "the partition": (partition.name, partition.blocks, int(partition.digest())),
        "the partition's seed": None if partition.seed is None else int(partition.seed),
        "compute_dtype": compute_dtype,
        "anchor": anchor if isinstance(anchor, str) else type(anchor).__name__,
        "start": start if isinstance(start, str) else type(start).__name__,
        "communicate": communicate,
    }


def _check_extra(name: str, state: Any) -> None:
    """Refuses what is no digest with a seed: floating-point numbers would be others, if whole at all."""
    if not isinstance(state, Tensor) or state.dtype != torch.int64 or state.shape != (2,):
        got = f"{state.dtype} {tuple(state.shape)}" if isinstance(state, Tensor) else shown(state)
        raise RuntimeError(f"{name} must be int64 of shape (2,), a partition's digest and seed, got {got}")


@torch.no_grad()
def _after_loading(replicas: Replicas, incompatible_keys: Any) -> None:
    for row, i, value in replicas._loaded:  # of which the copies' own loading has written no more than they can hold
        replicas.masters.write(row, i, value)
    replicas._loaded = []
    if not replicas._unchanged():
        replicas.rebind()  # assign=True replaces parameters
    replicas.written()
