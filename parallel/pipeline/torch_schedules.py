"""torch's schedules: their actions, read without a process group, and their split backward."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.pipelining import schedules
from torch.distributed.pipelining._backward import stage_backward_weight

from parallel.pipeline.schedules import SCHEDULES, stages_of
from parallel.pipeline.simulator import KINDS, Action


class _OneFOneB(schedules.Schedule1F1B):
    """1F1B with fewer micro-batches than stages too, which torch's class rejects but can run."""

    def __init__(self, *args: Any, **options: Any):
        schedules.PipelineScheduleSingle.__init__(self, *args, **options)


def schedule_class(schedule: str) -> Any:
    """Return torch's class of a schedule."""
    return _OneFOneB if schedule == "1f1b" else getattr(schedules, SCHEDULES[schedule].torch_class)


class _Stage:
    """A fake stage that records the actions that a schedule calls."""

    def __init__(self, stage: int, stages: int, rank: int, ranks: int):
        self.stage_index, self.num_stages = stage, stages
        self.group_rank, self.group_size = rank, ranks
        self.is_first, self.is_last = stage == 0, stage == stages - 1
        self.submod = None
        self.ran: list[Action] = []

    def forward_one_chunk(self, micro_batch: int, *args: Any, **options: Any) -> None:
        self.ran.append(Action(self.stage_index, "F", micro_batch))

    def backward_one_chunk(self, micro_batch: int, *args: Any, **options: Any) -> None:
        self.ran.append(Action(self.stage_index, "B", micro_batch))

    def perform_reduce_grad(self, *args: Any) -> None:
        """Do nothing: there are no gradients."""

    def no_messages(self, micro_batch: int) -> list[Any]:
        return []

    get_fwd_recv_ops = get_fwd_send_ops = get_bwd_recv_ops = get_bwd_send_ops = no_messages
    release_fwd_send_outputs = no_messages  # asked for since torch 2.15


def list_actions(
    schedule: str, ranks: int, stages_per_rank: int, micro_batches: int
) -> dict[int, list[Action]]:
    """Return the compute actions of each pipeline rank, in order.

    An overlapped forward and backward of DualPipeV are two actions, the first with joined=True.
    Raises torch's ValueError for arguments that it rejects.
    """
    torch_class = schedule_class(schedule)
    stages = {
        rank: [
            _Stage(stage, ranks * stages_per_rank, rank, ranks)
            for stage in stages_of(schedule, rank, ranks, stages_per_rank)
        ]
        for rank in range(ranks)
    }
    if not issubclass(torch_class, schedules.PipelineScheduleSingle):
        order = torch_class(stages[0], micro_batches).pipeline_order_with_comms
        return {rank: _compute_actions(order[rank]) for rank in range(ranks)}
    # In torch 2.13 the action list of 1F1B is wrong for the last rank (micro-batch 0 is missing,
    # another is superfluous), so these classes are run on a recording stage instead.
    # One object for all ranks: each that is built lists the actions of every rank anew.
    recorded = torch_class(stages[0][0], micro_batches)
    for (stage,) in stages.values():
        recorded._stage = stage
        _dry_run(recorded, micro_batches)
    return {rank: stages[rank][0].ran for rank in range(ranks)}


def _dry_run(schedule: Any, micro_batches: int) -> None:
    # Skip the initialisation: no shapes are inferred and no messages are sent.
    schedule._initialize_stage = lambda *args, **options: None
    none: list[tuple[()]] = [()] * micro_batches
    schedule._step_microbatches(none, [{} for _ in none], none)


def _compute_actions(order: Sequence[schedules._Action]) -> list[Action]:
    """Return the compute actions, without communication."""
    flat = []
    for action in order:
        parts = action.sub_actions or (action,)
        for part in parts:
            kind, micro_batch = part.computation_type.value, part.microbatch_index
            if kind in KINDS and micro_batch is not None:
                flat.append(Action(part.stage_index, kind, micro_batch, part is not parts[-1]))
    return flat


def backward_of_weights(weights: list[nn.Parameter], groups: list[dict[str, Any]]) -> None:
    """Compute the deferred gradients of a stage's weights, laid out in memory like the weights.

    torch sets them as they come, also transposed, and its fused optimizers read a gradient in the
    order of its weight.
    """
    stage_backward_weight(iter(weights), groups)
    for weight in weights:
        gradient = weight.grad
        if gradient is not None and gradient.stride() != weight.stride():
            weight.grad = torch.empty_like(weight).copy_(gradient)
