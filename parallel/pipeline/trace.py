"""A timeline of one pipeline step: the actions of each rank with start and end."""

import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import distributed as dist

from parallel.collectives import all_reduce
from parallel.pipeline.simulator import Action, Span

Mark = Any  # a moment: seconds on the CPU's clock, or an event in the GPU's stream


class Recording:
    """The spans of a step's actions on this rank; `gather` brings those of all ranks together.

    On a GPU events mark them, so that the host waits before the step and after it, never inside.
    """

    def __init__(self, schedule: str, group: dist.ProcessGroup, device: torch.device):
        self.schedule = schedule  # its name, or the file of an own one
        self._group, self._device = group, device
        self._marks: dict[Action, tuple[Mark, Mark]] = {}
        self._zero: Mark = None
        self._zero_seconds = 0.0

    def start(self) -> None:
        """Call right before the step; the ranks meet here, which makes a common zero."""
        all_reduce(torch.zeros(1, device=self._device), self._group)
        self._synchronize()
        self._zero = self._record_event()
        self._zero_seconds = time.perf_counter()

    @contextmanager
    def record_span(self, action: Action) -> Iterator[None]:
        """Around what an action computes; what comes in a second piece prolongs it."""
        start, _ = self._marks.get(action) or (self._record_event(), None)
        yield
        self._marks[action] = start, self._record_event()

    def gather_spans(self) -> list[Span]:
        """Return the spans of all ranks, from the first start on, in seconds.

        Empty on all ranks but the first.

        All ranks of the pipeline must call it.
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
        """From the zero to a mark."""
        if self._device.type != "cuda":
            return mark - self._zero
        return self._zero.elapsed_time(mark) / 1e3

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def merge_ranks(ranks: list[tuple[str, float, list[Span]]]) -> list[Span]:
    """Return all ranks' spans on one clock.

    Of each rank its host, its zero there, and spans from it.

    Processes of one host share its clock, which is better than a zero: they leave the meeting that
    makes it one after the other, where cores are few by milliseconds.
    """
    shared = len({host for host, _, _ in ranks}) == 1
    spans = []
    for _, zero, own in ranks:
        late = zero if shared else 0.0
        spans += [span._replace(start=span.start + late, end=span.end + late) for span in own]
    first = min(span.start for span in spans)
    return [span._replace(start=span.start - first, end=span.end - first) for span in spans]
