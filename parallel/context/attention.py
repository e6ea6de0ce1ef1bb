"""Context parallelism: positions are sharded over ranks; attention covers all of them.

`zigzag_positions` assigns the positions. Three methods with the same result: all-gather of keys
and values, ring attention, and Ulysses (all-to-all between positions and heads).
"""

# B batch, S local query positions, T local key positions, H query heads, G key/value heads,
# K width of a head; R query and C key positions of one attention call, local or not.

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional as F

from parallel.axis import ParallelAxis
from parallel.collectives import Exchange, Gather
from parallel.context.packed import attend_all_keys, attend_gathered
from parallel.context.ring import RingAttention, RingGeometry
from parallel.context.zigzag import (
    Visible,
    chunk_length,
    merge_zigzag,
    split_zigzag,
    zigzag_positions,
)
from parallel.model_protocol import Inputs, PackedAttention, ParallelizableModel

# (query positions (R,), key positions (C,)) -> what is added to the scores, (1,H,R,C).
Bias = Callable[[Tensor, Tensor], Tensor]

ALL_GATHER, RING, ULYSSES = METHODS = ("all_gather", "ring", "ulysses")

SEQUENCE_DIM = 2  # of (B,H,S,K)


class ContextParallel(ParallelAxis):
    """The context axis: a rank's positions, and attention over the positions of all ranks."""

    shares = True
    ring = RingGeometry
    splits_loss = True
    _model: ParallelizableModel

    def __init__(self, mesh: DeviceMesh, method: str):
        super().__init__(mesh)
        assert method in METHODS, method
        self.method = method
        self.first = self.group.rank() == 0

    def prepare(self, model: ParallelizableModel) -> None:
        """Make a model compute on this rank's positions of each sequence."""
        model.context, self._model = self, model

    def gather_logits(self, logits: Tensor | None, inputs: Inputs, cache: Any) -> Tensor | None:
        """Return the logits of all positions; in generation (with a cache) they are complete."""
        length = self._model.output_length(inputs)
        if logits is None or cache is not None or length is None:
            return logits
        return self.gather_sequence(logits, length)

    def local_length(self, length: int) -> int:
        """Return the number of local positions of a sequence, including padding."""
        return 2 * chunk_length(length, self.group.size())

    def take_local(self, x: Tensor) -> Tensor:
        """Return the local positions of (B, length, …); padding repeats the last position."""
        rows = self.local_positions(x.shape[1], x.device).clamp(max=x.shape[1] - 1)
        return x.index_select(1, rows)

    def gather_sequence(self, x: Tensor, length: int) -> Tensor:
        """Invert `take_local`; the backward sums the gradients of all ranks."""
        parts = self.group.size()
        gathered = Gather.apply(x.movedim(1, 0), parts * x.shape[1], self.group, 0)
        return merge_zigzag(gathered.movedim(0, 1).chunk(parts, 1), 1)[:, :length]

    def local_positions(self, length: int, device: torch.device | None = None) -> Tensor:
        """Return the local positions of a sequence; see `zigzag_positions`."""
        return zigzag_positions(length, self.group.size(), self.group.rank(), device)

    def attend_global(
        self,
        query_BHSK: Tensor,
        key_BGTK: Tensor,
        value_BGTK: Tensor,
        key_length: int,
        visible: Visible,
        causal: bool,
        bias: Bias | None = None,
        packed: PackedAttention | None = None,
    ) -> Tensor:
        """Return attention of the local queries to the full key sequence, (B,H,S,K).

        Queries are at the local positions of their sequence, keys and values at the local positions
        of theirs, which has `key_length` positions and may be a different sequence; H is a multiple
        of G, and each key/value head serves H/G consecutive query heads. `visible` is called with
        any query positions, including padding, and key positions < key_length; a fully masked query
        has output 0 and no gradient. `causal`: queries and keys are of one sequence, a query
        attends to positions up to its own, and `visible` is not called. Padding must be finite, and
        the output's gradient 0 at padding unless that query is fully masked. `bias` returns what is
        added to the scores for the same positions, (1,H,R,C); it excludes `causal` and the ring.
        `packed` replaces `visible` in self-attention, but for windows in a ring.
        """
        parts, queries = self.group.size(), query_BHSK.shape[SEQUENCE_DIM]
        assert key_BGTK.shape[SEQUENCE_DIM] == 2 * chunk_length(key_length, parts)
        assert queries % 2 == 0 and query_BHSK.shape[1] % key_BGTK.shape[1] == 0
        assert bias is None or not (causal or self.method == RING)
        if self.method == RING and parts > 1:
            both_2BGTK = torch.stack((key_BGTK, value_BGTK))
            if packed is not None and packed.window:
                packed, causal = None, False
            ring = self.ring(self.group, key_length, visible, causal, packed)
            return RingAttention.apply(query_BHSK, both_2BGTK, ring)
        hides = visible, causal, bias, packed
        if self.method == ULYSSES and parts > 1:
            both_2BGTK = _split_for_ranks(key_BGTK, value_BGTK, parts)
            return _ulysses(query_BHSK, both_2BGTK, key_length, *hides, self.group)
        return _all_gather(query_BHSK, key_BGTK, value_BGTK, key_length, *hides, self.group)


