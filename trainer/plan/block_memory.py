"""Bytes that blocks, embedding and head of a model keep for the backward; free of torch.

All functions return bytes of one micro-batch on one rank. A "row" is a vector of one sample's
position. Each sum below names the tensors that autograd keeps, in the order of the forward.
"""

# B samples, T rows of the rank's positions, R rows between split layers (T, or its part under
# sequence parallelism), D width, H query heads, G key/value heads, K head width, F feed-forward
# width, C key positions, c bytes of compute.

import math
from dataclasses import dataclass, field
from typing import NamedTuple

from trainer.config.lora import LAYERS
from trainer.config.train import (
    CompressConfig,
    LoraConfig,
    ModelConfig,
    classes_of,
    head_width_of,
    inputs_of,
    is_gated,
    outputs_of,
)
from trainer.plan.parameters import ROW, attention_matrices, feed_forward_matrices

FLOAT = 4  # bytes of float32
# A weight's gradient: as it is kept; cast to that dtype; kept in the dtype of compute until FSDP
# has those of its whole block.
WHOLE_GRADIENTS, CAST_GRADIENTS, SHARDED_GRADIENTS = "whole", "cast", "sharded"


@dataclass(frozen=True)
class Setting:
    """Inputs of a block's closed form besides the model."""

    samples: int  # of a micro-batch
    tensor: int = 1
    sequence_parallel: bool = True
    context: int = 1
    context_method: str = "all_gather"
    compute_bytes: int = 2
    parameter_bytes: int = 4
    fused_norm: bool = True  # RMSNorm is one kernel, as on CUDA; a CPU's keeps more
    lora: LoraConfig = field(default_factory=LoraConfig)
    compress: CompressConfig = field(default_factory=CompressConfig)

    @property
    def splits_rows(self) -> bool:
        """Return whether rows between split layers are split over the tensor ranks."""
        return self.tensor > 1 and self.sequence_parallel

    def local(self, length: int) -> int:
        """Return the positions on one rank of the context axis."""
        return 2 * math.ceil(length / (2 * self.context)) if self.context > 1 else length

    def rows(self, length: int) -> int:
        """Return the rows in split layers."""
        return self.samples * self.local(length)

    def rows_between(self, length: int) -> int:
        """Return the rows between split layers."""
        local = self.local(length)
        return self.samples * (math.ceil(local / self.tensor) if self.splits_rows else local)


@dataclass(frozen=True)
class Sequence:
    """A sequence that blocks compute on, and how its attention is masked."""

    length: int
    causal: bool = False
    masked: bool = False  # by padding: a mask of the keys alone
    documents: bool = False  # by documents: a mask of queries and keys


class LayerBytes(NamedTuple):
    """Elements that a layer keeps: without recomputation, and of its products and attention."""

    full: float
    products: float


@dataclass(frozen=True)
class BlockBytes:
    """Bytes of a block by what they are for; `kept` by the mode of activation checkpointing."""

    kept: dict[str, float]
    recomputed: dict[str, float]  # beyond what is kept, when its backward begins
    backward: dict[str, tuple[float, float]]  # beyond that, in its backward; and in a first one
    ends: float  # in the backward of its first norm, its last
    output: float  # its output, which the next block keeps as its input
    gradients: float  # of the outputs of its products, from which its weights get theirs
    received: float  # its input, where nothing else keeps it but the stage that received it


