"""Decoders: Llama and its relatives, and GPT-2."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from trainer.config.train import ModelConfig, attention_biases, head_width_of
from trainer.huggingface.architecture import Architecture, TensorMap
from trainer.huggingface.fields import ACTIVATIONS, THEIR_ACTIVATION, ConfigFields, rope_of
from trainer.huggingface.rope import read_scaling, write_scaling

GATED = {"silu": "swiglu"}
ATTENTION = {
    "self_attn.q_proj": ("attention.query",),
    "self_attn.k_proj": ("attention.key",),
    "self_attn.v_proj": ("attention.value",),
    "self_attn.o_proj": ("attention.output",),
}
FEED_FORWARD = {
    "mlp.gate_proj": ("feed_forward.gate",),
    "mlp.up_proj": ("feed_forward.up",),
    "mlp.down_proj": ("feed_forward.down",),
}
PRE_NORMS = {"input_layernorm": "attention_norm", "post_attention_layernorm": "feed_forward_norm"}


def read_llama_fields(fields: ConfigFields) -> dict[str, Any]:
    """Return the values of model.* that Llama and its relatives share."""
    heads, width = fields.take("num_attention_heads"), fields.take("hidden_size")
    head_width = fields.take("head_dim", 0)
    kv_heads = fields.take("num_key_value_heads", heads)
    return {
        "family": "decoder",
        "layers": fields.take("num_hidden_layers"),
        "width": width,
        "heads": heads,
        "kv_heads": 0 if kv_heads == heads else kv_heads,
        "head_width": 0 if head_width * heads == width else head_width,
        "ffn_width": fields.take("intermediate_size"),
        "vocab_size": fields.take("vocab_size"),
        "max_positions": fields.take("max_position_embeddings"),
        "norm": "rmsnorm",
        "norm_eps": fields.take("rms_norm_eps"),
        "activation": fields.take_choice("hidden_act", GATED, "silu"),
        "positions": "rope",
        "tied": fields.take("tie_word_embeddings", False),
        "bias": False,
    } | read_scaling(fields, rope_of(fields))


def _read_llama(fields: ConfigFields) -> dict[str, Any]:
    values = read_llama_fields(fields)
    attention, rest = fields.take("attention_bias", False), fields.take("mlp_bias", False)
    return values | {"bias": rest, "attention_bias": "all" if attention else "none"}


def _read_mistral(fields: ConfigFields) -> dict[str, Any]:
    values = read_llama_fields(fields)
    window = fields.take("sliding_window", 0)
    if "sliding_window" not in fields.values:
        window = 4096  # theirs if it is missing; null is none
    return values | {"attention_bias": "none", "sliding_window": window}


def refuse_windows(fields: ConfigFields) -> None:
    """Refuse Qwen's sliding windows, which not every layer has."""
    fields.expect("use_sliding_window", False)
    for name in ("sliding_window", "max_window_layers"):  # unread unless use_sliding_window
        fields.take(name, None)
    if set(fields.take("layer_types", ["full_attention"])) != {"full_attention"}:
        fields.refuse("layer_types", "all layers have full attention if use_sliding_window=false")


def _read_qwen2(fields: ConfigFields) -> dict[str, Any]:
    values = read_llama_fields(fields)
    refuse_windows(fields)
    return values | {"attention_bias": "qkv"}


def write_llama_fields(model: ModelConfig) -> dict[str, Any]:
    """Return the fields of config.json that Llama and its relatives share."""
    return {
        "hidden_size": model.width,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads or model.heads,
        "head_dim": head_width_of(model),
        "intermediate_size": model.ffn_width,
        "vocab_size": model.vocab_size,
        "max_position_embeddings": model.max_positions,
        "rms_norm_eps": model.norm_eps,
        "hidden_act": "silu",
        "tie_word_embeddings": model.tied,
        "attention_dropout": 0.0,
        "use_cache": True,
    } | _write_rope(model)


