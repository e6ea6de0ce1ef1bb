"""Closed forms of the memory of a step, for each pipeline rank of any layout; free of torch.

For ranking: everything is arithmetic on numbers that are worked out once per block, tensor degree
and micro-batch. `trace.py` is the truth that they are held against. What they leave out: operators'
workspaces, transports' buffers, fragmentation (the reserve of a card).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

from parallel.pipeline.partition import balance_stages, stage_blocks
from parallel.pipeline.schedules import stage_to_rank, stages_per_rank
from parallel.strategy import StrategyConfig
from trainer.config.train import (
    CompressConfig,
    LoraConfig,
    ModelConfig,
    TrainConfig,
    inputs_of,
    is_encoder_decoder,
    longest_source,
)
from trainer.nn.flops import flops_per_block
from trainer.plan import parameters as count
from trainer.plan.block_memory import (
    BlockBytes,
    LossBytes,
    Sequence,
    Setting,
    block_bytes,
    embedding_bytes,
    loss_bytes,
    quantized_bytes,
    shared_bytes,
)
from trainer.plan.parameters import Parameters

# Bytes of a weight at rest, and of what is computed with it.
PRECISION_BYTES = {"fp64": (8, 8), "fp32": (4, 4), "bf16": (4, 2), "fp16": (4, 2), "fp8": (4, 2)}
REDUCE_BYTES = {"auto": 4, "fp32": 4, "bf16": 2, "fp16": 2, "int8": 4, "powersgd": 4}
ENCODER, LAST_ENCODER, DECODER = "encoder", "last of the encoder", "decoder"


@dataclass(frozen=True)
class MemoryTerms:
    """Bytes of one pipeline rank at the peak of its step, by what they are for."""

    weights: float
    gradients: float
    moments: float
    gathered: float  # weights and gradients that FSDP has brought together
    activations: float
    logits: float

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


@dataclass(frozen=True)
class Stage:
    """The blocks of a stage by kind, and which ends of the model it has."""

    blocks: tuple[tuple[str, int], ...]
    first: bool
    last: bool


class Held(NamedTuple):
    """The micro-batches that a pipeline rank's stages hold at once, where they hold the most."""

    counts: tuple[tuple[int, ...], ...]  # by stage, in the order of the layers
    accumulates: bool  # whether gradients are there already


ONE_STAGE = (Held(((1,),), accumulates=False),)


@dataclass(frozen=True)
class RankPlan:
    """The stages of a pipeline rank, and the most that they hold at once."""

    stages: tuple[Stage, ...]
    held: Held

    @property
    def has_head(self) -> bool:
        """Return whether the loss is computed here."""
        return any(stage.last for stage in self.stages)

    def moments(self, staged: bool, micro_batches: int) -> list[tuple[tuple[int, ...], bool]]:
        """Return the counts in flight that may need the most, and if gradients are there then."""
        if not staged:
            return [(counts, micro_batches > 1) for counts in self.held.counts]
        found = [(counts, self.held.accumulates) for counts in self.held.counts]
        if not self.held.accumulates:  # behind the first backward of the last stage here
            found += [((*counts[:-1], counts[-1] - 1), True) for counts in self.held.counts]
        return found


class _Layout(NamedTuple):
    """What a strategy means for weights and gradients."""

    sharded: bool  # by FSDP, which also sums over replicas of split layers
    share: int  # ranks that a weight is sharded over
    staged: bool
    buckets: bool  # of DDP
    frees: bool  # FSDP frees a block's weights behind its forward
    copies: bool  # each layer casts its weight, and keeps the copy for the backward
    reduce_bytes: int

    @classmethod
    def of(
        cls, strategy: StrategyConfig, lora: LoraConfig, parameter_bytes: int, compute_bytes: int
    ) -> "_Layout":
        """Return what a resolved strategy means."""
        replicas, staged = strategy.replicate * strategy.context, strategy.pipeline > 1
        sharded = strategy.shard > 1 or (replicas > 1 and (strategy.tensor > 1 or staged))
        return cls(
            sharded,
            strategy.shard if sharded else 1,
            staged,
            replicas > 1 and not sharded,
            strategy.reshard_after_forward and not staged,
            not sharded and compute_bytes < parameter_bytes and not lora.rank,
            REDUCE_BYTES[strategy.reduce],
        )


