"""A pool of ranks that reports the one that failed, exited or hung, and restarts."""

import os
import time
from pathlib import Path

import pytest
import torch
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from parallel.rank_pool import RankFailedError, RankPool
from parallel.runtime import Runtime
from parallel.strategy import StrategyConfig
from trainer.config.train import VerifyConfig
from trainer.verify.cases import FAMILIES
from trainer.verify.compare import compare_layout


@pytest.fixture
def pool():
    pool = RankPool(2)
    yield pool
    pool.close()


def total(runtime, value: int) -> int:
    tensor = torch.tensor(value + runtime.rank)
    dist.all_reduce(tensor)
    return int(tensor)


def raise_on(runtime, rank: int) -> None:
    if runtime.rank == rank:
        raise ValueError("planted")
    total(runtime, 0)  # the other rank waits for it


def sleep_on(runtime, rank: int) -> None:
    if runtime.rank == rank:
        time.sleep(600)


def die_on(runtime, rank: int) -> None:
    if runtime.rank == rank:
        os._exit(3)


def test_groups_of_any_size_follow_each_other(pool):
    assert pool.run(2, total, 10) == [21, 21]
    assert pool.run(1, total, 10) == [10]
    assert pool.run(2, total, 20) == [41, 41]


@pytest.mark.parametrize(
    ("function", "message", "seconds"),
    [
        (raise_on, "(?s)rank 1 of 2 failed.*planted", 240.0),
        (die_on, "rank 1 died", 240.0),
        (sleep_on, r"stuck after 4 s: ranks \[1\]", 4.0),
    ],
)
def test_the_rank_at_fault_is_named_and_the_pool_starts_anew(pool, function, message, seconds):
    assert pool.run(2, total, 0) == [1, 1]
    with pytest.raises(RankFailedError, match=message):
        pool.run(2, function, 1, timeout_seconds=seconds)
    assert pool.run(2, total, 0) == [1, 1]


def gathered(runtime, sizes: tuple[int, ...]) -> list[float]:
    """A tensor that lies in parts on the last axis of a mesh."""
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("a", "b"))
    part = torch.full((1,), float(mesh.get_local_rank("b")))
    return DTensor.from_local(part, mesh, [Replicate(), Shard(0)]).full_tensor().tolist()


def test_a_later_group_does_not_meet_an_earlier_one_s_plans(ranks):
    # DTensor caches plans by mesh layout, which refer to groups that have been destroyed.
    for _ in range(2):
        assert ranks.run(4, gathered, (2, 2)) == [[0.0, 1.0]] * 4
        assert ranks.run(2, gathered, (1, 2)) == [[0.0, 1.0]] * 2


def threads(runtime: Runtime) -> int:
    return len(list(Path("/proc/self/task").iterdir()))


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads as Linux does")
def test_groups_that_have_ended_leave_no_threads(ranks):
    """Each would wake up for ever: these ranks, or a sweep's, got slower with every layout."""
    before = max(ranks.run(4, threads))
    for degrees in ((4, 1, 1), (1, 4, 1), (1, 1, 4), (2, 2, 1), (2, 1, 2), (1, 2, 2)):
        strategy = StrategyConfig(
            **dict(zip(("pipeline", "shard", "tensor"), degrees, strict=True))
        )
        config = VerifyConfig(strategy=strategy, model=FAMILIES["decoder (Llama)"])
        ranks.run(4, compare_layout, config)
    # Those of the last groups may be there: torch lets go of them with the next ones.
    assert max(ranks.run(4, threads)) < before + 30
