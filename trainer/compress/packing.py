"""File format of a compressed weight: packed integers with scales, without pruned zeros."""

# O outputs, I inputs of a layer.

import torch
from torch import Tensor

from trainer.compress.quantized_linear import Lens, kept, pruned, whole


def pack(weight: Tensor, lens: Lens) -> dict[str, Tensor]:
    """Pack a weight (O,I) into the tensors `values`, or `codes` and `scale`; and `places` for n:m.

    Pruned values are omitted; `places` are the indices of the n remaining of each m.
    """
    sparse = pruned(weight, lens.n, lens.m) if lens.n else weight
    parts: dict[str, Tensor] = {}
    numbers = sparse
    if lens.bits:
        groups = sparse.unflatten(-1, (-1, lens.group)) if lens.group else sparse
        codes, scale = whole(groups, lens.bits)
        parts["scale"] = scale.flatten(1).to(torch.float32)
        numbers = codes.reshape_as(weight)
    if lens.n:
        places = kept(sparse, lens.n, lens.m)
        numbers = numbers.unflatten(-1, (-1, lens.m)).gather(-1, places).flatten(1)
        parts["places"] = squeezed(places.flatten(1), (lens.m - 1).bit_length())
    if lens.bits:
        top = 2 ** (lens.bits - 1) - 1
        parts["codes"] = squeezed((numbers + top).to(torch.int64), lens.bits)
    else:
        parts["values"] = numbers.contiguous()
    return parts


def unpack(parts: dict[str, Tensor], lens: Lens, inputs: int) -> Tensor:
    """Return the weight (O,inputs) as the compressed layer uses it: the inverse of `pack`."""
    count = inputs * lens.n // lens.m if lens.n else inputs
    numbers = codes_of(parts, lens, count).to(torch.float32) if lens.bits else parts["values"]
    if lens.n:
        places = loosened(parts["places"], (lens.m - 1).bit_length(), count)
        empty = numbers.new_zeros(len(numbers), inputs // lens.m, lens.m)
        numbers = empty.scatter(
            -1, places.unflatten(-1, (-1, lens.n)), numbers.unflatten(-1, (-1, lens.n))
        ).flatten(1)
    if not lens.bits:
        return numbers
    scale = parts["scale"].to(numbers.dtype)
    return (numbers.unflatten(-1, (scale.shape[-1], -1)) * scale[..., None]).flatten(1)


def codes_of(parts: dict[str, Tensor], lens: Lens, count: int) -> Tensor:
    """Return the quantized integers (O,count) as int8."""
    top = 2 ** (lens.bits - 1) - 1
    return (loosened(parts["codes"], lens.bits, count) - top).to(torch.int8)


def squeezed(numbers: Tensor, bits: int) -> Tensor:
    """Pack integers below 2^bits (…,K) into bytes, as many as fit; zeros pad the last byte."""
    width = _width(bits)
    each = 8 // width
    filled = torch.nn.functional.pad(numbers, (0, -numbers.shape[-1] % each))
    groups = filled.unflatten(-1, (-1, each))
    shifts = torch.arange(each) * width
    return (groups << shifts).sum(-1).to(torch.uint8)


def loosened(squeezed: Tensor, bits: int, count: int) -> Tensor:
    """Unpack the first `count` integers (…,count): the inverse of `squeezed`."""
    width = _width(bits)
    shifts = torch.arange(8 // width) * width
    numbers = (squeezed.to(torch.int64)[..., None] >> shifts) & (2**width - 1)
    return numbers.flatten(-2)[..., :count]


def _width(bits: int) -> int:
    """Return the bits per packed integer: a power of two, so that none spans two bytes."""
    return next(width for width in (1, 2, 4, 8) if width >= bits)
