"""Seconds of one forward and one backward of a block, and of the logits."""

from typing import NamedTuple

from parallel.pipeline.schedules import SCHEDULES
from parallel.strategy import StrategyConfig
from trainer.plan.collective_time import (
    axis_ring,
    block_context_bytes,
    block_tensor_bytes,
    ring_seconds,
)
from trainer.plan.constants import Constants
from trainer.plan.layout import Layout
from trainer.plan.machine import Machine
from trainer.plan.work import BlockWork, Work

LOGIT_BYTES = 12  # of memory for each logit: in 16 bits, and float32 copies of the loss
CONTEXT_COLLECTIVES = 4  # of a block, about
SCORE_BYTES = 5  # of memory for each score of attention that is not fused
CONTEXT_SHOWN = {"all_gather": 0.5, "ring": 0.3, "ulysses": 1.0}  # share that nothing hides
HEAD_OPERATORS = 60  # of embedding, logits and loss; a view counts half
TILE = 64  # rows of a product that a kernel does at once


class Pass(NamedTuple):
    """Seconds of one pass, forward or backward; collectives as far as they are shown."""

    products: float = 0.0
    attention: float = 0.0
    pointwise: float = 0.0
    tensor: float = 0.0
    context: float = 0.0

    @property
    def total(self) -> float:
        """Return the seconds of the pass."""
        return sum(self)

    def plus(self, other: "Pass", times: float = 1.0) -> "Pass":
        """Return the pass followed by another one, so many times."""
        return Pass(*(a + times * b for a, b in zip(self, other, strict=True)))


def block_passes(
    block: BlockWork,
    layout: Layout,
    strategy: StrategyConfig,
    work: Work,
    machine: Machine,
    constants: Constants,
) -> tuple[Pass, Pass]:
    """Return the forward and the backward of a block for one micro-batch, recomputation included.

    `strategy` is that of the layout.
    """
    products = _product_seconds(block, layout, work, machine, constants)
    ahead, behind = _attention_seconds(block, layout, work, machine, constants)
    moved = _moved_bytes(block, layout, strategy, work)
    passes = constants.pointwise * (constants.fused if work.stack.fused_pointwise else 1.0)
    moved = passes * moved + constants.traffic * _eager_bytes(block, layout, strategy, work)
    pointwise = moved / machine.memory_bandwidth + constants.operator_seconds * block.operators
    tensor = _tensor_seconds(block, layout, strategy, work, machine, constants)
    context = _context_seconds(block, layout, strategy, work, machine, constants)
    forward = Pass(products, ahead, pointwise / 3, tensor[0], context / 3)
    learned = 1 + (work.learned_share == 1)  # frozen weights have no gradient
    backward = Pass(learned * products, behind, pointwise * 2 / 3, tensor[1], context * 2 / 3)
    forward = _at_least(forward, constants.launch_seconds)
    backward = _at_least(backward, 2 * constants.launch_seconds)
    again = forward
    if work.stack.stops_early:  # nothing of the backward reads the output of the last product
        last = block.ffn_width * block.width * block.length / block.products
        summed = 3 / 4 if strategy.sequence_parallel else 1 / 2
        again = forward._replace(
            products=(1 - last) * forward.products, tensor=summed * forward.tensor
        )
    return forward, _with_recomputation(backward, again, layout.recomputed)


def _at_least(one: Pass, seconds: float) -> Pass:
    """Return a pass that takes at least as long as its kernels take to be launched."""
    spent = one.products + one.attention + one.pointwise
    return one._replace(pointwise=one.pointwise + max(0.0, seconds - spent))


def _with_recomputation(backward: Pass, forward: Pass, mode: str) -> Pass:
    """Return a backward with what its mode of activation checkpointing computes again.

    Modes of other stacks: `attention` (its core), `every_second` (block), `half` (every second
    product, and what is between them).
    """
    if mode == "block":
        return backward.plus(forward)
    if mode == "every_second":
        return backward.plus(forward, 0.5)
    if mode == "attention":
        return backward.plus(Pass(attention=forward.attention))
    if mode in ("selective", "half"):
        products = forward.products / 2 if mode == "half" else 0.0
        return backward.plus(Pass(products=products, pointwise=forward.pointwise))
    return backward


def product_rate(
    block: BlockWork, layout: Layout, work: Work, machine: Machine, constants: Constants
) -> float:
    """Return the FLOP/s of a block's products of 16 bits: less of few tokens and narrow weights."""
    tokens = layout.micro_batch * block.length / layout.context
    tensor, attention = layout.tensor, block.heads * block.head_width
    narrow = min(block.width, block.ffn_width / tensor, attention / tensor)
    peak = machine.attention * constants.rates(machine.generation)[0]
    odd = block.width % (2 * TILE) or block.width / tensor % TILE
    share = tokens / (tokens + constants.half_tokens) * narrow / (narrow + constants.half_width)
    return peak * share * (constants.odd_width if odd else 1.0)


