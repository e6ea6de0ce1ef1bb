"""A process group on CPU ranks with the rules of NCCL, to find what only a GPU would show.

One queue per communicator runs its calls in order, as a stream does: sends and receives without a
match block it. The first call of a communicator blocks until all its ranks have made it. Outputs
are NaN (integers: the least value) until the work has been waited for; inputs must not change
before. Tensors must be on the device, contiguous, and of NCCL's dtypes and reductions. Ranks that
issue different collectives get an error with both of them.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed import distributed_c10d

from parallel.runtime import Runtime, end_process_group
from trainer.verify.communicator import (
    Call,
    Communicator,
    NcclLikeError,
    QueuedWork,
    from_bytes,
    place_of_caller,
)
from trainer.verify.host_tensors import DEVICE, HOST, place_of, track_host_tensors

NAME = "nccl_like"
SECONDS = 120.0  # time-out of a call

DTYPES = {
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.int8, torch.uint8, torch.int32, torch.int64, torch.bool),
    *(torch.float8_e4m3fn, torch.float8_e5m2),
}
NOT_REDUCED = (torch.float8_e4m3fn, torch.float8_e5m2)
REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "SUM": lambda x: x.any(0) if x.dtype == torch.bool else x.sum(0, dtype=x.dtype),
    "AVG": lambda x: x.sum(0, dtype=x.dtype) / len(x),
    "PRODUCT": lambda x: x.prod(0, dtype=x.dtype),
    "MIN": lambda x: x.amin(0),
    "MAX": lambda x: x.amax(0),
}
# Modules whose tensors of the host take gloo, the other half of a run's "cpu:gloo,cuda:nccl".
CONTROL_PLANE = ("parallel.runtime", "parallel.health", "trainer.checkpoint")
Tensors = Sequence[Tensor]


_ProcessGroup: Any = dist.ProcessGroup  # torch's stubs have other names for arguments


class NcclLikeGroup(_ProcessGroup):
    """A process group whose calls are queued by communicator; see this module."""

    def __init__(self, options: Any, _backend_options: Any = None):
        super().__init__(options.group_rank, options.group_size)
        self._store, self._timeout = options.store, options.timeout
        self._ranks = list(options.global_ranks_in_group) or list(range(options.group_size))
        self._name, self._purpose = options.group_id, ""
        self._communicators: dict[str, Communicator] = {}
        self.batch: list[Call] | None = None  # of sends and receives that run together

    def getBackendName(self) -> str:  # noqa: N802
        """Return the name of the backend."""
        return NAME

    def getGroupName(self) -> str:  # noqa: N802
        """Return the name that functional collectives find the group by."""
        return self._name

    def setGroupDesc(self, purpose: str) -> None:  # noqa: N802
        """Set what the group is for."""
        self._purpose = purpose

    def getGroupDesc(self) -> str:  # noqa: N802
        """Return what the group is for."""
        return self._purpose

    @property
    def group_name(self) -> str:
        """Return the name that functional collectives find the group by."""
        return self._name

    def communicator(self, ranks: Sequence[int] = ()) -> Communicator:
        """Return the communicator of these ranks of the group (of all by default)."""
        own = ranks or range(self.size())
        key = f"communicator {'-'.join(map(str, own))}"
        if key not in self._communicators:
            members = [self._ranks[rank] for rank in own]
            store, name = dist.PrefixStore(key, self._store), self._purpose or self._name
            rank = list(own).index(self.rank())
            made = Communicator(name, store, rank, members, self._timeout)
            self._communicators[key] = made
        return self._communicators[key]

    def shutdown(self) -> None:
        """End all communicators."""
        for communicator in self._communicators.values():
            communicator.close()

    def unwaited_calls(self) -> list[str]:
        """Return the calls that were never waited for."""
        works = [w for c in self._communicators.values() for w in c.works if not w.waited]
        return [str(call) for work in works for call in work.calls]

    def _collective(
        self,
        name: str,
        inputs: Tensors,
        outputs: Tensors,
        result: Callable[[list[Tensor]], Tensors],
        like: Tensors | None = None,
    ) -> QueuedWork:
        """Queue a collective; the shapes of `like` (the inputs) must agree on all ranks."""
        self._check_tensors(name, [*inputs, *outputs])
        shapes = " ".join(f"{x.dtype} {tuple(x.shape)}" for x in (inputs if like is None else like))
        label = f"{name} {shapes}".replace("torch.", "")
        return self.communicator().submit([Call(label, inputs, outputs, result)])

    def _check_tensors(self, name: str, tensors: Tensors) -> None:
        for tensor in tensors:
            what = f"{name} of {tensor.dtype} {tuple(tensor.shape)} in {self._purpose}"
            if tensor.dtype not in DTYPES:
                raise NcclLikeError(f"{what}: NCCL does not know the dtype")
            if not tensor.is_contiguous():
                raise NcclLikeError(f"{what}: the tensor must be contiguous")
            if place_of(tensor) == HOST and not place_of_caller().startswith(CONTROL_PLANE):
                raise NcclLikeError(f"{what}: the tensor is on the host, not on the device")

    def allreduce(self, tensors: Tensors, opts: Any = None) -> QueuedWork:
        """Reduce over the ranks."""
        how = _reduction_of(opts, tensors)
        return self._collective(
            f"all_reduce {how}", tensors, tensors, lambda p: _reduced(how, p, tensors)
        )

    allreduce_coalesced = allreduce

    def reduce(self, tensors: Tensors, opts: Any) -> QueuedWork:
        """Reduce over the ranks, on one of them."""
        how, mine = _reduction_of(opts, tensors), opts.rootRank == self.rank()
        return self._collective(
            f"reduce {how} to {opts.rootRank}",
            tensors,
            tensors if mine else [],
            lambda p: _reduced(how, p, tensors) if mine else [],
        )

    def broadcast(self, tensors: Tensors, opts: Any) -> QueuedWork:
        """Broadcast the tensors of one rank."""
        root = opts.rootRank
        sent, received = (tensors, []) if root == self.rank() else ([], tensors)
        return self._collective(
            f"broadcast from {root}",
            sent,
            received,
            lambda p: from_bytes(p[root], received) if received else [],
            tensors,
        )

    def allgather(self, outputs: list[Tensors], inputs: Tensors, opts: Any = None) -> QueuedWork:
        """Gather a tensor of each rank, which may differ in size, on all ranks."""
        return self._collective(
            "all_gather",
            inputs,
            outputs[0],
            lambda p: [from_bytes(x, [y])[0] for x, y in zip(p, outputs[0], strict=True)],
            outputs[0],
        )

    def all_gather_single(self, output: Tensor, input: Tensor, opts: Any = None) -> QueuedWork:
        """Gather tensors of the ranks in one."""
        return self.all_gather_single_coalesced([output], [input])

    def all_gather_single_coalesced(
        self, outputs: Tensors, inputs: Tensors, opts: Any = None
    ) -> QueuedWork:
        """Gather several tensors of the ranks, each in one."""

        def result(payloads: list[Tensor]) -> Tensors:
            ranks = [from_bytes(payload, inputs) for payload in payloads]
            return [torch.stack(parts) for parts in zip(*ranks, strict=True)]

        return self._collective("all_gather_single", inputs, outputs, result)

    def reduce_scatter(self, outputs: Tensors, inputs: list[Tensors], opts: Any) -> QueuedWork:
        """Reduce a list of tensors, one for each rank."""
        how, mine = _reduction_of(opts, outputs), self.rank()
        return self._collective(
            f"reduce_scatter {how}",
            inputs[0],
            outputs,
            lambda p: [_reduced(how, p, inputs[0])[mine]],
        )

    def reduce_scatter_single(self, output: Tensor, input: Tensor, opts: Any) -> QueuedWork:
        """Reduce a tensor that has a part for each rank."""
        return self.reduce_scatter_single_coalesced([output], [input], opts)

    def reduce_scatter_single_coalesced(
        self, outputs: Tensors, inputs: Tensors, opts: Any
    ) -> QueuedWork:
        """Reduce several tensors that have a part for each rank."""
        how = _reduction_of(opts, outputs)

        def result(payloads: list[Tensor]) -> Tensors:
            whole = _reduced(how, payloads, inputs)
            return [x.view(self.size(), -1)[self.rank()] for x in whole]

        return self._collective(f"reduce_scatter_single {how}", inputs, outputs, result)

    def all_to_all_single(
        self, output: Tensor, input: Tensor, output_sizes: Any, input_sizes: Any, opts: Any = None
    ) -> QueuedWork:
        """Send a part of dim 0 to each rank."""
        parts = [
            _split(x, s, self.size()) for x, s in ((output, output_sizes), (input, input_sizes))
        ]
        return self.alltoall(*parts)

    def alltoall(self, outputs: Tensors, inputs: Tensors, opts: Any = None) -> QueuedWork:
        """Send a tensor to each rank."""
        rank, sizes = self.rank(), [x.numel() * x.element_size() for x in inputs]
        name = f"all_to_all {inputs[0].dtype}"
        head = torch.tensor(sizes, dtype=torch.int64)
        self._check_tensors(name, [*inputs, *outputs])

        def result(payloads: list[Tensor]) -> Tensors:
            made = []
            for theirs, output in zip(payloads, outputs, strict=True):
                lengths = theirs[: 8 * len(inputs)].clone().view(torch.int64).tolist()
                part = theirs[8 * len(inputs) :].split(lengths)[rank]
                if part.numel() != output.numel() * output.element_size():
                    raise NcclLikeError(f"{part.numel()} bytes were sent for {tuple(output.shape)}")
                made += from_bytes(part, [output])
            return made

        return self._collective(name, [head, *inputs], outputs, result, [])

    def gather(self, outputs: list[Tensors], inputs: Tensors, opts: Any) -> QueuedWork:
        """Gather a tensor of each rank on one of them."""
        mine = outputs[0] if opts.rootRank == self.rank() else []
        return self._collective(
            f"gather to {opts.rootRank}",
            inputs,
            mine,
            lambda p: [from_bytes(x, [y])[0] for x, y in zip(p, mine, strict=False)],
        )

    def scatter(self, outputs: Tensors, inputs: list[Tensors], opts: Any) -> QueuedWork:
        """Send a tensor of one rank to each."""
        sent = inputs[0] if opts.rootRank == self.rank() else []
        return self._collective(
            f"scatter from {opts.rootRank}",
            sent,
            outputs,
            lambda p: from_bytes(p[opts.rootRank].chunk(self.size())[self.rank()], outputs),
            outputs,
        )

    def barrier(self, opts: Any = None) -> QueuedWork:
        """Wait for all ranks."""
        return self._collective("barrier", [], [], lambda p: [])

    def send(self, tensors: Tensors, peer: int, tag: int = 0) -> QueuedWork | None:
        """Send to a rank of the group."""
        return self._point_to_point(tensors, peer, receives=False)

    def recv(self, tensors: Tensors, peer: int, tag: int = 0) -> QueuedWork | None:
        """Receive from a rank of the group."""
        return self._point_to_point(tensors, peer, receives=True)

    def _point_to_point(self, tensors: Tensors, peer: int, receives: bool) -> QueuedWork | None:
        source, target = (peer, self.rank()) if receives else (self.rank(), peer)
        (tensor,) = tensors
        what = f"transfer from {self._ranks[source]} to {self._ranks[target]}"
        self._check_tensors(what, tensors)
        label = f"{what} {tensor.dtype} {tuple(tensor.shape)}".replace("torch.", "")
        outputs = tensors if receives else []
        call = Call(label, tensors, outputs, lambda p: from_bytes(p[0], outputs), peer, receives)
        if self.batch is not None:
            self.batch.append(call)
            return None
        # Alone, it runs on a communicator of the two ranks.
        pair = sorted((self.rank(), peer))
        call.peer = pair.index(peer)
        return self.communicator(pair).submit([call])

    # Names before torch 2.13.
    _allgather_base, _reduce_scatter_base = all_gather_single, reduce_scatter_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced
    alltoall_base = all_to_all_single


def _reduction_of(opts: Any, tensors: Tensors) -> str:
    """Return the name of a reduction; raises if NCCL has none for these tensors."""
    op = dist.ReduceOp.SUM if opts is None else opts.reduceOp
    name = next((n for n in REDUCTIONS if op == getattr(dist.ReduceOp, n)), None)
    if name is None:
        raise NcclLikeError(f"NCCL has no reduction {op}; it has {', '.join(REDUCTIONS)}")
    for tensor in tensors:
        if tensor.dtype in NOT_REDUCED or (name == "AVG" and tensor.dtype == torch.bool):
            raise NcclLikeError(f"NCCL does not reduce {tensor.dtype} by {name}")
    return name


def _reduced(how: str, payloads: list[Tensor], likes: Tensors) -> list[Tensor]:
    ranks = [from_bytes(payload, likes) for payload in payloads]
    return [REDUCTIONS[how](torch.stack(parts)) for parts in zip(*ranks, strict=True)]


def _split(x: Tensor, sizes: list[int], parts: int) -> list[Tensor]:
    return list(x.split(sizes)) if sizes else list(x.chunk(parts))


def batch_transfers(operations: list[dist.P2POp]) -> list[Any]:
    """Run sends and receives together, as `dist.batch_isend_irecv` does with NCCL."""
    group: Any = operations[0].group
    group.batch = []
    try:
        for operation in operations:
            move = group.send if operation.op is dist.isend else group.recv
            move([operation.tensor], operation.group_peer)
        return [group.communicator().submit(group.batch)]
    finally:
        group.batch = None


dist.Backend.register_backend(NAME, NcclLikeGroup, extended_api=True, devices=["cpu"])


@contextmanager
def nccl_like_ranks(runtime: Runtime, seconds: float = SECONDS) -> Iterator[Runtime]:
    """Replace the process group by an NCCL-like one; it ends with the caller's process group.

    Raises NcclLikeError at the end if a call was never waited for.
    """
    assert runtime.store is not None
    end_process_group()
    dist.init_process_group(
        NAME,
        store=dist.PrefixStore(NAME, runtime.store),
        rank=runtime.rank,
        world_size=runtime.world_size,
        timeout=timedelta(seconds=seconds),
    )
    with (
        mock.patch.object(dist, "batch_isend_irecv", batch_transfers),
        mock.patch.object(distributed_c10d, "_get_object_coll_device", lambda group: DEVICE),
        track_host_tensors(),
    ):
        yield replace(runtime, device=DEVICE)
    groups = [g for g in distributed_c10d._world.pg_names if isinstance(g, NcclLikeGroup)]
    left = [call for group in groups for call in group.unwaited_calls()]
    if left:
        raise NcclLikeError(f"never waited for: {'; '.join(left)}")


def on_nccl_like_ranks(
    runtime: Runtime, function: Callable, *args: Any, seconds: float = SECONDS
) -> Any:
    """Return `function(runtime, *args)` on an NCCL-like process group."""
    with nccl_like_ranks(runtime, seconds) as ranks:
        return function(ranks, *args)
