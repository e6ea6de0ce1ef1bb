"""The device mesh of five named axes, and the submeshes derived from it."""

import warnings

import torch
from torch.distributed.device_mesh import DeviceMesh

from parallel.strategy import AXES, MESH_AXES, StrategyConfig, axis_degrees, world_size

# The axes whose ranks see different samples; the innermost varies fastest.
DATA_AXES = ("replicate", "shard")
# The axes whose ranks hold replicas of a parameter, with gradients of different data.
COPY_AXES = ("replicate", "context")


def build_mesh(strategy: StrategyConfig, device: torch.device) -> DeviceMesh:
    """Build the mesh of a resolved strategy.

    Ranks are numbered along AXES, the last axis fastest; the mesh dims are ordered as MESH_AXES.
    """
    ranks = torch.arange(world_size(strategy)).view(*axis_degrees(strategy).values())
    permuted = ranks.permute(*(AXES.index(axis) for axis in MESH_AXES)).contiguous()
    return DeviceMesh(device.type, permuted, mesh_dim_names=MESH_AXES)


def data_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """Flatten replicate × shard, the ranks with different samples; call it once per mesh."""
    return mesh[DATA_AXES]._flatten("data")


def replica_mesh(mesh: DeviceMesh) -> DeviceMesh | None:
    """Flatten replicate × context, the replicas of a parameter; None if their degree is 1.

    Call it once per mesh.
    """
    names = tuple(axis for axis in COPY_AXES if mesh[axis].size() > 1)
    if not names:
        return None
    return mesh[names]._flatten("copies") if len(names) > 1 else mesh[names]


def fsdp_mesh(mesh: DeviceMesh, copies: DeviceMesh | None) -> DeviceMesh:
    """Return FSDP's mesh: (shard), or (replicas, shard) for hybrid sharding."""
    if copies is None:
        return mesh["shard"]
    (name,) = copies.mesh_dim_names or ()
    with warnings.catch_warnings():
        # torch recommends slicing the flattened mesh itself, but offers no way to combine two:
        # `_concatenate` creates its groups in an order that differs between ranks, and hangs.
        warnings.filterwarnings("ignore", message="Slicing a flattened dim")
        return mesh[(name, "shard")]
