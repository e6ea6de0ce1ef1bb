"""File format of a compressed weight: packed integers with scales, without pruned zeros."""

# O outputs, I inputs of a layer.

import torch
from torch import Tensor

from trainer.compress.quantized_linear import (
    QuantizationSpec,
    nm_indices,
    nm_pruned,
    quantize_to_integers,
)


def pack_weight(weight: Tensor, lens: QuantizationSpec) -> dict[str, Tensor]:
    """Pack a weight (O,I) into the tensors `values`, or `codes` and `scale`; and `places` for n:m.

    Pruned values are omitted; `places` are the indices of the n remaining of each m.
    """
    sparse = nm_pruned(weight, lens.n, lens.m) if lens.n else weight
    parts: dict[str, Tensor] = {}
    numbers = sparse
    if lens.bits:
        groups = sparse.unflatten(-1, (-1, lens.group)) if lens.group else sparse
        codes, scale = quantize_to_integers(groups, lens.bits)
        parts["scale"] = scale.flatten(1).to(torch.float32)
        numbers = codes.reshape_as(weight)
    if lens.n:
        places = nm_indices(sparse, lens.n, lens.m)
        numbers = numbers.unflatten(-1, (-1, lens.m)).gather(-1, places).flatten(1)
        parts["places"] = pack_bits(places.flatten(1), (lens.m - 1).bit_length())
    if lens.bits:
        top = 2 ** (lens.bits - 1) - 1
        parts["codes"] = pack_bits((numbers + top).to(torch.int64), lens.bits)
    else:
        parts["values"] = numbers.contiguous()
    return parts


def unpack_weight(parts: dict[str, Tensor], lens: QuantizationSpec, inputs: int) -> Tensor:
    """Return the weight (O,inputs) as the compressed layer uses it: the inverse of
    `pack_weight`."""
    count = inputs * lens.n // lens.m if lens.n else inputs
    numbers = codes_of(parts, lens, count).to(torch.float32) if lens.bits else parts["values"]
    if lens.n:
        places = unpack_bits(parts["places"], (lens.m - 1).bit_length(), count)
        empty = numbers.new_zeros(len(numbers), inputs // lens.m, lens.m)
        numbers = empty.scatter(
            -1, places.unflatten(-1, (-1, lens.n)), numbers.unflatten(-1, (-1, lens.n))
        ).flatten(1)
    if not lens.bits:
        return numbers
    scale = parts["scale"].to(numbers.dtype)
    return (numbers.unflatten(-1, (scale.shape[-1], -1)) * scale[..., None]).flatten(1)


def codes_of(parts: dict[str, Tensor], lens: QuantizationSpec, count: int) -> Tensor:
    """Return the quantized integers (O,count) as int8."""
    top = 2 ** (lens.bits - 1) - 1
    return (unpack_bits(parts["codes"], lens.bits, count) - top).to(torch.int8)


def pack_bits(numbers: Tensor, bits: int) -> Tensor:
    """Pack integers below 2^bits (…,K) into bytes, as many as fit; zeros pad the last byte."""
    width = _packed_bits(bits)
    each = 8 // width
    filled = torch.nn.functional.pad(numbers, (0, -numbers.shape[-1] % each))
    groups = filled.unflatten(-1, (-1, each))
    shifts = torch.arange(each) * width
    return (groups << shifts).sum(-1).to(torch.uint8)


def unpack_bits(squeezed: Tensor, bits: int, count: int) -> Tensor:
    """Unpack the first `count` integers (…,count): the inverse of `pack_bits`."""
    width = _packed_bits(bits)
    shifts = torch.arange(8 // width) * width
    numbers = (squeezed.to(torch.int64)[..., None] >> shifts) & (2**width - 1)
    return numbers.flatten(-2)[..., :count]


def _packed_bits(bits: int) -> int:
    """Return the bits per packed integer: a power of two, so that none spans two bytes."""
    return next(width for width in (1, 2, 4, 8) if width >= bits)