def _all_gather(
    query_BHSK: Tensor,
    key_BGTK: Tensor,
    value_BGTK: Tensor,
    key_length: int,
    visible: Visible,
    causal: bool,
    bias: Bias | None,
    packed: PackedAttention | None,
    group: dist.ProcessGroup,
) -> Tensor:
    """Return attention to the gathered keys and values."""
    both_2BGCK = _gather_keys_values(key_BGTK, value_BGTK, group)
    parts, part = group.size(), group.rank()
    if packed is not None:
        return attend_gathered(query_BHSK, both_2BGCK, packed, causal, parts, part)
    if causal and parts > 1:
        return _causal_chunks(query_BHSK, both_2BGCK, parts, part)
    rows = zigzag_positions(query_BHSK.shape[SEQUENCE_DIM] * parts, parts, part, query_BHSK.device)
    return _attend_all_keys(query_BHSK, rows, both_2BGCK, key_length, visible, causal, bias)


def _ulysses(
    query_BHSK: Tensor,
    both_2BGTK: Tensor,
    key_length: int,
    visible: Visible,
    causal: bool,
    bias: Bias | None,
    packed: PackedAttention | None,
    group: dist.ProcessGroup,
) -> Tensor:
    """Return attention with a part of the heads, and all positions, on each rank."""
    query_BHRK, both_2BGCK = _to_heads(query_BHSK, group), _to_heads(both_2BGTK, group)
    if packed is not None:
        return _to_positions(attend_all_keys(query_BHRK, both_2BGCK, packed, causal), group)
    rows = torch.arange(query_BHRK.shape[SEQUENCE_DIM], device=query_BHSK.device)
    own = None if bias is None else partial(_own_heads, bias, group)
    mixed_BHRK = _attend_all_keys(query_BHRK, rows, both_2BGCK, key_length, visible, causal, own)
    return _to_positions(mixed_BHRK, group)


def _attend_all_keys(
    query_BHRK: Tensor,
    rows_R: Tensor,
    both_2BGCK: Tensor,
    key_length: int,
    visible: Visible,
    causal: bool,
    bias: Bias | None = None,
) -> Tensor:
    """Return attention of queries at positions `rows_R` to all keys, in order of positions.

    If causal, the queries must be all those of the keys' sequence, in order.
    """
    if causal:
        return _masked_attention(query_BHRK, both_2BGCK, None, causal=True)
    columns_C = torch.arange(key_length, device=rows_R.device)
    mask, both_2BGCK = visible(rows_R, columns_C), both_2BGCK[:, :, :, :key_length]
    if bias is None:
        return _masked_attention(query_BHRK, both_2BGCK, mask)
    bias_1HRC = bias(rows_R, columns_C)
    mask = torch.ones_like(bias_1HRC[:, :1], dtype=torch.bool) if mask is None else mask
    return _masked_attention(query_BHRK, both_2BGCK, mask, bias_1HRC=bias_1HRC)


