"""Structured pruning: set the least important heads and channels to zero, later remove them.

Attention heads (with grouped queries: a key/value head and all of its queries) and channels of the
feed-forward layer are pruned as units, equally many in each block, so that the result is a smaller
model of the same architecture. The least important are pruned first; pruned units stay pruned.
"""

# D width, H query heads, G key/value heads, K width of a head.

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from parallel.collectives import all_reduce
from parallel.grad_norm import local_tensor
from parallel.parallelize import local_slices
from trainer.compress.quantized_linear import CompressedLinear
from trainer.config.train import CompressConfig, ModelConfig, head_width_of
from trainer.nn.layers import Attention, FeedForward, Linear

SHARED_NORMS = ("query_norm.", "key_norm.")  # one weight for all heads
EVENTS = 16  # pruning events between compress.prune_start and compress.prune_end


@dataclass(frozen=True)
class PrunableUnits:
    """Prunable heads of an attention, or channels of a feed-forward layer."""

    share: float  # fraction to prune in the end
    count: int  # number of units
    reader: Linear  # its inputs are the units' values
    writers: list[Linear]  # their outputs are the units' values

    def pruned_count(self, ramp: float) -> int:
        """Return the number of pruned units at a fraction `ramp` of the target; one is retained."""
        return min(self.count - 1, round(self.share * ramp * self.count))

    def importance(self) -> Tensor:
        """Return the importance (count,): the product of a unit's weight norms, equal on all ranks.

        It bounds the norm of a head's output relative to the norm of its input.
        """
        product = self._unit_norms(self.reader, 0)
        for writer in self.writers:
            product = product * self._unit_norms(writer, 1)
        return product

    def _unit_norms(self, layer: Linear, dim: int) -> Tensor:
        return _sum_of_squares(layer.weight, dim).view(self.count, -1).sum(1).sqrt()

    def keep_mask(self, ramp: float) -> Tensor | None:
        """Return the mask (inputs of the reader,), 0 for pruned units; None if none is pruned."""
        count = self.pruned_count(ramp)
        if not count:
            return None
        importance = self.importance()
        least = importance.argsort(stable=True)[:count]
        mask = torch.ones_like(importance).index_fill(0, least, 0.0)
        return mask.repeat_interleave(self.reader.weight.shape[1] // self.count)


class Pruning:
    """Gradual structured pruning of the heads and channels of a model's blocks."""

    def __init__(self, config: CompressConfig):
        self.config = config
        self._ramp: float | None = None
        self._blocks = nn.Module()

    def register_masks(self, blocks: nn.Module) -> None:
        """Make the reading layers of the prunable units compressed ones that apply their mask."""
        self._blocks = blocks  # a pipeline stage later removes those of other stages
        for units in find_prunable_units(blocks, self.config):
            if type(units.reader) is Linear:
                units.reader.__class__ = CompressedLinear

    def ramp_fraction(self, progress: float) -> float:
        """Return the fraction of the pruning target that is reached at a fraction of all steps.

        The schedule is cubic, steepest at first (arXiv 1710.01878, equation 1), in EVENTS steps.
        """
        begin, end = self.config.prune_start, self.config.prune_end
        if progress < begin:
            return 0.0
        passed = 1.0 if progress >= end else (progress - begin) / (end - begin)
        return 1.0 - (1.0 - int(passed * EVENTS) / EVENTS) ** 3

    @torch.no_grad()
    def prune_due(self, progress: float) -> None:
        """Prune the units that are due, and zero pruned weights again after an optimizer step."""
        ramp, previous = self.ramp_fraction(progress), self._ramp
        self._ramp = ramp
        for units in find_prunable_units(self._blocks, self.config):
            reader = units.reader
            assert isinstance(reader, CompressedLinear)
            if ramp != previous:  # zeros are the least important: pruned units stay pruned
                alive = units.keep_mask(ramp)
                reader.alive = None if alive is None else alive[local_slices(reader.weight)[1]]
            if reader.alive is not None:
                local_tensor(reader.weight).mul_(reader.alive)


def find_prunable_units(blocks: nn.Module, config: CompressConfig) -> Iterator[PrunableUnits]:
    """Yield the prunable units of the given blocks or layers."""
    for module in blocks.modules():
        if isinstance(module, Attention) and config.prune_heads:
            groups = module.value.weight.shape[0] // module.head_width
            yield PrunableUnits(config.prune_heads, groups, module.output, [module.value])
        if isinstance(module, FeedForward) and config.prune_ffn:
            writers = [layer for layer in (module.up, module.gate) if layer is not None]
            yield PrunableUnits(config.prune_ffn, module.up.weight.shape[0], module.down, writers)


def remove_pruned(
    shape: ModelConfig, compress: CompressConfig, model: nn.Module
) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Return the shape and weights of a pruned model without its pruned units.

    `model` is the full model, on one rank.
    """
    groups = shape.kv_heads or shape.heads
    left, channels = groups, shape.ffn_width
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    for prefix, module in model.named_modules():
        if not isinstance(module, Attention | FeedForward):
            continue
        for units in find_prunable_units(module, compress):
            stay = units.count - units.pruned_count(1.0)
            kept = units.importance().argsort(stable=True, descending=True)[:stay].sort().values
            for name, parameter in module.named_parameters():
                if name.startswith(SHARED_NORMS):
                    continue
                dim = 1 if module.get_submodule(name.partition(".")[0]) is units.reader else 0
                if dim < parameter.dim():  # the reader's bias has no input dim
                    parts = parameter.detach().unflatten(dim, (units.count, -1))
                    parts = parts.index_select(dim, kept).flatten(dim, dim + 1)
                    weights[f"{prefix}.{name}"] = parts
            left, channels = (stay, channels) if isinstance(module, Attention) else (left, stay)
    smaller = replace(
        shape,
        heads=shape.heads // groups * left,
        kv_heads=left,
        ffn_width=channels,
        head_width=head_width_of(shape),
    )
    return smaller, weights


def _sum_of_squares(weight: Tensor, dim: int) -> Tensor:
    """Return a matrix's sums of squares over one dim, reduced over the ranks that shard it."""
    rest = local_slices(weight)[1 - dim]
    sums = torch.zeros(
        weight.shape[1 - dim], device=local_tensor(weight).device, dtype=weight.dtype
    )
    sums[rest] = local_tensor(weight).detach().square().sum(dim)
    if isinstance(weight, DTensor):
        # One axis after the other: after each, the ranks of that axis have identical bits.
        for axis, placement in enumerate(weight.placements):
            if not placement.is_replicate():
                sums = all_reduce(sums, weight.device_mesh.get_group(axis))
    return sums
