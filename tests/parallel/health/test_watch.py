"""Ranks that hang, fall silent, die or dawdle, as processes of their own: the watch ends them."""

import logging
import multiprocessing
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from unittest import mock

import pytest
import torch
from launched import until
from torch import distributed as dist

from parallel.health.process_info import count_oom_kills
from parallel.health.watchdog import HUNG, RankLostError, Watchdog
from parallel.runtime import Runtime, all_reduce_max

TIMEOUT = 4.0


class Ranks:
    """A few processes that are watched over while they run a function; what each one has said."""

    def __init__(self, folder: Path, world_size: int, work: Callable):
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._folder = folder
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "parallel.health.watchdog"])
        self.processes = [
            context.Process(target=watched, args=(rank, world_size, self._store.port, folder, work))
            for rank in range(world_size)
        ]
        for process in self.processes:
            process.start()

    def said(self, rank: int) -> str:
        """What the rank has written to stderr."""
        path = self._folder / f"stderr{rank}"
        return path.read_text() if path.exists() else ""

    def codes(self) -> list[int]:
        """Exit codes, once all have ended."""
        for process in self.processes:
            process.join(240)
        return [process.exitcode for process in self.processes]

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


def watched(rank: int, world_size: int, port: int, folder: Path, work: Callable) -> None:
    os.dup2(os.open(folder / f"stderr{rank}", os.O_WRONLY | os.O_CREAT), 2)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group(
        "gloo",
        store=dist.PrefixStore("group", store),
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=100),
    )
    runtime = Runtime(rank, world_size, rank, world_size, torch.device("cpu"), store)

    def tell(reason: str, blamed: int, code: int) -> None:
        logging.error("%s [blamed %d, code %d]", reason, blamed, code)

    with Watchdog(runtime, TIMEOUT, tell, window_seconds=1.0) as watch:
        work(runtime, watch, folder)


@pytest.fixture
def start(tmp_path):
    started = []

    def begin(world_size: int, work: Callable) -> Ranks:
        started.append(Ranks(tmp_path, world_size, work))
        return started[-1]

    yield begin
    for ranks in started:
        ranks.end()


def steps(runtime: Runtime, watch: Watchdog, number: int, own: Callable = lambda: None) -> None:
    for step in range(1, number + 1):
        with watch.track_step():
            own()
            dist.all_reduce(torch.ones(3))
        watch.report_progress(step)


def tell_steps(watch: Watchdog) -> None:
    """Wait until a heartbeat with the steps so far has been sent, and another has begun."""
    sent = watch._number
    until(lambda: watch._number >= sent + 2)


def stopped(runtime: Runtime, watch: Watchdog, folder: Path) -> None:
    steps(runtime, watch, 5)
    tell_steps(watch)
    if runtime.rank == 0:
        os.kill(os.getpid(), signal.SIGSTOP)
    steps(runtime, watch, 5)


def test_a_stopped_rank_is_named_killed_and_ends_the_run(start):
    ranks = start(3, stopped)
    assert ranks.codes() == [-signal.SIGKILL, HUNG, HUNG]
    words = [ranks.said(rank) for rank in (1, 2)]
    text = max(words, key=len)
    assert min(words, key=len) == ""  # one of them tells
    assert re.search(r"rank 0 silent for \d+ s \(no heartbeat: stopped, or its host is gone", text)
    assert "step 5" in text
    assert "last collective gloo:all_reduce #5 of group 0 default_pg, [3]" in text
    assert "ranks 1, 2: waiting in gloo:all_reduce #6 of group 0 default_pg, [3]" in text
    assert "[blamed 0, code 77]" in text


def stuck(runtime: Runtime, watch: Watchdog, folder: Path) -> None:
    steps(runtime, watch, 5, lambda: oversleep(runtime, watch))


def oversleep(runtime: Runtime, watch: Watchdog) -> None:
    if runtime.rank == 1 and watch._step == 3:
        time.sleep(600)


def test_a_rank_that_hangs_shows_where(start):
    ranks = start(2, stuck)
    assert ranks.codes() == [HUNG, HUNG]
    text = ranks.said(0) + ranks.said(1)
    assert "rank 1 without progress for 4 s" in text
    assert "in oversleep\n" in text
    assert "time.sleep(600)" in text
    assert text.count("the run ends") == 1


def hears_late(runtime: Runtime, watch: Watchdog, folder: Path) -> None:
    act, failed = watch._act_on_verdict, threading.Event()
    if runtime.rank == 0:
        watch._act_on_verdict = lambda verdict: act(verdict) if failed.is_set() else None
    try:
        stuck(runtime, watch, folder)
    except RuntimeError:
        failed.set()
        raise


def test_the_exit_of_the_others_does_not_hide_a_hang(start):
    ranks = start(2, hears_late)
    assert ranks.codes() == [HUNG, HUNG]
    assert "Traceback" not in ranks.said(0)


