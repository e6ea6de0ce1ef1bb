"""Activations between blocks and the metadata of each sequence; independent of ranks."""

# B batch, S sequence, D width, R rows (queries), C columns (keys).

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

Inputs = dict[str, Tensor]
# (x, memory or the target that waits for it, marks of a shortened source). Marks are (B,S,2)
# integers: the size of each vector (how many original vectors it merges; 0 = padding) and the sum
# of their positions.
Flow = tuple[Tensor, Tensor | None, Tensor | None]
# (flow after a block, metadata of the sequences by name, inputs) -> flow.
Watcher = Callable[[Flow, dict[str, "Stream"], Inputs], Flow]


class SequenceLayout(Protocol):
    """Layout of the activations between blocks: by default all positions are local.

    Parallelism replaces it: under sequence parallelism each tensor rank has a slice of them.
    """

    def part_length(self, length: int) -> int:
        """Return how many of `length` positions are local between blocks."""
        return length

    def whole(self, x_BSD: Tensor, length: int) -> Tensor:
        """All-gather the `length` positions for layers that mix them or are column-parallel."""
        return x_BSD

    def own(self, x_BSD: Tensor) -> Tensor:
        """Return the local positions of a tensor that has all of them."""
        return x_BSD

    def collected(self, x_BSD: Tensor, length: int) -> Tensor:
        """All-gather the `length` positions for a computation that every rank repeats.

        Each rank then continues with the local positions of the result (`own`).
        """
        return x_BSD

    def share(self, gradient_BSD: Tensor) -> Tensor:
        """Return this rank's contribution to the gradient of a gathered sequence.

        Every rank has the full gradient; the sum over tensor ranks must count it once.
        """
        return gradient_BSD


class FullSequence(SequenceLayout):
    """The layout in which all positions are local."""


class Context(Protocol):
    """Local positions of a sequence: all of them, unless the context axis shards sequences."""

    shares: bool
    first: bool  # first rank of the context axis

    def share(self, length: int) -> int:
        """Return the number of local positions of a sequence of `length`."""
        return length

    def positions(self, length: int, device: torch.device | None = None) -> Tensor:
        """Return the local positions of a sequence of `length`, (local length,)."""
        return torch.arange(length, device=device)

    def take(self, x: Tensor) -> Tensor:
        """Return the local positions of a tensor (B, length, …)."""
        return x

    def whole(self, x: Tensor, length: int) -> Tensor:
        """All-gather the sequence: the inverse of `take`."""
        return x

    def attend(
        self,
        query_BHSK: Tensor,
        key_BGTK: Tensor,
        value_BGTK: Tensor,
        key_length: int,
        visible: Callable,
        causal: bool,
    ) -> Tensor:
        """Return the attention of the local queries to the keys of all context ranks."""
        raise AssertionError("no ranks share this sequence")


class FullContext(Context):
    """The context in which all positions are local."""

    shares = False
    first = True


@dataclass
class Stream:
    """Metadata of one sequence; computed once per forward and shared by all blocks."""

    length: int  # local positions, of `total`
    total: int
    layout: SequenceLayout
    context: Context
    causal: bool  # position i attends to positions ≤ i only
    places_S: Tensor  # positions of the activations between blocks on this rank, for dropout
    documents_BS: Tensor | None = None  # all positions: document id; attention stays within one
    valid_BS: Tensor | None = None  # all positions, as keys: False = padding
    mask: Tensor | None = None  # `visible` of all positions; None = full, causal or sharded
    rope: tuple[Tensor, Tensor] | None = None  # cos and sin, (B or 1, S, 1, K/2)
    seeds_B: Tensor | None = None  # dropout seed of each sample
    angles: Callable[[Tensor], Any] | None = None  # positions (B,S) -> rope
    marks_BS2: Tensor | None = None  # marks of a shortened sequence; see Flow
    start: int = 0  # number of cached positions before these
    longer: "Stream | None" = None  # metadata before shortening, restored by Lengthen

    def whole(self, x_BSD: Tensor) -> Tensor:
        """All-gather the activations between blocks over the `length` positions of this rank."""
        return self.layout.whole(x_BSD, self.length)

    def marks_of(self, batch: int) -> Tensor:
        """Return the marks (B,S,2); an unshortened sequence has size 1 per vector, 0 at padding."""
        if self.marks_BS2 is not None:
            return self.marks_BS2
        positions_S = torch.arange(self.total, dtype=torch.int32, device=self.places_S.device)
        sizes_BS = torch.ones_like(positions_S).expand(batch, -1)
        if self.valid_BS is not None:
            sizes_BS = self.valid_BS.to(sizes_BS.dtype)
        return torch.stack((sizes_BS, sizes_BS * positions_S), dim=-1)

    def resized(self, length: int) -> "Stream":
        """Return a copy for a sequence resized to `length` vectors, without marks."""
        rows_S = torch.arange(length, device=self.places_S.device)
        places_S = self.layout.own(rows_S[None, :, None])[0, :, 0]
        return replace(self, length=length, total=length, places_S=places_S)

    def marked(self, marks_BS2: Tensor, dtype: torch.dtype) -> "Stream":
        """Return a copy with these marks: proportional attention by size (arXiv 2210.09461)."""
        sizes_BS, sums_BS = marks_BS2.unbind(-1)
        precise = torch.promote_types(dtype, torch.float32)
        mask = sizes_BS.to(precise).log().to(dtype)[:, None, None, :]  # -inf for padding
        positions_BS = sums_BS.to(precise) / sizes_BS.clamp(min=1)
        rope = None if self.angles is None else self.angles(positions_BS)
        return replace(self, mask=mask, rope=rope, valid_BS=sizes_BS > 0, marks_BS2=marks_BS2)

    def visible(self, rows_R: Tensor, columns_C: Tensor) -> Tensor | None:
        """Return the mask (B or 1, 1, R or 1, C), True = query attends to key; None = all do."""
        mask = None
        if self.causal:
            mask = (columns_C <= rows_R[:, None])[None]
        if self.documents_BS is not None:
            own_BR = self.documents_BS[:, rows_R.clamp(max=self.total - 1)]
            same = own_BR[:, :, None] == self.documents_BS[:, None, columns_C]
            mask = same if mask is None else same & mask
        if self.valid_BS is not None:
            valid = self.valid_BS[:, None, columns_C]
            mask = valid if mask is None else valid & mask
        return None if mask is None else mask[:, None]


class Resize:
    """Shortens or restores a sequence between two blocks, identically on every rank."""

    stream = "source"
    marks = False  # whether its output has marks
    keeps = False  # whether the full-length sequence is passed on too, in place of the memory
    restores = False  # whether it restores the original length

    def length(self, length: int, training: bool) -> int:
        """Return the sequence length after resizing `length` vectors."""
        raise NotImplementedError

    def resize(self, x_BSD: Tensor, stream: Stream, training: bool) -> tuple[Tensor, Tensor | None]:
        """Return the resized sequence, from all positions, and its marks."""
        raise NotImplementedError

    def stream_behind(self, stream: Stream, training: bool) -> Stream:
        """Return the metadata of the resized sequence, without marks."""
        return stream.resized(self.length(stream.total, training))

    def __call__(
        self, flow: Flow, stream: Stream, training: bool, cache: dict[str, Tensor]
    ) -> Flow:
        """Return the resized flow; `cache` holds this module's state during generation."""
        x_BSD, memory, _ = flow
        whole_BSD = stream.layout.collected(x_BSD, stream.length)
        whole_BSD, marks = self.resize(whole_BSD, stream, training)
        return stream.layout.own(whole_BSD), memory, marks
