"""Encoder-decoders of tokens: T5, Marian, and M2M100, which NLLB is one of."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from trainer.config.train import (
    ModelConfig,
    attention_biases,
    has_key_bias,
    is_encoder_decoder,
    is_gated,
)
from trainer.huggingface.architecture import Architecture, TensorMap
from trainer.huggingface.fields import ACTIVATIONS, THEIR_ACTIVATION, ConfigFields

T5_FEED_FORWARD = {"relu": "relu", "gated-gelu": "geglu_tanh", "gated-silu": "swiglu"}


def _read_t5(fields: ConfigFields) -> dict[str, Any]:
    width, heads = fields.take("d_model"), fields.take("num_heads")
    layers, head_width = fields.take("num_layers"), fields.take("d_kv")
    fields.expect("is_encoder_decoder", True)
    for name in ("dense_act_fn", "is_gated_act", "output_past"):  # follow from others
        fields.take(name, None)
    # Original T5 scales what its tied head reads; v1.1 has a head of its own and does not.
    tied = fields.take("tie_word_embeddings", True) and fields.take("scale_decoder_outputs", True)
    fields.take("scale_decoder_outputs", None)
    return {
        "family": "encoder_decoder",
        "layers": fields.take("num_decoder_layers", layers),
        "encoder_layers": layers,
        "width": width,
        "heads": heads,
        "head_width": 0 if head_width * heads == width else head_width,
        "ffn_width": fields.take("d_ff"),
        "vocab_size": fields.take("vocab_size"),
        "max_positions": fields.take("n_positions", 512),
        "norm": "rmsnorm",
        "norm_eps": fields.take("layer_norm_epsilon", 1e-6),
        "activation": fields.take_choice("feed_forward_proj", T5_FEED_FORWARD, "relu"),
        "positions": "relative",
        "relative_buckets": fields.take("relative_attention_num_buckets", 32),
        "relative_distance": fields.take("relative_attention_max_distance", 128),
        "attention_scale": 1.0,
        "output_scale": width**-0.5 if tied else 1.0,
        "start_token": fields.take("decoder_start_token_id", -1),
        "tied": tied,
        "bias": False,
    }


def _write_t5(model: ModelConfig) -> dict[str, Any]:
    names = {ours: theirs for theirs, ours in T5_FEED_FORWARD.items()}
    start = {} if model.start_token < 0 else {"decoder_start_token_id": model.start_token}
    return {
        "d_model": model.width,
        "d_kv": model.head_width or model.width // model.heads,
        "d_ff": model.ffn_width,
        "num_layers": model.encoder_layers or model.layers,
        "num_decoder_layers": model.layers,
        "num_heads": model.heads,
        "vocab_size": model.vocab_size,
        "n_positions": model.max_positions,
        "layer_norm_epsilon": model.norm_eps,
        "feed_forward_proj": names[model.activation],
        "relative_attention_num_buckets": model.relative_buckets,
        "relative_attention_max_distance": model.relative_distance,
        "dropout_rate": model.dropout,
        "tie_word_embeddings": model.tied,
        "is_encoder_decoder": True,
        **start,
    }


def _t5_tensors(model: ModelConfig) -> Iterator[TensorMap]:
    depth = model.encoder_layers or model.layers
    up = {"wi_0": "gate", "wi_1": "up"} if is_gated(model) else {"wi": "up"}
    yield TensorMap("shared.weight", ("embed.tokens.weight",))
    for stack, stream, first, layers in (
        ("encoder", "source", 0, depth),
        ("decoder", "target", depth, model.layers),
    ):
        table = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        yield TensorMap(table, (f"relative_bias.{stream}.weight",), transposed=True)
        parts = [("SelfAttention", "attention", "attention_norm")]
        if stack == "decoder":
            parts.append(("EncDecAttention", "cross_attention", "cross_norm"))
        for i in range(layers):
            theirs, ours = f"{stack}.block.{i}.layer", f"blocks.{first + i}"
            for number, (name, attention, norm) in enumerate(parts):
                for letter, part in zip("qkvo", ("query", "key", "value", "output"), strict=True):
                    source = f"{theirs}.{number}.{name}.{letter}.weight"
                    yield TensorMap(source, (f"{ours}.{attention}.{part}.weight",))
                yield TensorMap(f"{theirs}.{number}.layer_norm.weight", (f"{ours}.{norm}.weight",))
            last = f"{theirs}.{len(parts)}"
            for name, part in (up | {"wo": "down"}).items():
                source = f"{last}.DenseReluDense.{name}.weight"
                yield TensorMap(source, (f"{ours}.feed_forward.{part}.weight",))
            yield TensorMap(f"{last}.layer_norm.weight", (f"{ours}.feed_forward_norm.weight",))
    yield TensorMap("encoder.final_layer_norm.weight", (f"blocks.{depth - 1}.turn_norm.weight",))
    yield TensorMap("decoder.final_layer_norm.weight", ("head.norm.weight",))
    if not model.tied:
        yield TensorMap("lm_head.weight", ("head.output.weight",))


def _is_t5(model: ModelConfig) -> bool:
    scale = model.width**-0.5 if model.tied else 1.0
    return (
        is_encoder_decoder(model)
        and (model.norm, model.norm_placement) == ("rmsnorm", "pre")
        and (model.positions, model.attention_scale) == ("relative", 1.0)
        and (model.output_scale, model.embed_scale) == (scale, 1.0)
        and not any((model.bias, *attention_biases(model), model.kv_heads % model.heads))
        and model.activation in T5_FEED_FORWARD.values()
    )


def read_bart_fields(fields: ConfigFields) -> dict[str, Any]:
    """Return the values of model.* that BART's relatives share."""
    width, heads = fields.take("d_model"), fields.take("decoder_attention_heads")
    ffn_width = fields.take("decoder_ffn_dim")
    fields.expect("encoder_attention_heads", heads)
    fields.expect("encoder_ffn_dim", ffn_width)
    fields.expect("is_encoder_decoder", True)
    for name in ("encoder_layerdrop", "decoder_layerdrop", "num_hidden_layers"):  # not in use
        fields.take(name, None)
    # What generation does, in files of transformers 4; generation_config.json says it too.
    for name in ("forced_eos_token_id", "forced_bos_token_id", "num_beams", "max_length"):
        fields.take(name, None)
    for name in ("bad_words_ids", "early_stopping", "length_penalty", "no_repeat_ngram_size"):
        fields.take(name, None)
    return {
        "family": "encoder_decoder",
        "layers": fields.take("decoder_layers"),
        "encoder_layers": fields.take("encoder_layers"),
        "width": width,
        "heads": heads,
        "ffn_width": ffn_width,
        "vocab_size": fields.take("vocab_size"),
        "norm": "layernorm",
        "norm_eps": 1e-5,
        "activation": fields.take_choice("activation_function", ACTIVATIONS),
        "embed_scale": math.sqrt(width) if fields.take("scale_embedding", False) else 1.0,
        "start_token": fields.take("decoder_start_token_id", -1),
        "tied": True,
        "bias": True,
    }


