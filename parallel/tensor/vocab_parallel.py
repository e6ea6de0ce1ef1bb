"""Vocabulary-parallel cross-entropy: classes are sharded over ranks, logits never gathered.

Megatron-LM (arXiv 1909.08053), section 3: one maximum and three sums are all-reduced per target.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from parallel.collectives import GatherRepeated, all_reduce


class VocabParallel:
    """A vocabulary of `size` classes, ceil(size / degree) per rank, sharded as by DTensor."""

    def __init__(self, size: int, group: dist.ProcessGroup):
        self.size, self.group = size, group
        self.rows = -(-size // group.size())
        self.first = min(size, group.rank() * self.rows)
        self.own = min(size - self.first, self.rows)

    def cross_entropy(
        self,
        input: Tensor,
        target: Tensor,
        *,
        ignore_index: int = -100,
        reduction: str = "sum",
        label_smoothing: float = 0.0,
    ) -> Tensor:
        """Return `F.cross_entropy` of local logits (N, local classes), summed over targets.

        `target` is (N,) class indices, or (N, size) probabilities of all classes.
        """
        assert reduction == "sum"
        if target.is_floating_point():
            assert not label_smoothing, "soft targets must be smoothed by the caller"
            own_NV = target[:, self.first : self.first + self.own]
            return _SoftCrossEntropy.apply(input, own_NV, target.sum(1), self)
        return _CrossEntropy.apply(input, target, self, ignore_index, label_smoothing)

    def local_rows(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return each token's local row and whether it is local; others map to row 0."""
        row = tokens - self.first
        mine = (row >= 0) & (row < self.own)
        return row * mine, mine

    def gather_logits(self, logits: Tensor) -> Tensor:
        """Return the logits of all classes (…, size) on every rank, which all compute the same."""
        lacking = self.rows - self.own
        logits = torch.nn.functional.pad(logits, (0, lacking)) if lacking else logits
        return GatherRepeated.apply(logits, self.size, self.group, logits.dim() - 1)


class _CrossEntropy(torch.autograd.Function):
    """Cross-entropy of class indices; the softmax is saved for the backward."""

    @staticmethod
    def forward(
        ctx: Any,
        logits_NV: Tensor,
        targets_N: Tensor,
        vocabulary: VocabParallel,
        ignored: int,
        smoothing: float,
    ) -> Tensor:
        size = vocabulary.size
        valid_N = targets_N != ignored
        place_N, mine_N = vocabulary.local_rows(targets_N)  # an ignored target is on no rank

        def sums(shifted_NV: Tensor) -> list[Tensor]:
            if not vocabulary.own:
                return [shifted_NV.sum(1)] * 2
            return [shifted_NV.gather(1, place_N[:, None])[:, 0] * mine_N, shifted_NV.sum(1)]

        share_NV, log_total_N, (target_N, all_N) = _local_softmax(logits_NV, vocabulary, sums)
        loss_N = log_total_N - (1.0 - smoothing) * target_N - smoothing / size * all_N
        ctx.save_for_backward(share_NV, place_N, mine_N, valid_N)
        ctx.smoothing, ctx.size = smoothing, size
        return torch.where(valid_N, loss_N, 0.0).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        share_NV, place_N, mine_N, valid_N = ctx.saved_tensors
        grad_NV = share_NV - ctx.smoothing / ctx.size if ctx.smoothing else share_NV.clone()
        if grad_NV.shape[1]:
            taken_N1 = (-(1.0 - ctx.smoothing) * mine_N.to(grad_NV.dtype))[:, None]
            grad_NV.scatter_add_(1, place_N[:, None], taken_N1)
        grad_NV *= (valid_N * grads[0])[:, None]
        return grad_NV, None, None, None, None


class _SoftCrossEntropy(torch.autograd.Function):
    """Cross-entropy of soft targets, probabilities whose sum over all classes may be below one."""

    @staticmethod
    def forward(
        ctx: Any, logits_NV: Tensor, likely_NV: Tensor, mass_N: Tensor, vocabulary: VocabParallel
    ) -> Tensor:
        share_NV, log_total_N, (told_N,) = _local_softmax(
            logits_NV, vocabulary, lambda shifted_NV: [(likely_NV * shifted_NV).sum(1)]
        )
        ctx.save_for_backward(share_NV, likely_NV, mass_N)
        return (mass_N * log_total_N - told_N).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        share_NV, likely_NV, mass_N = ctx.saved_tensors
        return (mass_N[:, None] * share_NV - likely_NV) * grads[0], None, None, None


def _local_softmax(
    logits_NV: Tensor, vocabulary: VocabParallel, sums: Callable[[Tensor], list[Tensor]]
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return the local softmax, the log of its denominator (N,), and further sums (N,).

    `sums` maps the local logits, minus their global maximum, to partial sums (N,), which are
    all-reduced together with the denominator.
    """
    # A rank without classes contributes the dtype's minimum.
    least_N = logits_NV.new_full((len(logits_NV),), torch.finfo(logits_NV.dtype).min)
    own_N = logits_NV.amax(1) if vocabulary.own else least_N
    shifted_NV = logits_NV - all_reduce(own_N, vocabulary.group, "max")[:, None]
    parts = sums(shifted_NV)
    share_NV = shifted_NV.exp_()
    together = torch.stack((share_NV.sum(1), *parts))
    total_N, *summed = all_reduce(together, vocabulary.group)
    share_NV /= total_N[:, None]
    return share_NV, total_N.log(), summed
