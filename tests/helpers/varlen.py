"""Attention of documents by cumulative lengths, in plain matrix products: the reference."""

# T queries and U keys of all rows, H query heads, G key/value heads, K width of a head.

from typing import Any

import torch
from torch import Tensor

from trainer.nn import packed_attention
from trainer.nn.packed_attention import VarlenKernel


def visible_keys(rows_N: Tensor, columns_N: Tensor, causal: bool, window: int) -> Tensor:
    """Which of the keys a query sees, (T,U): those of its document, by FlashAttention's rules."""
    numbers = [torch.arange(int(x_N[-1])) for x_N in (rows_N, columns_N)]
    # The document of a place is the last that begins at or before it and is not empty.
    row_T, column_U = (
        torch.searchsorted(x_N.long().contiguous(), n, right=True) - 1
        for n, x_N in zip(numbers, (rows_N, columns_N), strict=True)
    )
    sees_TU = row_T[:, None] == column_U
    from_end_T = rows_N[row_T + 1] - numbers[0]
    from_end_U = columns_N[column_U + 1] - numbers[1]
    before_TU = from_end_U - from_end_T[:, None]  # 0: the query's own place
    if causal:
        sees_TU = sees_TU & (before_TU >= 0)
    if window:
        sees_TU = sees_TU & (before_TU < window)
    return sees_TU


def _scores(
    query: Tensor, key: Tensor, rows: Tensor, columns: Tensor, causal: bool, window: int
) -> Tensor:
    assert rows.dtype == columns.dtype == torch.int32
    group = query.shape[1] // key.shape[1]
    scores_HTU = torch.einsum("thk,uhk->htu", query, key.repeat_interleave(group, 1))
    hidden_TU = ~visible_keys(rows, columns, causal, window)
    return (scores_HTU * query.shape[-1] ** -0.5).masked_fill(hidden_TU, -torch.inf)


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: Tensor,
    columns: Tensor,
    longest_row: int,
    longest_column: int,
    causal: bool,
    window: int,
) -> tuple[Tensor, Tensor]:
    """Return output (T,H,K) and log-sum-exp (H,T); inf for a query without keys, as on CUDA."""
    assert rows.diff().max() <= longest_row and columns.diff().max() <= longest_column
    assert rows[-1] == len(query) and columns[-1] == len(key)
    scores_HTU = _scores(query, key, rows, columns, causal, window)
    lse_HT = scores_HTU.logsumexp(-1)
    lse_HT = lse_HT.masked_fill(lse_HT == -torch.inf, torch.inf)
    group = query.shape[1] // key.shape[1]
    share_HTU = (scores_HTU - lse_HT[..., None]).exp()
    out = torch.einsum("htu,uhk->thk", share_HTU, value.repeat_interleave(group, 1))
    return out.to(query.dtype), lse_HT.detach()


def backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    rows: Tensor,
    columns: Tensor,
    longest_row: int,
    longest_column: int,
    causal: bool,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return query, key and value gradients by FlashAttention's equations."""
    group = query.shape[1] // key.shape[1]
    share_HTU = (_scores(query, key, rows, columns, causal, window) - lse[..., None]).exp()
    shown_UHK, told_UHK = (x.repeat_interleave(group, 1) for x in (key, value))
    of_share_HTU = torch.einsum("thk,uhk->htu", grad, told_UHK)
    mean_HT = (grad * out).sum(-1).T
    of_scores = share_HTU * (of_share_HTU - mean_HT[..., None]) * query.shape[-1] ** -0.5
    of_query = torch.einsum("htu,uhk->thk", of_scores, shown_UHK)
    of_key = torch.einsum("htu,thk->uhk", of_scores, query)
    of_value = torch.einsum("htu,thk->uhk", share_HTU, grad)
    of_key, of_value = (x.unflatten(1, (-1, group)).sum(2) for x in (of_key, of_value))
    return of_query, of_key, of_value


REFERENCE = VarlenKernel(lambda *_: True, forward, backward)


class ReferenceKernel:
    """A context in which attention on CPUs takes lengths and no mask, by the reference."""

    def __init__(self, calls: list[tuple] | None = None):
        self.calls = [] if calls is None else calls  # arguments of the forwards

    def __enter__(self) -> None:
        def counted(*arguments: Any) -> tuple[Tensor, Tensor]:
            self.calls.append(arguments)
            return forward(*arguments)

        packed_attention.KERNELS["cpu"] = REFERENCE._replace(forward=counted)

    def __exit__(self, *_: object) -> None:
        del packed_attention.KERNELS["cpu"]
