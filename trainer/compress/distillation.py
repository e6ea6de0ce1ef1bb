"""Knowledge distillation: train a model on a trained teacher's outputs for the same samples."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from trainer.compress.hidden_states import hidden_states
from trainer.model import Transformer
from trainer.nn.sequence import Context, Flow, Inputs, Sequences


@dataclass(frozen=True)
class TeacherOutput:
    """A teacher's outputs for the micro-batch with these `targets`."""

    targets: Tensor
    logits: Tensor | None  # all classes at all positions; None if not requested
    states: dict[int, Tensor]  # hidden states at all positions, by block index


@torch.no_grad()
def run_teacher(
    teacher: Transformer, inputs: Inputs, blocks: Iterable[int], logits: bool
) -> TeacherOutput:
    """Run the teacher on a micro-batch; return the hidden states of `blocks`, and its logits.

    Without `logits` the forward ends after the last of `blocks`.
    """
    recorded: dict[int, Tensor] = {}

    def record(number: int, flow: Flow, _streams: Sequences, _inputs: Inputs) -> Flow:
        recorded[number] = hidden_states(teacher.blocks[str(number)], flow)
        return flow

    teacher.block_hooks = {str(number): [partial(record, number)] for number in blocks}
    last = teacher.depth - 1 if logits else max(blocks)
    output = teacher(inputs, blocks=[str(number) for number in range(last + 1)])
    return TeacherOutput(inputs["targets"], output if logits else None, recorded)


def local_logits(logits: Tensor, context: Context) -> Tensor:
    """Return the logits at the local positions, given those at all positions."""
    # a classifier has no positions
    return context.take_local(logits) if logits.dim() > 2 else logits


def recorded_teacher_logits(inputs: Inputs, classes: int, context: Context) -> Tensor:
    """Return full logits (…, classes) at the local positions from a teacher's recorded top-k ones.

    Classes that were not recorded get -inf.
    """
    logits, indices = (
        local_logits(inputs[f"answer_{name}"], context) for name in ("logits", "classes")
    )
    all_classes = logits.new_full((*logits.shape[:-1], classes), -torch.inf)
    return all_classes.scatter_(-1, indices.long(), logits)
