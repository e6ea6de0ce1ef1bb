"""The loss, always as a sum: it is divided once, by the global number of valid targets."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORED = -100  # a target that counts for nothing: padding


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
        logits.flatten(0, -2), targets.flatten(), ignore_index=IGNORED,
        reduction="sum", label_smoothing=label_smoothing,
    )  # fmt: skip


def count_valid(targets: Tensor) -> Tensor:
    """Number of targets that count, as an int64 scalar."""
    return (targets != IGNORED).sum()
