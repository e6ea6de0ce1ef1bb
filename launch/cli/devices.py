"""The devices that a run is planned for: those of this host, or those of a cluster."""

import difflib
import os
from dataclasses import dataclass, replace
from pathlib import Path

from conf.plan import CALIBRATION
from conf.submit import ClusterConfig
from launch.slurm.batch_script import ranks_per_node
from parallel.errors import ConfigError
from trainer.config.hardware import ACCELERATORS, accelerator_of
from trainer.config.train import TrainConfig
from trainer.plan.calibration import read_calibration
from trainer.plan.constants import CPU_FITTED, Fit
from trainer.plan.machine import CORE_PRODUCTS, GIB, Machine, named_machine, nominal_cpu
from trainer.plan.planner import Planner

UNKNOWN_LIKE = "h100"  # stands for a device without a data sheet here, of which memory alone counts


@dataclass(frozen=True)
class Devices:
    """Equal devices, the precision that runs there, and how well times are known."""

    machine: Machine
    precision: str
    fit: Fit
    known: bool = True  # whether the rates are the device's own

    def planner(self, config: TrainConfig, length: int = 0) -> Planner:
        """Return the plans of a job on these devices; `length` as in Planner."""
        return Planner(config, self.precision, self.machine, self.fit, length)


def devices_here(config: TrainConfig, world_size: int) -> Devices:
    """Return the devices of this host, as its ranks share them; loads torch."""
    import torch

    from parallel.runtime import choose_device

    local = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    if choose_device(config.device, local) == "cpu":
        known = config.precision in ("auto", *CORE_PRODUCTS)
        cluster = ClusterConfig(gpu="cpu", ranks_per_node=local)
        return devices_of(cluster, config.precision if known else "auto")
    device = torch.cuda.get_device_properties(0)
    kind, memory = accelerator_of(device.name), device.total_memory / GIB
    if kind and config.precision not in ("auto", *ACCELERATORS[kind].tflops):
        kind = ""  # it runs there, nobody says how fast
    cluster = ClusterConfig(gpu=kind or UNKNOWN_LIKE, gpus_per_node=local, memory_gib=memory)
    found = devices_of(cluster, config.precision)
    if kind:
        return found
    return replace(found, machine=replace(found.machine, title=device.name), known=False)


def devices_of(cluster: ClusterConfig, precision: str, calibration: str = CALIBRATION) -> Devices:
    """Return the devices of a cluster, by their data sheet or as they were measured.

    `calibration` is the file of `launch/plan.py calibrate`, empty = none. Raises ConfigError if the
    cluster does not say its devices, if they lack the precision, or if the file cannot be read.
    """
    if not cluster.gpu:
        known = ", ".join(ACCELERATORS)
        raise ConfigError(
            f"cluster.gpu is empty, but a plan is for one kind of device; set it to one of {known}"
        )
    precision = _precision(cluster.gpu, precision)
    host = ranks_per_node(cluster)
    calibrated = _calibrated(cluster.gpu, precision, host, calibration)
    machine, fit = calibrated or _uncalibrated(cluster.gpu, precision, host)
    if cluster.memory_gib:
        machine = replace(machine, memory=cluster.memory_gib * GIB)
    if cluster.network_gbit:
        machine = replace(machine, network=cluster.network_gbit * 1e9 / 8)
    return Devices(machine, precision, fit)


def _precision(gpu: str, precision: str) -> str:
    """Return the precision; ConfigError if the devices lack it."""
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


def _uncalibrated(gpu: str, precision: str, host: int) -> tuple[Machine, Fit]:
    """Return what data sheets say, or what the cores of another CPU have."""
    if gpu == "cpu":
        return nominal_cpu(host, precision), Fit.read(CPU_FITTED)
    found = named_machine(gpu, precision, host)
    assert found is not None, precision
    return found, Fit.read()


def _calibrated(
    gpu: str, precision: str, host: int, calibration: str
) -> tuple[Machine, Fit] | None:
    """Return what was measured on such devices; None if nothing was."""
    if not calibration:
        return None
    if not Path(calibration).exists() and calibration != CALIBRATION:
        raise ConfigError(
            f"plan.calibration={calibration} does not exist; make it with python launch/plan.py "
            f"calibrate calibration={calibration}, or set plan.calibration= to plan without it"
        )
    return read_calibration(Path(calibration), gpu, precision, host)
