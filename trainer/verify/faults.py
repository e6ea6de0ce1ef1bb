"""Faults that `verify` must catch: each builds a broken parallel model like `parallelize`.

They are bugs that distributed training really suffers from; only verify uses them.
"""

from collections.abc import Callable
from types import MethodType
from typing import Any, ParamSpec, TypeVar
from unittest import mock

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultReduceScatter

from parallel import grad_norm as gradients
from parallel.axis import LossOf, ParallelAxis, find_axis
from parallel.collectives import Gather, Mean, pad_to_multiple
from parallel.context.attention import ContextParallel
from parallel.context.ring import RingGeometry, Tile
from parallel.data import ddp
from parallel.data.ddp import sum_gradients
from parallel.parallel_model import ParallelModel
from parallel.parallelize import parallelize
from parallel.pipeline.stages import PipelineParallel, Stage
from parallel.tensor.layers import SEQUENCE_DIM, TensorParallel
from trainer.config.lora import FACTORS
from trainer.config.verify import FAULT_AXES
from trainer.nn.layers import WidthNorm

P = ParamSpec("P")
R = TypeVar("R")
A = TypeVar("A", bound=ParallelAxis)


def replace_method(method: Callable[P, R], replacement: Callable[P, R]) -> None:
    """Replace a bound method of one object by another with the same signature."""
    assert isinstance(method, MethodType)
    setattr(method.__self__, method.__name__, replacement)


def _axis_of(worker: ParallelModel, kind: type[A]) -> A:
    axis = find_axis(worker.axes, kind)
    assert axis is not None  # checked with the configuration
    return axis


class _OwnPartOnly(DefaultReduceScatter):
    """A reduce-scatter that ignores the other ranks."""

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: Any,
        op: Any,
        async_op: bool = False,
    ) -> Any:
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


def skip_gradient_sum(*args: Any, **kwargs: Any) -> ParallelModel:
    """Leave a parameter out of the all-reduce (DDP), or a block of the reduce-scatter (FSDP)."""
    with mock.patch.object(ddp, "sum_gradients", _one_left_out):
        worker = parallelize(*args, **kwargs)
    block = list(worker.model.get_submodule("blocks").children())[-1]
    if isinstance(block, FSDPModule):
        block.set_custom_reduce_scatter(_OwnPartOnly())
    return worker


def local_target_count(*args: Any, **kwargs: Any) -> ParallelModel:
    """Divide on each rank by its own number of targets: a mean of means."""
    worker = parallelize(*args, **kwargs)
    sum_over_data = worker.sum_over_data

    def mean_of_means(tensor: Tensor) -> Tensor:
        local = tensor.clone()
        total = sum_over_data(tensor)
        is_count = not tensor.is_floating_point()
        return local * worker.data_degree if is_count else total

    replace_method(sum_over_data, mean_of_means)
    return worker


def local_gradient_norm(*args: Any, **kwargs: Any) -> ParallelModel:
    """Clip on each rank by the norm of its local gradients."""
    worker = parallelize(*args, **kwargs)
    clip_grad_norm = worker.clip_grad_norm

    def clip_by_own_part(max_norm: float, scale: Tensor | None = None) -> Tensor:
        with (
            mock.patch.object(gradients, "_split_groups", lambda gradient: ()),
            mock.patch.object(PipelineParallel, "splits_parameters", False),
        ):
            return clip_grad_norm(max_norm, scale)

    replace_method(clip_grad_norm, clip_by_own_part)
    return worker


class _OwnGradient(Gather):
    """An all-gather whose backward ignores the other ranks' gradients."""

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        parts = pad_to_multiple(grads[0], ctx.dim, ctx.group.size()).chunk(
            ctx.group.size(), ctx.dim
        )
        return parts[ctx.group.rank()].contiguous(), None, None, None


def skip_input_gradient_sum(*args: Any, **kwargs: Any) -> ParallelModel:
    """Give a split layer's input this rank's gradient alone: f, or the all-gather's backward."""
    worker = parallelize(*args, **kwargs)
    split = _axis_of(worker, TensorParallel)

    def gather_without_sum(x_BSD: Tensor, length: int) -> Tensor:
        if not split.splits_sequence:
            return x_BSD
        return _OwnGradient.apply(x_BSD, length, split.group, SEQUENCE_DIM)

    replace_method(split.gather_sequence, gather_without_sum)
    return worker


def skip_sequence_gather(*args: Any, **kwargs: Any) -> ParallelModel:
    """Use the local positions in place of the gathered sequence."""
    worker = parallelize(*args, **kwargs)
    split = _axis_of(worker, TensorParallel)

    def skip_gather(x_BSD: Tensor, length: int) -> Tensor:
        return torch.cat([x_BSD] * split.group.size(), SEQUENCE_DIM)[:, :length]

    replace_method(split.gather_sequence, skip_gather)
    return worker


def skip_output_sum(*args: Any, **kwargs: Any) -> ParallelModel:
    """Use the local part of a split layer's output: skip its all-reduce or reduce-scatter."""
    worker = parallelize(*args, **kwargs)
    split = _axis_of(worker, TensorParallel)
    replace_method(split.reduce_scatter_sequence, split.local_positions)
    return worker


def skip_vocabulary_mask(*args: Any, **kwargs: Any) -> ParallelModel:
    """Add a local row for tokens that other ranks own."""
    worker = parallelize(*args, **kwargs)
    entries = _axis_of(worker, TensorParallel).entries
    find = entries.local_rows

    def all_mine(tokens: Tensor) -> tuple[Tensor, Tensor]:
        row, mine = find(tokens)
        return row, torch.ones_like(mine)

    replace_method(find, all_mine)
    return worker


