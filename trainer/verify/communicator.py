"""A communicator of the NCCL-like backend: a queue of calls that one thread runs in order."""

import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

LABEL_BYTES = 400  # of a call's label, which is exchanged first
# Modules that are left out of where a call was issued.
HIDDEN = (
    "torch.",
    "typing_extensions",
    *(f"trainer.verify.{n}" for n in ("communicator", "nccl_like", "host_tensors")),
)
Tensors = Sequence[Tensor]


class NcclLikeError(RuntimeError):
    """A call that NCCL would refuse, hang in, or give a wrong result of."""


@dataclass
class Call:
    """A call of a collective, or of one send or receive.

    `label` must be the same on all ranks that take part. `peer` is -1 for a collective; `result`
    makes the outputs from the ranks' payloads.
    """

    label: str
    inputs: Tensors
    outputs: Tensors
    result: Callable[[list[Tensor]], Tensors] = lambda payloads: []
    peer: int = -1
    receives: bool = False
    payload: Tensor = field(init=False)
    place: str = field(init=False)

    def __post_init__(self) -> None:
        self.payload, self.place = to_bytes(self.inputs), place_of_caller()

    def __str__(self) -> str:
        return f"{self.label} at {self.place}"


class QueuedWork(dist.Work):
    """Calls that were issued together; their outputs are poisoned until they are waited for."""

    def __init__(self, calls: list[Call]):
        super().__init__()
        self.calls, self.error = calls, ""
        self.waited = False
        self._results: list[Tensors] = []
        self._done, self._lock = threading.Event(), threading.Lock()
        self._future: Any = None
        for output in (tensor for call in calls for tensor in call.outputs):
            _poison(output)

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Wait until the calls are done, and write their outputs."""
        self.waited = True
        self._done.wait()
        if self.error:
            raise NcclLikeError(self.error)
        self._deliver()
        return True

    def is_completed(self) -> bool:
        """Return whether the calls are done."""
        return self._done.is_set()

    def get_future(self) -> Any:
        """Return a future of the outputs, which writes them as soon as the calls are done."""
        with self._lock:
            self.waited = True
            if self._future is None:
                self._future = torch.futures.Future()
                if self._done.is_set():
                    self._resolve()
        return self._future

    def finish(self, results: list[Tensors], error: str = "") -> None:
        """Set the results, or the error, of the calls."""
        with self._lock:
            self._results, self.error = results, error
            self._done.set()
            if self._future is not None:
                self._resolve()

    def _resolve(self) -> None:
        try:
            if self.error:
                raise NcclLikeError(self.error)
            self._deliver()
        except NcclLikeError as error:
            self._future.set_exception(error)
        else:
            self._future.set_result([t for call in self.calls for t in call.outputs])

    def _deliver(self) -> None:
        results, self._results = self._results, []
        for call, made in zip(self.calls, results, strict=False):
            written = {output.untyped_storage()._cdata for output in call.outputs}
            alone = [x for x in call.inputs if x.untyped_storage()._cdata not in written]
            if len(alone) == len(call.inputs) and not torch.equal(to_bytes(alone), call.payload):
                raise NcclLikeError(f"the input of {call} changed before the call was waited for")
            for output, value in zip(call.outputs, made, strict=True):
                output.data.copy_(value.view(output.shape))


class Communicator:
    """The ranks of a group, one queue, and the connections, which the first call opens.

    `ranks` are global ranks. An error ends the communicator: all later calls fail with it.
    """

    def __init__(
        self, name: str, store: dist.Store, rank: int, ranks: list[int], timeout: timedelta
    ):
        self.name = f"{name} (ranks {', '.join(map(str, ranks))})"
        self._store, self._rank, self._ranks, self._timeout = store, rank, ranks, timeout
        self._queue: SimpleQueue[QueuedWork | None] = SimpleQueue()
        self._gloo: Any = None
        self._thread: threading.Thread | None = None
        self._error = ""
        self._calls = 0
        self.works: list[QueuedWork] = []  # not waited for so far

    def submit(self, calls: list[Call]) -> QueuedWork:
        """Queue calls that run together; the first ones wait until all ranks have come."""
        if self._thread is None:
            self._open(calls[0])
        work = QueuedWork(calls)
        self.works = [w for w in self.works if not w.waited] + [work]
        self._queue.put(work)
        return work

    def close(self) -> None:
        """End the thread, once the queue is empty."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join(self._timeout.total_seconds())

    def _open(self, call: Call) -> None:
        self._store.set(f"came{self._rank}", "")
        deadline = time.monotonic() + self._timeout.total_seconds()
        missing = list(range(len(self._ranks)))
        while missing := [rank for rank in missing if not self._store.check([f"came{rank}"])]:
            if time.monotonic() > deadline:
                late = ", ".join(str(self._ranks[rank]) for rank in missing)
                raise NcclLikeError(
                    f"communicator {self.name}: the first call, {call}, waits for all ranks, but "
                    f"ranks {late} made none within {self._timeout.total_seconds():g} s"
                )
            time.sleep(0.001)
        size = len(self._ranks)
        self._gloo = dist.ProcessGroupGloo(self._store, self._rank, size, timeout=self._timeout)
        self._thread = threading.Thread(target=self._run_queue, daemon=True, name=self.name)
        self._thread.start()

    def _run_queue(self) -> None:
        while (work := self._queue.get()) is not None:
            if not self._error:
                try:
                    work.finish(self._run_calls(work.calls))
                    self._calls += 1
                    continue
                except (RuntimeError, ValueError) as error:
                    self._error = self._describe(work.calls, error)
            work.finish([], self._error)

    def _describe(self, calls: list[Call], error: Exception) -> str:
        where = f"communicator {self.name}, call {self._calls}, rank {self._ranks[self._rank]}"
        issued = "; ".join(map(str, calls))
        if isinstance(error, NcclLikeError):
            return f"{where}: {issued}: {error}"
        reason = str(error).splitlines()[0]
        if "imed out" in reason:
            reason = f"no match within {self._timeout.total_seconds():g} s"
        elif "onnection" in reason:
            reason = "no match, and its other side has left or failed"
        return f"{where}: {issued}: {reason}; {self._queue.qsize()} calls wait behind it"

    def _run_calls(self, calls: list[Call]) -> list[Tensors]:
        if calls[0].peer >= 0:
            self._transfer(calls)
            return [call.result([call.payload]) for call in calls]
        (call,) = calls
        header = _header(call)
        headers = [torch.empty_like(header) for _ in self._ranks]
        self._gloo.allgather([headers], [header]).wait()
        sizes = [self._check_label(call, theirs, rank) for rank, theirs in enumerate(headers)]
        if not any(sizes):
            return [call.result([call.payload] * len(sizes))]
        own = torch.zeros(max(sizes), dtype=torch.uint8)
        own[: call.payload.numel()] = call.payload
        padded = [torch.empty_like(own) for _ in sizes]
        self._gloo.allgather([padded], [own]).wait()
        return [call.result([p[:size] for p, size in zip(padded, sizes, strict=True)])]

    def _check_label(self, call: Call, header: Tensor, rank: int) -> int:
        """Return the size of a rank's payload; raises if its call is another one."""
        theirs = bytes(header[8:].tolist()).rstrip(b"\0").decode(errors="ignore")
        if theirs != bytes(_header(call)[8:].tolist()).rstrip(b"\0").decode(errors="ignore"):
            raise NcclLikeError(f"rank {self._ranks[rank]} issued {theirs} in its place")
        return int(header[:8].view(torch.int64))

    def _transfer(self, calls: list[Call]) -> None:
        """Run sends and receives together; each waits for its other side, as with NCCL."""
        works, theirs = [], []
        for call in calls:
            mine, other = (1, 0) if call.receives else (0, 1)
            theirs.append(torch.empty_like(_header(call)))
            works.append(self._gloo.recv([theirs[-1]], call.peer, other))
            works.append(self._gloo.send([_header(call)], call.peer, mine))
        for work in works:
            work.wait()
        works = []
        for call, header in zip(calls, theirs, strict=True):
            self._check_label(call, header, call.peer)
            if call.payload.numel():
                move = self._gloo.recv if call.receives else self._gloo.send
                works.append(move([call.payload], call.peer, 2))
        for work in works:
            work.wait()


