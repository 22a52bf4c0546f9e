"""What coupled copies are compared with, the ordinary PyTorch way: data-parallel SGD, and DiLoCo's outer step.

Local SGD is the coupling Average. Knows nothing of networks, batches and runs: the benchmark takes it from here too.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

OUTER_LR, OUTER_MOMENTUM = 0.7, 0.9  # DiLoCo's own


def data_parallel(model: nn.Module, group: Any) -> DistributedDataParallel:
    """The model, whose gradients are averaged over the group's processes in each backward pass."""
    return DistributedDataParallel(model, process_group=group, gradient_as_bucket_view=True)


class OuterSGD:
    """DiLoCo's outer step (Douillard et al. 2023): at the end of each period, what the copies' mean has moved since they last
    met is the gradient of SGD with Nesterov momentum, and all copies go on from the point that this leads to.

    Args:
        copies: those here, each as a list of tensors, which are overwritten; equal when the training begins.
        every: steps of a period.
        lr, momentum: of the outer SGD.
        group: the processes that hold the copies, one each; None where all are here.
    """

    def __init__(
        self,
        copies: Sequence[Sequence[Tensor]],
        every: int,
        lr: float = OUTER_LR,
        momentum: float = OUTER_MOMENTUM,
        group: Any = None,
    ):
        self.copies, self.every, self.group, self.steps = copies, every, group, 0
        self.count = len(copies) if group is None else group.size()
        self.point = [p.detach().clone().requires_grad_() for p in copies[0]]  # where the copies last met
        self.optimizer = torch.optim.SGD(self.point, lr, momentum, nesterov=momentum > 0, fused=True)

    @torch.no_grad()
    def step(self) -> bool:
        """To be called after each step of the copies. Whether they have met."""
        self.steps += 1
        if self.steps % self.every:
            return False
        here = zip(self.point, *self.copies, strict=True)
        moved = torch.cat([sum((p - x for x in of_each), torch.zeros_like(p)).reshape(-1) for p, *of_each in here])
        if self.group is not None:
            dist.all_reduce(moved, group=self.group)
        moved /= self.count
        for p, gradient in zip(self.point, moved.split([p.numel() for p in self.point]), strict=True):
            p.grad = gradient.view_as(p)
        self.optimizer.step()
        for copy in self.copies:
            torch._foreach_copy_(list(copy), self.point)
        return True

    def state_dict(self) -> dict[str, Any]:
        """The same in all processes."""
        points = dict(enumerate(p.detach() for p in self.point))
        return {"steps": self.steps, "point": points, "optimizer": self.optimizer.state_dict()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        for i, p in enumerate(self.point):
            p.copy_(state["point"][i])
        self.optimizer.load_state_dict(state["optimizer"])
        self.steps = state["steps"]
