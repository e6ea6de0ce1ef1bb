"""The worker: one face for a model under any strategy, so that the loop names none."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from parallel.gradients import clip, global_norm
from parallel.mesh import data_mesh
from parallel.tensor import TensorSplit

MicroBatch = dict[str, Tensor]
LossSum = Callable[..., Tensor]  # (logits, targets) -> sum over valid targets
CountValid = Callable[[Tensor], Tensor]  # targets -> number of valid ones


class Worker:
    """A parallelised model with what a training step asks of it."""

    def __init__(self, model: nn.Module, wrapped: nn.Module, mesh: DeviceMesh,
                 device: torch.device, loss_sum: LossSum, count_valid: CountValid,
                 split: TensorSplit | None = None):  # fmt: skip
        self.model = model  # the Transformer itself: canonical names of parameters
        self.mesh = mesh
        self.device = device
        data = data_mesh(mesh)
        self.data_group = data.get_group()
        self.data_rank = data.get_local_rank()
        self.data_degree = data.size()
        self._wrapped = wrapped  # what a training forward goes through
        self._loss_sum = loss_sum
        self._count_valid = count_valid
        self.split = split  # of the layers over the tensor axis

    def to_device(self, micro_batch: MicroBatch) -> MicroBatch:
        """The micro-batch on this rank's device, copied without waiting where memory is pinned."""
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
        total = torch.zeros((), device=self.device)
        last = len(micro_batches) - 1
        for i, micro_batch in enumerate(micro_batches):
            inputs = self.to_device(micro_batch)
            with self._reducing(i == last):
                logits = self._wrapped(inputs)
                loss = self._loss_sum(logits, inputs["targets"])
                loss = loss / count.clamp(min=1).to(loss.dtype)
                (loss if scale is None else loss * scale).backward()
            total = total.to(loss.dtype) + loss.detach()
        if self.split is not None:
            self.split.finish_gradients(self.model)
        return total, count

    def forward(self, *inputs: Any) -> Tensor:
        """The model's logits, all classes on every rank; inside `evaluating` only."""
        logits = self.model(*inputs)
        return logits if self.split is None else self.split.vocabulary.gather(logits)

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

    def gradients(self) -> list[Tensor]:
        """The gradients, in the order of the parameters."""
        return [p.grad for p in self.model.parameters() if p.grad is not None]

    def clip_grad_norm(self, max_norm: float, scale: Tensor | None = None) -> Tensor:
        """Undo `scale`, clip to the global norm, and return the norm before clipping."""
        scale = torch.ones((), device=self.device) if scale is None else scale
        gradients = self.gradients()
        norm = global_norm(gradients, self.device)
        norm = norm / scale.to(norm.dtype)
        clip(gradients, norm, max_norm, scale)
        return norm

    def zero_grad(self) -> None:
        """Forget the gradients."""
        self.model.zero_grad(set_to_none=True)

    def sum_over_data(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks that see different samples, in place."""
        if self.data_degree > 1:
            dist.all_reduce(tensor, group=self.data_group)
        return tensor

    def any_over_data(self, flag: bool) -> bool:
        """Whether the flag is up on any rank that sees different samples; waits for all of them."""
        if self.data_degree == 1:
            return flag
        return bool(self.sum_over_data(torch.tensor(int(flag), device=self.device)).item())

    def gather_over_data(self, value: object) -> list:
        """Every such rank's (picklable) value, in rank order."""
        values: list = [None] * self.data_degree
        dist.all_gather_object(values, value, group=self.data_group)
        return values
