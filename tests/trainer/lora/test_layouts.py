"""Adapters on frozen weights take the same steps under every layout, at their own cost only."""

from dataclasses import replace

import pytest
import torch

from conf.validation.validate import find_problems
from parallel.pipeline.schedules import SCHEDULES, stage_to_rank
from parallel.strategy import StrategyConfig, world_size
from trainer.build import parallel_model
from trainer.compress.compression import Compression, rounded_weight
from trainer.compress.quantized_linear import CompressedLinear, fake_quantize
from trainer.config.lora import FACTORS, LoraConfig
from trainer.config.train import CompressConfig, ModelConfig, OptimConfig, VerifyConfig
from trainer.optim.parameter_groups import has_weight_decay
from trainer.optim.registry import build_optimizer
from trainer.precision import PRECISIONS
from trainer.verify.cases import FAMILIES, LORA, PACKED, STRATEGIES, iter_cases, scale_down
from trainer.verify.comm_volume import step_traffic
from trainer.verify.compare import compare_layout, first_mismatch, format_verdict

TOLERANCE = 1e-10
LLAMA, GPT = FAMILIES["decoder (Llama)"], FAMILIES["decoder (GPT-2)"]
CASES = [
    ("ddp 2", "decoder (GPT-2)"),
    ("fsdp 2", "encoder-decoder"),
    ("hsdp 2×2", "encoder (ViT)"),
    ("tensor 2", "encoder-decoder"),
    ("tensor 4, whole sequences", "decoder (Llama)"),
    ("fsdp 2 × tensor 4", "decoder (Llama)"),
    ("tensor 2 × pipeline 2, zero_bubble", "decoder (GPT-2)"),
    ("context 2, ring", "decoder (Llama)"),
    ("context 2 × tensor 2", "encoder-decoder"),
]


def assert_equal(found) -> None:
    assert format_verdict(found, TOLERANCE) == "equal"
    frozen = [d for d in found if d.parameter and not d.parameter.endswith(FACTORS)]
    assert frozen and all(d.value == 0.0 for d in frozen)  # to the bit, and without a gradient
    learned = [d for d in found if d.parameter.endswith("lora_a")]
    assert learned


@pytest.mark.parametrize(("strategy", "family"), CASES)
def test_adapters_learn_as_in_one_process(ranks, strategy, family):
    config = VerifyConfig(STRATEGIES[strategy], FAMILIES[family], lora=LORA, steps=2)
    assert_equal(ranks.run(world_size(config.strategy), compare_layout, config)[0])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_adapters_learn_in_every_pipeline(ranks, schedule):
    """Split an encoder-decoder, whose first stage hands on embedded targets alone."""
    config = VerifyConfig(
        StrategyConfig(pipeline=2, schedule=schedule),
        FAMILIES["encoder-decoder"],
        lora=replace(LORA, targets=["query", "down"]),
        steps=2,
    )
    assert_equal(ranks.run(2, compare_layout, config)[0])


@pytest.mark.parametrize("mode", ["selective", "block"])
def test_recomputed_blocks_drop_the_same_inputs(ranks, mode):
    config = VerifyConfig(
        StrategyConfig(shard=2), LLAMA, lora=LORA, steps=2, activation_checkpointing=mode
    )
    assert_equal(ranks.run(2, compare_layout, config)[0])


def test_every_strategy_is_verified_with_adapters():
    named = [name for model, name, case in iter_cases() if case.lora.rank]
    assert set(named) >= set(STRATEGIES)


@pytest.mark.parametrize("sequence_parallel", [True, False])
def test_an_unsummed_factor_is_caught(ranks, sequence_parallel):
    strategy = StrategyConfig(tensor=2, sequence_parallel=sequence_parallel)
    config = VerifyConfig(strategy, LLAMA, lora=LORA, fault="skip_factor_gradient_sum")
    found = ranks.run(2, compare_layout, config)[0]
    wrong = {d.parameter for d in found if d.step == 0 and d.value > TOLERANCE and d.parameter}
    assert first_mismatch(found, TOLERANCE).quantity == "gradient"
    columns = ("query", "key", "value", "gate", "up")
    assert {tuple(name.split(".")[-2:]) for name in wrong} == {
        *((name, "lora_a") for name in columns),
        *((name, "lora_b") for name in ("output", "down")),
    }


@pytest.mark.parametrize("strategy", [StrategyConfig(shard=2), StrategyConfig(pipeline=2)])
def test_a_frozen_weight_in_the_norm_is_caught(ranks, strategy):
    config = VerifyConfig(strategy, LLAMA, lora=LORA, fault="count_frozen_weight")
    found = ranks.run(2, compare_layout, config)[0]
    assert first_mismatch(found, TOLERANCE).quantity == "gradient"
    assert any(d.quantity == "norm" and d.step == 0 and d.value > TOLERANCE for d in found)


