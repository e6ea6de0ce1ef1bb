"""Functional collectives over one axis, and autograd functions built from them.

They use torch's functional operators, not the in-place ones: activation checkpointing can save
their outputs, and torch.compile traces them.
"""

from typing import Any

import torch
import torch.distributed._functional_collectives  # defines torch.ops._c10d_functional
from torch import Tensor
from torch import distributed as dist
from torch.nn import functional as F

_ops = torch.ops._c10d_functional


def start_all_reduce(x: Tensor, group: dist.ProcessGroup, how: str = "sum") -> Tensor:
    """Start an all-reduce (sum or max); call `wait_tensor` before reading the result."""
    return _ops.all_reduce(x.contiguous(), how, group.group_name)


def start_all_gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Start an all-gather of tensors of equal shape, concatenated along dim 0.

    Call `wait_tensor` before reading the result.
    """
    return _ops.all_gather_into_tensor(x.contiguous(), group.size(), group.group_name)


def start_all_to_all(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Start `all_to_all`; call `wait_tensor` before reading the result."""
    sizes = [x.shape[0] // group.size()] * group.size()
    return _ops.all_to_all_single(x.contiguous(), sizes, sizes, group.group_name)


def all_reduce(x: Tensor, group: dist.ProcessGroup, how: str = "sum") -> Tensor:
    """Return the sum (or maximum) over the ranks."""
    return wait_tensor(start_all_reduce(x, group, how))


def all_gather(x: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
    """Return the ranks' tensors, all of equal shape, concatenated along `dim`."""
    gathered = wait_tensor(start_all_gather(x, group))
    # inductor matches exactly these operators to overlap the gather with a matrix product.
    return gathered if dim == 0 else torch.cat(gathered.chunk(group.size()), dim)


def reduce_scatter(x: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
    """Return this rank's shard of the sum along `dim`, whose size the degree must divide."""
    parts = group.size()
    x = x.contiguous() if dim == 0 else torch.cat(x.chunk(parts, dim))
    return _ops.wait_tensor(_ops.reduce_scatter_tensor(x, "sum", parts, group.group_name))


def all_to_all(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Send chunk i of dim 0 to rank i and concatenate the received chunks in rank order.

    The degree must divide the size of dim 0.
    """
    return wait_tensor(start_all_to_all(x, group))


def start_shift(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Start a ring shift: send to the next rank and return the previous rank's tensor.

    Call `wait_tensor` before reading the result.
    """
    rank, parts = group.rank(), group.size()
    # An all-to-all with one non-empty chunk: NCCL sends no empty ones, and unlike a pair of send
    # and receive it is a functional operator and cannot deadlock by its order.
    input_sizes, output_sizes = [0] * parts, [0] * parts
    input_sizes[(rank + 1) % parts] = output_sizes[(rank - 1) % parts] = x.shape[0]
    return _ops.all_to_all_single(x.contiguous(), output_sizes, input_sizes, group.group_name)


def wait_tensor(x: Tensor) -> Tensor:
    """Wait for an asynchronous collective and return its result."""
    return _ops.wait_tensor(x)


def pad_to_multiple(x: Tensor, dim: int, parts: int) -> Tensor:
    """Zero-pad the tensor at its end along `dim` to a size that `parts` divides."""
    padding = -x.shape[dim] % parts
    return x if not padding else F.pad(x, (0, 0) * (x.dim() - 1 - dim) + (0, padding))


def gather_padded(x: Tensor, length: int, group: dist.ProcessGroup, dim: int) -> Tensor:
    """Invert `scatter_padded`: gather along `dim` and cut the padding off after `length`."""
    return all_gather(x, group, dim).narrow(dim, 0, length).contiguous()


def scatter_padded(x: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
    """Pad `dim` to a multiple of the degree and return this rank's shard of the sum."""
    return reduce_scatter(pad_to_multiple(x, dim, group.size()), group, dim)


class Copy(torch.autograd.Function):
    """Megatron-LM's f: identity in the forward, all-reduce in the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return all_reduce(grads[0], ctx.group), None


class Sum(torch.autograd.Function):
    """Megatron-LM's g: all-reduce in the forward, identity in the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        return all_reduce(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0], None


class Mean(torch.autograd.Function):
    """Mean over the ranks, each of which goes on with it: also the mean of their gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return all_reduce(x, group) / group.size()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return all_reduce(grads[0], ctx.group) / ctx.group.size(), None


class Gather(torch.autograd.Function):
    """All-gather along `dim`, cut to `length`; reduce-scatter in the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, length: int, group: dist.ProcessGroup, dim: int) -> Tensor:
        ctx.group, ctx.dim = group, dim
        return gather_padded(x, length, group, dim)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return scatter_padded(grads[0], ctx.group, ctx.dim), None, None, None


class GatherRepeated(torch.autograd.Function):
    """All-gather along `dim`, cut to `length`, for a computation that every rank repeats.

    The backward takes this rank's shard of the gradient, which is the same on all of them.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, length: int, group: dist.ProcessGroup, dim: int) -> Tensor:
        ctx.group, ctx.dim = group, dim
        return gather_padded(x, length, group, dim)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        parts, rank = ctx.group.size(), ctx.group.rank()
        return (
            pad_to_multiple(grads[0], ctx.dim, parts).chunk(parts, ctx.dim)[rank],
            None,
            None,
            None,
        )


class Scatter(torch.autograd.Function):
    """Reduce-scatter of the padded tensor along `dim`; all-gather in the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
        ctx.group, ctx.dim, ctx.length = group, dim, x.shape[dim]
        return scatter_padded(x, group, dim)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return gather_padded(grads[0], ctx.length, ctx.group, ctx.dim), None, None


class Exchange(torch.autograd.Function):
    """All-to-all along dim 0; the inverse all-to-all in the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return all_to_all(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return all_to_all(grads[0], ctx.group), None


def transfer(operations: list[dist.P2POp]) -> None:
    """Run sends and receives together, and wait for all of them."""
    for work in dist.batch_isend_irecv(operations):
        work.wait()
