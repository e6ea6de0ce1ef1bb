"""Seconds of a step's collectives: bytes from parallel/comm_volume, rings from the machine."""

import math
from dataclasses import dataclass

from parallel.comm_volume.closed_form import (
    ShardedSequence,
    StepBytes,
    context_bytes,
    ring_bytes,
    step_bytes,
    tensor_bytes,
)
from parallel.strategy import StrategyConfig
from trainer.plan.constants import Constants
from trainer.plan.layout import Layout
from trainer.plan.machine import Machine
from trainer.plan.work import BlockWork


@dataclass(frozen=True)
class Ring:
    """The ranks of a collective: how many, and how many of them the fast link joins."""

    ranks: int
    near: int


def axis_ring(layout: Layout, axis: str, linked: int) -> Ring:
    """Return the ring of an axis; `copies` is replicate × context, over which gradients are summed.

    Ranks count up along (pipeline, replicate, shard, context, tensor), the last fastest.
    """
    strides = {"tensor": 1, "context": layout.tensor, "shard": layout.tensor * layout.context}
    strides["replicate"] = strides["shard"] * layout.shard
    if axis != "copies":
        ranks = getattr(layout, axis)
        return Ring(ranks, _near(ranks, strides[axis], linked))
    near = _near(layout.context, strides["context"], linked)
    near *= _near(layout.replicate, strides["replicate"], linked)
    return Ring(layout.context * layout.replicate, near)


def _near(ranks: int, stride: int, linked: int) -> int:
    return max(1, min(ranks, linked // stride))


def ring_seconds(
    moved: StepBytes, ring: Ring, machine: Machine, constants: Constants, collectives: int = 1
) -> float:
    """Return the time of so many collectives over a ring, which move these bytes together.

    A ring across hosts has the network of its ranks in one host, but no more than the link.
    """
    sent = sent_bytes(moved, ring.ranks)
    if ring.ranks == 1 or not sent:
        return 0.0
    bandwidth = machine.link * constants.link
    if ring.near < ring.ranks:
        bandwidth = min(bandwidth, ring.near * machine.network * constants.network)
    return sent / bandwidth + collectives * constants.latency_seconds * math.log2(ring.ranks)


def sent_bytes(moved: StepBytes, ranks: int) -> float:
    """Return the bytes that a rank sends."""
    others = moved.all_gather + moved.reduce_scatter + moved.all_to_all
    return ring_bytes(moved.all_reduce, others, ranks) + moved.send


def send_seconds(layout: Layout, size: float, machine: Machine, constants: Constants) -> float:
    """Return the time of one send to the next pipeline rank."""
    if layout.ranks <= machine.linked:
        return size / (machine.link * constants.link)
    return size / (machine.network * constants.network)


def block_tensor_bytes(
    block: BlockWork, strategy: StrategyConfig, samples: int, compute_bytes: int, backwards: int
) -> StepBytes:
    """Return the bytes of one block's split layers, forward and backward."""
    length = block.length // strategy.context
    sequence = ShardedSequence(samples, length, block.branches, 0, 0, backwards)
    return tensor_bytes([sequence], block.width, strategy, compute_bytes)


def block_context_bytes(
    block: BlockWork, strategy: StrategyConfig, samples: int, compute_bytes: int
) -> StepBytes:
    """Return the bytes of one block's attention over a shared sequence, forward and backward."""
    local = block.length // strategy.context
    heads = block.heads // strategy.tensor
    kv_heads = max(1, block.kv_heads // strategy.tensor)
    return context_bytes(
        strategy.context_method,
        (samples, heads, local, block.head_width),
        (samples, kv_heads, local, block.head_width),
        strategy.context,
        compute_bytes,
    )


def weight_bytes(
    elements: int, strategy: StrategyConfig, compute_bytes: int, sum_bytes: int
) -> StepBytes:
    """Return the bytes of the weights and gradients of a block in one micro-batch.

    What `step_bytes` gives a pipeline, once per step, is given here too.
    """
    return step_bytes([(elements,)], [], strategy, 1, compute_bytes, sum_bytes)
