"""DDP: every rank has a full replica; gradients are summed over the replicate axis."""

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
    """Return what gradients are rounded to before they are summed.

    `weights` is the dtype of these.
    """
    return DTYPES.get(reduce, weights)


def sum_gradients(
    group: dist.ProcessGroup, bucket: dist.GradBucket
) -> torch.futures.Future[torch.Tensor]:
    """All-reduce a bucket as a sum: the loss was already divided by the global target count."""
    work = dist.all_reduce(bucket.buffer(), group=group, async_op=True)
    return work.get_future().then(lambda future: future.value()[0])


def sum_rounded(
    how: tuple[dist.ProcessGroup, torch.dtype], bucket: dist.GradBucket
) -> torch.futures.Future[torch.Tensor]:
    """All-reduce a bucket as a sum in another dtype; torch's own hook for bf16 refuses gloo."""
    group, dtype = how
    gradients = bucket.buffer()
    work = dist.all_reduce(gradients.to(dtype), group=group, async_op=True)
    return work.get_future().then(lambda future: gradients.copy_(future.value()[0]))


def build_comm_hook(
    model: nn.Module, mesh: DeviceMesh, strategy: StrategyConfig
) -> CompressedAllReduce | None:
    """Return what compresses the sums of a materialised model's gradients; None if they are not."""
    if strategy.reduce == "int8":
        return Int8AllReduce(model, mesh.get_group())
    if strategy.reduce == "powersgd":
        rank, start_step = strategy.powersgd_rank, strategy.powersgd_start_step
        return PowerSGDAllReduce(model, mesh.get_group(), rank, start_step)
    return None


def wrap_in_ddp(
    model: nn.Module, mesh: DeviceMesh | None, strategy: StrategyConfig
) -> tuple[nn.Module, CompressedAllReduce | None]:
    """Wrap a materialised model; one sum per `bucket_mib` MiB of gradients, overlapped.

    Returns too what compresses the sums, if something does. Without a mesh nothing is wrapped.
    """
    if mesh is None:
        return model, None
    group, exchange = mesh.get_group(), build_comm_hook(model, mesh, strategy)
    wrapped = DistributedDataParallel(
        model,
        process_group=group,
        init_sync=False,  # all ranks drew the same weights
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