@dataclass(frozen=True)
class _Part:
    """Numbers of a kind of block."""

    bytes: BlockBytes
    parameters: Parameters
    copies: float  # its weights in the dtype of compute
    more: float  # kept in addition with mode none


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
        self._parts = lru_cache(maxsize=None)(self._build_parts)
        self._plans = lru_cache(maxsize=None)(self._build_plans)
        self._ends = lru_cache(maxsize=None)(self._build_ends)

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
        key = (
            strategy.tensor,
            strategy.sequence_parallel,
            strategy.context,
            strategy.context_method,
            micro_batch,
        )
        plans = self._plans(
            strategy.pipeline,
            strategy.schedule,
            strategy.schedule_csv,
            strategy.stages_per_rank,
            tuple(strategy.split),
            held,
        )
        return [
            self._rank_terms(plan, strategy, key, micro_batches, activation_checkpointing)
            for plan in plans
        ]

    def _rank_terms(
        self,
        plan: RankPlan,
        strategy: StrategyConfig,
        key: tuple,
        micro_batches: int,
        mode: str,
    ) -> MemoryTerms:
        """Return the terms of the moment in which a rank needs the most."""
        parts, loss, embedding, shared = self._parts(*key)
        blocks, ends = self._rank_parameters(plan, parts, strategy.tensor)
        layout = _Layout.of(strategy, self._lora, self._parameter_bytes, self._compute_bytes)
        weights, moments = self._state_bytes(blocks + ends, layout, strategy)
        head = self._compute_bytes * self._ends(strategy.tensor)[1].matrices
        kept = [
            self._stage_kept(stage, parts, loss, (embedding, shared, head), mode, layout)
            for stage in plan.stages
        ]
        behind = [loss.kept if stage.last else 0.0 for stage in plan.stages]
        last = max((parts[kind] for stage in plan.stages for kind, _ in stage.blocks), key=_size)
        found = []
        for counts, present in plan.moments(layout.staged, micro_batches):
            held = sum(
                n * each + max(0, n - 1) * late
                for n, each, late in zip(counts, kept, behind, strict=True)
            )
            gradients, gathered = self._gradient_bytes(
                blocks + ends, layout, present, micro_batches
            )
            state = weights, gradients, moments
            if plan.has_head:
                again = loss.again if layout.staged and present else 0.0
                at_loss = gathered + self._gathered_at_loss(blocks, ends, layout, strategy)
                found.append(MemoryTerms(*state, at_loss, held, loss.peak + again))
            found += self._at_blocks(state, gathered, (blocks, ends), held, last, mode, layout)
        return max(found, key=_total)

    def _at_blocks(
        self,
        state: tuple[float, float, float],
        gathered: float,
        own: tuple[Parameters, Parameters],
        held: float,
        last: "_Part",
        mode: str,
        layout: "_Layout",
    ) -> list[MemoryTerms]:
        """Return the terms of the backward of the last block, and of the one in front of it."""
        c, block, (blocks, ends) = self._compute_bytes, last.parameters, own
        work = last.bytes.recomputed[mode] + last.bytes.backward
        if mode != "none" and layout.copies:
            work += last.copies
        if not layout.sharded or layout.staged:
            return [MemoryTerms(*state, gathered, held + work, 0.0)]
        root = c * (ends.total + ends.largest)
        if layout.frees:  # this block and the next one, and the gradients of this one
            root += 2 * c * block.total + c * block.learned
        else:
            root += c * (blocks.total + block.learned)
        before = held - last.bytes.kept[mode] + work
        reduced = root + layout.reduce_bytes * block.learned
        return [
            MemoryTerms(*state, root, held + work, 0.0),
            MemoryTerms(*state, reduced, before, 0.0),
        ]

    def _gathered_at_loss(
        self, blocks: Parameters, ends: Parameters, layout: "_Layout", strategy: StrategyConfig
    ) -> float:
        """Return what FSDP has gathered when the loss is computed, without a pipeline."""
        if not layout.sharded or layout.staged:
            return 0.0
        kept = 0 if layout.frees else blocks.total
        return self._compute_bytes * (ends.total + kept)

    def _gradient_bytes(
        self, own: Parameters, layout: "_Layout", present: bool, micro_batches: int
    ) -> tuple[float, float]:
        """Return the bytes of gradients at rest, and of what FSDP keeps gathered in a pipeline."""
        p = self._parameter_bytes
        if layout.sharded and layout.staged:  # gradients stay whole until the step's end
            reduce = max(layout.reduce_bytes, p) * own.learned if present else 0
            return 0.0, self._compute_bytes * own.total + reduce
        if layout.buckets:  # DDP's, and what accumulates beside them
            return p * own.learned * (1 + (micro_batches > 1)), 0.0
        return p * own.learned / layout.share * present, 0.0

    def _stage_kept(
        self,
        stage: Stage,
        parts: Mapping[str, "_Part"],
        loss: LossBytes,
        beside: tuple[float, float, float],
        mode: str,
        layout: "_Layout",
    ) -> float:
        """Return what one micro-batch keeps in a stage, without its loss."""
        embedding, shared, head = beside
        kept = shared
        for kind, number in stage.blocks:
            part = parts[kind]
            more = part.more + layout.copies * part.copies if mode == "none" else 0.0
            kept += number * (part.bytes.kept[mode] + more)
        kept += embedding if stage.first else 0.0
        if stage.last:
            return kept + loss.hidden + layout.copies * head
        return kept + parts[stage.blocks[-1][0]].bytes.output

    def _state_bytes(
        self, own: Parameters, layout: "_Layout", strategy: StrategyConfig
    ) -> tuple[float, float]:
        """Return the bytes of weights and of moments."""
        p, c, width = self._parameter_bytes, self._compute_bytes, self.model.width
        frozen = p * own.frozen
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
        self, plan: RankPlan, parts: Mapping[str, "_Part"], tensor: int
    ) -> tuple[Parameters, Parameters]:
        """Return the parameters of a rank's blocks, and those of the ends that it has."""
        blocks, ends = Parameters(), Parameters()
        for stage in plan.stages:
            for kind, number in stage.blocks:
                blocks += _times(parts[kind].parameters, number)
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

    def _build_parts(
        self, tensor: int, sequence_parallel: bool, context: int, method: str, samples: int
    ) -> tuple[dict[str, _Part], LossBytes, float, float]:
        """Return the numbers of each kind of block, of the loss, the embedding and what is shared."""
        model, setting = (
            self.model,
            Setting(
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
            ),
        )
        two, parts = is_encoder_decoder(model), {}
        for kind, own, memory in (
            (ENCODER, self.source, None),
            (LAST_ENCODER, self.source, None),
            (DECODER, self.target, self.source if two else None),
        ):
            if own is None:
                continue
            found = count.block_parameters(
                model, tensor, self._lora, memory is not None, two and kind == LAST_ENCODER
            )
            copies = self._compute_bytes * (found.matrices + found.small)
            quantized = quantized_bytes(model, own, setting)
            bytes_ = block_bytes(model, own, setting, memory)
            parts[kind] = _Part(bytes_, found, copies, quantized)
        last = self.target or self.source
        assert last is not None
        sequences = [sequence for sequence in (self.source, self.target) if sequence is not None]
        return (
            parts,
            loss_bytes(model, last, setting, self._chunks),
            embedding_bytes(model, self.source, setting),
            shared_bytes(model, sequences, setting),
        )

    def _build_plans(
        self,
        pipeline: int,
        schedule: str,
        schedule_csv: str,
        per_rank: int,
        split: tuple[int, ...],
        held: tuple[Held, ...],
    ) -> list[RankPlan]:
        """Return what each pipeline rank has and holds."""
        strategy = StrategyConfig(
            pipeline=pipeline,
            schedule=schedule,
            schedule_csv=schedule_csv,
            stages_per_rank=per_rank,
            split=list(split),
        )
        if pipeline == 1:
            return [RankPlan((self._stage(range(self._depth()), True, True),), held[0])]
        source = longest_source(self.model)
        costs = flops_per_block(self.model, self.model.max_positions, source)
        stages = pipeline * stages_per_rank(strategy)
        runs = stage_blocks(len(costs), split or balance_stages(costs, stages))
        placement = stage_to_rank(strategy, pipeline)
        plans = []
        for rank in range(pipeline):
            own = [s for s in range(stages) if placement[s] == rank]
            built = (
                self._stage([int(b) for b in runs[s]], s == 0, s == stages - 1) for s in own
            )
            plans.append(RankPlan(tuple(built), held[rank]))
        return plans

    def _depth(self) -> int:
        model = self.model
        both = (model.encoder_layers or model.layers) if is_encoder_decoder(model) else 0
        return model.layers + both

    def _stage(self, blocks: "range | list[int]", first: bool, last: bool) -> Stage:
        model, kinds = self.model, {}
        encoder = model.layers if model.family == "encoder" else 0
        if is_encoder_decoder(model):
            encoder = model.encoder_layers or model.layers
        for block in blocks:
            kind = DECODER if block >= encoder else ENCODER
            if is_encoder_decoder(model) and block == encoder - 1:
                kind = LAST_ENCODER
            kinds[kind] = kinds.get(kind, 0) + 1
        return Stage(tuple(kinds.items()), first, last)


