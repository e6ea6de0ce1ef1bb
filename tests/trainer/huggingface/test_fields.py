"""Fields of published config.json files of decoders, and those that are refused."""

import json
from dataclasses import replace

import pytest

from trainer.config.train import ConfigError, ModelConfig
from trainer.huggingface.registry import architecture_for, read_model

GEMMA3_1B = {  # as published, by transformers 4.50
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "attention_bias": False,
    "attn_logit_softcapping": None,
    "cache_implementation": "hybrid",
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "max_position_embeddings": 32768,
    "num_attention_heads": 4,
    "num_hidden_layers": 26,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "vocab_size": 262144,
}
QWEN3 = {
    "model_type": "qwen3",
    "attention_bias": False,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
MISTRAL = {
    "model_type": "mistral",
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "vocab_size": 32000,
}
PHI3 = MISTRAL | {
    "model_type": "phi3",
    "sliding_window": 2047,
    "original_max_position_embeddings": 4096,
}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


def read(folder, **fields) -> ModelConfig:
    (folder / "config.json").write_text(json.dumps(fields))
    return read_model(folder)[1]


def test_published_gemma(tmp_path):
    model = read(tmp_path, **GEMMA3_1B)
    assert (model.sliding_window, model.full_attention_every) == (512, 6)
    assert (model.rope_theta, model.local_rope_theta) == (1e6, 1e4)
    assert (model.attention_scale, model.embed_scale, model.tied) == (0.0, 1152**0.5, True)
    assert (model.norm_placement, model.qk_norm) == ("sandwich", "head")


def test_published_qwen3_with_yarn_in_the_words_of_transformers_4(tmp_path):
    model = read(tmp_path, **QWEN3 | {"rope_scaling": YARN})
    assert (model.head_width, model.qk_norm, model.sliding_window) == (128, "head", 0)
    assert (model.rope_type, model.rope_scaling) == ("yarn", 4.0)
    assert (model.rope_original_positions, model.rope_fast_turns) == (32768, 32.0)


def test_a_window_that_is_not_said_is_that_of_transformers(tmp_path):
    assert read(tmp_path, **MISTRAL).sliding_window == 4096
    assert read(tmp_path, **MISTRAL | {"sliding_window": None}).sliding_window == 0
    assert read(tmp_path, **MISTRAL | {"sliding_window": 1024}).sliding_window == 1024
    assert read(tmp_path, **PHI3).sliding_window == 2047


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        (PHI3 | {"rope_scaling": {"type": "longrope", "short_factor": [1.0]}}, "rope_scaling"),
        (PHI3 | {"partial_rotary_factor": 0.75}, "partial_rotary_factor"),
        (QWEN3 | {"rope_scaling": YARN | {"truncate": False}}, "truncate"),
        (QWEN3 | {"rope_scaling": YARN | {"finetuned": True}}, "finetuned"),
        (QWEN3 | {"rope_scaling": {"type": "linear"}}, "factor"),
        (QWEN3 | {"use_sliding_window": True}, "use_sliding_window"),
        (GEMMA3_1B | {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        (GEMMA3_1B | {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        (
            GEMMA3_1B | {"layer_types": 24 * ["sliding_attention"] + 2 * ["full_attention"]},
            "layer_types",
        ),
    ],
)
def test_what_is_not_built_is_refused(tmp_path, fields, told):
    with pytest.raises(ConfigError, match=told):
        read(tmp_path, **fields)


def test_a_folder_that_refuses_a_setting_is_not_written(tmp_path):
    phi3 = read(tmp_path, **PHI3 | {"sliding_window": None, "rope_scaling": None})
    assert architecture_for(phi3, like=tmp_path).model_type == "phi3"
    longer = replace(phi3, rope_type="linear", rope_scaling=2.0, rope_original_positions=32768)
    assert architecture_for(longer, like=tmp_path).model_type == "llama"


@pytest.mark.parametrize(
    "change",
    [
        {"norm_placement": "post"},
        {"qk_norm": "width"},
        {"attention_scale": 0.5},
        {"embed_scale": 2.0},
        {"sliding_window": 8, "full_attention_every": 2},
        # Its base grows with max_positions here, and with each batch there.
        {"rope_type": "dynamic", "rope_scaling": 2.0, "rope_original_positions": 8},
    ],
    ids=str,
)
def test_a_model_that_no_architecture_says_is_not_written(change):
    plain = ModelConfig(vocab_size=50, max_positions=16)
    assert architecture_for(plain).model_type == "llama"
    with pytest.raises(ConfigError, match="none of the architectures"):
        architecture_for(ModelConfig(vocab_size=50, max_positions=16, **change))
