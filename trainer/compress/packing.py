"""A compressed weight as it lies in a file: small whole numbers with scales, without its zeros."""

# O outputs, I inputs of a layer.

import torch
from torch import Tensor

from trainer.compress.quantized_linear import Lens, kept, pruned, whole


def pack(weight: Tensor, lens: Lens) -> dict[str, Tensor]:
    """Return the tensors that a weight (O,I) is kept as: `values` or `codes` and `scale`, `places`.

    Values that are pruned are left out; `places` says which of each m stay.
    """
    seen = pruned(weight, lens.n, lens.m) if lens.n else weight
    parts: dict[str, Tensor] = {}
    numbers = seen
    if lens.bits:
        groups = seen.unflatten(-1, (-1, lens.group)) if lens.group else seen
        codes, scale = whole(groups, lens.bits)
        parts["scale"] = scale.flatten(1).to(torch.float32)
        numbers = codes.reshape_as(weight)
    if lens.n:
        places = kept(seen, lens.n, lens.m)
        numbers = numbers.unflatten(-1, (-1, lens.m)).gather(-1, places).flatten(1)
        parts["places"] = squeezed(places.flatten(1), (lens.m - 1).bit_length())
    if lens.bits:
        top = 2 ** (lens.bits - 1) - 1
        parts["codes"] = squeezed((numbers + top).to(torch.int64), lens.bits)
    else:
        parts["values"] = numbers.contiguous()
    return parts


def unpack(parts: dict[str, Tensor], lens: Lens, inputs: int) -> Tensor:
    """Return the weight (O,inputs) that `pack` was given, as the compressed layer saw it."""
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
    """(O,count): the whole numbers, as int8."""
    top = 2 ** (lens.bits - 1) - 1
    return (loosened(parts["codes"], lens.bits, count) - top).to(torch.int8)


def squeezed(numbers: Tensor, bits: int) -> Tensor:
    """Numbers below 2^bits (…,K) as bytes, as many in each as fit; zeros fill the last."""
    width = _width(bits)
    each = 8 // width
    filled = torch.nn.functional.pad(numbers, (0, -numbers.shape[-1] % each))
    groups = filled.unflatten(-1, (-1, each))
    shifts = torch.arange(each) * width
    return (groups << shifts).sum(-1).to(torch.uint8)


def loosened(squeezed: Tensor, bits: int, count: int) -> Tensor:
    """Undoes `squeezed`: the first `count` numbers (…,count)."""
    width = _width(bits)
    shifts = torch.arange(8 // width) * width
    numbers = (squeezed.to(torch.int64)[..., None] >> shifts) & (2**width - 1)
    return numbers.flatten(-2)[..., :count]


def _width(bits: int) -> int:
    """Bits that a number takes: a power of two, so that none lies across two bytes."""
    return next(width for width in (1, 2, 4, 8) if width >= bits)
