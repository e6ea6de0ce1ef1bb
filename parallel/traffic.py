"""Bytes on the wire, counted from the collectives that are really issued."""

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

Payload = dict[tuple[str, torch.dtype], int]  # bytes by (collective, dtype)


class Traffic(TorchDispatchMode):
    """Counts the collectives issued inside a `with`: payload bytes by (collective, dtype).

    The payload of an all-reduce is the reduced tensor, of an all-gather the gathered one, of a
    reduce-scatter the one before the reduction. What a ring puts on each rank's wire follows from
    it: twice (n-1)/n of an all-reduce's payload, once (n-1)/n of the others'.
    """

    def __init__(self) -> None:
        super().__init__()
        self.payload_bytes: Payload = defaultdict(int)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self._count(func._schema.name.split("::")[1], args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: Any) -> None:
        if name == "allreduce_":
            tensors = args[0]
        elif name == "_allgather_base_":
            tensors = [args[0]]
        elif name == "_reduce_scatter_base_":
            tensors = [args[1]]
        else:
            tensors = [t for t in torch.utils._pytree.tree_leaves(args) if isinstance(t, Tensor)]
        for tensor in tensors:
            self.payload_bytes[name, tensor.dtype] += tensor.numel() * tensor.element_size()
