"""Context parallelism: every rank has some positions of a sequence, attention sees them all.

A sequence is cut into twice as many chunks as there are ranks, and a rank has one from either end,
so that all ranks have the same work when positions see only what is before them (zig-zag, as in
Llama 3, arXiv 2407.21783, section 3.3.2).
"""

# B batch, S query positions here, T key positions here, H query heads, G key/value heads, K width
# of a head. R query and C key positions of one computation, whosever they are.

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch import distributed as dist
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right

from parallel.collectives import Gather

ALL_GATHER, RING, ULYSSES = METHODS = ("all_gather", "ring", "ulysses")

# Of positions (R,) and (C,) of the queries' and the keys' sequence: which of the keys a query may
# see, broadcastable to (B,1,R,C), or None = all.
Visible = Callable[[Tensor, Tensor], Tensor | None]

SEQUENCE_DIM = 2  # of (B,H,S,K)


def chunk_length(length: int, parts: int) -> int:
    """Positions of a chunk: two chunks per part, the last ones padded."""
    return -(-length // (2 * parts))


def zigzag(length: int, parts: int, part: int, device: torch.device | None = None) -> Tensor:
    """(2*ceil(length/(2*parts)),) int64: the positions of a part, ascending.

    They are chunks `part` and `2*parts-1-part` of 2*parts equal ones; those ≥ length are padding.
    """
    chunk = chunk_length(length, parts)
    within = torch.arange(chunk, device=device)
    return torch.cat((part * chunk + within, (2 * parts - 1 - part) * chunk + within))


def in_order(parts: Sequence[Tensor], dim: int) -> Tensor:
    """All positions in their natural order along `dim`, padding last, from the ranks' parts."""
    first, second = zip(*(part.chunk(2, dim) for part in parts), strict=True)
    return torch.cat((*first, *reversed(second)), dim)


class ContextSplit:
    """The context axis: which positions a rank has, and attention over those of all ranks."""

    def __init__(self, group: dist.ProcessGroup, method: str):
        assert method in METHODS, method
        self.group, self.method = group, method

    def positions(self, length: int, device: torch.device | None = None) -> Tensor:
        """This rank's positions of a sequence; see `zigzag`."""
        return zigzag(length, self.group.size(), self.group.rank(), device)

    def attend(
        self, query_BHSK: Tensor, key_BGTK: Tensor, value_BGTK: Tensor, key_length: int,
        visible: Visible, causal: bool,
    ) -> Tensor:  # fmt: skip
        """(B,H,S,K): attention of this rank's queries to the whole sequence of the keys.

        Queries are at this rank's positions of their sequence, keys and values at its positions of
        theirs, which has `key_length` positions and may be another; H is a multiple of G, whose
        heads serve H/G neighbours each. `visible` is asked for any query positions, padding too,
        and key positions < key_length; a query that may see nothing gets 0 and has no gradient.
        `causal`: of one sequence a query sees what is not after it, and `visible` is not asked.
        Padding must be finite, and in the gradient of the result 0 unless such a query sees
        nothing.
        """
        parts = self.group.size()
        assert key_BGTK.shape[SEQUENCE_DIM] == 2 * chunk_length(key_length, parts)
        assert query_BHSK.shape[SEQUENCE_DIM] % 2 == 0
        if parts == 1:
            rows = torch.arange(query_BHSK.shape[SEQUENCE_DIM], device=query_BHSK.device)
            seen = None if causal else rows
            return _whole(query_BHSK, key_BGTK, value_BGTK, key_length, visible, seen)
        return _by_gathering(
            self.group, query_BHSK, key_BGTK, value_BGTK, key_length, visible, causal
        )


def attention(
    query_BHRK: Tensor, key_BGCK: Tensor, value_BGCK: Tensor, mask: Tensor | None,
    causal: bool = False,
) -> Tensor:  # fmt: skip
    """torch's attention, except that a query that may see nothing gets 0 and has no gradient."""
    group = query_BHRK.shape[1] // key_BGCK.shape[1]
    if mask is None:
        return F.scaled_dot_product_attention(
            query_BHRK, key_BGCK, value_BGCK, is_causal=causal, enable_gqa=group > 1
        )
    if group > 1:  # no fused CUDA kernel takes a mask and grouped heads at once
        key_BGCK = key_BGCK.repeat_interleave(group, dim=1)
        value_BGCK = value_BGCK.repeat_interleave(group, dim=1)
    # What kernels make of a row without a key differs, NaN among it: let it see all, and drop it.
    sees = mask.any(-1, keepdim=True)
    mixed_BHRK = F.scaled_dot_product_attention(
        query_BHRK, key_BGCK, value_BGCK, attn_mask=mask | ~sees
    )
    return torch.where(sees, mixed_BHRK, 0.0)


def _whole(
    query_BHRK: Tensor, key_BGCK: Tensor, value_BGCK: Tensor, key_length: int, visible: Visible,
    rows: Tensor | None,
) -> Tensor:  # fmt: skip
    """Attention to all keys, in natural order, from queries at `rows`; None = causal, all rows."""
    if rows is None:
        return attention(query_BHRK, key_BGCK, value_BGCK, None, causal=True)
    mask = visible(rows, torch.arange(key_length, device=rows.device))
    key_BGCK, value_BGCK = key_BGCK[:, :, :key_length], value_BGCK[:, :, :key_length]
    return attention(query_BHRK, key_BGCK, value_BGCK, mask)


def _by_gathering(
    group: dist.ProcessGroup, query_BHSK: Tensor, key_BGTK: Tensor, value_BGTK: Tensor,
    key_length: int, visible: Visible, causal: bool,
) -> Tensor:  # fmt: skip
    """Every rank gathers all keys and values (arXiv 2407.21783, section 3.3.2)."""
    parts, part = group.size(), group.rank()
    both = torch.stack((key_BGTK, value_BGTK))
    gathered = Gather.apply(both, 2 * parts, group, 0).unflatten(0, (parts, 2))
    key_BGCK, value_BGCK = in_order(gathered.unbind(0), 1 + SEQUENCE_DIM).unbind(0)
    rows = query_BHSK.shape[SEQUENCE_DIM]
    if not causal:
        positions = zigzag(rows * parts, parts, part, query_BHSK.device)
        return _whole(query_BHSK, key_BGCK, value_BGCK, key_length, visible, positions)
    chunk, mixed = rows // 2, []
    chunks = zip((part, 2 * parts - 1 - part), query_BHSK.chunk(2, SEQUENCE_DIM), strict=True)
    for index, query in chunks:
        end = (index + 1) * chunk  # what is after the chunk is not even looked at
        mixed.append(
            F.scaled_dot_product_attention(
                query, key_BGCK[:, :, :end], value_BGCK[:, :, :end],
                attn_mask=causal_lower_right(chunk, end),
                enable_gqa=query.shape[1] != key_BGCK.shape[1],
            )
        )  # fmt: skip
    return torch.cat(mixed, SEQUENCE_DIM)
