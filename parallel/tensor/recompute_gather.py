"""Save the local shard of a gathered sequence, and gather it again in the backward.

Otherwise every rank would save the full inputs of split layers (arXiv 2205.05198, section
4.2.2).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.autograd.graph import saved_tensors_hooks

from parallel.collectives import gather_padded


class RecomputeGather:
    """Saved-tensor hooks that make autograd save the local shard of a gathered tensor."""

    def __init__(self, group: dist.ProcessGroup, dim: int):
        self._group, self._dim = group, dim
        self._inside = False
        # The latest gathered tensor; referenced, so that its storage is not reused.
        self._latest: tuple[Tensor, _GatheredTensor] | None = None

    def remember_gather(self, whole: Tensor, part: Tensor) -> None:
        """Record that `whole` was gathered from shards, `part` being the local one."""
        if self._inside:
            length = whole.shape[self._dim]
            self._latest = whole, _GatheredTensor(part.detach(), length, self._group, self._dim)

    def wrap(self, function: Callable) -> Callable:
        """Return the function with the saved-tensor hooks applied."""

        def keeping_parts(*args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled():
                return function(*args, **kwargs)
            self._inside = True
            try:
                with saved_tensors_hooks(self._pack_saved, _unpack_saved):
                    return function(*args, **kwargs)
            finally:
                self._inside, self._latest = False, None

        return keeping_parts

    def _pack_saved(self, tensor: Tensor) -> Any:
        if self._latest is None or not _is_view_of_all(self._latest[0], tensor):
            return tensor
        gathered = self._latest[1]
        gathered.uses += 1
        return gathered, tensor.shape


class _GatheredTensor:
    """The local shard of a gathered tensor that autograd saved."""

    def __init__(self, part: Tensor, length: int, group: dist.ProcessGroup, dim: int):
        self._part, self._length, self._group, self._dim = part, length, group, dim
        self._whole: Tensor | None = None
        self.uses = 0  # number of times it was saved
        self._left = 0  # number of times it has yet to be unpacked in this backward

    def regather(self) -> Tensor:
        """Return the full tensor, gathered once for all its uses in a backward."""
        if not self._left:
            self._whole = gather_padded(self._part, self._length, self._group, self._dim)
            self._left = self.uses
        assert self._whole is not None
        whole, self._left = self._whole, self._left - 1
        if not self._left:
            self._whole = None
        return whole


def _is_view_of_all(whole: Tensor, tensor: Tensor) -> bool:
    return (
        tensor.numel() == whole.numel()
        and tensor.is_contiguous()
        # The storage itself: all fake tensors have the same address.
        and tensor.untyped_storage()._cdata == whole.untyped_storage()._cdata
    )


def _unpack_saved(kept: Any) -> Tensor:
    if isinstance(kept, Tensor):
        return kept
    gathered, shape = kept
    return gathered.regather().view(shape)
