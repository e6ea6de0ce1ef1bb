"""Whisper's config.json as published, and what of it is refused."""

import json
from dataclasses import replace

import pytest
import torch
from reference_models import build_reference
from safetensors.torch import load_file, save_file

from trainer.config.train import ConfigError
from trainer.huggingface.registry import architecture_for, read_model
from trainer.huggingface.weights import WeightReader

TINY = {  # openai/whisper-tiny.en as published, without the list of suppressed tokens
    "_name_or_path": "openai/whisper-tiny.en",
    "activation_dropout": 0.0,
    "activation_function": "gelu",
    "architectures": ["WhisperForConditionalGeneration"],
    "attention_dropout": 0.0,
    "begin_suppress_tokens": [220, 50256],
    "bos_token_id": 50257,
    "d_model": 384,
    "decoder_attention_heads": 6,
    "decoder_ffn_dim": 1536,
    "decoder_layerdrop": 0.0,
    "decoder_layers": 4,
    "decoder_start_token_id": 50257,
    "dropout": 0.0,
    "encoder_attention_heads": 6,
    "encoder_ffn_dim": 1536,
    "encoder_layerdrop": 0.0,
    "encoder_layers": 4,
    "eos_token_id": 50256,
    "forced_decoder_ids": [[1, 50362]],
    "init_std": 0.02,
    "is_encoder_decoder": True,
    "max_length": 448,
    "max_source_positions": 1500,
    "max_target_positions": 448,
    "model_type": "whisper",
    "num_hidden_layers": 4,
    "num_mel_bins": 80,
    "pad_token_id": 50256,
    "scale_embedding": False,
    "suppress_tokens": [],
    "torch_dtype": "float32",
    "use_cache": True,
    "vocab_size": 51864,
}
SMALL = {
    "vocab_size": 50,
    "num_mel_bins": 4,
    "max_source_positions": 7,
    "max_target_positions": 9,
    "d_model": 8,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 8,
    "decoder_ffn_dim": 8,
    "pad_token_id": 0,
}


def read(folder, **fields):
    (folder / "config.json").write_text(json.dumps(fields))
    return read_model(folder)[1]


def test_published_whisper(tmp_path):
    model = read(tmp_path, **TINY)
    assert (model.inputs, model.mels, model.audio_positions) == ("audio", 80, 1500)
    assert (model.max_positions, model.start_token) == (448, 50257)
    assert (model.positions, model.attention_bias, model.norm_eps) == ("learned", "no_key", 1e-5)
    assert architecture_for(model).model_type == "whisper"
    assert architecture_for(replace(model, ctc_weight=0.3)).model_type == "whisper"  # without it


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"encoder_attention_heads": 8}, "encoder_attention_heads"),
        ({"encoder_ffn_dim": 1024}, "encoder_ffn_dim"),
        ({"activation_function": "quick_gelu"}, "activation_function"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings"),
        ({"rotary": True}, "rotary"),
        ({"architectures": ["WhisperForAudioClassification"]}, "another head"),
    ],
)
def test_what_is_not_built_is_refused(tmp_path, fields, told):
    with pytest.raises(ConfigError, match=told):
        read(tmp_path, **TINY | fields)


@pytest.mark.parametrize(
    ("change", "reads"), [(1e-4, True), (1e-2, False)], ids=["rounded", "learned"]
)
def test_positions_of_the_encoder_that_were_trained_are_refused(tmp_path, change, reads):
    build_reference("WhisperForConditionalGeneration", "WhisperConfig", **SMALL).save_pretrained(
        tmp_path
    )
    path, name = tmp_path / "model.safetensors", "model.encoder.embed_positions.weight"
    tensors = load_file(path)
    tensors[name] = tensors[name] + change * torch.eye(7, 8, dtype=torch.float64)
    save_file(tensors, path, metadata={"format": "pt"})
    if reads:
        assert WeightReader(tmp_path).model.audio_positions == 7
        return
    with pytest.raises(ConfigError, match=r"embed_positions\.weight, which is not the table of si"):
        WeightReader(tmp_path)
