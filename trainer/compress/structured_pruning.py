"""Fewer heads and channels: what a model can do without is zero from some step on, and then gone.

Attention heads (with grouped queries: a key/value head and all of its queries) and channels of the
feed-forward layer are pruned whole, as many in each block, so that what stays is a smaller model
of the same kind. The least important go first; what has gone never comes back.
"""

# D width, H query heads, G key/value heads, K width of a head.

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from parallel.collectives import all_reduce
from parallel.grad_norm import local
from parallel.parallelize import place
from trainer.compress.quantized_linear import CompressedLinear
from trainer.config.train import CompressConfig, ModelConfig
from trainer.nn.layers import Attention, FeedForward, Linear

EVENTS = 16  # times that more is pruned, between compress.prune_start and compress.prune_end


@dataclass(frozen=True)
class Units:
    """Heads of an attention, or channels of a feed-forward layer."""

    share: float  # to be pruned
    count: int
    reader: Linear  # each unit is some of its inputs
    writers: list[Linear]  # and some of these ones' outputs, without which it is nothing

    def pruned(self, ramp: float) -> int:
        """Return how many are pruned when a share `ramp` of all that is to be pruned is.

        One stays.
        """
        return min(self.count - 1, round(self.share * ramp * self.count))

    def importance(self) -> Tensor:
        """(count,): the norms of a unit's weights on both sides, multiplied; the same on all ranks.

        What a head adds to its sample is at most that times the norm of its input.
        """
        product = self._norms(self.reader, 0)
        for writer in self.writers:
            product = product * self._norms(writer, 1)
        return product

    def _norms(self, layer: Linear, dim: int) -> Tensor:
        return _sum_of_squares(layer.weight, dim).view(self.count, -1).sum(1).sqrt()

    def alive(self, ramp: float) -> Tensor | None:
        """(inputs of the reader,): 0 for those of pruned units; None while none is."""
        count = self.pruned(ramp)
        if not count:
            return None
        importance = self.importance()
        least = importance.argsort(stable=True)[:count]
        stays = torch.ones_like(importance).index_fill(0, least, 0.0)
        return stays.repeat_interleave(self.reader.weight.shape[1] // self.count)


class Pruning:
    """The heads and channels of a model's blocks, from full to pruned."""

    def __init__(self, config: CompressConfig):
        self.config = config
        self._ramp: float | None = None
        self._blocks = nn.Module()

    def reshape(self, blocks: nn.Module) -> None:
        """Let the layers that read what is pruned know of it, of those that will stay here."""
        self._blocks = blocks
        for units in units_of(blocks, self.config):
            if type(units.reader) is Linear:
                units.reader.__class__ = CompressedLinear

    def ramp(self, progress: float) -> float:
        """Return the share of what is to be pruned that is, after a share of all steps.

        It rises quickly at first (arXiv 1710.01878, equation 1), in a few events.
        """
        begin, end = self.config.prune_start, self.config.prune_end
        if progress < begin:
            return 0.0
        passed = 1.0 if progress >= end else (progress - begin) / (end - begin)
        return 1.0 - (1.0 - int(passed * EVENTS) / EVENTS) ** 3

    @torch.no_grad()
    def settle(self, progress: float) -> None:
        """Prune what is due, and set what is pruned to zero again behind an optimizer step."""
        ramp, chosen = self.ramp(progress), self._ramp
        self._ramp = ramp
        for units in units_of(self._blocks, self.config):
            reader = units.reader
            assert isinstance(reader, CompressedLinear)
            if ramp != chosen:  # zeros are the least important: what has gone stays so
                alive = units.alive(ramp)
                reader.alive = None if alive is None else alive[place(reader.weight)[1]]
            if reader.alive is not None:
                local(reader.weight).mul_(reader.alive)


def units_of(blocks: nn.Module, config: CompressConfig) -> Iterator[Units]:
    """Yield what is pruned of the blocks, or layers, that are here."""
    for module in blocks.modules():
        if isinstance(module, Attention) and config.prune_heads:
            groups = module.value.weight.shape[0] // module.head_width
            yield Units(config.prune_heads, groups, module.output, [module.value])
        if isinstance(module, FeedForward) and config.prune_ffn:
            writers = [layer for layer in (module.up, module.gate) if layer is not None]
            yield Units(config.prune_ffn, module.up.weight.shape[0], module.down, writers)


def removed(
    shape: ModelConfig, compress: CompressConfig, model: nn.Module
) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Return shape and weights of the smaller model that a pruned one, whole on a rank, is."""
    groups = shape.kv_heads or shape.heads
    left, channels = groups, shape.ffn_width
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    for prefix, module in model.named_modules():
        if not isinstance(module, Attention | FeedForward):
            continue
        for units in units_of(module, compress):
            stay = units.count - units.pruned(1.0)
            kept = units.importance().argsort(stable=True, descending=True)[:stay].sort().values
            for name, parameter in module.named_parameters():
                dim = 1 if module.get_submodule(name.partition(".")[0]) is units.reader else 0
                if dim < parameter.dim():  # what is written has no bias for each of its inputs
                    parts = parameter.detach().unflatten(dim, (units.count, -1))
                    parts = parts.index_select(dim, kept).flatten(dim, dim + 1)
                    weights[f"{prefix}.{name}"] = parts
            left, channels = (stay, channels) if isinstance(module, Attention) else (left, stay)
    smaller = replace(
        shape,
        heads=shape.heads // groups * left,
        kv_heads=left,
        ffn_width=channels,
        head_width=shape.head_width or shape.width // shape.heads,
    )
    return smaller, weights


def _sum_of_squares(weight: Tensor, dim: int) -> Tensor:
    """Return a matrix's sums of squares over one dim; ranks add up their parts."""
    rest = place(weight)[1 - dim]
    sums = torch.zeros(weight.shape[1 - dim], device=local(weight).device, dtype=weight.dtype)
    sums[rest] = local(weight).detach().square().sum(dim)
    if isinstance(weight, DTensor):
        # One axis after the other: what all ranks of an axis have is the same bits from there on.
        for axis, placement in enumerate(weight.placements):
            if not placement.is_replicate():
                sums = all_reduce(sums, weight.device_mesh.get_group(axis))
    return sums
