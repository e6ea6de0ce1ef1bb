"""The heart: every strategy takes the same steps as one process, and a planted fault is named."""

from dataclasses import replace

import pytest

import conf.validation.layout
from parallel.config_fields import key_facts
from parallel.pipeline.schedules import SCHEDULES
from parallel.strategy import AXES, StrategyConfig, world_size
from trainer.config.train import CompressConfig, VerifyConfig
from trainer.config.verify import FAULT_AXES
from trainer.verify.cases import FAMILIES, LORA, MICRO_BATCHES, STRATEGIES, iter_cases
from trainer.verify.compare import (
    QUANTITIES,
    Difference,
    compare_layout,
    first_mismatch,
    format_verdict,
    largest_difference,
    print_report,
)
from trainer.verify.faults import FAULTS
from trainer.verify.features import FEATURE_STRATEGIES, FEATURES, feature_strategies

TOLERANCE = 1e-10


# Ranks take long on two cores: `launch/verify.py` proves all strategies on all families. Here each
# strategy has one of them, in turn, so that none is left out.
CASES = [(name, list(FAMILIES)[number % 4]) for number, name in enumerate(STRATEGIES)]


@pytest.mark.parametrize(("strategy", "family"), CASES)
def test_strategy_equals_one_process(ranks, strategy, family):
    config = VerifyConfig(strategy=STRATEGIES[strategy], model=FAMILIES[family])
    found = ranks.run(world_size(config.strategy), compare_layout, config)[0]
    assert format_verdict(found, TOLERANCE) == "equal"
    # The comparison is of something: the gradients of every parameter at every step.
    assert len([d for d in found if d.quantity == "gradient"]) > 3 * 10


FEATURED = [
    (name, family)
    for i, name in enumerate(FEATURE_STRATEGIES)
    for family in [list(FEATURES)[i % len(FEATURES)]]
    if name in feature_strategies(FEATURES[family])
]
# Tables that all blocks of a stack share, split by heads, and under a backward in two halves.
FEATURED += [
    (name, "encoder-decoder (T5)")
    for name in (
        "tensor 4",
        "pipeline 2, zero_bubble",
        "fsdp 2 × tensor 2 × pipeline 2",
        "context 2, ulysses",
    )
]
FEATURED += [
    ("tensor 2", "encoder (BERT)"),
    ("context 2 × tensor 2", "encoder (BERT)"),
    ("tensor 2, whole sequences", "encoder (BERT, classes)"),
    ("fsdp 2", "encoder-decoder (Marian)"),
    ("fsdp 2 × tensor 2 × pipeline 2", "encoder-decoder (Whisper)"),
    ("context 2 × tensor 2", "encoder-decoder (Whisper)"),
    ("context 2, ulysses", "encoder-decoder (audio, rope)"),
    # CTC couples all vectors and all classes of an utterance.
    ("tensor 4", "encoder (speech)"),
    ("context 2 × tensor 2", "encoder (speech)"),
    ("context 2, ring", "encoder (speech)"),
    ("fsdp 2 × tensor 2 × pipeline 2", "encoder (speech)"),
]
# A norm over heads that ranks share.
FEATURED.append(("tensor 4", "decoder (OLMo 2)"))
FEATURED = sorted(set(FEATURED))


@pytest.mark.parametrize(("strategy", "family"), FEATURED)
def test_features_of_layers_equal_one_process(ranks, strategy, family):
    config = VerifyConfig(strategy=STRATEGIES[strategy], model=FEATURES[family])
    found = ranks.run(world_size(config.strategy), compare_layout, config)[0]
    assert format_verdict(found, TOLERANCE) == "equal"


COMPRESSED = [case for case in iter_cases() if case[2].compress != CompressConfig()]


# Of every compressed model two strategies or more, in turn.
@pytest.mark.parametrize(
    "config", [c[2] for c in COMPRESSED[::5]], ids=[f"{m}-{s}" for m, s, _ in COMPRESSED[::5]]
)
def test_a_compressed_model_equals_one_process(ranks, config):
    found = ranks.run(world_size(config.strategy), compare_layout, config)[0]
    assert format_verdict(found, TOLERANCE) == "equal"


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("family", ["decoder (Llama)", "decoder (GPT-2)", "encoder-decoder"])
def test_pipelines_of_tied_and_untied_weights(ranks, schedule, family):
    """STRATEGIES run the families as they are: Llama untied, the others tied."""
    other = replace(FAMILIES[family], tied=not FAMILIES[family].tied)
    config = VerifyConfig(strategy=StrategyConfig(pipeline=2, schedule=schedule), model=other)
    found = ranks.run(2, compare_layout, config)[0]
    assert format_verdict(found, TOLERANCE) == "equal"
    assert ("head.output.weight" in {d.parameter for d in found}) is not other.tied


