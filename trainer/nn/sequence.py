"""Activations between blocks, and the facts of each sequence that a block needs; knows no ranks."""

# B batch, S sequence, D width, R rows (queries), C columns (keys).

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

Inputs = dict[str, Tensor]
# x, then the memory or the stream that waits for it, then the marks of a source that is shortened:
# (B,S,2) whole numbers, of each vector its size (how many it stands for; 0 = padding) and the sum
# of their positions.
Flow = tuple[Tensor, Tensor | None, Tensor | None]
# (the flow behind a block, what is known of the sequences, inputs) -> the flow.
Watcher = Callable[[Flow, dict[str, "Stream"], Inputs], Flow]


class SequenceLayout(Protocol):
    """How much of a sequence flows between blocks: all of it, unless parallelism gives another.

    Under sequence parallelism that is a part of its positions.
    """

    def part_length(self, length: int) -> int:
        """Return how many of `length` positions flow between blocks."""
        return length

    def whole(self, x_BSD: Tensor, length: int) -> Tensor:
        """Return all `length` positions, for layers that mix them or are split by columns."""
        return x_BSD

    def own(self, x_BSD: Tensor) -> Tensor:
        """Those of all positions that flow here."""
        return x_BSD

    def collected(self, x_BSD: Tensor, length: int) -> Tensor:
        """Return all `length` positions, for what every rank does alike and then takes its `own`
        of.
        """
        return x_BSD

    def share(self, gradient_BSD: Tensor) -> Tensor:
        """Return what this rank adds to the gradient of a `whole`, where every rank knows all of
        it.
        """
        return gradient_BSD


class FullSequence(SequenceLayout):
    """The layout where no rank has a part of a sequence."""


class Context(Protocol):
    """Which positions of a sequence are here: all, unless ranks share sequences (context axis)."""

    shares: bool
    first: bool  # of the ranks that share a sequence

    def share(self, length: int) -> int:
        """Return how many of `length` positions are here."""
        return length

    def positions(self, length: int, device: torch.device | None = None) -> Tensor:
        """(share,): which they are."""
        return torch.arange(length, device=device)

    def take(self, x: Tensor) -> Tensor:
        """Return the local rows of (B, length, …)."""
        return x

    def whole(self, x: Tensor, length: int) -> Tensor:
        """Undoes `take`."""
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
        """Attention from the queries that are here to all keys, where they are shared."""
        raise AssertionError("no ranks share this sequence")


class FullContext(Context):
    """The context where no ranks share a sequence."""

    shares = False
    first = True


@dataclass
class Stream:
    """Facts of one sequence that a block needs; computed once per forward, shared by all blocks."""

    length: int  # positions that are here, of `total`
    total: int
    layout: SequenceLayout
    context: Context
    causal: bool  # position i sees positions ≤ i only
    places_S: Tensor  # positions of what flows between blocks here; dropout's masks follow them
    documents_BS: Tensor | None = None  # of all positions: those of one document see each other
    valid_BS: Tensor | None = None  # of all positions, as keys: False = padding
    mask: Tensor | None = None  # `visible` for all positions; None = all (or causal), or shared
    rope: tuple[Tensor, Tensor] | None = None  # cos and sin, (B or 1, S, 1, K/2)
    seeds_B: Tensor | None = None  # dropout seed of each sample
    angles: Callable[[Tensor], Any] | None = None  # positions (B,S) -> rope
    marks_BS2: Tensor | None = None  # of a sequence that has been shortened; see Flow
    start: int = 0  # positions in front of these, which a cache remembers
    longer: "Stream | None" = None  # what it was before it was shortened, to become that again

    def whole(self, x_BSD: Tensor) -> Tensor:
        """Return what flows between blocks, at all positions that are here."""
        return self.layout.whole(x_BSD, self.length)

    def marks_of(self, batch: int) -> Tensor:
        """Return the marks of a sequence, also before it is shortened."""
        if self.marks_BS2 is not None:
            return self.marks_BS2
        positions_S = torch.arange(self.total, dtype=torch.int32, device=self.places_S.device)
        sizes_BS = torch.ones_like(positions_S).expand(batch, -1)
        if self.valid_BS is not None:
            sizes_BS = self.valid_BS.to(sizes_BS.dtype)
        return torch.stack((sizes_BS, sizes_BS * positions_S), dim=-1)

    def resized(self, length: int) -> "Stream":
        """Return the stream of a sequence that has `length` vectors now, and no marks."""
        rows_S = torch.arange(length, device=self.places_S.device)
        places_S = self.layout.own(rows_S[None, :, None])[0, :, 0]
        return replace(self, length=length, total=length, places_S=places_S)

    def marked(self, marks_BS2: Tensor, dtype: torch.dtype) -> "Stream":
        """Return the same with these marks: attention weighs vectors by their size (arXiv
        2210.09461).
        """
        sizes_BS, sums_BS = marks_BS2.unbind(-1)
        precise = torch.promote_types(dtype, torch.float32)
        mask = sizes_BS.to(precise).log().to(dtype)[:, None, None, :]  # of padding -inf
        positions_BS = sums_BS.to(precise) / sizes_BS.clamp(min=1)
        rope = None if self.angles is None else self.angles(positions_BS)
        return replace(self, mask=mask, rope=rope, valid_BS=sizes_BS > 0, marks_BS2=marks_BS2)

    def visible(self, rows_R: Tensor, columns_C: Tensor) -> Tensor | None:
        """(B or 1, 1, R or 1, C), True = this row may see that column; None = all may all."""
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
    """A module that shortens a sequence (or restores it) between two blocks.

    The same on every rank.
    """

    stream = "source"
    marks = False  # whether marks flow behind it
    keeps = False  # whether the sequence as it was flows on too, in the memory's place
    restores = False  # whether it makes the sequence as long again as it was

    def length(self, length: int, training: bool) -> int:
        """Return how many of `length` vectors are left."""
        raise NotImplementedError

    def resize(self, x_BSD: Tensor, stream: Stream, training: bool) -> tuple[Tensor, Tensor | None]:
        """Return the vectors that are left of all, and their marks."""
        raise NotImplementedError

    def stream_behind(self, stream: Stream, training: bool) -> Stream:
        """Return what is known of the sequence behind it, but for its marks."""
        return stream.resized(self.length(stream.total, training))

    def __call__(
        self, flow: Flow, stream: Stream, training: bool, cache: dict[str, Tensor]
    ) -> Flow:
        """Return the flow behind it; `cache` is its own, while a sequence is written."""
        x_BSD, memory, _ = flow
        whole_BSD = stream.layout.collected(x_BSD, stream.length)
        whole_BSD, marks = self.resize(whole_BSD, stream, training)
        return stream.layout.own(whole_BSD), memory, marks
