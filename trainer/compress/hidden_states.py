"""Hidden states: behind some blocks a model's vectors learn to be as alike as its teacher's are."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.config.loss import IGNORED
from trainer.model import Transformer
from trainer.nn.layers import Block
from trainer.nn.sequence import Flow, Inputs, Stream


def states(block: nn.Module, flow: Flow) -> Tensor:
    """Return what a block has made, of what flows behind it.

    Of the encoder's last one the memory.
    """
    assert isinstance(block, Block)
    made = flow[0] if block.turn_norm is None else flow[1]
    assert made is not None
    return made


def apart_sum(ours_BSD: Tensor, theirs_BSE: Tensor, valid_BS: Tensor, targets_B: Tensor) -> Tensor:
    """Return how differently two models relate the positions of a sample to each other, summed.

    Of each sample the mean, over pairs of valid positions, of the squared difference between the
    cosine similarities of our vectors and of theirs, times the sample's number of valid targets.
    Half precision is raised to float32 first. Similarity-preserving distillation (arXiv
    1907.09682), between the positions of a sample: the widths may differ.
    """
    apart_BSS = (_similar(ours_BSD) - _similar(theirs_BSE)).square()
    both_BSS = valid_BS[:, :, None] & valid_BS[:, None, :]
    pairs_B = both_BSS.sum((1, 2)).clamp(min=1)
    return (torch.where(both_BSS, apart_BSS, 0.0).sum((1, 2)) / pairs_B * targets_B).sum()


def _similar(x_BSD: Tensor) -> Tensor:
    x_BSD = x_BSD.to(torch.promote_types(x_BSD.dtype, torch.float32))
    x_BSD = F.normalize(x_BSD, dim=-1)
    return x_BSD @ x_BSD.mT


def learn(
    model: Transformer,
    name: str,
    flow: Flow,
    streams: dict[str, Stream],
    inputs: Inputs,
    said_BSE: Tensor,
    weight: float,
) -> Flow:
    """Return the flow behind a block, whose gradient will be that of `apart_sum` too, `weight`
    times.

    `said_BSE` is what the teacher's block has made of all positions. The loss is taken here, since
    the rank may have no logits: its share is counted in, and its gradient waits for the backward.
    """
    assert model.share_of_mean is not None
    block = model.blocks[name]
    assert isinstance(block, Block)
    stream, made, whole = streams[block.stream], states(block, flow), block.turn_norm is not None
    all_BSD = made.detach() if whole else stream.layout.collected(made.detach(), stream.length)
    targets = inputs["targets"]
    counts = targets != IGNORED
    valid_BS = counts
    if block.stream == "source":
        valid_BS = inputs.get("source_valid", counts.new_ones(all_BSD.shape[:2]))
    with torch.enable_grad():
        apart = apart_sum(
            all_BSD.requires_grad_(), said_BSE, valid_BS, counts.reshape(len(counts), -1).sum(1)
        )
        (gradient_BSD,) = torch.autograd.grad(model.share_of_mean(weight * apart), all_BSD)
    split = stream.layout.share if whole else stream.layout.own
    joined = _Joined.apply(made, split(gradient_BSD))
    return (joined, *flow[1:]) if not whole else (flow[0], joined, flow[2])


class _Joined(torch.autograd.Function):
    """x as it is; another gradient joins its own on the way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] + ctx.saved_tensors[0], None
