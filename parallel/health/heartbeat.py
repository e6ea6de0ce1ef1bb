"""Judging heartbeats: which rank is silent, stuck or slow; pure functions on plain data."""

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median

SLOW_RATIO = 2.0  # a rank that computes so many times as long as the median is named


@dataclass(frozen=True)
class Heartbeat:
    """A report of a rank on itself, about every second, as long as its process runs."""

    number: int  # so that no two are the same
    host: str
    pid: int
    parent: int  # of the launcher: ranks of one parent can end each other
    step: int
    progress: int  # goes up whenever the main thread has got something done
    patience: float  # seconds without progress that are still in order; 0 = any
    collective: str  # that its main thread waits in, or its last one
    waiting: bool  # the main thread is in a collective
    place: str  # of ours that the main thread is at
    stack: str  # of the main thread, if it has made no progress since the beat before
    own_seconds: float  # computed in training steps
    own_steps: int  # these steps
    left: bool = False  # it has done its work: no further beat comes


@dataclass
class LastSeen:
    """The last beat of a rank, and when it and its progress changed (the reader's clock)."""

    beat: Heartbeat
    changed: float
    moved: float
    raw: bytes = b""


@dataclass(frozen=True)
class Verdict:
    """The reason that a run ends: ranks to blame, those of them without a heartbeat, and the
    words.
    """

    ranks: list[int]
    silent: list[int]
    text: str


def diagnose_ranks(
    seen: Mapping[int, LastSeen], now: float, timeout: float, interval: float
) -> Verdict | None:
    """Return the verdict on ranks that have been silent, or without progress, for too long.

    None = fine.

    `timeout`: seconds of silence allowed; of progress each beat says so itself. `interval`: between
    two beats.
    """
    seen = {rank: s for rank, s in seen.items() if not s.beat.left}
    quiet = {rank: now - s.changed for rank, s in seen.items()}
    stuck = {r: now - s.moved for r, s in seen.items() if 0 < s.beat.patience < now - s.moved}
    silent = [rank for rank, seconds in quiet.items() if seconds > timeout]
    if not stuck and not silent:
        return None
    # All ranks stand still when one does: whose heart has stopped for a few beats is the cause.
    silent = silent or [rank for rank, seconds in quiet.items() if seconds > 2.5 * interval + 0.5]
    blamed = silent or _lagging_ranks({rank: seen[rank].beat for rank in seen})
    seconds = max([quiet[r] for r in silent] or [now - seen[r].moved for r in blamed])
    what = "silent" if silent else "without progress"
    why = " (no heartbeat: stopped, or its host is gone)" if silent else ""
    head = f"{format_ranks(blamed)} {what} for {seconds:.0f} s{why}; the run ends"
    return Verdict(blamed, silent, "\n".join([head, *_blame_details(seen, blamed)]))


def _lagging_ranks(beats: Mapping[int, Heartbeat]) -> list[int]:
    """Return the ranks that the others wait for; all, if each waits in a collective."""
    computing = [rank for rank, beat in beats.items() if not beat.waiting]
    if computing:
        return computing
    last = max(beat.progress for beat in beats.values())
    late = [rank for rank, beat in beats.items() if beat.progress < last]
    if late:
        return late
    # They wait in different collectives: the smaller party is named.
    parties: dict[str, list[int]] = {}
    for rank, beat in beats.items():
        parties.setdefault(beat.collective, []).append(rank)
    return min(parties.values(), key=len)


def _blame_details(seen: Mapping[int, LastSeen], blamed: list[int]) -> list[str]:
    """Describe where the blamed ranks are, and what the others wait in."""
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
    """rank 1; ranks 0, 2; a long list is cut."""
    shown = ", ".join(map(str, ranks[:8])) + (", …" if len(ranks) > 8 else "")
    return f"rank{'s' * (len(ranks) > 1)} {shown}"


def find_slow_ranks(
    before: Mapping[int, Heartbeat], after: Mapping[int, Heartbeat]
) -> dict[int, float]:
    """Ranks whose own seconds per step, between two beats, are far above the others': the ratio."""
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
