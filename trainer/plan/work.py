"""Work of one optimizer step, whatever the layout: sizes of blocks, of logits, of weights."""

# D width, H query heads, G key/value heads, K head width, F feed-forward width.

from collections.abc import Sequence
from dataclasses import dataclass

from trainer.config.train import (
    LoraConfig,
    ModelConfig,
    classes_of,
    has_window,
    head_width_of,
    inputs_of,
    is_gated,
    outputs_of,
)
from trainer.nn.flops import flops_per_block, flops_per_sample
from trainer.plan.parameters import (
    bias_tables,
    block_parameters,
    embedding_parameters,
    head_parameters,
    is_tied,
)


@dataclass(frozen=True)
class BlockWork:
    """One block, for one sample, before any split."""

    length: int  # positions
    width: int  # D
    heads: int
    kv_heads: int
    head_width: int
    ffn_width: int
    gated: bool
    products: float  # multiply-adds of the forward with weights
    scores: float  # multiply-adds of the forward between positions, as the kernel does them
    weights: int
    branches: int = 2
    # Of operators that are not fused, forward and backward: entries that they read and write for a
    # position, which split layers leave whole or split, and how many operators there are.
    whole_traffic: float = 0.0
    split_traffic: float = 0.0
    operators: float = 0.0


@dataclass(frozen=True)
class Stack:
    """How a training stack works; the defaults are this one's."""

    fused_attention: bool = True
    cudnn_attention: bool = False
    fused_pointwise: bool = False  # torch.compile, or kernels by hand
    hides_tensor: bool = False  # collectives of split layers overlap with products
    hides_sum: bool = True  # gradients are summed while the last backward runs
    state_ranks: int = 0  # ZeRO-1: neighbours that share the optimizer's states; 0 = all copies
    shards_gradients: bool = True  # over `shard`, with their weights: ZeRO-3, otherwise ZeRO-1
    per_parameter: bool = True  # each is sharded by itself (FSDP2), not a flat one for a block
    gathers_again: bool = True  # weights are gathered again for the backward
    staged_scatter: bool = False  # a pipeline sums gradients in every micro-batch
    float8: bool = False
    stops_early: bool = True  # a block is recomputed up to the input of its last product


@dataclass(frozen=True)
class Work:
    """One optimizer step of all ranks."""

    blocks: tuple[BlockWork, ...]  # in order; alike ones are the same object
    costs: tuple[float, ...]  # by which blocks are cut into stages; the last has the head's
    width: int
    logits: float  # of one sample
    head: float  # multiply-adds of one sample's logits
    outer_weights: int  # of embedding and head
    samples: int  # per step, over all ranks
    flops: float  # of one sample, forward and backward, as MFU counts them
    tokens: int  # of one sample
    compute_bytes: int
    sum_bytes: int  # of a gradient that is summed
    update_bytes: float  # of memory traffic for each weight that is updated
    learned_share: float = 1.0  # of the weights; below 1 with adapters on frozen ones
    logit_traffic: float = 0.0  # entries that the loss of a logit reads and writes
    stack: Stack = Stack()


def block_works(
    model: ModelConfig, length: int, inside: int, shrunk: Sequence[int] = ()
) -> list[BlockWork]:
    """Return the work of every block: encoder blocks first.

    `length` is in tokens, `inside` the encoder's positions; `shrunk` are the lengths of the blocks
    of a shorter sequence: of the encoder, or of a decoder alone.
    """
    if model.family == "decoder":
        lengths = list(shrunk) or [length] * model.layers
        causal = [not has_window(model, number) for number in range(model.layers)]
        return [_block(model, n, 0, c) for n, c in zip(lengths, causal, strict=True)]
    depth = model.layers if model.family == "encoder" else model.encoder_layers or model.layers
    encoder = [_block(model, n, 0, False) for n in list(shrunk) or [inside] * depth]
    if model.family == "encoder":
        return encoder
    crossed = shrunk[-1] if shrunk else inside
    return encoder + [_block(model, length, crossed, True) for _ in range(model.layers)]


def _block(model: ModelConfig, length: int, crossed: int, causal: bool) -> BlockWork:
    """Return the work of a block; a masked kernel skips half of the scores where it is causal."""
    D, F, K = model.width, model.ffn_width, head_width_of(model)
    H, G, matrices = model.heads, model.kv_heads or model.heads, 3 if is_gated(model) else 2
    attention = 2 * D * (H + G) * K
    products = length * (attention + matrices * D * F)
    scores = 2.0 * length * length * H * K / (2 if causal else 1)
    if crossed:
        products += 2 * D * (length * H + crossed * G) * K
        scores += 2.0 * length * crossed * H * K
    weights = block_parameters(model, 1, LoraConfig(), cross=bool(crossed)).total
    branches = 3 if crossed else 2
    return BlockWork(
        *(length, D, H, G, K, F, is_gated(model), products, scores, weights, branches),
        *_eager_traffic(model, branches, crossed / length),
        _eager_operators(model, branches),
    )


