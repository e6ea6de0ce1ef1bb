"""Rotary embedding beside the formulas of transformers, in float64."""

import pytest
import torch
import transformers
from reference_models import float64_for_float32
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from trainer.config.train import ModelConfig
from trainer.nn.rotary import rotary_angles

MODEL = {"width": 64, "heads": 2, "max_positions": 128, "rope_original_positions": 32}
YARN = {"original_max_position_embeddings": 32, "beta_slow": 1.0, "beta_fast": 32.0}
KINDS = {
    "linear": ({}, {}),
    "dynamic": ({}, {}),
    "yarn": ({}, YARN),
    "yarn, attention factor": ({"rope_attention_factor": 1.5}, YARN | {"attention_factor": 1.5}),
    "yarn, other turns": (
        {"rope_slow_turns": 2.0, "rope_fast_turns": 5.0},
        YARN | {"beta_slow": 2.0, "beta_fast": 5.0},
    ),
    "llama3": (
        {"rope_slow_turns": 0.5, "rope_fast_turns": 3.0},
        {
            "low_freq_factor": 0.5,
            "high_freq_factor": 3.0,
            "original_max_position_embeddings": 32,
        },
    ),
}


@pytest.mark.parametrize("case", KINDS)
def test_scaled_angles_are_those_of_transformers(case):
    kind, (ours, theirs) = case.partition(",")[0], KINDS[case]
    model = ModelConfig(**MODEL, rope_type=kind, rope_scaling=4.0, **ours)
    rope = {"rope_type": kind, "rope_theta": 10_000.0, "factor": 4.0, **theirs}
    with float64_for_float32():
        config = transformers.LlamaConfig(
            hidden_size=64,
            num_attention_heads=2,
            max_position_embeddings=32 if kind == "dynamic" else 128,
            rope_parameters=rope,
        )
        frequency, factor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len=128)
    positions = torch.arange(128, dtype=torch.float64)
    angle = positions[:, None] * frequency
    cos, sin = rotary_angles(torch.arange(128)[None], model, torch.float64)
    torch.testing.assert_close(cos[0, :, 0], angle.cos() * factor, rtol=0, atol=1e-12)
    torch.testing.assert_close(sin[0, :, 0], angle.sin() * factor, rtol=0, atol=1e-12)


def test_a_factor_alone_means_llama_3_1():
    plain = ModelConfig(width=64, heads=2, rope_theta=500_000.0, rope_scaling=8.0)
    spelt = ModelConfig(
        width=64,
        heads=2,
        rope_theta=500_000.0,
        rope_scaling=8.0,
        rope_type="llama3",
        rope_original_positions=8192,
        rope_slow_turns=1.0,
        rope_fast_turns=4.0,
    )
    positions = torch.arange(40)[None]
    for ours, theirs in zip(
        rotary_angles(positions, plain, torch.float64),
        rotary_angles(positions, spelt, torch.float64),
        strict=True,
    ):
        assert ours.equal(theirs)
