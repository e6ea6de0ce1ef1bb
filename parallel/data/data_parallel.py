"""Data parallelism over replicas and shards: DDP or FSDP, and the loop over micro-batches."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from parallel.axis import LossOf, ParallelAxis
from parallel.data.comm_hook import CompressedAllReduce
from parallel.data.ddp import reduce_dtype, wrap_in_ddp
from parallel.data.fsdp import shard_with_fsdp
from parallel.mesh import fsdp_mesh, replica_mesh
from parallel.model_protocol import Inputs, ParallelizableModel
from parallel.strategy import StrategyConfig

# (model, mesh of the replicas or None, strategy) -> what training forwards call, compressed sums
WrapReplicas = Callable[..., tuple[nn.Module, CompressedAllReduce | None]]


class DataParallel(ParallelAxis):
    """The replicate, context and shard axes, of any degree, over which gradients are summed.

    FSDP supports DTensors and several forwards before a backward, DDP does not: if an inner axis
    needs either, FSDP also sums over the replicas. `parameters` is the dtype of weights and
    gradients at rest, `compute` the dtype in which FSDP gathers weights; `wrap` wraps a model that
    has replicas.
    """

    wrapped: nn.Module  # the DDP or FSDP module that training forwards call

    def __init__(
        self,
        mesh: DeviceMesh,
        strategy: StrategyConfig,
        inside: Sequence[ParallelAxis],
        parameters: torch.dtype,
        compute: torch.dtype,
        wrap: WrapReplicas = wrap_in_ddp,
    ):
        self._wrap = wrap
        self._mesh, self._copies, self._strategy = mesh, replica_mesh(mesh), strategy
        super().__init__(self._copies or mesh["shard"])
        beyond_ddp = self._copies is not None and not all(axis.allows_ddp for axis in inside)
        self.shards = mesh["shard"].size() > 1 or beyond_ddp
        self._reshards = all(axis.allows_reshard for axis in inside)
        self._parameters, self._compute = parameters, compute
        self._exchange: CompressedAllReduce | None = None
        self.schedule = self

    def prepare(self, model: ParallelizableModel) -> None:
        """Shard a meta model with FSDP, if the strategy needs it."""
        if not self.shards:
            return
        assert isinstance(model, nn.Module)
        mesh, strategy = fsdp_mesh(self._mesh, self._copies), self._strategy
        reduce = reduce_dtype(strategy.reduce, self._parameters)
        frees = strategy.reshard_after_forward and self._reshards
        shard_with_fsdp(model, mesh, self._compute, reduce, frees)

    def use_weights(self, model: ParallelizableModel, sharded: bool) -> None:
        """Wrap the finished model in DDP, if it has replicas and FSDP does not sum over them."""
        assert isinstance(model, nn.Module)
        self._model, copies = model, None if sharded else self._copies
        self.wrapped, self._exchange = self._wrap(model, copies, self._strategy)

    def run(self, micro_batches: list[Inputs], loss_of: LossOf) -> None:
        """Run forward and backward of one micro-batch after another."""
        for number, micro_batch in enumerate(micro_batches):
            with self._reducing(number == len(micro_batches) - 1):
                loss_of(self.wrapped(micro_batch), number).backward()

    def forward(self, inputs: Inputs, cache: Any) -> Tensor | None:
        """Return the logits computed on this rank, without gradients."""
        return self._model(inputs, cache)

    @contextmanager
    def _reducing(self, reduce: bool) -> Iterator[None]:
        """Return a context that sums gradients over the replicas only if `reduce`.

        Shards are reduced in every backward: unreduced gradients would take the memory of the full
        model.
        """
        if isinstance(self.wrapped, FSDPModule):
            self.wrapped.set_requires_all_reduce(reduce)
        if isinstance(self.wrapped, DistributedDataParallel) and not reduce:
            with self.wrapped.no_sync():
                yield
        else:
            yield

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Return a context that frees FSDP's gathered weights on exit."""
        try:
            yield
        finally:
            # No backward follows that would free the gathered weights, and until they are freed
            # the registered parameters are not the sharded ones that a checkpoint saves.
            for module in self._model.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()

    def state(self) -> dict[str, Tensor]:
        """Return the error-feedback state of the compressed sums."""
        return {} if self._exchange is None else self._exchange.error_feedback_state()
