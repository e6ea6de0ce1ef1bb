"""Pipeline schedules by name: what each is, where its stages are; free of torch, as a check needs.

A schedule is the order in which a rank runs the forwards and backwards of its stages (successive
parts of the layers) for the micro-batches of a step. torch.distributed.pipelining runs them; what
is here says what it takes.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """What torch's class of a schedule takes, and how it places stages."""

    torch_class: str  # in torch.distributed.pipelining.schedules
    least_stages: int  # per rank
    most_stages: int | None = None  # per rank; None = any number
    v_shaped: bool = False  # rank 0 has the first stage and the last, not stages 0, ranks, …
    least_micro_batches: int = 0  # per rank of the pipeline; 0 = one is enough
    whole_rounds: bool = False  # micro-batches go in rounds, of at least as many as ranks
    splits_backward: bool = False  # gradients of inputs and of weights apart; not with compile


SCHEDULES = {
    "gpipe": Schedule("ScheduleGPipe", 1, 1),
    "1f1b": Schedule("Schedule1F1B", 1, 1, least_micro_batches=1),
    # torch takes one stage per rank here too, but the two are 1f1b and gpipe then.
    "interleaved": Schedule("ScheduleInterleaved1F1B", 2, whole_rounds=True),
    "looped_bfs": Schedule("ScheduleLoopedBFS", 2),
    # With one stage per rank this is the ZB-H1 of the paper.
    "zero_bubble": Schedule(
        "ScheduleInterleavedZeroBubble", 1, whole_rounds=True, splits_backward=True
    ),
    "zbv": Schedule("ScheduleZBVZeroBubble", 2, 2, v_shaped=True, splits_backward=True),
    "dualpipev": Schedule(
        "ScheduleDualPipeV", 2, 2, v_shaped=True, least_micro_batches=2, splits_backward=True
    ),
}


def stages_of(schedule: str, rank: int, ranks: int, stages_per_rank: int) -> tuple[int, ...]:
    """The stages of a rank of the pipeline, in the order of the layers.

    A loop gives rank r the stages r, r + ranks, …; a V the stages r and 2·ranks - 1 - r.
    """
    if SCHEDULES[schedule].v_shaped:
        return rank, 2 * ranks - 1 - rank
    return tuple(range(rank, ranks * stages_per_rank, ranks))


def rank_of(schedule: str, stage: int, ranks: int) -> int:
    """The rank of the pipeline that has a stage."""
    if SCHEDULES[schedule].v_shaped:
        return min(stage, 2 * ranks - 1 - stage)
    return stage % ranks


def takes(schedule: str, ranks: int, micro_batches: int) -> bool:
    """Whether torch runs the schedule with this number of micro-batches per step."""
    rules = SCHEDULES[schedule]
    if micro_batches < max(1, rules.least_micro_batches * ranks):
        return False
    # torch makes as many rounds as are full, and each has equally many micro-batches.
    rounds = max(1, micro_batches // ranks)
    return not rules.whole_rounds or micro_batches % rounds == 0