def block_bytes(
    model: ModelConfig,
    own: Sequence,
    setting: Setting,
    memory: Sequence | None = None,
    turns: bool = False,
) -> BlockBytes:
    """Return the bytes of a block; with `memory` it has cross-attention to that.

    `turns`: the last of an encoder, which normalises and gathers what the decoder reads.
    """
    c, d = setting.compute_bytes, model.width
    between, rows = setting.rows_between(own.length), setting.rows(own.length)
    stream, whole = c * between * d, c * rows * d
    layers = [_attention_bytes(model, own, own, setting), _feed_forward_bytes(model, rows, setting)]
    if memory is not None:
        layers.append(_attention_bytes(model, own, memory, setting))
    branches = len(layers)
    full = sum(layer.full for layer in layers)
    full += branches * _branch_norms(model, between, setting)
    full += branches * between * d if model.dropout else 0.0  # masks of a byte
    products = sum(layer.products for layer in layers)
    # A row-split product is read by its sum alone, which is kept in its place.
    each = stream if setting.tensor > 1 else whole
    turned = whole if turns else 0.0
    full += turned and turned + _branch_norms(model, between, setting) - stream
    read = _keeps_input(model, setting) * stream
    # What is computed again is gathered again, and kept whole.
    again = full - read - turned + branches * (whole - stream if setting.splits_rows else 0.0)
    selective = products + branches * each
    kept = {"none": full, "block": stream + turned, "selective": stream + turned + selective}
    # By then all that was kept is used, or freed, but the last sum.
    recomputed = {"none": 0.0, "block": again, "selective": again - selective + each}
    work, gradients = _backward_bytes(model, own, setting), products + branches * whole
    ends = _norm_backward_bytes(model, between, setting)
    return BlockBytes(kept, recomputed, work, ends, stream, gradients, stream - read)


def _keeps_input(model: ModelConfig, setting: Setting) -> bool:
    """Return whether a block without recomputation keeps its input; a CPU's RMSNorm widens it."""
    widens = model.norm == "rmsnorm" and not setting.fused_norm and setting.compute_bytes < FLOAT
    return not (widens and model.norm_placement in ("pre", "sandwich"))


def _branch_norms(model: ModelConfig, rows: int, setting: Setting) -> float:
    """Return the bytes of a branch's norms, their inputs and what they give to the branch."""
    c, entries = setting.compute_bytes, rows * model.width
    norms = 2 if model.norm_placement == "sandwich" else 1
    if model.norm == "layernorm":
        normed, statistics = c * entries, 2 * FLOAT * rows
    elif setting.fused_norm:
        normed, statistics = c * entries, FLOAT * rows
    else:  # the input in float32 at least, and the normalised input
        times = 1 if setting.lora.rank else 2  # a frozen weight needs no normalised input
        normed, statistics = times * max(FLOAT, c) * entries, max(FLOAT, c) * rows
    return norms * (normed + statistics) + c * entries


def _norm_backward_bytes(model: ModelConfig, rows: int, setting: Setting) -> float:
    """Return what the backward of a norm needs at once, with the gradient of its output."""
    c, entries = setting.compute_bytes, rows * model.width
    if model.norm == "rmsnorm" and not setting.fused_norm:
        # Of its operators' results: two products, their sum's, the mean's, and three of the square.
        return 7 * max(FLOAT, c) * entries
    return 2 * c * entries


def _attention_bytes(
    model: ModelConfig, own: Sequence, keys: Sequence, setting: Setting
) -> LayerBytes:
    """Return the bytes of attention from a sequence to keys, its own or another's."""
    c, t, width = setting.compute_bytes, setting.tensor, head_width_of(model)
    heads, groups = model.heads // t, max(1, (model.kv_heads or model.heads) // t)
    rows, seen = setting.rows(own.length), setting.rows(keys.length)
    query, shared = c * rows * heads * width, c * seen * groups * width
    statistics = max(FLOAT, c) * rows * heads
    products = 2 * query + 2 * shared + statistics
    crosses = own is not keys
    hides = keys.masked or keys.documents or bool(model.sliding_window and own.causal)
    biased = model.positions == "relative" and not crosses
    repeats = groups < heads and (hides or biased or setting.context > 1)
    spread = shared * heads // groups if repeats else shared
    kept: float = 2 * query + 2 * spread + statistics
    if setting.context > 1:
        kept += _shared_attention(model, own, keys, setting, query, shared, spread)
    elif keys.documents or (model.sliding_window and own.causal):
        samples = setting.samples if keys.documents else 1
        kept += c * samples * own.length * keys.length  # the mask as numbers
    if model.qk_norm != "none":
        normed = setting.compute_bytes if setting.fused_norm else 2 * max(FLOAT, c)
        each = 2 * max(FLOAT, c) if model.qk_norm == "width" else normed
        kept += (rows * heads + seen * groups) * width * each
    return LayerBytes(kept, products)


