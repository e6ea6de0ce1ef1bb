"""`strategy=auto`: the layout of a run, chosen by its plan; and whether a run's layout will fit."""

import logging
import math
from collections.abc import Collection
from typing import Any

from conf.validation.validate import find_problems
from launch.cli.devices import Devices
from launch.cli.layouts import (
    fixed_fields,
    legal_space,
    list_schedule,
    why_none_is_legal,
)
from launch.cli.plan_text import error_text, format_terms, layout_words
from parallel.errors import ConfigError
from parallel.strategy import axis_degrees
from trainer.checkpoint.folder import list_checkpoints
from trainer.config.hardware import ACCELERATORS
from trainer.config.train import TrainConfig
from trainer.plan.layout import Layout, layout_of_job, with_layout
from trainer.plan.machine import GIB
from trainer.plan.planner import FULL, Planner
from trainer.plan.result import Plan, Planned, plan_layouts
from trainer.plan.search import nearest
from trainer.run.plan_record import PlanRecord
from trainer.run.run_dir import load_config

SLACK = 0.1  # share by which the chosen layout may be slower than the fastest, if it is simpler
log = logging.getLogger(__name__)


def with_chosen_layout(
    config: TrainConfig,
    devices: Devices | None,
    world_size: int,
    keys: Collection[str],
    length: int = 0,
) -> TrainConfig:
    """Return a job of strategy.auto with the layout that its plan proposes, and say why.

    `devices` None = the cluster does not say which; `keys` of the command line are kept; `length`
    is the mean length of the data's sequences, 0 = that of the longest. A run
    that goes on keeps the layout that it has, with strategy.auto=once and as many ranks. Raises
    ConfigError if no layout is legal, or none fits.
    """
    fixed = fixed_fields(config, keys)
    if config.strategy.auto == "once" and (layout := _layout_of_run(config, world_size, fixed)):
        log.info("strategy=auto goes on with %s", layout_words(layout))
        return with_layout(config, layout)
    single = with_layout(config, Layout())
    planner = _known_devices(devices).planner(single, length)
    space = legal_space(planner, single, world_size, fixed)
    plan = plan_layouts(planner, space, SLACK, 0, list_schedule)
    if not plan.found.legal:
        raise ConfigError(*why_none_is_legal(single, space))
    if plan.proposed is None:
        raise ConfigError(_none_fits(planner, world_size))
    for line in _reasons(planner, plan, plan.proposed):
        log.info("%s", line)
    chosen = with_layout(config, plan.proposed.layout)
    if found := find_problems(chosen, world_size):
        raise ConfigError(*found)
    return chosen


def _known_devices(devices: Devices | None) -> Devices:
    """Return the devices; raise ConfigError if their rates are not known."""
    if devices is None:
        raise ConfigError(
            "strategy=auto plans for one kind of device, but cluster.gpu is empty; set it to one "
            f"of {', '.join(ACCELERATORS)}, or name a strategy"
        )
    if not devices.known:
        raise ConfigError(
            f"strategy=auto knows no rates of a {devices.machine.title}; measure them with python "
            "launch/plan.py calibrate, or name a strategy, e.g. strategy=fsdp"
        )
    return devices


def _layout_of_run(config: TrainConfig, world_size: int, fixed: dict[str, Any]) -> Layout | None:
    """Return the layout that the run has, if it has begun and its layout is one of these ranks."""
    if not list_checkpoints(config.run_dir):
        return None
    saved = load_config(config.run_dir)
    if math.prod(axis_degrees(saved.strategy).values()) != world_size:
        return None
    layout = layout_of_job(saved)
    same = all(getattr(layout, name) == value for name, value in fixed.items())
    return layout if same and saved.batch_size == config.batch_size else None


def _none_fits(planner: Planner, world_size: int) -> str:
    size = planner.machine.memory / GIB
    return (
        f"strategy=auto: no layout of {world_size} ranks fits into {FULL:.0%} of {size:.1f} GiB "
        f"each ({planner.machine.title}); start more ranks, or set a smaller model or batch_size"
    )


def _reasons(planner: Planner, plan: Plan, proposed: Planned) -> list[str]:
    """Return why a layout is chosen, in three lines."""
    machine, candidates = planner.machine, plan.found.candidates
    near = candidates[0].seconds * (1 + SLACK)
    simple = sum(candidate.seconds <= near for candidate in candidates)
    card, seconds = proposed.card.total / GIB, proposed.time.total
    return [
        f"strategy=auto: {layout_words(proposed.layout)}",
        f"  the simplest of {simple:,} within {SLACK:.0%} of the fastest, of {len(candidates):,} "
        f"that fit and {plan.found.legal:,} that are legal on {plan.ranks} × {machine.title}",
        f"  memory {card:.2f} of {machine.memory / GIB:.1f} GiB, step {seconds:.3g} s "
        f"{error_text(planner.fit, machine)}",
    ]


def check_memory(
    config: TrainConfig, devices: Devices, world_size: int, length: int = 0
) -> PlanRecord:
    """Return the plan of a complete job; ConfigError if its tensors do not fit into a device."""
    planner, layout = devices.planner(config, length), layout_of_job(config)
    card, machine = planner.card(layout), devices.machine
    needed, there = card.terms.total, machine.memory
    terms = format_terms(card.named().items(), GIB, "GiB")
    if needed > there and config.check_memory:
        found = planner.search(legal_space(planner, config, world_size, {})).candidates
        near = f"set {layout_words(nearest(found, layout).layout)}" if found else "start more ranks"
        raise ConfigError(
            f"the tensors of a rank need {needed / GIB:,.1f} GiB, but {machine.title} has "
            f"{there / GIB:,.1f} GiB for it: {terms}; {near}, or check_memory=false to try"
        )
    if needed > FULL * there:
        sizes = (needed / GIB, there / GIB)
        log.warning("the tensors of a rank need about %.1f of %.1f GiB: %s", *sizes, terms)
    known = devices.fit.calibrated or machine.fitted
    return PlanRecord(
        device=machine.title,
        layout=layout_words(layout),
        memory_gib=needed / GIB,
        device_gib=there / GIB,
        terms_gib={name: round(size / GIB, 4) for name, size in card.named().items() if size},
        step_seconds=planner.step(layout).total if devices.known else 0.0,
        median_error=devices.fit.median_error if known else 0.0,
        calibrated=devices.fit.calibrated,
    )
