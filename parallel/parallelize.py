"""The table of contents of parallelism: what is done to a model, in which order, and why."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from parallel.activation_checkpointing import checkpoint_activations
from parallel.context.attention import share_sequences
from parallel.data.ddp import reduce_dtype, replicate
from parallel.data.fsdp import shard
from parallel.grad_norm import local
from parallel.mesh import copies_mesh, shards_mesh
from parallel.parallel_model import Axes, CountValid, LossSum, ParallelModel, Whole
from parallel.pipeline.stages import pipelined
from parallel.strategy import StrategyConfig
from parallel.tensor.layers import TensorSplit, split_layers

# (name, shape, first row, row behind the last) -> initial values of these rows
DrawRows = Callable[[str, torch.Size, int, int], Tensor]


@dataclass(frozen=True)
class Facts:
    """Facts that parallelism needs of a model, whose blocks stand in a module named `blocks`."""

    draw_rows: DrawRows
    loss_sum: LossSum
    count_valid: CountValid
    layout: Mapping[str, str]  # how tensor parallelism splits the layers, by name
    costs: Sequence[float] = ()  # of the blocks, by which a pipeline is cut


def recompute_and_compile(
    model: nn.Module, split: TensorSplit | None, activation_checkpointing: str, compile: bool
) -> None:
    """Wrap each block for what its backward recomputes, then compile it."""
    for block in model.get_submodule("blocks").children():
        checkpoint_activations(block, activation_checkpointing)
        if split is not None and activation_checkpointing == "none" and not compile:
            split.gather_again(block)
        if compile:
            block.compile()


def parallelize(
    model: nn.Module,
    facts: Facts,
    mesh: DeviceMesh,
    strategy: StrategyConfig,
    device: torch.device,
    *,
    parameters: torch.dtype = torch.float32,
    compute: torch.dtype = torch.float32,
    activation_checkpointing: str = "none",
    compile: bool = False,
) -> ParallelModel:
    """Spread a model built on the meta device over the mesh, and give it its weights.

    `parameters` is the dtype that weights and gradients are kept in, `compute` the one that FSDP
    gathers them in.
    """
    whole = Whole({name: p.shape for name, p in model.named_parameters()}, _ties(model))
    classes = model.get_parameter("head.output.weight").shape[0]
    model.to(parameters)  # while no parameter is a DTensor, which would plan this like any layer
    # 1. A rank of a pipeline keeps the layers of its stages: the others are never made.
    pipeline = pipelined(model, mesh["pipeline"], strategy, facts.costs, device)
    # 2. Ranks that share sequences have but their positions of each; attention joins them.
    context = share_sequences(model, mesh["context"], strategy.context_method)
    # 3. The split of single layers is the innermost: all that follows treats a part as the whole.
    split = split_layers(model, mesh["tensor"], facts.layout, strategy, device, classes)
    # 4. Recomputation repeats what it wraps: the block's own collectives, not FSDP's.
    # 5. One graph per block; all blocks look alike, so it is compiled once.
    recompute_and_compile(model, split, activation_checkpointing, compile)
    # 6. Sharding comes before the weights exist, so that no rank ever holds the whole model.
    copies = copies_mesh(mesh)
    sharded = shard_over(model, mesh, copies, strategy, compute, parameters)
    # 7. Each rank draws the rows that it holds.
    materialise(model, device, facts.draw_rows, whole.ties)
    if split is not None and not sharded:
        split.compute_on_leaves(model)
    # 8. Plain replication wraps the finished model; with shards, FSDP has summed over copies.
    wrapped, exchange = replicate(model, None if sharded else copies, strategy)
    axes = Axes(split, context, pipeline, exchange)
    return ParallelModel(
        model, wrapped, whole, mesh, device, facts.loss_sum, facts.count_valid, axes
    )


def shard_over(
    model: nn.Module,
    mesh: DeviceMesh,
    copies: DeviceMesh | None,
    strategy: StrategyConfig,
    compute: torch.dtype,
    parameters: torch.dtype,
) -> bool:
    """Shard a meta model with FSDP, if its strategy needs that; whether it does.

    FSDP knows DTensors and forwards that wait for their backward, which DDP does not: copies of
    split layers and of stages go this way too. In a pipeline weights stay gathered for a step.
    """
    staged = mesh["pipeline"].size() > 1
    beyond_ddp = staged or mesh["tensor"].size() > 1
    if mesh["shard"].size() == 1 and (copies is None or not beyond_ddp):
        return False
    frees = strategy.reshard_after_forward and not staged
    reduce = reduce_dtype(strategy.reduce, parameters)
    shard(model, shards_mesh(mesh, copies), compute, reduce, frees)
    return True


@torch.no_grad()
def materialise(
    model: nn.Module, device: torch.device, draw_rows: DrawRows, ties: Mapping[str, str]
) -> None:
    """Allocate a meta model's parameters on `device` and fill this rank's part of each."""
    allocate(model, device)
    for name, parameter in model.named_parameters():
        held = place(parameter)
        if any(dim.start == dim.stop for dim in held):
            continue  # fewer rows than ranks: this one holds none
        name = ties.get(name, name)  # the first of its names may be another rank's
        rows = draw_rows(name, parameter.shape, held[0].start, held[0].stop)
        local(parameter).copy_(rows[(slice(None), *held[1:])])


def allocate(model: nn.Module, device: torch.device) -> None:
    """Give a meta model's parameters room on `device`, and leave it as it is there."""
    here = _ties(model)  # `to_empty` parts what is shared
    model.to_empty(device=device)
    for alias, name in here.items():
        owner, _, attribute = alias.rpartition(".")
        setattr(model.get_submodule(owner), attribute, model.get_parameter(name))


def place(tensor: Tensor) -> tuple[slice, ...]:
    """Return where this rank's part of a parameter, or of its gradient, lies in the whole."""
    shape, offset = tuple(tensor.shape), (0,) * tensor.dim()
    if isinstance(tensor, DTensor):
        shape, offset = compute_local_shape_and_global_offset(
            tensor.shape, tensor.device_mesh, tensor.placements
        )
    return tuple(slice(begin, begin + size) for begin, size in zip(offset, shape, strict=True))


def _ties(model: nn.Module) -> dict[str, str]:
    """Second names of shared parameters, with the first."""
    first: dict[int, str] = {}
    every = model.named_parameters(remove_duplicate=False)
    names = {name: first.setdefault(id(parameter), name) for name, parameter in every}
    return {alias: name for alias, name in names.items() if alias != name}
