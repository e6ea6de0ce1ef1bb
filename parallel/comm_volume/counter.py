"""Communicated bytes, counted from the collectives that are issued."""

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor
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


class CollectiveCounter(TorchDispatchMode):
    """A dispatch mode that counts collectives' payload bytes by (collective, dtype).

    The payload of an all-reduce is the reduced tensor, of an all-gather the output, of a
    reduce-scatter and an all-to-all the input. With ring algorithms each rank sends 2(n-1)/n of an
    all-reduce's payload and (n-1)/n of the others'. An all-to-all with one non-empty chunk counts
    as a "send": its full payload is sent.
    """

    def __init__(self) -> None:
        super().__init__()
        self.payload_bytes: Payload = defaultdict(int)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1]
        if func.namespace == "c10d" and name != "recv_":  # counted by the sender
            self._count_bytes(name, _in_place_payload(name, args))
        elif func.namespace == "_c10d_functional" and name != "wait_tensor":
            gathered = args[1] if name == "all_gather_into_tensor" else 1
            if name == "all_to_all_single" and len(args[2]) > 1 == sum(
                size > 0 for size in args[2]
            ):
                name = "send"
            self._count_bytes(name, [args[0]], gathered)
        return func(*args, **(kwargs or {}))

    def _count_bytes(self, name: str, tensors: list[Tensor], times: int = 1) -> None:
        for tensor in tensors:
            key = NAMES.get(name, name), tensor.dtype
            self.payload_bytes[key] += tensor.numel() * tensor.element_size() * times


def _in_place_payload(name: str, args: Any) -> list[Tensor]:
    if name == "allreduce_":
        return args[0]
    if name in ("_allgather_base_", "_reduce_scatter_base_"):
        return [args[0] if name == "_allgather_base_" else args[1]]
    return [t for t in torch.utils._pytree.tree_leaves(args) if isinstance(t, Tensor)]
