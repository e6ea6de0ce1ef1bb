"""A job's plan: memory for ranking and exact agree, what is shown fits, the smallest takes it."""

from dataclasses import replace

import pytest
import torch

from launch.cli.planned import list_schedule
from parallel.strategy import StrategyConfig
from trainer.compress.compression import Compression
from trainer.config.train import (
    CompressConfig,
    DataConfig,
    LoraConfig,
    ModelConfig,
    TrainConfig,
)
from trainer.model import Transformer
from trainer.plan.constants import Fit
from trainer.plan.layout import Layout, strategy_of
from trainer.plan.machine import GIB, named_machine
from trainer.plan.planner import Planner, first_tries, job_work, learned_share
from trainer.plan.rank_plan import block_lengths
from trainer.plan.result import plan_layouts, planned_layout
from trainer.plan.work import encoder_length
from trainer.verify.cases import FAMILIES, scale_down

MODEL = ModelConfig(
    layers=16,
    width=2048,
    heads=32,
    kv_heads=8,
    ffn_width=8192,
    vocab_size=128256,
    max_positions=8192,
)


def planner(memory_gib=24.0, **changes):
    config = TrainConfig(
        model=MODEL,
        data=DataConfig(kind="text", path="not read", seq_len=4096),
        batch_size=64,
        strategy=StrategyConfig(),
    )
    machine = named_machine("l40s", "bf16", memory_gib=memory_gib)
    assert machine is not None
    return Planner(replace(config, **changes), "bf16", machine, Fit.read())


@pytest.mark.parametrize(
    "layout",
    [
        Layout(replicate=8),
        Layout(shard=8, micro_batch=2),
        Layout(replicate=2, shard=4, recomputed="selective"),
        Layout(shard=64, recomputed="block"),
        Layout(shard=2, tensor=4),
        Layout(context=4, shard=2, chunks=8),
    ],
)
def test_memory_for_ranking_is_that_of_the_layout(layout):
    jobs = planner()
    assert jobs.memory(layout) == pytest.approx(jobs.card(layout).total, rel=0.01)


def test_times_are_by_the_mean_length_of_what_is_not_padded_to_one():
    text = planner().config
    assert job_work(text, "bf16", 1024).tokens == 1024
    ctc = ModelConfig(
        layers=4,
        width=64,
        heads=4,
        ffn_width=128,
        family="encoder",
        inputs="audio",
        outputs="ctc",
        vocab_size=40,
        max_positions=750,
        audio_stride=4,
    )
    speech = replace(text, model=ctc, data=DataConfig(kind="speech", path="not read"))
    assert job_work(speech, "bf16", 400).tokens == 100
    filled = replace(ctc, family="encoder_decoder", audio_positions=750, audio_fill="silence")
    whisper = replace(speech, model=filled)
    assert job_work(whisper, "bf16", 400) == job_work(whisper, "bf16")


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved", "zero_bubble", "zbv"])
@pytest.mark.parametrize("shard", [1, 4])
def test_memory_for_ranking_is_near_that_of_a_schedules_lists(schedule, shard):
    jobs = planner()
    stages = {"interleaved": 2, "zbv": 2}.get(schedule, 1)
    layout = Layout(pipeline=4, shard=shard, schedule=schedule, stages_per_rank=stages)
    _, held = list_schedule(strategy_of(layout, StrategyConfig()), jobs.micro_batches(layout))
    assert jobs.memory(layout) == pytest.approx(jobs.card(layout, held).total, rel=0.12)


def test_what_is_shown_fits_and_the_rest_says_why():
    jobs = planner()
    plan = plan_layouts(jobs, jobs.space(8, {}), 0.1, 4, list_schedule)
    assert plan.proposed is not None
    for planned in [plan.proposed, *plan.fastest]:
        assert planned.card.total <= jobs.limit
        assert planned.layout.ranks == 8
    assert plan.proposed.time.total <= 1.1 * plan.found.candidates[0].seconds
    assert plan.proposed.layout not in [planned.layout for planned in plan.fastest]
    assert [refused.layout for refused in plan.refused] == [
        layout for layout in first_tries(8, 8) if not jobs.fits(layout)
    ]
    assert all(refused.nearest is not None for refused in plan.refused)


def test_the_smallest_number_of_devices_takes_the_job_and_one_less_does_not():
    jobs = planner(memory_gib=5.0)
    fixed = {"pipeline": 1, "context": 1}
    least = jobs.smallest(jobs.space(1, fixed), 1)
    assert least > 1
    assert jobs.search(jobs.space(least, fixed)).candidates
    assert not jobs.search(jobs.space(least - 1, fixed)).candidates
    assert planner(memory_gib=0.5).smallest(jobs.space(1, fixed), 1) == 0


def test_a_pipelines_ranks_are_told_apart():
    jobs = planner()
    layout = Layout(pipeline=4, schedule="1f1b")
    planned = planned_layout(jobs, layout, list_schedule)
    assert len(planned.card.ranks) == 4
    assert planned.card.terms.total == max(terms.total for terms in planned.card.ranks)
    assert planned.card.total > planned.card.terms.total + GIB


def test_adapters_learn_a_share():
    width, query, key, inner = 2048, 2048, 512, 8192
    whole = width * (2 * query + 2 * key + 3 * inner)
    lora = LoraConfig(rank=8, targets=["query", "down"])
    share = 8 * ((width + query) + (width + inner)) / whole
    assert learned_share(MODEL, lora) == pytest.approx(share)
    assert learned_share(MODEL, LoraConfig()) == 1.0


@pytest.mark.parametrize(
    ("family", "compress"),
    [
        ("encoder (ViT)", CompressConfig(merge=2)),
        ("encoder (ViT)", CompressConfig(merge=3, pool_after=2)),
        ("encoder (ViT)", CompressConfig(pool_after=2)),
        ("encoder (ViT)", CompressConfig(drop=0.4)),
        ("encoder-decoder", CompressConfig(merge=2)),
        ("decoder (Llama)", CompressConfig(pool_after=2)),
    ],
)
def test_shortened_blocks_are_those_of_the_model(family, compress):
    config = replace(scale_down(FAMILIES[family], stages=6), dropout=0.0)
    with torch.device("meta"):
        model = Transformer(config)
    Compression(compress).reshape_model(model)
    length = 24 if config.family != "encoder" else encoder_length(config, 0)
    assert block_lengths(config, compress, length) == model.train().block_lengths(length)


def test_a_shortened_step_is_less_work():
    text = planner().config
    shortened = replace(text, compress=CompressConfig(pool_after=4))
    whole, pooled = job_work(text, "bf16"), job_work(shortened, "bf16")
    assert pooled.flops < 0.8 * whole.flops
    assert pooled.blocks[8].products < whole.blocks[8].products == whole.blocks[0].products
