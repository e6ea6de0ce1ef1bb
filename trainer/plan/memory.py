"""Closed forms of the memory of a step, for each pipeline rank of any layout; free of torch.

For ranking: everything is arithmetic on numbers that are worked out once per block, tensor degree
and micro-batch. `trace.py` is the truth that they are held against. What they leave out: operators'
workspaces, transports' buffers, fragmentation (the reserve of a card).
"""

from dataclasses import dataclass
from itertools import compress

from parallel.strategy import StrategyConfig
from trainer.config.train import TrainConfig
from trainer.plan import parameters as count
from trainer.plan.model_numbers import ModelNumbers
from trainer.plan.numbers import RankNumbers, StageNumbers
from trainer.plan.parameters import Parameters
from trainer.plan.rank_plan import ONE_STAGE, Held, Layout, Moment, RankPlan, sequences_of

Terms = tuple[float, float, float, float, float, float]  # MemoryTerms without streams


@dataclass(frozen=True)
class MemoryTerms:
    """Bytes of one pipeline rank at the peak of its step, by what they are for."""

    weights: float
    gradients: float
    moments: float
    gathered: float  # weights and gradients that FSDP has brought together
    activations: float
    logits: float
    streams: float = 0.0  # what FSDP's streams hold at other moments; not in the total

    @property
    def total(self) -> float:
        """Return the bytes at the peak."""
        return (
            self.weights
            + self.gradients
            + self.moments
            + self.gathered
            + self.activations
            + self.logits
        )


