"""Tensor parallelism: layers split over ranks by columns or rows, as in Megatron-LM.

Parameters are DTensors at rest, so that checkpoints, FSDP and the optimizer see the global tensor;
a layer computes on the local shard, with collectives (arXiv 1909.08053) at the start and end of the
split part. With sequence parallelism (arXiv 2205.05198) positions are sharded between split layers.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed._symmetric_memory import enable_symm_mem_for_group
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from parallel.axis import LossSum, ParallelAxis
from parallel.collectives import (
    Copy,
    Gather,
    Mean,
    Scatter,
    Sum,
    all_reduce,
    pad_to_multiple,
)
from parallel.errors import ConfigError
from parallel.grad_norm import local_tensor
from parallel.model_protocol import Inputs, ParallelizableModel
from parallel.strategy import StrategyConfig
from parallel.tensor.recompute_gather import RecomputeGather
from parallel.tensor.vocab_parallel import VocabParallel

# Styles of a layer in the model's table.
COLUMN = "column"  # outputs are split: rows of the weight
HEADS = "heads"  # outputs are split between heads; a head that several ranks share is gathered
ROW = "row"  # inputs are split: columns of the weight; the outputs are summed
VOCABULARY = "vocabulary"  # entries (of an embedding) or classes (of an output) are split
SEQUENCE = "sequence"  # replicated; computes on the local positions of the sequence
SHARED = "shared"  # replicated; computes on the local heads, which share it
STYLES = (COLUMN, HEADS, ROW, VOCABULARY, SEQUENCE, SHARED)

# Low-rank factors A (rank, inputs) and B (outputs, rank) of a split layer: one of them is split,
# and the gradient of the other is a partial sum, whatever the layout of the sequence.
FACTORS = ("lora_a", "lora_b")

SEQUENCE_DIM = 1


def matches_pattern(name: str, pattern: str) -> bool:
    """Return whether a pattern matches this parameter or its module."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


def style_of(name: str, table: Mapping[str, str]) -> str:
    """Return the style of a parameter, by its canonical name.

    Exactly one pattern must match.
    """
    found = [style for pattern, style in table.items() if matches_pattern(name, pattern)]
    assert len(found) == 1, f"{name}: {len(found)} patterns of the tensor layout match"
    return found[0]


