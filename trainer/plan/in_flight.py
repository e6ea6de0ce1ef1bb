"""What a pipeline's schedule holds at once, from torch's own lists of its actions."""

from collections.abc import Sequence
from functools import lru_cache

from parallel.pipeline.schedules import accepts_micro_batches, read_csv, stages_per_rank
from parallel.pipeline.simulator import Action
from parallel.pipeline.torch_schedules import list_actions
from parallel.strategy import StrategyConfig
from trainer.plan.memory import ONE_STAGE, Held

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


@lru_cache(maxsize=None)
def _held_by_schedule(
    schedule: str, ranks: int, per_rank: int, micro_batches: int
) -> tuple[Held, ...]:
    if schedule in ("gpipe", "looped_bfs"):  # all forwards come first
        return (Held(((micro_batches,) * per_rank,), accumulates=False),) * ranks
    enough = range(ROUNDS * ranks, micro_batches)
    fewer = next((n for n in enough if accepts_micro_batches(schedule, ranks, n)), micro_batches)
    actions = list_actions(schedule, ranks, per_rank, fewer)
    return tuple(_most_held(actions[rank]) for rank in range(ranks))


def _most_held(actions: Sequence[Action]) -> Held:
    """Return the largest counts in flight of a rank, and if a backward was done before."""
    stages = sorted({action.stage for action in actions})
    held, backward = dict.fromkeys(stages, 0), False
    seen: dict[tuple[int, ...], bool] = {}
    for action in actions:
        held[action.stage] += {"F": 1, "I": 0}.get(action.kind, -1)
        backward = backward or action.kind in "BW"
        counts = tuple(held.values())
        seen[counts] = seen.get(counts, False) or backward
    most = [
        counts
        for counts in seen
        if not any(_is_above(other, counts) for other in seen if other != counts)
    ]
    return Held(tuple(most), any(seen[counts] for counts in most))


def _is_above(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    return all(a >= b for a, b in zip(one, other, strict=True))
