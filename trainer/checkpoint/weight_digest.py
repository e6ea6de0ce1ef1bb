"""Digests of frozen weights, which no checkpoint of an adapter holds, under any layout."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from parallel.grad_norm import local_tensor
from parallel.health.replica_check import CHUNK, GOLDEN, MIXER
from parallel.parallelize import local_slices
from parallel.runtime import all_gather_objects
from trainer.config.train import ConfigError


@torch.no_grad()
def weight_digests(parameters: Mapping[str, Tensor]) -> dict[str, str]:
    """Return a digest of each full tensor by name, from the local shards of all ranks.

    A collective call. It depends on the values and their places, not on dtype or layout.
    """
    own = {}
    for name, parameter in parameters.items():
        place = local_slices(parameter)
        key = name, tuple((dim.start, dim.stop) for dim in place)
        own[key] = _part_digest(local_tensor(parameter.detach()), place, parameter.shape)
    every: dict[tuple, int] = {}  # a shard has copies on several ranks
    for found in all_gather_objects(own):
        every |= found
    totals: dict[str, int] = {}
    for (name, _), digest in every.items():
        totals[name] = (totals.get(name, 0) + digest) % 2**64
    return {name: f"{total:016x}" for name, total in totals.items()}


def _part_digest(part: Tensor, place: tuple[slice, ...], shape: torch.Size) -> int:
    """Return the digest of the elements `place` of a tensor of this shape: a sum over them."""
    total = torch.zeros((), dtype=torch.int64, device=part.device)
    if not part.numel():
        return 0
    strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    index = torch.zeros((), dtype=torch.int64, device=part.device)
    for dim, held in enumerate(place[1:], 1):
        step = torch.arange(held.start, held.stop, device=part.device) * strides[dim]
        index = index[..., None] + step
    rows = max(1, CHUNK // part[0].numel())
    for begin in range(0, len(part), rows):
        block = part[begin : begin + rows].double()
        first = place[0].start + begin
        row = torch.arange(first, first + len(block), device=part.device) * strides[0]
        places = row.view(-1, *[1] * (part.dim() - 1)) + index
        bits = block.view(torch.int64) + places * GOLDEN
        bits = (bits ^ (bits >> 30)) * MIXER
        total += ((bits ^ (bits >> 27)) * GOLDEN).sum()
    return int(total.item())


def whole_digest(tensor: Tensor) -> str:
    """Return the digest of a full tensor."""
    return f"{_part_digest(tensor, local_slices(tensor), tensor.shape) % 2**64:016x}"


def check_base(where: str, saved: Mapping[str, str], base: Mapping[str, str]) -> None:
    """Raise ConfigError unless the digests `base` are those `saved` with adapters.

    `where` is the key that names the adapters' folder, and its value.
    """
    other = [name for name, digest in saved.items() if base.get(name) != digest]
    if not other:
        return
    raise ConfigError(
        f"{where} holds adapters of another model: {other[0]} differs from the "
        f"frozen weight that they belong to, as do {len(other) - 1} of {len(saved)} more; "
        "put the old weights back where init_from says, or set init_from to them"
    )
