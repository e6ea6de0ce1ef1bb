"""Memory for ranking: what schedules hold by formula, of the pipeline ranks that hold the most.

`in_flight.py` has what they hold from their lists, which takes torch and longer.
"""

from collections.abc import Mapping
from functools import cache
from typing import Any

from trainer.plan.memory import ONE_STAGE, Held, MemoryModel, RankPlan, Stage
from trainer.plan.parameters import Parameters


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
    for rank in range(ranks):
        if schedule in ("gpipe", "looped_bfs"):
            counts = (micro_batches,) * stages
        elif schedule in ("zbv", "dualpipev"):
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
        held = tuple(min(count, micro_batches) for count in counts)
        accumulates = schedule not in ("gpipe", "looped_bfs") and micro_batches > 1
        found.append(Held((held,), accumulates))
    return tuple(found)


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
        self._counted: dict[tuple[tuple[Stage, ...], int], tuple[Parameters, Parameters]] = {}

    def _build_plans(self, *key: Any) -> list[RankPlan]:
        found: dict[tuple[Stage, ...], RankPlan] = {}
        for plan in super()._build_plans(*key):
            other = found.setdefault(plan.stages, plan)
            if sum(map(sum, plan.held.counts)) > sum(map(sum, other.held.counts)):
                found[plan.stages] = plan
        return list(found.values())

    def _rank_parameters(
        self, plan: RankPlan, parts: Mapping[str, Any], tensor: int
    ) -> tuple[Parameters, Parameters]:
        key = (plan.stages, tensor)
        if key not in self._counted:
            self._counted[key] = super()._rank_parameters(plan, parts, tensor)
        return self._counted[key]
