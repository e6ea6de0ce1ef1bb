"""A number that all ranks agree on after each step, without a wait on the step's path."""

from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor
from torch import distributed as dist

from parallel.runtime import Runtime

DELAY = 2  # steps after which a maximum is read: by then it has long arrived


class DelayedMax:
    """The ranks' maximum of one integer per step, read DELAY steps later.

    Reduced on the ranks' device. On CUDA the host then waits for an event that is DELAY steps old,
    which also bounds how far it runs ahead.
    """

    def __init__(self, runtime: Runtime):
        self._alone, self._device = runtime.world_size == 1, runtime.device
        self._pending: deque[tuple[Callable[[], object], Tensor]] = deque()
        self._stream = torch.cuda.Stream() if runtime.device.type == "cuda" else None

    def push(self, value: int) -> int:
        """Return the maximum of the values of DELAY calls ago, 0 before; a collective call."""
        if self._alone:
            return value
        self._pending.append(self._start(value))
        return self._read() if len(self._pending) > DELAY else 0

    def settle(self, value: int) -> int:
        """Return the maximum over this and all calls that were not read yet; waits for the ranks.

        A collective call.
        """
        if self._alone:
            return value
        self._pending.append(self._start(value))
        return max(self._read() for _ in range(len(self._pending)))

    def _read(self) -> int:
        wait, number = self._pending.popleft()
        wait()
        return int(number.item())

    def _start(self, value: int) -> tuple[Callable[[], object], Tensor]:
        """Start a reduction; return what waits for its result, and the host's copy of it."""
        if self._stream is None:
            number = torch.tensor([value])
            work = dist.all_reduce(number, op=dist.ReduceOp.MAX, async_op=True)
            assert work is not None
            return work.wait, number
        # Behind the step's kernels, so that all ranks have the same order, and beside the next's.
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            number = torch.full((1,), value, dtype=torch.int64, device=self._device)
            work = dist.all_reduce(number, op=dist.ReduceOp.MAX, async_op=True)
            assert work is not None
            work.wait()  # of the stream, not of the host
            copy = torch.empty(1, dtype=torch.int64, pin_memory=True)
            copy.copy_(number, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        return event.synchronize, copy
