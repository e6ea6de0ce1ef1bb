"""Check what the command line asks of a plan."""

import difflib
from dataclasses import dataclass, replace
from typing import Any

from hydra.core.hydra_config import HydraConfig

from conf.plan import PlanConfig, planned_training
from conf.validation.validate import find_problems
from launch.cli.inputs import with_absolute_paths, with_imported_model
from launch.slurm.batch_script import ranks_per_node
from parallel.errors import ConfigError
from parallel.strategy import AXES, StrategyConfig, axis_degrees, resolve_degrees
from trainer.config.hardware import ACCELERATORS
from trainer.config.train import TrainConfig
from trainer.plan.constants import Fit
from trainer.plan.layout import Layout, layout_of
from trainer.plan.layout_rules import micro_batch_size
from trainer.plan.machine import Machine, measured_cpu, named_machine
from trainer.plan.planner import Planner
from trainer.plan.sizes import with_assumed_sizes

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


@dataclass(frozen=True)
class Asked:
    """A checked request for a plan."""

    config: PlanConfig
    planner: Planner
    training: TrainConfig
    title: str  # of the model
    host: int  # ranks of a host
    nodes: int  # 0 = as many as it takes
    layout: Layout | None  # a strategy that was named; None = search
    fixed: dict[str, Any]


def prepare_plan(config: PlanConfig) -> Asked:
    """Return the checked request; ConfigError for what is wrong with it. Nothing is written."""
    given = list(HydraConfig.get().overrides.task)
    words = [word.lstrip("+") for word in given]
    cluster, host = config.cluster, ranks_per_node(config.cluster)
    training = with_imported_model(with_absolute_paths(planned_training(config)), given)
    training = with_assumed_sizes(training)
    training = replace(training, data=replace(training.data, path="not read"))
    named = any(word.startswith("strategy=") for word in words)
    asked = {word.partition("=")[0] for word in words}
    fixed = {} if named else _fixed(training, asked)
    checked = replace(config, **{f: getattr(training, f) for f in vars(training)})
    ranks = cluster.nodes * host
    if not named:
        checked = replace(checked, strategy=_alone(training.strategy), micro_batch_size=0)
    if found := find_problems(checked, ranks if named else 1):
        raise ConfigError(*found)
    machine, precision = _machine(config, host)
    if fixed and "cluster.nodes" in asked:
        _check_fixed(fixed, ranks)
    if named:
        training = replace(training, strategy=resolve_degrees(training.strategy, ranks))
    planner = Planner(training, precision, machine, Fit.read())
    nodes = cluster.nodes if named or "cluster.nodes" in asked else 0
    layout = _named_layout(training) if named else None
    title = HydraConfig.get().runtime.choices.get("model") or "model"
    return Asked(config, planner, training, title, host, nodes, layout, fixed)


def _alone(strategy: StrategyConfig) -> StrategyConfig:
    """Return a strategy of one rank, with all that is no degree."""
    ones: dict[str, Any] = dict.fromkeys(AXES, 1)
    return replace(strategy, **ones)


def _fixed(training: TrainConfig, asked: set[str]) -> dict[str, Any]:
    """Return the fields of a layout that the command line decides."""
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


def _check_fixed(fixed: dict[str, Any], ranks: int) -> None:
    """Raise ConfigError if degrees that are set do not divide the ranks."""
    degrees: dict[str, Any] = {axis: fixed[axis] for axis in AXES if axis in fixed}
    rest = [axis for axis in ("replicate", "shard", *AXES) if axis not in degrees]
    if rest:
        degrees[rest[0]] = -1
    resolve_degrees(StrategyConfig(**degrees), ranks)


def _named_layout(training: TrainConfig) -> Layout:
    size = micro_batch_size(training, training.strategy)
    mode, chunks = training.activation_checkpointing, training.loss.chunks
    return layout_of(training.strategy, size, mode, chunks)


def _machine(config: PlanConfig, host: int) -> tuple[Machine, str]:
    """Return the machine, and the precision that runs there."""
    cluster = config.cluster
    if not cluster.gpu:
        known = ", ".join(ACCELERATORS)
        raise ConfigError(
            f"cluster.gpu is empty, but a plan is for one kind of device; set it to one of {known}"
        )
    tflops, precision = ACCELERATORS[cluster.gpu].tflops, config.precision
    if cluster.gpu == "cpu":
        return measured_cpu(host), "fp32" if precision == "auto" else precision
    if precision == "auto":
        precision = "bf16" if "bf16" in tflops else "fp16" if "fp16" in tflops else "fp32"
    found = named_machine(cluster.gpu, precision, host, cluster.memory_gib, cluster.network_gbit)
    if found is None:
        near = difflib.get_close_matches(precision, tflops, n=1, cutoff=0.0)
        raise ConfigError(
            f"precision={precision} has no peak on cluster.gpu={cluster.gpu}, whose data sheet has "
            f"{', '.join(tflops) or 'none'}; set precision={near[0] if near else 'fp32'}"
        )
    return found, precision
