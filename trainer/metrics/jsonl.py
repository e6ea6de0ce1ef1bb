"""metrics.jsonl: one JSON object per line, written by the run and read by observers.

Training records have `loss`, evaluation records `split`, all others `event`. All have `step`.
"""

import json
import math
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from parallel.errors import StorageError
from trainer.atomic_files import write_atomically

NAME = "metrics.jsonl"
SAMPLE = "sample.txt"  # of the output at the end of a run


class MetricsFile:
    """Writer of metrics.jsonl, which holds only complete lines at any time."""

    def __init__(self, path: Path, start_step: int, say: Callable[[str], None]):
        """Open the file for appending, dropping records that a resumed run writes again.

        Raises StorageError if the file cannot be written.
        """
        self._path, self._say = path, say
        self._waiting = b""  # records buffered while the disk is full
        self._full = False
        try:
            kept, self.dropped = _split_lines(path, start_step) if path.exists() else ([], [])
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise StorageError(
                f"{path} cannot be written ({error.strerror}); make room, or choose another run_dir"
            ) from error
        lines = map(json.loads, kept)
        # Splits that were evaluated before this resume.
        self.evaluated = {line.get("split", "") for line in lines if line["step"] == start_step}

    def append(self, record: dict[str, Any]) -> None:
        """Write one record immediately; numbers that are not finite become null.

        On a full disk, records are buffered in memory until there is space.
        """
        finite = {k: None if _is_bad(value) else value for k, value in record.items()}
        self._waiting += json.dumps(finite, allow_nan=False).encode() + b"\n"
        try:
            self._write_pending()
        except OSError as error:
            if not self._full:
                self._say(
                    f"{self._path} cannot be written ({error.strerror}); training goes on, and "
                    "its lines are kept until they can"
                )
            self._full = True
        else:
            self._full = False

    def close(self) -> None:
        """Close the file, after a last attempt to write buffered records."""
        with suppress(OSError):
            self._write_pending()
        if self._waiting:
            count = self._waiting.count(b"\n")
            self._say(f"{self._path}: there was no room for the last {count} lines")
        self._file.close()

    def _write_pending(self) -> None:
        whole = os.fstat(self._file.fileno()).st_size
        left = memoryview(self._waiting)
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError:
            os.ftruncate(self._file.fileno(), whole)  # never leave a partial line
            raise
        self._waiting = b""


def _split_lines(path: Path, start_step: int) -> tuple[list[str], list[str]]:
    """Return the lines to keep and to drop: those after the resumed checkpoint, and a cut one."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    kept: list[str] = []
    dropped: list[str] = []
    for line in lines:
        (kept if _is_kept(line, start_step) else dropped).append(line)
    if dropped:
        write_atomically(path, "".join(kept))
    return kept, dropped


def _is_kept(line: str, start_step: int) -> bool:
    if not line.endswith("\n"):
        return False
    try:
        record = json.loads(line)
        if record.get("action") == "rollback" or record.get("event") == "start":
            return True  # what was left out of the data, or when a start was, does not come again
        # A run that starts over keeps nothing else: its evaluation at step 0 comes again too.
        return 0 < start_step >= record["step"]
    except (ValueError, TypeError, KeyError, AttributeError):
        return False


def is_number(value: object) -> bool:
    """Return whether a value of a record can be plotted."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_bad(value: object) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def read_lines(path: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """Return the records of a file that may be growing, and the numbers of unreadable lines.

    Line numbers begin with 1. An unterminated last line is still being written. Raises OSError.
    """
    *lines, _ = path.read_text(encoding="utf-8", errors="replace").split("\n")
    found: list[dict[str, Any]] = []
    damaged: list[int] = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            record["step"] = int(record["step"])
            found.append(record)
        except (ValueError, TypeError, KeyError, OverflowError):
            damaged.append(number)
    return found, damaged


def last_values(run_dir: Path) -> dict[str, float]:
    """Return the last step, loss and tokens_per_second, and each SPLIT_METRIC of the evaluations.

    A value that was not finite the last time is left out.
    """
    found: dict[str, Any] = {}
    with suppress(OSError):
        for line in read_lines(run_dir / NAME)[0]:
            if "split" in line:
                plain = {key.removeprefix("eval_"): value for key, value in line.items()}
                found |= {f"{line['split']}_{k}": v for k, v in plain.items() if k != "step"}
            elif "loss" in line:
                found |= {key: line.get(key) for key in ("step", "loss", "tokens_per_second")}
    return {key: value for key, value in found.items() if is_number(value)}


def kind_of(record: dict[str, Any]) -> str:
    """Return the kind of a record: the evaluated split, the event, or empty for training."""
    return str(record.get("split") or record.get("event") or "")
