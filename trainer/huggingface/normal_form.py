"""Compare models by what they compute: a normal form, equal if their functions are."""

from dataclasses import replace

from trainer.config.train import (
    ModelConfig,
    attention_biases,
    fast_turns,
    has_key_bias,
    head_width_of,
    inputs_of,
    outputs_of,
)

# By the biases of query and value, of the keys, and of the output.
BIASES = {
    (False, False, False): "none",
    (True, True, False): "qkv",
    (True, False, True): "no_key",
    (True, True, True): "all",
}


def normal_form(model: ModelConfig) -> ModelConfig:
    """Return the same model with one way of saying each thing, without what only trains it."""
    plain = ModelConfig()
    biased, output_biased = attention_biases(model)
    model = replace(
        model,
        inputs=inputs_of(model),
        outputs=outputs_of(model),
        kv_heads=model.kv_heads or model.heads,
        head_width=head_width_of(model),
        attention_bias=BIASES[biased, has_key_bias(model), output_biased],
        encoder_layers=model.encoder_layers or model.layers,
        attention_scale=model.attention_scale or head_width_of(model) ** -0.5,
        rope_fast_turns=fast_turns(model),
        **{key: getattr(plain, key) for key in ("dropout", "init", "init_std", "ctc_weight")},
    )
    for key in _unused_keys(model):
        model = replace(model, **{key: getattr(plain, key)})
    return model


def _unused_keys(model: ModelConfig) -> list[str]:
    """Return the keys that the model does not read."""
    found = []
    if model.inputs != "patches":
        found += ["image_size", "patch_size", "channels"]
    if model.inputs != "audio":
        found += ["mels", "audio_positions", "audio_fill", "audio_stride"]
    if model.inputs != "tokens" and model.outputs != "tokens":
        found += ["vocab_size", "max_positions"]
    if model.outputs != "classes":
        found += ["classes", "pool"]
    reads_tokens = model.inputs == "tokens" or model.family == "encoder_decoder"
    if model.outputs != "tokens" or not reads_tokens:
        found.append("tied")
    if model.family != "encoder_decoder":
        found.append("encoder_layers")
        found.append("start_token")
    if model.positions != "relative":
        found += ["relative_buckets", "relative_distance"]
    adds_sinusoids = model.inputs == "audio" and model.positions == "learned"
    if model.positions != "sinusoidal" and not adds_sinusoids:
        found.append("sinusoid")
    if not model.sliding_window:
        found += ["full_attention_every", "local_rope_theta"]
    if model.positions != "rope":
        found += ["rope_theta", "rope_scaling"]
    if model.rope_scaling == 1.0 or model.positions != "rope":
        found += ["rope_type", "rope_original_positions", "rope_slow_turns", "rope_fast_turns"]
    if model.rope_scaling == 1.0 or model.rope_type != "yarn":
        found.append("rope_attention_factor")
    return found
