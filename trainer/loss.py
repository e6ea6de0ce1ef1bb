"""Loss functions, always sums: divided once, by the global number of valid targets."""

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from trainer.config.loss import IGNORED, LossConfig
from trainer.nn.ctc import ctc_sum
from trainer.nn.heads import Head


def cross_entropy_sum(
    logits: Tensor,
    targets: Tensor,
    label_smoothing: float = 0.0,
    cross_entropy: Callable[..., Tensor] = F.cross_entropy,
) -> Tensor:
    """Return the cross-entropy in nats, summed over valid targets.

    logits (…, classes), targets (…). Half-precision logits are cast to float32 first. Label
    smoothing: arXiv 1512.00567. `cross_entropy` is torch's, or a function of the same signature
    for a vocabulary shard of the logits.
    """
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()
    return cross_entropy(
        logits.flatten(0, -2),
        targets.flatten(),
        ignore_index=IGNORED,
        reduction="sum",
        label_smoothing=label_smoothing,
    )


def chunked_cross_entropy_sum(
    hidden: Tensor,
    targets: Tensor,
    project: Callable[[Tensor], Tensor],
    chunks: int,
    **options: Any,
) -> Tensor:
    """Return `cross_entropy_sum` of project(hidden), computed chunk by chunk to save memory.

    The backward recomputes the logits of each chunk; hidden (…, width), targets (…).
    """

    def chunk_sum(hidden_ND: Tensor, targets_N: Tensor) -> Tensor:
        return cross_entropy_sum(project(hidden_ND), targets_N, **options)

    total = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
    parts = hidden.flatten(0, -2).chunk(chunks), targets.flatten().chunk(chunks)
    for hidden_ND, targets_N in zip(*parts, strict=True):
        total = total + checkpoint(
            chunk_sum, hidden_ND, targets_N, use_reentrant=False, preserve_rng_state=False
        )
    return total


class Objective(Protocol):
    """Training objective of a task: a loss sum over valid targets, and their count.

    With `splits_classes` the loss is made of cross-entropies, which tensor parallelism computes
    from each rank's classes; else it gets the logits of all classes, and no options.
    """

    splits_classes: bool

    def build_loss(self, head: nn.Module, config: LossConfig) -> Callable[..., Tensor]:
        """Return (logits, targets, **options) -> sum over valid targets."""
        ...

    def count_valid(self, targets: Tensor) -> Tensor:
        """Return the number of valid targets, an int64 scalar."""
        ...


class CrossEntropy:
    """Cross-entropy objective for targets that are class indices."""

    splits_classes = True

    def build_loss(self, head: nn.Module, config: LossConfig) -> Callable[..., Tensor]:
        """Return the loss-sum function; with chunks > 1, `head` defers its projection to it.

        It takes (logits or, with chunks, hidden states; targets; options of `cross_entropy_sum`).
        """
        if config.chunks == 1:
            return partial(cross_entropy_sum, label_smoothing=config.label_smoothing)
        assert isinstance(head, Head)
        head.defers_output = True
        return partial(
            chunked_cross_entropy_sum,
            project=head.output,
            chunks=config.chunks,
            label_smoothing=config.label_smoothing,
        )

    def count_valid(self, targets: Tensor) -> Tensor:
        """Return the number of targets that are not IGNORED."""
        return count_valid(targets)


def count_valid(targets: Tensor) -> Tensor:
    """Return the number of targets that are not IGNORED, an int64 scalar."""
    return (targets != IGNORED).sum()


class CTC:
    """CTC objective for targets as `ctc_sum` takes them."""

    splits_classes = False

    def build_loss(self, head: nn.Module, config: LossConfig) -> Callable[..., Tensor]:
        """Return the loss-sum function of logits and targets."""
        return ctc_sum

    def count_valid(self, targets: Tensor) -> Tensor:
        """Return the number of classes to predict, an int64 scalar."""
        return (targets >= 0).sum()
