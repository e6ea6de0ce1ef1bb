"""Collectives over one axis as functions of tensors, and what autograd makes of them.

The functional operators of torch, not the in-place ones: activation checkpointing can keep what
they return, and torch.compile traces them.
"""

from typing import Any

import torch
import torch.distributed._functional_collectives  # defines torch.ops._c10d_functional
from torch import Tensor
from torch import distributed as dist
from torch.nn import functional as F

_ops = torch.ops._c10d_functional


def start_all_reduce(x: Tensor, group: dist.ProcessGroup, how: str = "sum") -> Tensor:
    """Return the sum (or max) over the ranks, not to be read before `wait_tensor`."""
    return _ops.all_reduce(x.contiguous(), how, group.group_name)


def start_all_gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Start an all-gather of tensors of one shape, concatenated along dim 0.

    Not to be read before `wait_tensor`.
    """
    return _ops.all_gather_into_tensor(x.contiguous(), group.size(), group.group_name)


def start_all_to_all(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Like `all_to_all`, not to be read before `wait_tensor`."""
    sizes = [x.shape[0] // group.size()] * group.size()
    return _ops.all_to_all_single(x.contiguous(), sizes, sizes, group.group_name)


def all_reduce(x: Tensor, group: dist.ProcessGroup, how: str = "sum") -> Tensor:
    """Return the sum (or max) over the ranks."""
    return wait_tensor(start_all_reduce(x, group, how))


def all_gather(x: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
    """Return the ranks' tensors, all of one shape, concatenated along `dim`."""
    gathered = wait_tensor(start_all_gather(x, group))
    # In these very operators inductor finds what it can overlap with a matrix product.
    return gathered if dim == 0 else torch.cat(gathered.chunk(group.size()), dim)


def reduce_scatter(x: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
    """Return this rank's shard along `dim` of the sum over the ranks; the degree divides it."""
    parts = group.size()
    x = x.contiguous() if dim == 0 else torch.cat(x.chunk(parts, dim))
    return _ops.wait_tensor(_ops.reduce_scatter_tensor(x, "sum", parts, group.group_name))


def all_to_all(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Exchange parts along dim 0, so that each rank gets those meant for it.

    The degree divides it.
    """
    return wait_tensor(start_all_to_all(x, group))


def start_shift(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return the previous rank's tensor, not to be read before `wait_tensor`.

    This rank's goes to the next.
    """
    rank, parts = group.rank(), group.size()
    # An all-to-all with one part: NCCL sends no empty ones, and unlike pairs of send and receive
    # it is a functional operator, and in no order that could lock.
    given, taken = [0] * parts, [0] * parts
    given[(rank + 1) % parts] = taken[(rank - 1) % parts] = x.shape[0]
    return _ops.all_to_all_single(x.contiguous(), taken, given, group.group_name)


def wait_tensor(x: Tensor) -> Tensor:
    """Wait for an asynchronous collective and return its result."""
    return _ops.wait_tensor(x)


def pad_to_multiple(x: Tensor, dim: int, parts: int) -> Tensor:
    """Return the tensor zero-padded at its end along `dim`, so that `parts` divides its size."""
    lacking = -x.shape[dim] % parts
    return x if not lacking else F.pad(x, (0, 0) * (x.dim() - 1 - dim) + (0, lacking))


def gather_padded(x: Tensor, length: int, group: dist.ProcessGroup, dim: int) -> Tensor:
    """Invert `scatter_padded`: return the first `length` of the gathered tensor along `dim`."""
    return all_gather(x, group, dim).narrow(dim, 0, length).contiguous()


def scatter_padded(x: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
    """Return this rank's part of the sum, of the tensor padded to a multiple of the degree."""
    return reduce_scatter(pad_to_multiple(x, dim, group.size()), group, dim)


class Copy(torch.autograd.Function):
    """Megatron-LM's f: every rank reads the same, so gradients are summed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return all_reduce(grads[0], ctx.group), None


class Sum(torch.autograd.Function):
    """Megatron-LM's g: the ranks' parts are summed, and each part has the sum's gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        return all_reduce(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0], None


class Gather(torch.autograd.Function):
    """All-gather along `dim`, cut to `length`; the gradients are summed and scattered."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, length: int, group: dist.ProcessGroup, dim: int) -> Tensor:
        ctx.group, ctx.dim = group, dim
        return gather_padded(x, length, group, dim)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return scatter_padded(grads[0], ctx.group, ctx.dim), None, None, None


class Scatter(torch.autograd.Function):
    """Reduce-scatter along `dim` of the tensor padded; the gradients are gathered."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
        ctx.group, ctx.dim, ctx.length = group, dim, x.shape[dim]
        return scatter_padded(x, group, dim)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return gather_padded(grads[0], ctx.length, ctx.group, ctx.dim), None, None


class Exchange(torch.autograd.Function):
    """All-to-all along dim 0, whose gradients go back the way that the parts came."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return all_to_all(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return all_to_all(grads[0], ctx.group), None
