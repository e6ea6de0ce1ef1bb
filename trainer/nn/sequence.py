"""Activations between blocks and the metadata of each sequence; independent of ranks."""

# B batch, S sequence, D width, R rows (queries), C columns (keys).

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from trainer.nn.packed_attention import PackedAttention, VarlenKernel, pack_rows

Inputs = dict[str, Tensor]
# (x, memory or the target that waits for it, marks of a shortened source). Marks are (B,S,2)
# integers: the size of each vector (how many original vectors it merges; 0 = padding) and the sum
# of their positions.
Flow = tuple[Tensor, Tensor | None, Tensor | None]
# (flow after a block, metadata of the sequences by name, inputs) -> flow.
Sequences = dict[str, "SequenceInfo"]  # by stream: source, target
# (query positions (R,), key positions (C,)) -> what is added to the scores, (1,H,R,C).
Bias = Callable[[Tensor, Tensor], Tensor]
BlockHook = Callable[[Flow, Sequences, Inputs], Flow]


class SequenceLayout(Protocol):
    """Layout of the activations between blocks: by default all positions are local.

    Parallelism replaces it: under sequence parallelism each tensor rank has a slice of them.
    """

    def part_length(self, length: int) -> int:
        """Return how many of `length` positions are local between blocks."""
        return length

    def gather_sequence(self, x_BSD: Tensor, length: int) -> Tensor:
        """All-gather the `length` positions for layers that mix them or are column-parallel."""
        return x_BSD

    def local_positions(self, x_BSD: Tensor) -> Tensor:
        """Return the local positions of a tensor that has all of them."""
        return x_BSD

    def gather_replicated(self, x_BSD: Tensor, length: int) -> Tensor:
        """All-gather the `length` positions for a computation that every rank repeats.

        Each rank then continues with the `local_positions` of the result.
        """
        return x_BSD

    def gradient_contribution(self, gradient_BSD: Tensor) -> Tensor:
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

    def local_length(self, length: int) -> int:
        """Return the number of local positions of a sequence of `length`."""
        return length

    def local_positions(self, length: int, device: torch.device | None = None) -> Tensor:
        """Return the local positions of a sequence of `length`, (local length,)."""
        return torch.arange(length, device=device)

    def take_local(self, x: Tensor) -> Tensor:
        """Return the local positions of a tensor (B, length, …)."""
        return x

    def gather_sequence(self, x: Tensor, length: int) -> Tensor:
        """All-gather the sequence: the inverse of `take_local`."""
        return x

    def attend_global(
        self,
        query_BHSK: Tensor,
        key_BGTK: Tensor,
        value_BGTK: Tensor,
        key_length: int,
        visible: Callable,
        causal: bool,
        bias: Bias | None = None,
        packed: PackedAttention | None = None,
    ) -> Tensor:
        """Return the attention of the local queries to the keys of all context ranks."""
        raise AssertionError("no ranks share this sequence")


class FullContext(Context):
    """The context in which all positions are local."""

    shares = False
    first = True


