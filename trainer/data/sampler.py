"""Which sample comes when: a function of the seed and the position alone, never of the ranks."""

from collections.abc import Collection
from hashlib import blake2b

import numpy as np


def mixed(*numbers: int) -> int:
    """63 random bits made of the numbers; the same on every machine and with every library."""
    digest = blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def positions(
    first: int, count: int, left_out: Collection[tuple[int, int]] = (), repeated: int = 0
) -> list[int]:
    """Return where in the order a run finds its samples first, first + 1, …: `count` positions from
    0.

    Ranges [begin, end) of positions that are `left_out` never come: what is behind them moves up.
    The first `repeated` samples come again and again (0 = they do not).
    """
    found = np.arange(first, first + count)
    if repeated:
        found %= repeated
    for begin, end in sorted(left_out):
        found[found >= begin] += end - begin
    return [int(position) for position in found]


def ranges(positions: Collection[int]) -> list[tuple[int, int]]:
    """Return the fewest ranges [begin, end) that hold these positions and no others, in order."""
    found: list[tuple[int, int]] = []
    for position in sorted(set(positions)):
        if found and found[-1][1] == position:
            found[-1] = found[-1][0], position + 1
        else:
            found.append((position, position + 1))
    return found


WINDOW_BATCHES = 50  # samples are grouped by length among those of so many batches


class Order:
    """Which sample stands at a position of the run, counted in samples from 0.

    Every epoch goes through all `size` samples in an order of its own. With `lengths` (size,), the
    samples of a batch are of like length, which spares padding, and the batches come in any order.
    The order then depends on `batch_size`, which therefore stays what it was when the run began,
    however many samples a step takes later: else a change would repeat some and skip others.
    """

    def __init__(
        self, seed: int, size: int, lengths: np.ndarray | None = None, batch_size: int = 1
    ):
        self._seed, self._size = seed, size
        self._lengths, self._batch_size = lengths, batch_size
        self._epochs: dict[int, np.ndarray] = {}

    def __call__(self, position: int) -> tuple[int, int]:
        """Return the (epoch, index) of the sample."""
        epoch, place = divmod(position, self._size)
        if epoch not in self._epochs:
            # Two are kept: a batch can hold the end of one epoch and the beginning of the next.
            self._epochs = {e: o for e, o in self._epochs.items() if e == epoch - 1}
            self._epochs[epoch] = self._order(epoch)
        return epoch, int(self._epochs[epoch][place])

    def _order(self, epoch: int) -> np.ndarray:
        order = permutation(self._seed, epoch, self._size)
        if self._lengths is None:
            return order
        window = WINDOW_BATCHES * self._batch_size
        parts = [self._grouped(order[i : i + window], epoch) for i in range(0, len(order), window)]
        return np.concatenate(parts)

    def _grouped(self, part: np.ndarray, epoch: int) -> np.ndarray:
        assert self._lengths is not None
        part = part[np.argsort(self._lengths[part], kind="stable")]
        whole = len(part) // self._batch_size
        batches = part[: whole * self._batch_size].reshape(whole, self._batch_size)
        shuffled = batches[permutation(mixed(self._seed, int(part[0])), epoch, whole)]
        return np.concatenate([shuffled.reshape(-1), part[whole * self._batch_size :]])


def permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    """(size,) int64: the order of one epoch, by (seed, epoch) only.

    Sorted by a hash (splitmix64, Steele et al. 2014) rather than drawn from numpy's generator,
    whose streams may change from one version to the next, and a resumed run with them.
    """
    z = np.arange(1, size + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z += np.uint64(mixed(seed, epoch))
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.argsort(z ^ (z >> np.uint64(31)), kind="stable")