@pytest.mark.parametrize(
    ("strategy", "family"),
    [
        (StrategyConfig(replicate=2), "decoder (GPT-2)"),
        (StrategyConfig(replicate=2, shard=2), "encoder (ViT)"),
        (StrategyConfig(tensor=4), "decoder (Llama)"),  # with shared key/value heads
        (StrategyConfig(tensor=2, sequence_parallel=False), "encoder-decoder"),
        (StrategyConfig(shard=2, tensor=2), "decoder (Llama)"),
        (StrategyConfig(tensor=2, pipeline=2, schedule="zero_bubble"), "decoder (GPT-2)"),
        (StrategyConfig(replicate=2, reduce="int8"), "decoder (Llama)"),
    ],
    ids=str,
)
def test_frozen_weights_cause_no_traffic(ranks, strategy, family):
    model = scale_down(
        FAMILIES[family], strategy.tensor, len(stage_to_rank(strategy, strategy.pipeline))
    )
    lora = replace(LORA, dropout=0.0)
    for counted, formula in ranks.run(world_size(strategy), step_traffic, strategy, model, lora):
        assert counted == formula


def own_state(runtime, model: ModelConfig, strategy: StrategyConfig):
    worker = parallel_model(
        model, strategy, runtime, PRECISIONS["fp32"], lora=LoraConfig(2), seed=5
    )
    optimizer = build_optimizer(worker.parameters(), OptimConfig())
    plain = parallel_model(model, StrategyConfig(replicate=2), runtime, PRECISIONS["fp32"], seed=5)
    weights = {n: p.detach().clone() for n, p in worker.parameters().items()}
    base = {n: p.detach().clone() for n, p in plain.parameters().items()}
    tokens = torch.arange(12)[None]
    with worker.evaluation_mode(), plain.evaluation_mode():
        same = worker.forward({"tokens": tokens}).equal(plain.forward({"tokens": tokens}))
    return weights, base, set(optimizer.state()), set(worker.error_feedback_state()), same


def test_a_new_adapter_changes_nothing_and_frozen_weights_have_no_state(ranks):
    strategy = StrategyConfig(replicate=2, reduce="int8")
    model = scale_down(LLAMA)
    weights, base, moments, feedback, same = ranks.run(2, own_state, model, strategy)[0]
    assert same  # B is zero
    for name, weight in base.items():
        assert weight.equal(weights[name]), name
    factors = weights.keys() - base.keys()
    assert moments == factors == {n.removesuffix(".sent").removesuffix(".summed") for n in feedback}
    for name in factors:
        assert not has_weight_decay(name, weights[name].shape)
        if name.endswith("lora_b"):
            assert not weights[name].any()
            continue
        bound = weights[name].shape[1] ** -0.5
        assert 0.9 * bound < weights[name].abs().max() <= bound
        assert weights[name].mean().abs() < 0.3 * bound


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora": LoraConfig(4, targets=["quary"])}, "did you mean query"),
        (
            {"lora": LoraConfig(4, targets=["gate"]), "model": GPT},
            "no gate",
        ),
        ({"lora": LoraConfig(4), "compress": CompressConfig(teacher="a")}, "compress.teacher=a"),
        ({"lora": LoraConfig(4), "compress": CompressConfig(prune_ffn=0.5)}, "prune_ffn"),
        ({"lora": LoraConfig(4), "compress": CompressConfig(bits=4)}, "set compress.input_bits=0"),
        ({"fault": "count_frozen_weight"}, "lora.rank=0"),
        ({"lora": LoraConfig(-1)}, "lora.rank=-1 must be at least 0"),
    ],
)
def test_what_adapters_do_not_go_with_is_refused(changes, message):
    found = find_problems(replace(VerifyConfig(model=LLAMA), **changes), 1)
    assert any(message in problem for problem in found), found


@pytest.mark.parametrize("strategy", ["single", "tensor 4", "fsdp 2 × tensor 2", "pipeline 2, zbv"])
def test_frozen_weights_of_few_bits_are_rounded_once(ranks, strategy):
    packed = PACKED[len(strategy) % len(PACKED)]
    layout = STRATEGIES.get(strategy, StrategyConfig())
    config = VerifyConfig(layout, LLAMA, packed, LORA, steps=2)
    found = ranks.run(world_size(layout), compare_layout, config)[0]
    assert format_verdict(found, TOLERANCE) == "equal"


@pytest.mark.parametrize(("bits", "group"), [(8, 0), (4, 0), (4, 3), (2, 0)])
def test_packed_weights_take_few_bits_and_unpack_to_rounded_ones(bits, group):
    weight = torch.randn(5, 9, generator=torch.Generator().manual_seed(0))
    config = CompressConfig(bits=bits, group=group, input_bits=0)
    layer = CompressedLinear(9, 5, bias=False)
    layer.lens = Compression(config).lens
    packed = layer.rounded(weight)
    assert packed.codes.shape == (5, 9 if bits > 4 else 5)  # two integers of 4 bits in a byte
    groups = weight.view(-1, group or 9)
    expected = fake_quantize(groups, bits).view_as(weight)
    torch.testing.assert_close(packed.unpack(torch.float32), expected, rtol=0, atol=1e-7)
    torch.testing.assert_close(rounded_weight(weight, config), expected, rtol=0, atol=1e-7)
    layer.packed = packed
    x = torch.randn(2, 9, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(layer(x), x @ expected.T)
    torch.testing.assert_close(x.grad, expected.sum(0).expand(2, -1))
