"""What a pipeline's schedule holds at once, from torch's own lists of its actions."""

from collections.abc import Sequence
from functools import cache

from parallel.pipeline.schedules import accepts_micro_batches, read_csv, stages_per_rank
from parallel.pipeline.simulator import Action
from parallel.pipeline.torch_schedules import list_actions
from parallel.strategy import StrategyConfig
from trainer.plan.rank_plan import ONE_STAGE, Held, Moment

ROUNDS = 6  # rounds of micro-batches after which a schedule holds no more than before


def held_micro_batches(strategy: StrategyConfig, micro_batches: int) -> tuple[Held, ...]:
    """Return what each pipeline rank holds at once; a resolved strategy."""
    if strategy.pipeline == 1:
        return ONE_STAGE
    per_rank = stages_per_rank(strategy)
    if strategy.schedule_csv:
        actions = read_csv(strategy.schedule_csv, strategy.pipeline, per_rank, micro_batches)
        return tuple(_most_held(actions[rank]) for rank in range(strategy.pipeline))
    return _held_by_schedule(strategy.schedule, strategy.pipeline, per_rank, micro_batches)


@cache
def _held_by_schedule(
    schedule: str, ranks: int, per_rank: int, micro_batches: int
) -> tuple[Held, ...]:
    if schedule in ("gpipe", "looped_bfs"):  # all forwards come first
        moment = Moment((micro_batches,) * per_rank, (0,) * per_rank)
        return (Held((moment,), accumulates=False),) * ranks
    enough = range(ROUNDS * ranks, micro_batches)
    fewer = next((n for n in enough if accepts_micro_batches(schedule, ranks, n)), micro_batches)
    actions = list_actions(schedule, ranks, per_rank, fewer)
    return tuple(_most_held(actions[rank]) for rank in range(ranks))


def _most_held(actions: Sequence[Action]) -> Held:
    """Return the moments in which a rank holds the most, and if a backward was done before."""
    stages, backward = sorted({action.stage for action in actions}), False
    flying, waiting = dict.fromkeys(stages, 0), dict.fromkeys(stages, 0)
    seen: dict[Moment, bool] = {}
    for stage, kind, *_ in actions:
        flying[stage] += {"F": 1, "I": 0}.get(kind, -1)
        waiting[stage] += {"I": 1, "W": -1}.get(kind, 0)
        backward = backward or kind in "BW"
        moment = Moment(tuple(flying.values()), tuple(waiting.values()))
        seen[moment] = seen.get(moment, False) or backward
    most = [one for one in seen if not any(_is_above(other, one) for other in seen if other != one)]
    return Held(tuple(most), any(seen[moment] for moment in most))


def _is_above(one: Moment, other: Moment) -> bool:
    pairs = zip(one.flying + one.waiting, other.flying + other.waiting, strict=True)
    return all(a >= b for a, b in pairs)
