"""The loss, always as a sum: it is divided once, by the global number of valid targets."""

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from trainer.config.loss import IGNORED, LossConfig
from trainer.nn.heads import Head


def cross_entropy_sum(
    logits: Tensor,
    targets: Tensor,
    label_smoothing: float = 0.0,
    cross_entropy: Callable[..., Tensor] = F.cross_entropy,
) -> Tensor:
    """Sum over valid targets of the cross-entropy in nats; logits (…, classes), targets (…).

    Half-precision logits are raised to float32 first. Label smoothing: arXiv 1512.00567.
    `cross_entropy` is torch's, or one of that signature for a part of the classes.
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
    """Like `cross_entropy_sum` of project(hidden), in pieces whose logits never exist together.

    The backward computes a piece's logits again; hidden (…, width), targets (…).
    """

    def piece(hidden_ND: Tensor, targets_N: Tensor) -> Tensor:
        return cross_entropy_sum(project(hidden_ND), targets_N, **options)

    total = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
    pieces = hidden.flatten(0, -2).chunk(chunks), targets.flatten().chunk(chunks)
    for hidden_ND, targets_N in zip(*pieces, strict=True):
        total = total + checkpoint(
            piece, hidden_ND, targets_N, use_reentrant=False, preserve_rng_state=False
        )
    return total


def cross_entropy_loss(head: nn.Module, config: LossConfig) -> Callable[..., Tensor]:
    """Return the loss sum of a model's logits; with chunks its head leaves its last product to it.

    The returned function takes (logits or, with chunks, hidden vectors; targets; options of
    `cross_entropy_sum`).
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


class Objective(Protocol):
    """What training asks of a task: a sum over valid targets, and their number."""

    def build_loss(self, head: nn.Module, config: LossConfig) -> Callable[..., Tensor]:
        """Return (logits, targets, **options) -> sum over valid targets."""
        ...

    def count_valid(self, targets: Tensor) -> Tensor:
        """Return the number of valid targets, an int64 scalar."""
        ...


class CrossEntropy:
    """The objective of targets that are class numbers."""

    def build_loss(self, head: nn.Module, config: LossConfig) -> Callable[..., Tensor]:
        """Return the sum of cross-entropies."""
        return cross_entropy_loss(head, config)

    def count_valid(self, targets: Tensor) -> Tensor:
        """Return the number of targets that are not IGNORED."""
        return count_valid(targets)


def count_valid(targets: Tensor) -> Tensor:
    """Number of targets that count, as an int64 scalar."""
    return (targets != IGNORED).sum()
