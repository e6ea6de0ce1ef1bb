"""Communicated bytes per step: the counted bytes equal the closed form exactly."""

from collections import Counter
from dataclasses import replace

import pytest
import torch

from parallel.comm_volume.closed_form import StepBytes, ring_bytes, stage_bytes, step_bytes
from parallel.pipeline.schedules import stage_to_rank
from parallel.strategy import StrategyConfig, world_size
from trainer.config.train import ModelConfig
from trainer.verify.cases import FAMILIES, REDUCED, STRATEGIES, scale_down
from trainer.verify.comm_volume import step_traffic
from trainer.verify.features import FEATURES

# Ranks take long on two cores: each strategy has one family, in turn.
CASES = [
    (name, list(FAMILIES)[number % 4])
    for number, (name, strategy) in enumerate(STRATEGIES.items())
    if world_size(strategy) <= 4
]


def small(strategy: StrategyConfig, family: str) -> ModelConfig:
    stages = len(stage_to_rank(strategy, strategy.pipeline))
    return scale_down((FAMILIES | FEATURES)[family], strategy.tensor, stages)


@pytest.mark.parametrize(("strategy", "family"), CASES)
def test_bytes_of_a_step_equal_the_closed_form_on_every_rank(ranks, strategy, family):
    degrees = STRATEGIES[strategy]
    due: dict = Counter()
    for counted, formula in ranks.run(
        world_size(degrees), step_traffic, degrees, small(degrees, family)
    ):
        assert counted == formula
        due += formula
    moves = ("all_gather", torch.bfloat16)
    if degrees.context > 1 and degrees.context_method == "ulysses":
        moves = ("all_to_all", torch.bfloat16)
    elif degrees.pipeline > 1 or (degrees.context > 1 and degrees.context_method == "ring"):
        moves = ("send", torch.bfloat16)
    elif degrees.shard == degrees.tensor == 1:
        moves = ("all_reduce", torch.float32)
    elif not degrees.sequence_parallel:
        moves = ("all_reduce", torch.bfloat16)
    assert due[moves] > 1_000


@pytest.mark.parametrize(
    "strategy",
    [
        StrategyConfig(shard=2, tensor=4),  # its key/value heads are shared, and FSDP gathers them
        StrategyConfig(shard=2, tensor=2, pipeline=2),
        StrategyConfig(tensor=2, pipeline=2, schedule="zbv"),
        StrategyConfig(tensor=2, pipeline=2, schedule="zero_bubble", sequence_parallel=False),
        StrategyConfig(replicate=2, tensor=2, pipeline=2, schedule="interleaved"),
    ],
    ids=str,
)
def test_bytes_of_products(ranks, strategy):
    model = small(strategy, "decoder (Llama)")
    for counted, formula in ranks.run(world_size(strategy), step_traffic, strategy, model):
        assert counted == formula


@pytest.mark.parametrize(
    ("strategy", "family"),
    [
        ("tensor 2", "decoder (Gemma 3)"),
        ("tensor 4", "decoder (OLMo 2)"),
        ("context 2 × tensor 2", "decoder (OLMo 2)"),
        ("tensor 2 × pipeline 2, zero_bubble", "decoder (OLMo 2)"),
    ],
)
def test_bytes_of_features_of_layers(ranks, strategy, family):
    degrees = STRATEGIES[strategy]
    model = small(degrees, family)
    for counted, formula in ranks.run(world_size(degrees), step_traffic, degrees, model):
        assert counted == formula


FEATURED = {
    "T5, tensor × pipeline": ("encoder-decoder (T5)", StrategyConfig(tensor=2, pipeline=2)),
    "T5, zero_bubble": (
        "encoder-decoder (T5)",
        StrategyConfig(tensor=2, pipeline=2, schedule="zero_bubble"),
    ),
    "T5, fsdp": ("encoder-decoder (T5)", StrategyConfig(shard=2)),
    "T5, ulysses": ("encoder-decoder (T5)", StrategyConfig(context=2, context_method="ulysses")),
    "BERT, tensor": ("encoder (BERT)", StrategyConfig(tensor=2)),
    "BERT with classes, context": ("encoder (BERT, classes)", StrategyConfig(context=2)),
}


@pytest.mark.parametrize("case", FEATURED)
def test_bytes_of_other_layers(ranks, case):
    family, strategy = FEATURED[case]
    stages = len(stage_to_rank(strategy, strategy.pipeline))
    model = scale_down(FEATURES[family], strategy.tensor, stages)
    for counted, formula in ranks.run(world_size(strategy), step_traffic, strategy, model):
        assert counted == formula