def _header(call: Call) -> Tensor:
    """Return the size of the payload and the label, as bytes."""
    text = call.label.encode()[:LABEL_BYTES].ljust(LABEL_BYTES, b"\0")
    label = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    return torch.cat([torch.tensor([call.payload.numel()]).view(torch.uint8), label])


def to_bytes(tensors: Tensors) -> Tensor:
    """Return a copy of the tensors' bytes, one after the other."""
    flat = [x.detach().reshape(-1).view(torch.uint8) for x in tensors if x.numel()]
    return torch.cat(flat) if flat else torch.empty(0, dtype=torch.uint8)


def from_bytes(payload: Tensor, likes: Tensors) -> list[Tensor]:
    """Return the tensors of a payload, in the dtypes and shapes of `likes`."""
    if not likes:
        return []
    parts = payload.split([like.numel() * like.element_size() for like in likes])
    return [
        part.clone().view(like.dtype).view(like.shape)
        for part, like in zip(parts, likes, strict=True)
    ]


def _poison(output: Tensor) -> None:
    """Fill with NaN, or with the least value of an integer."""
    if output.is_floating_point():
        output.data.fill_(torch.nan)
    else:
        output.data.fill_(True if output.dtype == torch.bool else torch.iinfo(output.dtype).min)


def place_of_caller() -> str:
    """Return the first line outside torch and this backend that led here."""
    frame: Any = sys._getframe(2)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if not module.startswith(HIDDEN):
            code = frame.f_code
            return f"{module}.{code.co_qualname}:{frame.f_lineno}"
        frame = frame.f_back
    return "unknown"
