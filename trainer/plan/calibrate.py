"""Measure the ranks there are, fit the time model to them, and write that down."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress

from parallel.errors import ConfigError
from parallel.runtime import Runtime
from trainer.config.hardware import ACCELERATORS, accelerator_of
from trainer.config.model import head_width_of
from trainer.config.train import TrainConfig
from trainer.plan.calibration import Calibration, write_calibration
from trainer.plan.constants import CPU_FITTED, Constants, Fit
from trainer.plan.fit_calibration import (
    collective_seconds,
    fit_rates,
    fit_steps,
    left_out_errors,
    predicted_seconds,
    step_name,
)
from trainer.plan.machine import Machine, host_cores, named_machine, nominal_cpu
from trainer.plan.measured_rates import measure_rates
from trainer.plan.measured_steps import small_jobs, step_seconds
from trainer.plan.measurements import MeasuredStep, Rates
from trainer.plan.planner import job_work
from trainer.precision import resolve_precision

OPERATIONS = 5  # kinds of single operations that are measured
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RankDevices:
    """The devices of the ranks, and what is known of them without measuring."""

    kind: str  # name in ACCELERATORS
    name: str  # as the device calls itself
    ranks_per_host: int
    machine: Machine
    constants: Constants


def calibrate(config: TrainConfig, runtime: Runtime, path: Path) -> Calibration:
    """Measure on all ranks, and write the file on the first; a collective call.

    `config` is complete. Raises ConfigError for a device without a data sheet.
    """
    precision = resolve_precision(config.precision, runtime.device)
    config = replace(config, precision=precision.name)
    devices = devices_of_ranks(runtime, precision.name)
    jobs = small_jobs(config, runtime.world_size, runtime.local_world_size)
    with _progress(OPERATIONS + len(jobs), runtime.rank == 0) as advance:
        model, samples = config.model, max(1, config.batch_size // runtime.world_size)
        block = job_work(config, precision.name).blocks[-1]
        rates = measure_rates(
            runtime,
            precision.compute,
            samples * block.length,
            (model.width, model.ffn_width),
            (samples, model.heads, block.length, head_width_of(model)),
            advance,
        )
        steps = []
        for job in jobs:
            advance(f"steps: {step_name(job)}")
            steps.append(MeasuredStep(job, step_seconds(runtime, job)))
    found = fitted(rates, steps, devices, precision.name)
    if runtime.rank == 0:
        write_calibration(path, found)
        for line in summary(found, path):
            log.info("%s", line)
    return found


def devices_of_ranks(runtime: Runtime, precision: str) -> RankDevices:
    """Return the devices of the ranks there are."""
    local = runtime.local_world_size
    if runtime.device.type == "cpu":
        machine = nominal_cpu(local, precision)
        return RankDevices("cpu", _cpu_name(), local, machine, Fit.read(CPU_FITTED).constants)
    name = torch.cuda.get_device_name(runtime.device)
    kind = accelerator_of(name)
    known = named_machine(kind, precision, local) if kind else None
    if known is None:
        raise ConfigError(
            f"a calibration replaces rates of a data sheet, and there is none here of {name} in "
            f"precision={precision}; plans are for {', '.join(ACCELERATORS)}"
        )
    memory = torch.cuda.get_device_properties(runtime.device).total_memory
    machine = replace(known, memory=float(memory), linked=local)
    return RankDevices(kind, name, local, machine, Fit.read().constants)


def _cpu_name() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return "CPU"


def fitted(
    rates: Rates, steps: Sequence[MeasuredStep], devices: RankDevices, precision: str
) -> Calibration:
    """Return the calibration that follows from what was measured.

    The error to expect is that of steps which the constants were fitted without.
    """
    machine, expected = fit_rates(rates, devices.machine, devices.constants)
    constants = fit_steps(steps, machine, expected)
    errors = [abs(error) for error in left_out_errors(steps, machine, expected)]
    fit = Fit(
        constants,
        float(np.median(errors)) if errors else 0.0,
        float(np.quantile(errors, 0.9)) if errors else 0.0,
        calibrated=True,
    )
    predicted = [predicted_seconds(step, machine, constants) for step in steps]
    measured = {
        "operations": asdict(replace(rates, collectives=[])),
        "steps": [
            {"step": step_name(step.config), "seconds": step.seconds, "fitted": seconds}
            for step, seconds in zip(steps, predicted, strict=True)
        ],
        "collectives": [
            asdict(one) | {"fitted": collective_seconds(one, machine, constants)}
            for one in rates.collectives
        ],
    }
    return Calibration(
        devices.kind,
        devices.name,
        precision,
        devices.ranks_per_host,
        host_cores(),
        replace(machine, fitted=True),
        fit,
        date.today().isoformat(),
        measured,
    )


def summary(found: Calibration, path: Path) -> list[str]:
    """Return what was found, in lines."""
    machine, constants, fit = found.machine, found.fit.constants, found.fit
    reached = machine.attention * constants.rates(machine.generation)[0]
    steps = found.measured["steps"]
    return [
        f"{found.ranks_per_host} × {found.device} in {found.precision}: products "
        f"{reached / 1e9:.3g} GFLOP/s, copies {machine.memory_bandwidth / 1e9:.3g} GB/s, "
        f"collectives {machine.link * constants.link / 1e9:.3g} GB/s and "
        f"{1e6 * constants.latency_seconds:.3g} µs",
        *(
            f"  {step['step']}: {1e3 * step['seconds']:.3g} ms, fitted {1e3 * step['fitted']:.3g}"
            for step in steps
        ),
        f"a step left out of the fit is predicted to {fit.median_error:.0%} in the median, nine of "
        f"ten to {fit.ninetieth_error:.0%}; {path}",
    ]


@contextmanager
def _progress(total: int, show: bool) -> Iterator[Callable[[str], None]]:
    """Yield a function that is told what is measured next; a bar if stderr is a terminal."""
    console = Console(stderr=True)
    if not (show and console.is_terminal):
        yield lambda title: None
        return
    with Progress(console=console, transient=True) as bar:
        task, started = bar.add_task("Measuring", total=total), False

        def advance(title: str) -> None:
            nonlocal started
            bar.update(task, advance=int(started), description=f"Measuring {title}")
            started = True

        yield advance
