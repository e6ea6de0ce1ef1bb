"""Process diagnostics: main thread, collectives, parent process, out-of-memory kills."""

import json
import os
import sys
import threading
import traceback
from pathlib import Path
from types import FrameType

from torch._C import _distributed_c10d

ROOT = Path(__file__).parents[2]
OURS = tuple(f"{ROOT / package}{os.sep}" for package in ("parallel", "trainer", "launch"))
WAITS = f"{os.sep}torch{os.sep}distributed{os.sep}"  # path of the code that calls collectives
STACK_LINES = 12


def main_frame() -> FrameType | None:
    """Return the innermost Python frame of the main thread."""
    return sys._current_frames().get(threading.main_thread().ident or 0)


def source_line(frame: FrameType | None) -> str:
    """Return a thread's innermost line in this project, as "trainer/loop.py:97 (take_step)"."""
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(OURS):
            short = Path(file).relative_to(ROOT)
            return f"{short}:{frame.f_lineno} ({frame.f_code.co_name})"
        frame = frame.f_back
    return "outside of this project"


def format_stack(frame: FrameType | None) -> str:
    """Format the innermost lines of a thread's stack as in a traceback."""
    return "".join(traceback.format_stack(frame)[-STACK_LINES:]).rstrip() if frame else ""


def last_collective(cuda: bool, stands: bool) -> tuple[str, bool]:
    """Return the pending or last collective (name, number, group, sizes), and if it is pending.

    On CUDA thousands are kept, which are read only where the main thread `stands`.
    """
    if cuda and not stands:
        return "not looked at: it went on", False
    name = "_dump_nccl_trace_json" if cuda else "_dump_fr_trace_json"
    dump = getattr(_distributed_c10d, name, None)
    entries = json.loads(dump(True, False)).get("entries", []) if dump else []
    if not entries:
        return "none yet", False
    open_ones = [entry for entry in entries if not entry["retired"]]
    entry = open_ones[0] if open_ones else entries[-1]
    number = entry["p2p_seq_id" if entry["is_p2p"] else "collective_seq_id"]
    sizes = ", ".join(map(str, entry["input_sizes"][:2]))
    group = " ".join(entry["process_group"])
    text = f"{entry['profiling_name']} #{number} of group {group}, {sizes or 'no tensors'}"
    return text, bool(open_ones)


def is_in_collective(frame: FrameType | None) -> bool:
    """Return whether a thread is inside torch.distributed."""
    return frame is not None and WAITS in frame.f_code.co_filename


def is_alive(pid: int) -> bool:
    """Return whether a process of this host is running; a zombie is not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def parent_pid(pid: int) -> int:
    """Return the parent pid of a process of this host; 0 if there is no such process."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError):
        return 0


def count_oom_kills() -> int:
    """Return the number of out-of-memory kills in this process's control group; 0 if unknown."""
    try:
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "":
                file = Path(f"/sys/fs/cgroup{path}/memory.events")
            elif "memory" in controllers.split(","):
                file = Path(f"/sys/fs/cgroup/memory{path}/memory.oom_control")
            else:
                continue
            counts = dict(entry.split()[:2] for entry in file.read_text().splitlines())
            return int(counts.get("oom_kill", 0))
    except (OSError, ValueError):
        pass
    return 0


class BusyTime:
    """A clock of a thread's time on a core or in the run queue.

    Time asleep in a collective does not count: a slow rank is the one that does not sleep.
    """

    def __init__(self) -> None:
        """Measure the calling thread."""
        path = f"/proc/self/task/{threading.get_native_id()}/schedstat"
        self._file = os.open(path, os.O_RDONLY) if Path(path).exists() else -1

    def busy_seconds(self) -> float:
        """Return the seconds so far; 0.0 if the system does not report them."""
        if self._file < 0:
            return 0.0
        ran, queued = os.pread(self._file, 64, 0).split()[:2]
        return (int(ran) + int(queued)) / 1e9

    def close(self) -> None:
        """Close the file; `busy_seconds` returns 0.0 from now on."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
