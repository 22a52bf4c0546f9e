"""One copy for each process: what a group of processes sums, broadcasts and agrees on, and the step cut at its sum.

Everything goes through torch.distributed: gloo for CPU tensors, NCCL for CUDA ones, or whatever the group has. Imports
checks.py, ops.py and the kernels.
"""

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .checks import shown
from .kernels import kernels
from .kernels.reference import MAX_COPIES, NUMBERS, PROPOSE, RULE, SHARE, TILE, rules_of_copy
from .ops import step_buffers

if torch.distributed.is_available():
    # The first optimizer imports it with the compiler. Once a group is there, its functions hold that as a default for
    # good: it would outlive destroy_process_group(), and gloo's threads, at the interpreter's end, abort the process.
    import torch.distributed.nn.functional

PIECE = 2048 * TILE  # elements that are sent at once: 8 MiB of float32
WIRE = ("float32", "bfloat16")


class Processes:
    """The processes that hold one copy each; this one's `rank` is its copy's number, of `size`.

    Args:
        group: a torch.distributed process group, or a DeviceMesh of one dimension.
        communicate: one of `WIRE`. "float32" sends the proposals' sum in the parameters' dtype, "bfloat16" in half of float32's bytes: the
            first sum as it is, then what differs from the last one, so that small changes keep their digits.

    Raises:
        RuntimeError: torch.distributed is not there, or not initialised.
        TypeError, ValueError: another group, or more processes than copies there may be.
    """

    def __init__(self, group: Any, communicate: str = "float32"):
        if not torch.distributed.is_available() or not torch.distributed.is_initialized():
            raise RuntimeError("group needs torch.distributed: call init_process_group() first")
        from torch.distributed.device_mesh import DeviceMesh

        if isinstance(group, DeviceMesh):
            if group.ndim != 1:
                raise ValueError(f"group must be a DeviceMesh of one dimension, got {group.ndim}: mesh['copy'], say")
            group = group.get_group()
        if group is torch.distributed.GroupMember.NON_GROUP_MEMBER:
            raise ValueError("group must be one that this process is in, got one that it is not in")
        if not isinstance(group, torch.distributed.ProcessGroup):
            raise TypeError(f"group must be a process group or a DeviceMesh, got {shown(group)}")
        self._group = weakref.ref(group)  # so that destroy_process_group() ends it, and gloo's threads
        self.communicate = communicate
        self.rank, self.size = group.rank(), group.size()
        if self.size > MAX_COPIES:
            raise ValueError(f"group must have at most {MAX_COPIES} processes, got {self.size}")

    @property
    def group(self) -> Any:
        """The process group, which torch.distributed holds until it is destroyed."""
        group = self._group()
        if group is None:
            raise RuntimeError("group must be alive, but destroy_process_group() has ended it")
        return group

    def __deepcopy__(self, memo: dict[int, Any]) -> "Processes":
        return self

    def __reduce__(self) -> Any:
        raise TypeError("Replicas of a process group cannot be pickled, as the group cannot; save their state_dict()")

    def pieces(self, numel: int, whole: bool) -> list[slice]:
        """Runs of whole tiles, to be sent one after the other."""
        step = max(1, numel) if whole else PIECE
        return [slice(start, min(start + step, numel)) for start in range(0, numel, step)]

    def halves(self, tensor: Tensor) -> bool:
        """Whether sums of such tensors are sent in bfloat16."""
        return self.communicate == "bfloat16" and tensor.dtype == torch.float32

    def add_up(self, tensor: Tensor) -> "Sending":
        """Begins to replace a tensor by its sum over all processes; `wait()` for it."""
        return Sending(self, tensor, tensor)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, a new tensor."""
        total = tensor.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total, group=self.group)
        return total

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean over all processes, a new tensor; for two the bits of torch.mean over both."""
        return self.sum(tensor) / self.size

    def largest_(self, tensor: Tensor) -> Tensor:
        """Replaces each element by its largest over all processes."""
        torch.distributed.all_reduce(tensor, torch.distributed.ReduceOp.MAX, group=self.group)
        return tensor

    def gather(self, tensor: Tensor) -> Tensor:
        """[size, …]: every process's, by rank."""
        rows = tensor.new_empty(self.size, *tensor.shape)
        torch.distributed.all_gather(list(rows), tensor.contiguous(), group=self.group)
        return rows

    def broadcast_(self, tensor: Tensor) -> None:
        """Replaces a tensor by copy 0's."""
        whole = tensor.detach().contiguous()
        torch.distributed.broadcast(whole, group=self.group, group_src=0)
        tensor.detach().copy_(whole)

    def agree(self, what: Mapping[str, Any]) -> None:
        """Compares what must be the same in all processes.

        Raises:
            ValueError: in every process, naming what differs, from which rank on, and how.
        """
        everyones: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(everyones, dict(what), group=self.group)
        for rank, theirs in enumerate(everyones):
            for name in (*everyones[0], *theirs):
                first, other = everyones[0].get(name), theirs.get(name)
                if first != other:
                    raise ValueError(
                        f"{name} must be the same in all processes, got {first} on rank 0, {other} on rank {rank}"
                    )


