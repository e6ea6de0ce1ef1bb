"""The keys of the model: `model.*`."""

from dataclasses import dataclass

from parallel.config_fields import key

BOX_SIDES = 4  # logits of a box besides those of its classes


@dataclass
class ModelConfig:
    """One Transformer in three shapes; read by trainer/model.py and trainer/nn/layers.py."""

    family: str = key(
        "decoder", "Shape of the Transformer", choices=("decoder", "encoder", "encoder_decoder")
    )
    inputs: str = key(
        "auto",
        "Inputs of the first layer",
        choices={
            "auto": "patches for family=encoder, else tokens",
            "tokens": "",
            "patches": "",
            "audio": "log-mel frames; of an encoder-decoder, its source",
        },
    )
    outputs: str = key(
        "auto",
        "Kind of the logits",
        choices={
            "auto": "classes for family=encoder, else tokens",
            "tokens": "at each position",
            "classes": "of the sequence",
            "ctc": "of a character or none, for each vector of audio, family=encoder",
            "boxes": "a box and its classes at each patch, or for each of model.queries",
        },
    )
    layers: int = key(4, "Blocks of the decoder (of the encoder for family=encoder)", at_least=1)
    encoder_layers: int = key(
        0,
        "Blocks of the encoder for family=encoder_decoder",
        off=0,
        off_means="as layers",
        at_least=0,
    )
    width: int = key(128, "Width of the residual stream", at_least=1)
    heads: int = key(4, "Query heads", at_least=1)
    kv_heads: int = key(
        0,
        "Key/value heads (grouped-query attention)",
        off=0,
        off_means="as many as heads",
        at_least=0,
    )
    head_width: int = key(0, "Width of one head", off=0, off_means="width / heads", at_least=0)
    ffn_width: int = key(512, "Hidden width of the feed-forward layer", at_least=1)
    vocab_size: int = key(0, "Token ids", off=0, off_means="those of the tokenizer", at_least=0)
    max_positions: int = key(
        0, "Longest sequence", off=0, off_means="as long as the data's", at_least=0
    )
    norm: str = key("rmsnorm", "Normalisation layer", choices=("rmsnorm", "layernorm"))
    norm_placement: str = key(
        "pre",
        "Place of a residual branch's norms",
        choices={
            "pre": "x + f(norm(x))",
            "post": "norm(x + f(x)), without a final norm",
            "output": "x + norm(f(x))",
            "sandwich": "x + norm(f(norm(x)))",
        },
    )
    norm_eps: float = key(1e-5, "Added to the variance", above=0)
    activation: str = key(
        "swiglu",
        "Activation of the feed-forward layer",
        choices=("swiglu", "geglu", "geglu_tanh", "gelu", "gelu_tanh", "relu"),
    )
    positions: str = key(
        "rope",
        "Encoding of positions",
        choices={
            "rope": "rotated queries and keys",
            "learned": "a table, added to the embedding; audio gets sinusoids",
            "sinusoidal": "a table that does not learn, see model.sinusoid",
            "relative": "T5's bias of the scores, a number per head and distance",
        },
    )
    embed_norm: bool = key(False, "A norm behind the embedding of tokens (BERT)")
    segments: int = key(
        0, "Segments of a sequence with a vector each, family=encoder (BERT)", off=0, at_least=0
    )
    head_dense: bool = key(
        False,
        "A dense layer in front of the output projection: with activation and norm for tokens "
        "(BERT's masked language model), with tanh for classes (BERT's pooler)",
    )
    sinusoid: str = key(
        "marian",
        "Table of positions=sinusoidal: sines, then cosines, of position / 10,000^x",
        choices={
            "marian": "x = 2i / width",
            "whisper": "x = i / (width/2 - 1)",
            "m2m100": "as whisper, the first position is 2",
        },
    )
    relative_buckets: int = key(
        32, "Buckets of distances, positions=relative; an encoder halves them by sign", at_least=4
    )
    relative_distance: int = key(
        128, "Distance from which on all share a bucket, positions=relative", at_least=2
    )
    output_scale: float = key(
        1.0, "Factor of what the output projection reads (T5 with tied weights)", off=1.0, above=0
    )
    rope_theta: float = key(10_000.0, "Base of the rotary frequencies", above=0)
    rope_scaling: float = key(
        1.0, "Factor that rotary frequencies extend the context by", off=1.0, at_least=1
    )
    rope_type: str = key(
        "llama3",
        "How rope_scaling changes the frequencies",
        choices={
            "llama3": "low ones divided by it, as Llama 3.1 does",
            "linear": "all divided by it",
            "dynamic": "a base that grows with max_positions over rope_original_positions (NTK)",
            "yarn": "low ones divided by it, and sharper attention",
        },
    )
    rope_original_positions: int = key(
        8192, "Longest sequence before rope_scaling extends it", at_least=1
    )
    rope_slow_turns: float = key(
        1.0,
        "Turns within rope_original_positions below which a frequency is divided",
        above=0,
    )
    rope_fast_turns: float = key(
        0.0,
        "Turns above which a frequency stays",
        off=0.0,
        off_means="4 for rope_type=llama3, 32 for yarn",
        at_least=0,
    )
    rope_attention_factor: float = key(
        0.0,
        "Factor of the rotary vectors for rope_type=yarn",
        off=0.0,
        off_means="0.1 ln(rope_scaling) + 1",
        at_least=0,
    )
    qk_norm: str = key(
        "none",
        "RMSNorm of queries and keys, before positions are encoded",
        choices={"none": "", "head": "of each head", "width": "of all heads together"},
    )
    attention_scale: float = key(
        0.0, "Factor of the attention scores", off=0.0, off_means="1 / √head width", at_least=0
    )
    embed_scale: float = key(1.0, "Factor of the token embedding", off=1.0, above=0)
    sliding_window: int = key(
        0,
        "Tokens that one attends to, itself and those before it, family=decoder",
        off=0,
        off_means="all before it",
        at_least=0,
    )
    full_attention_every: int = key(
        0,
        "Every how many-th block attends to all tokens in spite of sliding_window",
        off=0,
        off_means="none",
        at_least=0,
    )
    local_rope_theta: float = key(
        0.0,
        "Base of the rotary frequencies, unscaled, in blocks with a sliding window",
        off=0.0,
        off_means="as in the others",
        at_least=0,
    )
    bias: bool = key(False, "Biases in linear layers and in LayerNorm")
    attention_bias: str = key(
        "auto",
        "Biases in the linear layers of attention",
        choices={
            "auto": "as model.bias",
            "none": "",
            "qkv": "of query, key and value (Qwen2)",
            "no_key": "of query, value and output (Whisper)",
            "all": "of the output too",
        },
    )
    start_token: int = key(
        -1,
        "Id of the token that a target begins with, family=encoder_decoder",
        off=-1,
        off_means="the one that the data begin it with, the end token",
        at_least=-1,
    )
    tied: bool = key(True, "Output projection shares the token embedding")
    dropout: float = key(
        0.0,
        "Dropout on embeddings and residual branches while training",
        off=0.0,
        at_least=0,
        below=1,
    )
    init: str = key(
        "gpt2",
        "Distribution of the initial weights",
        choices={"gpt2": "normal, residual branches scaled by depth", "vit": "truncated normal"},
    )
    init_std: float = key(0.02, "Standard deviation of the initial weights", above=0)
    image_size: int = key(
        0,
        "Size of an image, family=encoder",
        unit="pixels a side",
        off=0,
        off_means="as the data's",
        at_least=0,
    )
    patch_size: int = key(4, "Size of one patch", unit="pixels a side", at_least=1)
    channels: int = key(0, "Channels of an image", off=0, off_means="as the data's", at_least=0)
    mels: int = key(
        0, "Mel bands of a frame of audio", off=0, off_means="as the data's", at_least=0
    )
    audio_positions: int = key(
        0,
        "Longest audio, in vectors of the sequence",
        off=0,
        off_means="as long as the data's",
        at_least=0,
    )
    audio_fill: str = key(
        "mask",
        "What is behind the end of a recording",
        choices={
            "mask": "nothing: attention leaves it out",
            "silence": "silence up to audio_positions, as Whisper has learned",
        },
    )
    audio_stride: int = key(
        2, "Frames of audio for one vector of the sequence, 2 or 4", at_least=2, at_most=4
    )
    ctc_weight: float = key(
        0.0,
        "Share of CTC on the encoder's vectors in the loss, beside the decoder's cross-entropy "
        "(arXiv 1609.06773), family=encoder_decoder inputs=audio",
        off=0.0,
        at_least=0,
        below=1,
    )
    classes: int = key(0, "Classes of the classifier", off=0, off_means="as the data's", at_least=0)
    queries: int = key(
        0,
        "Learned queries of a decoder that gives boxes (DETR), a square number: each begins at its "
        "place of a grid; family=encoder_decoder",
        off=0,
        at_least=0,
    )
    query_groups: int = key(
        1,
        "Groups of as many queries while training, each matched with all boxes by itself (Group "
        "DETR); the first one is used afterwards",
        at_least=1,
    )
    auxiliary_heads: bool = key(
        False,
        "A head behind each decoder block but the last, for model.queries: while training, its "
        "loss is added to that of the last one (DETR, arXiv 2005.12872)",
        off=False,
    )
    pool: str = key("mean", "What the classifier reads", choices=("class_token", "mean"))


