"""Pipeline parallelism: ranks hold successive runs of blocks, and micro-batches flow through them.

torch's schedules (`torch.distributed.pipelining`) say which rank computes what and when. A `Stage`
is what they drive: it calls one model with a run of its blocks, and since every rank reads the
same micro-batches, nothing but what flows between blocks travels, in each micro-batch's shapes.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.pipelining import schedules
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight

from parallel.collectives import all_reduce
from parallel.grad_norm import local
from parallel.pipeline.partition import cut, runs
from parallel.pipeline.schedules import SCHEDULES, placed, stages_per_rank
from parallel.pipeline.simulator import Action
from parallel.pipeline.torch_schedules import class_of
from parallel.pipeline.trace import Recording
from parallel.strategy import StrategyConfig

Flow = tuple[Tensor | None, ...]
LossOf = Callable[[Tensor, int], Tensor]  # (logits, number of the micro-batch) -> loss


class Stage:
    """A run of blocks, as torch's schedules drive it: received, computed and sent by micro-batch.

    Its attributes and methods have the names that the schedules ask for; all that is of one
    micro-batch is kept by its number until it has been used.
    """

    has_backward = True
    submod = None  # FSDP inside is the pipeline's business

    def __init__(self, index: int, pipeline: "Pipeline"):
        self.stage_index, self.num_stages = index, len(pipeline.runs)
        self.group_rank, self.group_size = pipeline.rank, pipeline.group.size()
        self.is_first, self.is_last = index == 0, index == self.num_stages - 1
        self.device = pipeline.device
        self.blocks = pipeline.runs[index]
        self.stage_index_to_group_rank: dict[int, int] = {}  # a schedule fills it in
        # Of these a schedule only checks that nothing skips a stage.
        self.args_recv_info: dict[int, tuple] = {0: ()}
        self.act_send_info: dict[int, list] = {}
        self._pipeline = pipeline
        self.clear_runtime_states()

    def clear_runtime_states(self) -> None:
        """Forget all micro-batches."""
        self._inputs: dict[int, list[Tensor]] = {}
        self._computed: dict[int, tuple[list[Tensor], list[Tensor]]] = {}  # outputs, inputs
        self._output_grads: dict[int, list[Tensor]] = {}
        self._input_grads: dict[int, list[Tensor]] = {}
        self._weight_jobs: dict[int, Callable[[], Any]] = {}
        self.output_chunks: list[Any] = []

    def _get_init_p2p_neighbors_ops(self) -> list[dist.P2POp]:
        return []  # the pipeline has opened the group's connections

    def _prepare_forward_infra(self, *_args: Any, **_kwargs: Any) -> None:
        """Nothing: buffers are made as each micro-batch needs them."""

    _prepare_backward_infra = _prepare_forward_infra

    def get_fwd_recv_ops(self, number: int) -> list[dist.P2POp]:
        """Post the receipt of what flows in."""
        if self.is_first:
            return []
        micro_batch = self._pipeline.micro_batches[number]
        self._inputs[number] = self._pipeline.room(micro_batch, int(self.blocks[0]))
        return self._pipeline.transfers(dist.irecv, self._inputs[number], self.stage_index - 1)

    def set_local_fwd_input(self, outputs: Flow, number: int) -> None:
        """Take what flows in from a stage on the same rank."""
        self._inputs[number] = [tensor.detach() for tensor in outputs if tensor is not None]

    def forward_one_chunk(
        self, number: int, args: Any = (), kwargs: Any = None, save_forward_output: bool = False
    ) -> Tensor | Flow:
        """Compute; the last stage returns logits."""
        inputs = self._inputs.pop(number, [])
        for tensor in _learned_from(inputs):
            tensor.requires_grad_()
        with self._pipeline.recorded(self.stage_index, "F", number):
            output = self._pipeline.compute(number, self.blocks, inputs)
        flows = (output,) if isinstance(output, Tensor) else output
        self._computed[number] = [tensor for tensor in flows if tensor is not None], inputs
        return output

    def get_fwd_send_ops(self, number: int) -> list[dist.P2POp]:
        """Post the sending of what flows on."""
        if self.is_last:
            return []
        outputs = [tensor.detach().contiguous() for tensor in self._computed[number][0]]
        return self._pipeline.transfers(dist.isend, outputs, self.stage_index + 1)

    def release_fwd_send_outputs(self, number: int) -> None:
        """Nothing: what was sent is kept for the backward; asked for since torch 2.15."""

    def get_bwd_recv_ops(self, number: int) -> list[dist.P2POp]:
        """Post the receipt of the gradients of what has flowed on."""
        if self.is_last:
            return []
        outputs = _learned_from(self._computed[number][0])
        self._output_grads[number] = [torch.empty_like(tensor) for tensor in outputs]
        return self._pipeline.transfers(
            dist.irecv, self._output_grads[number], self.stage_index + 1
        )

    def set_local_bwd_input(self, grads: list[Tensor], number: int) -> None:
        """Take those gradients from a stage on the same rank."""
        self._output_grads[number] = grads

    def backward_one_chunk(
        self,
        number: int,
        loss: Tensor | None = None,
        full_backward: bool = True,
        last_backward: bool = False,
    ) -> None:
        """Gradients of inputs and weights; without `full_backward` those of weights come later."""
        with self._pipeline.recorded(self.stage_index, "B" if full_backward else "I", number):
            self._backward(number, loss, full_backward)

    def _backward(self, number: int, loss: Tensor | None, full_backward: bool) -> None:
        outputs, inputs = map(_learned_from, self._computed.pop(number))
        grads = self._output_grads.pop(number, None)
        if loss is not None:
            outputs, grads = [loss], None
        job = partial(torch.autograd.backward, outputs, grads)
        if not full_backward and self.is_first:
            self._weight_jobs[number] = job  # there are no inputs to give gradients to
            return
        if full_backward:
            job()
        else:
            weights: Any = list(self._pipeline.weights(self.blocks))
            # torch detaches the outputs in place, which it cannot do with views.
            outputs = [tensor.clone() if tensor._is_view() else tensor for tensor in outputs]
            _, groups = stage_backward_input(outputs, grads, inputs, weights)
            self._weight_jobs[number] = partial(stage_backward_weight, weights, groups)
        self._input_grads[number] = [
            torch.zeros_like(tensor) if tensor.grad is None else tensor.grad for tensor in inputs
        ]

    def backward_weight_one_chunk(self, number: int, last_backward: bool = False) -> None:
        """The gradients of weights that were left for later."""
        with self._pipeline.recorded(self.stage_index, "W", number):
            self._weight_jobs.pop(number)()

    def get_bwd_send_ops(self, number: int) -> list[dist.P2POp]:
        """Post the sending of the gradients of what has flowed in."""
        if self.is_first:
            return []
        grads = [grad.contiguous() for grad in self._input_grads.pop(number)]
        return self._pipeline.transfers(dist.isend, grads, self.stage_index - 1)

    def get_local_bwd_output(self, number: int) -> list[Tensor]:
        """Those gradients, for a stage on the same rank."""
        return self._input_grads.pop(number)

    def perform_reduce_grad(self, _factor: int) -> None:
        """Nothing: FSDP reduces once all stages of this rank are done."""


class Pipeline:
    """The stages of one rank, and the schedule that all ranks of the pipeline axis follow."""

    def __init__(
        self,
        model: nn.Module,
        group: dist.ProcessGroup,
        strategy: StrategyConfig,
        runs: Sequence[tuple[str, ...]],
        placement: Sequence[int],
        device: torch.device,
    ):
        self.model, self.group, self.rank = model, group, group.rank()
        self.runs, self.placement = list(runs), placement  # of each stage: blocks, rank
        self.device = device
        self.strategy, self._schedules = strategy, dict[int, Any]()
        own = [stage for stage, rank in enumerate(placement) if rank == self.rank]
        self.stages = [Stage(index, self) for index in own]
        self.micro_batches: list[dict[str, Tensor]] = []
        self._loss_of: LossOf | None = None
        self.tied: Tensor | None = None  # a parameter that another rank has too
        self.recording: Recording | None = None  # of the step that is to come
        all_reduce(torch.zeros(1, device=device), group)  # opens the group's connections

    @property
    def holds_embedding(self) -> bool:
        """Return whether the first stage is here."""
        return any(stage.is_first for stage in self.stages)

    @property
    def holds_head(self) -> bool:
        """Return whether the last stage is here."""
        return any(stage.is_last for stage in self.stages)

    def run(self, micro_batches: list[dict[str, Tensor]], loss_of: LossOf) -> None:
        """Forward and backward of all micro-batches; gradients are left in the parameters.

        `loss_of` is called once per micro-batch, on the rank of the last stage.
        """
        self.micro_batches, self._loss_of = micro_batches, loss_of
        fsdp = self.model if isinstance(self.model, FSDPModule) else None
        if fsdp is not None:
            # Weights stay gathered and gradients whole until all micro-batches are through.
            fsdp.set_is_last_backward(False)
            fsdp.set_reshard_after_backward(False)
            fsdp.set_requires_gradient_sync(False)
        count = len(micro_batches)
        if count not in self._schedules:
            self._schedules[count] = self._new_schedule(count)
        if self.recording is not None:
            self.recording.start()
        self._schedules[count].step(target=torch.arange(count), return_outputs=False)
        if fsdp is not None:
            _reduce_gradients(fsdp)
        self.micro_batches, self._loss_of = [], None

    def _new_schedule(self, micro_batches: int) -> Any:
        options = {"loss_fn": self._loss, "scale_grads": False}
        if self.strategy.schedule_csv:
            own = schedules._PipelineScheduleRuntime(self.stages, micro_batches, **options)
            own._load_csv(self.strategy.schedule_csv)
            return own
        rules = SCHEDULES[self.strategy.schedule]
        stages = self.stages[0] if rules.most_stages == 1 else self.stages
        return class_of(self.strategy.schedule)(stages, micro_batches, **options)

    def _loss(self, logits: Tensor, number: Tensor) -> Tensor:
        assert self._loss_of is not None
        with self.recorded(len(self.runs) - 1, "F", int(number)):  # it is part of that forward
            return self._loss_of(logits, int(number))

    def recorded(self, stage: int, kind: str, number: int) -> AbstractContextManager[None]:
        """Around what an action computes: a span of the recording, if there is one."""
        if self.recording is None:
            return nullcontext()
        return self.recording.span(Action(stage, kind, number))

    def compute(self, number: int, blocks: Sequence[str], inputs: list[Tensor]) -> Any:
        """One stage's forward of a micro-batch."""
        micro_batch = self.micro_batches[number]
        flow = self._flow(inputs, micro_batch, int(blocks[0])) if inputs else None
        return self.model(micro_batch, flow=flow, blocks=blocks)

    def weights(self, blocks: Sequence[str]) -> Iterator[Tensor]:
        """Yield what autograd works on of a stage's parameters: for split layers, their leaves."""
        modules = [self.model.get_submodule("blocks").get_submodule(name) for name in blocks]
        modules += [self.model.embed] if blocks == self.runs[0] else []  # type: ignore[list-item]
        modules += [self.model.head] if blocks == self.runs[-1] else []  # type: ignore[list-item]
        for stage_module in modules:
            for module in stage_module.modules():
                leaves = getattr(module, "leaves", {})
                for name, parameter in module.named_parameters(recurse=False):
                    yield leaves.get(name, parameter)

    def room(self, inputs: dict[str, Tensor], block: int, cache: Any = None) -> list[Tensor]:
        """Room for what flows into a block."""
        likes = self.model.flow_like(inputs, block, cache)  # type: ignore[operator]
        return [torch.empty_like(x, device=self.device) for x in likes if x is not None]

    def _flow(
        self, tensors: list[Tensor], inputs: dict[str, Tensor], block: int, cache: Any = None
    ) -> Flow:
        """Return what has been received, each in its place."""
        received, likes = iter(tensors), self.model.flow_like(inputs, block, cache)  # type: ignore[operator]
        return tuple(None if like is None else next(received) for like in likes)

    def transfers(self, how: Callable, tensors: list[Tensor], stage: int) -> list[dist.P2POp]:
        """Operations that send tensors to, or receive them from, the rank of a stage."""
        peer = dist.get_global_rank(self.group, self.placement[stage])
        return [dist.P2POp(how, tensor, peer, self.group) for tensor in tensors]

    def forward(self, inputs: dict[str, Tensor], cache: Any, gather: Callable) -> Tensor:
        """Logits on every rank of the axis, without gradients: stage after stage.

        `gather` makes whole ones of those that the last stage computes.
        """
        output: Any = None
        for index, blocks in enumerate(self.runs):
            if index:
                output = self._hand_on(output, index, inputs, cache)
            if self.rank == self.placement[index]:
                output = self.model(inputs, cache, output if index else None, blocks)
        last = self.placement[-1]
        if self.rank == last:
            logits = gather(output).contiguous()
        else:
            (logits,) = self.room(inputs, int(self.runs[-1][-1]) + 1)
        dist.broadcast(logits, dist.get_global_rank(self.group, last), self.group)
        if cache is not None:
            cache.advance(inputs)
        return logits

    def _hand_on(self, output: Any, index: int, inputs: dict[str, Tensor], cache: Any) -> Any:
        """Bring what a stage has computed to the rank of the next one."""
        before, owner = self.placement[index - 1], self.placement[index]
        if before == owner or self.rank not in (before, owner):
            return output
        block = int(self.runs[index][0])
        likes = self.model.flow_like(inputs, block, cache)  # type: ignore[operator]
        if self.rank == before:
            flows = zip(output, likes, strict=True)
            sent = [tensor.contiguous() for tensor, like in flows if like is not None]
            _wait(self.transfers(dist.isend, sent, index))
            return output
        room = self.room(inputs, block, cache)
        _wait(self.transfers(dist.irecv, room, index - 1))
        return self._flow(room, inputs, block, cache)

    def sum_tied_gradient(self) -> None:
        """Give both copies of a tied parameter the sum of their gradients; each adds the same."""
        if self.tied is None or self.tied.grad is None:
            return
        own = local(self.tied.grad)
        theirs, other = torch.empty_like(own), len(self.runs) - 1 if self.holds_embedding else 0
        _wait(
            [
                *self.transfers(dist.isend, [own.clone()], other),
                *self.transfers(dist.irecv, [theirs], other),
            ]
        )
        own += theirs


