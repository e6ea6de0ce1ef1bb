"""The order of samples is independent of the number of ranks and of restarts."""

import threading
import time
from collections import Counter
from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from launched import until

from trainer.data import loader as loader_module
from trainer.data.dataset import Dataset, Sample
from trainer.data.loader import TrainLoader, evaluated_samples, evaluation_batches
from trainer.data.sampler import (
    SampleOrder,
    epoch_permutation,
    hash_to_seed,
    order_positions,
    position_ranges,
)


class Numbers(Dataset):
    """Samples that contain their index and the seed that they were requested with."""

    def __init__(self, size: int, fails_at: int = -1):
        self.size, self.fails_at = size, fails_at
        self.asked = 0

    def __len__(self) -> int:
        return self.size

    def sample(self, index: int, seed: int | None) -> Sample:
        if index == self.fails_at:
            raise ValueError(f"sample {index} is broken")
        self.asked += 1
        return {"targets": np.array([index, -1 if seed is None else seed])}

    def collate(self, samples: Sequence[Sample]) -> Sample:
        return {"targets": np.stack([sample["targets"] for sample in samples])}


def steps(dataset, count, first_step=0, rank=0, degree=1, seed=3, batch_size=8, micro=2):
    """Return the next steps of one rank as lists of micro-batches."""
    loader = TrainLoader(dataset, seed, batch_size, micro, rank, degree, first_step)
    try:
        return [next(loader) for _ in range(count)]
    finally:
        loader.close()


def joined(micro_batches):
    """Return the target, epoch seed and dropout seed of each sample (samples, 3)."""
    rows = [torch.cat([b["targets"], b["seeds"][:, None]], dim=1) for b in micro_batches]
    return torch.cat(rows)


def test_an_epoch_is_a_permutation_and_every_epoch_another():
    orders = [[SampleOrder(5, 101)(e * 101 + i) for i in range(101)] for e in range(3)]
    for epoch, order in enumerate(orders):
        assert {e for e, _ in order} == {epoch}
        assert sorted(index for _, index in order) == list(range(101))
    indices = [tuple(index for _, index in order) for order in orders]
    assert len({*indices, tuple(range(101))}) == 4
    assert tuple(epoch_permutation(6, 0, 101)) != indices[0]


def test_the_order_never_changes():
    """A resumed run must keep its order, also under another version of numpy."""
    assert epoch_permutation(0, 0, 8).tolist() == [7, 0, 2, 4, 1, 6, 3, 5]
    assert hash_to_seed(1, 2, 3) == 2904650318439132554


def test_the_order_is_uniform():
    """Every sample comes first, and follows every other one, about equally often."""
    orders = np.stack([epoch_permutation(1, epoch, 5) for epoch in range(4000)])
    first = np.bincount(orders[:, 0], minlength=5)
    follows = np.bincount(orders[:, 0] * 5 + orders[:, 1], minlength=25).reshape(5, 5)
    assert abs(first - 800).max() < 5 * np.sqrt(800)
    assert abs(follows[~np.eye(5, dtype=bool)] - 200).max() < 5 * np.sqrt(200)


