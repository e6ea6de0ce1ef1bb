"""Zigzag assignment of a sequence's positions to ranks: one chunk from either end.

It balances the ranks' work under a causal mask (Llama 3, arXiv 2407.21783, section 3.3.2).
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# (query positions (R,), key positions (C,)) -> bool mask broadcastable to (B,1,R,C), True = the
# query attends to the key; None = every query attends to every key.
Visible = Callable[[Tensor, Tensor], Tensor | None]


def chunk_length(length: int, parts: int) -> int:
    """Return the positions per chunk: two chunks per rank, the sequence padded at its end."""
    return -(-length // (2 * parts))


def zigzag_positions(
    length: int, parts: int, part: int, device: torch.device | None = None
) -> Tensor:
    """Return the positions of rank `part`, ascending, int64 (2*ceil(length/(2*parts)),).

    They are chunks `part` and `2*parts-1-part` of 2*parts equal ones; those ≥ length are padding.
    """
    chunk = chunk_length(length, parts)
    within = torch.arange(chunk, device=device)
    return torch.cat((part * chunk + within, (2 * parts - 1 - part) * chunk + within))


def merge_zigzag(parts: Sequence[Tensor], dim: int) -> Tensor:
    """Concatenate the ranks' shards along `dim` in natural order of positions, padding last."""
    first, second = zip(*(part.chunk(2, dim) for part in parts), strict=True)
    return torch.cat((*first, *reversed(second)), dim)


def split_zigzag(whole: Tensor, parts: int, dim: int) -> list[Tensor]:
    """Invert `merge_zigzag`; 2*parts must divide the size of `dim`."""
    chunks = whole.chunk(2 * parts, dim)
    return [torch.cat((chunks[part], chunks[-1 - part]), dim) for part in range(parts)]