@pytest.mark.parametrize("mode", ["selective", "block"])
@pytest.mark.parametrize("family", ["decoder (Llama)", "encoder-decoder"])
@pytest.mark.parametrize(
    "strategy",
    [StrategyConfig(shard=2), StrategyConfig(pipeline=2, schedule="1f1b")],
    ids=["fsdp 2", "pipeline 2"],
)
def test_recomputation_changes_nothing(ranks, mode, family, strategy):
    config = VerifyConfig(strategy=strategy, model=FAMILIES[family], activation_checkpointing=mode)
    assert format_verdict(ranks.run(2, compare_layout, config)[0], TOLERANCE) == "equal"


# Products that only their sum over the ranks reads are not kept: of adapters, biases, integers too.
SUMMED = {
    "sequences in parts": VerifyConfig(
        StrategyConfig(tensor=2), FAMILIES["decoder (Llama)"], lora=LORA
    ),
    "whole sequences": VerifyConfig(
        StrategyConfig(tensor=2, sequence_parallel=False), FAMILIES["decoder (GPT-2)"]
    ),
    "norms over all heads": VerifyConfig(StrategyConfig(tensor=2), FEATURES["decoder (OLMo 2)"]),
    "integers": VerifyConfig(
        StrategyConfig(shard=2, tensor=2), FAMILIES["decoder (Llama)"], CompressConfig(bits=8)
    ),
}


@pytest.mark.parametrize("case", SUMMED)
def test_what_split_layers_keep_changes_nothing(ranks, case):
    config = replace(SUMMED[case], activation_checkpointing="selective")
    found = ranks.run(world_size(config.strategy), compare_layout, config)[0]
    assert format_verdict(found, TOLERANCE) == "equal"


def test_one_rank_equals_plain_torch(ranks):
    config = VerifyConfig(model=FAMILIES["decoder (Llama)"])
    assert format_verdict(ranks.run(1, compare_layout, config)[0], TOLERANCE) == "equal"


def find_fault(ranks, fault, strategy):
    config = VerifyConfig(strategy=strategy, model=FAMILIES["decoder (Llama)"], fault=fault)
    found = ranks.run(world_size(strategy), compare_layout, config)[0]
    return found, first_mismatch(found, TOLERANCE)


@pytest.mark.parametrize(
    ("strategy", "axis"),
    [
        (StrategyConfig(replicate=2), "replicate"),
        (StrategyConfig(shard=2), "shard"),
        (StrategyConfig(replicate=2, shard=2), "replicate × shard"),
    ],
)
def test_a_skipped_gradient_sum_is_caught_and_named(ranks, strategy, axis):
    found, fault = find_fault(ranks, "skip_gradient_sum", strategy)
    assert fault is not None
    assert (fault.quantity, fault.step, fault.axis) == ("gradient", 0, axis)
    # The fault is planted in one parameter (DDP) or in the last block (FSDP): nothing else differs.
    wrong = {d.parameter for d in found if d.step == 0 and d.parameter and d.value > TOLERANCE}
    assert wrong == {fault.parameter} or all(name.startswith("blocks.1.") for name in wrong)


def test_a_mean_of_means_is_caught(ranks):
    _, fault = find_fault(ranks, "local_target_count", StrategyConfig(replicate=2))
    assert fault is not None
    assert (fault.quantity, fault.step) == ("gradient", 0)


def test_a_local_norm_is_caught(ranks):
    found, fault = find_fault(ranks, "local_gradient_norm", StrategyConfig(shard=2))
    assert fault is not None
    assert fault.quantity == "norm"
    assert largest_difference(found, "weight") > 1e-4  # clipped by the wrong norm


def test_a_skipped_sum_of_a_table_that_stages_share_is_caught(ranks):
    config = VerifyConfig(
        strategy=StrategyConfig(pipeline=2),
        model=FEATURES["encoder-decoder (T5)"],
        fault="skip_shared_gradient_sum",
    )
    found = ranks.run(2, compare_layout, config)[0]
    wrong = {d.parameter for d in found if d.step == 0 and d.parameter and d.value > TOLERANCE}
    assert wrong == {"relative_bias.source.weight", "relative_bias.target.weight"}


