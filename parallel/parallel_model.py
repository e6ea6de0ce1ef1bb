"""A parallelised model with one interface for the training loop under any strategy."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from parallel.axis import LossSum, ParallelAxis
from parallel.grad_norm import clip_gradients_, global_norm
from parallel.mesh import data_mesh
from parallel.model_protocol import Inputs, ParallelizableModel
from parallel.pipeline.stages import record_step
from parallel.pipeline.trace import Recording
from parallel.runtime import all_gather_objects

MicroBatch = Inputs
CountValid = Callable[[Tensor], Tensor]  # targets -> number of valid ones


@dataclass(frozen=True)
class FullParameters:
    """Global shapes and names of the parameters of the full model."""

    shapes: Mapping[str, torch.Size]  # by canonical name
    ties: Mapping[str, str]  # further names of shared parameters, to the canonical one
    frozen: frozenset[str] = frozenset()  # canonical names of those that do not learn

    @property
    def classes(self) -> int:
        """Return the number of output classes, also on ranks without the head."""
        name = "head.output.weight"
        return self.shapes[self.ties.get(name, name)][0]


@dataclass
class GlobalMean:
    """The mean loss over all valid targets; accumulates this rank's contribution."""

    count: Tensor  # valid targets on all ranks
    scale: Tensor | int  # loss scale of fp16; 1 = none
    total: Tensor  # this rank's contribution so far

    def scale_loss(self, loss_sum: Tensor) -> Tensor:
        """Accumulate a sum over valid targets, and return the scaled loss for `backward`."""
        loss = loss_sum / self.count.clamp(min=1).to(loss_sum.dtype)
        self.total = self.total + loss.detach()
        # 0 × a non-finite loss is NaN: the gradient of such a loss may be finite, and only the
        # gradient is reduced to the other ranks.
        return loss * (loss.detach() * 0 + self.scale)