def head_width_of(model: ModelConfig) -> int:
    """Return the width of one head of attention."""
    return model.head_width or model.width // model.heads


def is_gated(model: ModelConfig) -> bool:
    """Return whether the feed-forward layer has a gate, a third matrix (arXiv 2002.05202)."""
    return model.activation in ("swiglu", "geglu", "geglu_tanh")


def has_window(model: ModelConfig, block: int) -> bool:
    """Return whether the block of this number has a sliding window."""
    every = model.full_attention_every
    return model.sliding_window > 0 and not (every and (block + 1) % every == 0)


def fast_turns(model: ModelConfig) -> float:
    """Return the turns within the original context above which a rotary frequency stays."""
    return model.rope_fast_turns or (32.0 if model.rope_type == "yarn" else 4.0)


def inputs_of(model: ModelConfig) -> str:
    """Return the inputs of the first layer: tokens, patches or audio."""
    if model.inputs != "auto":
        return model.inputs
    return "patches" if model.family == "encoder" else "tokens"


def longest_source(model: ModelConfig) -> int:
    """Return the length of the longest input of an encoder: frames of audio, or tokens."""
    if inputs_of(model) != "audio":
        return model.max_positions
    return (model.audio_positions or model.max_positions) * model.audio_stride


def outputs_of(model: ModelConfig) -> str:
    """Return the kind of the logits: tokens or boxes, at each position, or classes of all."""
    if model.outputs != "auto":
        return model.outputs
    return "classes" if model.family == "encoder" else "tokens"


def is_encoder_decoder(model: ModelConfig) -> bool:
    """Return whether a model has two stacks of blocks, an encoder and a decoder that reads it."""
    return model.family == "encoder_decoder"


def attention_biases(model: ModelConfig) -> tuple[bool, bool]:
    """Return whether query and value of attention have biases, and whether its output has."""
    kind = model.attention_bias
    both = kind in ("all", "no_key")
    return (model.bias, model.bias) if kind == "auto" else (both or kind == "qkv", both)


def has_key_bias(model: ModelConfig) -> bool:
    """Return whether the keys of attention have a bias; scores without rotation ignore one."""
    return attention_biases(model)[0] and model.attention_bias != "no_key"


def classes_of(model: ModelConfig) -> int:
    """Return the number of logits at a position, or of a sequence, of a completed model."""
    outputs = outputs_of(model)
    if outputs == "boxes":
        return model.classes + BOX_SIDES
    return model.classes if outputs == "classes" else model.vocab_size