def _read_marian(fields: ConfigFields) -> dict[str, Any]:
    values = read_bart_fields(fields)
    fields.expect("share_encoder_decoder_embeddings", True)
    fields.expect("decoder_vocab_size", values["vocab_size"])
    fields.expect("tie_word_embeddings", True)
    for name in ("normalize_before", "normalize_embedding", "add_final_layer_norm"):
        fields.expect(name, False)
    for name in ("static_position_embeddings", "extra_pos_embeddings", "add_bias_logits"):
        fields.take(name, None)  # of BART's other children; unread by Marian's class
    return values | {
        "max_positions": fields.take("max_position_embeddings"),
        "norm_placement": "post",
        "positions": "sinusoidal",
        "sinusoid": "marian",
    }


def _read_m2m100(fields: ConfigFields) -> dict[str, Any]:
    values = read_bart_fields(fields)
    fields.expect("tie_word_embeddings", True)
    fields.expect("pad_token_id", 1)  # the first position is behind it
    return values | {
        "max_positions": fields.take("max_position_embeddings"),
        "positions": "sinusoidal",
        "sinusoid": "m2m100",
    }


def write_bart_fields(model: ModelConfig) -> dict[str, Any]:
    """Return the fields of config.json that BART's relatives share."""
    start = {} if model.start_token < 0 else {"decoder_start_token_id": model.start_token}
    return {
        "d_model": model.width,
        "encoder_layers": model.encoder_layers or model.layers,
        "decoder_layers": model.layers,
        "encoder_attention_heads": model.heads,
        "decoder_attention_heads": model.heads,
        "encoder_ffn_dim": model.ffn_width,
        "decoder_ffn_dim": model.ffn_width,
        "vocab_size": model.vocab_size,
        "max_position_embeddings": model.max_positions,
        "activation_function": THEIR_ACTIVATION[model.activation],
        "scale_embedding": model.embed_scale != 1.0,
        "dropout": model.dropout,
        "is_encoder_decoder": True,
        "tie_word_embeddings": True,
        "num_hidden_layers": model.encoder_layers or model.layers,
        **start,
    }


def _write_marian(model: ModelConfig) -> dict[str, Any]:
    return write_bart_fields(model) | {
        "decoder_vocab_size": model.vocab_size,
        "share_encoder_decoder_embeddings": True,
        "pad_token_id": max(0, model.start_token),  # as in every published one
    }


def _write_m2m100(model: ModelConfig) -> dict[str, Any]:
    return write_bart_fields(model) | {"pad_token_id": 1}


