"""Activation checkpointing: recompute a block's activations in the backward."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed._functional_collectives  # defines torch.ops._c10d_functional
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

MODES = ("none", "selective", "block")

# Operators whose outputs selective mode saves, expensive to recompute and small: matrix products,
# attention, and the collectives that return a shard of the sequence. The full sequence is gathered
# again in the backward, as without recomputation.
_aten, _wire = torch.ops.aten, torch.ops._c10d_functional
KEPT = {
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _wire.reduce_scatter_tensor.default,
    _wire.all_reduce.default,
}


def _keep_products(_context: Any, operator: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    kept = operator in KEPT
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def checkpoint_activations(block: nn.Module, mode: str) -> None:
    """Make `block` recompute its activations in the backward, in place.

    Mode `block` saves only the block's inputs (arXiv 1604.06174), `selective` also the outputs of
    matrix products and attention (arXiv 2205.05198), `none` everything. Parameter names are kept.
    """
    if mode == "none":
        return
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if mode == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _keep_products)
    forward: Callable = block.forward

    def checkpointed_forward(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, **options, **kwargs)

    block.forward = checkpointed_forward