@dataclass
class SequenceInfo:
    """Metadata of one sequence; computed once per forward and shared by all blocks."""

    length: int  # local positions, of `total`
    total: int
    layout: SequenceLayout
    context: Context
    causal: bool  # position i attends to positions ≤ i only
    positions_S: Tensor  # positions of the activations between blocks on this rank, for dropout
    documents_BS: Tensor | None = None  # all positions: document id; attention stays within one
    ends_BM: Tensor | None = None  # where the documents of each row end; see document_ends
    valid_BS: Tensor | None = None  # all positions, as keys: False = padding
    kernel: VarlenKernel | None = None  # which hides keys without a mask; None = there is none
    packed: PackedAttention | None = None  # by that kernel; None = nothing hidden, or by a mask
    mask: Tensor | None = None  # `visible` of all positions; None = full, causal, packed or sharded
    rope: tuple[Tensor, Tensor] | None = None  # cos and sin, (B or 1, S, 1, K/2)
    seeds_B: Tensor | None = None  # dropout seed of each sample
    angles: Callable[[Tensor], Any] | None = None  # positions (B,S) -> rope
    marks_BS2: Tensor | None = None  # marks of a shortened sequence; see Flow
    start: int = 0  # number of cached positions before these
    window: int = 0  # keys that a query attends to, its own the last; 0 = all before it
    windowed: "SequenceInfo | None" = None  # metadata for blocks with a sliding window
    longer: "SequenceInfo | None" = None  # metadata before shortening, restored by Lengthen
    segments_BS: Tensor | None = None  # all positions: segment id; None = all are of the first
    relative: Bias | None = None  # of the scores of self-attention
    biased_mask: Tensor | None = None  # `relative`, -inf where not visible; None = none, or sharded

    @property
    def hides_keys(self) -> bool:
        """Return whether a query may not attend to a key although it is not behind the query."""
        return self.documents_BS is not None or self.valid_BS is not None or self.window > 0

    @property
    def _can_pack(self) -> bool:
        """Return whether the kernel hides what is to be hidden, and is of use."""
        if self.kernel is None or self.start > 0 or self.relative is not None:
            return False
        if self.valid_BS is not None:
            return False
        if self.documents_BS is not None:
            return self.ends_BM is not None
        return self.window > 0 or (self.causal and self.context.shares)

    def hide_keys(self, batch: int) -> None:
        """Set how attention hides keys of `batch` samples: packed documents, or a mask."""
        self.packed = self.mask = self.biased_mask = None
        device, total = self.positions_S.device, self.total
        if self._can_pack:
            assert self.kernel is not None
            ends_BM = self.ends_BM
            if ends_BM is None:
                ends_BM = torch.full((batch, 1), total, device=device)
            self.packed = pack_rows(ends_BM, total, self.window, self.kernel)
        elif not self.context.shares and (self.hides_keys or self.relative is not None):
            columns_C = torch.arange(self.start + total, device=device)
            rows_R = columns_C[self.start :]
            if self.hides_keys:
                self.mask = self.visible_mask(rows_R, columns_C)
            if self.relative is not None:
                self.biased_mask = self.add_bias(rows_R, columns_C)

    def gather_local(self, x_BSD: Tensor) -> Tensor:
        """All-gather the activations between blocks over the `length` positions of this rank."""
        return self.layout.gather_sequence(x_BSD, self.length)

    def marks_of(self, batch: int) -> Tensor:
        """Return the marks (B,S,2); an unshortened sequence has size 1 per vector, 0 at padding."""
        if self.marks_BS2 is not None:
            return self.marks_BS2
        positions_S = torch.arange(self.total, dtype=torch.int32, device=self.positions_S.device)
        sizes_BS = torch.ones_like(positions_S).expand(batch, -1)
        if self.valid_BS is not None:
            sizes_BS = self.valid_BS.to(sizes_BS.dtype)
        return torch.stack((sizes_BS, sizes_BS * positions_S), dim=-1)

    def with_length(self, length: int) -> "SequenceInfo":
        """Return a copy for a sequence resized to `length` vectors, without marks."""
        rows_S = torch.arange(length, device=self.positions_S.device)
        places_S = self.layout.local_positions(rows_S[None, :, None])[0, :, 0]
        return replace(
            self, length=length, total=length, positions_S=places_S, ends_BM=None, packed=None
        )

    def with_marks(self, marks_BS2: Tensor, dtype: torch.dtype) -> "SequenceInfo":
        """Return a copy with these marks: proportional attention by size (arXiv 2210.09461)."""
        sizes_BS, sums_BS = marks_BS2.unbind(-1)
        precise = torch.promote_types(dtype, torch.float32)
        mask = sizes_BS.to(precise).log().to(dtype)[:, None, None, :]  # -inf for padding
        positions_BS = sums_BS.to(precise) / sizes_BS.clamp(min=1)
        rope = None if self.angles is None else self.angles(positions_BS)
        return replace(
            self, mask=mask, packed=None, rope=rope, valid_BS=sizes_BS > 0, marks_BS2=marks_BS2
        )

    def add_bias(self, rows_R: Tensor, columns_C: Tensor) -> Tensor:
        """Return the relative bias (B or 1, H, R, C), -inf where a query does not see a key."""
        assert self.relative is not None
        bias_1HRC, mask = self.relative(rows_R, columns_C), self.visible_mask(rows_R, columns_C)
        return bias_1HRC if mask is None else bias_1HRC.masked_fill(~mask, -torch.inf)

    def visible_mask(self, rows_R: Tensor, columns_C: Tensor) -> Tensor | None:
        """Return the mask (B or 1, 1, R or 1, C), True = query attends to key; None = all do."""
        mask = None
        if self.causal:
            mask = (columns_C <= rows_R[:, None])[None]
        if self.window:
            near = (columns_C > rows_R[:, None] - self.window)[None]
            mask = near if mask is None else near & mask
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
    # whether the full-length sequence is passed on too, in place of the memory
    keeps_full_sequence = False
    restores_length = False  # whether it restores the original length

    def output_length(self, length: int, training: bool) -> int:
        """Return the sequence length after resizing `length` vectors."""
        raise NotImplementedError

    def resize_sequence(
        self, x_BSD: Tensor, stream: SequenceInfo, training: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Return the resized sequence, from all positions, and its marks."""
        raise NotImplementedError

    def sequence_after(self, stream: SequenceInfo, training: bool) -> SequenceInfo:
        """Return the metadata of the resized sequence, without marks."""
        return stream.with_length(self.output_length(stream.total, training))

    def __call__(
        self, flow: Flow, stream: SequenceInfo, training: bool, cache: dict[str, Tensor]
    ) -> Flow:
        """Return the resized flow; `cache` holds this module's state during generation."""
        x_BSD, memory, _ = flow
        whole_BSD = stream.layout.gather_replicated(x_BSD, stream.length)
        whole_BSD, marks = self.resize_sequence(whole_BSD, stream, training)
        return stream.layout.local_positions(whole_BSD), memory, marks
