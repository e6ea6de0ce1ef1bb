"""A smaller student: a model learns from what a trained one says of the same samples."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from trainer.compress.hidden_states import states
from trainer.config.loss import IGNORED
from trainer.model import Transformer
from trainer.nn.sequence import Context, Flow, Inputs, Stream


@dataclass(frozen=True)
class Said:
    """A teacher's logits for the `targets` of a micro-batch."""

    targets: Tensor
    logits: Tensor | None  # of all classes at all positions, if they were asked for
    states: dict[int, Tensor]  # what its blocks have made of all positions, by their numbers


@torch.no_grad()
def ask(teacher: Transformer, inputs: Inputs, blocks: Iterable[int], logits: bool) -> Said:
    """Return what the teacher says of a micro-batch: what these blocks make of it, and its
    logits.
    """
    made: dict[int, Tensor] = {}

    def look(number: int, flow: Flow, _streams: dict[str, Stream], _inputs: Inputs) -> Flow:
        made[number] = states(teacher.blocks[str(number)], flow)
        return flow

    teacher.watchers = {str(number): partial(look, number) for number in blocks}
    last = teacher.depth - 1 if logits else max(blocks)
    said = teacher(inputs, blocks=[str(number) for number in range(last + 1)])
    return Said(inputs["targets"], said if logits else None, made)


def part_of(logits: Tensor, context: Context) -> Tensor:
    """Return the logits of those positions of whole sequences that are here."""
    return context.take(logits) if logits.dim() > 2 else logits  # a classifier has no positions


def kept_answer(inputs: Inputs, classes: int, context: Context) -> Tensor:
    """Logits of so many classes, at the positions that are here, from those that were kept.

    Of the others nothing is known: they count as impossible.
    """
    logits, places = (part_of(inputs[f"answer_{name}"], context) for name in ("logits", "classes"))
    all_classes = logits.new_full((*logits.shape[:-1], classes), -torch.inf)
    return all_classes.scatter_(-1, places.long(), logits)


def divergence_sum(
    logits: Tensor,
    teacher_logits: Tensor,
    targets: Tensor,
    temperature: float,
    cross_entropy: Callable[..., Tensor] = F.cross_entropy,
) -> Tensor:
    """Sum over valid targets of KL(teacher || student) in nats, both at a temperature.

    Logits (…, classes), targets (…); half-precision logits are raised to float32 first. With a
    `cross_entropy` for a part of the classes the student's logits are of that part. Knowledge
    distillation: arXiv 1503.02531, section 2, without its factor temperature².
    """
    precise = torch.promote_types(logits.dtype, torch.float32)
    log_likely_NV = (teacher_logits.flatten(0, -2).to(precise) / temperature).log_softmax(-1)
    # Nothing is likely where a target counts for nothing: there both terms are zero.
    valid_N1 = (targets != IGNORED).flatten()[:, None]
    likely_NV = torch.where(valid_N1, log_likely_NV.exp(), 0.0)
    scaled_NV = logits.flatten(0, -2).to(precise) / temperature
    # KL is the cross-entropy of the student less the teacher's own.
    own = torch.special.entr(likely_NV).sum()
    return cross_entropy(scaled_NV, likely_NV, reduction="sum") - own
