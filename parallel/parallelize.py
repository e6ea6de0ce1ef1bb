"""Apply every form of parallelism to a model, in a fixed order."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Concatenate

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from parallel.activation_checkpointing import checkpoint_activations
from parallel.axis import LossSum, ParallelAxis
from parallel.context.attention import ContextParallel
from parallel.data.data_parallel import DataParallel, WrapReplicas
from parallel.data.ddp import wrap_in_ddp
from parallel.grad_norm import local_tensor
from parallel.model_protocol import ParallelizableModel
from parallel.parallel_model import CountValid, FullParameters, ParallelModel
from parallel.pipeline.stages import PipelineParallel
from parallel.strategy import StrategyConfig
from parallel.tensor.layers import TensorParallel

# (name, shape, first row, end row) -> initial values of rows [first, end)
DrawRows = Callable[[str, torch.Size, int, int], Tensor]


@dataclass(frozen=True)
class ModelSpec:
    """The functions and tables that `parallelize` needs of a model with a module `blocks`."""

    draw_rows: DrawRows
    loss_sum: LossSum
    count_valid: CountValid
    layout: Mapping[str, str]  # tensor-parallel style by pattern of layer names
    costs: Sequence[float] = ()  # relative cost of each block, to balance pipeline stages
    # Whether the loss takes `cross_entropy` of a part of the classes, or needs the logits of all.
    splits_classes: bool = True


# The signature of `parallelize`.
Parallelize = Callable[
    Concatenate[ParallelizableModel, ModelSpec, DeviceMesh, StrategyConfig, torch.device, ...],
    ParallelModel,
]


def recompute_and_compile(
    model: ParallelizableModel,
    axes: Sequence[ParallelAxis],
    activation_checkpointing: str,
    compile: bool,
) -> None:
    """Apply activation checkpointing to each block, then compile it."""
    for block in model.blocks.values():
        checkpoint_activations(block, activation_checkpointing)
        if activation_checkpointing == "none" and not compile:
            for axis in axes:
                axis.prepare_block(block)
        if compile:
            block.compile()


def materialize_parameters(
    model: nn.Module, device: torch.device, draw_rows: DrawRows, ties: Mapping[str, str]
) -> None:
    """Allocate a meta model's parameters on `device` and initialise this rank's shards."""
    allocate_parameters(model, device)
    # The canonical name, which may be on another rank.
    named = {ties.get(name, name): parameter for name, parameter in model.named_parameters()}
    draw_weights(named, draw_rows)


def split_axes(
    mesh: DeviceMesh,
    strategy: StrategyConfig,
    device: torch.device,
    facts: ModelSpec,
    whole: FullParameters,
) -> list[ParallelAxis]:
    """Return the axes with several ranks that split a model, in the order of application."""
    every: list[ParallelAxis] = [
        # 1. Each rank computes its positions of a sequence; attention covers those of all ranks.
        ContextParallel(mesh["context"], strategy.context_method),
        # 2. Each pipeline rank keeps the layers of its stages; the others are never allocated.
        PipelineParallel(mesh["pipeline"], strategy, facts.costs, whole.ties, device),
        # 3. Tensor-parallel layers are innermost: the following steps only see local shards.
        TensorParallel(
            mesh["tensor"], facts.layout, strategy, device, whole.classes, facts.splits_classes
        ),
    ]
    return [axis for axis in every if axis.degree > 1]


def parallelize(
    model: ParallelizableModel,
    facts: ModelSpec,
    mesh: DeviceMesh,
    strategy: StrategyConfig,
    device: torch.device,
    *,
    parameters: torch.dtype = torch.float32,  # of weights and gradients at rest
    compute: torch.dtype = torch.float32,  # of the weights that FSDP gathers
    activation_checkpointing: str = "none",
    compile: bool = False,
    materialize: Callable[..., None] = materialize_parameters,  # a trace passes two that
    wrap: WrapReplicas = wrap_in_ddp,  # touch no data
) -> ParallelModel:
    """Distribute a meta-device model over the mesh and initialise its weights."""
    assert isinstance(model, nn.Module)
    whole = _full_parameters(model)
    model.to(parameters)  # before any parameter is a DTensor, whose cast goes through dispatch
    # 1. to 3.: the axes that split the model itself.
    for axis in (axes := split_axes(mesh, strategy, device, facts, whole)):
        axis.prepare(model)
    # 4. Recomputation repeats a block's own collectives. 5. Equal blocks are compiled once.
    recompute_and_compile(model, axes, activation_checkpointing, compile)
    # 6. FSDP shards the meta model, so that no rank ever holds the full model.
    (data := DataParallel(mesh, strategy, axes, parameters, compute, wrap)).prepare(model)
    # 7. Each rank initialises the rows of its own shards.
    materialize(model, device, facts.draw_rows, whole.ties)
    # 8. DDP wraps the finished model; with shards, FSDP also sums over the replicas.
    for axis in (axes := [*axes, data]):
        axis.use_weights(model, data.shards)
    return ParallelModel(model, whole, mesh, device, facts.loss_sum, facts.count_valid, axes)


@torch.no_grad()
def draw_weights(parameters: Mapping[str, Tensor], draw_rows: DrawRows) -> None:
    """Initialise this rank's shards of parameters, given by canonical name."""
    for name, parameter in parameters.items():
        held = local_slices(parameter)
        if any(dim.start == dim.stop for dim in held):
            continue  # an empty shard: fewer rows than ranks
        rows = draw_rows(name, parameter.shape, held[0].start, held[0].stop)
        local_tensor(parameter).copy_(rows[(slice(None), *held[1:])])


def allocate_parameters(model: nn.Module, device: torch.device) -> None:
    """Allocate a meta model's parameters on `device`, uninitialised; tied ones stay tied."""
    tied = _tied_names(model)  # `to_empty` unties shared parameters
    model.to_empty(device=device)
    for alias, name in tied.items():
        owner, _, attribute = alias.rpartition(".")
        setattr(model.get_submodule(owner), attribute, model.get_parameter(name))


def local_slices(tensor: Tensor) -> tuple[slice, ...]:
    """Return the global slice of this rank's shard of a parameter or gradient, per dim."""
    shape, offset = tuple(tensor.shape), (0,) * tensor.dim()
    if isinstance(tensor, DTensor):
        shape, offset = compute_local_shape_and_global_offset(
            tensor.shape, tensor.device_mesh, tensor.placements
        )
    return tuple(slice(begin, begin + size) for begin, size in zip(offset, shape, strict=True))


def _full_parameters(model: nn.Module) -> FullParameters:
    shapes = {name: p.shape for name, p in model.named_parameters()}
    frozen = frozenset(name for name, p in model.named_parameters() if not p.requires_grad)
    return FullParameters(shapes, _tied_names(model), frozen)


def _tied_names(model: nn.Module) -> dict[str, str]:
    """Map the further names of each shared parameter to its first name."""
    first: dict[int, str] = {}
    every = model.named_parameters(remove_duplicate=False)
    names = {name: first.setdefault(id(parameter), name) for name, parameter in every}
    return {alias: name for alias, name in names.items() if alias != name}
