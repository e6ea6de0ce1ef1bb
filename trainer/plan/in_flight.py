"""Micro-batches that a pipeline's schedule holds at once, from torch's lists of its actions."""

from collections.abc import Sequence
from functools import cache, partial

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
        last = strategy.pipeline * per_rank - 1
        return tuple(_most_held(actions[rank], last) for rank in range(strategy.pipeline))
    return _held_by_schedule(strategy.schedule, strategy.pipeline, per_rank, micro_batches)


@cache
def _held_by_schedule(
    schedule: str, ranks: int, per_rank: int, micro_batches: int
) -> tuple[Held, ...]:
    accepted = (n for n in range(ROUNDS * ranks, micro_batches))
    enough = next((n for n in accepted if accepts_micro_batches(schedule, ranks, n)), micro_batches)
    found = _listed(schedule, ranks, per_rank, enough)
    if schedule not in ("gpipe", "looped_bfs"):
        return found
    # All forwards come first, so that all counts are linear in the number of micro-batches.
    fewer, more = _listed(schedule, ranks, per_rank, enough - 1), micro_batches - enough
    return (
        tuple(
            Held(tuple(map(partial(_continue, more=more), *(held.moments for held in pair))))
            for pair in zip(fewer, found, strict=True)
        )
        if more
        else found
    )


def _listed(schedule: str, ranks: int, per_rank: int, micro_batches: int) -> tuple[Held, ...]:
    actions = list_actions(schedule, ranks, per_rank, micro_batches)
    held = tuple(_most_held(actions[rank], ranks * per_rank - 1) for rank in range(ranks))
    if schedule != "1f1b":
        return held
    return tuple(  # messages are waited for in turn
        Held(tuple(m._replace(sent=0) for m in own.moments), in_turn=True) for own in held
    )


def _continue(fewer: Moment, moment: Moment, more: int) -> Moment:
    """Return a moment with `more` micro-batches, from it and from that with one less."""
    pairs = zip(fewer.flying, moment.flying, strict=True)
    flying = tuple(n + more * (n - before) for before, n in pairs)
    return moment._replace(flying=flying, sent=moment.sent + more * (moment.sent - fewer.sent))


def _most_held(actions: Sequence[Action], last: int) -> Held:
    """Return the backwards, and losses, in which a rank holds the most."""
    stages, sent = sorted({action.stage for action in actions}), 0
    flying, waiting = dict.fromkeys(stages, 0), dict.fromkeys(stages, 0)
    learned, found = dict.fromkeys(stages, False), list[Moment]()
    for stage, kind, *_ in actions:
        # The first stage has no gradients but those of its weights.
        split = kind == "I"
        if split and stage == 0:
            continue
        flying[stage] += kind == "F"
        if kind in "BI" or (kind, stage) in (("F", last), ("W", 0)):
            held = tuple(flying.values()), tuple(waiting.values()), tuple(learned.values())
            _insert(found, Moment(*held, stages.index(stage), split, sent))
        if kind == "F":
            continue
        waiting[stage] += {"I": 1, "W": -(stage > 0)}.get(kind, 0)
        flying[stage] -= not split
        learned[stage] |= not split
        # An output stays for its own backward; its message holds it from then on.
        sent += kind in "BW" and stage < last and stage + 1 not in flying
        sent += kind in "BI" and stage > 0 and stage - 1 not in flying
    return Held(tuple(found))


def _insert(found: list[Moment], moment: Moment) -> None:
    """Insert a moment, unless another holds more, in place of those that hold no more."""
    if not any(_is_above(other, moment) and not _is_above(moment, other) for other in found):
        found[:] = [other for other in found if not _is_above(moment, other)] + [moment]


def _is_above(one: Moment, other: Moment) -> bool:
    """Return whether a moment holds as much of everything as another of the same kind."""
    if (one.at, one.splits) != (other.at, other.splits):
        return False
    ones, others = ((*m.flying, *m.waiting, *m.learned) for m in (one, other))
    return all(a >= b for a, b in zip(ones, others, strict=True))
