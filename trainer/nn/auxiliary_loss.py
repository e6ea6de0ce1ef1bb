"""Auxiliary losses: of a head behind a block in front of the last one."""

# B batch, Q queries, D width, V logits.

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from trainer.nn.heads import Head
from trainer.nn.sequence import SequenceInfo


def attach_loss(
    x_BQD: Tensor, head: Head, stream: SequenceInfo, loss_of: Callable[[Tensor], Tensor]
) -> Tensor:
    """Return a block's output with the gradient of the loss of a head behind it.

    `loss_of` takes the logits of all positions and returns the loss to differentiate. It is
    computed in the forward, since the rank may have no other logits; its gradient flows in the
    backward. The head works on the local positions, all ranks that share them have the whole loss.
    """
    logits_BQV = head.output(head.normalized(x_BQD))
    known_BQV = stream.layout.gather_replicated(logits_BQV.detach(), stream.length)
    with torch.enable_grad():
        whole_BQV = head.pooled(known_BQV.requires_grad_(), stream)
        (gradient_BQV,) = torch.autograd.grad(loss_of(whole_BQV), known_BQV)
    gradient_BQV = stream.layout.local_positions(gradient_BQV)
    return AttachGradient.apply(x_BQD, logits_BQV, gradient_BQV)


class AttachGradient(torch.autograd.Function):
    """Identity of x in the forward; in the backward, `source` gets a given gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, source: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0], ctx.saved_tensors[0], None
