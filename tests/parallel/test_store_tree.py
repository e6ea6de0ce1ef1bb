"""Agreement over a store: all values arrive, in however many levels, and no key is left."""

from threading import Thread

import pytest
from torch import distributed as dist

from parallel.store_tree import FAN_OUT, StoreTree


@pytest.mark.parametrize("ranks", [1, 2, FAN_OUT + 1, FAN_OUT + 2, 3 * FAN_OUT * FAN_OUT // 2])
def test_every_rank_is_heard(ranks):
    store, found = dist.HashStore(), {}

    def act(rank):
        tree = StoreTree(store, rank, ranks)
        if gathered := tree.gather("x", rank * rank):
            tree.tell("all", sum(gathered.values()))
            found["keys"] = gathered
        found[rank] = tree.hear("all")

    threads = [Thread(target=act, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found.pop("keys") == {rank: rank * rank for rank in range(ranks)}
    assert found == dict.fromkeys(range(ranks), sum(r * r for r in range(ranks)))
    assert store.num_keys() == 1
