"""Exclusive lock on a run directory, on one host (flock) and across hosts (heartbeat).

flock ends with its process. Between hosts whose file system does not support it, a heartbeat
decides: only whether the file's modification time changes is read, so no clocks are compared.
"""

import fcntl
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from parallel.errors import ConfigError

BEAT_SECONDS = 2.0
STALE_SECONDS = 15.0  # without a heartbeat, after which the lock holder is presumed dead
ORPHAN_SECONDS = 8.0  # upper bound on how long the ranks of a dead launcher take to exit

log = logging.getLogger(__name__)


@contextmanager
def hold_lock(run_dir: str | Path, stale_seconds: float = STALE_SECONDS) -> Iterator[None]:
    """Hold the exclusive lock on the folder; ConfigError names the process that has it."""
    path = Path(run_dir) / ".lock"
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if not _try_lock(file, fcntl.LOCK_EX):
            raise ConfigError(_in_use(run_dir, _read_holder(path)))
        holder = _read_holder(path)
        if holder:  # the holder has not released the lock
            _wait_for(path, holder, run_dir, stale_seconds)
            log.info("the lock of a run that has died is taken over (%s)", _describe_holder(holder))
        _wait_for_orphans(run_dir)
        me = {"host": socket.gethostname(), "pid": os.getpid(), "started": time.time()}
        os.ftruncate(file, 0)
        os.pwrite(file, json.dumps(me).encode(), 0)
        try:
            with _touch_regularly(file, path, me):
                yield
        finally:
            os.ftruncate(file, 0)  # a released lock needs no waiting
    finally:
        os.close(file)


@contextmanager
def share_lock(run_dir: str | Path) -> Iterator[None]:
    """Hold the ranks' shared lock on the folder; no other run starts before all release it."""
    try:
        file = os.open(Path(run_dir) / ".ranks", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError:  # an unwritable folder is reported elsewhere
        yield
        return
    try:
        _try_lock(file, fcntl.LOCK_SH)
        yield
    finally:
        os.close(file)


def _wait_for_orphans(run_dir: str | Path) -> None:
    path = Path(run_dir) / ".ranks"
    if not path.exists():
        return
    file = os.open(path, os.O_RDWR)
    try:
        deadline = time.monotonic() + ORPHAN_SECONDS
        while not _try_lock(file, fcntl.LOCK_EX):
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"run_dir={run_dir} is in use: ranks of an earlier run still work there; end "
                    "them, or choose another run_dir"
                )
            time.sleep(0.1)
    finally:
        os.close(file)


def _wait_for(path: Path, holder: dict, run_dir: str | Path, stale_seconds: float) -> None:
    """Wait until the other host's heartbeat has stopped; ConfigError if it continues."""
    if holder["host"] == socket.gethostname():
        return  # the lock ended with its process
    before = path.stat().st_mtime_ns
    deadline = time.monotonic() + stale_seconds
    while time.monotonic() < deadline:
        time.sleep(min(0.2, stale_seconds / 10))
        if path.stat().st_mtime_ns != before or _read_holder(path) != holder:
            raise ConfigError(_in_use(run_dir, _read_holder(path) or holder))


@contextmanager
def _touch_regularly(file: int, path: Path, me: dict) -> Iterator[None]:
    """Touch the file every few seconds; exit at once if another process took the lock over."""
    ended = threading.Event()

    def touch_file() -> None:
        while not ended.wait(BEAT_SECONDS):
            with suppress(OSError):
                os.utime(file)
                now = _read_holder(path)
                if now and now != me:
                    log.error(
                        "this run was silent for so long that %s took over", _describe_holder(now)
                    )
                    os._exit(1)

    thread = threading.Thread(target=touch_file, name="lock", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _try_lock(file: int, how: int) -> bool:
    """Return whether the lock was acquired; without flock the heartbeat decides."""
    try:
        fcntl.flock(file, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _read_holder(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8") or "{}")
    except (OSError, ValueError):
        return {}


def _describe_holder(holder: dict) -> str:
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(holder["started"]))
    return f"pid {holder['pid']} on {holder['host']}, since {since}"


def _in_use(run_dir: str | Path, holder: dict) -> str:
    who = f" by another run ({_describe_holder(holder)})" if holder else ""
    return f"run_dir={run_dir} is in use{who}; wait for its end, or choose another run_dir"
