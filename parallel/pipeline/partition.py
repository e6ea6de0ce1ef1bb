"""Partition of a model's blocks into the stages of a pipeline."""

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate, pairwise


def balance_stages(costs: Sequence[float], stages: int) -> list[int]:
    """Return the first block of each stage after the first, minimising the maximum stage cost.

    Ties are broken by the least sum of squares. `costs` are the blocks' costs, in any unit.
    """
    return list(_balanced(tuple(costs), stages))


@lru_cache(maxsize=1024)
def _balanced(costs: tuple[float, ...], stages: int) -> tuple[int, ...]:
    ends = [0.0, *accumulate(costs)]

    def min_by_cost(one: tuple, other: tuple) -> tuple:
        return min(one, other, key=lambda found: found[:2])

    # best[i]: (maximum stage cost, sum of squares, first blocks) for the blocks before i.
    best = [(end, end**2, ()) if i else (math.inf, 0.0, ()) for i, end in enumerate(ends)]
    for _ in range(1, stages):
        longer: list[tuple] = [(math.inf, 0.0, ())] * len(ends)
        for i in range(len(ends)):
            for j in reversed(range(1, i)):
                cost, (most, squares, firsts) = ends[i] - ends[j], best[j]
                if cost > longer[i][0]:
                    break  # and so are all longer stages
                longer[i] = min_by_cost(
                    (max(most, cost), squares + cost**2, (*firsts, j)), longer[i]
                )
        best = longer
    found: tuple[int, ...] = best[-1][2]
    return found


def stage_blocks(blocks: int, firsts: Sequence[int]) -> list[tuple[str, ...]]:
    """Return the block names of each stage; `firsts` are the first blocks after stage 0."""
    bounds = [0, *firsts, blocks]
    return [tuple(map(str, range(*ends))) for ends in pairwise(bounds)]
