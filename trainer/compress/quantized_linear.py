"""Quantization- and sparsity-aware linear layers.

The forward computes with quantized, pruned weights; the gradient passes through to the full ones
(straight-through estimator, arXiv 1308.3432). A layer's class is replaced before parallelism is
applied; it gets no submodule and no parameter, so that every strategy handles it as a Linear.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from trainer.nn.layers import Linear


@dataclass
class QuantizationSpec:
    """Quantization and n:m sparsity of the compressed layers; one object per model."""

    bits: int = 0  # bits per weight; 0 = not quantized
    group: int = 0  # inputs per weight scale; 0 = one scale per output
    input_bits: int = 0  # bits per input value, one scale per token; 0 = not quantized
    n: int = 0  # weights retained of every m along the inputs; 0 = dense
    m: int = 4
    prunes: bool = True  # whether n:m sparsity is active at this step


class PackedWeight:
    """A frozen weight (outputs, inputs) as integers of 4 or 8 bits, with scales."""

    def __init__(self, numbers: Tensor, scale: Tensor, bits: int):
        self.scale, self.inputs, self.top = scale, numbers.shape[1], 2 ** (bits - 1) - 1
        self.halves = bits <= 4  # two integers in a byte
        codes = (numbers + self.top).to(torch.uint8)
        if self.halves:
            pairs = F.pad(codes, (0, self.inputs % 2)).unflatten(-1, (-1, 2))
            codes = pairs[..., 0] | (pairs[..., 1] << 4)
        self.codes = codes

    def unpack(self, dtype: torch.dtype) -> Tensor:
        """Return the rounded weight."""
        codes = self.codes
        if self.halves:
            codes = torch.stack((codes & 15, codes >> 4), -1).flatten(1)[:, : self.inputs]
        numbers = codes.to(self.scale.dtype) - self.top
        groups = numbers.unflatten(-1, (self.scale.shape[1], -1))
        return (groups * self.scale[..., None]).flatten(1).to(dtype)

    @property
    def nbytes(self) -> int:
        """Return the bytes that are kept."""
        return self.codes.nbytes + self.scale.nbytes


class _PackedProduct(torch.autograd.Function):
    """The product with a packed weight, which is unpacked again in the backward, not saved."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, packed: PackedWeight) -> Tensor:
        ctx.packed = packed
        return F.linear(input, packed.unpack(input.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] @ ctx.packed.unpack(grads[0].dtype), None


class CompressedLinear(Linear):
    """A linear layer that computes with quantized and pruned weights, and quantized inputs."""

    lens = QuantizationSpec()
    alive: Tensor | None = None  # (local inputs,): 0 for pruned inputs, else 1
    packed: PackedWeight | None = None  # of a frozen weight, in place of it
    is_rounded = False  # whether the weight is frozen, and rounded for good

    def forward(self, input: Tensor) -> Tensor:
        bias = self.cast_bias(input)
        if self.packed is not None:
            x = _PackedProduct.apply(input, self.packed)
            return x if bias is None else x + bias
        if self.is_rounded:
            return F.linear(input, self.local_part("weight").to(input.dtype), bias)
        weight, lens = self._prune_inputs(self.local_part("weight").to(input.dtype)), self.lens
        if not lens.bits:
            return F.linear(input, weight, bias)
        if lens.group:
            weight = fake_quantize(weight.unflatten(-1, (-1, lens.group)), lens.bits).view_as(
                weight
            )
            if lens.input_bits:
                input = fake_quantize(input, lens.input_bits, self.abs_max)
            return F.linear(input, weight, bias)
        # Multiply integers, then scale: integer sums are exact in any order, so that a sum that is
        # zero is zero under every layout and with integer kernels.
        weight, scale = quantize_to_integers(weight, lens.bits, self.abs_max)
        scale = scale.mT
        if lens.input_bits:
            input, of_input = quantize_to_integers(input, lens.input_bits, self.abs_max)
            scale = scale * of_input
        x = F.linear(input, weight) * scale
        return x if bias is None else x + bias

    def _prune_inputs(self, weight: Tensor) -> Tensor:
        lens = self.lens
        if self.alive is not None:
            weight = weight * self.alive.to(weight.dtype)
        if not (lens.n and lens.prunes):
            return weight
        return _StraightThrough.apply(weight, nm_pruned(weight.detach(), lens.n, lens.m))

    def rounded(self, weight: Tensor) -> PackedWeight:
        """Return a local part of the layer's weight, rounded."""
        lens = self.lens
        groups = weight.unflatten(-1, (-1, lens.group)) if lens.group else weight
        largest = row_abs_max if lens.group else self.abs_max
        numbers, scale = quantize_to_integers(groups, lens.bits, largest)
        return PackedWeight(numbers.flatten(1), scale.flatten(1), lens.bits)

    def abs_max(self, x: Tensor) -> Tensor:
        """Return the largest magnitude over all input features, (…,1)."""
        return self.over_parts(row_abs_max(x))

    def over_parts(self, largest: Tensor) -> Tensor:
        """Return the maximum over the shards of the input features; overridden if sharded."""
        return largest


def row_abs_max(x: Tensor) -> Tensor:
    """Return the largest magnitude over the last dim, (…,1)."""
    return x.abs().amax(-1, keepdim=True)


def quantize_to_integers(
    x: Tensor, bits: int, largest: Callable[[Tensor], Tensor] = row_abs_max
) -> tuple[Tensor, Tensor]:
    """Quantize x to integers in ±(2^(bits-1) - 1); return them and the scale (…,1).

    Symmetric; integers times scale approximate x. The gradient passes straight through the
    rounding; the scale gets none.
    """
    top, abs_max = 2 ** (bits - 1) - 1, largest(x.detach())
    scale = torch.where(abs_max > 0, abs_max, 1.0) / top
    steps = x / scale
    return _StraightThrough.apply(steps, steps.detach().round()), scale


def fake_quantize(
    x: Tensor, bits: int, largest: Callable[[Tensor], Tensor] = row_abs_max
) -> Tensor:
    """Fake-quantize x: round each value to the nearest one on the integer grid."""
    number, scale = quantize_to_integers(x, bits, largest)
    return number * scale


def nm_indices(weight: Tensor, n: int, m: int) -> Tensor:
    """Return the indices (…,I/m,n), ascending, of the n largest of every m adjacent inputs."""
    order = weight.unflatten(-1, (-1, m)).abs().argsort(dim=-1, descending=True, stable=True)
    return order[..., :n].sort(-1).values


def nm_pruned(weight: Tensor, n: int, m: int) -> Tensor:
    """Return the weight with all but the n largest of every m adjacent inputs set to zero."""
    groups = weight.unflatten(-1, (-1, m))
    mask = torch.zeros_like(groups, dtype=torch.bool).scatter(-1, nm_indices(weight, n, m), True)
    return torch.where(mask, groups, 0.0).view_as(weight)


class _StraightThrough(torch.autograd.Function):
    """Return the second argument; pass the gradient to the first (straight-through estimator)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, seen: Tensor) -> Tensor:
        return seen

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None
