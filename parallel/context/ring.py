"""Ring attention (arXiv 2310.01889): keys and values are passed around a ring of ranks.

A rank holds its own keys and values, one other shard and the one being received. The backward
passes them around once more, with their gradients, which end at the owner of the keys and values.
"""

# B batch, S local query positions, T local key positions, H query heads, G key/value heads,
# K width of a head; 2 stands for key and value.

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from parallel.collectives import start_shift, wait_tensor
from parallel.context.block_attention import (
    accumulation_dtype,
    merge_tile_,
    tile_backward,
    tile_forward,
)
from parallel.context.zigzag import Visible, zigzag_positions

ALL = slice(None)


@dataclass(frozen=True)
class Tile:
    """The slices of local queries and of one rank's keys that attend to each other."""

    rows: slice
    columns: slice
    mask: Tensor | None = None
    causal: bool = False


@dataclass(frozen=True)
class RingGeometry:
    """The arguments of one ring attention; see `ContextParallel.attend_global`."""

    group: dist.ProcessGroup
    key_length: int
    visible: Visible
    causal: bool

    def iterate_owners(self, own: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yield (owner, its tensor) of every rank, this one first, while the next is in flight."""
        parts, held = self.group.size(), own
        for step in range(parts):
            arriving = start_shift(held, self.group) if step < parts - 1 else None
            yield (self.group.rank() - step) % parts, held
            if arriving is not None:
                held = wait_tensor(arriving)

    def tile_for_owner(self, query_BHSK: Tensor, keys: int, owner: int) -> Tile | None:
        """Return the tile of local queries and `owner`'s keys; None if the keys are all padding."""
        parts, part, rows = self.group.size(), self.group.rank(), query_BHSK.shape[2]
        if self.causal:
            if owner == part:
                return Tile(ALL, ALL, causal=True)
            # A lower rank's first chunk of keys precedes all local queries, its second follows
            # them; a higher rank's keys lie between the two chunks of local queries.
            half = slice(0, keys // 2) if owner < part else slice(rows // 2, rows)
            return Tile(ALL, half) if owner < part else Tile(half, ALL)
        chunk = keys // 2
        starts = owner * chunk, (2 * parts - 1 - owner) * chunk
        real = sum(min(max(self.key_length - start, 0), chunk) for start in starts)
        if not real:
            return None
        device = query_BHSK.device
        positions = zigzag_positions(rows * parts, parts, part, device)
        columns = zigzag_positions(keys * parts, parts, owner, device)[:real]  # without padding
        return Tile(ALL, slice(0, real), self.visible(positions, columns))


class RingAttention(torch.autograd.Function):
    """Attention of (B,H,S,K) queries to the (2,B,G,T,K) keys and values of all ranks."""

    @staticmethod
    def forward(ctx: Any, query_BHSK: Tensor, own_2BGTK: Tensor, ring: RingGeometry) -> Tensor:
        dtype = accumulation_dtype(query_BHSK.dtype)
        out_BHSK = torch.zeros_like(query_BHSK, dtype=dtype)
        lse_BHS = out_BHSK.new_full(out_BHSK.shape[:-1], -torch.inf)
        for owner, held_2BGTK in ring.iterate_owners(own_2BGTK):
            tile = ring.tile_for_owner(query_BHSK, held_2BGTK.shape[3], owner)
            if tile is None:
                continue
            key, value = held_2BGTK[:, :, :, tile.columns].unbind(0)
            more = tile_forward(query_BHSK[:, :, tile.rows], key, value, tile.mask, tile.causal)
            merge_tile_(out_BHSK[:, :, tile.rows], lse_BHS[:, :, tile.rows], *more)
        result_BHSK = out_BHSK.to(query_BHSK.dtype)
        ctx.save_for_backward(query_BHSK, own_2BGTK, result_BHSK, lse_BHS)
        ctx.ring = ring
        return result_BHSK

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query_BHSK, own_2BGTK, out_BHSK, lse_BHS = ctx.saved_tensors
        ring, dtype = ctx.ring, accumulation_dtype(query_BHSK.dtype)
        query_grad_BHSK = torch.zeros_like(query_BHSK, dtype=dtype)
        travelling: Tensor | None = None
        for owner, held_2BGTK in ring.iterate_owners(own_2BGTK):
            # In the dtype of the keys, as a reduce-scatter would sum them.
            grad_2BGTK = torch.zeros_like(held_2BGTK)
            tile = ring.tile_for_owner(query_BHSK, held_2BGTK.shape[3], owner)
            if tile is not None:
                rows, columns = tile.rows, tile.columns
                key, value = held_2BGTK[:, :, :, columns].unbind(0)
                of_query, *of_keys = tile_backward(
                    grads[0][:, :, rows],
                    query_BHSK[:, :, rows],
                    key,
                    value,
                    out_BHSK[:, :, rows],
                    lse_BHS[:, :, rows],
                    tile.mask,
                    tile.causal,
                )
                query_grad_BHSK[:, :, rows] += of_query
                grad_2BGTK[:, :, :, columns] = torch.stack(of_keys)
            if travelling is not None:
                grad_2BGTK = grad_2BGTK + wait_tensor(travelling)
            travelling = start_shift(grad_2BGTK, ring.group)  # the last shift is to the owner
        assert travelling is not None
        return query_grad_BHSK.to(query_BHSK.dtype), wait_tensor(travelling), None
