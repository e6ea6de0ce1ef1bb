"""Schedules: torch's own lists, under unit costs, have the bubbles that the papers publish."""

import pytest
from torch.distributed.pipelining._utils import generate_stage_to_rank_mapping

from parallel.schedule import SCHEDULES, rank_of, stages_of


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_stages_are_where_torch_has_them(schedule, ranks):
    rules = SCHEDULES[schedule]
    for per_rank in range(rules.least_stages, (rules.most_stages or 3) + 1):
        style = "v" if rules.v_shaped else "loop"
        mapping = generate_stage_to_rank_mapping(ranks, ranks * per_rank, style)
        stages = [stages_of(schedule, rank, ranks, per_rank) for rank in range(ranks)]
        assert stages == [tuple(s for s in mapping if mapping[s] == r) for r in range(ranks)]
        assert {s: rank_of(schedule, s, ranks) for s in mapping} == mapping
