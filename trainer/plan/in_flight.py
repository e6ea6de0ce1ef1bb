"""Micro-batches that a pipeline's schedule holds at once, from torch's lists of its actions."""

from collections.abc import Sequence
from functools import cache

from parallel.pipeline.schedules import SCHEDULES, accepts_micro_batches, read_csv, stages_per_rank
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
        last = strategy.pipeline * per_rank - 1
        return tuple(_most_held(actions[rank], last) for rank in range(strategy.pipeline))
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
    held = tuple(_most_held(actions[rank], ranks * per_rank - 1) for rank in range(ranks))
    if SCHEDULES[schedule].most_stages != 1:
        return held
    return tuple(  # messages are waited for in turn
        Held(tuple(m._replace(sent=0) for m in own.moments), own.accumulates, in_turn=True)
        for own in held
    )


def _most_held(actions: Sequence[Action], last: int) -> Held:
    """Return the moments in which a rank holds the most, and if a backward was done before."""
    stages, backward, sent = sorted({action.stage for action in actions}), False, 0
    flying, waiting = dict.fromkeys(stages, 0), dict.fromkeys(stages, 0)
    seen: dict[tuple, tuple[int, bool]] = {}
    for stage, kind, *_ in actions:
        flying[stage] += {"F": 1, "I": 0}.get(kind, -1)
        if stage > 0:  # the first stage has no gradients but those of its weights
            waiting[stage] += {"I": 1, "W": -1}.get(kind, 0)
        backward = backward or kind in "BW"
        # An output stays for its own backward; its message holds it from then on.
        sent += kind in "BW" and stage < last and stage + 1 not in flying
        sent += kind in "BI" and stage > 0 and stage - 1 not in flying
        moment = tuple(flying.values()), tuple(waiting.values())
        seen[moment] = sent, backward
    most = [one for one in seen if not any(_is_above(other, one) for other in seen if other != one)]
    moments = (Moment(flying, waiting, seen[flying, waiting][0]) for flying, waiting in most)
    return Held(tuple(moments), any(seen[moment][1] for moment in most))


def _is_above(one: tuple, other: tuple) -> bool:
    pairs = zip(one[0] + one[1], other[0] + other[1], strict=True)
    return all(a >= b for a, b in pairs)
