"""Which sample comes when: a function of the seed and the position alone, never of the ranks."""

from collections.abc import Collection
from hashlib import blake2b

import numpy as np


def mixed(*numbers: int) -> int:
    """63 random bits made of the numbers; the same on every machine and with every library."""
    digest = blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def data_step(step: int, left_out: Collection[int]) -> int:
    """The step of the data that `step` of a run learns from; both from 0, in the same order."""
    for skipped in sorted(left_out):
        step += skipped <= step
    return step


WINDOW_BATCHES = 50  # samples are grouped by length among those of so many batches


class Order:
    """Which sample stands at a position (= step × batch_size + i) of the run.

    Every epoch goes through all `size` samples in an order of its own. With `lengths` (size,), the
    samples of a batch are of like length, which spares padding, and the batches come in any order.
    """

    def __init__(
        self, seed: int, size: int, lengths: np.ndarray | None = None, batch_size: int = 1
    ):
        self._seed, self._size = seed, size
        self._lengths, self._batch_size = lengths, batch_size
        self._epochs: dict[int, np.ndarray] = {}

    def __call__(self, position: int) -> tuple[int, int]:
        """The (epoch, index) of the sample."""
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