def test_no_log_is_too_narrow_for_the_table(capsys):
    found = [Difference(quantity, 0, 1e-15) for quantity in QUANTITIES]
    names = ("encoder-decoder, pool, merge, int4, sparse", "context 2 × tensor 2, whole sequences")
    assert print_report({names: found}, TOLERANCE)
    line = next(line for line in capsys.readouterr().out.splitlines() if names[0] in line)
    assert line.count("1.0e-15") == 4 and line.rstrip().endswith("equal")


def test_every_fault_can_be_asked_for():
    assert tuple(key_facts(VerifyConfig, "fault").choices) == ("", *FAULTS)
    assert set(filter(None, FAULT_AXES.values())) <= set(AXES)


def test_the_checks_know_the_micro_batches_of_a_verification():
    assert conf.validation.layout.VERIFIED == MICRO_BATCHES


@pytest.mark.parametrize(
    ("fault", "sequence_parallel", "family"),
    [
        ("skip_input_gradient_sum", False, "decoder (Llama)"),
        ("skip_output_sum", False, "decoder (GPT-2)"),
        ("skip_input_gradient_sum", True, "encoder-decoder"),
        ("skip_sequence_gather", True, "decoder (Llama)"),
        ("skip_output_sum", True, "encoder (ViT)"),
        ("skip_vocabulary_mask", True, "decoder (Llama)"),
        ("skip_vocabulary_mask", False, "encoder-decoder"),
    ],
)
def test_a_fault_of_a_split_layer_is_caught_and_named(ranks, fault, sequence_parallel, family):
    strategy = StrategyConfig(tensor=2, sequence_parallel=sequence_parallel)
    config = VerifyConfig(strategy=strategy, model=FAMILIES[family], fault=fault)
    first = first_mismatch(ranks.run(2, compare_layout, config)[0], TOLERANCE)
    assert first is not None
    assert first.parameter and first.axis == "tensor" and first.step == 0


@pytest.mark.parametrize(
    ("fault", "sequence_parallel", "family", "parameter"),
    [
        # Norms of a part of the positions; norms that the heads share; norms over all heads.
        ("skip_partial_gradient_sum", True, "decoder (OLMo 2)", "attention_output_norm.weight"),
        ("skip_partial_gradient_sum", False, "decoder (Gemma 3)", "attention.query_norm.weight"),
        ("skip_norm_gradient_mean", False, "decoder (OLMo 2)", "attention.query.weight"),
    ],
)
def test_a_fault_of_a_norm_is_caught_and_named(ranks, fault, sequence_parallel, family, parameter):
    strategy = StrategyConfig(tensor=2, sequence_parallel=sequence_parallel)
    config = VerifyConfig(strategy=strategy, model=FEATURES[family], fault=fault)
    found = ranks.run(2, compare_layout, config)[0]
    wrong = {d.parameter for d in found if d.quantity == "gradient" and d.value > TOLERANCE}
    assert f"blocks.1.{parameter}" in wrong
    first = first_mismatch(found, TOLERANCE)
    assert first is not None and first.axis == "tensor" and first.step == 0


@pytest.mark.parametrize(
    ("fault", "family", "schedule"),
    [
        ("stale_stage_input", "decoder (Llama)", "gpipe"),
        ("stale_stage_input", "encoder-decoder", "interleaved"),
        ("skip_tied_gradient_sum", "decoder (GPT-2)", "1f1b"),
        ("local_loss_scale", "encoder-decoder", "gpipe"),
        ("local_gradient_norm", "decoder (Llama)", "gpipe"),
    ],
)
def test_a_fault_of_a_pipeline_is_caught_and_named(ranks, fault, family, schedule):
    strategy = StrategyConfig(pipeline=2, schedule=schedule)
    config = VerifyConfig(strategy=strategy, model=FAMILIES[family], fault=fault)
    first = first_mismatch(ranks.run(2, compare_layout, config)[0], TOLERANCE)
    assert first is not None and first.step == 0
    if fault == "local_gradient_norm":
        assert first.quantity == "norm"
        return
    assert (first.quantity, first.axis) == ("gradient", "pipeline")
    if fault == "skip_tied_gradient_sum":
        assert first.parameter == "embed.tokens.weight"


@pytest.mark.parametrize("family", ["decoder (GPT-2)", "encoder-decoder"])
def test_a_skipped_step_of_a_ring_is_caught_and_named(ranks, family):
    strategy = StrategyConfig(context=2, context_method="ring")
    config = VerifyConfig(strategy=strategy, model=FAMILIES[family], fault="skip_ring_step")
    first = first_mismatch(ranks.run(2, compare_layout, config)[0], TOLERANCE)
    assert first is not None
    assert (first.quantity, first.axis, first.step) == ("gradient", "context", 0)