def _write_rope(model: ModelConfig) -> dict[str, Any]:
    """Return the rotary settings in both forms: that of transformers 5 and that of 4."""
    scaling = write_scaling(model)
    return {
        "rope_parameters": {"rope_theta": model.rope_theta, **scaling},
        "rope_theta": model.rope_theta,
        "rope_scaling": None if model.rope_scaling == 1.0 else scaling,
    }


def _write_llama(model: ModelConfig) -> dict[str, Any]:
    bias = {"attention_bias": attention_biases(model)[1], "mlp_bias": model.bias}
    return write_llama_fields(model) | bias


def _write_mistral(model: ModelConfig) -> dict[str, Any]:
    return write_llama_fields(model) | {"sliding_window": model.sliding_window or None}


def _write_qwen2(model: ModelConfig) -> dict[str, Any]:
    return write_llama_fields(model) | {"use_sliding_window": False}


def decoder_tensors(
    model: ModelConfig,
    layers: Mapping[str, tuple[str, ...]],
    norms: Mapping[str, str],
    offset: float = 0.0,
) -> Iterator[TensorMap]:
    """Yield a decoder's tensors: `layers` and `norms` are theirs -> ours in each block.

    `offset` is added to the weights of their norms.
    """
    biased, output_biased = attention_biases(model)
    biases = {"attention.output": output_biased, "attention.query": biased}
    biases |= {"attention.key": biased, "attention.value": biased}
    yield TensorMap("model.embed_tokens.weight", ("embed.tokens.weight",))
    for i in range(model.layers):
        for theirs, ours in layers.items():
            for part in ("weight", "bias") if biases.get(ours[0], model.bias) else ("weight",):
                names = tuple(f"blocks.{i}.{name}.{part}" for name in ours)
                yield TensorMap(f"model.layers.{i}.{theirs}.{part}", names)
        for theirs, norm in norms.items():
            names = (f"blocks.{i}.{norm}.weight",)
            yield TensorMap(f"model.layers.{i}.{theirs}.weight", names, offset=offset)
    yield TensorMap("model.norm.weight", ("head.norm.weight",), offset=offset)
    if not model.tied:
        yield TensorMap("lm_head.weight", ("head.output.weight",))


def llama_tensors(model: ModelConfig) -> Iterator[TensorMap]:
    """Yield the tensors of a decoder with Llama's names."""
    return decoder_tensors(model, ATTENTION | FEED_FORWARD, PRE_NORMS)


def is_llama_like(model: ModelConfig) -> bool:
    """Return whether a model is a pre-norm decoder with RMSNorm, RoPE and SwiGLU."""
    kinds = (model.family, model.norm, model.activation, model.positions)
    return kinds == ("decoder", "rmsnorm", "swiglu", "rope")


def _is_llama(model: ModelConfig) -> bool:
    bias, output_bias = attention_biases(model)
    return is_llama_like(model) and bias == output_bias


def _is_mistral(model: ModelConfig) -> bool:
    return is_llama_like(model) and not model.bias and attention_biases(model) == (False, False)


def _is_qwen2(model: ModelConfig) -> bool:
    return is_llama_like(model) and not model.bias and attention_biases(model) == (True, False)


def _read_gpt2(fields: ConfigFields) -> dict[str, Any]:
    width = fields.take("n_embd")
    fields.expect("scale_attn_weights", True)
    fields.expect("scale_attn_by_inverse_layer_idx", False)
    fields.expect("reorder_and_upcast_attn", False)
    for name in ("n_ctx", "n_special", "predict_special_tokens"):  # of no effect
        fields.take(name, None)
    for name in ("type", "use_proj", "activation", "proj_to_labels", "first_dropout"):
        fields.take(f"summary_{name}", None)  # of another head
    return {
        "family": "decoder",
        "layers": fields.take("n_layer"),
        "width": width,
        "heads": fields.take("n_head"),
        "ffn_width": fields.take("n_inner", 4 * width),
        "vocab_size": fields.take("vocab_size"),
        "max_positions": fields.take("n_positions"),
        "norm": "layernorm",
        "norm_eps": fields.take("layer_norm_epsilon", 1e-5),
        "activation": fields.take_choice("activation_function", ACTIVATIONS, "gelu_new"),
        "positions": "learned",
        "tied": fields.take("tie_word_embeddings", True),
        "bias": True,
    }