# Entries that operators of one kind read and write, forward and backward, and their number, a view
# counting half: of the code as it runs on a CPU, where RMSNorm and dropout's mask are composed.
NORM_ENTRIES = {"rmsnorm": 31.0, "layernorm": 5.0}  # for an entry of the width
NORM_OPERATORS = {"rmsnorm": 20.0, "layernorm": 0.0}
RESIDUAL_ENTRIES, GATHERED_ENTRIES, DROPOUT_ENTRIES = 6.0, 6.0, 22.8
ROPE_ENTRIES = 19.0  # for an entry of queries and keys
ACTIVATION_ENTRIES, GATED_ENTRIES = 5.0, 14.0  # for a channel
LOGIT_ENTRIES, SMOOTHED_ENTRIES = 8.0, 15.0


def _eager_traffic(model: ModelConfig, branches: int, crossed: float) -> tuple[float, float]:
    """Return the entries that a block moves for a position: those of the width, and of layers.

    `crossed` are the positions that it attends to beside its own, for each of these.
    """
    D, K, gated = model.width, head_width_of(model), is_gated(model)
    H, G = model.heads, model.kv_heads or model.heads
    branch = NORM_ENTRIES[model.norm] + RESIDUAL_ENTRIES
    branch += DROPOUT_ENTRIES * (model.dropout > 0)
    whole = D * (branches * branch + GATHERED_ENTRIES * (1 + crossed) + 3 * gated)
    split = (GATED_ENTRIES if gated else ACTIVATION_ENTRIES) * model.ffn_width
    if model.positions == "rope":
        split += ROPE_ENTRIES * (H + G) * K
    if model.bias:
        split += (H + 2 * G) * K + model.ffn_width
        whole += 2 * D
    return whole, split


def _eager_operators(model: ModelConfig, branches: int) -> float:
    """Return the operators of a block."""
    found = 72.0 + 56.0 * (branches - 2)
    found += branches * (NORM_OPERATORS[model.norm] + 27.5 * (model.dropout > 0))
    found += 33.0 * (model.positions == "rope")
    return found + 12.0 * is_gated(model) + 12.0 * model.bias


def model_work(
    model: ModelConfig,
    samples: int,
    length: int,
    source: int = 0,
    *,
    compute_bytes: int = 2,
    sum_bytes: int = 4,
    moment_bytes: float = 8.0,
    learned_share: float = 1.0,
    shrunk: Sequence[int] = (),
    smoothed: bool = False,
    stack: Stack = Stack(),
) -> Work:
    """Return the work of a completed model's step.

    `source` is the length of an encoder's input, as flops_per_sample takes it; `shrunk` are the
    lengths of blocks of a shorter sequence; `smoothed`: the loss has label smoothing.
    """
    classes, inside = classes_of(model), encoder_length(model, source)
    of_encoder = model.family == "encoder"
    logits = 1 if outputs_of(model) == "classes" else inside if of_encoder else length
    same = {block: block for block in block_works(model, length, inside, shrunk)}
    return Work(
        blocks=tuple(same[block] for block in block_works(model, length, inside, shrunk)),
        costs=tuple(flops_per_block(model, length, source, shrunk)),
        width=model.width,
        logits=float(logits * classes),
        head=float(logits * classes * model.width),
        outer_weights=_outer_weights(model),
        samples=samples,
        flops=flops_per_sample(model, length, source, shrunk),
        tokens=inside if of_encoder else length,
        compute_bytes=compute_bytes,
        sum_bytes=sum_bytes,
        update_bytes=2 * moment_bytes + 2 * 4 + 4,
        learned_share=learned_share,
        logit_traffic=SMOOTHED_ENTRIES if smoothed else LOGIT_ENTRIES,
        stack=stack,
    )


def _outer_weights(model: ModelConfig) -> int:
    """Return the weights outside of blocks; those of a tied embedding and head count once."""
    whole, tied = LoraConfig(), is_tied(model)
    ends = embedding_parameters(model, 1, whole) + head_parameters(model, 1, whole, tied)
    return (ends + bias_tables(model, whole)).total


def encoder_length(model: ModelConfig, source: int) -> int:
    """Return the positions of an encoder that reads `source` tokens, frames, or an image."""
    if inputs_of(model) == "patches":
        return (model.image_size // model.patch_size) ** 2 + (model.pool == "class_token")
    return -(-source // model.audio_stride) if inputs_of(model) == "audio" else source
