"""Hidden-state distillation: match the teacher's similarities between positions at some blocks."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.config.loss import IGNORED
from trainer.model import Transformer
from trainer.nn.auxiliary_loss import AttachGradient
from trainer.nn.layers import Block
from trainer.nn.sequence import Flow, Inputs, Sequences


def hidden_states(block: nn.Module, flow: Flow) -> Tensor:
    """Return a block's hidden states from its output flow; the memory for the last encoder block.

    The last encoder block is that of an encoder-decoder.
    """
    assert isinstance(block, Block)
    hidden = flow[0] if block.turn_norm is None else flow[1]
    assert hidden is not None
    return hidden


def similarity_loss_sum(
    ours_BSD: Tensor, theirs_BSE: Tensor, valid_BS: Tensor, targets_B: Tensor
) -> Tensor:
    """Return the difference between two models' position similarities, summed over valid targets.

    Per sample: the mean, over pairs of valid positions, of the squared difference between the
    cosine similarities of the student's vectors and of the teacher's, times the sample's number of
    valid targets. Half precision is cast to float32 first. Similarity-preserving distillation
    (arXiv 1907.09682), between the positions of a sample, so that the widths may differ.
    """
    difference_BSS = (_cosine_similarities(ours_BSD) - _cosine_similarities(theirs_BSE)).square()
    both_BSS = valid_BS[:, :, None] & valid_BS[:, None, :]
    pairs_B = both_BSS.sum((1, 2)).clamp(min=1)
    return (torch.where(both_BSS, difference_BSS, 0.0).sum((1, 2)) / pairs_B * targets_B).sum()


def _cosine_similarities(x_BSD: Tensor) -> Tensor:
    x_BSD = x_BSD.to(torch.promote_types(x_BSD.dtype, torch.float32))
    x_BSD = F.normalize(x_BSD, dim=-1)
    return x_BSD @ x_BSD.mT


def add_hidden_state_loss(
    model: Transformer,
    name: str,
    flow: Flow,
    streams: Sequences,
    inputs: Inputs,
    said_BSE: Tensor,
    weight: float,
) -> Flow:
    """Add the hidden-state loss after a block; return the flow with its gradient attached.

    The loss is `weight` times `similarity_loss_sum`; `said_BSE` are the teacher's hidden states at
    all positions. It is computed in the forward, since the rank may have no logits: its share of
    the mean loss is added to the total, and its gradient is added during the backward.
    """
    assert model.scale_auxiliary_loss is not None
    block = model.blocks[name]
    assert isinstance(block, Block)
    stream, hidden, full = (
        streams[block.stream],
        hidden_states(block, flow),
        block.turn_norm is not None,
    )
    all_BSD = hidden.detach()
    all_BSD = all_BSD if full else stream.layout.gather_replicated(all_BSD, stream.length)
    targets = inputs["targets"]
    counts = targets != IGNORED
    valid_BS = counts
    if block.stream == "source":
        valid_BS = inputs.get("source_valid", counts.new_ones(all_BSD.shape[:2]))
    with torch.enable_grad():
        loss_sum = similarity_loss_sum(
            all_BSD.requires_grad_(), said_BSE, valid_BS, counts.reshape(len(counts), -1).sum(1)
        )
        (gradient_BSD,) = torch.autograd.grad(
            model.scale_auxiliary_loss(weight * loss_sum), all_BSD
        )
    to_local = stream.layout.gradient_contribution if full else stream.layout.local_positions
    hidden = AttachGradient.apply(hidden, hidden, to_local(gradient_BSD))
    return (hidden, *flow[1:]) if not full else (flow[0], hidden, flow[2])
