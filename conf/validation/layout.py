"""Validate a strategy against model and batch: pure functions that collect all problems."""

from typing import Any

from parallel.errors import UserError
from parallel.pipeline.schedules import CSV_KEY, SCHEDULES, has_split_backward
from parallel.pipeline.schedules import find_schedule_problems as schedule_problems
from parallel.strategy import HOW, StrategyConfig, axis_degrees
from trainer.config.train import DataConfig, ModelConfig, TrainConfig, VerifyConfig
from trainer.config.verify import FAULT_AXES
from trainer.data import READERS
from trainer.plan.layout_rules import sequence_problems

VERIFIED = 2  # micro-batches per rank of a pipeline that is verified


def _has_tokens(data: DataConfig) -> bool:
    """Return whether data.seq_len says how long a sample is."""
    return data.kind not in READERS or READERS[data.kind].inputs != "patches"


def layout_problems(config: Any, strategy: StrategyConfig) -> list[str]:
    """Return the problems of a resolved strategy, except those of the model."""
    found = []
    if isinstance(config, VerifyConfig):
        found += _fault_problems(config.fault, strategy, config.model)
    data = getattr(config, "data", None)
    if isinstance(data, DataConfig) and _has_tokens(data):
        found += sequence_problems(data.seq_len, strategy.context)
    compiles = getattr(config, "compile", False)
    if strategy.async_tensor and (strategy.tensor == 1 or not compiles):
        found.append(
            "strategy.async_tensor=true overlaps what compile=true has compiled of "
            f"strategy.tensor above 1, but strategy.tensor={strategy.tensor} and "
            f"compile={str(compiles).lower()}; set compile=true, or strategy.async_tensor=false"
        )
    metrics = getattr(config, "metrics", None)
    if metrics is not None and metrics.timeline and strategy.pipeline == 1:
        found.append(
            "metrics.timeline=true draws a pipeline's schedule, but strategy.pipeline=1; set "
            "strategy=pipeline, or metrics.timeline=false"
        )
    if strategy.pipeline > 1:
        found += _schedule_problems(config, strategy)
    return found + _reduction_problems(config, strategy)


def _reduction_problems(config: Any, strategy: StrategyConfig) -> list[str]:
    """Return the problems of strategy.reduce."""
    given = f"strategy.reduce={strategy.reduce}"
    if isinstance(config, VerifyConfig) and strategy.reduce != "auto":
        return [
            f"{given} rounds gradients, so that no layout equals one process; set "
            "strategy.reduce=auto"
        ]
    if strategy.reduce not in ("int8", "powersgd"):
        return []
    others = [
        f"strategy.{axis}={degree}"
        for axis, degree in axis_degrees(strategy).items()
        if axis != "replicate" and degree > 1
    ]
    found = []
    if others:
        found.append(
            f"{given} compresses whole gradients of whole copies, which {' and '.join(others)} "
            "does not leave; set strategy=ddp, or strategy.reduce=bf16"
        )
    elif strategy.replicate == 1 and not strategy.elastic:
        found.append(
            f"{given} compresses what copies tell each other, but strategy.replicate=1 makes none; "
            f"start 2 ranks or more {HOW}, or set strategy.reduce=auto"
        )
    if getattr(config, "precision", "") == "fp16":
        found.append(
            f"{given} adds to a step what was lost in the one before, but precision=fp16 scales "
            "each by another factor; set precision=bf16, or strategy.reduce=fp16"
        )
    return found


def _schedule_problems(config: Any, strategy: StrategyConfig) -> list[str]:
    """Return the problems of a pipeline schedule with other options."""
    found: list[str] = []
    # `batch_problems` checks the micro-batches of training; other commands have none.
    if isinstance(config, VerifyConfig) or not (
        isinstance(config, TrainConfig) or strategy.schedule_csv
    ):
        found = schedule_problems(strategy, VERIFIED * strategy.pipeline)
    try:
        return found + _one_pass(config, strategy)
    except UserError:
        return found  # reported where the schedule's lists are checked


def _one_pass(config: Any, strategy: StrategyConfig) -> list[str]:
    """Return the options that do not work with a split backward.

    A compiled graph has a single backward, recomputation would run once per layer's weights, and
    float8 layers would multiply for both gradients in either pass.
    """
    asked = []
    if getattr(config, "compile", False):
        asked.append(("compile", "true", "false"))
    if isinstance(config, TrainConfig) and config.precision == "fp8":
        asked.append(("precision", "fp8", "bf16"))
    mode = getattr(config, "activation_checkpointing", "none")
    if mode != "none":
        asked.append(("activation_checkpointing", mode, "none"))
    if not asked or not has_split_backward(strategy):
        return []
    fit = " or ".join(n for n, rules in SCHEDULES.items() if not rules.splits_backward)
    name, other = f"strategy.schedule={strategy.schedule}", f"strategy.schedule={fit}"
    if strategy.schedule_csv:
        name, other = f"{CSV_KEY}={strategy.schedule_csv}", "write B for I and W there"
    return [
        f"{key}={value} needs a backward in one pass, but {name} computes gradients of inputs and "
        f"of weights apart; set {key}={off}, or {other}"
        for key, value, off in asked
    ]


def _fault_problems(fault: str, strategy: StrategyConfig, model: ModelConfig) -> list[str]:
    """Return the problems of planting a fault in this layout of a model."""
    axis = FAULT_AXES.get(fault)
    if axis == "tensor" and strategy.tensor == 1:
        return [f"fault={fault} is one of split layers; set strategy=tensor"]
    if axis == "context" and (strategy.context == 1 or strategy.context_method != "ring"):
        return [
            f"fault={fault} is one of a ring; set strategy=context strategy.context_method=ring"
        ]
    if axis == "pipeline" and strategy.pipeline == 1:
        return [f"fault={fault} is one of a pipeline; set strategy=pipeline"]
    whole = not strategy.sequence_parallel
    shared = fault == "skip_partial_gradient_sum" and model.qk_norm == "head"
    if fault in ("skip_sequence_gather", "skip_partial_gradient_sum") and whole and not shared:
        return [
            f"fault={fault} is one of sequence parallelism; set strategy.sequence_parallel=true"
        ]
    if fault == "skip_norm_gradient_mean" and model.qk_norm != "width":
        return [f"fault={fault} is one of norms over all heads; set model.qk_norm=width"]
    return []
