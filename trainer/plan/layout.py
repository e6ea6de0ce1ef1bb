"""A layout as the planner compares it: degrees, schedule, micro-batch and recomputation."""

from dataclasses import replace
from typing import NamedTuple

from parallel.pipeline.schedules import stages_per_rank
from parallel.strategy import StrategyConfig
from trainer.config.train import TrainConfig
from trainer.plan.layout_rules import micro_batch_size


class Layout(NamedTuple):
    """How a step's work is spread; what StrategyConfig has beyond it is the same for all."""

    pipeline: int = 1
    replicate: int = 1
    shard: int = 1
    context: int = 1
    tensor: int = 1
    context_method: str = "all_gather"
    schedule: str = "gpipe"
    stages_per_rank: int = 1
    micro_batch: int = 1
    recomputed: str = "none"  # activation_checkpointing
    chunks: int = 1  # loss.chunks

    @property
    def ranks(self) -> int:
        """Return the number of ranks."""
        return self.pipeline * self.replicate * self.shard * self.context * self.tensor

    @property
    def data_ranks(self) -> int:
        """Return the number of ranks that see different samples."""
        return self.replicate * self.shard

    @property
    def axes(self) -> int:
        """Return the number of axes with more than one rank."""
        return sum(degree > 1 for degree in self[:5])

    @property
    def splitting_axes(self) -> int:
        """Return the number of axes that split the model or a sequence over ranks."""
        return sum(degree > 1 for degree in (self.pipeline, self.context, self.tensor))


def layout_of(
    strategy: StrategyConfig, micro_batch: int, recomputed: str = "none", chunks: int = 1
) -> Layout:
    """Return the layout of a resolved strategy."""
    return Layout(
        strategy.pipeline,
        strategy.replicate,
        strategy.shard,
        strategy.context,
        strategy.tensor,
        strategy.context_method,
        strategy.schedule,
        stages_per_rank(strategy) if strategy.pipeline > 1 else 1,
        micro_batch,
        recomputed,
        chunks,
    )


def strategy_of(layout: Layout, base: StrategyConfig) -> StrategyConfig:
    """Return the strategy of a layout; what it does not say is that of `base`."""
    return replace(
        base,
        pipeline=layout.pipeline,
        replicate=layout.replicate,
        shard=layout.shard,
        context=layout.context,
        tensor=layout.tensor,
        context_method=layout.context_method,
        schedule=layout.schedule,
        stages_per_rank=layout.stages_per_rank if layout.pipeline > 1 else 0,
        elastic=False,
    )


def layout_of_job(training: TrainConfig) -> Layout:
    """Return the layout of a job whose degrees are resolved."""
    size = micro_batch_size(training, training.strategy)
    mode, chunks = training.activation_checkpointing, training.loss.chunks
    return layout_of(training.strategy, size, mode, chunks)


def with_layout(training: TrainConfig, layout: Layout) -> TrainConfig:
    """Return the job under a layout."""
    return replace(
        training,
        strategy=replace(
            strategy_of(layout, training.strategy), auto="no", elastic=training.strategy.elastic
        ),
        micro_batch_size=layout.micro_batch,
        activation_checkpointing=layout.recomputed,
        loss=replace(training.loss, chunks=layout.chunks),
    )


def layout_name(layout: Layout) -> str:
    """Return a layout in short: its degrees above 1, schedule and method."""
    axes = ("replicate", "shard", "context", "tensor", "pipeline")
    parts = [f"{axis}={getattr(layout, axis)}" for axis in axes if getattr(layout, axis) > 1]
    if layout.context > 1:
        parts.append(layout.context_method)
    if layout.pipeline > 1:
        stages = f"×{layout.stages_per_rank}" if layout.stages_per_rank > 1 else ""
        parts.append(layout.schedule + stages)
    return " ".join(parts) or "single"