def _shared_attention(
    model: ModelConfig,
    own: Sequence,
    keys: Sequence,
    setting: Setting,
    query: float,
    shared: float,
    spread: float,
) -> float:
    """Return what attention over a shared sequence keeps beyond attention to the rank's own."""
    parts, method = setting.context, setting.context_method
    if method == "ring":
        return 2 * shared - 2 * spread  # as they came: repeated where they are used
    if method == "ulysses":
        return query  # the output, dealt out to positions again
    hides, c = keys.masked or keys.documents, setting.compute_bytes
    if hides or not own.causal:
        return query * hides + 2 * (parts * spread - spread)
    chunk = setting.local(own.length) // 2
    mask = c * chunk * chunk * (2 * parts + 1)
    # The first rank's two pieces of queries see one chunk of keys, and all of them.
    heads = spread / setting.local(keys.length) * chunk * (2 * parts + 1)
    pieces = heads if spread > shared else parts * shared
    return query + mask + 2 * (pieces - spread)


def _feed_forward_bytes(model: ModelConfig, rows: int, setting: Setting) -> LayerBytes:
    """Return the bytes of the feed-forward layer."""
    inner = setting.compute_bytes * rows * math.ceil(model.ffn_width / setting.tensor)
    if is_gated(model):
        return LayerBytes(4 * inner, 2 * inner)
    if model.activation == "relu":  # it keeps its output, which is the next product's input
        return LayerBytes(inner, inner)
    return LayerBytes(2 * inner, inner)


def _backward_bytes(
    model: ModelConfig, own: Sequence, setting: Setting
) -> dict[str, tuple[float, float]]:
    """Return what the backward of the feed-forward layer, a block's last, needs at once.

    By what becomes of a weight's gradient: it is added to one that is there, or is the first.
    """
    c, rows = setting.compute_bytes, setting.rows(own.length)
    width = math.ceil(model.ffn_width / setting.tensor)
    gradient = c * setting.rows_between(own.length) * model.width
    gathered = c * rows * model.width if setting.splits_rows else 0.0
    inner, matrix = c * rows * width, 0 if setting.lora.rank else width * model.width
    relu, wide = model.activation == "relu", setting.parameter_bytes * matrix
    # The last product's gradients, of its input and its weight, come before its input is freed.
    product = inner + c * matrix
    # Then those of the activation, or of both factors; relu keeps its output, the product's input.
    spread = (2 if is_gated(model) or relu else 1) * inner
    cast = wide + relu * inner  # the weight's copy is freed, its gradient is not yet
    found = {
        WHOLE_GRADIENTS: (max(product, spread), max(product, spread + c * matrix)),
        CAST_GRADIENTS: (
            max(product, cast, spread - c * matrix),
            max(product, cast, spread - c * matrix + wide),
        ),
        SHARDED_GRADIENTS: (max(product, spread + c * matrix),) * 2,
    }
    return {
        style: (gradient + gathered + a, gradient + gathered + b) for style, (a, b) in found.items()
    }


def input_bytes(
    model: ModelConfig, source: Sequence | None, target: Sequence | None, samples: int
) -> float:
    """Return what a micro-batch reads; those of a whole step are there from its start."""
    number, found = 8, 0.0  # bytes of a token
    if inputs_of(model) == "patches":
        found += FLOAT * model.channels * model.image_size**2
    elif source is not None and inputs_of(model) == "audio":
        found += FLOAT * source.length * model.audio_stride * model.mels
    elif source is not None:
        found += number * source.length * (1 if target else 2)
    if target is not None and not model.queries:
        found += 2 * number * target.length
    return samples * found


def embedding_bytes(model: ModelConfig, source: Sequence | None, setting: Setting) -> float:
    """Return what the embedding keeps; `source` is the encoder's sequence."""
    c, kept = setting.compute_bytes, 0.0
    if source is not None and inputs_of(model) == "patches":
        kept += c * setting.samples * source.length * model.channels * model.patch_size**2
    if source is not None and inputs_of(model) == "audio":
        rows = setting.samples * source.length
        first = rows * 2  # vectors of the first convolution
        kept += c * (first * 3 * model.mels + first * 2 * model.width)
        kept += c * (rows * 3 * model.width + rows * model.width)
    return kept


