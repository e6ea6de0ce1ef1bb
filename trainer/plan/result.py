"""A plan: the layout that is proposed, the fastest beside it, and those that do not fit."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from parallel.pipeline.simulator import Lists
from parallel.strategy import StrategyConfig
from trainer.plan.layout import Layout, strategy_of
from trainer.plan.layout_rules import model_problems
from trainer.plan.planner import Card, Planner, first_tries
from trainer.plan.rank_plan import Held
from trainer.plan.search import Candidate, Found, Space, distinct, nearest, propose
from trainer.plan.step_time import StepTime

# What a resolved strategy's schedule does with so many micro-batches, and what it holds at once.
Lister = Callable[[StrategyConfig, int], tuple[Lists, tuple[Held, ...]]]


@dataclass(frozen=True)
class Planned:
    """One layout with its time and its memory."""

    layout: Layout
    time: StepTime
    card: Card


@dataclass(frozen=True)
class Refused:
    """A layout that does not fit, and the nearest one that does (None = none does)."""

    layout: Layout
    card: Card
    nearest: Layout | None


@dataclass(frozen=True)
class Plan:
    """The layouts found for a number of ranks."""

    ranks: int
    found: Found
    proposed: Planned | None  # None = nothing fits
    fastest: list[Planned]  # others, with different degrees; their bubbles are by formula
    refused: list[Refused]
    named: Planned | None = None  # a layout that was asked for


def plan_layouts(planner: Planner, space: Space, slack: float, top: int, lister: Lister) -> Plan:
    """Search all layouts of a space; the bubble of the proposed one is simulated."""
    found = planner.search(space)
    if not found.candidates:
        return Plan(space.ranks, found, None, [], [])
    proposed = _proposed(planner, found.candidates, slack, lister)
    others = [c.layout for c in distinct(found.candidates, top + 1)]
    fastest = [
        Planned(layout, planner.step(layout), planner.card(layout))
        for layout in others
        if proposed is None or layout != proposed.layout
    ]
    refused = _refused(planner, space, found.candidates)
    return Plan(space.ranks, found, proposed, fastest[:top], refused)


def _proposed(
    planner: Planner, candidates: Sequence[Candidate], slack: float, lister: Lister
) -> Planned | None:
    """Return the simplest of the fastest that fits by what its schedule's lists hold."""
    left = list(candidates)
    while left:
        chosen = propose(left, slack, planner.memory, planner.limit / 2)
        planned = planned_layout(planner, chosen.layout, lister)
        if planned.card.total <= planner.limit:
            return planned
        left.remove(chosen)
    return None


def planned_layout(planner: Planner, layout: Layout, lister: Lister) -> Planned:
    """Return a layout with its memory and its time; a pipeline's are those of its lists."""
    if layout.pipeline == 1:
        return Planned(layout, planner.step(layout), planner.card(layout))
    strategy = strategy_of(layout, planner.config.strategy)
    lists, held = lister(strategy, planner.micro_batches(layout))
    return Planned(layout, planner.step(layout, lists), planner.card(layout, held))


def _refused(planner: Planner, space: Space, candidates: list[Candidate]) -> list[Refused]:
    """Return the layouts that people try first and that do not fit."""
    refused = []
    for layout in first_tries(space.ranks, space.linked):
        values = layout._asdict()
        fixed = any(values[name] != value for name, value in space.fixed.items() if name in values)
        legal = space.samples % layout.data_ranks == 0 and not model_problems(
            space.model, strategy_of(layout, space.strategy)
        )
        if legal and not fixed and not planner.fits(layout):
            near = nearest(candidates, layout).layout if candidates else None
            refused.append(Refused(layout, planner.card(layout), near))
    return refused
