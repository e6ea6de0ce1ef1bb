"""The devices that a run is planned for: those of this host, or those of a cluster."""

import os
from dataclasses import dataclass, replace

from conf.submit import ClusterConfig
from launch.slurm.batch_script import ranks_per_node
from trainer.config.hardware import accelerator_of
from trainer.config.train import TrainConfig
from trainer.plan.constants import Fit
from trainer.plan.machine import GIB, Machine, named_machine, nominal_cpu
from trainer.plan.planner import Planner

UNKNOWN_LIKE = "h100"  # stands for a device without a data sheet here, of which memory alone counts


@dataclass(frozen=True)
class Devices:
    """Equal devices, the precision that runs there, and how well times are known."""

    machine: Machine
    precision: str
    fit: Fit
    known: bool = True  # whether the rates are the device's own

    def planner(self, config: TrainConfig) -> Planner:
        """Return the plans of a job on these devices."""
        return Planner(config, self.precision, self.machine, self.fit)


def devices_here(config: TrainConfig, world_size: int) -> Devices:
    """Return the devices of this host, as its ranks share them; loads torch."""
    import torch

    from parallel.runtime import choose_device

    local = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    precision = config.precision
    if choose_device(config.device, local) == "cpu":
        precision = "fp32" if precision == "auto" else precision
        return Devices(nominal_cpu(local), precision, Fit.read())
    precision = "bf16" if precision == "auto" else precision
    device = torch.cuda.get_device_properties(0)
    kind, memory = accelerator_of(device.name), device.total_memory / GIB
    found = named_machine(kind, precision, local, memory) if kind else None
    if found:
        return Devices(found, precision, Fit.read())
    like = named_machine(UNKNOWN_LIKE, precision, local, memory)
    assert like is not None, precision  # it has peaks of all precisions
    return Devices(replace(like, title=device.name), precision, Fit.read(), known=False)


def devices_of(cluster: ClusterConfig, config: TrainConfig) -> Devices | None:
    """Return the devices of a cluster; None if it does not say which."""
    if not cluster.gpu:
        return None
    host, precision = ranks_per_node(cluster), config.precision
    if cluster.gpu == "cpu":
        precision = "fp32" if precision == "auto" else precision
        return Devices(nominal_cpu(host), precision, Fit.read())
    if precision == "auto":
        precision = "bf16"
    memory, network = cluster.memory_gib, cluster.network_gbit
    found = named_machine(cluster.gpu, precision, host, memory, network)
    return Devices(found, precision, Fit.read()) if found else None
