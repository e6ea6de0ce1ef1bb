"""Packed documents over the positions of context ranks: how many positions come before each end.

Documents are runs of positions, and so are their parts on a rank, whose positions ascend.
"""

# B batch, M documents of a row, S local query positions, T local key positions, C key positions
# of all ranks, H query heads, G key/value heads, K width of a head; 2 stands for key and value.

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

from parallel.model_protocol import PackedAttention


def padded_ends(packed: PackedAttention, length: int) -> Tensor:
    """Return the documents' ends (B,M), the padding of the sequence to `length` the last of all."""
    return F.pad(packed.ends_BM, (0, 1), value=length)


def count_before(ends_BM: Tensor, starts: Iterable[int], chunk: int) -> Tensor:
    """Return how many positions of the chunks that begin at `starts` are before each end, (B,M)."""
    counts = [(ends_BM - start).clamp(0, chunk) for start in starts]
    return torch.stack(counts).sum(0)


def attend_all_keys(
    query_BHSK: Tensor, both_2BGCK: Tensor, packed: PackedAttention, causal: bool
) -> Tensor:
    """Return attention of all queries to all keys, both in order of positions."""
    key_BGCK, value_BGCK = both_2BGCK.unbind(0)
    ends_BM = padded_ends(packed, key_BGCK.shape[2])
    return packed.forward(query_BHSK, key_BGCK, value_BGCK, ends_BM, ends_BM, causal)[0]


def attend_gathered(
    query_BHSK: Tensor,
    both_2BGCK: Tensor,
    packed: PackedAttention,
    causal: bool,
    parts: int,
    part: int,
) -> Tensor:
    """Return attention of a rank's queries to all keys; if causal, up to the end of each chunk."""
    key_BGCK, value_BGCK = both_2BGCK.unbind(0)
    chunk, ends_BM = query_BHSK.shape[2] // 2, padded_ends(packed, key_BGCK.shape[2])
    starts, mixed = [part * chunk, (2 * parts - 1 - part) * chunk], []
    if not causal:
        rows_BM = count_before(ends_BM, starts, chunk)
        return packed.forward(query_BHSK, key_BGCK, value_BGCK, rows_BM, ends_BM, False)[0]
    for start, query_BHRK in zip(starts, query_BHSK.chunk(2, 2), strict=True):
        end = start + chunk
        keys, values = key_BGCK[:, :, :end], value_BGCK[:, :, :end]
        rows_BM, columns_BM = count_before(ends_BM, [start], chunk), ends_BM.clamp(max=end)
        mixed.append(packed.forward(query_BHRK, keys, values, rows_BM, columns_BM, True)[0])
    return torch.cat(mixed, 2)
