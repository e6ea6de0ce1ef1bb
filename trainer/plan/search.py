"""All legal layouts for a number of ranks, ranked by memory and time."""

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from parallel.pipeline.schedules import SCHEDULES, accepts_micro_batches
from parallel.strategy import AXES, StrategyConfig
from trainer.config.choices import RECOMPUTED
from trainer.config.model import ModelConfig
from trainer.plan.layout import Layout, strategy_of
from trainer.plan.layout_rules import divisors_of, model_problems, sequence_problems

METHODS = ("all_gather", "ring", "ulysses")
MODES = tuple(RECOMPUTED)
CHUNKS = (1, 8)  # loss.chunks that are tried
STAGES = (1, 2, 4, 8)  # of a pipeline rank that are tried


def _allow_all(_: StrategyConfig) -> bool:
    return True


@dataclass(frozen=True)
class Space:
    """Bounds of a search for layouts."""

    model: ModelConfig
    strategy: StrategyConfig  # what layouts leave of it
    ranks: int
    linked: int  # neighbouring ranks; split layers stay among them
    samples: int  # per step
    seq_len: int = 0  # tokens that context ranks share; 0 = no limit
    fixed: Mapping[str, Any] = field(default_factory=dict)  # fields of Layout
    one_pass: bool = False  # the backward cannot be split (fp8, compile)
    allows: Callable[[StrategyConfig], bool] = _allow_all  # rules that the caller adds


class Candidate(NamedTuple):
    """A layout that fits, and the seconds of its step."""

    seconds: float
    layout: Layout


@dataclass(frozen=True)
class Found:
    """Result of a search."""

    legal: int  # layouts that keep all rules
    candidates: list[Candidate]  # those that fit, fastest first


