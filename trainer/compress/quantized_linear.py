"""Fewer bits and fewer weights: layers that train through the weights that they will have.

The forward computes with rounded, pruned weights; the gradient goes straight through to the full
ones (straight-through estimator, arXiv 1308.3432). A layer's class is replaced before it is
sharded; it gets no child and no parameter, so that every strategy sees the layer that it was.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from trainer.nn.layers import Linear


@dataclass
class Lens:
    """How a compressed layer sees its weight and its input; one object for all of a model."""

    bits: int = 0  # of a weight; 0 = all
    group: int = 0  # inputs whose weights share a scale; 0 = all of an output's
    input_bits: int = 0  # of an input; each token has a scale of its own; 0 = all
    n: int = 0  # weights that stay of each m along the inputs; 0 = all
    m: int = 4
    prunes: bool = True  # n of m, from now on


class CompressedLinear(Linear):
    """A linear layer that computes with the weights and inputs it will have once compressed."""

    lens = Lens()
    alive: Tensor | None = None  # (inputs that are here,): 0 where an input is pruned

    def forward(self, input: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(input.dtype)
        weight, lens = self._pruned(self.weight.to(input.dtype)), self.lens
        if not lens.bits:
            return F.linear(input, weight, bias)
        if lens.group:
            weight = rounded(weight.unflatten(-1, (-1, lens.group)), lens.bits).view_as(weight)
            if lens.input_bits:
                input = rounded(input, lens.input_bits, self.largest)
            return F.linear(input, weight, bias)
        # Whole numbers first, scales behind: sums of whole numbers are exact in any order, so that
        # one that is zero is zero under every layout, and on integer kernels.
        weight, scale = whole(weight, lens.bits, self.largest)
        scale = scale.mT
        if lens.input_bits:
            input, of_input = whole(input, lens.input_bits, self.largest)
            scale = scale * of_input
        x = F.linear(input, weight) * scale
        return x if bias is None else x + bias

    def _pruned(self, weight: Tensor) -> Tensor:
        lens = self.lens
        if self.alive is not None:
            weight = weight * self.alive.to(weight.dtype)
        if not (lens.n and lens.prunes):
            return weight
        return _StraightThrough.apply(weight, pruned(weight.detach(), lens.n, lens.m))

    def largest(self, x: Tensor) -> Tensor:
        """(…,1): the largest magnitude over all input features, of which ranks may have parts."""
        return self.over_parts(largest(x))

    def over_parts(self, largest: Tensor) -> Tensor:
        """Return the largest over all parts of the input features; parallel/ has another."""
        return largest


def largest(x: Tensor) -> Tensor:
    """(…,1): the largest magnitude of the last dim."""
    return x.abs().amax(-1, keepdim=True)


def whole(
    x: Tensor, bits: int, largest: Callable[[Tensor], Tensor] = largest
) -> tuple[Tensor, Tensor]:
    """Whole numbers from -(2^(bits-1) - 1) to that, and the scale (…,1) that makes them x again.

    Symmetric about zero; the gradient goes straight through the rounding, and to no scale.
    """
    top, most = 2 ** (bits - 1) - 1, largest(x.detach())
    scale = torch.where(most > 0, most, 1.0) / top
    steps = x / scale
    return _StraightThrough.apply(steps, steps.detach().round()), scale


def rounded(x: Tensor, bits: int, largest: Callable[[Tensor], Tensor] = largest) -> Tensor:
    """Return the nearest that `whole` can tell."""
    number, scale = whole(x, bits, largest)
    return number * scale


def kept(weight: Tensor, n: int, m: int) -> Tensor:
    """(…,I/m,n): which of every m neighbours along the inputs are the n largest, rising."""
    order = weight.unflatten(-1, (-1, m)).abs().argsort(dim=-1, descending=True, stable=True)
    return order[..., :n].sort(-1).values


def pruned(weight: Tensor, n: int, m: int) -> Tensor:
    """With zeros but for the n largest of every m neighbours along the inputs."""
    groups = weight.unflatten(-1, (-1, m))
    stay = torch.zeros_like(groups, dtype=torch.bool).scatter(-1, kept(weight, n, m), True)
    return torch.where(stay, groups, 0.0).view_as(weight)


class _StraightThrough(torch.autograd.Function):
    """The value of the second with the gradient of the first."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, seen: Tensor) -> Tensor:
        return seen

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None
