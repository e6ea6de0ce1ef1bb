"""A number agreed on after each step: the same on all ranks, two steps later, or at once."""

from parallel.health.agreement import DELAY, DelayedMax


def agreed(runtime) -> tuple:
    maximum = DelayedMax(runtime)
    pushed = [maximum.push(step * runtime.world_size + runtime.rank) for step in range(1, 6)]
    pushed.append(maximum.settle(0))
    return *pushed, maximum.settle(runtime.rank)


def test_ranks_agree_later_without_a_wait_or_at_once(ranks):
    # The largest of step s is 3 s + 2, and read DELAY steps later.
    known = (*[0] * DELAY, 5, 8, 11, 17, 2)
    assert ranks.run(3, agreed) == [known] * 3


def unheard(runtime) -> int:
    """Rank 0 asks twice more than the other one has: it waits for nobody until then."""
    maximum = DelayedMax(runtime)
    if runtime.rank == 0:
        found = [maximum.push(7) for _ in range(DELAY)]
        runtime.store.set("pushed", "")
        assert found == [0] * DELAY
    else:
        runtime.store.wait(["pushed"])
        for _ in range(DELAY):
            maximum.push(0)
    return maximum.settle(0)


def test_no_rank_waits_for_the_others_within_the_delay(ranks):
    assert ranks.run(2, unheard) == [7, 7]


def test_one_rank_alone_knows_at_once(runtime):
    assert DelayedMax(runtime).push(15) == 15
