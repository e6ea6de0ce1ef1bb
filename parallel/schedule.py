"""Pipeline schedules by name."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """What torch's class of a schedule takes, and how it places stages."""

    torch_class: str  # in torch.distributed.pipelining.schedules
    least_stages: int  # per rank
    most_stages: int | None = None  # per rank; None = any number
    v_shaped: bool = False  # rank 0 has the first stage and the last, not stages 0, ranks, …


SCHEDULES = {
    "gpipe": Schedule("ScheduleGPipe", 1, 1),
    "1f1b": Schedule("Schedule1F1B", 1, 1),
    "interleaved": Schedule("ScheduleInterleaved1F1B", 2),
    "looped_bfs": Schedule("ScheduleLoopedBFS", 2),
    "zero_bubble": Schedule("ScheduleInterleavedZeroBubble", 1),
    "zbv": Schedule("ScheduleZBVZeroBubble", 2, 2, v_shaped=True),
    "dualpipev": Schedule("ScheduleDualPipeV", 2, 2, v_shaped=True),
}


def rank_of(schedule: str, stage: int, ranks: int) -> int:
    """The rank of the pipeline that has a stage."""
    if SCHEDULES[schedule].v_shaped:
        return min(stage, 2 * ranks - 1 - stage)
    return stage % ranks
