"""Who is to blame for a hang, and who is slow: decided on plain data."""

from dataclasses import replace

from parallel.health.heartbeat import Heartbeat, LastSeen, diagnose_ranks, find_slow_ranks

TIMEOUT, INTERVAL = 10.0, 1.0
BEAT = Heartbeat(
    0,
    "a",
    1,
    0,
    step=7,
    progress=7,
    patience=TIMEOUT,
    collective="gloo:all_reduce #12",
    waiting=True,
    place="trainer/loop.py:1 (take_step)",
    stack="",
    own_seconds=0.0,
    own_steps=0,
)


def at(now: float, silent: float = 0.5, stuck: float = 0.5, **changes) -> LastSeen:
    return LastSeen(replace(BEAT, **changes), now - silent, now - stuck)


def verdict(seen: dict[int, LastSeen]):
    return diagnose_ranks(seen, 100.0, TIMEOUT, INTERVAL)


def test_ranks_that_move_are_fine():
    assert verdict({0: at(100), 1: at(100)}) is None
    assert verdict({0: at(100, stuck=9.9), 1: at(100, stuck=9.9)}) is None


def test_a_silent_rank_is_named_with_its_last_collective():
    stopped = at(100, silent=10.2, stuck=10.5, waiting=False, collective="gloo:broadcast #11")
    found = verdict({0: at(100, stuck=9.0), 1: stopped, 2: at(100, stuck=9.0)})
    assert (found.ranks, found.silent) == ([1], [1])
    head, rank, others = found.text.splitlines()
    assert head.startswith("rank 1 silent for 10 s (no heartbeat")
    assert "rank 1 (pid 1 on a): step 7" in rank
    assert "last collective gloo:broadcast #11" in rank
    assert others.startswith("  ranks 0, 2: waiting in gloo:all_reduce #12, at trainer/loop.py:1")


def test_silence_is_the_cause_of_what_stands_still():
    # The others' progress ends a moment before the stopped rank has been silent for long enough.
    found = verdict({0: at(100, stuck=10.1), 1: at(100, silent=9.5, stuck=10.1)})
    assert found.ranks == found.silent == [1]


def test_a_rank_that_lives_but_hangs_shows_its_stack():
    hung = at(100, stuck=11, waiting=False, stack="  File x\n    while True: pass")
    found = verdict({0: at(100, stuck=11), 1: at(100, stuck=11), 2: hung})
    assert (found.ranks, found.silent) == ([2], [])
    assert found.text.splitlines()[0] == "rank 2 without progress for 11 s; the run ends"
    assert "while True: pass" in found.text


def test_a_rank_that_waits_elsewhere_is_named():
    other = at(100, stuck=11, collective="gloo:barrier #12")
    assert verdict({0: at(100, stuck=11), 1: at(100, stuck=11), 2: other}).ranks == [2]
    late = at(100, stuck=11, progress=6)
    assert verdict({0: late, 1: at(100, stuck=11), 2: at(100, stuck=11)}).ranks == [0]


def test_a_start_or_a_save_may_take_longer_but_not_in_silence():
    saving = {"patience": 10 * TIMEOUT}
    assert verdict({0: at(100, stuck=50, **saving), 1: at(100, stuck=50, **saving)}) is None
    stopped = at(100, silent=11, stuck=50, **saving)
    assert verdict({0: at(100, stuck=50, **saving), 1: stopped}).ranks == [1]


def test_a_rank_that_has_left_is_not_silent():
    assert verdict({0: at(100), 1: at(100, silent=60, stuck=60, left=True)}) is None


def test_a_slow_rank_and_its_ratio():
    before = dict.fromkeys(range(4), BEAT)
    seconds = {0: 1.0, 1: 5.0, 2: 1.1, 3: 0.9}
    after = {r: replace(BEAT, own_seconds=s, own_steps=10) for r, s in seconds.items()}
    assert find_slow_ranks(before, after) == {1: 5.0}
    assert find_slow_ranks(before, {r: replace(b, own_seconds=1.0) for r, b in after.items()}) == {}
    assert find_slow_ranks(before, before) == {}  # no step in between
    assert find_slow_ranks({}, after) == {}
