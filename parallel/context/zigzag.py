"""Which positions of a sequence a rank has: a chunk from either end.

So that all ranks have the same work when positions see only what is before them (Llama 3, arXiv
2407.21783, section 3.3.2).
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# Of positions (R,) and (C,) of the queries' and the keys' sequence: which of the keys a query may
# see, broadcastable to (B,1,R,C), or None = all.
Visible = Callable[[Tensor, Tensor], Tensor | None]


def chunk_length(length: int, parts: int) -> int:
    """Positions of a chunk: two chunks per part, the last ones padded."""
    return -(-length // (2 * parts))


def zigzag_positions(
    length: int, parts: int, part: int, device: torch.device | None = None
) -> Tensor:
    """(2*ceil(length/(2*parts)),) int64: the positions of a part, ascending.

    They are chunks `part` and `2*parts-1-part` of 2*parts equal ones; those ≥ length are padding.
    """
    chunk = chunk_length(length, parts)
    within = torch.arange(chunk, device=device)
    return torch.cat((part * chunk + within, (2 * parts - 1 - part) * chunk + within))


def merge_zigzag(parts: Sequence[Tensor], dim: int) -> Tensor:
    """Return the ranks' parts in natural order of positions along `dim`, padding last."""
    first, second = zip(*(part.chunk(2, dim) for part in parts), strict=True)
    return torch.cat((*first, *reversed(second)), dim)


def split_zigzag(whole: Tensor, parts: int, dim: int) -> list[Tensor]:
    """Undoes `merge_zigzag`: every rank's part along `dim`, whose size 2*parts divides."""
    chunks = whole.chunk(2 * parts, dim)
    return [torch.cat((chunks[part], chunks[-1 - part]), dim) for part in range(parts)]
