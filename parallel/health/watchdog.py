"""A watchdog thread per rank: handles signals, loss of the launcher, heartbeats and hangs.

Collectives release the GIL, so the thread also runs while the main thread is in one: a hung rank
still sends heartbeats and receives verdicts.
"""

import json
import logging
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from types import FrameType
from typing import Any, Self

import torch.distributed as dist

from parallel.health.agreement import DelayedMax
from parallel.health.heartbeat import (
    Heartbeat,
    LastSeen,
    diagnose_ranks,
    find_slow_ranks,
    format_ranks,
)
from parallel.health.process_info import (
    BusyTime,
    count_oom_kills,
    format_stack,
    is_alive,
    is_in_collective,
    last_collective,
    main_frame,
    parent_pid,
    source_line,
)
from parallel.runtime import Runtime, set_group_timeouts, use_device, wait_for_count

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
# Ctrl-C in a terminal reaches launcher and ranks, and the launcher forwards it: ignore duplicates.
ECHO_SECONDS = 1.0
LONG = 10  # multiple of timeout_seconds allowed without progress while a run starts or saves
FAILED, STOPPED, HUNG = 1, 75, 77  # exit codes
COMPARED_STEPS = 20  # minimum number of steps before a rank is reported as slow
VERDICT_SECONDS = 60.0  # that a collective waits longer, so that the verdict comes first
GRACE_SECONDS = 3.0  # for a rank to exit by itself after another one has failed

log = logging.getLogger(__name__)
Tell = Callable[[str, int, int], None]  # (reason, rank at fault, exit code), called before exit


class StoppedError(Exception):
    """A signal requested a stop; every rank raises this at the same point."""


class RankLostError(Exception):
    """Another rank's process has exited; the message names it."""