def skips(runtime: Runtime, watch: Watchdog, folder: Path) -> None:
    steps(runtime, watch, 3)
    if runtime.rank < 2:
        dist.all_reduce(torch.ones(7))
    steps(runtime, watch, 1)  # rank 2 is one collective behind from here on
    steps(runtime, watch, 1)
    dist.barrier()


def test_a_skipped_collective_is_bounded_and_named(start):
    ranks = start(3, skips)
    codes = ranks.codes()
    text = "".join(map(ranks.said, range(3)))
    # gloo may notice that the sizes differ (an error on some rank) or wait: both end in time.
    assert all(codes), text
    if HUNG in codes:
        assert "waiting in gloo:" in text


def dies(runtime: Runtime, watch: Watchdog, folder: Path) -> None:
    steps(runtime, watch, 3)
    tell_steps(watch)
    if runtime.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        steps(runtime, watch, 1000)
    except RuntimeError:
        with mock.patch("parallel.health.watchdog.count_oom_kills", lambda: watch._oom_kills + 1):
            lost = watch.find_lost_ranks()
        assert isinstance(lost, RankLostError)
        logging.error("%s", lost)


def test_the_survivors_know_who_is_gone(start):
    ranks = start(2, dies)
    assert ranks.codes() == [0, -signal.SIGKILL]
    pid = ranks.processes[1].pid
    expected = f"rank 1 is gone (pid {pid} on {os.uname().nodename}, step 3): killed, or crashed"
    expected += "; out of memory (cgroup oom_kill 1)"
    assert expected in ranks.said(0)


def out_of_memory(runtime: Runtime, watch: Watchdog, folder: Path) -> None:
    group = Path((folder / "group").read_text())
    (group / "cgroup.procs").write_text(str(os.getpid()))
    watch._oom_kills = count_oom_kills()
    steps(runtime, watch, 3)
    tell_steps(watch)
    try:
        if runtime.rank == 1:
            torch.ones(10**9)
        steps(runtime, watch, 1000)
    except RuntimeError:
        logging.error("%s", watch.find_lost_ranks())


@pytest.fixture
def little_memory():
    """A control group whose members have 200 MB together."""
    one = Path("/sys/fs/cgroup/cgroup.controllers").exists()
    mounted = Path("/sys/fs/cgroup" if one else "/sys/fs/cgroup/memory")
    group = mounted / f"samestep-test-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made: {error}")
    try:
        (group / ("memory.max" if one else "memory.limit_in_bytes")).write_text("200000000")
    except OSError as error:
        group.rmdir()
        pytest.skip(f"its memory cannot be limited: {error}")
    yield group
    group.rmdir()


def test_a_rank_that_the_kernel_kills_for_memory_is_said_so(little_memory, start, tmp_path):
    (tmp_path / "group").write_text(str(little_memory))
    ranks = start(2, out_of_memory)
    assert ranks.codes() == [0, -signal.SIGKILL]
    assert "rank 1 is gone" in ranks.said(0)
    assert "out of memory (cgroup oom_kill 1)" in ranks.said(0)


def dawdles(runtime: Runtime, watch: Watchdog, folder: Path) -> None:
    def compute() -> None:
        end = time.thread_time() + (0.05 if runtime.rank == 2 else 0.005)
        while time.thread_time() < end:
            pass

    started = time.monotonic()
    while True:
        steps(runtime, watch, 1, compute)
        named = int("is slow" in (folder / "stderr0").read_text())
        late = time.monotonic() - started > 120
        if all_reduce_max(runtime, [int(named or late)])[0]:
            break
    steps(runtime, watch, 40, compute)  # it is named once


def test_a_slow_rank_is_named_once_and_the_run_goes_on(start):
    ranks = start(3, dawdles)
    assert ranks.codes() == [0, 0, 0]
    text = ranks.said(0)
    assert text.count("is slow") == 1, text
    assert "rank 2 is slow: a step takes it" in text
    assert ranks.said(1) == ranks.said(2) == ""


def hears(runtime: Runtime, watch: Watchdog, folder: Path) -> None:
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)  # the echo of a terminal's Ctrl-C
    while not watch.stop_requested():
        time.sleep(0.1)
    time.sleep(1.5)
    (folder / "lived").touch()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(600)


def test_a_second_signal_leaves_at_once_and_an_echo_does_not(start, tmp_path):
    ranks = start(1, hears)
    assert ranks.codes() == [128 + signal.SIGTERM]
    assert (tmp_path / "lived").exists()
    assert "SIGINT: the run saves and ends within three steps" in ranks.said(0)
    assert "a second signal (SIGTERM): left at once" in ranks.said(0)


def fails(runtime: Runtime, watch: Watchdog, folder: Path) -> None:
    if runtime.rank == 1:
        watch.announce_failure()
        return
    time.sleep(600)


def test_others_leave_quietly_when_a_rank_has_failed(start):
    ranks = start(2, fails)
    assert ranks.codes() == [1, 0]
    assert ranks.said(0) == ""
