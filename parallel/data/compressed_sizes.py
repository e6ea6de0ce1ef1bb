"""Sizes of compressed gradients, as pure functions; does not import torch."""

import math
from collections.abc import Sequence

BLOCK = 128  # int8: elements per scale
SCALE_BYTES = 4  # int8: of a float32
LEAST_GAIN = 2  # PowerSGD: a matrix is compressed if its factors are smaller by more than this


def part_size(numbers: int, ranks: int) -> int:
    """Return the elements of a gradient's chunk that each rank sums: a multiple of BLOCK."""
    return math.ceil(numbers / (ranks * BLOCK)) * BLOCK


def factor_sizes(shape: Sequence[int], rank: int) -> tuple[int, int]:
    """Return the elements of a matrix's two factors; (0, 0) if it is summed uncompressed."""
    rows, columns = shape[0], math.prod(shape[1:])
    small = rank * (rows + columns) * LEAST_GAIN < rows * columns
    return (rows * rank, columns * rank) if small else (0, 0)
