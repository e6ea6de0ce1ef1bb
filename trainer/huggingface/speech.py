"""Encoder-decoders from audio to tokens: Whisper."""

from collections.abc import Iterator
from typing import Any

from trainer.config.train import ModelConfig, has_key_bias, inputs_of
from trainer.huggingface.architecture import Architecture, TensorMap
from trainer.huggingface.encoder_decoders import (
    PRE_NORMS,
    bart_layers,
    is_bart_like,
    read_bart_fields,
    write_bart_fields,
)
from trainer.huggingface.fields import ConfigFields

# Read by another head, by the training or by the generation of transformers alone. Generation
# reads generation_config.json here too, which says what some of them said in older files.
OF_OTHERS = (
    *("use_weighted_layer_sum", "classifier_proj_size", "median_filter_width"),
    *("apply_spec_augment", "mask_time_prob", "mask_time_length", "mask_time_min_masks"),
    *("mask_feature_prob", "mask_feature_length", "mask_feature_min_masks"),
    *("suppress_tokens", "begin_suppress_tokens", "forced_decoder_ids"),
)


def _read_whisper(fields: ConfigFields) -> dict[str, Any]:
    values = read_bart_fields(fields)
    fields.expect("tie_word_embeddings", True)
    for name in OF_OTHERS:
        fields.take(name, None)
    return values | {
        "inputs": "audio",
        "audio_fill": "silence",
        "mels": fields.take("num_mel_bins", 80),
        "audio_positions": fields.take("max_source_positions", 1500),
        "max_positions": fields.take("max_target_positions", 448),
        "positions": "learned",
        "sinusoid": "whisper",
        "attention_bias": "no_key",
        "embed_scale": 1.0,  # scale_embedding is not read by Whisper's class
    }


def _write_whisper(model: ModelConfig) -> dict[str, Any]:
    fields = write_bart_fields(model)
    del fields["max_position_embeddings"]
    return fields | {
        "num_mel_bins": model.mels,
        "max_source_positions": model.audio_positions,
        "max_target_positions": model.max_positions,
    }


def _whisper_tensors(model: ModelConfig) -> Iterator[TensorMap]:
    depth = model.encoder_layers or model.layers
    for i, inputs in ((1, model.mels), (2, model.width)):
        ours, theirs = f"embed.encoder.convolution_{i}", f"model.encoder.conv{i}"
        kernel = (model.width, inputs, 3)
        yield TensorMap(f"{theirs}.weight", (f"{ours}.weight",), shape=kernel)
        yield TensorMap(f"{theirs}.bias", (f"{ours}.bias",))
    table = (model.audio_positions, model.width)
    yield TensorMap("model.encoder.embed_positions.weight", (), shape=table, sinusoids=True)
    yield TensorMap("model.decoder.embed_tokens.weight", ("embed.tokens.weight",))
    yield TensorMap("model.decoder.embed_positions.weight", ("embed.positions.weight",))
    yield from bart_layers(model, PRE_NORMS)
    for part in ("weight", "bias"):
        norm = f"blocks.{depth - 1}.turn_norm.{part}"
        yield TensorMap(f"model.encoder.layer_norm.{part}", (norm,))
        yield TensorMap(f"model.decoder.layer_norm.{part}", (f"head.norm.{part}",))


def _is_whisper(model: ModelConfig) -> bool:
    kinds = (model.norm_placement, model.positions, model.sinusoid)
    return (
        is_bart_like(model)
        and kinds == ("pre", "learned", "whisper")
        and (inputs_of(model), model.audio_stride) == ("audio", 2)
        and model.audio_fill == "silence"
        and not has_key_bias(model)
    )


SPEECH = (
    Architecture(
        "whisper",
        "WhisperForConditionalGeneration",
        "speech",
        _read_whisper,
        _write_whisper,
        _is_whisper,
        _whisper_tensors,
        tied_copies=(("proj_out.weight", "model.decoder.embed_tokens.weight"),),
    ),
)
