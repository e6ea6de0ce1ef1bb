"""The interface of a mesh axis: its changes to a model and to a training step.

`parallelize` lists the axes in the order in which they are applied, outermost first. Losses,
gradients and logits are processed in reverse order, innermost axis first.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from parallel.collectives import all_reduce
from parallel.grad_norm import local_tensor
from parallel.model_protocol import Inputs, ParallelizableModel

LossSum = Callable[..., Tensor]  # (logits, targets, inputs, count) -> sum over valid targets
LossOf = Callable[[Tensor, int], Tensor]  # (logits, number of the micro-batch) -> loss


class MicroBatchSchedule(Protocol):
    """The order in which a rank computes the micro-batches of a step."""

    def run(self, micro_batches: list[Inputs], loss_of: LossOf) -> None:
        """Run forward and backward of all micro-batches, accumulating into `Parameter.grad`."""

    def forward(self, inputs: Inputs, cache: Any) -> Tensor | None:
        """Return the logits computed on this rank, without gradients; None if it has none."""


class ParallelAxis:
    """One axis of the mesh, with more than one rank; the default methods change nothing."""

    # Whether the mean loss is the sum of the losses computed on the ranks of the axis.
    splits_loss = False
    # Whether the ranks hold different parameters rather than shards of the same ones (a DTensor's
    # placements do not show this).
    splits_parameters = False
    # Whether DDP can wrap the modified model; otherwise FSDP also sums over the replicas.
    allows_ddp = True
    # Whether FSDP may free gathered weights between the forwards of a step.
    allows_reshard = True
    # Replaces the sequential loop over micro-batches; None = this axis has no schedule.
    schedule: MicroBatchSchedule | None = None

    def __init__(self, mesh: DeviceMesh):
        """`mesh` is the one-dimensional mesh of this axis."""
        (self.name,) = mesh.mesh_dim_names or ()
        self.group = mesh.get_group()
        # Names of the replicated parameters whose local gradient is a partial sum.
        self.partial: list[str] = []

    @property
    def degree(self) -> int:
        """Return the number of ranks along the axis."""
        return self.group.size()

    def prepare(self, model: ParallelizableModel) -> None:
        """Replace a meta-device model by this rank's part of it, in place."""

    def prepare_block(self, block: nn.Module) -> None:
        """Modify, in place, a block that is neither compiled nor activation-checkpointed."""

    def split_dim(self, name: str) -> int | None:
        """Return the dim that a parameter is split along; None = it is replicated."""
        return None

    def use_weights(self, model: ParallelizableModel, sharded: bool) -> None:
        """Set up state that needs materialised parameters; `sharded` = they are FSDP's."""

    def split_loss(self, loss_sum: LossSum) -> LossSum:
        """Return the same loss as a function of the logits that each rank of the axis holds."""
        return loss_sum

    def finish_gradients(self, model: ParallelizableModel) -> None:
        """Complete the gradients after a step's last backward; one all-reduce sums `partial`."""
        if not self.partial:
            return
        parameters = dict(model.named_parameters())
        gradients = [parameters[name].grad for name in self.partial]
        parts = [local_tensor(gradient) for gradient in gradients if gradient is not None]
        if not parts:
            return
        flat = all_reduce(torch.cat([part.flatten() for part in parts]), self.group)
        for part, total in zip(parts, flat.split([p.numel() for p in parts]), strict=True):
            part.copy_(total.view_as(part))

    def counts_in_norm(self, name: str) -> bool:
        """Return whether this rank's gradient of a parameter enters the global norm."""
        return True

    def gather_logits(self, logits: Tensor | None, inputs: Inputs, cache: Any) -> Tensor | None:
        """Return the logits gathered over the ranks of the axis; None if none of them has any."""
        return logits

    def evaluating(self) -> AbstractContextManager[None]:
        """Return a context for forwards without a backward."""
        return nullcontext()

    def state(self) -> dict[str, Tensor]:
        """Return the rank-local tensors that a checkpoint saves and loads in place, by name."""
        return {}


A = TypeVar("A", bound=ParallelAxis)


def find_axis(axes: Iterable[ParallelAxis], kind: type[A]) -> A | None:
    """Return the axis of this class; None if its degree is 1."""
    return next((axis for axis in axes if isinstance(axis, kind)), None)
