"""The layouts that a job may take: what its command line fixes, and what validation allows."""

from collections.abc import Collection, Iterable
from dataclasses import replace
from typing import Any

from conf.validation.compression import compress_problems
from conf.validation.float8 import precision_problems
from conf.validation.layout import layout_problems
from parallel.pipeline.schedules import read_csv, stages_per_rank
from parallel.pipeline.simulator import Lists
from parallel.strategy import AXES, StrategyConfig, axis_degrees
from trainer.config.train import CompressConfig, TrainConfig
from trainer.plan.layout_rules import batch_problems, model_problems
from trainer.plan.planner import Planner
from trainer.plan.rank_plan import Held
from trainer.plan.search import Space

# Keys that a search decides unless the command line does → the field of a layout.
DECIDED = {
    **{f"strategy.{axis}": axis for axis in AXES},
    "strategy.context_method": "context_method",
    "strategy.schedule": "schedule",
    "strategy.stages_per_rank": "stages_per_rank",
    "micro_batch_size": "micro_batch",
    "activation_checkpointing": "recomputed",
    "loss.chunks": "chunks",
}


def given_keys(words: Iterable[str]) -> set[str]:
    """Return the keys that words of a command line set."""
    return {word.lstrip("+").partition("=")[0] for word in words}


def fixed_fields(training: TrainConfig, asked: Collection[str]) -> dict[str, Any]:
    """Return the fields of a layout that keys of the command line decide."""
    values = {
        **{f"strategy.{axis}": degree for axis, degree in axis_degrees(training.strategy).items()},
        "strategy.context_method": training.strategy.context_method,
        "strategy.schedule": training.strategy.schedule,
        "strategy.stages_per_rank": training.strategy.stages_per_rank,
        "micro_batch_size": training.micro_batch_size,
        "activation_checkpointing": training.activation_checkpointing,
        "loss.chunks": training.loss.chunks,
    }
    open_values = (-1, 0)
    return {
        DECIDED[key]: values[key]
        for key in DECIDED
        if key in asked and values[key] not in open_values
    }


def legal_space(
    planner: Planner, training: TrainConfig, ranks: int, fixed: dict[str, Any]
) -> Space:
    """Return the layouts that are searched, by all rules that validation has."""
    space = planner.space(ranks, fixed)
    plain = training.compress == CompressConfig() and training.strategy.reduce == "auto"
    if plain and planner.precision != "fp8" and not training.strategy.async_tensor:
        return space

    def allows(strategy: StrategyConfig) -> bool:
        model, compress = training.model, training.compress
        return not (
            compress_problems(compress, model, strategy)
            or precision_problems(planner.precision, model, compress, strategy)
            or layout_problems(replace(training, activation_checkpointing="none"), strategy)
        )

    return replace(space, allows=allows)


def why_none_is_legal(training: TrainConfig, space: Space) -> list[str]:
    """Return the problems of the plainest layout, where there is no legal one at all."""
    degrees = {axis: space.fixed.get(axis, 1) for axis in ("pipeline", "context", "tensor")}
    inner = degrees["pipeline"] * degrees["context"] * degrees["tensor"]
    strategy = replace(space.strategy, replicate=1, shard=max(1, space.ranks // inner), **degrees)
    found = model_problems(space.model, strategy) + batch_problems(training, strategy)
    return found or [
        f"no layout of {space.ranks} ranks keeps what is set: {space.fixed}; leave some of it out"
    ]


def list_schedule(strategy: StrategyConfig, micro_batches: int) -> tuple[Lists, tuple[Held, ...]]:
    """Return a schedule's actions, and what it holds; loads torch, whose schedules they are."""
    from parallel.pipeline.torch_schedules import list_actions
    from trainer.plan.in_flight import held_micro_batches

    held = held_micro_batches(strategy, micro_batches)
    ranks, stages, path = strategy.pipeline, stages_per_rank(strategy), strategy.schedule_csv
    if path:
        return read_csv(path, ranks, stages, micro_batches), held
    return list_actions(strategy.schedule, ranks, stages, micro_batches), held
