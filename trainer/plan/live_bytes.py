"""The bytes of live tensors, followed operator by operator as an allocator would see them."""

import weakref
from collections import defaultdict
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from parallel.comm_volume.counter import Collective, collectives_of

REST = "rest"
# Operators that wait for a device to read a number from it.
READS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default}


@dataclass
class Allocation:
    """The memory of one storage, from the operator that made it to its release."""

    size: int
    birth: int  # number of the operator
    death: int | None = None  # None = alive
    kind: str = REST


@dataclass
class Peak:
    """The most live bytes so far, and the operator after which they were there."""

    live_bytes: int = 0
    clock: int = 0
    copied: int = 0  # of these, in a transport's copy


@dataclass
class StepCounts:
    """Counts of what a window of a step has issued."""

    operators: int = 0  # that write memory: views and metadata are not counted
    reads: int = 0
    collectives: list[Collective] = field(default_factory=list)


class LiveBytes(TorchDispatchMode):
    """A dispatch mode that follows the live bytes of storages, and their peak in each window.

    Enter it inside of a FakeTensorMode. Storages that are resized without an operator are
    reported by `resized`. With `gloo` a reduce-scatter copies its input, as gloo does.
    """

    def __init__(self, gloo: bool = False) -> None:
        super().__init__()
        self._gloo = gloo
        self.clock = self.total = 0
        self.window: Hashable = ""  # what runs
        self.begin_step()

    def begin_step(self) -> None:
        """Forget peaks, counts and the storages that are gone."""
        live = getattr(self, "_live", {})
        self._live: dict[int, tuple[Allocation, Any]] = live
        self.allocations = [allocation for allocation, _ in live.values()]
        self.peaks: dict[Hashable, Peak] = defaultdict(Peak)
        self.counts: dict[Hashable, StepCounts] = defaultdict(StepCounts)

    def follow(self, tensors: Iterable[Tensor], kind: str = REST) -> None:
        """Count tensors that are there already, and say of what kind they are."""
        for tensor in tensors:
            for plain in _plain_tensors(tensor):
                self._count(plain.untyped_storage(), kind)

    def resized(self, tensor: Tensor, kind: str = REST) -> None:
        """Count a storage anew after its size has changed."""
        storage = tensor.untyped_storage()
        if storage._cdata in self._live:
            self._release(storage._cdata)
        self.clock += 1
        if storage.nbytes():
            self._count(storage, kind)
        self._note_peak()

    def kinds_at(self, peak: Peak) -> dict[str, int]:
        """Return the bytes by kind at a peak of this step."""
        found: dict[str, int] = defaultdict(int, {REST: peak.copied})
        for allocation in self.allocations:
            # What is released behind an operator was there with its outputs.
            alive = allocation.death is None or allocation.death >= peak.clock
            if allocation.birth <= peak.clock and alive:
                found[allocation.kind] += allocation.size
        return found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        counts = self.counts[self.window]
        issued = collectives_of(func, args)
        counts.collectives += issued
        # A constant is one that the host knows.
        counts.reads += func in READS and getattr(args[0], "constant", None) is None
        out = func(*args, **(kwargs or {}))
        self.clock += 1
        before, leaves = len(self.allocations), tree_leaves(out)
        for leaf in leaves:
            if isinstance(leaf, Tensor):
                self.follow([leaf])
        writes = len(self.allocations) > before or func._schema.is_mutable
        counts.operators += bool(writes)
        copied = sum(c.payload_bytes for c in issued if c.name == "reduce_scatter")
        self._note_peak(copied if self._gloo else 0)
        return out

    def _count(self, storage: Any, kind: str) -> None:
        key = storage._cdata
        if key in self._live:
            if kind != REST:
                self._live[key][0].kind = kind
            return
        allocation = Allocation(storage.nbytes(), self.clock, kind=kind)
        gone = weakref.ref(storage, lambda _: self._release(key))
        self._live[key] = allocation, gone
        self.allocations.append(allocation)
        self.total += allocation.size

    def _release(self, key: int) -> None:
        allocation, _ = self._live.pop(key)
        allocation.death = self.clock
        self.total -= allocation.size

    def _note_peak(self, copied: int = 0) -> None:
        peak = self.peaks[self.window]
        if self.total + copied > peak.live_bytes:
            peak.live_bytes, peak.clock, peak.copied = self.total + copied, self.clock, copied


def _plain_tensors(tensor: Tensor) -> list[Tensor]:
    """Return the tensors whose storage a tensor has; none on the meta device."""
    if isinstance(tensor, DTensor):
        tensor = tensor.to_local()
    return [] if tensor.device.type == "meta" else [tensor]