@pytest.mark.parametrize("name", REDUCED)
def test_bytes_of_rounded_and_compressed_sums(ranks, name):
    strategy = REDUCED[name]
    whole = replace(strategy, reduce="auto")
    model = small(strategy, "decoder (Llama)")
    for counted, formula in ranks.run(world_size(strategy), step_traffic, strategy, model):
        assert counted == formula
        full = {key: size for key, size in formula.items() if key[1] == torch.float32}
        # What is left in float32: the norm, losses, and what PowerSGD leaves as it is.
        left = 30_000 if strategy.reduce == "powersgd" else 1_000
        assert sum(full.values()) < left or strategy.tensor * strategy.pipeline > 1
    if strategy.reduce == "int8":
        due = ranks.run(world_size(strategy), step_traffic, whole, model)[0][1]
        bytes_8 = (formula["all_to_all", torch.uint8] + formula["all_gather", torch.uint8]) / 2
        assert 0.25 < bytes_8 / due["all_reduce", torch.float32] < 0.35  # padding of small ones


def test_the_closed_form_by_hand():
    blocks, others = [(10, 4), (3,)], [(7, 2)]
    forms = {"compute_bytes": 2, "reduce_bytes": 4}
    ddp = step_bytes(blocks, others, StrategyConfig(replicate=3), 5, **forms)
    assert (ddp.all_reduce, ddp.all_gather, ddp.reduce_scatter) == (57 * 4, 0, 0)
    # Over two ranks 3 rows are padded to 4 and 7 to 8; two micro-batches.
    fsdp = step_bytes(blocks, others, StrategyConfig(shard=2), 2, **forms)
    assert (fsdp.all_reduce, fsdp.all_gather) == (0, 2 * (2 * 44 + 16) * 2)
    assert fsdp.reduce_scatter == 2 * (44 + 16) * 4
    hsdp = step_bytes(blocks, others, StrategyConfig(replicate=2, shard=2), 1, **forms)
    assert (hsdp.all_reduce, hsdp.all_gather) == (60 * 4 // 2, (2 * 44 + 16) * 2)
    # Parts of 128 numbers: 40 and 3 make one for each of two ranks, 400 two for each.
    int8 = StrategyConfig(replicate=2, reduce="int8")
    moved = step_bytes([(10, 4), (3,)], [(20, 20)], int8, 5, **forms)
    assert moved == StepBytes(all_to_all=8 * (128 + 4), all_gather=8 * (128 + 4))
    low = StrategyConfig(replicate=2, reduce="powersgd", powersgd_rank=2)
    moved = step_bytes([(20, 30), (8, 8), (3,)], [], low, 5, **forms)  # 8 × 8 would be as large
    assert moved == StepBytes(all_reduce=(2 * (20 + 30) + 64 + 3) * 4)
    # In a pipeline a rank gathers and scatters once per step.
    staged = step_bytes(blocks, others, StrategyConfig(shard=2, pipeline=2), 9, **forms)
    assert (staged.all_gather, staged.reduce_scatter) == ((44 + 16) * 2, (44 + 16) * 4)


def test_what_a_pipeline_sends_by_hand():
    # Behind the second stage there are two streams; a V has its middle on the last rank.
    flows = [(size, size) for size in (0, 2 * 24, 2 * (24 + 40), 2 * 24)]
    loop = [stage_bytes(flows, (0, 1, 0, 1), rank).send for rank in (0, 1)]
    assert loop == [2 * (24 + 64 + 24)] * 2
    assert [stage_bytes(flows, (0, 1, 1, 0), rank).send for rank in (0, 1)] == [2 * 48] * 2
    line = [stage_bytes(flows, (0, 1, 2, 3), rank).send for rank in range(4)]
    assert line == [2 * 24, 2 * (24 + 64), 2 * (64 + 24), 2 * 24]
    # Whole numbers flow on, and no gradient comes back.
    assert [stage_bytes([(0, 0), (50, 40)], (0, 1), rank).send for rank in (0, 1)] == [50, 40]


def test_ring_bytes():
    assert ring_bytes(all_reduce=1000, others=0, ranks=4) == 1500
    assert ring_bytes(all_reduce=0, others=1000, ranks=4) == 750
    assert ring_bytes(all_reduce=1000, others=1000, ranks=1) == 0
