"""DDP: every rank holds the whole model and gradients are summed over the replicate axis."""

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel


def sum_gradients(
    group: dist.ProcessGroup, bucket: dist.GradBucket
) -> torch.futures.Future[torch.Tensor]:
    """All-reduce a bucket as a sum: the loss was already divided by the global target count."""
    work = dist.all_reduce(bucket.buffer(), group=group, async_op=True)
    return work.get_future().then(lambda future: future.value()[0])


def replicate(model: nn.Module, mesh: DeviceMesh, bucket_mib: float) -> DistributedDataParallel:
    """Wrap a materialised model; one all-reduce per `bucket_mib` MiB of gradients, overlapped."""
    group = mesh.get_group()
    wrapped = DistributedDataParallel(
        model,
        process_group=group,
        init_sync=False,  # all ranks drew the same weights
        bucket_cap_mb=bucket_mib,
        gradient_as_bucket_view=True,
    )
    wrapped.register_comm_hook(group, sum_gradients)
    return wrapped
