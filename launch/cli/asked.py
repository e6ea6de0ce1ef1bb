"""Check what the command line asks of a plan."""

from dataclasses import dataclass, replace
from typing import Any

from hydra.core.hydra_config import HydraConfig

from conf.plan import PlanConfig, planned_training
from conf.validation.validate import find_problems
from launch.cli.devices import devices_of
from launch.cli.inputs import with_absolute_paths, with_imported_model
from launch.cli.layouts import fixed_fields, given_keys
from launch.slurm.batch_script import ranks_per_node
from parallel.errors import ConfigError
from parallel.strategy import AXES, StrategyConfig, resolve_degrees, without_degrees
from trainer.config.train import TrainConfig
from trainer.plan.layout import Layout, layout_of_job
from trainer.plan.planner import Planner
from trainer.plan.sizes import with_assumed_sizes


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
    cluster, host = config.cluster, ranks_per_node(config.cluster)
    training = with_imported_model(with_absolute_paths(planned_training(config)), given)
    training = with_assumed_sizes(training)
    training = replace(training, data=replace(training.data, path="not read"))
    asked = given_keys(given)
    named = training.strategy.auto == "no" and "strategy" in asked
    fixed = {} if named else fixed_fields(training, asked)
    checked = replace(config, **{f: getattr(training, f) for f in vars(training)})
    ranks = cluster.nodes * host
    if not named:
        checked = replace(checked, strategy=without_degrees(training.strategy), micro_batch_size=0)
    if found := find_problems(checked, ranks if named else 1):
        raise ConfigError(*found)
    devices = devices_of(cluster, config.precision, config.plan.calibration)
    if fixed and "cluster.nodes" in asked:
        _check_fixed(fixed, ranks)
    if named:
        training = replace(training, strategy=resolve_degrees(training.strategy, ranks))
    planner = devices.planner(training)
    nodes = cluster.nodes if named or "cluster.nodes" in asked else 0
    layout = layout_of_job(training) if named else None
    title = HydraConfig.get().runtime.choices.get("model") or "model"
    return Asked(config, planner, training, title, host, nodes, layout, fixed)


def _check_fixed(fixed: dict[str, Any], ranks: int) -> None:
    """Raise ConfigError if degrees that are set do not divide the ranks."""
    degrees: dict[str, Any] = {axis: fixed[axis] for axis in AXES if axis in fixed}
    rest = [axis for axis in ("replicate", "shard", *AXES) if axis not in degrees]
    if rest:
        degrees[rest[0]] = -1
    resolve_degrees(StrategyConfig(**degrees), ranks)