def structures(space: Space) -> Iterator[tuple[Layout, list[int]]]:
    """Yield every legal layout but for its recomputation, with its sizes of a micro-batch."""
    for tensor in _degrees(space, "tensor", space.ranks):
        if tensor > max(space.linked, space.fixed.get("tensor", 1)):
            continue
        for context in _degrees(space, "context", space.ranks // tensor):
            if space.seq_len and sequence_problems(space.seq_len, context):
                continue
            left = space.ranks // (tensor * context)
            for pipeline in _degrees(space, "pipeline", left):
                for outer in _outer_layouts(space, pipeline, context, tensor):
                    yield from _inner_layouts(space, outer, left // pipeline)


def _degrees(space: Space, axis: str, ranks: int) -> list[int]:
    """Return the degrees of an axis on so many ranks."""
    wanted = space.fixed.get(axis)
    return [d for d in divisors_of(ranks) if wanted in (None, d)]


def _outer_layouts(space: Space, pipeline: int, context: int, tensor: int) -> Iterator[Layout]:
    """Yield the layouts of these degrees that the model's layers allow."""
    methods = METHODS if context > 1 else (space.strategy.context_method,)
    for method in methods:
        if context > 1 and space.fixed.get("context_method", method) != method:
            continue
        for schedule, stages in _schedules(space, pipeline):
            layout = Layout(pipeline, 1, 1, context, tensor, method, schedule, stages)
            if not model_problems(space.model, strategy_of(layout, space.strategy)):
                yield layout


def _schedules(space: Space, pipeline: int) -> Iterator[tuple[str, int]]:
    """Yield schedules and their stages per rank; one rank has one stage."""
    if pipeline == 1:
        yield space.strategy.schedule, 1
        return
    for name, rules in SCHEDULES.items():
        if space.fixed.get("schedule", name) != name or (space.one_pass and rules.splits_backward):
            continue
        wanted = space.fixed.get("stages_per_rank")
        for stages in STAGES if wanted is None else (wanted,):
            if rules.least_stages <= stages <= (rules.most_stages or stages):
                yield name, stages


def _inner_layouts(space: Space, outer: Layout, ranks: int) -> Iterator[tuple[Layout, list[int]]]:
    for shard in reversed(_degrees(space, "shard", ranks)):
        layout = outer._replace(replicate=ranks // shard, shard=shard)
        if space.fixed.get("replicate", layout.replicate) != layout.replicate:
            continue
        share, over = divmod(space.samples, ranks)
        if over or not space.allows(strategy_of(layout, space.strategy)):
            continue
        sizes = [
            size
            for size in divisors_of(share)
            if space.fixed.get("micro_batch", size) == size
            and (
                layout.pipeline == 1
                or accepts_micro_batches(layout.schedule, layout.pipeline, share // size)
            )
        ]
        if sizes:
            yield layout, sizes


def modes_of(space: Space, layout: Layout) -> Sequence[str]:
    """Return the activation checkpointing that a layout allows; a split backward allows none."""
    splits = layout.pipeline > 1 and SCHEDULES[layout.schedule].splits_backward
    wanted = space.fixed.get("recomputed")
    modes = ("none",) if splits else MODES
    return [mode for mode in modes if wanted in (None, mode)]


def search_layouts(
    space: Space,
    memory: Callable[[Layout], float],
    least_memory: Callable[[Layout], float],
    limit: float,
    seconds: Callable[[Layout], float],
) -> Found:
    """Return the legal layouts, and those that fit into `limit` bytes with their times.

    `memory` are the bytes of a layout's fullest rank, which rise with its micro-batch, and
    `least_memory` a lower bound that takes no time to compute.
    """
    legal, fitting, too_large = 0, [], None
    for layout, sizes in structures(space):
        modes, outer = modes_of(space, layout), layout._replace(replicate=1, shard=1)
        legal += len(modes) * len(sizes)
        if least_memory(layout) > limit or (outer == too_large and layout.shard > 1):
            continue
        found = _fitting_layouts(space, layout, sizes, modes, memory, limit)
        fitting += found
        if not found:  # nor does it with fewer shards
            too_large = outer
    return Found(legal, sorted(Candidate(seconds(layout), layout) for layout in fitting))


def fits_anywhere(
    space: Space,
    memory: Callable[[Layout], float],
    least_memory: Callable[[Layout], float],
    limit: float,
) -> bool:
    """Return whether any legal layout fits."""
    for layout, sizes in structures(space):
        modes = modes_of(space, layout)
        if least_memory(layout) <= limit and _fitting_layouts(
            space, layout, sizes[:1], modes[-1:], memory, limit
        ):
            return True
    return False


def _fitting_layouts(
    space: Space,
    layout: Layout,
    sizes: Sequence[int],
    modes: Sequence[str],
    memory: Callable[[Layout], float],
    limit: float,
) -> list[Layout]:
    """Return the layouts of a structure that fit, each with as few chunks of the loss as do."""
    wanted = space.fixed.get("chunks")
    chunks = CHUNKS if wanted is None else (wanted,)

    def at(size: int, mode: str, count: int) -> Layout:
        return layout._replace(micro_batch=size, recomputed=mode, chunks=count)

    def fitting_sizes(mode: str, count: int, least: int) -> int:
        """Return how many of the sizes fit, of which `least` are known to."""
        rest = sizes[least:]
        return least + bisect_left(
            rest, True, key=lambda size: memory(at(size, mode, count)) > limit
        )

    found: list[Layout] = []
    # What recomputes most fits most: from there on each mode has no more than the one before.
    for mode in reversed(modes):
        fit, taken = 0, 0
        for count in chunks:
            fit = fitting_sizes(mode, count, fit)
            found += [at(size, mode, count) for size in sizes[taken:fit]]
            taken = fit
        if not fit:
            break
    return found


def propose(
    candidates: Sequence[Candidate],
    slack: float,
    memory: Callable[[Layout], float],
    roomy: float = 0.0,
) -> Candidate:
    """Return the simplest of the candidates within `slack` of the fastest.

    Fewest axes that split the model or its sequences, then fewest axes, least recomputation, most
    free memory: differences within the error of the predicted times decide nothing. Of layouts that
    take less than `roomy` bytes the fastest.
    """
    near = [c for c in candidates if c.seconds <= candidates[0].seconds * (1 + slack)]

    def complexity(candidate: Candidate) -> tuple[int, int, int, int]:
        layout = candidate.layout
        recomputed = MODES.index(layout.recomputed)
        return layout.splitting_axes, layout.axes, recomputed, layout.chunks

    least = min(map(complexity, near))
    simple = [candidate for candidate in near if complexity(candidate) == least]
    return min(simple, key=lambda c: (max(memory(c.layout), roomy), c.seconds))


def distinct(candidates: Sequence[Candidate], count: int) -> list[Candidate]:
    """Return the fastest candidates with different degrees."""
    found: dict[tuple[int, ...], Candidate] = {}
    for candidate in candidates:
        found.setdefault(tuple(getattr(candidate.layout, axis) for axis in AXES), candidate)
        if len(found) == count:
            break
    return list(found.values())


def nearest(candidates: Sequence[Candidate], layout: Layout) -> Candidate:
    """Return the candidate whose degrees differ least from a layout's; the fastest of these.

    To shard the copies that a layout has is a smaller change than to split anything.
    """

    def degrees(one: Layout) -> tuple[int, ...]:
        return one.data_ranks, one.shard, one.context, one.tensor, one.pipeline

    def distance(candidate: Candidate) -> tuple[float, float]:
        both = zip(degrees(candidate.layout), degrees(layout), (1, 0.5, 1, 1, 1), strict=True)
        return sum(weight * abs(math.log2(a / b)) for a, b, weight in both), candidate.seconds

    return min(candidates, key=distance)
