"""Compressed gradient all-reduce with error feedback: the error is added in the next step."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.futures import Future


def learned_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the parameters that have gradients, with their names."""
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)


class CompressedAllReduce:
    """A gradient all-reduce over replicas with two collectives per bucket.

    The state is stored per parameter, not per bucket: DDP assigns buckets differently in the first
    step of a process, and a resumed run must compute the same sums as an uninterrupted one.
    """

    def __init__(self, model: nn.Module, group: dist.ProcessGroup):
        self.group = group
        self._names: dict[Tensor, str] = {p: name for name, p in learned_parameters(model)}
        self._begun: list[tuple[Iterator[None], Future[Tensor], Tensor]] = []

    def sum_over_ranks(self, gradients: Mapping[str, Tensor]) -> Iterator[None]:
        """Replace a bucket's gradients, by name, by their sums, in place.

        A generator that yields once after starting each of its two collectives.
        """
        raise NotImplementedError

    def end_step(self) -> None:
        """Finish a step; called after all of its buckets are summed."""

    def error_feedback_state(self) -> dict[str, Tensor]:
        """Return this rank's state tensors by name, not copies; a checkpoint loads in place."""
        raise NotImplementedError

    def start_bucket(self, bucket: dist.GradBucket) -> Future[Tensor]:
        """Start the first collective of a bucket."""
        names = (self._names[parameter] for parameter in bucket.parameters())
        steps = self.sum_over_ranks(dict(zip(names, bucket.gradients(), strict=True)))
        next(steps)
        buffer = bucket.buffer()
        future: Future[Tensor] = Future(devices=[buffer.device] if buffer.is_cuda else None)
        self._begun.append((steps, future, buffer))
        return future

    def finish_buckets(self) -> None:
        """Complete all buckets, in the order in which they were started."""
        for steps, _, _ in self._begun:
            next(steps)
        for steps, future, buffer in self._begun:
            next(steps, None)
            future.set_result(buffer)
        self._begun.clear()
        self.end_step()


def compressed_allreduce_hook(
    exchange: CompressedAllReduce, bucket: dist.GradBucket
) -> Future[Tensor]:
    """Start a bucket in DDP's communication hook; the last bucket completes all of them.

    The first collectives overlap with the backward. The second ones start after it, so that all
    ranks issue them in the same order: a callback would start a bucket's second collective when its
    first completes, which may be before the next bucket's first on one rank and after it on
    another.
    """
    future = exchange.start_bucket(bucket)
    if bucket.is_last():
        exchange.finish_buckets()
    return future


def drop_nonfinite(lost: Tensor) -> Tensor:
    """Return the compression error with non-finite values set to 0: their step is skipped."""
    return torch.nan_to_num(lost, nan=0.0, posinf=0.0, neginf=0.0)