def bart_layers(model: ModelConfig, norms: Mapping[str, str]) -> Iterator[TensorMap]:
    """Yield the tensors of the layers of BART's relatives.

    `norms`: the part of a name behind a branch's own, of their norms here.
    """
    depth = model.encoder_layers or model.layers
    attention = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "out_proj": "output"}
    for stack, first, layers in (("encoder", 0, depth), ("decoder", depth, model.layers)):
        branches = {"self_attn": "attention"}
        if stack == "decoder":
            branches["encoder_attn"] = "cross_attention"
        linear = {"fc1": "feed_forward.up", "fc2": "feed_forward.down"}
        for theirs, ours in branches.items():
            linear |= {f"{theirs}.{a}": f"{ours}.{b}" for a, b in attention.items()}
        layer = linear | {
            f"{theirs}_layer_norm": ours
            for theirs, ours in norms.items()
            if stack == "decoder" or theirs != "encoder_attn"
        }
        for i in range(layers):
            for theirs, ours in layer.items():
                biased = has_key_bias(model) or not theirs.endswith("k_proj")
                for part in ("weight", "bias") if biased else ("weight",):
                    name = f"model.{stack}.layers.{i}.{theirs}.{part}"
                    yield TensorMap(name, (f"blocks.{first + i}.{ours}.{part}",))


PRE_NORMS = {
    "self_attn": "attention_norm",
    "encoder_attn": "cross_norm",
    "final": "feed_forward_norm",
}
POST_NORMS = {
    "self_attn": "attention_sum_norm",
    "encoder_attn": "cross_sum_norm",
    "final": "feed_forward_sum_norm",
}


def _marian_tensors(model: ModelConfig) -> Iterator[TensorMap]:
    yield TensorMap("model.shared.weight", ("embed.tokens.weight",))
    yield from bart_layers(model, POST_NORMS)
    yield TensorMap("final_logits_bias", (), shape=(1, model.vocab_size))


def _m2m100_tensors(model: ModelConfig) -> Iterator[TensorMap]:
    depth = model.encoder_layers or model.layers
    yield TensorMap("model.shared.weight", ("embed.tokens.weight",))
    yield from bart_layers(model, PRE_NORMS)
    for part in ("weight", "bias"):
        norm = f"blocks.{depth - 1}.turn_norm.{part}"
        yield TensorMap(f"model.encoder.layer_norm.{part}", (norm,))
        yield TensorMap(f"model.decoder.layer_norm.{part}", (f"head.norm.{part}",))


def is_bart_like(model: ModelConfig) -> bool:
    """Return whether a model is an encoder-decoder with LayerNorm, biases and tied weights."""
    return (
        is_encoder_decoder(model)
        and (model.norm, model.norm_eps, model.bias, model.tied) == ("layernorm", 1e-5, True, True)
        and attention_biases(model) == (True, True)
        and model.activation in THEIR_ACTIVATION
        and (model.attention_scale, model.output_scale) == (0.0, 1.0)
        and model.embed_scale in (1.0, math.sqrt(model.width))
        and not model.kv_heads % model.heads
        and not model.head_width
    )


def _is_marian(model: ModelConfig) -> bool:
    kinds = (model.norm_placement, model.positions, model.sinusoid)
    return is_bart_like(model) and kinds == ("post", "sinusoidal", "marian")


def _is_m2m100(model: ModelConfig) -> bool:
    kinds = (model.norm_placement, model.positions, model.sinusoid)
    return is_bart_like(model) and kinds == ("pre", "sinusoidal", "m2m100")


BART_COPIES = tuple(
    (copy, "model.shared.weight")
    for copy in (
        "lm_head.weight",
        "model.encoder.embed_tokens.weight",
        "model.decoder.embed_tokens.weight",
    )
)
SINUSOIDS = (".embed_positions.weight", ".embed_positions.weights")
ENCODER_DECODERS = (
    Architecture(
        "t5",
        "T5ForConditionalGeneration",
        "pairs",
        _read_t5,
        _write_t5,
        _is_t5,
        _t5_tensors,
        tied_copies=tuple(
            (copy, "shared.weight")
            for copy in (
                "lm_head.weight",
                "encoder.embed_tokens.weight",
                "decoder.embed_tokens.weight",
            )
        ),
        # Old files of T5 have one, which no version of transformers reads.
        unlearned=("EncDecAttention.relative_attention_bias.weight",),
    ),
    Architecture(
        "marian",
        "MarianMTModel",
        "pairs",
        _read_marian,
        _write_marian,
        _is_marian,
        _marian_tensors,
        tied_copies=BART_COPIES,
        unlearned=SINUSOIDS,
    ),
    Architecture(
        "m2m_100",
        "M2M100ForConditionalGeneration",
        "pairs",
        _read_m2m100,
        _write_m2m100,
        _is_m2m100,
        _m2m100_tensors,
        tied_copies=BART_COPIES,
        unlearned=SINUSOIDS,
    ),
)
