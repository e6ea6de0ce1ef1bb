"""Decoders with norms of queries and keys, other places of norms, windows, or joined layers."""

from typing import Any

from trainer.config.train import ModelConfig, attention_biases, has_window, head_width_of
from trainer.huggingface.decoders import (
    ATTENTION,
    FEED_FORWARD,
    PRE_NORMS,
    decoder_tensors,
    llama_relative,
    read_llama_fields,
    refuse_windows,
    write_llama_fields,
)
from trainer.huggingface.fields import ConfigFields
from trainer.huggingface.rope import read_scaling, write_scaling

KINDS = ("full_attention", "sliding_attention")
NO_PADDING = {"pad_token_id": None}  # theirs is a token that a small vocabulary lacks
PHI3_LAYERS = {
    "self_attn.qkv_proj": ("attention.query", "attention.key", "attention.value"),
    "self_attn.o_proj": ("attention.output",),
    "mlp.gate_up_proj": ("feed_forward.gate", "feed_forward.up"),
    "mlp.down_proj": ("feed_forward.down",),
}
HEAD_NORMS = {"self_attn.q_norm": "attention.query_norm", "self_attn.k_norm": "attention.key_norm"}
OLMO2_NORMS = {
    "post_attention_layernorm": "attention_output_norm",
    "post_feedforward_layernorm": "feed_forward_output_norm",
    "self_attn.q_norm": "attention.queries_norm",
    "self_attn.k_norm": "attention.keys_norm",
}
GEMMA3_NORMS = HEAD_NORMS | {
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "attention_output_norm",
    "pre_feedforward_layernorm": "feed_forward_norm",
    "post_feedforward_layernorm": "feed_forward_output_norm",
}


def read_windows(fields: ConfigFields, layers: int, kinds: list[str]) -> dict[str, int]:
    """Return the values of model.* for the kinds of attention of each layer."""
    name = "layer_types"
    if set(kinds) - set(KINDS) or len(kinds) != layers:
        fields.refuse(name, f"each of the {layers} layers must be {' or '.join(KINDS)}")
    full = [i for i, kind in enumerate(kinds, 1) if kind == "full_attention"]
    if len(full) == len(kinds):
        return {"sliding_window": 0, "full_attention_every": 0}
    every = full[0] if full else 0
    if full != (list(range(every, layers + 1, every)) if every else []):
        fields.refuse(name, "every n-th layer can be full_attention here, no other choice of them")
    return {"sliding_window": fields.take("sliding_window"), "full_attention_every": every}


def write_windows(model: ModelConfig) -> dict[str, Any]:
    """Return the kind of attention of each layer."""
    return {"layer_types": [KINDS[has_window(model, i)] for i in range(model.layers)]}


def _read_qwen3(fields: ConfigFields) -> dict[str, Any]:
    values = read_llama_fields(fields)
    refuse_windows(fields)
    bias = "all" if fields.take("attention_bias", False) else "none"
    head_width = fields.take("head_dim", 128)  # theirs if it is missing
    return values | {"attention_bias": bias, "qk_norm": "head", "head_width": head_width}


def _write_qwen3(model: ModelConfig) -> dict[str, Any]:
    bias = {"attention_bias": attention_biases(model)[0], "use_sliding_window": False}
    return write_llama_fields(model) | bias


def _read_olmo2(fields: ConfigFields) -> dict[str, Any]:
    values = read_llama_fields(fields)
    bias = "all" if fields.take("attention_bias", False) else "none"
    return values | {"attention_bias": bias, "qk_norm": "width", "norm_placement": "output"}


def _write_olmo2(model: ModelConfig) -> dict[str, Any]:
    bias = {"attention_bias": attention_biases(model)[0]}
    return write_llama_fields(model) | bias | NO_PADDING


def _read_phi3(fields: ConfigFields) -> dict[str, Any]:
    values = read_llama_fields(fields)
    if values["rope_scaling"] != 1.0:
        fields.refuse("rope_scaling", "Phi-3 can have rope_type=default here")
    fields.take("original_max_position_embeddings", None)  # of longrope alone
    window = fields.take("sliding_window", 0)
    return values | {"attention_bias": "none", "sliding_window": window}


def _write_phi3(model: ModelConfig) -> dict[str, Any]:
    return write_llama_fields(model) | NO_PADDING | {"sliding_window": model.sliding_window or None}