def sequences_of(config: TrainConfig) -> tuple[Sequence | None, Sequence | None]:
    """Return the encoder's and the decoder's sequences of a complete configuration's data."""
    model, data = config.model, config.data
    packed = data.kind == "chat" and data.pack
    padded = data.kind in ("pairs", "speech", "transcription", "labelled_text")
    target = Sequence(data.seq_len, causal=True, documents=packed)
    if model.queries:
        target = Sequence(model.queries * model.query_groups)
    if model.family == "decoder":
        return None, target
    length, masked = data.seq_len, padded
    if inputs_of(model) == "patches":
        length = (model.image_size // model.patch_size) ** 2 + (model.pool == "class_token")
        masked = False
    if inputs_of(model) == "audio":
        frames = min(int(data.max_seconds * 100), longest_source(model) or 1 << 40)
        length = -(-frames // model.audio_stride)
        if model.audio_fill == "silence":
            length, masked = model.audio_positions, False
    source = Sequence(length, masked=masked)
    return source, target if is_encoder_decoder(model) else None


def _total(terms: MemoryTerms) -> float:
    return terms.total


def _size(part: _Part) -> int:
    return part.parameters.total


def _times(found: Parameters, number: int) -> Parameters:
    return replace(
        found,
        learned=found.learned * number,
        frozen=found.frozen * number,
        small=found.small * number,
        matrices=found.matrices * number,
    )