def _masked_attention(
    query_BHRK: Tensor,
    both_2BGCK: Tensor,
    mask: Tensor | None,
    causal: bool = False,
    bias_1HRC: Tensor | None = None,
) -> Tensor:
    """Return torch's attention, with output 0 and no gradient for fully masked queries."""
    key_BGCK, value_BGCK = both_2BGCK.unbind(0)
    group = query_BHRK.shape[1] // key_BGCK.shape[1]
    if mask is None:
        return F.scaled_dot_product_attention(
            query_BHRK, key_BGCK, value_BGCK, is_causal=causal, enable_gqa=group > 1
        )
    if group > 1:
        # No fused CUDA kernel supports a mask together with grouped heads: repeat them.
        key_BGCK, value_BGCK = (x.repeat_interleave(group, 1) for x in (key_BGCK, value_BGCK))
    # Kernels differ on fully masked rows, some return NaN: unmask such a row and zero its output.
    sees = mask.any(-1, keepdim=True)
    attended = mask | ~sees
    if bias_1HRC is not None:
        attended = bias_1HRC.masked_fill(~attended, -torch.inf)
    mixed_BHRK = F.scaled_dot_product_attention(
        query_BHRK, key_BGCK, value_BGCK, attn_mask=attended
    )
    return torch.where(sees, mixed_BHRK, 0.0)


def _own_heads(bias: Bias, group: dist.ProcessGroup, rows_R: Tensor, columns_C: Tensor) -> Tensor:
    """Return the bias of the heads that `_to_heads` gives this rank."""
    return bias(rows_R, columns_C).chunk(group.size(), 1)[group.rank()]


def _gather_keys_values(key_BGTK: Tensor, value_BGTK: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Gather all keys and values in order, (2,B,G,C,K) (arXiv 2407.21783, section 3.3.2)."""
    parts, both_2BGTK = group.size(), torch.stack((key_BGTK, value_BGTK))
    if parts == 1:
        return both_2BGTK
    gathered = Gather.apply(both_2BGTK, 2 * parts, group, 0).unflatten(0, (parts, 2))
    return merge_zigzag(gathered.unbind(0), 1 + SEQUENCE_DIM)


def _causal_chunks(query_BHSK: Tensor, both_2BGCK: Tensor, parts: int, part: int) -> Tensor:
    """Return causal attention of the two local chunks of queries, skipping later keys."""
    chunk, mixed = query_BHSK.shape[SEQUENCE_DIM] // 2, []
    chunks = zip((part, 2 * parts - 1 - part), query_BHSK.chunk(2, SEQUENCE_DIM), strict=True)
    for index, query in chunks:
        end = (index + 1) * chunk
        # A lower-right aligned mask, unlike `is_causal`; torch's `causal_lower_right` breaks
        # torch.compile, selective activation checkpointing and every TorchDispatchMode.
        mask = query.new_ones(1, 1, chunk, end, dtype=torch.bool).tril(end - chunk)
        mixed.append(_masked_attention(query, both_2BGCK[:, :, :, :end], mask))
    return torch.cat(mixed, SEQUENCE_DIM)


def _split_for_ranks(key_BGTK: Tensor, value_BGTK: Tensor, parts: int) -> Tensor:
    """Repeat key/value heads to the least number G' that `parts` divides, (2,B,G',T,K).

    As `parts` divides H, G' divides H too.
    """
    times = parts // math.gcd(key_BGTK.shape[1], parts)
    return torch.stack((key_BGTK, value_BGTK)).repeat_interleave(times, 2)


def _to_heads(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Exchange (…,H,S,K) for all positions of local heads (Ulysses, arXiv 2309.14509)."""
    parts = group.size()
    assert x.shape[-3] % parts == 0
    meant_for = x.unflatten(-3, (parts, -1)).movedim(-4, 0)
    return merge_zigzag(Exchange.apply(meant_for, group).unbind(0), -2)


def _to_positions(x_BHRK: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Invert `_to_heads`."""
    meant_for = torch.stack(split_zigzag(x_BHRK, group.size(), SEQUENCE_DIM))
    return Exchange.apply(meant_for, group).movedim(0, 1).flatten(1, 2)
