"""The global gradient norm, exact over every axis that shards a parameter."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.tensor import DTensor


def local_tensor(tensor: Tensor) -> Tensor:
    """Return the local shard of a DTensor; other tensors as they are."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _split_groups(gradient: Tensor) -> tuple[dist.ProcessGroup, ...]:
    """Return the process groups that a gradient is sharded over."""
    if not isinstance(gradient, DTensor):
        return ()
    mesh = gradient.device_mesh
    # Not `is_shard`, which is False for the strided shards of FSDP × tensor.
    split = (i for i, placement in enumerate(gradient.placements) if not placement.is_replicate())
    return tuple(mesh.get_group(i) for i in split if mesh.size(i) > 1)


@torch.no_grad()
def global_norm(
    gradients: Iterable[Tensor], device: torch.device, apart: Iterable[dist.ProcessGroup] = ()
) -> Tensor:
    """Return the Euclidean norm of all gradients, a scalar on `device`.

    Issues one scalar all-reduce per set of sharded axes, and one over each group of `apart`,
    whose ranks hold different parameters.
    """
    parts: dict[tuple, list[Tensor]] = {}
    for gradient in gradients:
        parts.setdefault(_split_groups(gradient), []).append(local_tensor(gradient))
    total = torch.zeros((), device=device)
    for groups, tensors in parts.items():
        norms = torch.stack(torch._foreach_norm(tensors))
        square = norms.square().sum()
        for group in groups:
            dist.all_reduce(square, group=group)
        total = total.to(square.dtype) + square
    for group in apart:
        dist.all_reduce(total, group=group)
    return total.sqrt()


@torch.no_grad()
def clip_gradients_(
    gradients: Iterable[Tensor], norm: Tensor, max_norm: float, scale: Tensor
) -> None:
    """Divide gradients by `scale` and clip them to `max_norm` (0 = off), in one pass, in place.

    `norm` is the norm of the gradients after the division. Does not synchronise with the device.
    """
    factor = 1.0 / scale.to(norm.dtype)
    if max_norm > 0:
        factor = factor * (max_norm / (norm + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_([local_tensor(gradient) for gradient in gradients], factor)
