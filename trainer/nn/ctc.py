"""CTC (Graves 2006): the loss, and its branch beside a decoder."""

# B batch, S tokens, T vectors of the source, D width, V vocabulary.

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.config.loss import BLANK, IGNORED, NO_CHARACTER
from trainer.config.train import ModelConfig
from trainer.nn.layers import Linear
from trainer.nn.sequence import Flow, Inputs, SequenceInfo, SequenceLayout


def ctc_sum(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Return the CTC loss in nats, summed over utterances (Graves 2006, eq. 14).

    Targets are the classes of an utterance, then NO_CHARACTER up to its last vector, and IGNORED
    behind it; class BLANK is none of them. Computed in float32 or wider. An utterance that has
    fewer vectors than it needs has an infinite loss; one without targets has none.
    """
    precise = torch.promote_types(logits_BTV.dtype, torch.float32)
    log_probability_TBV = logits_BTV.to(precise).log_softmax(-1).transpose(0, 1)
    counts_B = (targets_BT >= 0).sum(1)
    vectors_B = (targets_BT != IGNORED).sum(1)
    # int64 targets: cuDNN's kernel, which takes int32, is known for gradients of NaN.
    loss_B = F.ctc_loss(
        log_probability_TBV,
        targets_BT.clamp(min=0),
        torch.where(counts_B > 0, vectors_B, targets_BT.shape[1]),
        counts_B,
        blank=BLANK,
        reduction="none",
    )
    return torch.where(counts_B > 0, loss_B, 0.0).sum()


class CTCBranch(nn.Module):
    """The logits of CTC for the vectors that an encoder gives to its decoder.

    Their loss is a share of the training's (Watanabe et al. 2017, arXiv 1609.06773): it finds out
    in order what is said where, before attention does. Nothing else reads them.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.weight, self.stride = config.ctc_weight, config.audio_stride
        self.output = Linear(config.width, config.vocab_size, bias=False)

    def forward(
        self,
        flow: Flow,
        stream: SequenceInfo,
        inputs: Inputs,
        scale: Callable[[Tensor], Tensor] | None,
    ) -> Flow:
        """Return the flow as it is; the backward of its memory is that of the loss too.

        `scale` is the model's `scale_auxiliary_loss`; without it, outside of a step, there is no
        loss. Every rank that shares samples computes the loss of all their vectors: of the context
        axis the first one has targets, and the gradient of logits that the ranks of the tensor axis
        share is counted once.
        """
        x, memory_BTD, marks = flow
        assert memory_BTD is not None
        if scale is None:
            return flow
        whole_BTD = stream.context.gather_sequence(memory_BTD, stream.total)
        logits_BTV = _CountOnce.apply(self.output(whole_BTD), stream.layout)
        targets_BT = transcript_targets(inputs, stream.total, self.stride)
        if stream.context.shares and not stream.context.first:
            targets_BT = torch.full_like(targets_BT, IGNORED)
        loss = scale(self.weight * ctc_sum(logits_BTV, targets_BT))
        return x, _AttachLoss.apply(memory_BTD, loss), marks


def transcript_targets(inputs: Inputs, vectors: int, stride: int) -> Tensor:
    """Return targets of CTC (B, vectors), as `ctc_sum` takes them, of a decoder's targets.

    They are the valid ones but the last, which is the end token.
    """
    targets_BS, frames = inputs["targets"], inputs["source"].shape[1]
    valid_BS = targets_BS != IGNORED
    order_BS = valid_BS.long().argsort(dim=1, descending=True, stable=True)
    counts_B1 = (valid_BS.sum(1, keepdim=True) - 1).clamp(min=0)
    heard_B1 = torch.full_like(counts_B1, -(-frames // stride))
    if "source_valid" in inputs:
        heard_B1 = inputs["source_valid"].sum(1, keepdim=True)
    missing = max(0, vectors - targets_BS.shape[1])
    packed_BT = F.pad(targets_BS.gather(1, order_BS), (0, missing))[:, :vectors]
    place_T = torch.arange(vectors, device=targets_BS.device)
    packed_BT = torch.where(place_T < counts_B1, packed_BT, NO_CHARACTER)
    return torch.where(place_T < heard_B1, packed_BT, IGNORED)


class _CountOnce(torch.autograd.Function):
    """Identity; the gradient is that of a tensor that every rank of the layout has."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: SequenceLayout) -> Tensor:
        ctx.layout = layout
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.layout.gradient_contribution(grads[0]), None


class _AttachLoss(torch.autograd.Function):
    """Identity; the backward of what comes out is that of a loss too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        ctx.save_for_backward(loss)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        return grads[0], torch.ones_like(ctx.saved_tensors[0])
