"""Activation checkpointing: recompute a block's activations in the backward."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed._functional_collectives  # defines torch.ops._c10d_functional
from torch import Tensor, nn
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
PRODUCTS = {
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten._scaled_mm.default,  # float8
}
SUMS = {_wire.reduce_scatter_tensor.default, _wire.all_reduce.default}
EXCHANGE = _wire.all_to_all_single.default
KEPT = {
    *PRODUCTS,
    *SUMS,
    EXCHANGE,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._flash_attention_forward.default,
    _aten._efficient_attention_forward.default,
}


class _Unread:
    """The entry of a product that is read by nothing but its sum over ranks, which is kept.

    Has the method of torch's entries. NaN, so that a value that is read after all is noticed.
    """

    def __init__(self, product: Tensor):
        self._like = product.new_empty(0), product.shape

    def get_val(self, _allow_mutation: bool) -> Tensor:
        """Return a tensor of the product's shape."""
        like, shape = self._like
        return like.new_full(shape, torch.nan)


class _KeepProducts:
    """The policy of one forward of a block: which operators' outputs are saved."""

    def __init__(self) -> None:
        self.saved: Any = {}  # torch's: operator -> its outputs, numbered from 0
        self._latest: Any = None  # the latest of KEPT

    def __call__(self, context: Any, operator: Any, *args: Any, **_kwargs: Any) -> CheckpointPolicy:
        if operator not in KEPT or (operator is EXCHANGE and not all(args[1])):
            # A shift of a ring, which is an exchange with empty chunks: a rank keeps no other's
            # keys.
            return CheckpointPolicy.PREFER_RECOMPUTE
        # The policy of a recomputation, which torch asked for until 2.12, is the same.
        if operator in SUMS and args[1] == "sum" and not context.is_recompute:
            self._drop_summed(args[0])
        self._latest = operator
        return CheckpointPolicy.MUST_SAVE

    def _drop_summed(self, summed: Tensor) -> None:
        """Drop the latest product if it is what is summed: a row-split layer's part of it."""
        if self._latest not in PRODUCTS:
            return
        entries = self.saved[self._latest]
        last = len(entries) - 1
        product = getattr(entries[last], "val", None)
        if not isinstance(product, Tensor) or product.shape[-1] != summed.shape[-1]:
            return
        if product.numel() <= summed.numel():  # which may be padded
            entries[last] = _Unread(product)


def _selective_contexts() -> tuple[Any, Any]:
    policy = _KeepProducts()
    forward, recomputation = create_selective_checkpoint_contexts(policy)
    policy.saved = forward.storage
    return forward, recomputation


def checkpoint_activations(block: nn.Module, mode: str) -> None:
    """Make `block` recompute its activations in the backward, in place.

    Mode `block` saves only the block's inputs (arXiv 1604.06174), `selective` also the outputs of
    matrix products and attention (arXiv 2205.05198), `none` everything. Parameter names are kept.
    """
    if mode == "none":
        return
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if mode == "selective":
        options["context_fn"] = _selective_contexts
    forward: Callable = block.forward

    def checkpointed_forward(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, **options, **kwargs)

    block.forward = checkpointed_forward
