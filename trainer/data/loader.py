"""Data loaders: micro-batches of tensors; each rank loads its part of every global batch."""

import queue
import threading
import time
from collections.abc import Collection, Iterator, Sequence

import numpy as np
import torch

from trainer.config.loss import IGNORED
from trainer.data.dataset import Dataset, Sample
from trainer.data.sampler import SampleOrder, epoch_permutation, hash_to_seed, order_positions

Batch = dict[str, torch.Tensor]
EVALUATION_SEED = 2026  # fixed: runs to compare are evaluated on the same samples


class TrainLoader:
    """An endless iterator over steps; each item is this rank's list of micro-batches.

    Rank r of D loads the samples [r × B / D, (r + 1) × B / D) of a step's B samples. The sample at
    a position depends on the seed alone, so the data state is the number of samples consumed:
    `first_sample` before `first_step` (None = batch_size per step). Besides the data a micro-batch
    has `seeds` (B,) int64, the dropout seed of each sample. `left_out` and `repeated` count
    samples, as in `order_positions`; `order_batch_size` is the batch size by which samples were
    grouped by length when the run started (0 = batch_size).
    """

    def __init__(
        self,
        dataset: Dataset,
        seed: int,
        batch_size: int,
        micro_batch_size: int,
        data_rank: int,
        data_degree: int,
        first_step: int,
        pin_memory: bool = False,
        prefetch: int = 2,
        first_sample: int | None = None,
        left_out: Collection[tuple[int, int]] = (),
        repeated: int = 0,
        order_batch_size: int = 0,
    ):
        assert batch_size % data_degree == 0, (batch_size, data_degree)
        self.wait_seconds = 0.0  # the total time that the consumer has waited for data
        self._dataset, self._seed, self._pin_memory = dataset, seed, pin_memory
        self._left_out, self._repeated = left_out, repeated
        self._order_batch_size = order_batch_size or batch_size
        self.first_step = first_step
        self._first_sample = first_step * batch_size if first_sample is None else first_sample
        self._batch_size, self._share = batch_size, batch_size // data_degree
        self._micro_batch_size = micro_batch_size or self._share
        self._rank = data_rank
        self._order = self._new_order()
        self._ready: queue.Queue[list[Batch] | Exception] = queue.Queue(max(1, prefetch))
        self._closed = threading.Event()
        self._error: Exception | None = None
        self._cuda = torch.cuda.current_device() if pin_memory else -1
        self._thread = threading.Thread(
            target=self._fill_queue, args=(first_step,), name="data", daemon=True
        )
        self._thread.start()

    def __iter__(self) -> "TrainLoader":
        return self

    def __next__(self) -> list[Batch]:
        if self._error is None and not self._closed.is_set():
            start = time.perf_counter()
            item = self._ready.get()
            self.wait_seconds += time.perf_counter() - start
            if not isinstance(item, Exception):
                return item
            self._error = item
        raise self._error or StopIteration

    def close(self) -> None:
        """Stop the background thread."""
        self._closed.set()
        self._thread.join(timeout=5)

    def sample_ids(self, step: int, data_rank: int) -> list[int]:
        """Return the indices of the samples that a data rank trains on at `step` (from 0)."""
        order = self._new_order()  # self._order belongs to the thread
        local_batch = slice(data_rank * self._share, (data_rank + 1) * self._share)
        return [order(position)[1] for position in self.sample_positions(step)[local_batch]]

    def sample_positions(self, step: int) -> list[int]:
        """Return the positions in the order of the global batch of `step` (from 0)."""
        first = self._first_sample + (step - self.first_step) * self._batch_size
        return order_positions(first, self._batch_size, self._left_out, self._repeated)

    def _new_order(self) -> SampleOrder:
        dataset = self._dataset
        return SampleOrder(
            self._seed, len(dataset), dataset.sample_lengths(), self._order_batch_size
        )

    def _fill_queue(self, step: int) -> None:
        item: list[Batch] | Exception
        if self._cuda >= 0:  # a new thread has the first one, and would make a context there
            torch.cuda.set_device(self._cuda)
        while not self._closed.is_set() and self._error is None:
            try:
                item = self._load_step(step)
            except Exception as error:  # raised again in the consumer
                item = error
            while not self._closed.is_set():
                try:
                    self._ready.put(item, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if isinstance(item, Exception):
                return
            step += 1

    def _load_step(self, step: int) -> list[Batch]:
        local = self.sample_positions(step)[self._rank * self._share :][: self._share]
        samples = sorted(map(self._load_sample, local), key=_padded_size)
        size = self._micro_batch_size
        return [self._micro_batch(samples[i : i + size]) for i in range(0, len(samples), size)]

    def _load_sample(self, position: int) -> tuple[Sample, int]:
        epoch, index = self._order(position)
        sample = self._dataset.sample(index, hash_to_seed(self._seed, epoch))
        return sample, hash_to_seed(self._seed, 0, position)

    def _micro_batch(self, drawn: Sequence[tuple[Sample, int]]) -> Batch:
        batch = self._dataset.collate([sample for sample, _ in drawn])
        batch["seeds"] = np.array([seed for _, seed in drawn], np.int64)
        return _to_tensors(batch, self._pin_memory)


def _padded_size(drawn: tuple[Sample, int]) -> int:
    """Return the size to sort by: micro-batches of similar lengths have less padding.

    The order within a step does not change the loss, which is a sum.
    """
    return sum(part.size for part in drawn[0].values())


def evaluation_batches(
    dataset: Dataset,
    micro_batch_size: int,
    data_rank: int,
    data_degree: int,
    samples: int = 0,
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """Yield this rank's micro-batches of the `evaluated_samples` samples of a split, unaugmented.

    All ranks get equally many micro-batches of equally many samples, since sharded models
    communicate in every forward. The difference is padded with fillers, samples whose targets are
    all ignored and whose `index` is -1.
    """
    chosen = evaluated_samples(len(dataset), samples)
    count = len(chosen)
    size = min(micro_batch_size, -(-count // data_degree))
    for first in range(data_rank * size, _round_up(count, size * data_degree), size * data_degree):
        position_B = np.arange(first, first + size)
        filler_B = position_B >= count
        # A filler repeats the last sample, so that it adds no longer sequence.
        index_B = chosen[np.minimum(position_B, count - 1)]
        batch = dataset.collate([dataset.sample(int(i), None) for i in index_B])
        batch["targets"][filler_B] = IGNORED
        batch["index"] = np.where(filler_B, -1, index_B)
        yield _to_tensors(batch, pin_memory)


def evaluated_samples(size: int, samples: int) -> np.ndarray:
    """Return the sorted indices of the samples of a split to evaluate (≤ samples,); 0 = all.

    They are a pseudo-random subset, since splits are often sorted, but identical in every run and
    layout; a larger subset contains each smaller one.
    """
    if not 0 < samples < size:
        return np.arange(size)
    return np.sort(epoch_permutation(EVALUATION_SEED, 0, size)[:samples])


def _round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def document_ends(documents_BS: np.ndarray) -> np.ndarray:
    """Return the position behind each document of each row, (B,M) int64, the last one repeated.

    Documents are runs of equal ids; padding is one too. M is a power of two, so that compiled
    attention meets few shapes.
    """
    rows, length = documents_BS.shape
    row_N, column_N = np.nonzero(np.diff(documents_BS, axis=1))
    count_B = np.bincount(row_N, minlength=rows)
    ends_BM = np.full((rows, 1 << int(count_B.max()).bit_length()), length, np.int64)
    first_B = np.cumsum(count_B) - count_B
    ends_BM[row_N, np.arange(len(row_N)) - first_B[row_N]] = column_N + 1
    return ends_BM


def _to_tensors(batch: Sample, pin_memory: bool) -> Batch:
    if "documents" in batch:
        batch["document_ends"] = document_ends(batch["documents"])
    tensors = {key: torch.from_numpy(np.ascontiguousarray(value)) for key, value in batch.items()}
    return {k: t.pin_memory() for k, t in tensors.items()} if pin_memory else tensors
