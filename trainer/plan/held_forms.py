"""Memory for ranking: what schedules hold by formula, of the pipeline ranks that hold the most.

`in_flight.py` has what they hold from their lists, which takes torch and longer.
"""

from functools import cache
from typing import Any

from trainer.plan.memory import MemoryModel
from trainer.plan.rank_plan import ONE_STAGE, Held, Moment, RankPlan, Stage, rank_plans


@cache
def likely_held(schedule: str, ranks: int, stages: int, micro_batches: int) -> tuple[Held, ...]:
    """Return about what each pipeline rank holds at once.

    gpipe and looped_bfs hold all micro-batches; 1f1b (arXiv 2006.09503) as many as ranks follow;
    interleaved (2104.04473) its warm-up; zero_bubble (2401.10241, ZB-H1) what the first rank of
    1f1b does, on every rank; the V-shaped schedules (section 6, 2412.19437) two stages for each
    rank, most of them of the first half on the first rank.
    """
    if ranks == 1:
        return ONE_STAGE
    found = []
    counts: tuple[int, ...]
    for rank in range(ranks):
        if schedule in ("gpipe", "looped_bfs"):
            found.append(_all_flying(stages, micro_batches))
            continue
        if schedule in ("zbv", "dualpipev"):
            more = 1 if schedule == "dualpipev" else 0
            counts = (2 * ranks - 1 - rank + more, 1 + rank)
        else:
            behind = ranks - 1 - rank
            in_round = max(1, micro_batches // max(1, micro_batches // ranks))
            if schedule == "zero_bubble":
                chunks = (stages - 1) * in_round + ranks
            elif schedule == "interleaved":
                chunks = (stages - 1) * in_round + 2 * behind + 1
            else:
                chunks = behind + 1
            counts = _by_stage(chunks, stages, in_round)
        flying = tuple(min(count, micro_batches) for count in counts)
        # With a split backward, rank r's weights wait for their gradients r micro-batches long.
        late = rank if schedule in ("zero_bubble", "zbv", "dualpipev") else 0
        waiting = (*(0,) * (len(flying) - 1), min(late, flying[-1]))
        learned = (micro_batches > 1,) * len(flying)
        moment = Moment(flying, waiting, learned, len(flying) - 1, bool(late))
        found.append(Held((moment,), in_turn=schedule == "1f1b"))
    return tuple(found)


def _all_flying(stages: int, micro_batches: int) -> Held:
    """Return what a rank holds whose backwards follow all forwards, the last stage's first."""
    moments = []
    for at in {stages - 1, 0}:
        for done in range(min(2, micro_batches)):  # backwards of this stage so far
            flying = tuple(
                (stage <= at) * (micro_batches - done * (stage == at)) for stage in range(stages)
            )
            learned = tuple(stage > at or (stage == at and done > 0) for stage in range(stages))
            moments.append(Moment(flying, (0,) * stages, learned, at))
    return Held(tuple(moments))


def _by_stage(chunks: int, stages: int, in_round: int) -> tuple[int, ...]:
    """Return how many of the first forwards are of each stage: a round of each in turn."""
    counts = [0] * stages
    for number in range(chunks):
        counts[number // in_round % stages] += 1
    return tuple(counts)


class RankingMemory(MemoryModel):
    """Closed forms of fewer pipeline ranks: of those with the same stages, the fullest."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self._plans = cache(self._fullest_plans)

    def _fullest_plans(self, *cut: Any) -> list[RankPlan]:
        found: dict[tuple[Stage, ...], RankPlan] = {}
        for plan in rank_plans(self.model, *cut):
            other = found.setdefault(plan.stages, plan)
            if _total(plan) > _total(other):
                found[plan.stages] = plan
        return list(found.values())


def _total(plan: RankPlan) -> int:
    """Return the micro-batches that a rank holds at most, of all its stages together."""
    return max(sum(moment.flying) + sum(moment.waiting) for moment in plan.held.moments)