def shared_bytes(model: ModelConfig, sequences: list[Sequence], setting: Setting) -> float:
    """Return what all blocks of a micro-batch share: rotations, masks."""
    kept = 0.0
    for sequence in sequences:
        rows = setting.local(sequence.length)
        if model.positions == "rope" and inputs_of(model) != "patches":
            kept += 2 * FLOAT * rows * head_width_of(model) / 2
        if sequence.documents:
            kept += setting.samples * sequence.length**2
        if model.positions == "relative" and setting.context == 1:
            heads = model.heads // setting.tensor
            kept += setting.compute_bytes * heads * sequence.length**2
    return kept


@dataclass(frozen=True)
class LossBytes:
    """Bytes of the head and the loss of one micro-batch."""

    hidden: float  # what the head keeps in front of the logits
    kept: float  # from the loss to its backward
    peak: float  # in the loss and its backward, with what is kept
    logits: float = 0.0  # from which weights get gradients, and which 1f1b still holds
    in_turn: float = 0.0  # the peak when the logits are still held in their backward


def loss_bytes(model: ModelConfig, last: Sequence, setting: Setting, chunks: int = 1) -> LossBytes:
    """Return the bytes of the head and of the loss; `last` is the sequence that it reads."""
    c, kind = setting.compute_bytes, outputs_of(model)
    wide = max(FLOAT, c)
    rows, between = setting.rows(last.length), setting.rows_between(last.length)
    hidden = (
        _branch_norms(model, between, setting)
        if model.norm_placement != "post"
        else c * between * model.width
    )
    if model.head_dense:
        hidden += 4 * c * between * model.width
    if setting.splits_rows:
        hidden += c * rows * model.width
    if setting.lora.rank:  # nothing of the head learns from what it reads
        hidden -= c * rows * model.width
    pools = kind == "classes"
    counted = setting.samples if pools else rows
    if (kind in ("ctc", "boxes")) and setting.context > 1:
        counted = setting.samples * last.length
    entries = counted * classes_of(model)
    split = setting.tensor > 1 and kind in ("tokens", "classes")
    if split:
        entries = counted * math.ceil(classes_of(model) / setting.tensor)
    casts = c if c < FLOAT else 0  # logits that are widened
    forward = (casts + 2 * wide) * entries
    backward = (2 * wide if split else 3 * wide) * entries
    if kind == "ctc":
        states = counted * (2 * (last.length // 2) + 1) * wide
        forward, backward = forward + states, 3 * wide * entries + 2 * states
    if kind == "boxes":
        forward = backward = 8 * wide * entries
    # Logits that the loss makes itself are freed behind their widening.
    kept = wide * entries if kind in ("tokens", "classes") else (wide + c) * entries
    if chunks > 1 and kind == "tokens":
        hidden_grad = c * rows * model.width
        peak = max(forward, backward + casts * entries) / chunks + hidden_grad
        return LossBytes(hidden, hidden_grad, peak, in_turn=peak)
    logits = c * entries
    return LossBytes(hidden, kept, max(forward, backward), logits, max(forward, backward + logits))


def layer_extras(model: ModelConfig, own: Sequence, setting: Setting, branches: int) -> float:
    """Return what a block's linear layers keep more with adapters, or computing with integers."""
    compress, lora, c = setting.compress, setting.lora, setting.compute_bytes
    rows, tensor, extra = setting.rows(own.length), setting.tensor, 0.0
    for matrix in attention_matrices(model) * (branches - 1) + feed_forward_matrices(model):
        row_split = matrix.style == ROW
        outputs = matrix.outputs if row_split else matrix.outputs // tensor
        inputs = matrix.inputs // tensor if row_split else matrix.inputs
        if lora.rank:
            extra += c * rows * lora.rank * (matrix.name in (lora.targets or LAYERS))
        elif compress.bits and compress.input_bits:  # its own input, and the scale of its outputs
            extra += c * rows * (inputs + (0 if compress.group else outputs))
    if compress.bits and compress.input_bits and not lora.rank:
        # What they read is not kept beside the integers.
        inner = 0 if model.activation == "relu" else math.ceil(model.ffn_width / tensor)
        extra -= c * rows * (branches * model.width + inner)
    return extra