def _product_seconds(
    block: BlockWork, layout: Layout, work: Work, machine: Machine, constants: Constants
) -> float:
    rate = product_rate(block, layout, work, machine, constants)
    faster = constants.float8 if work.stack.float8 else 1.0
    flops = 2 * block.products * layout.micro_batch / (layout.context * layout.tensor)
    return flops / (rate * faster)


def _attention_seconds(
    block: BlockWork, layout: Layout, work: Work, machine: Machine, constants: Constants
) -> tuple[float, float]:
    """Return the seconds of attention's forward and backward."""
    share, stack = constants.rates(machine.generation)[1], work.stack
    if not stack.fused_attention:
        share = constants.attention_unfused
    elif stack.cudnn_attention and machine.generation == "hopper":
        share *= constants.attention_cudnn
    flops = 2 * block.scores * layout.micro_batch / (layout.context * layout.tensor)
    seconds = flops / (machine.attention * share) * (1 + constants.half_length / block.length)
    # Fused kernels compute the scores again: five products instead of two.
    times = 2.5 if stack.fused_attention else 2.0
    return seconds, times * seconds / constants.attention_backward


def _moved_bytes(block: BlockWork, layout: Layout, strategy: StrategyConfig, work: Work) -> float:
    """Return the bytes that a block's forward keeps, which stand for its memory traffic."""
    tokens = layout.micro_batch * block.length / layout.context
    tensor = layout.tensor
    shared = tensor if strategy.sequence_parallel else 1
    heads = 2 * block.heads + 2 * max(block.kv_heads, tensor)
    inner = (4 if block.gated else 2) * block.ffn_width
    kept = 2 * block.branches * block.width / shared
    kept += (heads * block.head_width * (block.branches - 1) + inner) / tensor
    if not work.stack.fused_attention:
        kept += SCORE_BYTES / work.compute_bytes * block.length * block.heads / tensor
    return work.compute_bytes * tokens * kept


def _eager_bytes(block: BlockWork, layout: Layout, strategy: StrategyConfig, work: Work) -> float:
    """Return the bytes that a block's operators move that are not fused, forward and backward."""
    tokens = layout.micro_batch * block.length / layout.context
    shared = layout.tensor if strategy.sequence_parallel else 1
    entries = block.whole_traffic / shared + block.split_traffic / layout.tensor
    return work.compute_bytes * tokens * entries


def _tensor_seconds(
    block: BlockWork,
    layout: Layout,
    strategy: StrategyConfig,
    work: Work,
    machine: Machine,
    constants: Constants,
) -> tuple[float, float]:
    """Return the seconds of split layers' collectives that are shown, forward and backward."""
    if layout.tensor == 1:
        return 0.0, 0.0
    backwards = 2 if SCHEDULES[layout.schedule].splits_backward else 1
    moved = block_tensor_bytes(block, strategy, layout.micro_batch, work.compute_bytes, backwards)
    # Collectives of a branch in either direction.
    directions = (2, 2 + backwards) if strategy.sequence_parallel else (1, 1)
    ring = axis_ring(layout, "tensor", machine.linked)
    times = block.branches * sum(directions)
    seconds = ring_seconds(moved, ring, machine, constants, times)
    hidden = constants.tensor_hidden if work.stack.hides_tensor else 0.0
    seconds += times * constants.collective_seconds
    shown = (1 - hidden) * seconds / sum(directions)
    return directions[0] * shown, directions[1] * shown


def _context_seconds(
    block: BlockWork,
    layout: Layout,
    strategy: StrategyConfig,
    work: Work,
    machine: Machine,
    constants: Constants,
) -> float:
    """Return the seconds of a shared sequence's collectives that are shown."""
    if layout.context == 1:
        return 0.0
    moved = block_context_bytes(block, strategy, layout.micro_batch, work.compute_bytes)
    ring = axis_ring(layout, "context", machine.linked)
    seconds = ring_seconds(moved, ring, machine, constants, CONTEXT_COLLECTIVES)
    seconds += CONTEXT_COLLECTIVES * constants.collective_seconds
    shown = CONTEXT_SHOWN[layout.context_method]
    return (shown + (1 - shown) * constants.host_bound) * seconds


def logit_passes(
    layout: Layout, work: Work, machine: Machine, constants: Constants
) -> tuple[Pass, Pass]:
    """Return the forward and the backward of the logits and their loss for one micro-batch."""
    split = layout.context * layout.tensor
    rate = product_rate(work.blocks[-1], layout, work, machine, constants)
    products = 2 * work.head * layout.micro_batch / split / rate
    traffic = constants.pointwise * LOGIT_BYTES * work.logits * layout.micro_batch / split / 3
    if work.stack.fused_pointwise:
        traffic *= constants.fused
    entries = work.logit_traffic * work.logits * layout.micro_batch / split
    traffic += constants.traffic * work.compute_bytes * entries
    pointwise = traffic / machine.memory_bandwidth
    pointwise += constants.operator_seconds * HEAD_OPERATORS
    again = products if layout.chunks > 1 else 0.0  # each chunk's are made again
    forward = Pass(products=products, pointwise=pointwise / 3)
    return forward, Pass(products=2 * products + again, pointwise=pointwise * 2 / 3)