class MemoryModel(ModelNumbers):
    """The closed forms of one model's training: `terms` of any layout of it."""

    @classmethod
    def of(cls, config: TrainConfig, device: str = "cuda") -> "MemoryModel":
        """Return the closed forms of a complete configuration's model."""
        source, target = sequences_of(config)
        return cls(
            config.model,
            source,
            target,
            precision={"auto": "bf16" if device == "cuda" else "fp32"}.get(
                config.precision, config.precision
            ),
            optimizer=config.optim.name,
            lora=config.lora,
            compress=config.compress,
            chunks=config.loss.chunks,
            fused_norm=device == "cuda",
        )

    def terms(
        self,
        strategy: StrategyConfig,
        micro_batch: int,
        micro_batches: int,
        activation_checkpointing: str = "none",
        held: tuple[Held, ...] = ONE_STAGE,
    ) -> list[MemoryTerms]:
        """Return the terms of each pipeline rank of a resolved strategy, in order.

        `held` is what the schedule holds on each of them (in_flight.py).
        """
        cut = (
            strategy.pipeline,
            strategy.schedule,
            strategy.schedule_csv,
            strategy.stages_per_rank,
            tuple(strategy.split),
            held,
        )
        split = (
            strategy.tensor,
            strategy.sequence_parallel,
            strategy.context,
            strategy.context_method,
            micro_batch,
        )
        layout = Layout.of(strategy, self._lora, self._parameter_bytes, self._compute_bytes)
        each = self._numbers(*split)
        loss, inputs = (each.loss.peak, each.loss.in_turn), micro_batches * each.inputs
        found = []
        ranks = self._ranks(cut, split, activation_checkpointing, layout.copies, layout.sharded)
        for plan, numbers in ranks:
            state = self._state_bytes(numbers.own, layout, strategy)
            found.append(
                self._rank_terms(plan, numbers, loss, inputs, layout, state, micro_batches)
            )
        return found

    def _rank_terms(
        self,
        plan: RankPlan,
        numbers: RankNumbers,
        loss: tuple[float, float],
        inputs: float,
        layout: Layout,
        state: tuple[float, float],
        micro_batches: int,
    ) -> MemoryTerms:
        """Return the terms of the moment in which a rank needs the most.

        `loss` are the bytes of the loss, alone and where the latest logits are still held;
        `inputs` those of all micro-batches.
        """
        found, in_turn = list[Terms](), plan.held.in_turn
        output = numbers.stages[-1].block.bytes.output
        for moment in plan.held.moments:
            learned = moment.learned if layout.staged else (micro_batches > 1,)
            held = inputs + output * (in_turn + moment.sent * (not self._fused_norm))
            held += _held_bytes(moment, numbers)
            stage, is_first = numbers.stages[moment.at], not learned[moment.at]
            own = sum(compress((each.parameters.learned for each in numbers.stages), learned))
            own = min(own, numbers.own.learned)  # what stages share counts once
            gradients, gathered = self._gradient_bytes(numbers.own, own, layout, micro_batches)
            rest = state[0], gradients, state[1]
            if stage.has_head:
                at_loss = gathered + self._gathered_at_loss(numbers, layout)
                found.append((*rest, at_loss, held, loss[in_turn]))
            if layout.sharded and not layout.staged:
                found += self._at_sharded_blocks(rest, numbers, held - stage.done, layout)
                continue
            fresh = is_first and not layout.buckets
            found += self._at_blocks(rest, gathered, stage, held, fresh, moment.splits)
        fullest = max(found, key=sum)
        streams = self._stream_bytes(numbers, layout, fullest[1]) if layout.sharded else 0.0
        return MemoryTerms(*fullest, streams)

    def _stream_bytes(self, numbers: RankNumbers, layout: Layout, present: float) -> float:
        """Return what FSDP's streams keep of memory that other streams cannot use.

        CUDA's allocator lends no block to another stream. Sharded gradients are allocated in the
        stream that sums them, and what is gathered, before it is split, in that which gathers.
        """
        if not self._fused_norm:
            return 0.0
        gradients = self._parameter_bytes * numbers.own.learned / layout.share
        following = 2 * max(stage.block.parameters.total for stage in numbers.stages)
        gathered = self._compute_bytes * max(numbers.ends.total, following)
        return max(0.0, gradients - present) + gathered

    def _at_blocks(
        self,
        state: tuple[float, float, float],
        gathered: float,
        stage: StageNumbers,
        held: float,
        fresh: bool,
        splits: bool,
    ) -> list[Terms]:
        """Return the terms in the backward of a stage's last block, and of its first.

        `fresh`: its weights get their first gradients; `splits`: only its inputs get theirs.
        """
        weights, gradients, moments = state
        work, behind = held + stage.work[fresh], stage.blocks - 1
        if splits:  # all is kept for the weights' gradients, which come later
            ended = held + stage.late + stage.waiting + stage.block.bytes.ends
            return [(*state, gathered, max(work, ended), 0.0)]
        work -= stage.done
        p, block = self._parameter_bytes, stage.block.parameters.learned
        ends, all_but_one = fresh * p * stage.ends, fresh * p * (stage.ends + behind * block)
        left = work - behind * stage.one
        if gathered:  # with FSDP they stay whole
            return [
                (*state, gathered + ends, work, 0.0),
                (*state, gathered + all_but_one, left, 0.0),
            ]
        return [
            (weights, gradients + ends, moments, 0.0, work, 0.0),
            (weights, gradients + all_but_one, moments, 0.0, left, 0.0),
        ]

    def _at_sharded_blocks(
        self,
        state: tuple[float, float, float],
        numbers: RankNumbers,
        held: float,
        layout: Layout,
    ) -> list[Terms]:
        """Return the terms at the start of a block's backward under FSDP, and at its end."""
        (stage,) = numbers.stages
        c, block, work = self._compute_bytes, stage.block.parameters, stage.work[False]
        # This block's weights and the next one's, which one rank alone does not gather ahead; and
        # the gradients of the head.
        whole = (1 + (layout.share > 1)) * block.total if layout.frees else numbers.blocks.total
        root = c * (numbers.ends.total + whole + numbers.ends.largest)
        # Behind the last block, the gradients of the one before are still on their way.
        sent = layout.reduce_bytes * block.learned
        # Its weights are freed in front of its own sum, and its gradients behind their copy.
        copied = max(c * block.learned, 0.0 if self._fused_norm else sent)  # gloo's copy
        summed = sent + copied + self._parameter_bytes / layout.share * block.learned
        left, freed = held - stage.one, c * block.total
        return [
            (*state, root, held + work, 0.0),
            (*state, root + sent - freed * (not layout.frees), left + work, 0.0),
            (*state, root + summed - freed, left + stage.block.bytes.output, 0.0),
        ]

    def _gathered_at_loss(self, numbers: RankNumbers, layout: Layout) -> float:
        """Return what FSDP has gathered when the loss is computed, without a pipeline."""
        if not layout.sharded or layout.staged:
            return 0.0
        kept = 0 if layout.frees else numbers.blocks.total
        return self._compute_bytes * (numbers.ends.total + kept)

    def _gradient_bytes(
        self, own: Parameters, learned: int, layout: Layout, micro_batches: int
    ) -> tuple[float, float]:
        """Return the bytes of gradients at rest, and of what FSDP keeps gathered in a pipeline.

        `learned` parameters have gradients already.
        """
        p = self._parameter_bytes
        if layout.sharded and layout.staged:  # gradients stay whole until the step's end
            reduce = max(layout.reduce_bytes, p) * learned
            return 0.0, self._compute_bytes * own.total + reduce
        if layout.buckets:  # DDP's, and what accumulates beside them
            return p * own.learned * (1 + (micro_batches > 1)), 0.0
        return p * learned / layout.share, 0.0

    def _state_bytes(
        self, own: Parameters, layout: Layout, strategy: StrategyConfig
    ) -> tuple[float, float]:
        """Return the bytes of weights and of moments."""
        p, c, width = self._parameter_bytes, self._compute_bytes, self.model.width
        frozen: float = p * own.frozen
        if own.frozen and not layout.sharded and strategy.tensor == 1:
            frozen = c * own.frozen  # they stay in the dtype that they are computed in
        if own.frozen and not layout.sharded and self._compress.bits:
            frozen = count.packed_bytes(own, self._compress, width)
        moments = count.moment_bytes(own, self._optimizer, p, width) / layout.share
        if strategy.reduce == "int8":
            moments += p * own.learned * (1 + 1 / strategy.replicate)
        if strategy.reduce == "powersgd":
            moments += p * own.learned
        return (p * own.learned + frozen) / layout.share, moments


def _held_bytes(moment: Moment, numbers: RankNumbers) -> float:
    """Return what the micro-batches in flight keep; of the one at work without its logits."""
    held, at = 0.0, numbers.stages[moment.at]
    for flying, waiting, stage in zip(moment.flying, moment.waiting, numbers.stages, strict=True):
        held += flying * stage.kept + waiting * stage.waiting
        held += max(0, flying - (stage is at)) * stage.late
    return held