def pipelined(
    model: nn.Module,
    mesh: DeviceMesh,
    strategy: StrategyConfig,
    costs: Sequence[float],
    device: torch.device,
) -> Pipeline | None:
    """Leave in a meta model the layers of this rank's stages alone; None if there is but one."""
    if mesh.size() == 1:
        return None
    count = mesh.size() * stages_per_rank(strategy)
    placement = placed(strategy, mesh.size())
    stages = runs(len(costs), strategy.split or cut(costs, count))
    pipeline = Pipeline(model, mesh.get_group(), strategy, stages, placement, device)
    own = {name for stage in pipeline.stages for name in stage.blocks}
    blocks = model.get_submodule("blocks")
    for name in [name for name, _ in blocks.named_children() if name not in own]:
        delattr(blocks, name)
    if not pipeline.holds_embedding:
        model.embed = None  # type: ignore[assignment]
    if not pipeline.holds_head:
        model.head = None  # type: ignore[assignment]
    return pipeline


def _learned_from(tensors: list[Tensor]) -> list[Tensor]:
    """Those that have gradients: not whole numbers."""
    return [tensor for tensor in tensors if tensor.is_floating_point()]


def _wait(operations: list[dist.P2POp]) -> None:
    for work in dist.batch_isend_irecv(operations):
        work.wait()


def _reduce_gradients(fsdp: FSDPModule) -> None:
    """Do what FSDP does after a backward, once for all micro-batches, as torch's own stage does."""
    fsdp.set_is_last_backward(True)
    fsdp.set_reshard_after_backward(True)
    fsdp.set_requires_gradient_sync(True)
    root = fully_shard.state(fsdp)  # type: ignore[attr-defined]
    for state in root._state_ctx.all_states:
        groups = getattr(state, "_fsdp_param_groups", None)  # one group before torch 2.12
        for group in [state._fsdp_param_group] if groups is None else groups:
            if group is not None:
                group.post_backward()
    root._root_post_backward_final_callback()
