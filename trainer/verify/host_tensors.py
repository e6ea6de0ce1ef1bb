"""Tell tensors of a device from those of the host, on ranks that have a CPU alone.

`DEVICE` stands for the device: what is made or moved there is on it, what is made without a device
is on the host, and results are where their inputs are. A tensor says where it is by `device`. As on
a GPU, an operator takes no tensors of both, and numpy none of the device.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses import FakeTensor
from torch.distributed.fsdp._fully_shard import _fsdp_init, _fully_shard
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

HOST, DEVICE = torch.device("cpu"), torch.device("cpu", 0)
CONSTRUCTORS = _device_constructors() | {torch.frombuffer}
MOVES = (Tensor.to, Tensor.cpu)
TO_NUMPY = (Tensor.numpy, Tensor.__array__)
_aten = torch.ops.aten
# Operators that take tensors of both, or indices of the host, on a GPU too.
MIXED = {
    *(_aten.copy_, _aten._to_copy, _aten.index, _aten.index_put, _aten.index_put_),
    *(_aten._index_put_impl_, _aten.set_),
}


class MixedTensorsError(RuntimeError):
    """Tensors of the host and of the device meet, or numpy reads one of the device."""


def place_of(tensor: Tensor) -> torch.device | None:
    """Return HOST or DEVICE, or None if it is unknown (made by torch's own C++ or threads)."""
    local = getattr(tensor, "_local_tensor", tensor)
    return None if local.is_meta else getattr(local.untyped_storage(), "place", None)


def set_place(tensors: Iterable[Any], place: torch.device) -> None:
    """Set where these tensors are."""
    for tensor in tensors:
        if isinstance(tensor, Tensor) and not tensor.is_meta:
            storage: Any = getattr(tensor, "_local_tensor", tensor).untyped_storage()
            storage.place = place


class _Constructed(TorchFunctionMode):
    """Note where tensors are made and moved to, and let `Tensor.device` say it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, OpOverload):  # torch's own C++, which says the device as it got it
            return func(*args, **kwargs)
        if getattr(func, "__self__", None) is Tensor.device:
            found = func(*args)
            return DEVICE if found == HOST and place_of(args[0]) == DEVICE else found
        if func in TO_NUMPY and place_of(args[0]) == DEVICE:
            raise MixedTensorsError("numpy cannot read a tensor of the device; call .cpu() first")
        made = func(*args, **kwargs)
        target = kwargs.get("device")
        if func in MOVES:
            return _moved(args[0], made, HOST if func is Tensor.cpu else _target(args[1:], kwargs))
        if func in CONSTRUCTORS or target is not None:
            set_place(tree_iter(made), _as_place(target))
        return made


class _Computed(TorchDispatchMode):
    """Let results be where their inputs are, which must not be in both places."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if DTensor in types:
            return NotImplemented  # it computes by its local tensors
        if FakeTensor in types:
            return func(*args, **kwargs)
        inputs = [x for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)]
        places = {place_of(x) for x in inputs}
        large = {HOST for x in inputs if x.dim() and place_of(x) == HOST}
        if DEVICE in places and large and func.overloadpacket not in MIXED:
            shapes = ", ".join(f"{tuple(x.shape)} on {place_of(x)}" for x in inputs)
            raise MixedTensorsError(f"{func} of tensors on host and device: {shapes}")
        made = func(*args, **kwargs)
        place = DEVICE if DEVICE in places else HOST if HOST in places else None
        if place is not None:
            fresh = (x for x in tree_iter(made) if isinstance(x, Tensor) and place_of(x) is None)
            set_place(fresh, place)
        return made


def _as_place(target: Any) -> torch.device:
    """Return the place that an argument `device` names."""
    return DEVICE if isinstance(target, torch.device) and target.index is not None else HOST


def _target(args: Any, kwargs: Any) -> torch.device | None:
    """Return the place that arguments of `Tensor.to` name, if any."""
    for value in (*args, kwargs.get("device"), kwargs.get("other")):
        if isinstance(value, Tensor):
            return place_of(value)
        if isinstance(value, torch.device | str):
            return _as_place(value)
    return None


def _moved(x: Tensor, made: Tensor, target: torch.device | None) -> Tensor:
    """Return the result of a move, a copy if it goes to another place."""
    if target is None or made.is_meta or place_of(x) == target:
        return made
    if made.data_ptr() == x.data_ptr():  # a CPU moves nothing
        made = made.clone()
    set_place([made], target)
    return made


@contextmanager
def track_host_tensors() -> Iterator[None]:
    """Tell tensors of the host and of the device apart in this thread."""
    name = "_get_device_from_mesh"
    with (
        mock.patch.object(_fsdp_init, name, lambda mesh: DEVICE),
        mock.patch.object(_fully_shard, name, lambda mesh: DEVICE),
        _Constructed(),
        _Computed(),
    ):
        yield
