"""The table of contents of parallelism: what is done to a model, in which order, and why."""

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
from parallel.data.data_parallel import DataParallel
from parallel.grad_norm import local_tensor
from parallel.model_protocol import ParallelizableModel
from parallel.parallel_model import CountValid, FullParameters, ParallelModel
from parallel.pipeline.stages import PipelineParallel
from parallel.strategy import StrategyConfig
from parallel.tensor.layers import TensorParallel

# (name, shape, first row, row behind the last) -> initial values of these rows
DrawRows = Callable[[str, torch.Size, int, int], Tensor]


@dataclass(frozen=True)
class ModelSpec:
    """Facts that parallelism needs of a model, whose blocks stand in a module named `blocks`."""

    draw_rows: DrawRows
    loss_sum: LossSum
    count_valid: CountValid
    layout: Mapping[str, str]  # how tensor parallelism splits the layers, by name
    costs: Sequence[float] = ()  # of the blocks, by which a pipeline is cut


# `parallelize`, or what stands in its place.
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
    """Wrap each block for what its backward recomputes, then compile it."""
    for block in model.blocks.values():
        checkpoint_activations(block, activation_checkpointing)
        if activation_checkpointing == "none" and not compile:
            for axis in axes:
                axis.prepare_block(block)
        if compile:
            block.compile()


def parallelize(
    model: ParallelizableModel,
    facts: ModelSpec,
    mesh: DeviceMesh,
    strategy: StrategyConfig,
    device: torch.device,
    *,
    parameters: torch.dtype = torch.float32,  # that weights and gradients are kept in
    compute: torch.dtype = torch.float32,  # that FSDP gathers weights in
    activation_checkpointing: str = "none",
    compile: bool = False,
) -> ParallelModel:
    """Spread a model built on the meta device over the mesh, and give it its weights."""
    assert isinstance(model, nn.Module)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    whole = FullParameters(shapes, _tied_names(model))
    model.to(parameters)  # while no parameter is a DTensor, which would plan this like any layer
    every: list[ParallelAxis] = [
        # 1. Ranks that share sequences have but their positions of each; attention joins them.
        ContextParallel(mesh["context"], strategy.context_method),
        # 2. A rank of a pipeline keeps the layers of its stages: the others are never made.
        PipelineParallel(mesh["pipeline"], strategy, facts.costs, whole.ties, device),
        # 3. Split layers are the innermost: all that follows treats a part as the whole.
        TensorParallel(mesh["tensor"], facts.layout, strategy, device, whole.classes),
    ]
    for axis in (axes := [axis for axis in every if axis.degree > 1]):
        axis.prepare(model)
    # 4. Recomputation repeats what it wraps: the block's own collectives, not FSDP's.
    # 5. One graph per block; all blocks look alike, so it is compiled once.
    recompute_and_compile(model, axes, activation_checkpointing, compile)
    # 6. Sharding comes before the weights exist, so that no rank ever holds the whole model.
    data = DataParallel(mesh, strategy, axes, parameters, compute)
    data.prepare(model)
    # 7. Each rank draws the rows that it holds.
    materialize_parameters(model, device, facts.draw_rows, whole.ties)
    # 8. Plain replication wraps the finished model; with shards, FSDP has summed over copies.
    axes.append(data)
    for axis in axes:
        axis.use_weights(model, data.shards)
    return ParallelModel(model, whole, mesh, device, facts.loss_sum, facts.count_valid, axes)


@torch.no_grad()
def materialize_parameters(
    model: nn.Module, device: torch.device, draw_rows: DrawRows, ties: Mapping[str, str]
) -> None:
    """Allocate a meta model's parameters on `device` and fill this rank's part of each."""
    allocate_parameters(model, device)
    for name, parameter in model.named_parameters():
        held = local_slices(parameter)
        if any(dim.start == dim.stop for dim in held):
            continue  # fewer rows than ranks: this one holds none
        name = ties.get(name, name)  # the first of its names may be another rank's
        rows = draw_rows(name, parameter.shape, held[0].start, held[0].stop)
        local_tensor(parameter).copy_(rows[(slice(None), *held[1:])])


def allocate_parameters(model: nn.Module, device: torch.device) -> None:
    """Give a meta model's parameters room on `device`, and leave it as it is there."""
    here = _tied_names(model)  # `to_empty` parts what is shared
    model.to_empty(device=device)
    for alias, name in here.items():
        owner, _, attribute = alias.rpartition(".")
        setattr(model.get_submodule(owner), attribute, model.get_parameter(name))


def local_slices(tensor: Tensor) -> tuple[slice, ...]:
    """Return where this rank's part of a parameter, or of its gradient, lies in the whole."""
    shape, offset = tuple(tensor.shape), (0,) * tensor.dim()
    if isinstance(tensor, DTensor):
        shape, offset = compute_local_shape_and_global_offset(
            tensor.shape, tensor.device_mesh, tensor.placements
        )
    return tuple(slice(begin, begin + size) for begin, size in zip(offset, shape, strict=True))


def _tied_names(model: nn.Module) -> dict[str, str]:
    """Second names of shared parameters, with the first."""
    first: dict[int, str] = {}
    every = model.named_parameters(remove_duplicate=False)
    names = {name: first.setdefault(id(parameter), name) for name, parameter in every}
    return {alias: name for alias, name in names.items() if alias != name}
