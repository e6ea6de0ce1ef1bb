"""Blockwise attention: each tile returns its output and log-sum-exp, by which tiles are merged.

The softmax is online (arXiv 1805.02867); a tile's gradients need only the merged output and
log-sum-exp (FlashAttention, arXiv 2205.14135, appendix B).
"""

# B batch, R query and C key positions, H query heads, G key/value heads, K width of a head.

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

_aten = torch.ops.aten


class Kernel(NamedTuple):
    """Forward and backward of a tile with as many key/value heads as query heads.

    Forward: (query, key, value, mask, causal) -> output, log-sum-exp (B,H,R). Backward: (output
    gradient, query, key, value, output, log-sum-exp, mask, causal) -> query, key, value gradients.
    """

    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]


def tile_forward(
    query_BHRK: Tensor, key_BGCK: Tensor, value_BGCK: Tensor, mask: Tensor | None, causal: bool
) -> tuple[Tensor, Tensor]:
    """Return a tile's output (B,H,R,K) and log-sum-exp (B,H,R), -inf for fully masked rows."""
    heads = query_BHRK.shape[1]
    out_BHRK, lse_BHR = kernel_for(query_BHRK, mask).forward(
        query_BHRK,
        _repeat_kv_heads(key_BGCK, heads),
        _repeat_kv_heads(value_BGCK, heads),
        mask,
        causal,
    )
    if mask is not None:
        lse_BHR = lse_BHR.masked_fill(~mask.any(-1), -torch.inf)
    return out_BHRK, lse_BHR


def tile_backward(
    grad_BHRK: Tensor,
    query_BHRK: Tensor,
    key_BGCK: Tensor,
    value_BGCK: Tensor,
    out_BHRK: Tensor,
    lse_BHR: Tensor,
    mask: Tensor | None,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return a tile's query, key and value gradients, from the merged output and log-sum-exp."""
    heads, groups = query_BHRK.shape[1], key_BGCK.shape[1]
    # For a fully masked row, exp(-inf - lse) must be 0 and not NaN.
    lse_BHR = lse_BHR.masked_fill(lse_BHR == -torch.inf, 0.0).contiguous()
    query_grad, *shared = kernel_for(query_BHRK, mask).backward(
        grad_BHRK,
        query_BHRK,
        _repeat_kv_heads(key_BGCK, heads),
        _repeat_kv_heads(value_BGCK, heads),
        out_BHRK,
        lse_BHR,
        mask,
        causal,
    )
    key_grad, value_grad = (grad.unflatten(1, (groups, -1)).sum(2) for grad in shared)
    return query_grad, key_grad, value_grad


def merge_tile_(out_BHRK: Tensor, lse_BHR: Tensor, more_BHRK: Tensor, more_lse_BHR: Tensor) -> None:
    """Merge another tile of the same rows into `out_BHRK` and `lse_BHR`, in place."""
    total_BHR = torch.logaddexp(lse_BHR, more_lse_BHR)
    finite_BHR = total_BHR.masked_fill(total_BHR == -torch.inf, 0.0)
    old_BHR1 = (lse_BHR - finite_BHR).exp().unsqueeze(-1)
    new_BHR1 = (more_lse_BHR - finite_BHR).exp().unsqueeze(-1)
    out_BHRK.copy_(out_BHRK * old_BHR1 + more_BHRK * new_BHR1)
    lse_BHR.copy_(total_BHR)


def kernel_for(query_BHRK: Tensor, mask: Tensor | None) -> Kernel:
    """Return the fused kernel if it supports these inputs, otherwise matrix products."""
    device, width = query_BHRK.device.type, query_BHRK.shape[-1]
    half = query_BHRK.dtype in (torch.float16, torch.bfloat16)
    if device == "cuda" and (query_BHRK.dtype == torch.float64 or width % 8):
        return KERNELS["products"]
    if device == "cuda" and (not half or mask is not None or width > 256):
        return KERNELS["cuda, masked"]
    return KERNELS.get(device, KERNELS["products"])


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which tiles are accumulated: at least float32."""
    return torch.promote_types(dtype, torch.float32)


def _repeat_kv_heads(x_BGCK: Tensor, heads: int) -> Tensor:
    return x_BGCK.repeat_interleave(heads // x_BGCK.shape[1], dim=1)


def _scaled_scores(
    query: Tensor, key: Tensor, mask: Tensor | None, causal: bool
) -> tuple[Tensor, float]:
    """Return the scores (B,H,R,C), -inf where masked, and their scale."""
    scale, dtype = query.shape[-1] ** -0.5, accumulation_dtype(query.dtype)
    scores = query.to(dtype) @ key.to(dtype).mT * scale
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril()
    return (scores if mask is None else scores.masked_fill(~mask, -torch.inf)), scale


def _products_forward(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool
) -> tuple[Tensor, Tensor]:
    scores, _ = _scaled_scores(query, key, mask, causal)
    lse = scores.logsumexp(-1)
    probabilities = (scores - lse.masked_fill(lse == -torch.inf, 0.0).unsqueeze(-1)).exp()
    return probabilities @ value.to(probabilities.dtype), lse


def _products_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    scores, scale = _scaled_scores(query, key, mask, causal)
    probabilities = (scores - lse.unsqueeze(-1)).exp()
    grad = grad.to(probabilities.dtype)
    mean = (grad * out).sum(-1, keepdim=True)
    score_grad = probabilities * (grad @ value.to(probabilities.dtype).mT - mean) * scale
    query_grad = score_grad @ key.to(probabilities.dtype)
    key_grad, value_grad = score_grad.mT @ query.to(probabilities.dtype), probabilities.mT @ grad
    return query_grad.to(query.dtype), key_grad.to(query.dtype), value_grad.to(query.dtype)


def _additive_mask(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Convert a boolean mask to an additive bias of the scores."""
    if mask is None:
        return None
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, -torch.inf)


