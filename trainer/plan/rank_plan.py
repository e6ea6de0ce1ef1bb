"""Stages, micro-batches in flight and shards of each rank of a layout; torch-free."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
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
from trainer.plan.block_memory import Sequence

REDUCE_BYTES = {"auto": 4, "fp32": 4, "bf16": 2, "fp16": 2, "int8": 4, "powersgd": 4}
ENCODER, LAST_ENCODER, DECODER = "encoder", "last of the encoder", "decoder"


@dataclass(frozen=True)
class Stage:
    """The blocks of a stage by kind, and which ends of the model it has."""

    blocks: tuple[tuple[str, int], ...]
    first: bool
    last: bool


class Moment(NamedTuple):
    """A backward of a pipeline rank, and what the rank holds then, by stage in the layers' order.

    `flying` are micro-batches from their forward to the end of their backward; `waiting`, of these,
    those whose weights have yet to get their gradients.
    """

    flying: tuple[int, ...]
    waiting: tuple[int, ...]
    learned: tuple[bool, ...]  # whether a stage's weights have gradients already
    at: int = -1  # the stage at work
    splits: bool = False  # the gradients of its weights come later
    sent: int = 0  # messages so far that hold memory of their own until the step's end, on gloo


class Held(NamedTuple):
    """The moments in which a pipeline rank holds the most."""

    moments: tuple[Moment, ...]
    in_turn: bool = False  # 1f1b: one loop, which still holds the latest logits and message


ONE_STAGE = (Held((Moment((1,), (0,), (False,)),)),)


@dataclass(frozen=True)
class RankPlan:
    """The stages of a pipeline rank, and what they hold at once."""

    stages: tuple[Stage, ...]
    held: Held


class Layout(NamedTuple):
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
    ) -> "Layout":
        """Return what a resolved strategy means."""
        replicas, staged = strategy.replicate * strategy.context, strategy.pipeline > 1
        sharded = strategy.shard > 1 or (replicas > 1 and (strategy.tensor > 1 or staged))
        return cls(
            sharded,
            strategy.shard if sharded else 1,
            staged,
            replicas > 1 and not sharded,
            strategy.reshard_after_forward and not staged,
            # Frozen weights are narrow already, where they are not split.
            not sharded
            and compute_bytes < parameter_bytes
            and not (lora.rank and strategy.tensor == 1),
            REDUCE_BYTES[strategy.reduce],
        )


def rank_plans(
    model: ModelConfig,
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
        return [RankPlan((_stage(model, range(_depth(model)), True, True),), held[0])]
    costs = flops_per_block(model, model.max_positions, longest_source(model))
    stages = pipeline * stages_per_rank(strategy)
    runs = stage_blocks(len(costs), split or balance_stages(costs, stages))
    placement = stage_to_rank(strategy, pipeline)
    plans = []
    for rank in range(pipeline):
        own = [stage for stage in range(stages) if placement[stage] == rank]
        built = (_stage(model, map(int, runs[s]), s == 0, s == stages - 1) for s in own)
        plans.append(RankPlan(tuple(built), held[rank]))
    return plans


def _depth(model: ModelConfig) -> int:
    both = (model.encoder_layers or model.layers) if is_encoder_decoder(model) else 0
    return model.layers + both


def _stage(model: ModelConfig, blocks: Iterable[int], first: bool, last: bool) -> Stage:
    kinds: dict[str, int] = {}
    encoder = _depth(model) - model.layers if is_encoder_decoder(model) else 0
    encoder = model.layers if model.family == "encoder" else encoder
    for block in blocks:
        kind = DECODER if block >= encoder else ENCODER
        if is_encoder_decoder(model) and block == encoder - 1:
            kind = LAST_ENCODER
        kinds[kind] = kinds.get(kind, 0) + 1
    return Stage(tuple(kinds.items()), first, last)


def block_lengths(model: ModelConfig, compress: CompressConfig, length: int) -> list[int]:
    """Return the length of a sequence in training at the input of each block that may shorten it.

    Of an encoder's blocks, or of a decoder alone.
    """
    depth = model.encoder_layers or model.layers
    kept, left, lengths = int(model.pool == "class_token"), length, []
    if compress.drop:
        left = kept + max(1, round((length - kept) * (1 - compress.drop)))
    text = model.family == "decoder"
    for block in range(model.layers if text else depth):
        lengths.append(left)
        if compress.pool_after == block + 1:
            square = 2 if inputs_of(model) == "patches" else 1
            left = kept * (square == 2) + -(-(left - kept) // compress.pool_stride**square)
        elif text and compress.pool_after and block + 1 == model.layers - compress.pool_after:
            left = length
        elif compress.merge and block >= compress.pool_after:
            left -= min(compress.merge, (left - kept) // 2)
    return lengths


def _mean_length(model: ModelConfig, compress: CompressConfig, length: int) -> int:
    """Return the mean length of a sequence over the blocks."""
    lengths = block_lengths(model, compress, length)
    return round(sum(lengths) / len(lengths))


def sequences_of(config: TrainConfig) -> tuple[Sequence | None, Sequence | None]:
    """Return the encoder's and the decoder's sequences of a complete configuration's data."""
    model, data = config.model, config.data
    packed = data.kind == "chat" and data.pack
    padded = data.kind in ("pairs", "speech", "labelled_text")
    target = Sequence(data.seq_len, causal=True, documents=packed)
    if model.queries:
        target = Sequence(model.queries * model.query_groups)
    if model.family == "decoder":
        return None, replace(target, length=_mean_length(model, config.compress, target.length))
    length, masked = data.seq_len, padded
    if inputs_of(model) == "patches":
        length = (model.image_size // model.patch_size) ** 2 + (model.pool == "class_token")
        masked = False
    if inputs_of(model) == "audio":
        frames = min(int(data.max_seconds * 100), longest_source(model) or 1 << 40)
        length = -(-frames // model.audio_stride)
        if model.audio_fill == "silence":
            length, masked = model.audio_positions, False
    source = Sequence(_mean_length(model, config.compress, length), masked=masked)
    return source, target if is_encoder_decoder(model) else None
