"""One rank of a process group of any size, without the others and without data."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.fsdp._fully_shard import _fsdp_param, _fsdp_param_group
from torch.distributed.pipelining import schedules
from torch.nn import functional as F
from torch.testing._internal.distributed.fake_pg import FakeStore

from parallel.parallelize import allocate_parameters
from parallel.runtime import Runtime, end_process_group
from trainer.plan.live_bytes import LiveBytes
from trainer.tasks import set_prediction

GATHERED = "gathered"


@contextmanager
def fake_ranks(rank: int, world_size: int) -> Iterator[Runtime]:
    """Yield one rank of a process group whose other ranks do not exist.

    Collectives return at once, with tensors of the right shape. The process must have no process
    group, and has none afterwards.
    """
    assert not dist.is_initialized(), "a trace makes a process group of its own"
    store = FakeStore()
    dist.init_process_group("fake", store=store, rank=rank, world_size=world_size)
    try:
        yield Runtime(rank, world_size, rank, world_size, torch.device("cpu"), store)
    finally:
        end_process_group()


def fake_materialize(mode: FakeTensorMode) -> Callable[..., None]:
    """Return a function that allocates a meta model's parameters as fake tensors, undrawn."""

    def materialize(model: nn.Module, device: torch.device, *_args: Any) -> None:
        with mode:
            allocate_parameters(model, device)

    return materialize


@contextmanager
def visible_memory(live: LiveBytes, device: str) -> Iterator[None]:
    """Show `live` what no operator does, and replace what fake tensors cannot do.

    FSDP resizes storages. gloo holds what it sends until the schedule has waited for it, NCCL until
    it is sent.
    The matching of a detector reads its costs, CTC its lengths. A CPU has no fused RMSNorm, CUDA
    has.
    """
    with ExitStack() as patches:
        for module in (_fsdp_param, _fsdp_param_group):
            for name in ("alloc_storage", "free_storage"):
                if hasattr(module, name):
                    resize = partial(_resize, live, getattr(module, name))
                    patches.enter_context(mock.patch.object(module, name, resize))
        send = partial(_send_holding, schedules._batch_p2p, device == "cpu")
        patches.enter_context(mock.patch.object(schedules, "_batch_p2p", send))
        match = partial(_match_all, live)
        patches.enter_context(mock.patch.object(set_prediction, "match_queries", match))
        ctc = partial(_ctc_loss, live)
        patches.enter_context(mock.patch.object(F, "ctc_loss", ctc))
        if device == "cuda":
            patches.enter_context(mock.patch.object(F, "rms_norm", _fused_rms_norm))
        yield


def _resize(live: LiveBytes, resize: Callable[[Tensor], None], tensor: Tensor) -> None:
    before = tensor.untyped_storage().nbytes()
    resize(tensor)
    if tensor.untyped_storage().nbytes() != before:
        live.resized(tensor, GATHERED)


class _Sent:
    """The handle of a message in flight, which holds what is sent."""

    def __init__(self, work: dist.Work, tensors: list[Tensor]):
        self._work, self._tensors = work, tensors

    def wait(self) -> None:
        """Wait for nobody."""


def _send_holding(
    start: Callable[..., list[dist.Work]],
    holds: bool,
    operations: list[dist.P2POp],
    *args: Any,
    **options: Any,
) -> list[Any]:
    tensors = [operation.tensor for operation in operations] if holds else []
    return [_Sent(work, tensors) for work in start(operations, *args, **options)]


def _match_all(
    live: LiveBytes, said_BQC: Tensor, boxes_BQ4: Tensor, targets_BN6: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return a match for every row of the targets, or for every query if these are fewer."""
    with torch.no_grad():
        set_prediction.pair_costs(said_BQC, boxes_BQ4, targets_BN6).double()
    live.counts[live.window].reads += 2  # the costs, and which rows are boxes
    matches = len(said_BQC) * min(said_BQC.shape[1], targets_BN6.shape[1])
    numbers = torch.zeros(3, matches, dtype=torch.int64)
    return numbers[0], numbers[1], numbers[2]


class _FusedRMSNorm(torch.autograd.Function):
    """RMSNorm's memory in one kernel: it keeps its input, and a number per row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        precise = torch.promote_types(x.dtype, torch.float32)
        ctx.save_for_backward(x, weight, x.new_empty(*x.shape[:-1], 1, dtype=precise))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight) if ctx.needs_input_grad[1] else None


def _fused_rms_norm(x: Tensor, _shape: Any, weight: Tensor, _eps: float | None = None) -> Tensor:
    return _FusedRMSNorm.apply(x, weight)


class _CTC(torch.autograd.Function):
    """CTC's memory: forward and backward probabilities of all states, for half as many targets."""

    @staticmethod
    def forward(ctx: Any, log_probability_TBV: Tensor) -> Tensor:
        length, samples, _ = log_probability_TBV.shape
        states = 2 * targets_of_vectors(length) + 1
        alpha_BTL = log_probability_TBV.new_empty(samples, length, states)
        ctx.save_for_backward(log_probability_TBV, alpha_BTL)
        return log_probability_TBV.new_zeros(samples)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        log_probability_TBV, alpha_BTL = ctx.saved_tensors
        beta_BTL = torch.empty_like(alpha_BTL)
        inside_TBV = torch.zeros_like(log_probability_TBV)
        gradient_TBV = torch.zeros_like(inside_TBV)
        del beta_BTL, inside_TBV  # they have been there beside the gradient
        return gradient_TBV


def targets_of_vectors(vectors: int) -> int:
    """Return how many classes an utterance is taken to have."""
    return vectors // 2


def _ctc_loss(live: LiveBytes, log_probability_TBV: Tensor, *_args: Any, **_options: Any) -> Tensor:
    live.counts[live.window].reads += 2
    return _CTC.apply(log_probability_TBV)
