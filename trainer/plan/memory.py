"""Closed forms of the memory of a step, for each pipeline rank of any layout; free of torch.

For ranking: everything is arithmetic on numbers that are worked out once per block, tensor degree
and micro-batch. `trace.py` is the truth that they are held against. What they leave out: operators'
workspaces, transports' buffers, fragmentation (the reserve of a card).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache, partial

from parallel.strategy import StrategyConfig
from trainer.config.train import (
    CompressConfig,
    LoraConfig,
    ModelConfig,
    TrainConfig,
    is_encoder_decoder,
)
from trainer.plan import parameters as count
from trainer.plan.block_memory import (
    LossBytes,
    Sequence,
    Setting,
    block_bytes,
    embedding_bytes,
    layer_extras,
    loss_bytes,
    shared_bytes,
)
from trainer.plan.numbers import Numbers, Part, RankNumbers
from trainer.plan.parameters import Parameters
from trainer.plan.rank_plan import (
    DECODER,
    ENCODER,
    LAST_ENCODER,
    ONE_STAGE,
    Held,
    Layout,
    RankPlan,
    Stage,
    rank_plans,
    sequences_of,
)

# Bytes of a weight at rest, and of what is computed with it.
PRECISION_BYTES = {"fp64": (8, 8), "fp32": (4, 4), "bf16": (4, 2), "fp16": (4, 2), "fp8": (4, 2)}


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


class MemoryModel:
    """The closed forms of one model's training: `terms` of any layout of it."""

    def __init__(
        self,
        model: ModelConfig,
        source: Sequence | None,
        target: Sequence | None,
        *,
        precision: str = "bf16",
        optimizer: str = "adamw",
        lora: LoraConfig | None = None,
        compress: CompressConfig | None = None,
        chunks: int = 1,
        fused_norm: bool = True,
    ):
        """`source` is the encoder's sequence, in vectors; `target` the decoder's."""
        self.model, self.source, self.target = model, source, target
        self._parameter_bytes, self._compute_bytes = PRECISION_BYTES[precision]
        self._optimizer, self._chunks, self._fused_norm = optimizer, chunks, fused_norm
        self._lora, self._compress = lora or LoraConfig(), compress or CompressConfig()
        self._numbers = cache(self._build_numbers)
        self._plans = cache(partial(rank_plans, model))
        self._ends = cache(self._build_ends)
        self._ranks = cache(self._build_rank)

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
        loss = self._numbers(*split).loss
        found = []
        for rank, plan in enumerate(self._plans(*cut)):
            numbers = self._ranks(cut, rank, split, activation_checkpointing, layout.copies)
            state = self._state_bytes(numbers.own, layout, strategy)
            found.append(self._rank_terms(plan, numbers, loss, layout, state, micro_batches))
        return found

    def _rank_terms(
        self,
        plan: RankPlan,
        numbers: RankNumbers,
        loss: LossBytes,
        layout: Layout,
        state: tuple[float, float],
        micro_batches: int,
    ) -> MemoryTerms:
        """Return the terms of the moment in which a rank needs the most."""
        own, found = numbers.own, []
        message = numbers.last.bytes.output if plan.held.in_turn else 0.0
        peak = loss.in_turn if plan.held.in_turn else loss.peak
        for moment, present in plan.moments(layout.staged, micro_batches):
            held = message + moment.sent * numbers.last.bytes.output * (not self._fused_norm)
            each = zip(numbers.kept, numbers.late, numbers.waiting, strict=True)
            for n, m, (kept, late, more) in zip(moment.flying, moment.waiting, each, strict=True):
                held += n * kept + max(0, n - 1) * late + m * more
            gradients, gathered = self._gradient_bytes(own, layout, present, micro_batches)
            rest = state[0], gradients, state[1]
            if numbers.has_head:
                at_loss = gathered + self._gathered_at_loss(numbers, layout)
                found.append(MemoryTerms(*rest, at_loss, held, peak))
            blocks = self._at_blocks(rest, gathered, numbers, held - numbers.done, layout)
            found += blocks
            if layout.staged and not present:
                found.append(self._second(blocks[0], numbers))
        fullest = max(found, key=_total)
        return replace(fullest, streams=self._stream_bytes(numbers, layout, fullest.gradients))

    def _stream_bytes(self, numbers: RankNumbers, layout: Layout, present: float) -> float:
        """Return what FSDP's streams keep of memory that other streams cannot use.

        CUDA's allocator lends no block to another stream. Sharded gradients are allocated in the
        stream that sums them, and what is gathered, before it is split, in that which gathers.
        """
        if not layout.sharded or not self._fused_norm:
            return 0.0
        gradients = self._parameter_bytes * numbers.own.learned / layout.share
        following = 2 * numbers.last.parameters.total
        gathered = self._compute_bytes * max(numbers.ends.total, following)
        return max(0.0, gradients - present) + gathered

    def _at_blocks(
        self,
        state: tuple[float, float, float],
        gathered: float,
        numbers: RankNumbers,
        held: float,
        layout: Layout,
    ) -> list[MemoryTerms]:
        """Return the terms at the start of a block's backward and, with FSDP, at its end."""
        c, block, last = self._compute_bytes, numbers.last.parameters, numbers.last.bytes
        if not layout.sharded or layout.staged:
            return [MemoryTerms(*state, gathered, held + numbers.work, 0.0)]
        # This block's weights and the next one's, and the gradients of the head.
        whole = 2 * block.total if layout.frees else numbers.blocks.total
        root = c * (numbers.ends.total + whole + numbers.ends.largest)
        # Behind the last block, the gradients of the one before are still on their way.
        sent = layout.reduce_bytes * block.learned
        # Its weights are freed in front of its own sum, and its gradients behind their copy.
        copied = max(c * block.learned, 0.0 if self._fused_norm else sent)  # gloo's copy
        summed = sent + copied + self._parameter_bytes / layout.share * block.learned
        summed -= c * block.total * layout.frees
        left = held - numbers.one
        return [
            MemoryTerms(*state, root, held + numbers.work, 0.0),
            MemoryTerms(*state, root + sent, left + numbers.work, 0.0),
            MemoryTerms(*state, root + summed, left + last.output, 0.0),
        ]

    def _second(self, first: MemoryTerms, numbers: RankNumbers) -> MemoryTerms:
        """Return the terms of the second block's backward, when the first has its gradients."""
        return replace(
            first,
            gradients=first.gradients + self._parameter_bytes * numbers.last.parameters.learned,
            activations=first.activations - numbers.one,
        )

    def _gathered_at_loss(self, numbers: RankNumbers, layout: Layout) -> float:
        """Return what FSDP has gathered when the loss is computed, without a pipeline."""
        if not layout.sharded or layout.staged:
            return 0.0
        kept = 0 if layout.frees else numbers.blocks.total
        return self._compute_bytes * (numbers.ends.total + kept)

    def _gradient_bytes(
        self, own: Parameters, layout: Layout, present: float, micro_batches: int
    ) -> tuple[float, float]:
        """Return the bytes of gradients at rest, and of what FSDP keeps gathered in a pipeline."""
        p = self._parameter_bytes
        if layout.sharded and layout.staged:  # gradients stay whole until the step's end
            reduce = max(layout.reduce_bytes, p) * own.learned * present
            return 0.0, self._compute_bytes * own.total + reduce
        if layout.buckets:  # DDP's, and what accumulates beside them
            return p * own.learned * (1 + (micro_batches > 1)), 0.0
        return p * own.learned / layout.share * present, 0.0

    def _build_rank(
        self, cut: tuple, rank: int, split: tuple, mode: str, copies: bool
    ) -> RankNumbers:
        """Return the numbers of a pipeline rank."""
        plan, numbers = self._plans(*cut)[rank], self._numbers(*split)
        parts, loss, stages = numbers.parts, numbers.loss, plan.stages
        last = max((parts[kind] for stage in stages for kind, _ in stage.blocks), key=_size)
        blocks, ends = self._rank_parameters(plan, parts, split[0])
        work = last.bytes.recomputed[mode] + last.bytes.backward
        if mode != "none":
            work += last.more + copies * last.copies
        return RankNumbers(
            tuple(self._stage_kept(stage, numbers, mode, copies) for stage in stages),
            tuple(loss.kept if stage.last else 0.0 for stage in stages),
            tuple(
                sum(number * parts[kind].bytes.gradients for kind, number in stage.blocks)
                + (loss.logits if stage.last else 0.0)
                for stage in stages
            ),
            blocks,
            ends,
            blocks + ends,
            plan.has_head,
            last,
            last.bytes.kept[mode],
            work,
            (loss.hidden + copies * numbers.head) if plan.has_head else 0.0,
        )

    def _stage_kept(self, stage: Stage, numbers: Numbers, mode: str, copies: bool) -> float:
        """Return what one micro-batch keeps in a stage, without its loss."""
        kept, kinds = numbers.shared, [kind for kind, _ in stage.blocks]
        for kind, number in stage.blocks:
            part = numbers.parts[kind]
            more = part.more + copies * part.copies if mode == "none" else 0.0
            kept += number * (part.bytes.kept[mode] + more)
        if DECODER not in kinds:
            kept += numbers.target
        elif LAST_ENCODER not in kinds:
            kept += numbers.memory
        received = numbers.parts[kinds[0]].bytes.received if mode == "none" else 0.0
        kept += numbers.embedding if stage.first else received
        if stage.last:
            return kept + numbers.loss.hidden + copies * numbers.head
        return kept + numbers.parts[kinds[-1]].bytes.output

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

    def _rank_parameters(
        self, plan: RankPlan, parts: Mapping[str, "Part"], tensor: int
    ) -> tuple[Parameters, Parameters]:
        """Return the parameters of a rank's blocks, and those of the ends that it has."""
        blocks, ends = Parameters(), Parameters()
        for stage in plan.stages:
            for kind, number in stage.blocks:
                blocks += number * parts[kind].parameters
        first = any(stage.first for stage in plan.stages)
        last = any(stage.last for stage in plan.stages)
        embedding, head, tied_head, tables = self._ends(tensor)
        ends += embedding if first else Parameters()
        if last:
            ends += tied_head if first else head
        return blocks, ends + tables

    def _build_ends(self, tensor: int) -> tuple[Parameters, Parameters, Parameters, Parameters]:
        model, lora = self.model, self._lora
        return (
            count.embedding_parameters(model, tensor, lora),
            count.head_parameters(model, tensor, lora),
            count.head_parameters(model, tensor, lora, count.is_tied(model)),
            count.bias_tables(model, lora),
        )

    def _build_numbers(
        self, tensor: int, sequence_parallel: bool, context: int, method: str, samples: int
    ) -> Numbers:
        """Return the numbers of each kind of block, the loss, the embedding and what is shared."""
        model = self.model
        setting = Setting(
            samples,
            tensor,
            sequence_parallel,
            context,
            method,
            self._compute_bytes,
            self._parameter_bytes,
            self._fused_norm,
            self._lora,
            self._compress,
        )
        last = self.target or self.source
        assert last is not None
        sequences = [sequence for sequence in (self.source, self.target) if sequence is not None]
        two, vector = is_encoder_decoder(model), self._compute_bytes * model.width
        return Numbers(
            self._build_parts(setting),
            loss_bytes(model, last, setting, self._chunks),
            self._compute_bytes * self._ends(tensor)[1].matrices,
            embedding_bytes(model, self.source, setting),
            shared_bytes(model, sequences, setting),
            setting.rows(self.source.length) * vector if two and self.source else 0.0,
            setting.rows_between(last.length) * vector if two else 0.0,
        )

    def _build_parts(self, setting: Setting) -> dict[str, Part]:
        """Return the numbers of each kind of block."""
        model, parts = self.model, {}
        two = is_encoder_decoder(model)
        for kind, own, memory in (
            (ENCODER, self.source, None),
            (LAST_ENCODER, self.source, None),
            (DECODER, self.target, self.source if two else None),
        ):
            if own is None:
                continue
            turns = two and kind == LAST_ENCODER
            cross = memory is not None
            found = count.block_parameters(model, setting.tensor, self._lora, cross, turns)
            copies = self._compute_bytes * (found.matrices + found.small)
            more = layer_extras(model, own, setting, 3 if cross else 2)
            parts[kind] = Part(block_bytes(model, own, setting, memory, turns), found, copies, more)
        return parts


def _total(terms: MemoryTerms) -> float:
    return terms.total


def _size(part: Part) -> int:
    return part.parameters.total