class ParallelModel:
    """A parallelised model with the operations of a training step."""

    def __init__(
        self,
        model: ParallelizableModel,
        whole: FullParameters,
        mesh: DeviceMesh,
        device: torch.device,
        loss_sum: LossSum,
        count_valid: CountValid,
        axes: Sequence[ParallelAxis],
    ):
        self.model = model  # the Transformer itself, or this rank's stages of it
        self.whole = whole
        self.mesh = mesh
        self.device = device
        data = data_mesh(mesh)
        self.data_group = data.get_group()
        self.data_rank = data.get_local_rank()
        self.data_degree = data.size()
        self.axes = axes  # those of degree > 1, outermost first, then data parallelism
        # The outermost axis with a schedule sets the order of micro-batches.
        self._schedule = next(axis.schedule for axis in axes if axis.schedule is not None)
        for axis in reversed(axes):
            loss_sum = axis.split_loss(loss_sum)
        self._loss_sum = loss_sum
        self.count_valid = count_valid

    def to_device(self, micro_batch: MicroBatch) -> MicroBatch:
        """Copy the micro-batch to this rank's device, asynchronously from pinned memory."""
        return {k: v.to(self.device, non_blocking=True) for k, v in micro_batch.items()}

    def forward_backward(
        self, micro_batches: list[MicroBatch], scale: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Compute gradients of (sum of losses over all ranks) / (valid targets on all ranks).

        Gradients are multiplied by `scale` (fp16). Returns this rank's contribution to the mean
        loss and the global number of valid targets, both on the device; `sum_over_data` of the
        first is the loss. Does not synchronise with the device.
        """
        counts = [int(self.count_valid(m["targets"])) for m in micro_batches]  # on the host
        # Filled in by a kernel: a copy from memory that is not pinned would wait for the device.
        own = torch.full((), sum(counts), dtype=torch.int64, device=self.device)
        count = self.sum_over_data(own)
        inputs = list(map(self.to_device, micro_batches))
        weights = next(self.model.parameters()).dtype
        total = torch.zeros((), device=self.device, dtype=torch.promote_types(weights, torch.float))
        mean = GlobalMean(count, 1 if scale is None else scale, total)

        def loss_of(logits: Tensor, number: int) -> Tensor:
            targets = self.model.local_targets(inputs[number]["targets"])
            loss_sum = self._loss_sum(logits, targets, inputs[number], counts[number])
            return mean.scale_loss(loss_sum)

        # Blocks with an auxiliary loss add it where it is computed.
        self.model.scale_auxiliary_loss = mean.scale_loss
        self._schedule.run(inputs, loss_of)
        self.model.scale_auxiliary_loss = None
        for axis in reversed(self.axes):
            axis.finish_gradients(self.model)
        for axis in reversed(self.axes):
            if axis.splits_loss:
                dist.all_reduce(mean.total, group=axis.group)
        return mean.total, count

    def record_pipeline(self) -> AbstractContextManager[Recording]:
        """Return a context that records a timeline of the pipeline's actions in one step."""
        return record_step(self.axes)

    def forward(self, inputs: MicroBatch, cache: Any = None) -> Tensor:
        """Return the logits of all classes on every rank; only inside `evaluation_mode`."""
        logits = self._schedule.forward(inputs, cache)
        for axis in reversed(self.axes):
            logits = axis.gather_logits(logits, inputs, cache)
        assert logits is not None, "an axis has logits on some of its ranks and does not share them"
        return logits

    @contextmanager
    def evaluation_mode(self) -> Iterator[None]:
        """Disable dropout and gradients; all ranks must run the same number of forwards.

        Not `torch.inference_mode`: weights that FSDP gathers in it fail in a later backward.
        """
        training = self.model.training
        self.model.train(False)
        try:
            with torch.no_grad(), ExitStack() as contexts:
                for axis in self.axes:
                    contexts.enter_context(axis.evaluating())
                yield
        finally:
            self.model.train(training)

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return this rank's parameters or shards of them, by canonical name."""
        return {self.whole.ties.get(n, n): p for n, p in self.model.named_parameters()}

    def error_feedback_state(self) -> dict[str, Tensor]:
        """Return this rank's error-feedback tensors by name; a checkpoint loads them in place."""
        return {name: tensor for axis in self.axes for name, tensor in axis.state().items()}

    def gradients(self) -> list[Tensor]:
        """Return the gradients, in the order of the parameters."""
        return [p.grad for p in self.model.parameters() if p.grad is not None]

    def _gradients_for_norm(self) -> list[Tensor]:
        """Return the gradients that enter the norm; a tied parameter counts once, by first name."""
        return [
            parameter.grad
            for name, parameter in self.model.named_parameters()
            if parameter.grad is not None
            and name not in self.whole.ties
            and all(axis.counts_in_norm(name) for axis in self.axes)
        ]

    def clip_grad_norm(self, max_norm: float, scale: Tensor | None = None) -> Tensor:
        """Divide by `scale`, clip by the global norm, and return the norm before clipping."""
        scale = torch.ones((), device=self.device) if scale is None else scale
        gradients = self.gradients()
        apart = [axis.group for axis in self.axes if axis.splits_parameters]
        norm = global_norm(self._gradients_for_norm(), self.device, apart)
        norm = norm / scale.to(norm.dtype)
        clip_gradients_(gradients, norm, max_norm, scale)
        return norm

    def zero_grad(self) -> None:
        """Set all gradients to None."""
        self.model.zero_grad(set_to_none=True)

    def sum_over_data(self, tensor: Tensor) -> Tensor:
        """All-reduce `tensor` over the data-parallel ranks, in place, and return it."""
        if self.data_degree > 1:
            dist.all_reduce(tensor, group=self.data_group)
        return tensor

    def any_data_rank(self, flag: bool) -> bool:
        """Return whether the flag is set on any data-parallel rank; synchronises with them all."""
        if self.data_degree == 1:
            return flag
        return bool(self.sum_over_data(torch.tensor(int(flag), device=self.device)).item())

    def gather_data_ranks(self, value: object) -> list:
        """Return the (picklable) values of all data-parallel ranks, in rank order."""
        return all_gather_objects(value, self.data_group)
