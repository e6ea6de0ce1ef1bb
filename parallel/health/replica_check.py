"""Comparison of a tensor's replicas on several ranks by a digest of their bits."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.tensor import DTensor

from parallel.grad_norm import local_tensor

CHUNK = 1 << 20  # elements converted to int64 at a time
# Odd multipliers (SplitMix64, Steele et al. 2014) as signed 64-bit integers.
GOLDEN, MIXER = 0x9E3779B97F4A7C15 - 2**64, 0xBF58476D1CE4E5B9 - 2**64
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes


@dataclass(frozen=True)
class ReplicaMismatch:
    """A tensor whose replicas differ."""

    name: str
    ranks: list[int]  # those that differ from the majority; all with a replica if there is none
    copies: int  # number of replicas


def tensor_digest(tensor: Tensor, weights: Tensor) -> Tensor:
    """Return an order-dependent int64 digest of a tensor's bits; see `digest_weights`.

    A sum of products modulo 2**64 with odd factors: any change of a single element changes it.
    """
    flat = tensor.detach().contiguous().view(-1)
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    if not flat.numel():
        return total
    for part in flat.view(INTEGERS[tensor.element_size()]).split(CHUNK):
        total = total * MIXER + (part.to(torch.int64) * weights[: len(part)]).sum()
    return total


def digest_weights(device: torch.device) -> Tensor:
    """Return pseudo-random odd numbers, int64 (CHUNK,)."""
    mixed = torch.arange(1, CHUNK + 1, device=device) * GOLDEN
    mixed = (mixed ^ (mixed >> 30)) * MIXER
    return (mixed ^ (mixed >> 27)) | 1


def find_replica_mismatches(
    tensors: Mapping[str, Tensor], device: torch.device
) -> list[ReplicaMismatch]:
    """Return the tensors of all ranks whose replicas differ; a collective call.

    Every rank passes its own tensors and gets the same result. Replicas are tensors of one name, or
    shards of them with the same coordinates on all mesh axes that shard them, under any strategy.
    """
    weights = digest_weights(device)
    keys = {_tensor_key(name, tensor): name for name, tensor in tensors.items()}
    count = torch.tensor(len(tensors), device=device)
    dist.all_reduce(count, op=dist.ReduceOp.MAX)  # pipeline ranks have different numbers
    own = torch.zeros(int(count.item()), 2, dtype=torch.int64, device=device)
    if tensors:
        own[: len(keys), 0] = torch.tensor(list(keys), device=device)
        own[: len(keys), 1] = torch.stack(
            [tensor_digest(local_tensor(t), weights) for t in tensors.values()]
        )
    everyone = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, own)
    found = _find_odd_ranks(torch.stack(everyone).tolist())
    if not found:
        return []
    every: list = [None] * dist.get_world_size()
    dist.all_gather_object(every, keys)  # a name may exist on ranks of another stage only
    names = {key: name for theirs in every for key, name in theirs.items()}
    return [ReplicaMismatch(names[key], ranks, copies) for key, (ranks, copies) in found.items()]


def _find_odd_ranks(everyone: list[list[list[int]]]) -> dict[int, tuple[list[int], int]]:
    """Map keys to deviating ranks and number of replicas, from every rank's (key, digest) pairs."""
    digests: dict[int, dict[int, int]] = {}
    for rank, pairs in enumerate(everyone):
        for key, value in pairs:
            if key:
                digests.setdefault(key, {})[rank] = value
    found = {}
    for key, by_rank in digests.items():
        (usual, most), *others = Counter(by_rank.values()).most_common(2)
        if others:
            tie = others[0][1] == most
            odd = [rank for rank, value in by_rank.items() if tie or value != usual]
            found[key] = odd, len(by_rank)
    return found


def _tensor_key(name: str, tensor: Tensor) -> int:
    """Return a non-zero 63-bit hash of a tensor's name and this rank's shard coordinates."""
    part: list[tuple[str, int]] = []
    if isinstance(tensor, DTensor):
        mesh = tensor.device_mesh
        axes = zip(
            mesh.mesh_dim_names or (), mesh.get_coordinate() or (), tensor.placements, strict=True
        )
        # Not `is_shard`, which is False for the strided shards of FSDP × tensor.
        part = [(axis, place) for axis, place, how in axes if not how.is_replicate()]
    hashed = blake2b(repr((name, part)).encode(), digest_size=8).digest()
    return int.from_bytes(hashed, "little") >> 1 | 1
