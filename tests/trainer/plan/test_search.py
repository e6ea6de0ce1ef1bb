"""The search: all that is legal and no more, what fits, and the simplest of what is alike."""

from dataclasses import replace
from itertools import product

import pytest

from conf.validation.layout import layout_problems
from parallel.pipeline.schedules import SCHEDULES
from parallel.strategy import StrategyConfig
from trainer.config.train import DataConfig, ModelConfig, TrainConfig
from trainer.plan.layout import Layout, strategy_of
from trainer.plan.layout_rules import batch_problems, divisors_of, model_problems
from trainer.plan.search import (
    METHODS,
    MODES,
    STAGES,
    Candidate,
    Space,
    distinct,
    fits_anywhere,
    modes_of,
    nearest,
    propose,
    search_layouts,
    structures,
)

MODEL = ModelConfig(
    layers=6, width=64, heads=4, kv_heads=2, ffn_width=128, vocab_size=100, max_positions=16
)
CONFIG = TrainConfig(
    model=MODEL,
    batch_size=16,
    data=DataConfig(kind="text", path="not read", seq_len=16),
    strategy=StrategyConfig(),
)
SPACE = Space(MODEL, StrategyConfig(), 8, 8, 16, 16)


def legal(space):
    """Return all layouts of a space, one by one."""
    return {
        layout._replace(micro_batch=size, recomputed=mode)
        for layout, sizes in structures(space)
        for size in sizes
        for mode in modes_of(space, layout)
    }


def problems(layout):
    config = replace(
        CONFIG,
        strategy=strategy_of(layout, StrategyConfig()),
        micro_batch_size=layout.micro_batch,
        activation_checkpointing=layout.recomputed,
    )
    found = model_problems(MODEL, config.strategy) + layout_problems(config, config.strategy)
    return found + batch_problems(config, config.strategy)


def test_the_search_has_all_that_validation_takes_and_no_more():
    taken = set()
    for degrees in product(divisors_of(8), repeat=5):
        layout = Layout(*degrees)
        if layout.ranks != 8:
            continue
        methods = METHODS if layout.context > 1 else ("all_gather",)
        staged = layout.pipeline > 1
        schedules = [
            (name, stages)
            for name in (SCHEDULES if staged else ["gpipe"])
            for stages in (STAGES if staged else [1])
        ]
        share = 16 // layout.data_ranks
        for method, (schedule, stages), size, mode in product(
            methods, schedules, divisors_of(share), MODES
        ):
            tried = layout._replace(
                context_method=method,
                schedule=schedule,
                stages_per_rank=stages,
                micro_batch=size,
                recomputed=mode,
            )
            if not problems(tried):
                taken.add(tried)
    assert len(taken) > 500
    assert legal(SPACE) == taken


def test_what_is_fixed_stays():
    fixed = replace(SPACE, fixed={"tensor": 2, "pipeline": 2, "schedule": "1f1b"})
    found = legal(fixed)
    assert found == {
        layout
        for layout in legal(SPACE)
        if (layout.tensor, layout.pipeline, layout.schedule) == (2, 2, "1f1b")
    }
    assert legal(replace(SPACE, fixed={"tensor": 3})) == set()


def test_a_caller_can_add_rules_and_a_backward_in_one_pass():
    assert {x.tensor for x in legal(replace(SPACE, allows=lambda s: s.tensor == 1))} == {1}
    whole = legal(replace(SPACE, one_pass=True))
    assert not any(SCHEDULES[x.schedule].splits_backward for x in whole if x.pipeline > 1)
    assert max(x.tensor for x in legal(replace(SPACE, linked=2))) == 2


def use(layout):
    """Return made-up bytes that rise with the micro-batch and fall with recomputation."""
    kept = {"none": 9, "selective": 4, "block": 1}[layout.recomputed]
    return 100 / layout.shard / layout.tensor + layout.micro_batch * (kept + 8 / layout.chunks)


def seconds(layout):
    return 10 - 0.1 * layout.micro_batch + layout.axes + MODES.index(layout.recomputed) * 0.2


def test_all_that_fits_is_found_with_as_few_chunks_as_do():
    space = replace(SPACE, fixed={"pipeline": 1})
    found = search_layouts(space, use, lambda layout: 0.0, 60.0, seconds)
    due = set()
    for layout in legal(space):
        fitting = [c for c in (1, 8) if use(layout._replace(chunks=c)) <= 60]
        due |= {layout._replace(chunks=fitting[0])} if fitting else set()
    assert {candidate.layout for candidate in found.candidates} == due
    assert found.legal == len(legal(space))
    assert [c.seconds for c in found.candidates] == sorted(c.seconds for c in found.candidates)
    assert fits_anywhere(space, use, lambda layout: 0.0, 60.0)
    assert not fits_anywhere(space, use, lambda layout: 0.0, 1.0)


@pytest.mark.parametrize(("slack", "due"), [(0.0, 0), (0.04, 1), (0.08, 2), (0.5, 3)])
def test_the_simplest_within_the_noise_is_proposed(slack, due):
    candidates = [
        Candidate(10.0, Layout(shard=2, tensor=2, pipeline=2)),
        Candidate(10.2, Layout(shard=4, tensor=2)),
        Candidate(10.6, Layout(shard=8, recomputed="block")),
        Candidate(12.0, Layout(shard=8)),
    ]
    assert propose(candidates, slack, use) == candidates[due]


def test_copies_and_shards_are_simpler_than_what_splits_a_model():
    pipeline, mixed = Candidate(10.0, Layout(pipeline=8)), Candidate(10.5, Layout(2, 2, 2))
    hybrid, copies = Candidate(10.2, Layout(1, 2, 4)), Candidate(10.4, Layout(1, 8))
    assert propose([pipeline, mixed], 0.1, lambda layout: 0) == pipeline
    assert propose([pipeline, hybrid, mixed], 0.1, lambda layout: 0) == hybrid
    assert propose([pipeline, hybrid, copies, mixed], 0.1, lambda layout: 0) == copies


def test_the_fastest_differ_in_degrees_and_the_nearest_is_near():
    candidates = [
        Candidate(10.0, Layout(shard=8, micro_batch=2)),
        Candidate(10.1, Layout(shard=8)),
        Candidate(10.2, Layout(replicate=2, shard=4)),
        Candidate(10.3, Layout(replicate=4, shard=2)),
    ]
    assert distinct(candidates, 2) == [candidates[0], candidates[2]]
    assert nearest(candidates, Layout(replicate=8)) == candidates[3]
    assert nearest(candidates, Layout(shard=8)) == candidates[0]
