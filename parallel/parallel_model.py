"""A model under any strategy behind one interface, so that the loop names none."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from parallel.context.attention import ContextSplit
from parallel.data.comm_hook import Exchange
from parallel.grad_norm import clip, global_norm
from parallel.mesh import data_mesh
from parallel.pipeline.stages import LossOf, Pipeline
from parallel.pipeline.trace import Recording
from parallel.runtime import everyones
from parallel.tensor.layers import TensorSplit

MicroBatch = dict[str, Tensor]
LossSum = Callable[..., Tensor]  # (logits, targets, inputs) -> sum over valid targets
CountValid = Callable[[Tensor], Tensor]  # targets -> number of valid ones


@dataclass(frozen=True)
class Whole:
    """The parameters of the whole model, wherever they are."""

    shapes: Mapping[str, torch.Size]  # by canonical name
    ties: Mapping[str, str]  # second names of shared parameters, with the canonical one


@dataclass(frozen=True)
class Axes:
    """Results of the mesh axes with more than one rank; None where an axis has one."""

    split: TensorSplit | None  # of the layers, tensor
    context: ContextSplit | None  # of the sequences, context
    pipeline: Pipeline | None
    exchange: Exchange | None  # of compressed gradients, replicate


@dataclass
class _Mean:
    """The mean loss over valid targets, of which this rank adds up what it learns from."""

    count: Tensor  # of valid targets, over all ranks
    scale: Tensor | int
    total: Tensor

    def share(self, loss_sum: Tensor) -> Tensor:
        """Return what to go back from for a sum over valid targets, whose part of the mean is
        counted.
        """
        loss = loss_sum / self.count.clamp(min=1).to(loss_sum.dtype)
        self.total = self.total + loss.detach()
        # Zero times a loss that is not finite is NaN: its gradient may be finite, and only what is
        # in the gradient reaches the other ranks.
        return loss * (loss.detach() * 0 + self.scale)


class ParallelModel:
    """A parallelised model with what a training step asks of it."""

    def __init__(
        self,
        model: nn.Module,
        wrapped: nn.Module,
        whole: Whole,
        mesh: DeviceMesh,
        device: torch.device,
        loss_sum: LossSum,
        count_valid: CountValid,
        axes: Axes,
    ):
        self.model = model  # the Transformer itself, or this rank's stages of it
        self.whole = whole
        self.mesh = mesh
        self.device = device
        data = data_mesh(mesh)
        self.data_group = data.get_group()
        self.data_rank = data.get_local_rank()
        self.data_degree = data.size()
        self._wrapped = wrapped  # what a training forward goes through
        self.split, self.context, self.pipeline = axes.split, axes.context, axes.pipeline
        self._exchange = axes.exchange
        if self.split is not None:
            loss_sum = partial(loss_sum, cross_entropy=self.split.vocabulary.cross_entropy)
        self._loss_sum = loss_sum
        self._count_valid = count_valid
        pipeline = self.pipeline
        self.stages_group = None if pipeline is None else pipeline.group
        if pipeline is not None and pipeline.holds_embedding != pipeline.holds_head:
            pipeline.tied = next(self._tied(), None)

    def to_device(self, micro_batch: MicroBatch) -> MicroBatch:
        """Return the micro-batch on this rank's device, copied without waiting where memory is
        pinned.
        """
        return {k: v.to(self.device, non_blocking=True) for k, v in micro_batch.items()}

    def forward_backward(
        self, micro_batches: list[MicroBatch], scale: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Gradients of (sum of losses over all ranks) / (valid targets over all ranks).

        Gradients are multiplied by `scale` (fp16). Returns this rank's part of the mean loss and
        the global number of valid targets, both on the device: `sum_over_data` of the first is
        the loss. Nothing is read back, so the host never waits.
        """
        counts = [self._count_valid(m["targets"]) for m in micro_batches]
        count = self.sum_over_data(torch.stack(counts).sum().to(self.device, non_blocking=True))
        inputs = list(map(self.to_device, micro_batches))
        weights = next(self.model.parameters()).dtype
        total = torch.zeros((), device=self.device, dtype=torch.promote_types(weights, torch.float))
        mean = _Mean(count, 1 if scale is None else scale, total)

        def loss_of(logits: Tensor, number: int) -> Tensor:
            targets = self.model.own_targets(inputs[number]["targets"])  # type: ignore[operator]
            return mean.share(self._loss_sum(logits, targets, inputs[number]))

        # Whatever learns from other things than logits takes its share where they are.
        self.model.share_of_mean = mean.share  # type: ignore[assignment]
        if self.pipeline is None:
            self._accumulate(inputs, loss_of)
        else:
            self.pipeline.run(inputs, loss_of)
        self.model.share_of_mean = None  # type: ignore[assignment]
        if self.split is not None:
            self.split.finish_gradients(self.model)
        if self.pipeline is not None:
            self.pipeline.sum_tied_gradient()
            # Each rank has counted in what its stages have learned from.
            dist.all_reduce(mean.total, group=self.stages_group)
        if self.context is not None:
            dist.all_reduce(mean.total, group=self.context.group)
        return mean.total, count

    def _accumulate(self, inputs: list[MicroBatch], loss_of: LossOf) -> None:
        """One micro-batch after another, forward and backward."""
        for number, micro_batch in enumerate(inputs):
            with self._reducing(number == len(inputs) - 1):
                loss_of(self._wrapped(micro_batch), number).backward()

    @contextmanager
    def recording(self) -> Iterator[Recording]:
        """Record what the ranks of a pipeline compute when, in the step inside."""
        pipeline = self.pipeline
        assert pipeline is not None, "metrics.timeline is refused without one"
        name = pipeline.strategy.schedule_csv or pipeline.strategy.schedule
        pipeline.recording = Recording(name, pipeline.group, self.device)
        try:
            yield pipeline.recording
        finally:
            pipeline.recording = None

    def forward(self, inputs: MicroBatch, cache: Any = None) -> Tensor:
        """Return the model's logits, all classes on every rank; inside `evaluating` only."""
        whole = self.split.vocabulary.gather if self.split is not None else lambda logits: logits
        if self.pipeline is not None:
            logits = self.pipeline.forward(inputs, cache, whole)
        else:
            logits = whole(self.model(inputs, cache))
        if self.context is None or cache is not None or logits.dim() < 3:
            return logits  # a classifier's are of the whole sequence
        return self.context.whole(logits, inputs["targets"].shape[1])

    @contextmanager
    def _reducing(self, reduce: bool) -> Iterator[None]:
        """Replicas sum their gradients once, in the last micro-batch's backward.

        Shards do in every one: an unreduced gradient would need the whole model's memory.
        """
        if isinstance(self._wrapped, FSDPModule):
            self._wrapped.set_requires_all_reduce(reduce)
        if isinstance(self._wrapped, DistributedDataParallel) and not reduce:
            with self._wrapped.no_sync():
                yield
        else:
            yield

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """`model` has no dropout and no gradients; all ranks must run as many forwards of it.

        Not torch's inference mode: weights that FSDP gathers there fail in a later backward.
        """
        training = self.model.training
        self.model.eval()
        whole = nullcontext() if self.split is None else self.split.whole_sequences()
        try:
            with torch.no_grad(), whole:
                yield
        finally:
            self.model.train(training)
            # No backward follows that would free the gathered weights, and as long as they are
            # there the parameters are not the sharded ones that a checkpoint must hold.
            for module in self.model.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()

    def partial_gradients(self) -> list[str]:
        """Parameters that no axis splits but whose gradient is summed over the tensor axis."""
        return [] if self.split is None else self.split.partial

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return what this rank has of the parameters, by canonical name."""
        return {self.whole.ties.get(n, n): p for n, p in self.model.named_parameters()}

    def kept(self) -> dict[str, Tensor]:
        """Return what this rank alone keeps of the gradients' sums so far, by name.

        To be loaded into.
        """
        return {} if self._exchange is None else self._exchange.state()

    def _tied(self) -> Iterator[nn.Parameter]:
        """Parameters of which another rank has a copy: with neither or both names, none."""
        for name, parameter in self.model.named_parameters():
            if name in self.whole.ties or name in self.whole.ties.values():
                yield parameter

    def gradients(self) -> list[Tensor]:
        """Return the gradients, in the order of the parameters."""
        return [p.grad for p in self.model.parameters() if p.grad is not None]

    def _counted_gradients(self) -> list[Tensor]:
        """Return the gradients that make up the norm: a tied parameter counts where its first name
        is.
        """
        named = self.model.named_parameters()
        return [p.grad for n, p in named if p.grad is not None and n not in self.whole.ties]

    def clip_grad_norm(self, max_norm: float, scale: Tensor | None = None) -> Tensor:
        """Undo `scale`, clip to the global norm, and return the norm before clipping."""
        scale = torch.ones((), device=self.device) if scale is None else scale
        gradients = self.gradients()
        norm = global_norm(self._counted_gradients(), self.device, self.stages_group)
        norm = norm / scale.to(norm.dtype)
        clip(gradients, norm, max_norm, scale)
        return norm

    def zero_grad(self) -> None:
        """Forget the gradients."""
        self.model.zero_grad(set_to_none=True)

    def sum_over_data(self, tensor: Tensor) -> Tensor:
        """Return the sum over all ranks that see different samples, in place."""
        if self.data_degree > 1:
            dist.all_reduce(tensor, group=self.data_group)
        return tensor

    def any_over_data(self, flag: bool) -> bool:
        """Return whether the flag is up on any rank that sees different samples.

        Waits for all of them.
        """
        if self.data_degree == 1:
            return flag
        return bool(self.sum_over_data(torch.tensor(int(flag), device=self.device)).item())

    def gather_over_data(self, value: object) -> list:
        """Return every such rank's (picklable) value, in rank order."""
        return everyones(value, self.data_group)
