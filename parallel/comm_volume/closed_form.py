"""Closed forms of a layout's communication volume; tests compare them with counted bytes."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from parallel.data.compressed_sizes import BLOCK, SCALE_BYTES, factor_sizes, part_size
from parallel.strategy import StrategyConfig

Shape = tuple[int, ...]


@dataclass(frozen=True)
class StepBytes:
    """Bytes per rank of one optimizer step, by collective.

    For an all-reduce, the size of the reduced tensor; for an all-gather, of its output; for a
    reduce-scatter and an all-to-all, of the input; for a send, of the sent tensor.
    """

    all_reduce: int = 0
    all_gather: int = 0
    reduce_scatter: int = 0
    all_to_all: int = 0
    send: int = 0

    def __add__(self, other: "StepBytes") -> "StepBytes":
        return StepBytes(
            self.all_reduce + other.all_reduce,
            self.all_gather + other.all_gather,
            self.reduce_scatter + other.reduce_scatter,
            self.all_to_all + other.all_to_all,
            self.send + other.send,
        )


def step_bytes(
    blocks: Iterable[Shape],
    others: Iterable[Shape],
    strategy: StrategyConfig,
    micro_batches: int,
    compute_bytes: int,
    reduce_bytes: int,
    learned: Iterable[Shape] | None = None,
) -> StepBytes:
    """Return the bytes per step for a rank's gradients and, with shards, its weights.

    `blocks` and `others` are the shapes of the parameters inside blocks, and of embedding and head;
    `learned` those that are not frozen (None = all), which alone have gradients.
    DDP: one sum of the gradients (`sum_bytes`). FSDP, per micro-batch: two all-gathers of the
    blocks (one with reshard_after_forward=false) and one of the others, which stay gathered from
    the forward's end to the backward's start, and one reduce-scatter of the gradients; in a
    pipeline one of each per step, as weights stay gathered over the micro-batches. Hybrid sharding
    adds one all-reduce of each rank's shard. ZeRO (arXiv 1910.02054), section 7.
    """
    shards, replicas = strategy.shard, strategy.replicate * strategy.context
    blocks, others = list(blocks), list(others)
    learned = [*blocks, *others] if learned is None else list(learned)
    if shards == 1:
        return sum_bytes(learned, strategy, reduce_bytes) if replicas > 1 else StepBytes()
    inside = sum(_padded_elements(shape, shards) for shape in blocks)
    outside = sum(_padded_elements(shape, shards) for shape in others)
    whole = sum(_padded_elements(shape, shards) for shape in learned)
    staged = strategy.pipeline > 1
    times = 1 if staged else micro_batches
    gathers = 2 if strategy.reshard_after_forward and not staged else 1
    return StepBytes(
        all_reduce=whole * reduce_bytes // shards if replicas > 1 else 0,
        all_gather=times * (gathers * inside + outside) * compute_bytes,
        reduce_scatter=times * whole * reduce_bytes,
    )


def sum_bytes(shapes: Iterable[Shape], strategy: StrategyConfig, reduce_bytes: int) -> StepBytes:
    """Return the bytes of one sum of full gradients of these shapes over the replicas.

    An all-reduce. With reduce=int8, an all-to-all and an all-gather of one byte per element and
    one scale per block, each rank's chunk padded to full blocks. With reduce=powersgd, all-reduces
    of both factors of a matrix, and of all other gradients uncompressed (arXiv 1905.13727,
    section 3).
    """
    if strategy.reduce == "int8":
        ranks = strategy.replicate
        codes = sum(ranks * part_size(math.prod(shape), ranks) for shape in shapes)
        moved = codes + codes // BLOCK * SCALE_BYTES
        return StepBytes(all_to_all=moved, all_gather=moved)
    numbers = 0
    for shape in shapes:
        factors = (
            factor_sizes(shape, strategy.powersgd_rank) if strategy.reduce == "powersgd" else ()
        )
        numbers += sum(factors) or math.prod(shape)
    return StepBytes(all_reduce=numbers * reduce_bytes)


def stage_bytes(flows: Sequence[tuple[int, int]], placement: Sequence[int], rank: int) -> StepBytes:
    """Return the bytes that a pipeline rank sends to neighbouring stages per micro-batch.

    `flows` are the bytes of each stage's inputs and of their gradients (GPipe, arXiv 1811.06965,
    section 2.2), `placement` is the rank of each stage. Stages on the same rank send nothing.
    """
    sent = 0
    for stage, (before, after) in enumerate(pairwise(placement), 1):
        if before != after:
            sent += flows[stage][0] * (rank == before) + flows[stage][1] * (rank == after)
    return StepBytes(send=sent)


@dataclass(frozen=True)
class ShardedSequence:
    """One micro-batch of sequences through tensor-parallel layers."""

    samples: int
    length: int  # positions
    branches: int  # residual branches: a norm, a split layer, a sum
    starts: int = 1  # sums without a preceding norm: token embeddings
    ends: int = 1  # norms without a following sum: before the output, or the encoder's last
    backwards: int = 1  # 2 if gradients of inputs and of weights are computed separately
    frozen_start: bool = False  # nothing in front of the first branch learns


def tensor_bytes(
    sequences: Iterable[ShardedSequence], width: int, strategy: StrategyConfig, compute_bytes: int
) -> StepBytes:
    """Return the bytes of split layers' activations and gradients, forward and backward.

    Without sequence parallelism: Megatron-LM's f and g, an all-reduce per branch in each direction
    (arXiv 1909.08053, figure 4). With it: an all-gather and a reduce-scatter instead, and one more
    all-gather in the backward (arXiv 2205.05198, section 4.2). If a pipeline splits the backward,
    each half has one more, as autograd unpacks a layer's saved tensors in both.
    """
    total = StepBytes()
    for sequence in sequences:
        once = sequence.starts + sequence.ends
        # The first branch then gives no gradient to its input, nor that to the embedding.
        branch = int(sequence.frozen_start and sequence.branches > 0)
        if not strategy.sequence_parallel:
            moved = sequence.samples * sequence.length * width * compute_bytes
            total += StepBytes(all_reduce=(2 * sequence.branches + once - branch) * moved)
            continue
        start = sequence.starts if sequence.frozen_start else 0
        padded = math.ceil(sequence.length / strategy.tensor) * strategy.tensor
        moved = sequence.samples * padded * width * compute_bytes
        total += StepBytes(
            all_gather=((2 + sequence.backwards) * sequence.branches + once - start) * moved,
            reduce_scatter=(2 * sequence.branches + once - branch) * moved,
        )
    return total


def context_bytes(
    method: str, query_BHSK: Shape, key_BGTK: Shape, degree: int, compute_bytes: int
) -> StepBytes:
    """Return the bytes of one context-parallel attention, forward and backward.

    all_gather: keys and values all-gathered, their gradients reduce-scattered (arXiv 2407.21783,
    section 3.3.2). ring: both sent n-1 times in forward and backward, and their gradients n times,
    the last time to their owner (arXiv 2310.01889). ulysses: one all-to-all of queries, outputs,
    keys and values in each direction, key/value heads repeated until the degree divides them
    (arXiv 2309.14509).
    """
    if degree == 1:
        return StepBytes()
    queries, keys = (math.prod(shape) * compute_bytes for shape in (query_BHSK, key_BGTK))
    if method == "all_gather":
        return StepBytes(all_gather=2 * degree * keys, reduce_scatter=2 * degree * keys)
    if method == "ring":
        return StepBytes(send=2 * keys * (2 * (degree - 1) + degree))
    times = degree // math.gcd(key_BGTK[1], degree)
    return StepBytes(all_to_all=2 * (2 * queries + 2 * times * keys))


def cross_entropy_bytes(targets: int) -> int:
    """Return a vocabulary-parallel loss's float32 all-reduce: maximum and three sums per target."""
    return 4 * (1 + 3) * targets


def _padded_elements(shape: Shape, shards: int) -> int:
    """Return the elements of a parameter with dim 0 padded to a multiple of `shards`."""
    return math.ceil(shape[0] / shards) * shards * math.prod(shape[1:])


def ring_bytes(all_reduce: int, others: int, ranks: int) -> float:
    """Return the bytes that each rank sends if the collectives use ring algorithms."""
    return (2 * all_reduce + others) * (ranks - 1) / ranks
