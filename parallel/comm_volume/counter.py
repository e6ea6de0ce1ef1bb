"""Communicated bytes, counted from the collectives that are issued."""

from collections import defaultdict
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

Payload = dict[tuple[str, torch.dtype], int]  # bytes by (collective, dtype)

NAMES = {
    "allreduce_": "all_reduce",
    "_allgather_base_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "all_gather_into_tensor": "all_gather",
    "reduce_scatter_tensor": "reduce_scatter",
    "all_to_all_single": "all_to_all",
}


class Collective(NamedTuple):
    """A collective that was issued."""

    name: str
    dtype: torch.dtype
    group: str  # name of its process group
    payload_bytes: int


class CollectiveCounter(TorchDispatchMode):
    """A dispatch mode that lists collectives and their payload bytes.

    The payload of an all-reduce is the reduced tensor, of an all-gather the output, of a
    reduce-scatter and an all-to-all the input. With ring algorithms each rank sends 2(n-1)/n of an
    all-reduce's payload and (n-1)/n of the others'. An all-to-all with one non-empty chunk counts
    as a "send": its full payload is sent.
    """

    def __init__(self) -> None:
        super().__init__()
        self.issued: list[Collective] = []

    @property
    def payload_bytes(self) -> Payload:
        """Return the payload bytes by (collective, dtype)."""
        total: Payload = defaultdict(int)
        for collective in self.issued:
            total[collective.name, collective.dtype] += collective.payload_bytes
        return total

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.issued += collectives_of(func, args)
        return func(*args, **(kwargs or {}))


def collectives_of(operator: Any, args: Any) -> list[Collective]:
    """Return what an operator sends, one entry per tensor; empty if it is no collective."""
    name = operator._schema.name.split("::")[1]
    if operator.namespace == "c10d" and name != "recv_":  # counted by the sender
        tensors, times = _in_place_payload(name, args), 1
        scripts = [arg for arg in args if isinstance(arg, torch.ScriptObject)]
        group = dist.ProcessGroup.unbox(scripts[0]).group_name
    elif operator.namespace == "_c10d_functional" and name != "wait_tensor":
        tensors, group = [args[0]], args[-1]
        times = args[1] if name == "all_gather_into_tensor" else 1
        if name == "all_to_all_single" and len(args[2]) > 1 == sum(size > 0 for size in args[2]):
            name = "send"
    else:
        return []
    return [
        Collective(NAMES.get(name, name), tensor.dtype, group, tensor.nbytes * times)
        for tensor in tensors
    ]


def _in_place_payload(name: str, args: Any) -> list[Tensor]:
    if name == "allreduce_":
        return args[0]
    if name in ("_allgather_base_", "_reduce_scatter_base_"):
        return [args[0] if name == "_allgather_base_" else args[1]]
    return [t for t in torch.utils._pytree.tree_leaves(args) if isinstance(t, Tensor)]
