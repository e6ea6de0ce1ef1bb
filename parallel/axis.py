"""What a mesh axis does to a model and to a training step: one interface for all of them.

`parallelize` lists the axes in the order in which they are applied, outermost first. Whatever a
step has to undo or bring together, it does from the innermost axis out.
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

LossSum = Callable[..., Tensor]  # (logits, targets, inputs) -> sum over valid targets
LossOf = Callable[[Tensor, int], Tensor]  # (logits, number of the micro-batch) -> loss


class MicroBatchSchedule(Protocol):
    """In which order a rank computes the micro-batches of a step."""

    def run(self, micro_batches: list[Inputs], loss_of: LossOf) -> None:
        """Forward and backward of all micro-batches; gradients are left in the parameters."""

    def forward(self, inputs: Inputs, cache: Any) -> Tensor | None:
        """Return the logits as this rank computes them, without gradients; None if it does not."""


class ParallelAxis:
    """One axis of the mesh, with more than one rank. What an axis leaves as it is here, it does
    not change.
    """

    # Whether the mean loss is the sum of what the axis's ranks have counted in.
    splits_loss = False
    # Whether its ranks have other parameters, not parts of the same: DTensor does not tell.
    splits_parameters = False
    # Whether DDP can wrap what the axis makes of a model; else FSDP sums over copies too.
    allows_ddp = True
    # Whether FSDP may free gathered weights between the forwards of a step.
    allows_reshard = True
    # In place of one micro-batch after another.
    schedule: MicroBatchSchedule | None = None

    def __init__(self, mesh: DeviceMesh):
        """`mesh` has the axis alone."""
        (self.name,) = mesh.mesh_dim_names or ()
        self.group = mesh.get_group()
        # Names of the parameters that every rank has whole, but of whose gradient only a part.
        self.partial: list[str] = []

    @property
    def degree(self) -> int:
        """Return the number of ranks along the axis."""
        return self.group.size()

    def prepare(self, model: ParallelizableModel) -> None:
        """Change a model on the meta device, in place, to this rank's part of it."""

    def prepare_block(self, block: nn.Module) -> None:
        """Change a block whose backward recomputes nothing."""

    def split_dim(self, name: str) -> int | None:
        """Return the dim that a parameter is split along; None = it is replicated."""
        return None

    def use_weights(self, model: ParallelizableModel, sharded: bool) -> None:
        """Take notice of the parameters, which are there now; `sharded`: they are FSDP's."""

    def split_loss(self, loss_sum: LossSum) -> LossSum:
        """Return the same sum of logits as the axis's ranks have them."""
        return loss_sum

    def finish_gradients(self, model: ParallelizableModel) -> None:
        """Complete the gradients after a step's last backward; sum partial ones, all at once."""
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

    def gather_logits(self, logits: Tensor | None, inputs: Inputs, cache: Any) -> Tensor | None:
        """Return the logits that the axis's ranks have together; None where none of them has."""
        return logits

    def evaluating(self) -> AbstractContextManager[None]:
        """Return a context in which forwards have no backward."""
        return nullcontext()

    def state(self) -> dict[str, Tensor]:
        """Return what this rank alone keeps from step to step, by name: to be saved, and to be
        loaded into.
        """
        return {}


A = TypeVar("A", bound=ParallelAxis)


def find_axis(axes: Iterable[ParallelAxis], kind: type[A]) -> A | None:
    """Return the axis of this kind; None where it has one rank."""
    return next((axis for axis in axes if isinstance(axis, kind)), None)