def _read_gemma3(fields: ConfigFields) -> dict[str, Any]:
    layers, width = fields.take("num_hidden_layers"), fields.take("hidden_size")
    head_width = fields.take("head_dim", 256)
    for name in ("final_logit_softcapping", "attn_logit_softcapping"):
        fields.expect(name)
    fields.expect("use_bidirectional_attention", False)
    fields.take("cache_implementation", None)
    scalar = fields.take("query_pre_attn_scalar", 256)
    pattern = fields.take("sliding_window_pattern", fields.take("_sliding_window_pattern", 6))
    alternating = [KINDS[(i + 1) % pattern != 0] for i in range(layers)]
    kinds = fields.take("layer_types", alternating)
    return {
        "family": "decoder",
        "layers": layers,
        "width": width,
        "heads": fields.take("num_attention_heads"),
        "kv_heads": fields.take("num_key_value_heads"),
        "head_width": head_width,
        "ffn_width": fields.take("intermediate_size"),
        "vocab_size": fields.take("vocab_size"),
        "max_positions": fields.take("max_position_embeddings", 131_072),
        "norm": "rmsnorm",
        "norm_eps": fields.take("rms_norm_eps", 1e-6),
        "norm_placement": "sandwich",
        "qk_norm": "head",
        "activation": fields.take_choice(
            "hidden_activation", {"gelu_pytorch_tanh": "geglu_tanh"}, "gelu_pytorch_tanh"
        ),
        "positions": "rope",
        "tied": fields.take("tie_word_embeddings", True),
        "bias": False,
        "attention_bias": "all" if fields.take("attention_bias", False) else "none",
        "attention_scale": 0.0 if scalar == head_width else scalar**-0.5,
        "embed_scale": width**0.5,
    } | _read_gemma3_positions(fields, read_windows(fields, layers, kinds))


def _read_gemma3_positions(fields: ConfigFields, windows: dict[str, int]) -> dict[str, Any]:
    """Return the rotary settings; transformers 5 nests them by the kind of a layer."""
    values = fields.values
    nested = dict(values.get("rope_parameters") or {})
    if set(nested) - set(KINDS):
        fields.refuse("rope_parameters", f"those of Gemma 3 are by {' and '.join(KINDS)}")
    full = dict(nested.get("full_attention") or values.get("rope_scaling") or {})
    full.setdefault("rope_theta", values.get("rope_theta") or 1_000_000.0)
    full["rope_type"] = full.get("rope_type") or full.get("type") or "default"
    local = dict(nested.get("sliding_attention") or {})
    theta = local.get("rope_theta", fields.take("rope_local_base_freq", 10_000.0))
    if local.get("rope_type", "default") != "default":
        fields.refuse("rope_parameters", "rope_type of sliding_attention can be default here")
    return read_scaling(fields, full) | windows | {"local_rope_theta": float(theta)}


def _write_gemma3(model: ModelConfig) -> dict[str, Any]:
    fields, scaling = write_llama_fields(model), write_scaling(model)
    scale = model.attention_scale or head_width_of(model) ** -0.5
    full = {"rope_theta": model.rope_theta, **scaling}
    local = {"rope_theta": model.local_rope_theta, "rope_type": "default"}
    del fields["hidden_act"]
    return (
        fields
        | NO_PADDING
        | write_windows(model)
        | {
            "hidden_activation": "gelu_pytorch_tanh",
            "attention_bias": attention_biases(model)[0],
            "query_pre_attn_scalar": round(scale**-2),
            "sliding_window": model.sliding_window,
            "rope_parameters": {"full_attention": full, "sliding_attention": local},
            "rope_local_base_freq": model.local_rope_theta,
        }
    )


def _is_decoder(model: ModelConfig, *values: str) -> bool:
    kinds = (model.norm_placement, model.qk_norm, model.activation)
    return model.family == "decoder" and kinds == values and not model.bias


NORMED_DECODERS = (
    llama_relative(
        "qwen3",
        "Qwen3ForCausalLM",
        _read_qwen3,
        _write_qwen3,
        lambda model: _is_decoder(model, "pre", "head", "swiglu"),
        lambda model: decoder_tensors(model, ATTENTION | FEED_FORWARD, PRE_NORMS | HEAD_NORMS),
    ),
    llama_relative(
        "olmo2",
        "Olmo2ForCausalLM",
        _read_olmo2,
        _write_olmo2,
        lambda model: _is_decoder(model, "output", "width", "swiglu"),
        lambda model: decoder_tensors(model, ATTENTION | FEED_FORWARD, OLMO2_NORMS),
    ),
    llama_relative(
        "phi3",
        "Phi3ForCausalLM",
        _read_phi3,
        _write_phi3,
        lambda model: _is_decoder(model, "pre", "none", "swiglu"),
        lambda model: decoder_tensors(model, PHI3_LAYERS, PRE_NORMS),
    ),
    llama_relative(
        "gemma3_text",
        "Gemma3ForCausalLM",
        _read_gemma3,
        _write_gemma3,
        lambda model: _is_decoder(model, "sandwich", "head", "geglu_tanh"),
        lambda model: decoder_tensors(model, ATTENTION | FEED_FORWARD, GEMMA3_NORMS, offset=1.0),
    ),
)