def _write_gpt2(model: ModelConfig) -> dict[str, Any]:
    return {
        "n_embd": model.width,
        "n_layer": model.layers,
        "n_head": model.heads,
        "n_inner": model.ffn_width,
        "vocab_size": model.vocab_size,
        "n_positions": model.max_positions,
        "layer_norm_epsilon": model.norm_eps,
        "activation_function": THEIR_ACTIVATION[model.activation],
        "tie_word_embeddings": model.tied,
        "attn_pdrop": 0.0,
        "embd_pdrop": model.dropout,
        "resid_pdrop": model.dropout,
    }


def _gpt2_tensors(model: ModelConfig) -> Iterator[TensorMap]:
    attention = tuple(f"attention.{part}" for part in ("query", "key", "value"))
    layers = {
        "ln_1": ("attention_norm",),
        "attn.c_attn": attention,
        "attn.c_proj": ("attention.output",),
        "ln_2": ("feed_forward_norm",),
        "mlp.c_fc": ("feed_forward.up",),
        "mlp.c_proj": ("feed_forward.down",),
    }
    yield TensorMap("transformer.wte.weight", ("embed.tokens.weight",))
    yield TensorMap("transformer.wpe.weight", ("embed.positions.weight",))
    for i in range(model.layers):
        for theirs, ours in layers.items():
            for part in ("weight", "bias"):
                names = tuple(f"blocks.{i}.{name}.{part}" for name in ours)
                matrix = part == "weight" and not theirs.startswith("ln")
                yield TensorMap(f"transformer.h.{i}.{theirs}.{part}", names, transposed=matrix)
    for part in ("weight", "bias"):
        yield TensorMap(f"transformer.ln_f.{part}", (f"head.norm.{part}",))
    if not model.tied:
        yield TensorMap("lm_head.weight", ("head.output.weight",))


def _is_gpt2(model: ModelConfig) -> bool:
    kinds = (model.family, model.norm, model.positions)
    return (
        kinds == ("decoder", "layernorm", "learned")
        and attention_biases(model) == (model.bias, True)
        and model.activation in THEIR_ACTIVATION
        and not model.kv_heads % model.heads
        and not model.head_width
    )


TIED_HEAD = ("lm_head.weight", "model.embed_tokens.weight")


def llama_relative(
    model_type: str,
    class_name: str,
    read_config: Callable[[ConfigFields], dict[str, Any]],
    write_config: Callable[[ModelConfig], dict[str, Any]],
    fits: Callable[[ModelConfig], bool],
    tensors: Callable[[ModelConfig], Iterator[TensorMap]],
    unlearned: tuple[str, ...] = (),
) -> Architecture:
    """Build the architecture of a decoder whose embedding and head have Llama's names."""
    return Architecture(
        model_type,
        class_name,
        "text",
        read_config,
        write_config,
        fits,
        tensors,
        prefix="model.",
        unlearned=unlearned,
        tied_copies=(TIED_HEAD,),
    )


DECODERS = (
    llama_relative(
        "llama",
        "LlamaForCausalLM",
        _read_llama,
        _write_llama,
        _is_llama,
        llama_tensors,
        unlearned=(".rotary_emb.inv_freq",),
    ),
    llama_relative(
        "mistral",
        "MistralForCausalLM",
        _read_mistral,
        _write_mistral,
        _is_mistral,
        llama_tensors,
        unlearned=(".rotary_emb.inv_freq",),
    ),
    llama_relative(
        "qwen2",
        "Qwen2ForCausalLM",
        _read_qwen2,
        _write_qwen2,
        _is_qwen2,
        llama_tensors,
        unlearned=(".rotary_emb.inv_freq",),
    ),
    Architecture(
        "gpt2",
        "GPT2LMHeadModel",
        "text",
        _read_gpt2,
        _write_gpt2,
        _is_gpt2,
        _gpt2_tensors,
        prefix="transformer.",
        unlearned=(".attn.bias", ".attn.masked_bias"),
        tied_copies=(("lm_head.weight", "transformer.wte.weight"),),
    ),
)
