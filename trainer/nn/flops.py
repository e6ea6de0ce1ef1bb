"""FLOPs per training sample and peak FLOP/s of devices, for model FLOPs utilisation (MFU)."""

# B batch, S sequence, T source sequence, D width, H query heads, G key/value heads, K head width.

from collections.abc import Sequence

from trainer.config.hardware import ACCELERATORS, accelerator_of
from trainer.config.train import (
    ModelConfig,
    classes_of,
    head_width_of,
    inputs_of,
    is_gated,
    outputs_of,
)


def peak_flops(device_name: str, precision: str) -> float | None:
    """Return the dense peak of a device in FLOP/s, or None if it is unknown.

    `device_name` is that of torch.cuda.get_device_name; `precision` is one of fp8, bf16, fp16,
    tf32, fp32, fp64.
    """
    name = accelerator_of(device_name)
    peak = ACCELERATORS[name].tflops.get(precision) if name else None
    return None if peak is None else peak * 1e12


def flops_per_sample(
    config: ModelConfig,
    seq_len: int,
    source_len: int = 0,
    lengths: Sequence[int] = (),
    targets: int = 0,
) -> float:
    """Return the matrix-product FLOPs of one forward and backward of a sample of `seq_len` tokens.

    A multiply-add is two FLOPs; a backward is twice its forward; attention counts all S×S scores,
    masked (by a sliding window too) or not, once per pass. Recomputation (flash attention,
    activation checkpointing) and embedding look-ups are not counted. `source_len` is the source
    length of an encoder-decoder, and of audio the frames; the sequence length of an encoder of
    images follows from its image. `lengths` are the sequence lengths at the input of each block of
    an encoder, or of a decoder-only model, if they shrink. `targets` is the number of positions
    with a valid target, where alone a model of tokens has logits in training; 0 = all.
    """
    return sum(flops_per_block(config, seq_len, source_len, lengths, targets))


def flops_per_block(
    config: ModelConfig,
    seq_len: int,
    source_len: int = 0,
    lengths: Sequence[int] = (),
    targets: int = 0,
) -> list[float]:
    """Return `flops_per_sample` by block; the first includes the embedding, the last the head.

    Pipeline stages are balanced by these costs.
    """
    embedding, source_len = _embedding_flops(config, source_len)
    seq_len = config.queries * config.query_groups or seq_len
    if config.family == "decoder":
        costs = [
            _block_multiply_adds(config, length) for length in lengths or config.layers * [seq_len]
        ]
    elif config.family == "encoder":
        costs = [
            _block_multiply_adds(config, length)
            for length in lengths or config.layers * [source_len]
        ]
    else:
        depth = config.encoder_layers or config.layers
        lengths = lengths or depth * [source_len]
        cross = _attention_multiply_adds(config, seq_len, lengths[-1])
        encoder = [_block_multiply_adds(config, length) for length in lengths]
        costs = encoder + config.layers * [_block_multiply_adds(config, seq_len) + cross]
    _add_heads(config, costs, seq_len, source_len, targets)
    # A multiply-add is two FLOPs; forward and backward together are three products.
    return [2.0 * 3 * cost + (embedding if i == 0 else 0.0) for i, cost in enumerate(costs)]


def _add_heads(
    config: ModelConfig, costs: list[int], seq_len: int, source_len: int, targets: int
) -> None:
    """Add the multiply-adds of the heads' forwards to those of the blocks before them."""
    patches = outputs_of(config) == "boxes" and not config.queries
    classified = 1 if outputs_of(config) == "classes" else source_len if patches else seq_len
    if targets and outputs_of(config) == "tokens":
        classified = targets
    costs[-1] += classified * config.width * classes_of(config)
    if config.head_dense:  # at every position
        read = source_len if config.family == "encoder" else seq_len
        costs[-1] += read * config.width**2
    if config.auxiliary_heads:
        own = classes_of(config) + config.width * config.head_dense
        costs[-config.layers : -1] = [
            cost + seq_len * config.width * own for cost in costs[-config.layers : -1]
        ]


def _embedding_flops(config: ModelConfig, source_len: int) -> tuple[float, int]:
    """Return the FLOPs of the first layer, and the length of the encoder's sequence.

    Pixels and frames need no gradient: the backward of the first layer is one product, not two.
    """
    if inputs_of(config) == "patches":
        patches = (config.image_size // config.patch_size) ** 2
        flops = 2.0 * 2 * patches * config.channels * config.patch_size**2 * config.width
        return flops, patches + (config.pool == "class_token")
    if inputs_of(config) == "audio":
        length, taps = -(-source_len // config.audio_stride), 3 * config.width
        # The first convolution gives two vectors for each of the second.
        return 2.0 * length * taps * (2 * 2 * config.mels + 3 * config.width), length
    return 0.0, source_len


def _block_multiply_adds(config: ModelConfig, length: int) -> int:
    """Return the multiply-adds of one block's forward, without cross-attention."""
    matrices = 3 if is_gated(config) else 2
    feed_forward = matrices * length * config.width * config.ffn_width
    return _attention_multiply_adds(config, length, length) + feed_forward


def _attention_multiply_adds(config: ModelConfig, length: int, seen: int) -> int:
    """Return the multiply-adds of an attention forward from `length` queries to `seen` keys."""
    head_width = head_width_of(config)
    query_width = config.heads * head_width
    group_width = (config.kv_heads or config.heads) * head_width
    query_and_output = 2 * length * config.width * query_width
    key_and_value = 2 * seen * config.width * group_width
    scores_and_mix = 2 * length * seen * query_width
    return query_and_output + key_and_value + scores_and_mix
