"""The history of a run, read from its folder for a report: curves, events and status.

Free of torch. Missing or damaged files become notes, since a report is most wanted after a failure;
only a folder without a run is refused.
"""

import json
from base64 import b64encode
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from parallel.errors import UserError
from trainer.checkpoint.folder import list_checkpoints
from trainer.checkpoint.manifest import CorruptCheckpointError, check_folder
from trainer.metrics.goodput import TimeLedger
from trainer.metrics.goodput import read_ledger as read_goodput
from trainer.metrics.jsonl import NAME, SAMPLE, is_number, read_lines
from trainer.run.run_dir import SAMPLES, saved_values
from trainer.run.status import Status, read_status

LINES_NAMED = 5  # maximum number of unreadable lines to list
MOST_SAMPLES, LARGEST_SAMPLE = 12, 2_000_000  # pictures of a run, bytes of one
PNG = b"\x89PNG\r\n"
HIDDEN = ("event", "step")  # keys of an unknown event that are not shown

Line = dict[str, Any]


@dataclass(frozen=True)
class Event:
    """An event at a step."""

    step: int
    kind: str  # start | restart | save | evaluation | bad step | rollback, or the line's `event`
    text: str


@dataclass
class History:
    """The contents of a run's folder."""

    run_dir: Path
    values: dict[str, Any] = field(default_factory=dict)  # of config.yaml, by dotted key
    training: list[Line] = field(default_factory=list)
    evaluations: list[Line] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)  # by step
    status: Status | None = None
    goodput: TimeLedger = field(default_factory=TimeLedger)
    notes: list[str] = field(default_factory=list)  # problems of reading
    unit: str = "tok"  # of throughput, as the run's task calls it: tok, img or char
    sample: str = ""  # of the trained model's output

    def metric_curve(self, key: str, split: str = "") -> list[tuple[int, float]]:
        """Return the finite values of a key by step, of training or of a split's evaluations."""
        lines = [line for line in self.evaluations if line["split"] == split]
        return [
            (line["step"], float(line[key]))
            for line in (lines if split else self.training)
            if is_number(line.get(key))
        ]


def runs_in(folder: Path) -> list[Path]:
    """Return the folders of runs in a folder: itself, or the points of a sweep; empty = none."""
    if (folder / "config.yaml").is_file():
        return [folder]
    return sorted(path.parent for path in folder.glob("*/config.yaml"))


@dataclass(frozen=True)
class SamplePicture:
    """A picture of the trained model's output."""

    name: str
    content: str  # PNG, in base64


def read_pictures(run_dir: Path) -> list[SamplePicture]:
    """Return the sample pictures in a run's folder; those that cannot be read are left out."""
    found = []
    for path in sorted((run_dir / SAMPLES).glob("*.png"))[:MOST_SAMPLES]:
        with suppress(OSError):
            content = path.read_bytes()
            if content.startswith(PNG) and len(content) <= LARGEST_SAMPLE:
                found.append(SamplePicture(path.stem, b64encode(content).decode()))
    return found


def read_history(run_dir: Path) -> History:
    """Read a run's folder; raises ConfigError, with the nearest run, if it holds none."""
    history = History(run_dir, status=read_status(run_dir), goodput=read_goodput(run_dir))
    try:
        history.values = saved_values(run_dir)
    except UserError as error:
        if not (run_dir / "config.yaml").is_file():
            raise
        history.notes += error.problems
    for line in _read_metric_lines(history):
        if "event" in line:
            history.unit = str(line.get("unit", history.unit))
            history.events += _parse_event(line)
        elif "split" in line:
            history.evaluations.append(line | {"split": str(line["split"])})
            history.events.append(_evaluation_event(line))
        else:
            history.training.append(line)
    _read_checkpoints(history)
    _read_rollbacks(history)
    _read_sample(history)
    history.events.sort(key=lambda event: event.step)
    return history


def _read_metric_lines(history: History) -> list[Line]:
    path = history.run_dir / NAME
    try:
        lines, damaged = read_lines(path) if path.exists() else ([], [])
    except OSError as error:
        history.notes.append(f"{NAME} cannot be read: {error.strerror}")
        return []
    if damaged:
        named = ", ".join(map(str, damaged[:LINES_NAMED]))
        more = f" and {len(damaged) - LINES_NAMED} more" if len(damaged) > LINES_NAMED else ""
        history.notes.append(f"{NAME}: damaged and passed over: line {named}{more}")
    if not any("loss" in line for line in lines):
        history.notes.append(f"no metrics yet: {NAME} holds no step")
    return lines


def _parse_event(line: Line) -> list[Event]:
    """Return the event of a line; none if it is reported elsewhere."""
    step, kind = line["step"], str(line["event"])
    if kind == "goodput":
        return []
    if kind == "start":
        ranks = f"{line.get('ranks')} rank{'s' * (line.get('ranks') != 1)}"
        when = f", {format_time(line['time'])}" if is_number(line.get("time")) else ""
        again = line.get("start") != 1
        text = f"start {line.get('start')}, from step {step} on {ranks}{when}"
        return [Event(step, "restart" if again else "start", text)]
    if kind == "save":
        return [Event(step, "save", f"checkpoint saved, {line.get('seconds')} s")]
    if kind == "bad_step":
        where = "" if line.get("rank") is None else f" on rank {line['rank']}"
        text = f"the {line.get('kind')} is bad{where}; what was done: {line.get('action')}"
        return [Event(step, "bad step", text)]
    told = ", ".join(f"{key} {value}" for key, value in line.items() if key not in HIDDEN)
    return [Event(step, kind.replace("_", " "), told)]


def _evaluation_event(line: Line) -> Event:
    values = {key: value for key, value in line.items() if is_number(value) and key != "step"}
    text = "  ".join(f"{key.removeprefix('eval_')} {value:.4g}" for key, value in values.items())
    return Event(line["step"], "evaluation", f"{line['split']}: {text}")


def _read_checkpoints(history: History) -> None:
    """Damaged ones are noted; a save that a kill kept from metrics.jsonl is told by its folder."""
    told = {event.step for event in history.events if event.kind == "save"}
    for step, path in list_checkpoints(history.run_dir):
        try:
            check_folder(path, hashed=())
        except CorruptCheckpointError as error:
            history.notes.append(f"{path.name} is damaged: {error}")
        else:
            if step not in told:
                history.events.append(Event(step, "save", "checkpoint, there now"))


def _read_rollbacks(history: History) -> None:
    path = history.run_dir / "rollbacks.json"
    if not path.exists():
        return
    try:
        for rollback in json.loads(path.read_text(encoding="utf-8")):
            if "samples" in rollback:
                left = [f"{begin:,} to {end - 1:,}" for begin, end in rollback["samples"]]
                what = f"{', '.join(left) or 'none'} of the order of samples"
            else:  # of an older version
                what = f"steps {', '.join(map(str, rollback['data_steps']))} of data"
            text = f"back to step {rollback['step']}; left out from then on: {what}"
            history.events.append(Event(int(rollback["step"]), "rollback", text))
    except (OSError, ValueError, TypeError, KeyError):
        history.notes.append(f"{path.name} is damaged")


def _read_sample(history: History) -> None:
    path = history.run_dir / SAMPLE
    if not path.exists():
        return
    try:
        history.sample = path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError as error:
        history.notes.append(f"{path.name} cannot be read: {error.strerror}")


def format_time(seconds: float) -> str:
    """Format seconds since 1970 as local time, such as 2026-11-23 06:04."""
    try:
        return datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M")
    except (OverflowError, OSError, ValueError):
        return "at no time"