@pytest.mark.parametrize("degree", [2, 4])
@pytest.mark.parametrize("micro", [1, 2, 3])
def test_ranks_together_load_the_steps_of_one_process(degree, micro):
    dataset = Numbers(21)  # batches cross from one epoch to the next
    alone = steps(dataset, 6)
    ranks = [steps(dataset, 6, rank=r, degree=degree, micro=micro) for r in range(degree)]
    for step, whole in enumerate(alone):
        shares = [joined(of_rank[step]) for of_rank in ranks]
        assert torch.equal(torch.cat(shares), joined(whole))
        assert all(len(share) == 8 // degree for share in shares)
        assert all(len(batch["targets"]) <= micro for r in ranks for batch in r[step])


def test_a_resumed_run_equals_an_uninterrupted_run():
    dataset = Numbers(21)
    whole = steps(dataset, 7)
    resumed = steps(dataset, 3, first_step=4)
    for unbroken, again in zip(whole[4:], resumed, strict=True):
        assert torch.equal(joined(unbroken), joined(again))


def test_left_out_steps_are_skipped():
    dataset = Numbers(21)
    whole = steps(dataset, 7)
    left_out = {(40, 48), (0, 8), (16, 24)}
    loader = TrainLoader(dataset, 3, 8, 2, 0, 1, first_step=1, left_out=left_out)
    for step, expected in enumerate((3, 4, 6), start=1):
        assert torch.equal(joined(next(loader)), joined(whole[expected]))
        found = loader.sample_ids(step, data_rank=0)
        assert sorted(found) == sorted(joined(whole[expected])[:, 0].tolist())
    loader.close()


def test_positions_skip_left_out_ranges():
    assert order_positions(5, 3) == [5, 6, 7]
    left_out = {(8, 10), (0, 2), (10, 11)}
    assert order_positions(0, 9, left_out) == [2, 3, 4, 5, 6, 7, 11, 12, 13]
    assert order_positions(4, 9, left_out, repeated=6) == [6, 7, 2, 3, 4, 5, 6, 7, 2]
    assert position_ranges(order_positions(0, 9, left_out)) == [(2, 8), (11, 14)]
    assert position_ranges([7, 3, 4, 3]) == [(3, 5), (7, 8)] and position_ranges([]) == []


class Unequal(Numbers):
    """Samples of known, unequal lengths."""

    def sample_lengths(self) -> np.ndarray:
        return np.random.default_rng(0).integers(1, 100, self.size)


def learned(dataset: Dataset, parts: list[tuple[int, int]], **options) -> list[int]:
    """Return the samples of a run in order; `parts`: (steps, samples per step) of each part."""
    found: list[int] = []
    step = first = 0
    for count, batch_size in parts:
        loader = TrainLoader(
            dataset,
            3,
            batch_size,
            0,
            1,
            2,
            first_step=step,
            first_sample=first,
            order_batch_size=parts[0][1],
            **options,
        )
        for number in range(count):
            found += [i for rank in (0, 1) for i in loader.sample_ids(step + number, rank)]
        read = joined(next(loader))[:, 0].tolist()
        assert sorted(read) == sorted(loader.sample_ids(loader.first_step, 1))
        loader.close()
        step, first = step + count, first + count * batch_size
    return found


CHANGES = {
    "16 to 64": [(10, 16), (26, 64)],
    "64 to 16": [(10, 64), (60, 16)],
    "16 to 24": [(7, 16), (70, 24)],
    "up and down": [(5, 16), (9, 64), (3, 6), (20, 16), (30, 40)],
}


@pytest.mark.parametrize("left_out", [set(), {(200, 216), (64, 128), (1500, 1516)}])
@pytest.mark.parametrize("kind", [Numbers, Unequal])
@pytest.mark.parametrize("parts", CHANGES.values(), ids=CHANGES)
def test_another_batch_size_neither_skips_nor_repeats_a_sample(parts, kind, left_out):
    dataset = kind(1010)  # Unequal: a window of 800 and a partial one
    found = learned(dataset, parts, left_out=left_out)
    order = SampleOrder(3, 1010, dataset.sample_lengths(), parts[0][1])
    gone = {place for begin, end in left_out for place in range(begin, end)}
    places = [place for place in range(len(found) + len(gone)) if place not in gone]
    assert found == [order(place)[1] for place in places[: len(found)]]
    of_epoch = [index for place, index in zip(places, found, strict=False) if place < 1010]
    missing = {order(place)[1] for place in gone if place < 1010}
    assert sorted([*of_epoch, *missing]) == list(range(1010))  # each once


def test_repeated_samples_do_not_depend_on_the_batch_size():
    found = learned(Numbers(200), [(5, 16), (2, 64), (7, 24)], repeated=32)
    assert set(Counter(found[:64]).values()) == {2} and set(found) == set(found[:32])


def test_the_first_steps_repeat():
    dataset = Numbers(21)
    first, second = steps(dataset, 2)
    loader = TrainLoader(dataset, 3, 8, 2, 0, 1, first_step=1, repeated=16)
    for expected in (second, first, second):
        assert torch.equal(joined(next(loader)), joined(expected))
    loader.close()


def test_every_sample_comes_once_per_epoch_with_the_seed_of_the_epoch():
    rows = torch.cat([joined(step) for step in steps(Numbers(16), 4)])
    for epoch in range(2):
        part = rows[epoch * 16 : epoch * 16 + 16]
        assert sorted(part[:, 0].tolist()) == list(range(16))
        assert set(part[:, 1].tolist()) == {hash_to_seed(3, epoch)}
    dropout_seeds = set(rows[:, 2].tolist())
    assert len(dropout_seeds) == 32 and min(dropout_seeds) >= 0  # one per position


def test_another_seed_is_another_order():
    first, other = (joined(steps(Numbers(64), 1, seed=seed)[0]) for seed in (1, 2))
    assert first[:, 0].tolist() != other[:, 0].tolist()
    assert not set(first[:, 2].tolist()) & set(other[:, 2].tolist())


def test_a_micro_batch_size_of_0_is_the_local_batch():
    batches = steps(Numbers(21), 1, rank=1, degree=2, micro=0)[0]
    assert [len(batch["seeds"]) for batch in batches] == [4]


def test_waiting_for_data_is_measured_and_a_step_is_not(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(loader_module, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    loader = TrainLoader(Numbers(50), 0, 4, 4, 0, 1, 0)
    take = loader._ready.get

    def take_after(seconds):
        now[0] += seconds
        return take()

    for seconds in (2.0, 0.0, 3.0):
        monkeypatch.setattr(loader._ready, "get", lambda seconds=seconds: take_after(seconds))
        next(loader)
        now[0] += 50.0  # a step
    loader.close()
    assert loader.wait_seconds == 5.0


def test_prefetching_is_bounded():
    dataset = Numbers(50)
    loader = TrainLoader(dataset, 0, 4, 4, 0, 1, 0, prefetch=2)
    until(lambda: dataset.asked >= 3 * 4)
    time.sleep(0.1)
    assert dataset.asked == 3 * 4  # two steps in the queue, one waits for a free slot
    loader.close()


def test_an_error_of_the_thread_reaches_the_consumer_every_time():
    loader = TrainLoader(Numbers(8, fails_at=5), 0, 4, 4, 0, 1, 0)
    for _ in range(2):
        with pytest.raises(ValueError, match="sample 5 is broken"):
            for _ in range(3):
                next(loader)
    loader.close()


def test_close_ends_the_thread_and_the_iteration():
    before = threading.active_count()
    loader = TrainLoader(Numbers(50), 0, 4, 4, 0, 1, 0)
    next(loader)
    assert threading.active_count() == before + 1
    loader.close()
    loader.close()
    assert threading.active_count() == before
    with pytest.raises(StopIteration):
        next(loader)


@pytest.mark.parametrize("samples", [0, 1, 9, 100])
@pytest.mark.parametrize("degree", [1, 2, 3])
def test_evaluation_reads_each_sample_once_on_one_rank(samples, degree):
    dataset = Numbers(23)
    ranks = [list(evaluation_batches(dataset, 4, r, degree, samples)) for r in range(degree)]
    shapes = [[tuple(batch["index"].shape) for batch in of_rank] for of_rank in ranks]
    assert all(shape == shapes[0] for shape in shapes)  # or a collective would hang
    index_N = torch.cat([batch["index"] for of_rank in ranks for batch in of_rank])
    target_N = torch.cat([batch["targets"] for of_rank in ranks for batch in of_rank])
    real = index_N >= 0
    assert sorted(index_N[real].tolist()) == evaluated_samples(23, samples).tolist()
    assert torch.equal(target_N[real, 0], index_N[real])
    assert (target_N[real, 1] == -1).all()  # requested without a seed
    assert (index_N[~real] == -1).all() and (target_N[~real] == -100).all()
    assert (~real).sum() < 4 * degree


def test_an_evaluated_subset_is_pseudo_random_and_always_the_same():
    """Splits are often sorted by class, length or author: their first samples are biased."""
    part = evaluated_samples(1000, 100)
    assert np.array_equal(part, np.unique(part)) and len(part) == 100
    by_class = np.bincount(part // 100, minlength=10)  # ten classes, in order
    assert by_class.min() >= 4 and by_class.max() <= 18
    assert set(part) < set(evaluated_samples(1000, 101))
    assert evaluated_samples(8, 3).tolist() == [0, 3, 7]  # in every version
    for samples in (0, 8, 9):
        assert evaluated_samples(8, samples).tolist() == list(range(8))
    assert len(evaluated_samples(8, 1)) == 1 and evaluated_samples(1, 1).tolist() == [0]


def test_few_samples_need_few_fillers():
    ranks = [list(evaluation_batches(Numbers(23), 8, r, 2, samples=5)) for r in range(2)]
    a, b, c, d, e = evaluated_samples(23, 5).tolist()
    assert [[b["index"].tolist() for b in r] for r in ranks] == [[[a, b, c]], [[d, e, -1]]]


class Lengths(Dataset):
    """Samples of random lengths that contain their index."""

    def __len__(self) -> int:
        return 64

    def sample(self, index: int, seed: int | None) -> dict[str, np.ndarray]:
        length = np.random.default_rng(index).integers(1, 50)
        return {"tokens": np.full(length, index), "targets": np.full(length, index)}

    def collate(self, samples: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        longest = max(len(sample["tokens"]) for sample in samples)
        rows = [np.pad(s["tokens"], (0, longest - len(s["tokens"])), mode="edge") for s in samples]
        return {"tokens": np.stack(rows), "targets": np.stack(rows)}


def test_samples_of_similar_length_share_a_micro_batch():
    whole = TrainLoader(Lengths(), 0, 32, 32, 0, 1, first_step=3)
    cut = TrainLoader(Lengths(), 0, 32, 8, 0, 1, first_step=3)
    (all_at_once,), micro_batches = next(whole), next(cut)
    lengths = [batch["tokens"].shape[1] for batch in micro_batches]
    assert lengths == sorted(lengths)
    assert sum(8 * length for length in lengths) < 0.75 * all_at_once["tokens"].numel()
    # The same samples, each with its own dropout seed.
    seed_of = dict(
        zip(all_at_once["tokens"][:, 0].tolist(), all_at_once["seeds"].tolist(), strict=True)
    )
    parts = [(b["tokens"][:, 0].tolist(), b["seeds"].tolist()) for b in micro_batches]
    assert {i: s for tokens, seeds in parts for i, s in zip(tokens, seeds, strict=True)} == seed_of
    whole.close()
    cut.close()


def test_samples_of_similar_length_share_a_batch():
    lengths = np.random.default_rng(0).integers(1, 100, 1000)
    order = SampleOrder(4, 1000, lengths, batch_size=10)
    epoch = [order(i) for i in range(1000)]
    assert sorted(index for _, index in epoch) == list(range(1000))  # each once
    batches = lengths[[index for _, index in epoch]].reshape(-1, 10)
    assert np.ptp(batches, axis=1).mean() < 5  # in random order: over 80
    # The batches are shuffled, and differ in the next epoch.
    assert abs(np.corrcoef(np.arange(100), batches.mean(axis=1))[0, 1]) < 0.3
    again = SampleOrder(4, 1000, lengths, batch_size=10)
    assert [again(i) for i in range(990, 2000)] == [order(i) for i in range(990, 2000)]
    first, second = (
        {frozenset(e[i : i + 10]) for i in range(0, 1000, 10)}
        for e in ([i for _, i in epoch], [order(1000 + i)[1] for i in range(1000)])
    )
    assert len(first & second) < 5
