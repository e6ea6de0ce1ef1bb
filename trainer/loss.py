"""The loss, always as a sum: it is divided once, by the global number of valid targets."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from trainer.config.loss import IGNORED


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


def count_valid(targets: Tensor) -> Tensor:
    """Number of targets that count, as an int64 scalar."""
    return (targets != IGNORED).sum()