class Sending:
    """A sum on its way."""

    def __init__(self, processes: Processes, sent: Tensor, total: Tensor):
        self._sent, self._total = sent, total
        self._work = torch.distributed.all_reduce(sent, group=processes.group, async_op=True)

    def wait(self) -> Tensor:
        """The sum, once it is there (on a GPU: once the current stream will find it there)."""
        self._work.wait()
        return self._total


class SendingChange(Sending):
    """A sum on its way as its change in bfloat16, which is added to what the sum was last: an error of one is in the next.

    Args:
        tensor: this process's part of the sum.
        last: the sum as all processes had it last, which becomes the new one.
        keep: one element, 1, or 0 where the step is skipped and the sum stays.
    """

    def __init__(self, processes: Processes, tensor: Tensor, last: Tensor, keep: Tensor):
        change = torch.sub(tensor, last, alpha=1 / processes.size).to(torch.bfloat16)
        super().__init__(processes, change, last)
        self._keep = keep

    def wait(self) -> Tensor:
        return super().wait().addcmul_(self._sent, self._keep)


class StepAcross:
    """A coupled step whose copies lie one in each process: propose, add up over the processes, share."""

    def __init__(self, processes: Processes):
        self.processes = processes
        self._sums: Tensor | None = None
        self._known: Tensor | None = None  # the last sum, where changes are sent
        self._groups: tuple[Tensor, int, Tensor] | None = None  # codes, their version, and these without labels

    def take(self, rules: Tensor, explicit: bool) -> None:
        """Takes the rules of all copies, [groups, width] on the CPU, as csrc/args.h has them.

        Raises:
            ValueError: an explicit coupling that differs between groups.
        """
        m = self.processes.size
        rule = rules[:, NUMBERS:].view(len(rules), m + 1, m + 1, RULE)
        self.meets = bool((rule[..., 2] != 0).any())  # some copy, or the centre, has a share in the sum
        self.explicit = explicit
        if explicit and self.meets and (rule != rule[:1]).any():
            raise ValueError("an explicit coupling across processes must be the same in all param_groups, got several")
        self._all = rules
        self._own = rules_of_copy(rules, m, self.processes.rank)
        own = self._own[:, NUMBERS:].view(len(rules), m + 1, 2, RULE)
        # Where the label makes no difference, the kernels for one copy alone serve, which are faster.
        self._alike = bool((own == own[:, :1]).all())
        if self._alike:
            self._own = torch.cat([self._own[:, :NUMBERS], own[:, :2].flatten(1)], 1)
        # An explicit coupling gathers all copies; its gradient, sign and all, then joins the loss's before the step, which
        # is that of a copy by itself.
        self._gathers = explicit and self.meets
        if self._gathers:
            self._own[:, 0] = 1.0
            self._own[:, NUMBERS:].view(len(rules), -1, RULE)[..., :4] = torch.tensor([0.0, 1.0, 0.0, 0.0])
        self._there: Tensor | None = None  # on the copy's device

    @property
    def knows_sum(self) -> bool:
        """Whether the next sum is sent as its change, which all processes must do."""
        return self._known is not None

    def __call__(
        self, params: Tensor, grads: Tensor, states: Sequence[Tensor], low: Tensor | None, anchor: Tensor | None,
        moves_anchor: bool, codes: Tensor, labels: Tensor | None, seed: Tensor | None, grad_scale: Tensor | None,
        found_inf: Tensor | None, skip_nonfinite: bool, stats: Tensor, kernel: int,
    ) -> None:  # fmt: skip
        """The step of this process's copy, [N] buffers; the other arguments are the step op's. `stats`: of this copy, with no
        distances between copies. Where copies meet, found_inf says whether all skip."""
        gathers, labels_matter = self._gathers, not self._alike
        patterns = (codes, labels, seed) if labels_matter else (self._groups_of(codes), None, None)
        given, low_rows, centre_sum = grads, low, None
        if gathers:
            given, centre_sum = self._explicit_grads(
                params, grads, anchor, moves_anchor, codes, labels, seed, grad_scale
            )
            grad_scale, low_rows = None, None  # a gradient in the copies' own precision has none in a lower one
        if self._there is None or self._there.device != params.device:
            self._there = self._own.to(params.device)
        rules = self._there

        def run(part: slice, phase: int, stats: Tensor, sums: Tensor | None) -> None:
            proposes, shares = phase & PROPOSE, phase & SHARE
            tiles = slice(part.start // TILE, -(-part.stop // TILE))
            step_buffers(
                [], [params[part]], [given[part]] if proposes else [], [s[part] for s in states] if proposes else [],
                [] if low_rows is None else [low_rows[part]], None if anchor is None else anchor[part],
                anchor[part] if anchor is not None and moves_anchor and shares and not gathers else None, sums,
                patterns[0][tiles], *patterns[1:], rules, grad_scale, found_inf, stats, kernel,
                self.explicit and not gathers, skip_nonfinite, phase,
            )  # fmt: skip

        if not self.meets or gathers:
            run(slice(0, len(params)), PROPOSE | SHARE, stats, None)
        else:
            self._in_pieces(params, seed if labels_matter else None, found_inf, stats, run)
        if gathers and low is not None:
            low.copy_(params)
        if gathers and moves_anchor and anchor is not None and centre_sum is not None and found_inf is not None:
            _, keep, share, pull, _ = self._all[0, NUMBERS:].view(self.processes.size + 1, -1, RULE)[0, -1].tolist()
            moved = keep * anchor + share * centre_sum + pull * anchor
            anchor.copy_(torch.where(found_inf.reshape(()) != 0, anchor, moved))

    def _groups_of(self, codes: Tensor) -> Tensor:
        """The tiles' codes without their labels."""
        known = self._groups
        if known is None or known[0] is not codes or known[1] != codes._version:
            known = self._groups = codes, codes._version, codes * codes.new_tensor([1, 0])
        return known[2]

    def _in_pieces(
        self, params: Tensor, seed: Tensor | None, found_inf: Tensor | None, stats: Tensor, run: Any
    ) -> None:
        """The first piece is on its way while others are proposed, and shared while others are on theirs."""
        if self._sums is None or self._sums.dtype != params.dtype or self._sums.device != params.device:
            self._sums, self._known = torch.zeros_like(params), None
        known = self._known
        pieces = self.processes.pieces(len(params), seed is not None)  # a hash of an element's number knows no pieces
        sending: list[Sending] = []
        if known is not None:
            keep = params.new_ones(1) if found_inf is None else (found_inf.reshape(1) == 0).to(params)
        ignored = torch.zeros_like(stats)
        for part in pieces:
            mine = self._sums[part]
            run(part, PROPOSE, ignored, mine)
            if known is None:
                sending.append(self.processes.add_up(mine))
            else:
                sending.append(SendingChange(self.processes, mine, known[part], keep))
        # The few torch calls that are left out for a single piece cost more than its share: their code is cold.
        of_pieces = stats.new_zeros(len(pieces), 4) if len(pieces) > 1 else [stats]
        for part, sent, of_piece in zip(pieces, sending, of_pieces, strict=True):
            run(part, SHARE, of_piece, sent.wait())
        if isinstance(of_pieces, Tensor):
            skipped = of_pieces[0, 3]
            stats[:2] = torch.where(skipped > 0, stats[:2], of_pieces[:, :2].sum(0))
            stats[2:] = torch.stack([of_pieces[:, 2].amax(), stats[3] + skipped])
        first = known is None and self.processes.halves(params)
        if first and (found_inf is None or not found_inf.item()):  # a skipped step leaves no sum to begin from
            self._known = self._sums.clone()

    def _explicit_grads(
        self, params: Tensor, grads: Tensor, anchor: Tensor | None, moves_anchor: bool, codes: Tensor, labels: Tensor | None,
        seed: Tensor | None, grad_scale: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """This copy's gradient with the quadratic terms' in it, from all copies as they are; and Σ read_i·x_i."""
        m, rank = self.processes.size, self.processes.rank
        sign = self._all[:, 0].to(params)[codes[:, 0].long()].repeat_interleave(TILE)[: len(params)]
        scale = sign if grad_scale is None else (1.0 / grad_scale.double()).to(params) * sign
        total, sums = grads.to(params.dtype) * scale, torch.empty_like(params) if moves_anchor else None
        labels_only = codes * codes.new_tensor([0, 1])
        rules = self._all[:1].to(params.device)
        for part in self.processes.pieces(len(params), seed is not None):
            copies = self.processes.gather(params[part])
            rows = torch.zeros_like(copies)
            rows[rank] = total[part]
            tiles = slice(part.start // TILE, -(-part.stop // TILE))
            kernels(copies).penalty_accumulate_(
                [rows], [copies], None if anchor is None else anchor[part], labels_only[tiles], labels, seed, rules
            )
            total[part] = rows[rank]
            if sums is not None:
                reads = self._all[0, NUMBERS:].view(m + 1, -1, RULE)[0, :m, 0].tolist()
                sums[part] = sum(read * copy for read, copy in zip(reads, copies, strict=True))
        return total, sums
