"""DDP as a trace sees it: its memory and its collectives, without its C++ that reads data."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

from parallel.data.comm_hook import CompressedAllReduce
from parallel.data.ddp import build_comm_hook, reduce_dtype
from parallel.strategy import StrategyConfig


class TracedBucket:
    """Gradients that are reduced together; has the methods of torch's GradBucket."""

    def __init__(self, parameters: list[nn.Parameter]):
        self._parameters, self.missing, self._last = parameters, len(parameters), False
        self._buffer = parameters[0].new_zeros(sum(p.numel() for p in parameters))
        parts = self._buffer.split([p.numel() for p in parameters])
        self.views = {p: part.view_as(p) for p, part in zip(parameters, parts, strict=True)}

    def parameters(self) -> list[nn.Parameter]:
        """Return the parameters."""
        return self._parameters

    def gradients(self) -> list[Tensor]:
        """Return the gradients, views of the buffer."""
        return list(self.views.values())

    def buffer(self) -> Tensor:
        """Return the buffer of all gradients."""
        return self._buffer

    def is_last(self) -> bool:
        """Return whether no other bucket is reduced after this one in the step."""
        return self._last

    def complete(self, last: bool) -> "TracedBucket":
        """Return the bucket, complete, and ready for the next step."""
        self.missing, self._last = len(self._parameters), last
        return self


class TracedReplicas(DistributedDataParallel):
    """A stand-in for DDP with the same buckets, copies and reductions."""

    def __init__(self, model: nn.Module, mesh: DeviceMesh, strategy: StrategyConfig):
        nn.Module.__init__(self)
        self.module, self._strategy = model, strategy
        self._group, self._reduces = mesh.get_group(), True
        self.exchange = build_comm_hook(model, mesh, strategy)
        learned = [p for p in model.parameters() if p.requires_grad]
        self._assign_buckets(learned[::-1])
        self._order: list[nn.Parameter] | None = []  # of their first gradients; None = rebuilt
        self._open = len(self._buckets)
        self._sent: list[Tensor] = []  # rounded gradients on their way
        for parameter in learned:
            parameter.register_post_accumulate_grad_hook(self._accept_gradient)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model; after the first reduction in buckets in the order of the gradients."""
        if self._order and len(self._order) == len(self._bucket_of):
            self._assign_buckets(self._order)
            self._order = None
        self._open, self._sent = len(self._buckets), []
        return self.module(*args, **kwargs)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Return a context in which gradients accumulate on this rank only."""
        self._reduces = False
        try:
            yield
        finally:
            self._reduces = True

    def _assign_buckets(self, parameters: list[nn.Parameter]) -> None:
        self._buckets: list[TracedBucket] = []  # those before are freed first
        self._bucket_of: dict[nn.Parameter, TracedBucket] = {}
        limits = [dist._DEFAULT_FIRST_BUCKET_BYTES, int(self._strategy.bucket_mib * 2**20)]
        for own in _split_by_size(parameters, limits):
            self._buckets.append(bucket := TracedBucket(own))
            self._bucket_of |= dict.fromkeys(own, bucket)

    @torch.no_grad()
    def _accept_gradient(self, parameter: nn.Parameter) -> None:
        """Copy a gradient into its bucket, and reduce the bucket when it is complete."""
        if not self._reduces:
            return
        if self._order is not None:
            self._order.append(parameter)
        bucket, gradient = self._bucket_of[parameter], parameter.grad
        assert gradient is not None
        bucket.views[parameter].copy_(gradient)
        parameter.grad = bucket.views[parameter]
        bucket.missing -= 1
        if not bucket.missing:
            self._open -= 1
            self._reduce(bucket.complete(last=not self._open))

    def _reduce(self, bucket: TracedBucket) -> None:
        gradients = bucket.buffer()
        dtype = reduce_dtype(self._strategy.reduce, gradients.dtype)
        if self.exchange is not None:
            self.exchange.start_bucket(bucket)  # type: ignore[arg-type]
            if bucket.is_last():
                self.exchange.finish_buckets()
        elif dtype != gradients.dtype:
            self._sent.append(rounded := gradients.to(dtype))
            dist.all_reduce(rounded, group=self._group)
            gradients.copy_(rounded)
        else:
            dist.all_reduce(gradients, group=self._group)


def _split_by_size(parameters: list[nn.Parameter], limits: list[int]) -> list[list[nn.Parameter]]:
    """Return buckets of consecutive parameters, each closed once it has reached its limit."""
    buckets: list[list[nn.Parameter]] = []
    held = 0
    for parameter in parameters:
        if not buckets or held >= limits[min(len(buckets), len(limits)) - 1]:
            buckets.append([])
            held = 0
        buckets[-1].append(parameter)
        held += parameter.nbytes
    return buckets


def wrap_traced(
    model: nn.Module, mesh: DeviceMesh | None, strategy: StrategyConfig
) -> tuple[nn.Module, CompressedAllReduce | None]:
    """Wrap a model of fake tensors as `wrap_in_ddp` wraps a real one."""
    if mesh is None:
        return model, None
    wrapped = TracedReplicas(model, mesh, strategy)
    return wrapped, wrapped.exchange
