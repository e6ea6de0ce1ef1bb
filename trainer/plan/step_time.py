"""The time of a step: one pass over a layer, then maxima where things overlap, then the schedule.

Sizes, rates and a few fitted numbers go in (docs/planning.md). The terms add up: communication that
computation hides counts with the share by which it slows that down.
"""

from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from parallel.comm_volume.closed_form import StepBytes
from parallel.pipeline.partition import balance_stages, stage_blocks
from parallel.pipeline.schedules import SCHEDULES, bubble_formula, rank_of_stage
from parallel.pipeline.simulator import Action, Lists, simulate_schedule
from parallel.strategy import StrategyConfig
from trainer.plan.block_time import Pass, block_passes, logit_passes
from trainer.plan.collective_time import Ring, axis_ring, ring_seconds, send_seconds, weight_bytes
from trainer.plan.constants import Constants
from trainer.plan.layout import Layout, strategy_of
from trainer.plan.machine import Machine
from trainer.plan.work import Work

T = TypeVar("T")


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step on its slowest rank; of collectives what they add to the computation."""

    products: float = 0.0
    attention: float = 0.0
    pointwise: float = 0.0
    tensor: float = 0.0
    context: float = 0.0
    data: float = 0.0  # weights gathered, gradients summed
    sends: float = 0.0  # between pipeline ranks
    optimizer: float = 0.0
    bubble: float = 0.0
    host: float = 0.0  # of CPUs, beside their kernels

    @property
    def total(self) -> float:
        """Return the seconds of the step."""
        computed = self.products + self.attention + self.pointwise
        return computed + self.exposed + self.optimizer + self.bubble + self.host

    @property
    def exposed(self) -> float:
        """Return the seconds of communication that are shown."""
        return self.tensor + self.context + self.data + self.sends

    def terms(self) -> dict[str, float]:
        """Return the seconds of each term."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True)
class RankBlocks:
    """Blocks of a pipeline rank by kind, and whether it has the head."""

    counts: tuple[tuple[int, int], ...]  # first block of that kind, and their number
    head: bool


@dataclass(frozen=True)
class RankTime:
    """One micro-batch through all stages of a pipeline rank."""

    forward: Pass
    backward: Pass
    data: float  # of its weights and gradients, shown

    @property
    def total(self) -> float:
        """Return the seconds of the micro-batch."""
        return self.forward.total + self.backward.total + self.data


