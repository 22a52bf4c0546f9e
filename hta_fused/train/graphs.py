"""A training step as one CUDA graph: warmed up, captured, replayed, its learning rate planned. Imports torch only."""

from collections.abc import Callable

import torch
from torch import Tensor

Step = Callable[[], None]
WARM_UP = 3  # uncaptured steps, while libraries set themselves up


class Graphed:
    """Calls a step, from the fourth time on by replaying a CUDA graph of it.

    The step must wait for nothing, read what changes from one time to the next from tensors that stay where they are,
    and make what it needs anew each time. Warming up is done with real steps; capturing runs none.

    Args:
        device: the GPU.
        on_failure: told why, where the step cannot be captured; it then goes on being called uncaptured.
    """

    def __init__(self, device: torch.device, on_failure: Callable[[str], None]):
        self.stream = torch.cuda.Stream(device)
        self.on_failure = on_failure
        self.graph: torch.cuda.CUDAGraph | None = None
        self.calls = 0
        self.failed = False

    def __call__(self, step: Step) -> None:
        """Does `step`, which must be the same at every call."""
        self.calls += 1
        if self.calls > WARM_UP and self.graph is None and not self.failed:
            self._capture(step)
        if self.graph is not None:
            self.graph.replay()
        else:
            self.uncaptured(step)

    def uncaptured(self, step: Step) -> None:
        """Does any step without a graph, on a stream that is not the default one, as a capture is."""
        self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        with torch.cuda.stream(self.stream):
            step()
        torch.cuda.current_stream(self.stream.device).wait_stream(self.stream)

    def _capture(self, step: Step) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                step()
            self.graph = graph
        except Exception as error:  # whatever torch or a kernel finds that cannot be captured
            self.failed = True
            torch.cuda.synchronize()
            self.on_failure(f"no CUDA graph, going on without one: {error}")


class Plan:
    """What each step of an epoch finds in a tensor, sent to the device ahead: a graph cannot ask the host.

    Args:
        target: the tensor, flat, at an address that stays.
        steps: of an epoch.
    """

    def __init__(self, target: Tensor, steps: int):
        self.target = target
        self.rows = target.new_zeros(steps, len(target))
        self.position = torch.zeros(1, dtype=torch.int64, device=target.device)

    def begin(self, rows: Tensor, start: int) -> None:
        """Plans [steps, len(target)] `rows`, of which number `start` is the next."""
        self.rows.copy_(rows)
        self.position.fill_(start)

    def advance(self) -> None:
        """Puts the next row in the target; can be captured."""
        self.target.copy_(self.rows.index_select(0, self.position)[0])
        self.position += 1
