"""Numbers of parameters on one rank, by part of a model; free of torch.

`tests/trainer/plan/test_memory.py` holds them against the parameters of real models.
"""

# D width, H query heads, G key/value heads, K head width, F feed-forward width, t tensor ranks.

import math
from collections.abc import Iterable
from dataclasses import dataclass

from trainer.config.lora import LAYERS
from trainer.config.train import (
    CompressConfig,
    LoraConfig,
    ModelConfig,
    attention_biases,
    classes_of,
    has_key_bias,
    head_width_of,
    inputs_of,
    is_encoder_decoder,
    is_gated,
    outputs_of,
)

COLUMN, ROW, WHOLE = "column", "row", "whole"  # rows of the weight are split, columns, nothing


@dataclass(frozen=True)
class Matrix:
    """A weight (outputs, inputs), with a bias or without."""

    name: str
    outputs: int
    inputs: int
    style: str = WHOLE
    bias: bool = False

    def local_shapes(self, tensor: int) -> list[tuple[int, int]]:
        """Return (rows, columns) on the first of `tensor` ranks; a vector has one column."""
        rows = math.ceil(self.outputs / tensor) if self.style == COLUMN else self.outputs
        columns = math.ceil(self.inputs / tensor) if self.style == ROW else self.inputs
        return [(rows, columns), *([(rows, 1)] if self.bias else [])]


@dataclass(frozen=True)
class Parameters:
    """Elements on one rank before sharding over the shard axis."""

    learned: int = 0
    frozen: int = 0
    small: int = 0  # of the learned: vectors, whose moments are never in few bits
    matrices: int = 0  # of all: what linear layers multiply with
    largest: int = 0  # of the learned: the largest matrix

    def __add__(self, other: "Parameters") -> "Parameters":
        return Parameters(
            self.learned + other.learned,
            self.frozen + other.frozen,
            self.small + other.small,
            self.matrices + other.matrices,
            max(self.largest, other.largest),
        )

    def __rmul__(self, number: int) -> "Parameters":
        return Parameters(
            number * self.learned,
            number * self.frozen,
            number * self.small,
            number * self.matrices,
            self.largest,
        )

    @property
    def total(self) -> int:
        """Return all of them."""
        return self.learned + self.frozen


def norm_elements(model: ModelConfig) -> int:
    """Return the elements of a norm over the width."""
    return model.width * (2 if model.bias and model.norm == "layernorm" else 1)


def norms_of_branch(model: ModelConfig) -> int:
    """Return the norms of a residual branch."""
    return 2 if model.norm_placement == "sandwich" else 1


def attention_matrices(model: ModelConfig) -> list[Matrix]:
    """Return the matrices of an attention layer."""
    width = head_width_of(model)
    queries, groups = model.heads * width, (model.kv_heads or model.heads) * width
    bias, output_bias = attention_biases(model)
    return [
        Matrix("query", queries, model.width, COLUMN, bias),
        Matrix("key", groups, model.width, COLUMN, has_key_bias(model)),
        Matrix("value", groups, model.width, COLUMN, bias),
        Matrix("output", model.width, queries, ROW, output_bias),
    ]


def feed_forward_matrices(model: ModelConfig) -> list[Matrix]:
    """Return the matrices of a feed-forward layer."""
    up = Matrix("up", model.ffn_width, model.width, COLUMN, model.bias)
    gate = [Matrix("gate", model.ffn_width, model.width, COLUMN, model.bias)]
    down = Matrix("down", model.width, model.ffn_width, ROW, model.bias)
    return [*(gate if is_gated(model) else []), up, down]


def block_parameters(
    model: ModelConfig, tensor: int, lora: LoraConfig, cross: bool = False, turns: bool = False
) -> Parameters:
    """Return the parameters of a block on the first of `tensor` ranks.

    `cross`: with cross-attention; `turns`: the last of an encoder in front of a decoder.
    """
    attentions = 2 if cross else 1
    matrices = attentions * attention_matrices(model) + feed_forward_matrices(model)
    norms = (attentions + 1) * norms_of_branch(model)
    norms += turns and model.norm_placement != "post"
    vectors = norms * norm_elements(model)
    if model.qk_norm == "head":
        vectors += attentions * 2 * head_width_of(model)
    if model.qk_norm == "width":
        groups = model.kv_heads or model.heads
        vectors += attentions * (model.heads + groups) * head_width_of(model) // tensor
    found = _of_matrices(matrices, tensor, frozen=bool(lora.rank)) + _vectors(vectors, lora)
    targets = lora.targets or LAYERS
    for matrix in matrices if lora.rank else ():
        if matrix.name in targets:
            found += _of_matrices(_adapters(matrix, lora.rank), tensor, frozen=False)
    return found


