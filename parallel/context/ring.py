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
from parallel.context.packed import count_before, padded_ends
from parallel.context.zigzag import Visible, zigzag_positions
from parallel.model_protocol import PackedAttention

ALL = slice(None)
Chunks = tuple[int, ...]  # of the two chunks of positions of a rank
BOTH: Chunks = (0, 1)


@dataclass(frozen=True)
class Tile:
    """The slices of local queries and of one rank's keys that attend to each other."""

    rows: slice
    columns: slice
    mask: Tensor | None = None
    causal: bool = False
    counts: tuple[Tensor, Tensor] | None = None  # rows and columns before the documents' ends


@dataclass(frozen=True)
class RingGeometry:
    """The arguments of one ring attention; see `ContextParallel.attend_global`."""

    group: dist.ProcessGroup
    key_length: int
    visible: Visible
    causal: bool
    packed: PackedAttention | None = None

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
        if self.packed is not None:
            return self._packed_tile(self.packed, rows // 2, owner)
        if self.causal:
            own, its = _causal_chunks(part, owner)
            return Tile(_chunks(own, rows), _chunks(its, keys), causal=owner == part)
        chunk = keys // 2
        starts = owner * chunk, (2 * parts - 1 - owner) * chunk
        real = sum(min(max(self.key_length - start, 0), chunk) for start in starts)
        if not real:
            return None
        device = query_BHSK.device
        positions = zigzag_positions(rows * parts, parts, part, device)
        columns = zigzag_positions(keys * parts, parts, owner, device)[:real]  # without padding
        return Tile(ALL, slice(0, real), self.visible(positions, columns))

    def _packed_tile(self, packed: PackedAttention, chunk: int, owner: int) -> Tile:
        parts, part = self.group.size(), self.group.rank()
        own, its = _causal_chunks(part, owner) if self.causal else (BOTH, BOTH)
        ends_BM = padded_ends(packed, 2 * parts * chunk)

        def counts(rank: int, chosen: Chunks) -> Tensor:
            starts = (rank * chunk, (2 * parts - 1 - rank) * chunk)
            return count_before(ends_BM, [starts[i] for i in chosen], chunk)

        causal = self.causal and owner == part
        both = counts(part, own), counts(owner, its)
        return Tile(_chunks(own, 2 * chunk), _chunks(its, 2 * chunk), None, causal, both)

    def tile_forward(
        self, tile: Tile, query_BHRK: Tensor, key_BGCK: Tensor, value_BGCK: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return a tile's output and log-sum-exp."""
        inputs = query_BHRK, key_BGCK, value_BGCK
        if self.packed is not None and tile.counts is not None:
            return self.packed.forward(*inputs, *tile.counts, tile.causal)
        return tile_forward(*inputs, tile.mask, tile.causal)

    def tile_backward(
        self,
        tile: Tile,
        grad_BHRK: Tensor,
        query_BHRK: Tensor,
        key_BGCK: Tensor,
        value_BGCK: Tensor,
        out_BHRK: Tensor,
        lse_BHR: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return a tile's query, key and value gradients, from the merged output."""
        inputs = grad_BHRK, query_BHRK, key_BGCK, value_BGCK, out_BHRK, lse_BHR
        if self.packed is not None and tile.counts is not None:
            return self.packed.backward(*inputs, *tile.counts, tile.causal)
        return tile_backward(*inputs, tile.mask, tile.causal)


def _causal_chunks(part: int, owner: int) -> tuple[Chunks, Chunks]:
    """Return which chunks of a rank's queries and of `owner`'s keys attend to each other."""
    if owner == part:
        return BOTH, BOTH
    # A lower rank's first chunk of keys precedes all local queries, its second follows
    # them; a higher rank's keys lie between the two chunks of local queries.
    return (BOTH, (0,)) if owner < part else ((1,), BOTH)


def _chunks(chosen: Chunks, length: int) -> slice:
    """Return the slice of the chosen chunks, of the two that `length` positions are."""
    return slice(chosen[0] * length // 2, (chosen[-1] + 1) * length // 2)


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
            more = ring.tile_forward(tile, query_BHSK[:, :, tile.rows], key, value)
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
                of_query, *of_keys = ring.tile_backward(
                    tile,
                    grads[0][:, :, rows],
                    query_BHSK[:, :, rows],
                    key,
                    value,
                    out_BHSK[:, :, rows],
                    lse_BHS[:, :, rows],
                )
                query_grad_BHSK[:, :, rows] += of_query
                grad_2BGTK[:, :, :, columns] = torch.stack(of_keys)
            if travelling is not None:
                grad_2BGTK = grad_2BGTK + wait_tensor(travelling)
            travelling = start_shift(grad_2BGTK, ring.group)  # the last shift is to the owner
        assert travelling is not None
        return query_grad_BHSK.to(query_BHSK.dtype), wait_tensor(travelling), None
