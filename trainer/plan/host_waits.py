"""Recognise what makes the host wait for a GPU, in a step that runs on a CPU.

A CPU's tensors do not say whether they would be on the GPU, so that is followed: those of the
micro-batches and what is computed from them alone are the host's, until they are copied.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

_aten = torch.ops.aten
# Operators whose output has a size that only the device knows.
SIZED = {
    _aten.nonzero.default,
    _aten.masked_select.default,
    _aten.repeat_interleave.Tensor,
    _aten._unique2.default,
    _aten.unique_dim.default,
}
INDEXED = {_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default}
MADE_FROM_NUMBERS = {torch.tensor, torch.as_tensor}


class HostWaits(TorchDispatchMode):
    """A dispatch mode that lists operators that wait for a device; `copies` lists the copies."""

    def __init__(self, pinned: Iterable[Tensor]):
        """`pinned` are the tensors of the micro-batches, which a loader pins."""
        super().__init__()
        self.found: list[str] = []
        self._host = WeakIdKeyDictionary()
        self.copies = _Copies(self)
        for tensor in pinned:
            self._host[tensor] = True

    def is_host(self, tensor: Tensor) -> bool:
        """Return whether a tensor is in the host's memory."""
        return tensor in self._host

    def is_pinned(self, tensor: Tensor) -> bool:
        """Return whether a tensor is one of a micro-batch's."""
        return self._host.get(tensor, False)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        host = bool(given) and all(map(self.is_host, given))
        if not host and _waits(func, args):
            self.found.append(str(func))
        out = func(*args, **(kwargs or {}))
        if host or func is _aten.lift_fresh.default:
            for leaf in tree_leaves(out):
                if isinstance(leaf, Tensor):
                    self._host.setdefault(leaf, False)
        return out


class _Copies(TorchFunctionMode):
    """Makes copies to the device visible, which a CPU leaves out, and lists those that wait."""

    def __init__(self, waits: HostWaits):
        super().__init__()
        self._waits = waits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in MADE_FROM_NUMBERS and kwargs.get("device") is not None:
            self._waits.found.append(f"{func.__name__}(…, device=…): a copy that is not pinned")
            return _device_copy(func(*args, **kwargs))
        out = func(*args, **kwargs)
        if func is not Tensor.to or not self._waits.is_host(args[0]):
            return out
        if not any(isinstance(value, torch.device | str) for value in (*args, *kwargs.values())):
            return out
        if not self._waits.is_pinned(args[0]):
            self._waits.found.append("Tensor.to(device) of a tensor that is not pinned")
        return _device_copy(out)


def _device_copy(tensor: Tensor) -> Tensor:
    """Return a copy that is computed from no tensor of the host."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def _waits(func: Any, args: Any) -> bool:
    """Return whether an operator on a device's tensors makes the host wait."""
    if func is _aten._local_scalar_dense.default or func in SIZED:
        return True
    masks = (torch.bool, torch.uint8)
    return func in INDEXED and any(i is not None and i.dtype in masks for i in args[1])