class TimeModel:
    """Times of one job's layouts on one machine; keeps what several layouts share."""

    def __init__(
        self, work: Work, machine: Machine, constants: Constants, strategy: StrategyConfig
    ):
        self.work, self.machine, self.constants = work, machine, constants
        self.strategy = strategy  # what layouts leave of it is the same for all
        self._kept: dict[Hashable, Any] = {}
        first = {block: number for number, block in reversed(list(enumerate(work.blocks)))}
        self._kinds = [first[block] for block in work.blocks]

    def step(self, layout: Layout, lists: Lists | None = None) -> StepTime:
        """Return the time of a step; its bubble by a formula, or of a schedule's lists."""
        parts = self.pipeline_ranks(layout)
        times = {part: self.rank_time(layout, part) for part in set(parts)}
        slowest = max(times.values(), key=lambda time: time.total)
        count = self.work.samples // (layout.data_ranks * layout.micro_batch)
        busy = slowest.forward.plus(slowest.backward)
        return StepTime(
            products=count * busy.products,
            attention=count * busy.attention,
            pointwise=count * busy.pointwise,
            tensor=count * busy.tensor,
            context=count * busy.context,
            data=count * slowest.data + self._sums(layout, slowest),
            sends=self._sends(layout, count),
            optimizer=self._update(layout),
            host=self._host(layout, count),
            bubble=self._bubble(layout, count, [times[part] for part in parts], lists),
        )

    def mfu(self, seconds: float, ranks: int) -> float:
        """Return the model FLOPs utilisation of a step of these seconds."""
        return self.work.flops * self.work.samples / (seconds * ranks * self.machine.products)

    def _keep(self, key: Hashable, compute: Callable[[], T]) -> T:
        if key not in self._kept:
            self._kept[key] = compute()
        found: T = self._kept[key]
        return found

    def pipeline_ranks(self, layout: Layout) -> list[RankBlocks]:
        """Return what each pipeline rank has."""
        p, v = layout.pipeline, layout.stages_per_rank
        turned = p > 1 and rank_of_stage(layout.schedule, p, p) > 0  # a V, not a loop
        return self._keep(("cut", p, v, turned), lambda: self._cut(layout))

    def _cut(self, layout: Layout) -> list[RankBlocks]:
        p, stages = layout.pipeline, layout.pipeline * layout.stages_per_rank
        blocks, firsts = len(self.work.blocks), list(self.strategy.split)
        if len(firsts) != stages - 1:
            firsts = balance_stages(self.work.costs, stages)
        own: list[Counter[int]] = [Counter() for _ in range(p)]
        heads = [False] * p
        for stage, names in enumerate(stage_blocks(blocks, firsts)):
            rank = rank_of_stage(layout.schedule, stage, p) if p > 1 else 0
            own[rank].update(self._kinds[int(name)] for name in names)
            heads[rank] |= str(blocks - 1) in names
        counts = (tuple(sorted(found.items())) for found in own)
        return [RankBlocks(c, head) for c, head in zip(counts, heads, strict=True)]

    def rank_time(self, layout: Layout, part: RankBlocks) -> RankTime:
        """Return one micro-batch through what a pipeline rank has."""
        forward, backward, data = Pass(), Pass(), 0.0
        for number, count in part.counts:
            ahead, behind = self._block(layout, number)
            forward, backward = forward.plus(ahead, count), backward.plus(behind, count)
            weights = self.work.blocks[number].weights
            data += count * self._shown(layout, weights, ahead.total, behind.total)
        if part.head:
            ahead, behind = self._logits(layout)
            forward, backward = forward.plus(ahead), backward.plus(behind)
            outer = self.work.outer_weights
            data += self._shown(layout, outer, ahead.total, behind.total)
        return RankTime(forward, backward, data)

    def _strategy(self, layout: Layout) -> StrategyConfig:
        key = ("strategy", layout._replace(micro_batch=1, recomputed="none", chunks=1))
        return self._keep(key, lambda: strategy_of(layout, self.strategy))

    def _block(self, layout: Layout, number: int) -> tuple[Pass, Pass]:
        """Return the forward and the backward of a block."""
        splits = layout.pipeline > 1 and SCHEDULES[layout.schedule].splits_backward
        schedule = "zero_bubble" if splits else "gpipe"
        same = Layout(
            1,
            1,
            1,
            layout.context,
            layout.tensor,
            layout.context_method,
            schedule,
            1,
            layout.micro_batch,
            layout.recomputed,
        )

        def compute() -> tuple[Pass, Pass]:
            block, strategy = self.work.blocks[number], strategy_of(same, self.strategy)
            return block_passes(block, same, strategy, self.work, self.machine, self.constants)

        return self._keep(("block", number, same), compute)

    def _logits(self, layout: Layout) -> tuple[Pass, Pass]:
        key = ("logits", layout.micro_batch, layout.tensor, layout.context, layout.chunks)
        return self._keep(
            key, lambda: logit_passes(layout, self.work, self.machine, self.constants)
        )

    def _weights(self, layout: Layout, elements: int) -> tuple[float, float]:
        """Return the seconds of one gather of sharded weights, and of one sum of gradients."""

        def compute() -> tuple[float, float]:
            work, strategy = self.work, self._strategy(layout)
            local, share = elements // layout.tensor, work.learned_share
            moved = weight_bytes(local, strategy, work.compute_bytes, work.sum_bytes)
            gathers = 2 if strategy.reshard_after_forward and layout.pipeline == 1 else 1
            ring = axis_ring(layout, "shard", self.machine.linked)
            once = StepBytes(all_gather=moved.all_gather // gathers)
            scattered = StepBytes(reduce_scatter=int(share * moved.reduce_scatter))
            gather = ring_seconds(once, ring, self.machine, self.constants)
            return gather, ring_seconds(scattered, ring, self.machine, self.constants)

        key = ("weights", layout.shard, layout.tensor, layout.context, layout.pipeline > 1)
        return self._keep((*key, elements), compute)

    def _shown(self, layout: Layout, elements: int, ahead: float, behind: float) -> float:
        """Return the seconds that a block's weights and gradients add to its two passes."""
        stack = self.work.stack
        if layout.shard == 1 or not stack.shards_gradients:
            return 0.0
        gather, scatter = self._weights(layout, elements)
        if layout.pipeline > 1:  # once in a step, see `_sums`
            return self._added(behind, scatter) if stack.staged_scatter else 0.0
        gathers_again = self.strategy.reshard_after_forward and stack.gathers_again
        again = gather if gathers_again else 0.0
        groups = (2 + gathers_again) * self.constants.group_seconds
        return self._added(ahead, gather) + self._added(behind, again + scatter) + groups

    def _added(self, computed: float, moved: float) -> float:
        """Return the seconds that communication adds to the computation beside it."""
        hidden = min(computed, moved)
        constants, sharded = self.constants, self.work.stack.per_parameter
        share = constants.overlap_sharded if sharded else constants.overlap
        return max(0.0, moved - computed) + share * hidden

    def _sums(self, layout: Layout, slowest: RankTime) -> float:
        """Return the shown seconds of what is gathered and summed once in a step."""
        work, strategy, stack = self.work, self._strategy(layout), self.work.stack
        elements, room = self._rank_weights(layout), slowest.backward.total
        if not stack.shards_gradients:
            return self._other_sums(layout, elements, slowest)
        shown = 0.0
        if layout.shard > 1 and layout.pipeline > 1 and not stack.staged_scatter:
            gather, scatter = self._weights(layout, elements * layout.tensor)
            shown = self._added(slowest.forward.total, gather) + self._added(room, scatter)
        ring = axis_ring(layout, "copies", self.machine.linked)
        if ring.ranks > 1:
            learned = int(elements * work.learned_share)
            moved = weight_bytes(learned, strategy, work.compute_bytes, work.sum_bytes)
            summed = StepBytes(all_reduce=moved.all_reduce)
            if layout.shard == 1:
                summed = moved
            shown += self._added(room, ring_seconds(summed, ring, self.machine, self.constants))
        return shown

    def _other_sums(self, layout: Layout, elements: int, slowest: RankTime) -> float:
        """Return those of stacks that shard the optimizer's states alone (ZeRO-1)."""
        work, machine, constants = self.work, self.machine, self.constants
        ring = owners = axis_ring(layout, "copies", machine.linked)
        moved = StepBytes(reduce_scatter=elements * work.sum_bytes)
        if 0 < work.stack.state_ranks < ring.ranks:  # all copies are summed, a few of them gather
            moved = StepBytes(all_reduce=elements * work.sum_bytes)
            owners = Ring(work.stack.state_ranks, min(work.stack.state_ranks, ring.near))
        summed = ring_seconds(moved, ring, machine, constants)
        weights = StepBytes(all_gather=elements * work.compute_bytes)
        gathered = ring_seconds(weights, owners, machine, constants)
        if not work.stack.hides_sum:
            return summed + gathered
        shown = self._added(slowest.backward.total, summed)
        return shown + self._added(slowest.forward.total, gathered)

    def _rank_weights(self, layout: Layout) -> int:
        """Return the weights of the fullest pipeline rank, split over the tensor axis."""

        def compute() -> int:
            ranks = self.pipeline_ranks(layout)
            blocks, outer = self.work.blocks, self.work.outer_weights
            held = [sum(n * blocks[kind].weights for kind, n in r.counts) for r in ranks]
            if layout.pipeline == 1:
                return held[0] + outer
            return max(max(held), *(h + outer // 2 for h in (held[0], held[-1])))

        key = ("held", layout.pipeline, layout.stages_per_rank, layout.schedule)
        return self._keep(key, compute) // layout.tensor

    def _update(self, layout: Layout) -> float:
        """Return the seconds of the optimizer."""
        held = self._rank_weights(layout) * self.work.learned_share / layout.shard
        rate = self.machine.memory_bandwidth * self.constants.optimizer
        return held * self.work.update_bytes / rate

    def _sends(self, layout: Layout, count: int) -> float:
        """Return the seconds of sends between pipeline ranks: half of them are hidden on a GPU."""
        if layout.pipeline == 1:
            return 0.0
        block = self.work.blocks[-1]
        shared = layout.tensor if self.strategy.sequence_parallel else 1
        tokens = layout.micro_batch * block.length / layout.context
        size = self.work.compute_bytes * tokens * self.work.width / shared
        one = send_seconds(layout, size, self.machine, self.constants)
        shown = 0.5 + 0.5 * self.constants.host_bound
        return shown * count * layout.stages_per_rank * 2 * one

    def _host(self, layout: Layout, count: int) -> float:
        """Return the seconds that a CPU spends on a step beside its kernels."""
        constants, seconds = self.constants, self.constants.step_seconds
        if layout.ranks > 1:
            seconds += constants.sync_seconds
        if layout.pipeline > 1:
            seconds += count * layout.stages_per_rank * 2 * constants.action_seconds
        if layout.shard == 1 and layout.replicate * layout.context > 1:
            seconds += constants.group_seconds
        return seconds

    def _bubble(
        self, layout: Layout, count: int, ranks: list[RankTime], lists: Lists | None
    ) -> float:
        """Return the idle seconds of the slowest rank."""
        if layout.pipeline == 1:
            return 0.0
        p, v, schedule = layout.pipeline, layout.stages_per_rank, layout.schedule
        if lists is None:
            share = bubble_formula(schedule, p, count, v)
            return share / (1 - share) * count * sum(rank.total for rank in ranks) / p
        spans = simulate_schedule(lists, lambda action: _action_cost(action, ranks, v, schedule))
        whole = max(span.end for span in spans) - min(span.start for span in spans)
        return max(0.0, whole - count * max(rank.total for rank in ranks))


def _action_cost(action: Action, ranks: list[RankTime], v: int, schedule: str) -> float:
    """Return the seconds of an action: an equal part of its rank's stages."""
    rank = ranks[rank_of_stage(schedule, action.stage, len(ranks))]
    if action.kind == "F":
        return rank.forward.total / v
    behind = (rank.backward.total + rank.data) / v
    return behind if action.kind == "B" else behind / 2
