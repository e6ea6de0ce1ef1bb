"""FLOPs per training sample and peak FLOP/s of devices, for model FLOPs utilisation (MFU)."""

# B batch, S sequence, T source sequence, D width, H query heads, G key/value heads, K head width.

import re
from collections.abc import Sequence

from trainer.config.train import (
    ModelConfig,
    classes_of,
    head_width_of,
    inputs_of,
    is_gated,
    outputs_of,
)

# Dense peaks in TFLOP/s from NVIDIA data sheets, without sparsity; fp32 is without TF32, fp64 with
# tensor cores if the device has any; fp8, bf16 and fp16 accumulate in fp32. The first pattern that
# matches the device's name applies.
_HOPPER_SXM = {
    "fp8": 1979.0,
    "bf16": 989.5,
    "fp16": 989.5,
    "tf32": 494.7,
    "fp32": 67.0,
    "fp64": 67.0,
}
_HOPPER_NVL = {
    "fp8": 1670.5,
    "bf16": 835.5,
    "fp16": 835.5,
    "tf32": 417.5,
    "fp32": 60.0,
    "fp64": 60.0,
}
_HOPPER_PCIE = {
    "fp8": 1513.0,
    "bf16": 756.5,
    "fp16": 756.5,
    "tf32": 378.0,
    "fp32": 51.0,
    "fp64": 51.0,
}
_BLACKWELL = {
    "fp8": 4500.0,
    "bf16": 2250.0,
    "fp16": 2250.0,
    "tf32": 1125.0,
    "fp32": 75.0,
    "fp64": 37.0,
}
PEAK_TFLOPS: tuple[tuple[str, dict[str, float]], ...] = (
    (r"\bMIG\b|Laptop|\b4090 D\b", {}),  # slower than the full device: unknown
    (r"\bB200\b", _BLACKWELL),
    (r"\bH[12]00\b.*\bNVL\b", _HOPPER_NVL),
    (r"\bH100 PCIe\b", _HOPPER_PCIE),
    (r"\bH[12]00\b", _HOPPER_SXM),
    (r"\bA100\b", {"bf16": 312.0, "fp16": 312.0, "tf32": 156.0, "fp32": 19.5, "fp64": 19.5}),
    (r"\bL40S\b", {"fp8": 733.0, "bf16": 362.0, "fp16": 362.0, "tf32": 183.0, "fp32": 91.6}),
    (r"\bA10\b", {"bf16": 125.0, "fp16": 125.0, "tf32": 62.5, "fp32": 31.2}),
    (r"\bRTX 4090\b", {"fp8": 330.3, "bf16": 165.2, "fp16": 165.2, "tf32": 82.6, "fp32": 82.6}),
    (r"\bV100-PCIE\b", {"fp16": 112.0, "fp32": 14.0, "fp64": 7.0}),
    (r"\bV100-SXM[23]\b", {"fp16": 125.0, "fp32": 15.7, "fp64": 7.8}),
)


def peak_flops(device_name: str, precision: str) -> float | None:
    """Return the dense peak of a device in FLOP/s, or None if it is unknown.

    `device_name` is that of torch.cuda.get_device_name; `precision` is one of fp8, bf16, fp16,
    tf32, fp32, fp64.
    """
    for pattern, peaks in PEAK_TFLOPS:
        if re.search(pattern, device_name):
            return peaks[precision] * 1e12 if precision in peaks else None
    return None


def flops_per_sample(
    config: ModelConfig, seq_len: int, source_len: int = 0, lengths: Sequence[int] = ()
) -> float:
    """Return the matrix-product FLOPs of one forward and backward of a sample of `seq_len` tokens.

    A multiply-add is two FLOPs; a backward is twice its forward; attention counts all S×S scores,
    masked (by a sliding window too) or not, once per pass. Recomputation (flash attention,
    activation checkpointing) and embedding look-ups are not counted. `source_len` is the source
    length of an encoder-decoder, and of audio the frames; the sequence length of an encoder of
    images follows from its image. `lengths` are the sequence lengths at the input of each block of
    an encoder, or of a decoder-only model, if they shrink.
    """
    return sum(flops_per_block(config, seq_len, source_len, lengths))


def flops_per_block(
    config: ModelConfig, seq_len: int, source_len: int = 0, lengths: Sequence[int] = ()
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
    patches = outputs_of(config) == "boxes" and not config.queries
    classified = 1 if outputs_of(config) == "classes" else source_len if patches else seq_len
    costs[-1] += classified * config.width * classes_of(config)
    if config.head_dense:  # at every position
        read = source_len if config.family == "encoder" else seq_len
        costs[-1] += read * config.width**2
    if config.auxiliary_heads:
        own = classes_of(config) + config.width * config.head_dense
        costs[-config.layers : -1] = [
            cost + seq_len * config.width * own for cost in costs[-config.layers : -1]
        ]
    # A multiply-add is two FLOPs; forward and backward together are three products.
    return [2.0 * 3 * cost + (embedding if i == 0 else 0.0) for i, cost in enumerate(costs)]


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
