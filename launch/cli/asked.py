"""Check what the command line asks of a plan."""

import difflib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig

from conf.plan import CALIBRATION, PlanConfig, planned_training
from conf.validation.validate import find_problems
from launch.cli.inputs import with_absolute_paths, with_imported_model
from launch.slurm.batch_script import ranks_per_node
from parallel.errors import ConfigError
from parallel.strategy import AXES, StrategyConfig, axis_degrees, resolve_degrees
from trainer.config.hardware import ACCELERATORS
from trainer.config.train import TrainConfig, inputs_of, outputs_of
from trainer.plan.calibration import read_calibration
from trainer.plan.constants import CPU_FITTED, Fit
from trainer.plan.layout import Layout, layout_of
from trainer.plan.layout_rules import micro_batch_size
from trainer.plan.machine import CORE_PRODUCTS, GIB, Machine, named_machine, nominal_cpu
from trainer.plan.planner import Planner

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
    training = _with_sizes(replace(training, data=replace(training.data, path="not read")))
    named = any(word.startswith("strategy=") for word in words)
    asked = {word.partition("=")[0] for word in words}
    fixed = {} if named else _fixed(training, asked)
    checked = replace(config, **{f: getattr(training, f) for f in vars(training)})
    ranks = cluster.nodes * host
    if not named:
        checked = replace(checked, strategy=_alone(training.strategy), micro_batch_size=0)
    if found := find_problems(checked, ranks if named else 1):
        raise ConfigError(*found)
    machine, fit, precision = _machine(config, host)
    if fixed and "cluster.nodes" in asked:
        _check_fixed(fixed, ranks)
    if named:
        training = replace(training, strategy=resolve_degrees(training.strategy, ranks))
    planner = Planner(training, precision, machine, fit)
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


def _machine(config: PlanConfig, host: int) -> tuple[Machine, Fit, str]:
    """Return the machine, what is known of its times, and the precision that runs there."""
    cluster = config.cluster
    if not cluster.gpu:
        known = ", ".join(ACCELERATORS)
        raise ConfigError(
            f"cluster.gpu is empty, but a plan is for one kind of device; set it to one of {known}"
        )
    precision = _precision(config)
    if calibrated := _calibrated(config, precision, host):
        return *calibrated, precision
    if cluster.gpu == "cpu":
        return nominal_cpu(host, precision), Fit.read(CPU_FITTED), precision
    found = named_machine(cluster.gpu, precision, host, cluster.memory_gib, cluster.network_gbit)
    assert found is not None, precision
    return found, Fit.read(), precision


def _precision(config: PlanConfig) -> str:
    """Return the precision; ConfigError if the devices lack it."""
    gpu, precision = config.cluster.gpu, config.precision
    peaks = CORE_PRODUCTS if gpu == "cpu" else ACCELERATORS[gpu].tflops
    if precision == "auto":
        usual = ("fp32",) if gpu == "cpu" else ("bf16", "fp16")
        return next((name for name in usual if name in peaks), "fp32")
    if precision not in peaks:
        near = difflib.get_close_matches(precision, peaks, n=1, cutoff=0.0)
        raise ConfigError(
            f"precision={precision} has no peak on cluster.gpu={gpu}, whose data sheet has "
            f"{', '.join(peaks)}; set precision={near[0]}"
        )
    return precision


def _calibrated(config: PlanConfig, precision: str, host: int) -> tuple[Machine, Fit] | None:
    """Return what was measured on such devices, with what the command line says of them."""
    path, cluster = config.plan.calibration, config.cluster
    if not path:
        return None
    if not Path(path).exists() and path != CALIBRATION:
        raise ConfigError(
            f"plan.calibration={path} does not exist; make it with python launch/plan.py calibrate "
            f"calibration={path}, or set plan.calibration= to plan without it"
        )
    found = read_calibration(Path(path), cluster.gpu, precision, host)
    if found is None:
        return None
    machine, fit = found
    if cluster.memory_gib:
        machine = replace(machine, memory=cluster.memory_gib * GIB)
    if cluster.network_gbit:
        machine = replace(machine, network=cluster.network_gbit * 1e9 / 8)
    return machine, fit


def _with_sizes(training: TrainConfig) -> TrainConfig:
    """Return the configuration with sizes that follow the data as far as keys say them."""
    model, data = training.model, training.data
    filled = replace(
        model,
        vocab_size=model.vocab_size or data.vocab_size,
        max_positions=model.max_positions or data.seq_len,
    )
    needed = []
    if inputs_of(model) == "patches":
        needed += ["image_size", "channels"]
    if inputs_of(model) == "audio":
        needed.append("mels")
    if outputs_of(model) in ("classes", "boxes"):
        needed.append("classes")
    if missing := [name for name in needed if not getattr(filled, name)]:
        keys = " ".join(f"model.{name}=N" for name in missing)
        raise ConfigError(
            f"model.{missing[0]}=0 follows the data, which a plan does not read; set {keys}"
        )
    return replace(training, model=filled)
