"""Pipeline parallelism: ranks hold consecutive blocks that micro-batches pass through.

torch's schedules (`torch.distributed.pipelining`) order the work of the ranks and call a `Stage`.
As every rank reads the same micro-batches, only activations and their gradients are sent.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import compress
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.pipelining import schedules
from torch.distributed.pipelining._backward import stage_backward_input

from parallel.axis import LossOf, ParallelAxis, find_axis
from parallel.collectives import all_reduce, transfer
from parallel.data.fsdp import one_reduction
from parallel.grad_norm import local_tensor
from parallel.model_protocol import Flow, Inputs, ParallelizableModel
from parallel.pipeline.partition import balance_stages, stage_blocks
from parallel.pipeline.schedules import SCHEDULES, stage_to_rank, stages_per_rank
from parallel.pipeline.simulator import Action
from parallel.pipeline.torch_schedules import backward_of_weights, schedule_class
from parallel.pipeline.trace import Recording
from parallel.strategy import StrategyConfig


class Stage:
    """A stage for torch's schedules: receives, computes and sends, one micro-batch at a time.

    Its attributes and methods have the names that the schedules require; the state of a micro-batch
    is stored by its number until it has been used.
    """

    has_backward = True
    submod = None  # FSDP inside is the pipeline's business

    def __init__(self, index: int, pipeline: "PipelineParallel"):
        self.stage_index, self.num_stages = index, len(pipeline.runs)
        self.group_rank, self.group_size = pipeline.rank, pipeline.group.size()
        self.is_first, self.is_last = index == 0, index == self.num_stages - 1
        self.device = pipeline.device
        self.blocks = pipeline.runs[index]
        self.stage_index_to_group_rank: dict[int, int] = {}  # a schedule fills it in
        # A schedule only reads these to check that no activation skips a stage.
        self.args_recv_info: dict[int, tuple] = {0: ()}
        self.act_send_info: dict[int, list] = {}
        self._pipeline = pipeline
        self.clear_runtime_states()

    def clear_runtime_states(self) -> None:
        """Clear the state of all micro-batches."""
        self._inputs: dict[int, list[Tensor]] = {}
        self._computed: dict[int, tuple[list[Tensor], list[Tensor]]] = {}  # outputs, inputs
        self._output_grads: dict[int, list[Tensor]] = {}
        self._input_grads: dict[int, list[Tensor]] = {}
        self._weight_jobs: dict[int, Callable[[], Any]] = {}
        self.output_chunks: list[Any] = []

    def _get_init_p2p_neighbors_ops(self) -> list[dist.P2POp]:
        return []  # the pipeline has opened the group's connections

    def _prepare_forward_infra(self, *_args: Any, **_kwargs: Any) -> None:
        """Do nothing: buffers are allocated for each micro-batch."""

    _prepare_backward_infra = _prepare_forward_infra

    def get_fwd_recv_ops(self, number: int) -> list[dist.P2POp]:
        """Return the receives of a micro-batch's inputs."""
        if self.is_first:
            return []
        micro_batch = self._pipeline.micro_batches[number]
        self._inputs[number] = self._pipeline.receive_buffers(micro_batch, int(self.blocks[0]))
        return self._pipeline.p2p_ops(dist.irecv, self._inputs[number], self.stage_index - 1)

    def set_local_fwd_input(self, outputs: Flow, number: int) -> None:
        """Set a micro-batch's inputs, from a stage on the same rank."""
        self._inputs[number] = [tensor.detach() for tensor in outputs if tensor is not None]

    def forward_one_chunk(
        self, number: int, args: Any = (), kwargs: Any = None, save_forward_output: bool = False
    ) -> Tensor | Flow:
        """Compute a micro-batch's forward; the last stage returns logits."""
        inputs = self._inputs.pop(number, [])
        for tensor in _differentiable(inputs):
            tensor.requires_grad_()
        self._pipeline.last_forward = number
        with self._pipeline.record_span(self.stage_index, "F", number):
            output = self._pipeline.compute_stage(number, self.blocks, inputs)
        flows = (output,) if isinstance(output, Tensor) else output
        self._computed[number] = [tensor for tensor in flows if tensor is not None], inputs
        return output

    def get_fwd_send_ops(self, number: int) -> list[dist.P2POp]:
        """Return the sends of a micro-batch's outputs."""
        if self.is_last:
            return []
        outputs = [tensor.detach().contiguous() for tensor in self._computed[number][0]]
        return self._pipeline.p2p_ops(dist.isend, outputs, self.stage_index + 1)

    def release_fwd_send_outputs(self, number: int) -> None:
        """Do nothing: sent outputs are kept for the backward; called since torch 2.15."""

    def get_bwd_recv_ops(self, number: int) -> list[dist.P2POp]:
        """Return the receives of the gradients of the outputs."""
        if self.is_last:
            return []
        outputs = _differentiable(self._computed[number][0])
        self._output_grads[number] = [torch.empty_like(tensor) for tensor in outputs]
        return self._pipeline.p2p_ops(dist.irecv, self._output_grads[number], self.stage_index + 1)

    def set_local_bwd_input(self, grads: list[Tensor], number: int) -> None:
        """Set the gradients of the outputs, from a stage on the same rank."""
        self._output_grads[number] = grads

    def backward_one_chunk(
        self,
        number: int,
        loss: Tensor | None = None,
        full_backward: bool = True,
        last_backward: bool = False,
    ) -> None:
        """Compute gradients of inputs and, with `full_backward`, weights; else these come later."""
        with self._pipeline.record_span(self.stage_index, "B" if full_backward else "I", number):
            self._backward(number, loss, full_backward)

    def _backward(self, number: int, loss: Tensor | None, full_backward: bool) -> None:
        outputs, inputs = map(_differentiable, self._computed.pop(number))
        grads = self._output_grads.pop(number, None)
        if loss is not None:
            outputs, grads = [loss], None
        # What comes from frozen weights alone has no gradient, and its backward nothing to do.
        learned = [tensor.requires_grad for tensor in outputs]
        outputs = list(compress(outputs, learned))
        grads = None if grads is None else list(compress(grads, learned))
        job = partial(torch.autograd.backward, outputs, grads)
        if not full_backward and self.is_first:
            self._weight_jobs[number] = job  # there are no inputs to give gradients to
            return
        if full_backward:
            job()
            if loss is not None:
                loss.detach_()  # the schedule keeps it, and with its graph the inputs
        elif self._pipeline.partial:
            job()  # of shared parameters, two halves would count paths through blocks twice
            self._weight_jobs[number] = lambda: None
        else:
            weights: Any = list(self._pipeline.stage_parameters(self.blocks))
            # torch detaches the outputs in place, which it cannot do with views.
            outputs = [tensor.clone() if tensor._is_view() else tensor for tensor in outputs]
            _, groups = stage_backward_input(outputs, grads, inputs, weights)
            self._weight_jobs[number] = partial(backward_of_weights, weights, groups)
        self._input_grads[number] = [
            torch.zeros_like(tensor) if tensor.grad is None else tensor.grad for tensor in inputs
        ]

    def backward_weight_one_chunk(self, number: int, last_backward: bool = False) -> None:
        """Compute the deferred gradients of the weights."""
        with self._pipeline.record_span(self.stage_index, "W", number):
            self._weight_jobs.pop(number)()

    def get_bwd_send_ops(self, number: int) -> list[dist.P2POp]:
        """Return the sends of the gradients of the inputs."""
        if self.is_first:
            return []
        grads = [grad.contiguous() for grad in self._input_grads.pop(number)]
        return self._pipeline.p2p_ops(dist.isend, grads, self.stage_index - 1)

    def get_local_bwd_output(self, number: int) -> list[Tensor]:
        """Return the gradients of the inputs, for a stage on the same rank."""
        return self._input_grads.pop(number)

    def perform_reduce_grad(self, _factor: int) -> None:
        """Do nothing: FSDP reduces once all stages of this rank are done."""


