"""Faults that `verify` must catch: each builds a worker as `parallelize` does, but a broken one.

They are the bugs that distributed training really suffers from; nothing outside verify uses them.
"""

from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultReduceScatter

from parallel import ddp, gradients
from parallel.apply import parallelize
from parallel.ddp import sum_gradients
from parallel.worker import Worker


class _OwnPartOnly(DefaultReduceScatter):
    """A reduce-scatter that forgets the other ranks."""

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any,
        async_op: bool = False,
    ) -> Any:  # fmt: skip
        parts = input_tensor.chunk(dist.get_world_size(group))
        output_tensor.copy_(parts[dist.get_rank(group)])


def _one_left_out(
    group: dist.ProcessGroup, bucket: dist.GradBucket
) -> torch.futures.Future[Tensor]:
    gradient = bucket.gradients()[0]
    own = gradient.clone()

    def put_back(future: torch.futures.Future[Tensor]) -> Tensor:
        gradient.copy_(own)
        return future.value()

    return sum_gradients(group, bucket).then(put_back)


def skip_gradient_sum(*args: Any, **kwargs: Any) -> Worker:
    """A parameter is left out of the all-reduce (DDP), or a block of the reduce-scatter (FSDP)."""
    with mock.patch.object(ddp, "sum_gradients", _one_left_out):
        worker = parallelize(*args, **kwargs)
    block = list(worker.model.get_submodule("blocks").children())[-1]
    if isinstance(block, FSDPModule):
        block.set_custom_reduce_scatter(_OwnPartOnly())
    return worker


def local_target_count(*args: Any, **kwargs: Any) -> Worker:
    """Each rank divides by its own number of targets: a mean of means."""
    worker = parallelize(*args, **kwargs)
    sum_over_data = worker.sum_over_data

    def mean_of_means(tensor: Tensor) -> Tensor:
        local = tensor.clone()
        total = sum_over_data(tensor)
        is_count = not tensor.is_floating_point()
        return local * worker.data_degree if is_count else total

    worker.sum_over_data = mean_of_means  # type: ignore[method-assign]
    return worker


def local_gradient_norm(*args: Any, **kwargs: Any) -> Worker:
    """Each rank clips by the norm of what it holds."""
    worker = parallelize(*args, **kwargs)

    def clip_by_own_part(max_norm: float, scale: Tensor | None = None) -> Tensor:
        with mock.patch.object(gradients, "_split_groups", lambda gradient: ()):
            return type(worker).clip_grad_norm(worker, max_norm, scale)

    worker.clip_grad_norm = clip_by_own_part  # type: ignore[method-assign]
    return worker


FAULTS = {f.__name__: f for f in (skip_gradient_sum, local_target_count, local_gradient_norm)}
