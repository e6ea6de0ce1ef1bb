"""The order of samples: a function of seed and position alone, independent of the ranks."""

from collections.abc import Collection
from hashlib import blake2b

import numpy as np


def hash_to_seed(*numbers: int) -> int:
    """Hash the numbers to 63 bits, identically on every machine and library version."""
    digest = blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def order_positions(
    first: int, count: int, left_out: Collection[tuple[int, int]] = (), repeated: int = 0
) -> list[int]:
    """Return the positions in the order of a run's samples first, …, first + count - 1.

    Positions in the ranges [begin, end) of `left_out` are skipped, and later ones move up.
    With `repeated`, a run repeats its first `repeated` samples (0 = off).
    """
    found = np.arange(first, first + count)
    if repeated:
        found %= repeated
    for begin, end in sorted(left_out):
        found[found >= begin] += end - begin
    return [int(position) for position in found]


def position_ranges(positions: Collection[int]) -> list[tuple[int, int]]:
    """Return the fewest ranges [begin, end) that hold exactly these positions, in order."""
    found: list[tuple[int, int]] = []
    for position in sorted(set(positions)):
        if found and found[-1][1] == position:
            found[-1] = found[-1][0], position + 1
        else:
            found.append((position, position + 1))
    return found


WINDOW_BATCHES = 50  # batches of a window, within which samples are grouped by length


class SampleOrder:
    """The map from a position of the run, counted in samples from 0, to a sample.

    Each epoch visits all `size` samples in its own order. With `lengths` (size,), the samples of a
    batch are of similar length, which reduces padding, and the batches are shuffled. The order
    then depends on `batch_size`, which must therefore stay that of the start of the run, whatever
    the batch size of later steps: a change would repeat some samples and skip others.
    """

    def __init__(
        self, seed: int, size: int, lengths: np.ndarray | None = None, batch_size: int = 1
    ):
        self._seed, self._size = seed, size
        self._lengths, self._batch_size = lengths, batch_size
        self._epochs: dict[int, np.ndarray] = {}

    def __call__(self, position: int) -> tuple[int, int]:
        """Return the (epoch, index) of the sample."""
        epoch, offset = divmod(position, self._size)
        if epoch not in self._epochs:
            # Two are cached: a batch can contain the end of one epoch and the start of the next.
            self._epochs = {e: o for e, o in self._epochs.items() if e == epoch - 1}
            self._epochs[epoch] = self._epoch_order(epoch)
        return epoch, int(self._epochs[epoch][offset])

    def _epoch_order(self, epoch: int) -> np.ndarray:
        order = epoch_permutation(self._seed, epoch, self._size)
        if self._lengths is None:
            return order
        window = WINDOW_BATCHES * self._batch_size
        parts = [
            self._group_by_length(order[i : i + window], epoch)
            for i in range(0, len(order), window)
        ]
        return np.concatenate(parts)

    def _group_by_length(self, part: np.ndarray, epoch: int) -> np.ndarray:
        assert self._lengths is not None
        part = part[np.argsort(self._lengths[part], kind="stable")]
        full = len(part) // self._batch_size
        batches = part[: full * self._batch_size].reshape(full, self._batch_size)
        shuffled = batches[epoch_permutation(hash_to_seed(self._seed, int(part[0])), epoch, full)]
        return np.concatenate([shuffled.reshape(-1), part[full * self._batch_size :]])


def epoch_permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    """Return the order of one epoch (size,) int64, a function of (seed, epoch) only.

    Indices are sorted by a hash (splitmix64, Steele et al. 2014) rather than shuffled by numpy's
    generator, whose streams may change between versions, and with them a resumed run.
    """
    return np.argsort(_random_bits(hash_to_seed(seed, epoch), size), kind="stable")


def uniform_draws(seed: int, count: int) -> np.ndarray:
    """Return random numbers from 0 to 1 (count,) float64, a function of the seed only."""
    return (_random_bits(seed, count) >> np.uint64(11)) * 2.0**-53


def _random_bits(seed: int, count: int) -> np.ndarray:
    """Return 64 random bits each (count,) uint64."""
    z = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z += np.uint64(seed)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(z ^ (z >> np.uint64(31)))
