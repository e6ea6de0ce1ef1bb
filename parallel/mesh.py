"""The one device mesh of five named axes, and the groups that its users need."""

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from parallel.config import AXES, StrategyConfig, degrees

# The axes whose ranks see different samples; the innermost varies fastest.
DATA_AXES = ("replicate", "shard")


def build_mesh(strategy: StrategyConfig, device: torch.device) -> DeviceMesh:
    """The mesh of a resolved strategy: axes (pipeline, replicate, shard, context, tensor)."""
    sizes = tuple(degrees(strategy).values())
    return init_device_mesh(device.type, sizes, mesh_dim_names=AXES)


def data_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """replicate × shard as one axis: the ranks that share one batch. Call it once per mesh."""
    return mesh[DATA_AXES]._flatten("data")


def active(mesh: DeviceMesh, axes: tuple[str, ...]) -> DeviceMesh | None:
    """The sub-mesh of those axes whose degree is above 1; None if there is none."""
    names = tuple(axis for axis in axes if mesh[axis].size() > 1)
    return mesh[names] if names else None