def _cpu_forward(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool
) -> tuple[Tensor, Tensor]:
    return _aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, causal, attn_mask=_additive_mask(mask, query.dtype)
    )


def _cpu_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, query, key, value, out, lse, 0.0, causal, attn_mask=_additive_mask(mask, query.dtype)
    )


def _cuda_forward(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool
) -> tuple[Tensor, Tensor]:
    return _aten._scaled_dot_product_flash_attention(query, key, value, 0.0, causal)[:2]


def _cuda_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    no_dropout = torch.zeros(2, dtype=torch.uint64, device=query.device)
    return _aten._scaled_dot_product_flash_attention_backward(
        grad.contiguous(),
        query,
        key,
        value,
        out.contiguous(),
        lse,
        None,
        None,
        query.shape[2],
        key.shape[2],
        0.0,
        causal,
        no_dropout,
        no_dropout,
    )


def _aligned_mask(mask: Tensor | None, query: Tensor, keys: int) -> Tensor | None:
    """Return the mask as an additive bias (B,H,R,C) with rows aligned as the kernel needs them."""
    if mask is None:
        return None
    bias = _additive_mask(F.pad(mask, (0, -keys % 8)), query.dtype)
    assert bias is not None
    return bias[..., :keys].expand(*query.shape[:3], keys)


def _efficient_forward(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool
) -> tuple[Tensor, Tensor]:
    rows, keys = query.shape[2], key.shape[2]
    if mask is not None:  # the kernel's softmax of a fully masked row is NaN: unmask it
        mask = mask | ~mask.any(-1, keepdim=True)
    out, lse, *_ = _aten._efficient_attention_forward(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        _aligned_mask(mask, query, keys),
        None,
        None,
        None,
        None,
        0.0,
        int(causal),
        True,
    )
    return out.transpose(1, 2), lse[..., :rows]  # the kernel pads rows to a multiple of 32


def _efficient_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, keys = query.shape[2], key.shape[2]
    no_dropout = torch.zeros((), dtype=torch.int64, device=query.device)
    *grads, _ = _aten._efficient_attention_backward(
        *(x.transpose(1, 2) for x in (grad, query, key, value)),
        _aligned_mask(mask, query, keys),
        out.transpose(1, 2),
        None,
        None,
        rows,
        keys,
        F.pad(lse, (0, -rows % 32), value=torch.inf),
        0.0,
        no_dropout,
        no_dropout,
        int(causal),
        False,
    )
    query_grad, key_grad, value_grad = (x.transpose(1, 2) for x in grads)
    return query_grad, key_grad, value_grad


KERNELS = {
    "cpu": Kernel(_cpu_forward, _cpu_backward),
    "cuda": Kernel(_cuda_forward, _cuda_backward),
    "cuda, masked": Kernel(_efficient_forward, _efficient_backward),
    "products": Kernel(_products_forward, _products_backward),
}
