"""Sequence reduction: merge, pool or drop vectors between blocks."""

# B batch, S sequence, D width; A and C: the two halves of a sequence between which it is merged;
# G groups of K adjacent positions.

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from trainer.nn.layers import random_bits
from trainer.nn.sequence import Flow, Resize, SequenceInfo


class MergeTokens(Resize):
    """Token merging (arXiv 2210.09461): merge up to `r` vectors into the most similar one.

    It runs between blocks and compares the vectors themselves instead of attention's keys: keys
    are sharded over the tensor axis, and the ranks would merge differently. Vectors at even
    positions are compared with those at odd positions; a merged vector is the mean of the original
    vectors. A sample's merges depend on its own valid vectors alone, so that padding has no effect.
    `kept`: number of leading vectors that are never merged (a class token).
    """

    marks = True

    def __init__(self, r: int, kept: int):
        self.r, self.kept = r, kept

    def output_length(self, length: int, training: bool) -> int:
        return length - min(self.r, (length - self.kept) // 2)

    def resize_sequence(
        self, x_BSD: Tensor, stream: SequenceInfo, training: bool
    ) -> tuple[Tensor, Tensor]:
        marks_BS2 = stream.marks_of(len(x_BSD))
        length = self.output_length(x_BSD.shape[1], training)
        if length == x_BSD.shape[1]:
            return x_BSD, marks_BS2
        slot_BS = self._merge_slots(x_BSD.detach(), marks_BS2[..., 0] > 0, length)
        precise = torch.promote_types(x_BSD.dtype, torch.float32)
        sizes_BS1 = marks_BS2[..., :1].to(precise)
        total_BSD = _sum_by_slot(x_BSD.to(precise) * sizes_BS1, slot_BS, length)
        marks = _sum_by_slot(marks_BS2, slot_BS, length)
        mean_BSD = total_BSD / marks[..., :1].to(precise).clamp(min=1)
        return mean_BSD.to(x_BSD.dtype), marks

    @torch.no_grad()
    def _merge_slots(self, x_BSD: Tensor, valid_BS: Tensor, length: int) -> Tensor:
        """Return the output index of each vector (B,S); `length` = dropped (surplus padding)."""
        kept = self.kept
        unit_BSD = F.normalize(x_BSD[:, kept:], dim=-1)
        valid = valid_BS[:, kept:]
        scores_BAC = unit_BSD[:, ::2] @ unit_BSD[:, 1::2].mT
        scores_BAC = scores_BAC.masked_fill(~valid[:, None, 1::2], -torch.inf)
        best_BA, nearest_BA = scores_BAC.max(-1)
        best_BA = best_BA.masked_fill(~valid[:, ::2], -torch.inf)
        rank_BA = best_BA.argsort(dim=-1, descending=True, stable=True).argsort(-1)
        merges_B1 = (valid.sum(1, keepdim=True) // 2).clamp(max=self.r)
        merged_BA = rank_BA < merges_B1
        merged_BS = torch.zeros_like(valid_BS)
        merged_BS[:, kept::2] = merged_BA
        retained_BS = valid_BS & ~merged_BS
        slot_BS = torch.where(retained_BS, retained_BS.cumsum(1) - 1, length)
        target_BA = slot_BS[:, kept + 1 :: 2].gather(1, nearest_BA)
        slot_BS[:, kept::2] = torch.where(merged_BA, target_BA, slot_BS[:, kept::2])
        return slot_BS


class PoolImage(Resize):
    """Average-pool squares of patches, once (as in Funnel-Transformer, arXiv 2006.03236).

    The image is `side` × `side` patches; the last squares of a row or column may be smaller.
    `kept`: number of leading vectors that are not pooled (a class token).
    """

    def __init__(self, stride: int, side: int, kept: int):
        self.stride, self.side, self.kept = stride, side, kept

    def output_length(self, length: int, training: bool) -> int:
        return self.kept + (-(-self.side // self.stride)) ** 2

    def resize_sequence(
        self, x_BSD: Tensor, stream: SequenceInfo, training: bool
    ) -> tuple[Tensor, None]:
        first_BSD, grid = x_BSD[:, : self.kept], x_BSD[:, self.kept :].mT
        grid = grid.unflatten(-1, (self.side, self.side))
        pooled = F.avg_pool2d(grid, self.stride, ceil_mode=True, count_include_pad=False)
        return torch.cat((first_BSD, pooled.flatten(2).mT), dim=1), None


class PoolText(Resize):
    """Average-pool every `stride` vectors of a source, once; padding is not counted."""

    marks = True

    def __init__(self, stride: int):
        self.stride = stride

    def output_length(self, length: int, training: bool) -> int:
        return -(-length // self.stride)

    def resize_sequence(
        self, x_BSD: Tensor, stream: SequenceInfo, training: bool
    ) -> tuple[Tensor, Tensor]:
        marks_BS2 = stream.marks_of(len(x_BSD))
        sizes_BS1 = marks_BS2[..., :1].to(torch.promote_types(x_BSD.dtype, torch.float32))
        marks = self._sum_groups(marks_BS2)
        mean_BSD = self._sum_groups(x_BSD * sizes_BS1) / marks[..., :1].to(sizes_BS1.dtype).clamp(
            min=1
        )
        return mean_BSD.to(x_BSD.dtype), marks

    def _sum_groups(self, x_BSD: Tensor) -> Tensor:
        padding = -x_BSD.shape[1] % self.stride
        return (
            F.pad(x_BSD, (0, 0, 0, padding))
            .unflatten(1, (-1, self.stride))
            .sum(2, dtype=x_BSD.dtype)
        )


class ShortenText(Resize):
    """Average-pool every `stride` tokens of a text, as Hourglass does (arXiv 2110.13711).

    Group j is the mean of the positions j·stride - (stride - 1) to j·stride, shifted so that it
    holds nothing after the first position that it is added to (see Lengthen), and only positions
    of its last position's document. The full-length sequence is passed on in place of the memory.
    """

    stream = "target"
    keeps_full_sequence = True

    def __init__(self, stride: int):
        self.stride = stride

    def output_length(self, length: int, training: bool) -> int:
        return -(-length // self.stride)

    def sequence_after(self, stream: SequenceInfo, training: bool) -> SequenceInfo:
        """Return the metadata of the groups; each has its last position's angle and document."""
        last = slice(-stream.start % self.stride, None, self.stride)
        documents_BS, ends_BM, rope = stream.documents_BS, stream.ends_BM, stream.rope
        total = len(range(stream.total)[last])
        shorter = replace(
            stream.with_length(total),
            start=self.output_length(stream.start, training),
            documents_BS=None if documents_BS is None else documents_BS[:, last],
            ends_BM=None if ends_BM is None else -(-ends_BM // self.stride),
            rope=None if rope is None else (rope[0][:, last], rope[1][:, last]),
            longer=stream,
        )
        if documents_BS is not None:
            shorter.hide_keys(len(documents_BS))
        return shorter

    def __call__(
        self, flow: Flow, stream: SequenceInfo, training: bool, cache: dict[str, Tensor]
    ) -> Flow:
        x_BSD = flow[0]
        all_BSD = stream.layout.gather_replicated(x_BSD, stream.length)
        return stream.layout.local_positions(self._pool_groups(all_BSD, stream, cache)), x_BSD, None

    def _pool_groups(self, x_BSD: Tensor, stream: SequenceInfo, cache: dict[str, Tensor]) -> Tensor:
        """Return the means (B,G,D) of the groups whose last position is in x."""
        B, S, D = x_BSD.shape
        before = self.stride - 1
        # The first group is padded on the left with positions of document -1.
        ids_BS = stream.documents_BS
        ids_BS = x_BSD.new_zeros(B, S, dtype=torch.int64) if ids_BS is None else ids_BS
        tail_BSD = cache.get("tail", x_BSD.new_zeros(B, before, D))
        tail_ids_BS = cache.get("ids", ids_BS.new_full((B, before), -1))
        x_BSD, ids_BS = torch.cat((tail_BSD, x_BSD), 1), torch.cat((tail_ids_BS, ids_BS), 1)
        cache |= {"tail": x_BSD[:, S:], "ids": ids_BS[:, S:]}
        first = -stream.start % self.stride
        if first >= S:
            return x_BSD[:, :0]
        groups_BGDK = x_BSD[:, first:].unfold(1, self.stride, self.stride)
        ids_BGK = ids_BS[:, first:].unfold(1, self.stride, self.stride)
        same_BGK = ids_BGK == ids_BGK[..., -1:]
        weight_BGK = same_BGK / same_BGK.sum(-1, keepdim=True)
        return (groups_BGDK * weight_BGK[:, :, None].to(x_BSD.dtype)).sum(-1)


class LengthenText(Resize):
    """Restore the length after Shorten: add to each position the newest group before or at it."""

    stream = "target"
    restores_length = True

    def __init__(self, stride: int):
        self.stride = stride

    def sequence_after(self, stream: SequenceInfo, training: bool) -> SequenceInfo:
        assert stream.longer is not None
        return stream.longer

    def __call__(
        self, flow: Flow, stream: SequenceInfo, training: bool, cache: dict[str, Tensor]
    ) -> Flow:
        x_BSD, before_BSD, longer = flow[0], flow[1], stream.longer
        assert before_BSD is not None and longer is not None
        groups_BGD = stream.layout.gather_replicated(x_BSD, stream.length)
        skipped = longer.start % self.stride  # positions of the first group already generated
        if skipped:
            groups_BGD = torch.cat((cache["last"], groups_BGD), dim=1)
        cache["last"] = groups_BGD[:, -1:]
        long_BSD = self._repeat_groups(groups_BGD)[:, skipped:][:, : longer.total]
        if longer.documents_BS is not None and stream.documents_BS is not None:
            group_ids_BS = self._repeat_groups(stream.documents_BS)[:, : longer.total]
            long_BSD = torch.where((group_ids_BS == longer.documents_BS)[..., None], long_BSD, 0.0)
        return before_BSD + longer.layout.local_positions(long_BSD), None, None

    def _repeat_groups(self, x_BG: Tensor) -> Tensor:
        return x_BG[:, :, None].expand(-1, -1, self.stride, *x_BG.shape[2:]).flatten(1, 2)


class DropPatches(Resize):
    """PatchDropout (arXiv 2208.07220): drop random patches of each sample during training."""

    SITE = 0x70A7C4  # separates its random numbers from those of Dropout

    def __init__(self, share: float, kept: int):
        self.share, self.kept = share, kept

    def output_length(self, length: int, training: bool) -> int:
        if not training:
            return length
        return self.kept + max(1, round((length - self.kept) * (1.0 - self.share)))

    def resize_sequence(
        self, x_BSD: Tensor, stream: SequenceInfo, training: bool
    ) -> tuple[Tensor, None]:
        if not training or stream.seeds_B is None:
            return x_BSD, None
        S, D = x_BSD.shape[1:]
        count = self.output_length(S, training) - self.kept
        numbers_S = torch.arange(S - self.kept, device=x_BSD.device)
        bits_BS = random_bits(stream.seeds_B, self.SITE, numbers_S)
        retained_BS = bits_BS.argsort(dim=-1, stable=True)[:, :count].sort(-1).values + self.kept
        first_BS = torch.arange(self.kept, device=x_BSD.device).expand(len(x_BSD), -1)
        rows_BS = torch.cat((first_BS, retained_BS), dim=1)
        return x_BSD.gather(1, rows_BS[..., None].expand(-1, -1, D)), None


def _sum_by_slot(x_BSD: Tensor, slot_BS: Tensor, length: int) -> Tensor:
    """Return the sum of the vectors of each output index, (B,length,D)."""
    B, _, D = x_BSD.shape
    rows_B1 = torch.arange(B, device=x_BSD.device)[:, None] * (length + 1)
    flat = x_BSD.new_zeros(B * (length + 1), D)
    flat = flat.index_add(0, (slot_BS + rows_B1).flatten(), x_BSD.flatten(0, 1))
    return flat.view(B, length + 1, D)[:, :length]
