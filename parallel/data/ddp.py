"""DDP: every rank has a full replica; gradients are summed over the replicas."""

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

from parallel.data.comm_hook import CompressedAllReduce, compressed_allreduce_hook
from parallel.data.int8 import Int8AllReduce
from parallel.data.powersgd import PowerSGDAllReduce
from parallel.strategy import StrategyConfig

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def reduce_dtype(reduce: str, weights: torch.dtype) -> torch.dtype:
    """Return the dtype in which gradients are summed; "auto" is the dtype of the weights."""
    return DTYPES.get(reduce, weights)


def sum_gradients(
    group: dist.ProcessGroup, bucket: dist.GradBucket
) -> torch.futures.Future[torch.Tensor]:
    """All-reduce a bucket as a sum: the loss is already divided by the global target count."""
    work = dist.all_reduce(bucket.buffer(), group=group, async_op=True)
    return work.get_future().then(lambda future: future.value()[0])


def sum_rounded(
    how: tuple[dist.ProcessGroup, torch.dtype], bucket: dist.GradBucket
) -> torch.futures.Future[torch.Tensor]:
    """All-reduce a bucket as a sum in another dtype; torch's bf16 hook does not support gloo."""
    group, dtype = how
    gradients = bucket.buffer()
    work = dist.all_reduce(gradients.to(dtype), group=group, async_op=True)
    return work.get_future().then(lambda future: gradients.copy_(future.value()[0]))


def build_comm_hook(
    model: nn.Module, mesh: DeviceMesh, strategy: StrategyConfig
) -> CompressedAllReduce | None:
    """Build the compressed all-reduce of a materialised model; None if reduce is uncompressed."""
    if strategy.reduce == "int8":
        return Int8AllReduce(model, mesh.get_group())
    if strategy.reduce == "powersgd":
        rank, start_step = strategy.powersgd_rank, strategy.powersgd_start_step
        return PowerSGDAllReduce(model, mesh.get_group(), rank, start_step)
    return None


def wrap_in_ddp(
    model: nn.Module, mesh: DeviceMesh | None, strategy: StrategyConfig
) -> tuple[nn.Module, CompressedAllReduce | None]:
    """Wrap a materialised model in DDP; without a mesh return it unwrapped.

    Also returns the compressed all-reduce, or None. Buckets have `bucket_mib` MiB of gradients and
    are reduced during the backward.
    """
    if mesh is None:
        return model, None
    group, exchange = mesh.get_group(), build_comm_hook(model, mesh, strategy)
    wrapped = DistributedDataParallel(
        model,
        process_group=group,
        init_sync=False,  # all ranks initialised the same weights
        bucket_cap_mb=strategy.bucket_mib,
        gradient_as_bucket_view=True,
    )
    weights = next(model.parameters()).dtype
    dtype = reduce_dtype(strategy.reduce, weights)
    if exchange is not None:
        wrapped.register_comm_hook(exchange, compressed_allreduce_hook)
    elif dtype != weights:
        wrapped.register_comm_hook((group, dtype), sum_rounded)
    else:
        wrapped.register_comm_hook(group, sum_gradients)
    return wrapped, exchange