def skip_partial_gradient_sum(*args: Any, **kwargs: Any) -> ParallelModel:
    """Keep the partial gradients of layers that compute on a part of the positions or heads."""
    worker = parallelize(*args, **kwargs)
    split = _axis_of(worker, TensorParallel)
    finish = split.finish_gradients

    def finish_without_sum(model: Any) -> None:
        with mock.patch.object(split, "partial", []):
            finish(model)

    replace_method(finish, finish_without_sum)
    return worker


class _OwnMean(Mean):
    """A mean over the ranks whose backward ignores the other ranks' gradients."""

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0] / ctx.group.size(), None


def skip_norm_gradient_mean(*args: Any, **kwargs: Any) -> ParallelModel:
    """Let a norm over all heads (model.qk_norm=width) take its own gradient alone."""
    worker = parallelize(*args, **kwargs)
    group = _axis_of(worker, TensorParallel).group
    for module in worker.model.modules():
        if isinstance(module, WidthNorm):
            replace_method(module.mean_over_parts, lambda mean: _OwnMean.apply(mean, group))
    return worker


class _ShortRing(RingGeometry):
    """A ring that stops one step early, so that a rank misses its successor's keys."""

    def tile_for_owner(self, query_BHSK: Tensor, keys: int, owner: int) -> Tile | None:
        left_out = (self.group.rank() + 1) % self.group.size()
        return None if owner == left_out else super().tile_for_owner(query_BHSK, keys, owner)


def skip_ring_step(*args: Any, **kwargs: Any) -> ParallelModel:
    """Leave out the last step of ring attention."""
    worker = parallelize(*args, **kwargs)
    _axis_of(worker, ContextParallel).ring = _ShortRing
    return worker


def stale_stage_input(*args: Any, **kwargs: Any) -> ParallelModel:
    """Let a stage compute all micro-batches from the first one's input."""
    worker = parallelize(*args, **kwargs)
    for stage in _axis_of(worker, PipelineParallel).stages:
        _use_stale_input(stage)
    return worker


def _use_stale_input(stage: Stage) -> None:
    compute = stage.forward_one_chunk
    first: list[Tensor] = []

    def on_old_input(number: int, *args: Any, **kwargs: Any) -> Any:
        own = stage._inputs.get(number, [])
        if number == 0:
            first[:] = own
        elif [tensor.shape for tensor in own] == [tensor.shape for tensor in first]:
            stage._inputs[number] = [tensor.detach().clone() for tensor in first]
        return compute(number, *args, **kwargs)

    replace_method(compute, on_old_input)


def skip_tied_gradient_sum(*args: Any, **kwargs: Any) -> ParallelModel:
    """Skip the gradient exchange of a tied weight between the first and the last stage."""
    worker = parallelize(*args, **kwargs)
    _axis_of(worker, PipelineParallel).tied = None
    return worker


def skip_shared_gradient_sum(*args: Any, **kwargs: Any) -> ParallelModel:
    """Leave out what the other stages add to the gradient of a parameter that all share."""
    worker = parallelize(*args, **kwargs)
    pipeline = _axis_of(worker, PipelineParallel)
    replace_method(pipeline.counts_in_norm, lambda name: pipeline.rank == 0 or name not in shared)
    shared, pipeline.partial = pipeline.partial, []
    return worker


def local_loss_scale(*args: Any, **kwargs: Any) -> ParallelModel:
    """Divide each micro-batch's loss by its own targets and by the number of micro-batches."""
    worker = parallelize(*args, **kwargs)
    pipeline = _axis_of(worker, PipelineParallel)
    run = pipeline.run

    def mean_of_means(micro_batches: list[dict[str, Tensor]], loss_of: LossOf) -> None:
        counts = [worker.count_valid(m["targets"]) for m in micro_batches]
        total = torch.stack(counts).sum()

        def scaled_loss(logits: Tensor, number: int) -> Tensor:
            own = counts[number].clamp(min=1) * len(counts)
            return loss_of(logits, number) * (total / own)

        run(micro_batches, scaled_loss)

    replace_method(run, mean_of_means)
    return worker


def skip_factor_gradient_sum(*args: Any, **kwargs: Any) -> ParallelModel:
    """Leave an adapter's replicated factor out of the sum over the ranks of its split layer."""
    worker = parallelize(*args, **kwargs)
    split = _axis_of(worker, TensorParallel)
    split.partial = [name for name in split.partial if not name.endswith(FACTORS)]
    return worker


def count_frozen_weight(*args: Any, **kwargs: Any) -> ParallelModel:
    """Let a frozen weight have a gradient, which then enters the norm."""
    worker = parallelize(*args, **kwargs)
    forward_backward = worker.forward_backward

    def with_gradient(*inputs: Any) -> tuple[Tensor, Tensor]:
        found = forward_backward(*inputs)
        frozen = next(p for p in worker.model.parameters() if not p.requires_grad)
        frozen.grad = torch.ones_like(frozen)
        return found

    replace_method(forward_backward, with_gradient)
    return worker


FAULTS = {
    fault.__name__: fault
    for fault in (
        skip_gradient_sum,
        local_target_count,
        local_gradient_norm,
        skip_input_gradient_sum,
        skip_output_sum,
        skip_sequence_gather,
        skip_vocabulary_mask,
        skip_partial_gradient_sum,
        skip_norm_gradient_mean,
        stale_stage_input,
        skip_tied_gradient_sum,
        skip_shared_gradient_sum,
        local_loss_scale,
        skip_ring_step,
        skip_factor_gradient_sum,
        count_frozen_weight,
    )
}
assert tuple(FAULTS) == tuple(FAULT_AXES), "trainer/config/verify.py names other faults"