class TensorParallel(ParallelAxis):
    """The tensor axis: split layers, their sequence layout, their vocabulary and their gradients.

    Implements the model's SequenceLayout. While `splits_sequence` is False, as in evaluation, all
    ranks hold all positions. `table` is the style of each layer by name pattern; `classes` is the
    number of output classes, also on pipeline ranks without the head; `splits_classes`: the loss
    is a cross-entropy, computed from each rank's classes, and else from the logits of all.
    """

    allows_ddp = False  # DDP does not support DTensor parameters

    def __init__(
        self,
        mesh: DeviceMesh,
        table: Mapping[str, str],
        strategy: StrategyConfig,
        device: torch.device,
        classes: int,
        splits_classes: bool = True,
    ):
        super().__init__(mesh)
        self._splits_classes = splits_classes
        self.splits_sequence = strategy.sequence_parallel
        self.vocabulary = VocabParallel(classes, self.group)  # of the head's classes
        self.entries = self.vocabulary  # of the token embedding, which may be of other ones
        self._leaves: dict[Tensor, Tensor] = {}  # what autograd works on: the parameter at rest
        self._eager: set[nn.Module] = set()  # blocks that are neither compiled nor recomputed
        self._regather = RecomputeGather(self.group, SEQUENCE_DIM)
        self._mesh, self._table = mesh, table
        self._overlaps, self._device = strategy.async_tensor, device

    def split_dim(self, name: str) -> int | None:
        """Return the dim that a parameter is split along; None = it is replicated."""
        return split_dim(style_of(name, self._table), name)

    def prepare(self, model: ParallelizableModel) -> None:
        """Split a meta model's layers, in place, according to the table."""
        if self._overlaps:
            overlap_collectives(self.group, self._device)
        shared: dict[int, nn.Parameter] = {}  # a tied parameter stays one
        for prefix, module in list(model.named_modules()):
            styles = set()
            for name, parameter in list(module.named_parameters(recurse=False)):
                full_name = f"{prefix}.{name}"
                style = style_of(full_name, self._table)
                styles.add(style)
                dim = split_dim(style, name)
                if dim is not None:
                    if id(parameter) not in shared:
                        shared[id(parameter)] = _distribute_parameter(parameter, self._mesh, dim)
                    setattr(module, name, shared[id(parameter)])
                elif parameter.requires_grad and (
                    self.splits_sequence or style == SHARED or name in FACTORS
                ):
                    self.partial.append(full_name)
            for style in styles - {SEQUENCE, SHARED}:
                parent = model.get_submodule(prefix.rpartition(".")[0])
                _convert_to_sharded(module, style, self, parent)
        model.layout = self

    def part_length(self, length: int) -> int:
        """Return the number of local positions of a sequence of `length`, including padding."""
        return -(-length // self.group.size()) if self.splits_sequence else length

    def gather_sequence(self, x_BSD: Tensor, length: int) -> Tensor:
        """Gather all `length` positions, at the start of the split part of a layer."""
        if not self.splits_sequence:
            return Copy.apply(x_BSD, self.group)
        whole_BSD = Gather.apply(x_BSD, length, self.group, SEQUENCE_DIM)
        self._regather.remember_gather(whole_BSD, x_BSD)
        return whole_BSD

    def local_positions(self, x_BSD: Tensor) -> Tensor:
        """Return the local positions of a replicated tensor."""
        if not self.splits_sequence:
            return x_BSD
        ranks, rank = self.group.size(), self.group.rank()
        part_BSD = pad_to_multiple(x_BSD, SEQUENCE_DIM, ranks).chunk(ranks, SEQUENCE_DIM)[rank]
        return part_BSD.contiguous()  # strides of their own would be another compiled graph

    def gather_replicated(self, x_BSD: Tensor, length: int) -> Tensor:
        """Gather all `length` positions for a replicated computation, see `local_positions`."""
        if not self.splits_sequence:
            return x_BSD
        return Gather.apply(x_BSD, length, self.group, SEQUENCE_DIM)

    def gradient_contribution(self, gradient_BSD: Tensor) -> Tensor:
        """Return the gradient of a gathered tensor on rank 0, zeros elsewhere, to be summed."""
        return gradient_BSD if self.group.rank() == 0 else torch.zeros_like(gradient_BSD)

    def reduce_scatter_sequence(self, x_BSD: Tensor) -> Tensor:
        """Return the sum over the ranks at the local positions, at the end of the split part."""
        if not self.splits_sequence:
            return Sum.apply(x_BSD, self.group)
        return Scatter.apply(x_BSD, self.group, SEQUENCE_DIM)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Return a context with all positions on all ranks: a generated token cannot be split."""
        splits, self.splits_sequence = self.splits_sequence, False
        try:
            yield
        finally:
            self.splits_sequence = splits

    def prepare_block(self, block: nn.Module) -> None:
        """Make a block gather the inputs of split layers again in the backward, not save them."""
        self._eager.add(block)
        if self.splits_sequence:
            block.forward = self._regather.wrap(block.forward)

    def use_weights(self, model: ParallelizableModel, sharded: bool) -> None:
        """Make autograd work on plain tensors, views of the DTensors at rest.

        Those of FSDP, whose parameters are other tensors in every forward, are made in front of a
        block that is compiled or recomputed: with both it takes no DTensor. Not of others: a split
        backward takes the gradients of what the block itself has made of its parameters.
        """
        for block in model.blocks.values() if sharded else ():
            if block in self._eager:
                continue
            layers = [module for module in block.modules() if isinstance(module, _ShardedLayer)]
            block.register_forward_pre_hook(partial(_refresh_leaves, layers))
        if sharded:
            return
        made: dict[int, Tensor] = {}
        for module in model.modules():
            if isinstance(module, _ShardedLayer):
                for name, p in module.named_parameters(recurse=False):
                    if isinstance(p, DTensor) and p.requires_grad:
                        part = local_tensor(p.detach()).requires_grad_()
                        leaf = made.setdefault(id(p), part)
                        module.leaves[name] = leaf
                        self._leaves[leaf] = p

    def split_loss(self, loss_sum: LossSum) -> LossSum:
        """Return the same loss for logits whose classes are sharded over the ranks."""
        if not self._splits_classes:
            return lambda logits, *args: loss_sum(self.vocabulary.gather_logits(logits), *args)
        return partial(loss_sum, cross_entropy=self.vocabulary.cross_entropy)

    def finish_gradients(self, model: ParallelizableModel) -> None:
        """Set the gradients of the parameters at rest, and sum the partial ones over the ranks."""
        for leaf, parameter in self._leaves.items():
            assert isinstance(parameter, DTensor)
            if leaf.grad is not None:
                parameter.grad = DTensor.from_local(
                    leaf.grad,
                    parameter.device_mesh,
                    parameter.placements,
                    run_check=False,
                    shape=parameter.shape,
                    stride=parameter.stride(),
                )
                leaf.grad = None
        super().finish_gradients(model)

    def gather_logits(self, logits: Tensor | None, inputs: Inputs, cache: Any) -> Tensor | None:
        """Return the logits of all classes."""
        return None if logits is None else self.vocabulary.gather_logits(logits)


class _ShardedLayer(nn.Module):
    """A layer that computes on the local shard of its parameters, which are DTensors at rest."""

    split: TensorParallel
    leaves: dict[str, Tensor]  # see `TensorParallel.use_weights`

    def local_part(self, name: str) -> Any:
        """Return the differentiable part of a parameter that this rank computes with."""
        parameter = getattr(self, name)
        if not isinstance(parameter, DTensor):
            return parameter
        return self.part_of(self.leaves.get(name, parameter))

    def part_of(self, parameter: Any) -> Any:
        """Return the differentiable local tensor of a sharded parameter, or of its leaf."""
        return parameter.to_local() if isinstance(parameter, DTensor) else parameter

    def mean_over_parts(self, mean: Tensor) -> Tensor:
        """Return the mean over all features of which the ranks hold equally many."""
        return Mean.apply(mean, self.split.group)


class _SharedKVHeads(_ShardedLayer):
    """A projection to fewer heads than ranks: the ranks that share a head gather it."""

    head_width: int

    def part_of(self, parameter: Any) -> Any:
        group, part = self.split.group, super().part_of(parameter)
        rows = part.shape[0] * group.size()
        whole = Gather.apply(part, rows, group, 0)
        head = group.rank() * (rows // self.head_width) // group.size()
        return whole.narrow(0, head * self.head_width, self.head_width)


class _RowParallel(_ShardedLayer):
    """A row-split layer: sums the ranks' outputs and adds the bias once, to the sum."""

    in_features: int
    bias: nn.Parameter | None

    def local_part(self, name: str) -> Any:
        """Return the local part of a parameter; no bias, which each rank would add."""
        return None if name == "bias" else super().local_part(name)

    def forward(self, *args: Any) -> Tensor:
        x = self.split.reduce_scatter_sequence(super().forward(*args))
        return x if self.bias is None else x + self.bias.to(x.dtype)

    def first_input(self) -> int:
        """Return the first of the local input features."""
        return self.split.group.rank() * -(-self.in_features // self.split.group.size())

    def over_parts(self, largest: Tensor) -> Tensor:
        """Return the maximum over all input features, which are sharded over the ranks."""
        return all_reduce(largest, self.split.group, "max")


class _VocabularyEmbedding(_ShardedLayer):
    """A vocabulary-parallel embedding: zero for entries of other ranks, summed over the ranks."""

    def forward(self, input: Tensor, *args: Any) -> Tensor:
        row, mine = self.split.entries.local_rows(input)
        x = super().forward(row, *args)
        return self.split.reduce_scatter_sequence(x * mine.unsqueeze(-1))


@torch.compiler.disable
def _refresh_leaves(layers: Sequence[_ShardedLayer], *_args: Any) -> None:
    """Set the plain tensors that layers compute with to views of what FSDP has just gathered."""
    for layer in layers:
        for name, parameter in layer.named_parameters(recurse=False):
            if isinstance(parameter, DTensor):
                layer.leaves[name] = parameter.to_local()


def overlap_collectives(group: dist.ProcessGroup, device: torch.device) -> None:
    """Make compiled blocks overlap the group's collectives with matrix products.

    torch decomposes both and interleaves the pieces through symmetric memory (torch's
    asynchronous tensor parallelism). Raises ConfigError if the hardware does not support it.
    """
    peers = range(torch.cuda.device_count()) if device.type == "cuda" else []
    reach = all(torch.cuda.can_device_access_peer(a, b) for a in peers for b in peers if a != b)
    if not peers or not reach or torch.cuda.get_device_capability(device) < (9, 0):
        raise ConfigError(
            "strategy.async_tensor=true needs NVIDIA GPUs of the Hopper generation or later that "
            f"reach each other's memory (NVLink), but the ranks compute on {device.type}; "
            "set strategy.async_tensor=false"
        )
    enable_symm_mem_for_group(group.group_name)
    torch._inductor.config._micro_pipeline_tp = True


def split_dim(style: str, name: str) -> int | None:
    """Return the dim that a parameter is split along; None = it is replicated."""
    replicated = ("bias", "lora_b") if style == ROW else ("lora_a",)
    if style in (SEQUENCE, SHARED) or name.endswith(replicated):
        return None
    return 1 if style == ROW else 0


def _distribute_parameter(parameter: nn.Parameter, mesh: DeviceMesh, dim: int) -> nn.Parameter:
    parts = parameter.chunk(mesh.size(), dim)
    rank = mesh.get_local_rank()
    own = parts[rank] if rank < len(parts) else parts[0].narrow(dim, 0, 0)
    whole = DTensor.from_local(
        torch.empty_like(own, memory_format=torch.contiguous_format),
        mesh,
        [Shard(dim)],
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
    return nn.Parameter(whole, requires_grad=parameter.requires_grad)


def _convert_to_sharded(module: nn.Module, style: str, split: TensorParallel, parent: Any) -> None:
    """Change a layer's class to one that computes on its shard of the parameters."""
    part: type = _RowParallel if style == ROW else _ShardedLayer
    if isinstance(module, nn.Embedding):
        part = _VocabularyEmbedding
        split.entries = VocabParallel(module.num_embeddings, split.group)
    elif style == HEADS and module.get_parameter("weight").shape[0] < (
        split.group.size() * parent.head_width
    ):
        part = _SharedKVHeads
        module.head_width = parent.head_width
    kind: type = type(module)
    assert hasattr(kind, "local_part"), f"{kind.__name__} reads its parameters whole"
    module.__class__ = _sharded_class(part, kind)
    assert isinstance(module, _ShardedLayer)
    module.split, module.leaves = split, {}


@cache
def _sharded_class(part: type, kind: type) -> type[_ShardedLayer]:
    """Return one cached class for all such layers, so that identical blocks are compiled once."""
    return type(f"{kind.__name__}Part", (part, kind), {})
