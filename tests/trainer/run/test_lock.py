"""One run at a time in a folder, and status.json beside it."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from launched import until

from parallel.errors import UserError
from trainer.config.train import TrainConfig
from trainer.run import lock
from trainer.run.lock import hold_lock, share_lock
from trainer.run.run_dir import open_run_dir
from trainer.run.status import StatusFile, read_status

ROOT = Path(__file__).parents[3]


def other(function: str, folder: Path) -> subprocess.Popen:
    """Another process that holds or shares the folder until it is killed."""
    code = (
        f"import time; from trainer.run.lock import {function}\n"
        f"with {function}({str(folder)!r}): print(flush=True); time.sleep(600)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": ROOT}
    )
    process.stdout.readline()
    return process


def test_a_second_run_is_refused_before_anything_is_touched(tmp_path):
    open_run_dir(TrainConfig(run_dir=str(tmp_path)))
    first = other("hold_lock", tmp_path)
    before = (tmp_path / "config.yaml").read_bytes()
    with ExitStack() as held, pytest.raises(UserError) as refused:
        open_run_dir(TrainConfig(run_dir=str(tmp_path), steps=7), held)
    (message,) = refused.value.problems
    assert f"is in use by another run (pid {first.pid} on {os.uname().nodename}, since" in message
    assert (tmp_path / "config.yaml").read_bytes() == before
    first.kill()
    first.wait()
    with ExitStack() as held:  # what is left of a dead one does not lock anyone out
        open_run_dir(TrainConfig(run_dir=str(tmp_path), steps=7), held)
    assert (tmp_path / ".lock").read_text() == ""


def test_a_folder_is_free_again_after_a_run(tmp_path):
    for _ in range(2):
        with hold_lock(tmp_path), pytest.raises(UserError, match="in use"), hold_lock(tmp_path):
            pass


def test_ranks_of_a_dead_run_are_waited_for(tmp_path, monkeypatch):
    rank = other("share_lock", tmp_path)
    monkeypatch.setattr(lock, "ORPHAN_SECONDS", 0.3)
    with (
        pytest.raises(UserError, match="ranks of an earlier run still work there"),
        hold_lock(tmp_path),
    ):
        pass
    monkeypatch.setattr(lock, "ORPHAN_SECONDS", 240.0)
    os.kill(rank.pid, 9)
    with hold_lock(tmp_path), share_lock(tmp_path), share_lock(tmp_path):
        assert rank.wait() == -9


def test_another_host_is_believed_as_long_as_its_heart_beats(tmp_path):
    path = tmp_path / ".lock"
    path.write_text(json.dumps({"host": "elsewhere", "pid": 1, "started": 0.0}))
    refused = pytest.raises(UserError, match="pid 1 on elsewhere")
    with beating(path), refused, hold_lock(tmp_path, stale_seconds=240.0):
        pass
    # its clock is of no importance, only that it stands
    with hold_lock(tmp_path, stale_seconds=0.5):
        assert json.loads(path.read_text())["pid"] == os.getpid()


@contextmanager
def beating(path: Path) -> Iterator[None]:
    code = f"import os, time\nwhile True: os.utime({str(path)!r}); time.sleep(0.05)"
    process = subprocess.Popen([sys.executable, "-c", code])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def test_a_run_whose_lock_was_taken_over_ends(tmp_path):
    process = other("hold_lock", tmp_path)
    (tmp_path / ".lock").write_text(json.dumps({"host": "elsewhere", "pid": 1, "started": 0.0}))
    until(lambda: process.poll() is not None)
    assert process.returncode == 1


def test_the_status_is_whole_and_says_what_it_must(tmp_path):
    status = StatusFile(tmp_path, steps=100)
    assert read_status(tmp_path) is None
    assert status.begin_run(30, restarted=False, first=True) is None
    status.write("running", 40, checkpoint=30)
    found = read_status(tmp_path)
    assert (found.state, found.step, found.steps, found.checkpoint) == ("running", 40, 100, 30)
    assert (found.pid, found.host) == (os.getpid(), os.uname().nodename)
    assert found.started <= found.updated <= time.time()
    (tmp_path / "status.json").write_text("{")
    assert read_status(tmp_path) is None


def test_the_first_failure_stands(tmp_path):
    first, second = StatusFile(tmp_path, 100), StatusFile(tmp_path, 100)
    first.begin_run(0, restarted=False, first=True)
    second.begin_run(0, restarted=False, first=False)
    second.write("failed", 3, reason="a bug", rank=1, code=1)
    first.write("running", 4)
    first.write("failed", 4, reason="connection closed by peer", rank=0, code=1)
    found = read_status(tmp_path)
    assert (found.reason, found.rank, found.state) == ("a bug", 1, "failed")
    assert found.attempts == 1  # which only the first rank knows of
    again = StatusFile(tmp_path, 100)
    assert again.begin_run(0, restarted=True, first=True).reason == "a bug"
    assert (read_status(tmp_path).state, read_status(tmp_path).attempts) == ("running", 2)
    again.begin_run(5, restarted=True, first=True)
    assert read_status(tmp_path).attempts == 1


def test_a_status_that_cannot_be_written_is_a_warning(tmp_path, caplog):
    status = StatusFile(tmp_path / "file" / "run", 100)
    (tmp_path / "file").touch()
    for step in (1, 2):
        status.write("running", step)
    assert len(caplog.messages) == 1
