"""Features of layers to verify, each under the strategies that it has to do with."""

from dataclasses import replace

from trainer.config.train import ModelConfig

# Other features of layers, under the strategies that each has to do with.
FEATURE_STRATEGIES = (
    "fsdp 2",
    "tensor 2",
    "tensor 4",
    "tensor 2, whole sequences",
    "pipeline 2",
    "context 2, all_gather",
    "context 2, ring",
    "context 2, ulysses",
    "context 2 × tensor 2",
    "fsdp 2 × tensor 2 × pipeline 2",
)
POST_NORM = ModelConfig(
    family="encoder_decoder",
    activation="relu",
    norm="layernorm",
    bias=True,
    norm_placement="post",
)
BERT = ModelConfig(
    family="encoder",
    inputs="tokens",
    outputs="tokens",
    activation="gelu",
    norm="layernorm",
    norm_placement="post",
    positions="learned",
    bias=True,
    embed_norm=True,
    segments=2,
    head_dense=True,
)
FEATURES = {
    "decoder (Gemma 3)": ModelConfig(
        activation="geglu_tanh",
        heads=8,
        kv_heads=4,
        norm_placement="sandwich",
        qk_norm="head",
        attention_scale=0.2,
        embed_scale=8.0,
        sliding_window=5,
        full_attention_every=2,
        local_rope_theta=100.0,
        rope_type="linear",
        rope_scaling=8.0,
    ),
    "decoder (OLMo 2)": ModelConfig(
        heads=8,
        kv_heads=2,
        tied=False,
        norm_placement="output",
        qk_norm="width",
        rope_type="yarn",
        rope_scaling=4.0,
        rope_original_positions=16,
    ),
    "encoder-decoder (post-norm)": POST_NORM,
    "encoder-decoder (T5)": ModelConfig(
        family="encoder_decoder",
        activation="relu",
        positions="relative",
        relative_buckets=8,
        relative_distance=8,
        attention_scale=1.0,
        output_scale=128**-0.5,
        init_std=0.3,
    ),
    "encoder-decoder (Marian)": replace(
        POST_NORM, positions="sinusoidal", sinusoid="m2m100", embed_scale=8.0
    ),
    "encoder-decoder (Whisper)": ModelConfig(
        family="encoder_decoder",
        inputs="audio",
        activation="gelu",
        norm="layernorm",
        positions="learned",
        sinusoid="whisper",
        bias=True,
        attention_bias="no_key",
        audio_fill="silence",
    ),
    "encoder-decoder (audio, rope)": ModelConfig(
        family="encoder_decoder", inputs="audio", audio_stride=4, activation="relu"
    ),
    "encoder-decoder (audio, joint CTC)": ModelConfig(
        family="encoder_decoder",
        inputs="audio",
        audio_stride=4,
        activation="relu",
        positions="learned",
        ctc_weight=0.3,
    ),
    "encoder (BERT)": BERT,
    "encoder (BERT, classes)": replace(BERT, outputs="classes", pool="class_token", tied=False),
    "encoder (speech)": ModelConfig(
        family="encoder", inputs="audio", outputs="ctc", audio_stride=4, tied=False
    ),
}


def feature_strategies(model: ModelConfig) -> list[str]:
    """Return the strategies that a feature of layers is verified under."""
    if model.positions != "relative":
        return list(FEATURE_STRATEGIES)
    # A ring passes no gradient to a bias; tables that blocks share meet every schedule.
    schedules = (
        "pipeline 4",
        "pipeline 2, zero_bubble",
        "pipeline 2, zbv",
        "pipeline 2 × context 2",
    )
    return [name for name in (*FEATURE_STRATEGIES, *schedules) if "ring" not in name]
