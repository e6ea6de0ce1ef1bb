"""A timeline of one pipeline step: start and end of each rank's actions."""

import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import distributed as dist

from parallel.collectives import all_reduce
from parallel.pipeline.simulator import Action, Span

Mark = Any  # a point in time: seconds of the CPU's clock, or a CUDA event


class Recording:
    """The spans of a step's actions on this rank; `gather_spans` collects those of all ranks.

    On a GPU they are CUDA events, so that the host synchronises before and after the step only.
    """

    def __init__(self, schedule: str, group: dist.ProcessGroup, device: torch.device):
        self.schedule = schedule  # name, or path of a custom schedule
        self._group, self._device = group, device
        self._marks: dict[Action, tuple[Mark, Mark]] = {}
        self._zero: Mark = None
        self._zero_seconds = 0.0

    def start(self) -> None:
        """Synchronise the ranks to set a common zero; call it right before the step."""
        all_reduce(torch.zeros(1, device=self._device), self._group)
        self._synchronize()
        self._zero = self._record_event()
        self._zero_seconds = time.perf_counter()

    @contextmanager
    def record_span(self, action: Action) -> Iterator[None]:
        """Record the span of an action; a second call for the same action extends it."""
        start, _ = self._marks.get(action) or (self._record_event(), None)
        yield
        self._marks[action] = start, self._record_event()

    def gather_spans(self) -> list[Span]:
        """Gather all ranks' spans, in seconds from the first start; empty on ranks other than 0.

        A collective call over the ranks of the pipeline.
        """
        self._synchronize()
        own = [
            Span(
                self._group.rank(),
                a.stage,
                a.kind,
                a.micro_batch,
                *map(self._seconds_since_start, marks),
            )
            for a, marks in self._marks.items()
        ]
        first = self._group.rank() == 0
        theirs: list[Any] = [None] * self._group.size()
        dist.gather_object(
            (platform.node(), self._zero_seconds, own),
            theirs if first else None,
            group=self._group,
            group_dst=0,
        )
        return merge_ranks(theirs) if first else []

    def _record_event(self) -> Mark:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _seconds_since_start(self, mark: Mark) -> float:
        """Return the seconds from the common zero to a mark."""
        if self._device.type != "cuda":
            return mark - self._zero
        return self._zero.elapsed_time(mark) / 1e3

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def merge_ranks(ranks: list[tuple[str, float, list[Span]]]) -> list[Span]:
    """Merge (host, zero, spans from zero) of all ranks into spans on one clock.

    Processes on one host use its shared clock, which is more accurate than the synchronised zero:
    with few cores they leave the synchronisation milliseconds apart.
    """
    shared = len({host for host, _, _ in ranks}) == 1
    spans = []
    for _, zero, own in ranks:
        late = zero if shared else 0.0
        spans += [span._replace(start=span.start + late, end=span.end + late) for span in own]
    first = min(span.start for span in spans)
    return [span._replace(start=span.start - first, end=span.end - first) for span in spans]
