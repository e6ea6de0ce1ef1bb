"""Which sample comes when: a function of the seed and the position alone, never of the ranks."""

from functools import lru_cache
from hashlib import blake2b

import numpy as np


def mixed(*numbers: int) -> int:
    """63 random bits made of the numbers; the same on every machine and with every library."""
    digest = blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def position_to_sample(seed: int, position: int, size: int) -> tuple[int, int]:
    """The (epoch, index) of the sample at a position (= step × batch_size + i) of the run.

    Every epoch goes through all `size` samples in an order of its own.
    """
    epoch, place = divmod(position, size)
    return epoch, int(permutation(seed, epoch, size)[place])


# Two are kept: a batch can hold the end of one epoch and the beginning of the next.
@lru_cache(maxsize=2)
def permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    """(size,) int64: the order of one epoch, by (seed, epoch) only.

    Sorted by a hash (splitmix64, Steele et al. 2014) rather than drawn from numpy's generator,
    whose streams may change from one version to the next, and a resumed run with them.
    """
    z = np.arange(1, size + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z += np.uint64(mixed(seed, epoch))
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    order = np.argsort(z ^ (z >> np.uint64(31)), kind="stable")
    order.flags.writeable = False  # every caller gets the same array
    return order
