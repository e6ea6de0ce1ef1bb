"""Loss functions, always sums: divided once, by the global number of valid targets."""

import math
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

PARTS = 16  # logits are computed for a multiple of this part of a micro-batch's rows


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


def rows_of_logits(rows: int, count: int) -> int:
    """Return how many of a micro-batch's rows have logits, if up to `count` have a valid target."""
    unit = math.ceil(rows / PARTS)
    return min(rows, math.ceil(count / unit) * unit)


def select_valid(hidden_ND: Tensor, targets_N: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the rows with a valid target, of which there are at most `count`, and their targets.

    With few different numbers of rows, for the sake of the allocator; those too many are IGNORED.
    By `count` the host knows the number: nothing waits for the device.
    """
    rows = rows_of_logits(len(targets_N), count)
    if rows == len(targets_N):
        return hidden_ND, targets_N
    index_M = torch.nonzero_static(targets_N != IGNORED, size=rows, fill_value=-1).flatten()
    chosen_M = index_M.clamp(min=0)
    targets_M = torch.where(index_M >= 0, targets_N.index_select(0, chosen_M), IGNORED)
    return hidden_ND.index_select(0, chosen_M), targets_M


def projected_cross_entropy_sum(
    hidden: Tensor,
    targets: Tensor,
    count: int,
    project: Callable[[Tensor], Tensor],
    chunks: int,
    **options: Any,
) -> Tensor:
    """Return `cross_entropy_sum` of project(hidden), without logits where no target is valid.

    hidden (…, width), targets (…); `count` bounds the number of valid ones (`select_valid`). With
    several chunks the logits of each are freed at once, and recomputed in the backward.
    """

    def chunk_sum(hidden_ND: Tensor, targets_N: Tensor) -> Tensor:
        return cross_entropy_sum(project(hidden_ND), targets_N, **options)

    hidden_ND, targets_N = select_valid(hidden.flatten(0, -2), targets.flatten(), count)
    if chunks == 1:
        return chunk_sum(hidden_ND, targets_N)
    total = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
    parts = hidden_ND.chunk(chunks), targets_N.chunk(chunks)
    for hidden_ND, targets_N in zip(*parts, strict=True):
        total = total + checkpoint(
            chunk_sum, hidden_ND, targets_N, use_reentrant=False, preserve_rng_state=False
        )
    return total


def divergence_sum(
    logits: Tensor,
    teacher_logits: Tensor,
    targets: Tensor,
    temperature: float,
    cross_entropy: Callable[..., Tensor] = F.cross_entropy,
) -> Tensor:
    """Return KL(teacher || student) in nats at a temperature, summed over valid targets.

    Logits (…, classes), targets (…); half-precision logits are cast to float32 first. If
    `cross_entropy` is that of a vocabulary shard, the student's logits are those of the shard.
    Knowledge distillation: arXiv 1503.02531, section 2, without its factor temperature².
    """
    precise = torch.promote_types(logits.dtype, torch.float32)
    log_probability_NV = (teacher_logits.flatten(0, -2).to(precise) / temperature).log_softmax(-1)
    # Zero probabilities at ignored targets make both terms zero.
    valid_N1 = (targets != IGNORED).flatten()[:, None]
    probability_NV = torch.where(valid_N1, log_probability_NV.exp(), 0.0)
    scaled_NV = logits.flatten(0, -2).to(precise) / temperature
    # KL is the cross-entropy minus the teacher's entropy.
    entropy = torch.special.entr(probability_NV).sum()
    return cross_entropy(scaled_NV, probability_NV, reduction="sum") - entropy


def ctc_divergence_sum(
    logits_BTV: Tensor, teacher_BTV: Tensor, targets_BT: Tensor, temperature: float
) -> Tensor:
    """Return KL(teacher || student) in nats of the vectors of utterances, for targets of `ctc_sum`.

    Of an utterance it is a mean over its vectors, times its number of targets.
    """
    precise = torch.promote_types(logits_BTV.dtype, torch.float32)
    ours_BTV, theirs_BTV = (
        (logits.to(precise) / temperature).log_softmax(-1) for logits in (logits_BTV, teacher_BTV)
    )
    nats_BT = (theirs_BTV.exp() * (theirs_BTV - ours_BTV)).sum(-1)
    valid_BT, counts_B = targets_BT != IGNORED, (targets_BT >= 0).sum(1)
    mean_B = torch.where(valid_BT, nats_BT, 0.0).sum(1) / valid_BT.sum(1).clamp(min=1)
    return (mean_B * counts_B).sum()


class Objective(Protocol):
    """Training objective of a task: a loss sum over valid targets, and their count.

    With `splits_classes` the loss is made of cross-entropies, which tensor parallelism computes
    from each rank's classes; else it gets the logits of all classes, and no options.
    """

    splits_classes: bool

    def build_loss(self, head: nn.Module, config: LossConfig) -> Callable[..., Tensor]:
        """Return (logits, targets, count, **options) -> sum over valid targets.

        `count` is the number of valid targets before ranks share a sequence, as the host knows it.
        """
        ...

    def count_valid(self, targets: Tensor) -> Tensor:
        """Return the number of valid targets, an int64 scalar."""
        ...

    @property
    def divergence_sum(self) -> Callable[..., Tensor]:
        """Return (logits, teacher's logits, targets, temperature, **options) -> sum over targets.

        That is how far the logits are from a teacher's, over valid targets.
        """
        ...


class CrossEntropy:
    """Cross-entropy objective for targets that are class indices."""

    splits_classes = True
    divergence_sum: Callable[..., Tensor] = staticmethod(divergence_sum)

    def build_loss(self, head: nn.Module, config: LossConfig) -> Callable[..., Tensor]:
        """Return the loss-sum function; `head` defers its projection to it if nobody else reads it.

        It takes (hidden states or logits; targets; count; options of `cross_entropy_sum`).
        """
        assert isinstance(head, Head)
        head.defers_output = not head.shows_logits
        return partial(
            projected_cross_entropy_sum,
            project=head.output if head.defers_output else nn.Identity(),
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
    divergence_sum: Callable[..., Tensor] = staticmethod(ctc_divergence_sum)

    def build_loss(self, head: nn.Module, config: LossConfig) -> Callable[..., Tensor]:
        """Return the loss-sum function of logits and targets."""
        return lambda logits_BTV, targets_BT, count: ctc_sum(logits_BTV, targets_BT)

    def count_valid(self, targets: Tensor) -> Tensor:
        """Return the number of classes to predict, an int64 scalar."""
        return (targets >= 0).sum()