class PipelineParallel(ParallelAxis):
    """The pipeline axis: the stages of one rank, and the schedule of all ranks.

    `costs` are the costs of all blocks, to balance the stages; `ties` maps further names of shared
    parameters to the canonical one.
    """

    splits_loss = splits_parameters = True
    allows_ddp = False  # DDP does not support several forwards before a backward
    allows_reshard = False  # micro-batches are in flight together
    model: ParallelizableModel

    def __init__(
        self,
        mesh: DeviceMesh,
        strategy: StrategyConfig,
        costs: Sequence[float],
        ties: Mapping[str, str],
        device: torch.device,
    ):
        super().__init__(mesh)
        self.rank, self.device, self.strategy = self.group.rank(), device, strategy
        self._costs, self._tied_names = costs, {*ties, *ties.values()}
        self._schedules: dict[int, Any] = {}
        self.runs: list[tuple[str, ...]] = []  # blocks of each stage
        self.placement: Sequence[int] = ()  # rank of each stage
        self.stages: list[Stage] = []
        self.schedule = self
        self.micro_batches: list[Inputs] = []
        self._loss_of: LossOf | None = None
        self.last_forward = 0  # micro-batch of the latest forward
        self.tied: Tensor | None = None  # parameter with a copy on another rank
        self.recording: Recording | None = None  # of the next step

    def prepare(self, model: ParallelizableModel) -> None:
        """Remove all layers of a meta model but those of this rank's stages."""
        count = self.degree * stages_per_rank(self.strategy)
        self.placement = stage_to_rank(self.strategy, self.degree)
        self.runs = stage_blocks(
            len(self._costs), self.strategy.split or balance_stages(self._costs, count)
        )
        own = [stage for stage, rank in enumerate(self.placement) if rank == self.rank]
        self.model, self.stages = model, [Stage(index, self) for index in own]
        all_reduce(torch.zeros(1, device=self.device), self.group)  # opens its connections
        blocks = {name for stage in self.stages for name in stage.blocks}
        for name in [name for name in model.blocks if name not in blocks]:
            del model.blocks[name]
        if not self.has_embedding:
            model.embed = None
        if not self.has_head:
            model.head = None
        parts = ("blocks.", "embed.", "head.")  # the rest serves blocks of several stages
        self.partial = [n for n, _ in model.named_parameters() if not n.startswith(parts)]

    def use_weights(self, model: ParallelizableModel, sharded: bool) -> None:
        """Find the tied parameter with a copy on another rank, if this one has only one end."""
        if self.has_embedding != self.has_head:
            named = model.named_parameters()
            self.tied = next((p for name, p in named if name in self._tied_names), None)

    @property
    def has_embedding(self) -> bool:
        """Return whether this rank has the first stage."""
        return any(stage.is_first for stage in self.stages)

    @property
    def has_head(self) -> bool:
        """Return whether this rank has the last stage."""
        return any(stage.is_last for stage in self.stages)

    def run(self, micro_batches: list[Inputs], loss_of: LossOf) -> None:
        """Run forward and backward of all micro-batches, accumulating into `Parameter.grad`.

        `loss_of` is called once per micro-batch, on the rank of the last stage.
        """
        self.micro_batches, self._loss_of = micro_batches, loss_of
        count = len(micro_batches)
        if count not in self._schedules:
            self._schedules[count] = self._new_schedule(count)
        with one_reduction(self.model):
            if self.recording is not None:
                self.recording.start()
            self._schedules[count].step(target=torch.arange(count), return_outputs=False)
        self.micro_batches, self._loss_of = [], None

    def _new_schedule(self, micro_batches: int) -> Any:
        options = {"loss_fn": self._loss_of_micro_batch, "scale_grads": False}
        if self.strategy.schedule_csv:
            own = schedules._PipelineScheduleRuntime(self.stages, micro_batches, **options)
            own._load_csv(self.strategy.schedule_csv)
            return own
        rules = SCHEDULES[self.strategy.schedule]
        stages = self.stages[0] if rules.most_stages == 1 else self.stages
        return schedule_class(self.strategy.schedule)(stages, micro_batches, **options)

    def _loss_of_micro_batch(self, logits: Tensor, _number: Tensor) -> Tensor:
        assert self._loss_of is not None
        number = self.last_forward  # the loss follows it; reading the tensor would wait for it
        with self.record_span(len(self.runs) - 1, "F", number):  # it is part of that forward
            return self._loss_of(logits, number)

    def record_span(self, stage: int, kind: str, number: int) -> AbstractContextManager[None]:
        """Return a context that records an action's span, if a recording is active."""
        if self.recording is None:
            return nullcontext()
        return self.recording.record_span(Action(stage, kind, number))

    def compute_stage(self, number: int, blocks: Sequence[str], inputs: list[Tensor]) -> Any:
        """Compute one stage's forward of a micro-batch."""
        micro_batch = self.micro_batches[number]
        flow = self._build_flow(inputs, micro_batch, int(blocks[0])) if inputs else None
        return self.model(micro_batch, flow=flow, blocks=blocks)

    def stage_parameters(self, blocks: Sequence[str]) -> Iterator[Tensor]:
        """Yield the autograd leaves that a stage learns (tensor-parallel: local tensors)."""
        modules = [self.model.blocks[name] for name in blocks]
        if blocks == self.runs[0] and self.model.embed is not None:
            modules.append(self.model.embed)
        if blocks == self.runs[-1] and self.model.head is not None:
            modules.append(self.model.head)
        for stage_module in modules:
            for module in stage_module.modules():
                leaves = getattr(module, "leaves", {})
                for name, parameter in module.named_parameters(recurse=False):
                    if parameter.requires_grad:
                        yield leaves.get(name, parameter)

    def receive_buffers(self, inputs: Inputs, block: int, cache: Any = None) -> list[Tensor]:
        """Allocate buffers for a block's inputs."""
        likes = self.model.flow_like(inputs, block, cache)
        return [torch.empty_like(x, device=self.device) for x in likes if x is not None]

    def _build_flow(
        self, tensors: list[Tensor], inputs: Inputs, block: int, cache: Any = None
    ) -> Flow:
        """Return the received tensors as a block's inputs, with None for the unused ones."""
        received, likes = iter(tensors), self.model.flow_like(inputs, block, cache)
        return tuple(None if like is None else next(received) for like in likes)

    def p2p_ops(self, how: Callable, tensors: list[Tensor], stage: int) -> list[dist.P2POp]:
        """Return the operations that send tensors to, or receive them from, a stage's rank."""
        peer = dist.get_global_rank(self.group, self.placement[stage])
        return [dist.P2POp(how, tensor, peer, self.group) for tensor in tensors]

    def forward(self, inputs: Inputs, cache: Any) -> Tensor | None:
        """Run the stages in order, without gradients; return logits on the last stage's rank."""
        output: Any = None
        for index, blocks in enumerate(self.runs):
            if index:
                output = self._forward_to_next_stage(output, index, inputs, cache)
            if self.rank == self.placement[index]:
                output = self.model(inputs, cache, output if index else None, blocks)
        if cache is not None:
            cache.advance(inputs)
        return output if self.rank == self.placement[-1] else None

    def gather_logits(self, logits: Tensor | None, inputs: Inputs, cache: Any) -> Tensor:
        """Broadcast the last stage's logits to all ranks of the pipeline."""
        if logits is None:
            (logits,) = self.receive_buffers(inputs, int(self.runs[-1][-1]) + 1, cache)
        logits, last = logits.contiguous(), self.placement[-1]
        dist.broadcast(logits, dist.get_global_rank(self.group, last), self.group)
        return logits

    def counts_in_norm(self, name: str) -> bool:
        """Return whether a gradient enters the norm: the first rank's, if shared."""
        return self.rank == 0 or name not in self.partial

    def _forward_to_next_stage(self, output: Any, index: int, inputs: Inputs, cache: Any) -> Any:
        """Transfer a stage's output to the rank of the next stage."""
        before, owner = self.placement[index - 1], self.placement[index]
        if before == owner or self.rank not in (before, owner):
            return output
        block = int(self.runs[index][0])
        likes = self.model.flow_like(inputs, block, cache)
        if self.rank == before:
            flows = zip(output, likes, strict=True)
            sent = [tensor.contiguous() for tensor, like in flows if like is not None]
            transfer(self.p2p_ops(dist.isend, sent, index))
            return output
        room = self.receive_buffers(inputs, block, cache)
        transfer(self.p2p_ops(dist.irecv, room, index - 1))
        return self._build_flow(room, inputs, block, cache)

    def finish_gradients(self, model: ParallelizableModel) -> None:
        """Sum the gradients of shared parameters, and of both copies of a tied one."""
        for parameter in map(model.get_parameter, self.partial):
            if parameter.grad is None and parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)  # none of the stages here uses it
        super().finish_gradients(model)
        if self.tied is None or self.tied.grad is None:
            return
        own = local_tensor(self.tied.grad)
        theirs, other = torch.empty_like(own), len(self.runs) - 1 if self.has_embedding else 0
        transfer(
            [
                *self.p2p_ops(dist.isend, [own.clone()], other),
                *self.p2p_ops(dist.irecv, [theirs], other),
            ]
        )
        own += theirs


def _differentiable(tensors: list[Tensor]) -> list[Tensor]:
    """Return the floating-point tensors."""
    return [tensor for tensor in tensors if tensor.is_floating_point()]


@contextmanager
def record_step(axes: Iterable[ParallelAxis]) -> Iterator[Recording]:
    """Record a timeline of the pipeline's actions in the step inside the context."""
    pipeline = find_axis(axes, PipelineParallel)
    assert pipeline is not None, "metrics.timeline is refused without one"
    name = pipeline.strategy.schedule_csv or pipeline.strategy.schedule
    pipeline.recording = Recording(name, pipeline.group, pipeline.device)
    try:
        yield pipeline.recording
    finally:
        pipeline.recording = None
