"""Closed forms of what a layout costs; the tests hold them against what is counted."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from parallel.data.int8 import BLOCK, SCALE_BYTES, part_size
from parallel.data.powersgd import factor_sizes
from parallel.strategy import StrategyConfig

Shape = tuple[int, ...]


@dataclass(frozen=True)
class StepBytes:
    """Bytes of one optimizer step by collective: the whole tensor that a rank takes part in.

    Of an all-gather that is its output, of a reduce-scatter and an all-to-all its input, of a send
    what is sent, all of it over the wire.
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
) -> StepBytes:
    """Return what a step must move for a rank's gradients and, with shards, its weights.

    `blocks` and `others` are the shapes of the parameters inside blocks, and of embedding and head.
    DDP: one sum of the gradients (`sum_bytes`). FSDP, per micro-batch: two all-gathers of the
    blocks (one with reshard_after_forward=false) and one of the others, which stay gathered from
    the forward's end to the backward's start, and one reduce-scatter of the gradients; in a
    pipeline one of each per step, as weights stay gathered over the micro-batches. Hybrid sharding
    adds one all-reduce of each rank's shard. ZeRO (arXiv 1910.02054), section 7.
    """
    shards, replicas = strategy.shard, strategy.replicate * strategy.context
    if shards == 1:
        both = [*blocks, *others]
        return sum_bytes(both, strategy, reduce_bytes) if replicas > 1 else StepBytes()
    inside = sum(_padded_elements(shape, shards) for shape in blocks)
    outside = sum(_padded_elements(shape, shards) for shape in others)
    whole = inside + outside
    staged = strategy.pipeline > 1
    times = 1 if staged else micro_batches
    gathers = 2 if strategy.reshard_after_forward and not staged else 1
    return StepBytes(
        all_reduce=whole * reduce_bytes // shards if replicas > 1 else 0,
        all_gather=times * (gathers * inside + outside) * compute_bytes,
        reduce_scatter=times * whole * reduce_bytes,
    )


def sum_bytes(shapes: Iterable[Shape], strategy: StrategyConfig, reduce_bytes: int) -> StepBytes:
    """Return what one sum of whole gradients of these shapes over their copies moves.

    An all-reduce. With reduce=int8 an all-to-all and an all-gather of one byte per number and of a
    scale per block, each rank's part padded to whole blocks. With reduce=powersgd all-reduces of
    both factors of a matrix, and of all other gradients as they are (arXiv 1905.13727, section 3).
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

    `flows` are the bytes that flow into each stage and those of the gradients that come back
    (GPipe, arXiv 1811.06965, section 2.2), `placement` is the rank of each. Stages on one rank
    send nothing.
    """
    sent = 0
    for stage, (before, after) in enumerate(pairwise(placement), 1):
        if before != after:
            sent += flows[stage][0] * (rank == before) + flows[stage][1] * (rank == after)
    return StepBytes(send=sent)


@dataclass(frozen=True)
class ShardedSequence:
    """A sequence that flows through layers split over the tensor axis, of one micro-batch."""

    samples: int
    length: int
    branches: int  # residual branches: a norm, a split layer, a sum
    starts: int = 1  # sums without a norm before: token embeddings
    ends: int = 1  # norms without a sum behind: before the output, or the encoder's last
    backwards: int = 1  # 2 where gradients of inputs and of weights are computed apart


def tensor_bytes(
    sequences: Iterable[ShardedSequence], width: int, strategy: StrategyConfig, compute_bytes: int
) -> StepBytes:
    """Return what split layers move for activations and their gradients, forward and backward.

    Whole sequences on every rank: Megatron-LM's f and g, an all-reduce per branch in each direction
    (arXiv 1909.08053, figure 4). Sequence parallelism: an all-gather and a reduce-scatter in its
    place, and one all-gather more in the backward (arXiv 2205.05198, section 4.2). Where a pipeline
    splits the backward it is one more in either half, as autograd asks for what it has kept of a
    layer in both.
    """
    total = StepBytes()
    for sequence in sequences:
        once = sequence.starts + sequence.ends
        if not strategy.sequence_parallel:
            moved = sequence.samples * sequence.length * width * compute_bytes
            total += StepBytes(all_reduce=(2 * sequence.branches + once) * moved)
            continue
        padded = math.ceil(sequence.length / strategy.tensor) * strategy.tensor
        moved = sequence.samples * padded * width * compute_bytes
        total += StepBytes(
            all_gather=((2 + sequence.backwards) * sequence.branches + once) * moved,
            reduce_scatter=(2 * sequence.branches + once) * moved,
        )
    return total


def context_bytes(
    method: str, query_BHSK: Shape, key_BGTK: Shape, degree: int, compute_bytes: int
) -> StepBytes:
    """Return the bytes of one context-parallel attention, forward and backward.

    Gathering: keys and values all-gathered, their gradients reduce-scattered (arXiv 2407.21783,
    section 3.3.2). Ring: both sent n-1 times in each direction, and their gradients n times, the
    last time home (arXiv 2310.01889). Ulysses: queries, results, keys and values change sides once
    in each direction, key/value heads repeated until the ranks divide them (arXiv 2309.14509).
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
    """All-reduces of a vocabulary-parallel loss in float32: a maximum and three sums per target."""
    return 4 * (1 + 3) * targets


def _padded_elements(shape: Shape, shards: int) -> int:
    """Elements of a parameter whose rows (dim 0) are padded to a multiple of the ranks."""
    return math.ceil(shape[0] / shards) * shards * math.prod(shape[1:])


def ring_bytes(all_reduce: int, others: int, ranks: int) -> float:
    """Bytes that a ring algorithm puts on each rank's wire for such collectives over `ranks`."""
    return (2 * all_reduce + others) * (ranks - 1) / ranks
