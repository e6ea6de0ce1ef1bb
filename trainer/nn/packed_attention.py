"""Attention within the documents of packed rows, by a kernel that takes lengths and no mask.

It skips what a document hides, also behind a sliding window, and repeats no key/value heads.
"""

# B batch, M documents of a row, R query and C key positions of a row, H query heads, G key/value
# heads, K width of a head; T queries and U keys of all rows, N = B·M documents.

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

_aten = torch.ops.aten


class VarlenKernel(NamedTuple):
    """Attention of many documents of unequal lengths, one behind the other.

    Forward: (query (T,H,K), key and value (U,G,K), query offsets and key offsets (N+1,) int32,
    longest query and key, causal, window) -> output (T,H,K), log-sum-exp (H,T). Document n has the
    queries and keys from its offset to the next. A causal query sees the keys up to its own place,
    counted from the document's last query and key, and only the last `window` of them (0 = all).
    The log-sum-exp of a query without keys is inf or -inf. The output can be differentiated.
    Backward: (output gradient, query, key, value, output, log-sum-exp, …) -> query, key, value
    gradients.
    """

    fits: Callable[[torch.device, torch.dtype, int], bool]  # device, dtype, width of a head
    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]


@dataclass
class PackedAttention:
    """Attention of the rows of a batch, each of `length` positions, within their documents."""

    ends_BM: Tensor  # the position behind each document; the last is `length`, which may repeat
    offsets_N: Tensor  # of the documents of all rows
    length: int
    window: int
    kernel: VarlenKernel

    def attend(
        self, query_BHSK: Tensor, key_BGSK: Tensor, value_BGSK: Tensor, causal: bool
    ) -> Tensor:
        """Return the attention of whole rows, (B,H,S,K)."""
        offsets = self.offsets_N, self.offsets_N
        return self._forward(query_BHSK, key_BGSK, value_BGSK, *offsets, causal)[0]

    def forward(
        self,
        query_BHRK: Tensor,
        key_BGCK: Tensor,
        value_BGCK: Tensor,
        rows_BM: Tensor,
        columns_BM: Tensor,
        causal: bool,
    ) -> tuple[Tensor, Tensor]:
        """Return output (B,H,R,K) and log-sum-exp (B,H,R), -inf for queries without keys.

        `rows_BM` and `columns_BM`: how many of the queries and keys are before the end of each
        document; the last counts all of them. Those of a document are next to each other.
        """
        offsets = self._offsets(query_BHRK, rows_BM, key_BGCK, columns_BM)
        out_BHRK, lse_BHR = self._forward(query_BHRK, key_BGCK, value_BGCK, *offsets, causal)
        return out_BHRK, lse_BHR.masked_fill(lse_BHR == torch.inf, -torch.inf)

    def backward(
        self,
        grad_BHRK: Tensor,
        query_BHRK: Tensor,
        key_BGCK: Tensor,
        value_BGCK: Tensor,
        out_BHRK: Tensor,
        lse_BHR: Tensor,
        rows_BM: Tensor,
        columns_BM: Tensor,
        causal: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return query, key and value gradients, from an output and log-sum-exp over more keys."""
        B, R, C = len(query_BHRK), query_BHRK.shape[2], key_BGCK.shape[2]
        inputs = grad_BHRK, query_BHRK, key_BGCK, value_BGCK, out_BHRK
        query_grad, *key_grads = self.kernel.backward(
            *map(_join_rows, inputs),
            lse_BHR.transpose(0, 1).flatten(1),
            *self._offsets(query_BHRK, rows_BM, key_BGCK, columns_BM),
            R,
            C,
            causal,
            self.window,
        )
        key_grad, value_grad = (_split_rows(grad, B) for grad in key_grads)
        return _split_rows(query_grad, B), key_grad, value_grad

    def _forward(
        self,
        query_BHRK: Tensor,
        key_BGCK: Tensor,
        value_BGCK: Tensor,
        rows_N: Tensor,
        columns_N: Tensor,
        causal: bool,
    ) -> tuple[Tensor, Tensor]:
        B, R, C = len(query_BHRK), query_BHRK.shape[2], key_BGCK.shape[2]
        out, lse = self.kernel.forward(
            *map(_join_rows, (query_BHRK, key_BGCK, value_BGCK)),
            rows_N,
            columns_N,
            R,
            C,
            causal,
            self.window,
        )
        return _split_rows(out, B), lse.unflatten(1, (B, R)).transpose(0, 1)

    def _offsets(
        self, query_BHRK: Tensor, rows_BM: Tensor, key_BGCK: Tensor, columns_BM: Tensor
    ) -> tuple[Tensor, Tensor]:
        rows_N = document_offsets(rows_BM, query_BHRK.shape[2])
        return rows_N, document_offsets(columns_BM, key_BGCK.shape[2])


def pack_rows(ends_BM: Tensor, length: int, window: int, kernel: VarlenKernel) -> PackedAttention:
    """Return the attention of rows of `length` whose documents end before `ends_BM`."""
    offsets_N = document_offsets(ends_BM, length)
    return PackedAttention(ends_BM, offsets_N, length, window, kernel)


def document_offsets(counts_BM: Tensor, length: int) -> Tensor:
    """Return the offsets (N+1,) int32 of documents in rows of `length`, one behind the other."""
    first_B = torch.arange(len(counts_BM), device=counts_BM.device) * length
    return F.pad((counts_BM + first_B[:, None]).flatten(), (1, 0)).to(torch.int32)


def _join_rows(x_BHSK: Tensor) -> Tensor:
    return x_BHSK.transpose(1, 2).flatten(0, 1)


def _split_rows(x_THK: Tensor, rows: int) -> Tensor:
    return x_THK.unflatten(0, (rows, -1)).transpose(1, 2)


def find_kernel(device: torch.device, dtype: torch.dtype, width: int) -> VarlenKernel | None:
    """Return the kernel for heads of a width on a device; None = attention needs a mask there."""
    kernel = KERNELS.get(device.type)
    return kernel if kernel is not None and kernel.fits(device, dtype, width) else None


# The operators below torch.nn.attention.varlen: its `varlen_attn` passes no gradient through the
# log-sum-exp, takes grouped heads since 2.12 only, and a window since 2.11.


def _flash_fits(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    half = dtype in (torch.float16, torch.bfloat16)
    if not half or width % 8 or width > 256 or torch.version.hip is not None:
        return False
    if not torch.backends.cuda.is_flash_attention_available():
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def _flash_sides(causal: bool, window: int) -> dict[str, int]:
    return {
        "window_size_left": window - 1 if window else -1,
        "window_size_right": 0 if causal else -1,
    }


def _flash_forward(
    query_THK: Tensor,
    key_UGK: Tensor,
    value_UGK: Tensor,
    rows_N: Tensor,
    columns_N: Tensor,
    longest_row: int,
    longest_column: int,
    causal: bool,
    window: int,
) -> tuple[Tensor, Tensor]:
    out_THK, lse_HT, *_ = _aten._flash_attention_forward(
        query_THK,
        key_UGK,
        value_UGK,
        rows_N,
        columns_N,
        longest_row,
        longest_column,
        0.0,
        causal and not window,
        False,
        **_flash_sides(causal, window),
    )
    return out_THK, lse_HT


def _flash_backward(
    grad_THK: Tensor,
    query_THK: Tensor,
    key_UGK: Tensor,
    value_UGK: Tensor,
    out_THK: Tensor,
    lse_HT: Tensor,
    rows_N: Tensor,
    columns_N: Tensor,
    longest_row: int,
    longest_column: int,
    causal: bool,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    no_dropout = torch.zeros(2, dtype=torch.uint64, device=query_THK.device)
    return _aten._flash_attention_backward(
        grad_THK.contiguous(),
        query_THK,
        key_UGK,
        value_UGK,
        out_THK.contiguous(),
        lse_HT.contiguous(),
        rows_N,
        columns_N,
        longest_row,
        longest_column,
        0.0,
        causal and not window,
        no_dropout,
        no_dropout,
        **_flash_sides(causal, window),
    )


KERNELS = {"cuda": VarlenKernel(_flash_fits, _flash_forward, _flash_backward)}
