"""The one device mesh of five named axes, and the groups that its users need."""

import warnings

import torch
from torch.distributed.device_mesh import DeviceMesh

from parallel.strategy import AXES, MESH_AXES, StrategyConfig, axis_degrees, world_size

# The axes whose ranks see different samples; the innermost varies fastest.
DATA_AXES = ("replicate", "shard")
# The axes whose ranks have copies of one parameter, and gradients of different data.
COPY_AXES = ("replicate", "context")


def build_mesh(strategy: StrategyConfig, device: torch.device) -> DeviceMesh:
    """Return the mesh of a resolved strategy.

    Ranks count up along AXES, the last fastest; the mesh lists the axes as MESH_AXES.
    """
    ranks = torch.arange(world_size(strategy)).view(*axis_degrees(strategy).values())
    permuted = ranks.permute(*(AXES.index(axis) for axis in MESH_AXES)).contiguous()
    return DeviceMesh(device.type, permuted, mesh_dim_names=MESH_AXES)


def data_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """replicate × shard as one axis: the ranks that share one batch. Call it once per mesh."""
    return mesh[DATA_AXES]._flatten("data")


def replica_mesh(mesh: DeviceMesh) -> DeviceMesh | None:
    """replicate × context as one axis: the ranks with copies of a parameter; None if it has one.

    Call it once per mesh.
    """
    names = tuple(axis for axis in COPY_AXES if mesh[axis].size() > 1)
    if not names:
        return None
    return mesh[names]._flatten("copies") if len(names) > 1 else mesh[names]


def fsdp_mesh(mesh: DeviceMesh, copies: DeviceMesh | None) -> DeviceMesh:
    """Return what FSDP shards over: the shard axis, behind that of the copies if there are any."""
    if copies is None:
        return mesh["shard"]
    (name,) = copies.mesh_dim_names or ()
    with warnings.catch_warnings():
        # torch means to ask for the flattened mesh itself, but has no way to put two together:
        # `_concatenate` makes its groups in an order that differs between ranks, and hangs.
        warnings.filterwarnings("ignore", message="Slicing a flattened dim")
        return mesh[(name, "shard")]