def embedding_parameters(model: ModelConfig, tensor: int, lora: LoraConfig) -> Parameters:
    """Return the parameters of the embedding on the first of `tensor` ranks."""
    matrices, vectors, width = [], 0, model.width
    reads, two = inputs_of(model), is_encoder_decoder(model)
    if reads == "tokens" or two:
        matrices.append(Matrix("tokens", model.vocab_size, width, COLUMN))
        if model.positions == "learned" and not model.queries:
            matrices.append(Matrix("positions", model.max_positions, width))
        if model.segments:
            matrices.append(Matrix("segments", model.segments, width))
        vectors += norm_elements(model) if model.embed_norm else 0
    if reads == "patches":
        pixels = model.channels * model.patch_size**2
        length = (model.image_size // model.patch_size) ** 2 + (model.pool == "class_token")
        matrices += [Matrix("patches", width, pixels, bias=True), Matrix("places", length, width)]
        vectors += width if model.pool == "class_token" else 0
    if reads == "audio":
        matrices.append(Matrix("convolution_1", width, 3 * model.mels, bias=True))
        matrices.append(Matrix("convolution_2", width, 3 * width, bias=True))
    return _of_matrices(matrices, tensor, frozen=bool(lora.rank)) + _vectors(vectors, lora)


def head_parameters(
    model: ModelConfig, tensor: int, lora: LoraConfig, tied: bool = False
) -> Parameters:
    """Return the parameters of the head; `tied`: without the embedding that it shares."""
    width, pools = model.width, outputs_of(model) == "classes"
    matrices, vectors = [], norm_elements(model) if model.norm_placement != "post" else 0
    if model.head_dense:
        matrices.append(Matrix("dense", width, width, bias=model.bias))
        vectors += 0 if pools else norm_elements(model)
    bias = outputs_of(model) in ("classes", "boxes") or model.head_dense
    if not tied:
        matrices.append(Matrix("output", classes_of(model), width, COLUMN, bias))
    elif bias:
        vectors += math.ceil(classes_of(model) / tensor)
    return _of_matrices(matrices, tensor, frozen=bool(lora.rank)) + _vectors(vectors, lora)


def is_tied(model: ModelConfig) -> bool:
    """Return whether the output projection shares the token embedding."""
    reads_tokens = inputs_of(model) == "tokens" or is_encoder_decoder(model)
    return model.tied and outputs_of(model) == "tokens" and reads_tokens


def bias_tables(model: ModelConfig, lora: LoraConfig) -> Parameters:
    """Return the tables of positions=relative, which all blocks of a stream share."""
    tables = 2 if is_encoder_decoder(model) else 1
    if model.positions != "relative":
        return Parameters()
    return _vectors(tables * model.heads * model.relative_buckets, lora)


def moment_bytes(found: Parameters, optimizer: str, parameter_bytes: int, width: int) -> float:
    """Return the bytes of both moments of these parameters, before sharding."""
    if optimizer != "adamw8bit":
        return 2.0 * parameter_bytes * found.learned
    block = math.gcd(256, width)
    coded = 2 + 8 / block if block >= 32 else 2.0 * parameter_bytes
    return coded * (found.learned - found.small) + 2.0 * parameter_bytes * found.small


def packed_bytes(found: Parameters, compress: CompressConfig, width: int) -> float:
    """Return the bytes of frozen matrices that are kept as integers, with their scales."""
    bits = 4 if compress.bits <= 4 else 8
    return found.frozen * (bits / 8 + 4 / (compress.group or width))


def _adapters(matrix: Matrix, rank: int) -> list[Matrix]:
    low = ROW if matrix.style == ROW else WHOLE
    high = COLUMN if matrix.style == COLUMN else WHOLE
    return [
        Matrix("lora_a", rank, matrix.inputs, low),
        Matrix("lora_b", matrix.outputs, rank, high),
    ]


def _of_matrices(matrices: Iterable[Matrix], tensor: int, frozen: bool) -> Parameters:
    total = Parameters()
    for matrix in matrices:
        for rows, columns in matrix.local_shapes(tensor):
            size = rows * columns
            small, multiplied = (size, 0) if columns == 1 else (0, size)
            if frozen:
                total += Parameters(frozen=size, matrices=multiplied)
            else:
                total += Parameters(size, 0, small, multiplied, size)
    return total


def _vectors(elements: int, lora: LoraConfig) -> Parameters:
    return Parameters(frozen=elements) if lora.rank else Parameters(elements, small=elements)
