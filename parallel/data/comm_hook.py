"""Compressed gradient sums with error feedback: the error is added in the next step."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.futures import Future


class CompressedAllReduce:
    """How the ranks with copies of a model sum their gradients, with two collectives a bucket.

    What is kept from step to step is kept by parameter, so that DDP may fill its buckets otherwise
    in the first step of a process than in the others: a run that goes on does what it would have.
    """

    def __init__(self, model: nn.Module, group: dist.ProcessGroup):
        self.group = group
        self._names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
        self._begun: list[tuple[Iterator[None], Future[Tensor], Tensor]] = []

    def sum_over_ranks(self, gradients: Mapping[str, Tensor]) -> Iterator[None]:
        """Replace a bucket's gradients, by name, by their sums.

        A generator that yields after it has started its first collective and its second.
        """
        raise NotImplementedError

    def end_step(self) -> None:
        """Finish a step; called after all of its buckets are summed."""

    def error_feedback_state(self) -> dict[str, Tensor]:
        """Return what this rank keeps, by name.

        The tensors themselves, to be saved and to be loaded.
        """
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
        """Bring all buckets to their end, in the order in which they were begun."""
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
    """DDP's communication hook: the last bucket's brings all of them to their end.

    The first collectives overlap with the backward. The second ones wait for its end, so that all
    ranks start all of them in one order: a callback would start a bucket's as soon as its first one
    is done, which on one rank may be before the next bucket's first, and on another behind it.
    """
    future = exchange.start_bucket(bucket)
    if bucket.is_last():
        exchange.finish_buckets()
    return future


def drop_nonfinite(lost: Tensor) -> Tensor:
    """Return what a sum has lost, and nothing where a gradient was not finite: such a step is
    dropped.
    """
    return torch.nan_to_num(lost, nan=0.0, posinf=0.0, neginf=0.0)