class Watchdog:
    """The watchdog of one rank: a context manager, to be entered in the main thread.

    `timeout_seconds`: 0 = hangs are not detected. `tell` is called on one rank before it ends a
    run. `window_seconds`: period of training over which the ranks' compute times are compared.
    """

    def __init__(
        self, runtime: Runtime, timeout_seconds: float, tell: Tell, window_seconds: float = 10.0
    ):
        self.runtime, self.timeout = runtime, timeout_seconds
        self.signal = 0  # number of the signal that requested a stop; 0 = none
        self._tell = tell
        self._window = window_seconds
        self._interval = min(1.0, timeout_seconds / 10) if timeout_seconds else 1.0
        self._signalled_at = self._failed_at = 0.0
        self._agreed = DelayedMax(runtime)
        self._step, self._progress, self._long = 0, 0, True  # startup is slow
        self._number = 0  # of heartbeats sent
        self._heard = time.monotonic()  # time of the store's last response
        self._shown = -1  # progress at the last heartbeat
        self._own_steps, self._own_seconds = 0, 0.0
        self._parent = os.getppid()
        self._launched = "TORCHELASTIC_RUN_ID" in os.environ
        self._oom_kills = count_oom_kills()
        self._seen: dict[int, LastSeen] = {}
        self._before: dict[int, Heartbeat] = {}  # at the start of the window
        self._before_at = 0.0
        self._slow: set[int] = set()  # already reported
        self._store: dist.Store | None = None
        if runtime.world_size > 1 and runtime.store is not None:
            # Each watchdog of this launch has its own keys and connection: the main thread blocks
            # its connection while it waits for a key.
            number = runtime.store.add(f"watch{runtime.rank}", 1)
            self._store = dist.PrefixStore(f"watch{number}", runtime.store.clone())  # type: ignore[attr-defined]

    def __enter__(self) -> Self:
        self._own = BusyTime()
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._handlers: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            # Python runs handlers in the main thread, which may be stuck; this wakes ours at once.
            self._old_wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
            for number in SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup wants
                    self._handlers[number] = signal.signal(number, self._print_stacks)
        self._ended = False
        self._thread = threading.Thread(target=self._watch_loop, name="watch", daemon=True)
        self._thread.start()
        if self._store is not None and self.timeout:
            threading.Thread(target=self._leave_if_cut_off, name="alone", daemon=True).start()
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error is not None:
            self._wait_for_verdict()
        self._ended = True
        os.write(self._write, b"\0")
        self._thread.join()
        if self._store is not None and self.timeout:
            with suppress(dist.DistError):
                self._store.set(
                    f"beat{self.runtime.rank}",
                    json.dumps(asdict(replace(self._make_heartbeat(), left=True))),
                )
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if self._handlers:
            signal.set_wakeup_fd(self._old_wakeup)
        os.close(self._read)
        os.close(self._write)
        self._own.close()

    # Called by the main thread.

    def report_progress(self, step: int) -> None:
        """Record progress at this step."""
        self._step = step
        self._progress += 1

    @contextmanager
    def track_step(self) -> Iterator[None]:
        """Return a context that measures this rank's compute time in a training step."""
        began = self._own.busy_seconds()
        yield
        self._own_seconds += self._own.busy_seconds() - began
        self._own_steps += 1
        if self._long:
            self._set_patience(False)

    @contextmanager
    def allow_long(self) -> Iterator[None]:
        """Return a context in which LONG times the time-out is allowed without progress."""
        before = self._long
        self._set_patience(True)
        try:
            yield
        finally:
            self._progress += 1
            self._set_patience(before)

    def _set_patience(self, long: bool) -> None:
        """Allow more or less time without progress, and to every collective a bit more."""
        self._long = long
        if self.timeout and self.runtime.world_size > 1:
            set_group_timeouts(self.timeout * (LONG if long else 1) + VERDICT_SECONDS)

    def stop_requested(self, settle: bool = False) -> bool:
        """Return whether a stop was requested on any rank two calls ago, without waiting for ranks.

        A collective call; every rank gets the same result. With `settle`, also of this call.
        """
        found = (self._agreed.settle if settle else self._agreed.push)(self.signal)
        self.signal = self.signal or found
        return bool(found)

    def announce_failure(self) -> None:
        """Post that this rank failed, so that the others exit too."""
        if self._store is not None:
            self._post_verdict({"by": self.runtime.rank, "code": FAILED})

    def wait_for_all(self, seconds: float = 60.0) -> None:
        """Wait up to `seconds` for all ranks: the first one to exit would end the others."""
        if self._store is None or self.runtime.store is None:
            return
        wait_for_count(self.runtime.store, "here", self.runtime.world_size, seconds)

    def find_lost_ranks(self) -> RankLostError | None:
        """Return an error naming ranks that have exited, after a failed collective; None if none.

        May sleep for two and a half heartbeat intervals.
        """
        self._wait_for_verdict()
        if self._store is None or self._store.check(["verdict"]):
            return None
        first = self._read_heartbeats()
        beats = {rank: Heartbeat(**json.loads(raw)) for rank, raw in first.items()}
        gone = [rank for rank, beat in beats.items() if self._is_gone(beat)]
        if not gone:
            time.sleep(2.5 * self._interval)
            gone = [rank for rank, raw in self._read_heartbeats().items() if raw == first[rank]]
        gone = [r for r in gone if r != self.runtime.rank and not beats[r].left]
        if not gone:
            return None
        beats = {rank: beats[rank] for rank in gone}
        steps = ", ".join(f"pid {b.pid} on {b.host}, step {b.step}" for b in beats.values())
        killed = count_oom_kills() - self._oom_kills
        why = f"; out of memory (cgroup oom_kill {killed})" if killed else ""
        verb = "is" if len(gone) == 1 else "are"
        return RankLostError(f"{format_ranks(gone)} {verb} gone ({steps}): killed, or crashed{why}")

    def _wait_for_verdict(self) -> None:
        """Let the thread end this rank if the run hangs: the others' exits fail its collectives."""
        store = self._store
        if store is None or not store.check(["verdict"]):
            return
        if json.loads(store.get("verdict"))["code"] == HUNG:
            self._thread.join(GRACE_SECONDS)

    def _print_stacks(self, number: int, frame: FrameType | None) -> None:
        self.signal = self.signal or number

    # Run by the watchdog's threads.

    def _watch_loop(self) -> None:
        use_device(self.runtime.device)
        watches = self._launched or (self._store is not None and self.timeout > 0)
        due = time.monotonic()
        while not self._ended:
            wait = max(0.0, due - time.monotonic()) if watches else None
            ready, _, _ = select.select([self._read], [], [], wait)
            for number in os.read(self._read, 4096) if ready else b"":
                if number in SIGNALS:
                    self._on_signal(number)
            if watches and time.monotonic() >= due and not self._ended:
                due = time.monotonic() + self._interval
                self._leave_if_orphaned()
                self._beat_and_check()

    def _on_signal(self, number: int) -> None:
        self._leave_if_orphaned()  # the launcher's exit may arrive as a signal
        now = time.monotonic()
        name = signal.Signals(number).name
        if not self._signalled_at:
            self._signalled_at = now
            log.info("%s: the run saves and ends within three steps; again = at once", name)
        elif now - self._signalled_at > ECHO_SECONDS:
            self._end_process(
                f"a second signal ({name}): left at once", self.runtime.rank, 128 + number
            )

    def _leave_if_orphaned(self) -> None:
        if self._launched and os.getppid() != self._parent:
            self._end_process("its launcher is gone", self.runtime.rank, FAILED)

    def _leave_if_cut_off(self) -> None:
        """Exit if this rank makes no progress and cannot reach the store to receive a verdict.

        Runs in a separate thread: with a broken connection, a request to the store blocks for
        minutes.
        """
        progress, moved = self._progress, time.monotonic()
        while not self._ended:
            time.sleep(self._interval)
            now = time.monotonic()
            if self._progress != progress:
                progress, moved = self._progress, now
            patience = self.timeout * (LONG if self._long else 1)
            if now - moved > patience and now - self._heard > self.timeout and not self._ended:
                log.error(
                    "rank %d is cut off: no step for %.0f s, and no word from the launch's store "
                    "for %.0f s",
                    self.runtime.rank,
                    now - moved,
                    now - self._heard,
                )
                os._exit(HUNG)

    def _beat_and_check(self) -> None:
        store, rank = self._store, self.runtime.rank
        if store is None or not self.timeout:
            return
        try:
            store.set(f"beat{rank}", json.dumps(asdict(self._make_heartbeat())))
            if rank in (0, 1, self.runtime.world_size - 1):  # no single point of failure
                self._check_heartbeats()
            if store.check(["verdict"]):
                self._act_on_verdict(json.loads(store.get("verdict")))
            self._heard = time.monotonic()
        except dist.DistError:
            # The launcher has exited or its host is lost: its other ranks will report it.
            self._store = None

    def _make_heartbeat(self) -> Heartbeat:
        frame = main_frame()
        stands = self._progress == self._shown
        self._shown = self._progress
        collective, waiting = last_collective(self.runtime.device.type == "cuda", stands)
        self._number += 1
        return Heartbeat(
            self._number,
            socket.gethostname(),
            os.getpid(),
            self._parent,
            self._step,
            self._progress,
            self.timeout * (LONG if self._long else 1),
            collective,
            waiting or is_in_collective(frame),
            source_line(frame),
            format_stack(frame) if stands else "",
            self._own_seconds,
            self._own_steps,
        )

    def _read_heartbeats(self) -> dict[int, bytes]:
        assert self._store is not None
        ranks = range(self.runtime.world_size)
        ranks_known = [r for r in ranks if r in self._seen or self._store.check([f"beat{r}"])]
        raws = self._store.multi_get([f"beat{rank}" for rank in ranks_known])
        return dict(zip(ranks_known, raws, strict=True))

    def _check_heartbeats(self) -> None:
        now = time.monotonic()
        for rank, raw in self._read_heartbeats().items():
            old = self._seen.get(rank)
            if old is not None and old.raw == raw:
                continue
            beat = Heartbeat(**json.loads(raw))
            stands = old is not None and old.beat.progress == beat.progress
            self._seen[rank] = LastSeen(beat, now, old.moved if old and stands else now, raw)
        verdict = diagnose_ranks(self._seen, now, self.timeout, self._interval)
        if verdict is not None:
            beats = [self._seen[rank].beat for rank in verdict.silent]
            self._post_verdict(
                {
                    "by": self.runtime.rank,
                    "code": HUNG,
                    "text": verdict.text,
                    "rank": verdict.ranks[0],
                    "kill": [[b.host, b.pid, b.parent] for b in beats],
                }
            )
        if self.runtime.rank == 0 and self.runtime.device.type == "cpu":
            self._warn_slow_ranks(now)

    def _warn_slow_ranks(self, now: float) -> None:
        """Log a warning, once per rank, if its compute time is far above the others'."""
        beats = {rank: seen.beat for rank, seen in self._seen.items()}
        if self._before:
            steps = beats[0].own_steps - self._before[0].own_steps  # the same on all ranks
            if now - self._before_at < self._window or steps < COMPARED_STEPS:
                return
        for rank, ratio in find_slow_ranks(self._before, beats).items():
            if rank not in self._slow:
                log.warning(
                    "rank %d is slow: a step takes it %.1f times as long as the others, which wait "
                    "for it (around step %d)",
                    rank,
                    ratio,
                    beats[rank].step,
                )
                self._slow.add(rank)
        self._before, self._before_at = beats, now

    def _post_verdict(self, verdict: dict[str, Any]) -> None:
        assert self._store is not None
        self._store.compare_set("verdict", "", json.dumps(verdict))  # the first one counts

    def _act_on_verdict(self, verdict: dict[str, Any]) -> None:
        """End this rank and kill stopped ones of this host, which react to SIGKILL only."""
        if verdict["code"] == FAILED:
            self._failed_at = self._failed_at or time.monotonic()
            if verdict["by"] != self.runtime.rank and (
                time.monotonic() - self._failed_at > GRACE_SECONDS
            ):
                os._exit(FAILED)
            return
        if verdict["by"] == self.runtime.rank:
            self._tell(verdict["text"], verdict["rank"], HUNG)
        for host, pid, parent in verdict["kill"]:
            ours = host == socket.gethostname() and parent == self._parent == parent_pid(pid)
            if ours and pid != os.getpid():
                os.kill(pid, signal.SIGKILL)
        os._exit(HUNG)

    def _end_process(self, reason: str, rank: int, code: int) -> None:
        self._tell(reason, rank, code)
        os._exit(code)

    def _is_gone(self, beat: Heartbeat) -> bool:
        same_host = beat.host == socket.gethostname() and beat.parent == self._parent
        return same_host and not is_alive(beat.pid)
