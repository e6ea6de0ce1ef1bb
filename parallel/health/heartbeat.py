"""Diagnosis of silent, stuck and slow ranks from heartbeats; pure functions on plain data."""

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median

SLOW_RATIO = 2.0  # compute time over the others' median, above which a rank is reported


@dataclass(frozen=True)
class Heartbeat:
    """The state of a rank, reported about every second while its process runs."""

    number: int  # makes successive heartbeats differ
    host: str
    pid: int
    parent: int  # pid of the launcher; ranks with the same parent can kill each other
    step: int
    progress: int  # counter that the main thread increments
    patience: float  # seconds allowed without progress; 0 = unlimited
    collective: str  # the one that the main thread waits in, or its last one
    waiting: bool  # whether the main thread is in a collective
    place: str  # source line of this project that the main thread is at
    stack: str  # of the main thread, if there was no progress since the previous heartbeat
    own_seconds: float  # compute time in training steps
    own_steps: int  # number of these steps
    left: bool = False  # the rank has finished: its last heartbeat


@dataclass
class LastSeen:
    """The last heartbeat of a rank, and when it and its progress changed (the reader's clock)."""

    beat: Heartbeat
    changed: float  # seconds, when the heartbeat last changed
    moved: float  # seconds, when its progress last changed
    raw: bytes = b""


@dataclass(frozen=True)
class Verdict:
    """The reason to end a run: ranks at fault, those of them without a heartbeat, and a message."""

    ranks: list[int]
    silent: list[int]
    text: str


def diagnose_ranks(
    seen: Mapping[int, LastSeen], now: float, timeout: float, interval: float
) -> Verdict | None:
    """Return a verdict if ranks are silent or without progress for too long, otherwise None.

    `timeout` is the allowed silence in seconds, `interval` the seconds between two heartbeats; the
    allowed time without progress is each heartbeat's `patience`.
    """
    seen = {rank: s for rank, s in seen.items() if not s.beat.left}
    quiet = {rank: now - s.changed for rank, s in seen.items()}
    stuck = {r: now - s.moved for r, s in seen.items() if 0 < s.beat.patience < now - s.moved}
    silent = [rank for rank, seconds in quiet.items() if seconds > timeout]
    if not stuck and not silent:
        return None
    # One stopped rank blocks all others: ranks that missed a few heartbeats are the cause.
    silent = silent or [rank for rank, seconds in quiet.items() if seconds > 2.5 * interval + 0.5]
    blamed = silent or _lagging_ranks({rank: seen[rank].beat for rank in seen})
    seconds = max([quiet[r] for r in silent] or [now - seen[r].moved for r in blamed])
    what = "silent" if silent else "without progress"
    why = " (no heartbeat: stopped, or its host is gone)" if silent else ""
    head = f"{format_ranks(blamed)} {what} for {seconds:.0f} s{why}; the run ends"
    return Verdict(blamed, silent, "\n".join([head, *_blame_details(seen, blamed)]))


def _lagging_ranks(beats: Mapping[int, Heartbeat]) -> list[int]:
    """Return the ranks that the others wait for: computing, behind, or in another collective."""
    computing = [rank for rank, beat in beats.items() if not beat.waiting]
    if computing:
        return computing
    last = max(beat.progress for beat in beats.values())
    late = [rank for rank, beat in beats.items() if beat.progress < last]
    if late:
        return late
    # The ranks wait in different collectives: return the smallest group.
    parties: dict[str, list[int]] = {}
    for rank, beat in beats.items():
        parties.setdefault(beat.collective, []).append(rank)
    return min(parties.values(), key=len)


def _blame_details(seen: Mapping[int, LastSeen], blamed: list[int]) -> list[str]:
    """Format the position of the blamed ranks and the state of the others, one line each."""
    lines = []
    for rank in blamed:
        beat = seen[rank].beat
        what = "waits in" if beat.waiting else "last collective"
        lines.append(
            f"  rank {rank} (pid {beat.pid} on {beat.host}): step {beat.step}, at {beat.place}, "
            f"{what} {beat.collective}"
        )
        lines += [f"    {line}" for line in beat.stack.splitlines()]
    parties: dict[str, list[int]] = {}
    for rank in sorted(set(seen) - set(blamed)):
        beat = seen[rank].beat
        doing = f"waiting in {beat.collective}" if beat.waiting else "computing"
        parties.setdefault(f"{doing}, at {beat.place}", []).append(rank)
    return lines + [f"  {format_ranks(ranks)}: {doing}" for doing, ranks in parties.items()]


def format_ranks(ranks: list[int]) -> str:
    """Format ranks as "rank 1" or "ranks 0, 2"; at most eight are listed."""
    shown = ", ".join(map(str, ranks[:8])) + (", …" if len(ranks) > 8 else "")
    return f"rank{'s' * (len(ranks) > 1)} {shown}"


def find_slow_ranks(
    before: Mapping[int, Heartbeat], after: Mapping[int, Heartbeat]
) -> dict[int, float]:
    """Map slow ranks to the ratio of their compute time per step to the others' median.

    `before` and `after` are heartbeats at the start and end of the window; see SLOW_RATIO.
    """
    own = {}
    for rank in before.keys() & after.keys():
        steps = after[rank].own_steps - before[rank].own_steps
        if steps > 0:
            own[rank] = (after[rank].own_seconds - before[rank].own_seconds) / steps
    found = {}
    for rank, seconds in own.items():
        others = median([s for r, s in own.items() if r != rank] or [seconds])
        if others > 0 and seconds > SLOW_RATIO * others:
            found[rank] = seconds / others
    return found
