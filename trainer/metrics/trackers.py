"""Mirrors of metrics.jsonl, each in a process of its own, so that none can delay a run.

wandb may prompt, wait for a network for minutes, raise, or wait again at interpreter exit;
TensorBoard's files may meet a full disk. None of that reaches the trainer, which starts `python -m
trainer.metrics.trackers` to follow the file.
"""

import json
import os
import re
import secrets
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trainer.config.train import MetricsConfig
from trainer.metrics.jsonl import NAME, kind_of

POLL_SECONDS = 1.0  # between looks at the file
# Each tool, and how to install it.
TOOLS = {"wandb": "wandb", "tensorboard": "samestep[tensorboard]"}
KEPT = "metrics.jsonl has everything"


@dataclass(frozen=True)
class Mirror:
    """The arguments of a tracker's process."""

    tool: str
    mode: str  # of wandb: offline | online
    project: str
    group: str
    tags: list[str]
    run_dir: str
    start_step: int
    offset: int  # bytes of metrics.jsonl that an earlier start of this run has mirrored
    mirrored: list[list[Any]]  # (step, kind) of lines that an earlier start has mirrored beyond it
    resolved: dict[str, Any]
    grace_seconds: float  # the process ends itself this long after the run


class Tracker:
    """The trainer's side of a mirror: starts the process and relays its messages, never waiting."""

    def __init__(
        self,
        config: MetricsConfig,
        run_dir: Path,
        resolved: dict[str, Any],
        say: Callable[[str], None],
        patience_seconds: float = 5.0,
        grace_seconds: float = 120.0,
        dropped: Sequence[str] = (),
        tool: str = "wandb",
        start_step: int = 0,
    ):
        """Follow run_dir/metrics.jsonl, which exists, from its end; do nothing if the tool is off.

        `dropped` are records of an earlier start that are written again: wandb has them already.
        """
        self._say, self._tool = say, tool
        self._patience_seconds = patience_seconds
        self._heard = b""
        self._process: subprocess.Popen | None = None
        if not (config.tensorboard if tool == "tensorboard" else config.wandb != "off"):
            return
        offset = (run_dir / NAME).stat().st_size
        if tool == "tensorboard" and not tensorboard_dir(run_dir).exists():
            offset = 0  # what was written before it was asked for belongs to the curves
        sent = latest_lines(dropped) if run_id_path(run_dir).exists() else []
        names = (config.wandb, config.wandb_project, config.wandb_group, config.wandb_tags)
        place = (str(run_dir), start_step, offset)
        mirror = Mirror(tool, *names, *place, sent, resolved, grace_seconds)
        try:
            self._process = _start_process(mirror)
        except (OSError, TypeError) as error:  # no process to be had; config that is not JSON
            say(f"{tool} cannot be started ({error}); {KEPT}")

    def poll_messages(self) -> None:
        """Log the messages of the process; never waits."""
        process = self._process
        if process is None or process.stdout is None:
            return
        status = process.poll()
        *lines, self._heard = (self._heard + (process.stdout.read() or b"")).split(b"\n")
        for line in lines:
            self._say(line.decode(errors="replace"))
        if status is not None:
            process.stdout.close()
            self._process = None
            if status != 0 and not lines:
                self._say(f"{self._tool} ended with status {status}; {KEPT}")

    def close_tool(self) -> None:
        """Let the tool finish for a few seconds, then leave it running."""
        process = self._process
        if process is None or process.stdin is None:
            return
        try:
            # A line, not just a closed pipe: forked data workers may hold its other copies open.
            process.stdin.write(b"end\n")
            process.stdin.close()
            process.wait(self._patience_seconds)
        except subprocess.TimeoutExpired:
            waited = f"{self._patience_seconds:g} s"
            self._say(f"{self._tool} is not done after {waited}: left to itself")
        except OSError:
            pass  # it has ended already; poll says so
        self.poll_messages()


def _start_process(mirror: Mirror) -> subprocess.Popen:
    root = str(Path(__file__).resolve().parents[2])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "trainer.metrics.trackers", json.dumps(asdict(mirror))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        bufsize=0,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        start_new_session=True,  # Ctrl-C is the trainer's: this one finishes after it
    )
    assert process.stdout is not None
    os.set_blocking(process.stdout.fileno(), False)
    return process


def follow_records(path: Path, offset: int, ended: threading.Event) -> Iterator[dict[str, Any]]:
    """Yield the records of a growing metrics.jsonl from byte `offset` on, until `ended` is set."""
    with path.open("rb") as file:
        file.seek(offset)
        while True:
            last = ended.is_set()  # asked before reading, so that nothing written before is missed
            while line := file.readline():
                if not line.endswith(b"\n"):
                    file.seek(-len(line), os.SEEK_CUR)  # half a line: again when it is whole
                    break
                yield json.loads(line)
            if last:
                return
            ended.wait(POLL_SECONDS)


def latest_lines(lines: Sequence[str]) -> list[list[Any]]:
    """Return the (step, kind) of the records at the furthest step of metrics.jsonl."""
    found: list[list[Any]] = []
    for line in lines:
        with suppress(ValueError, TypeError, KeyError, AttributeError):
            record = json.loads(line)
            found.append([int(record["step"]), kind_of(record)])
    last = max((step for step, _ in found), default=0)
    return [entry for entry in found if entry[0] == last]


def is_mirrored(record: dict[str, Any], mirrored: list[list[Any]]) -> bool:
    """Return whether an earlier start has mirrored this record, by the furthest ones it has."""
    step = record["step"]
    return bool(mirrored) and (step < mirrored[0][0] or [step, kind_of(record)] in mirrored)


def to_wandb(record: dict[str, Any]) -> dict[str, Any]:
    """Return a record's numbers by wandb name, prefixed with the split or event.

    An event may have no number but its step.
    """
    kind = kind_of(record)
    prefix = f"{kind}/" if kind else ""
    hidden = () if "event" in record else ("step",)
    numbers = {k: v for k, v in record.items() if isinstance(v, int | float)}
    return {prefix + k: v for k, v in numbers.items() if k not in hidden}


def tensorboard_dir(run_dir: Path) -> Path:
    """Return the folder of TensorBoard's event files."""
    return run_dir / "tensorboard"


def run_id_path(run_dir: Path) -> Path:
    """Return the file with the run's id on wandb, which every start reuses."""
    return run_dir / "wandb" / "run-id"


def _run_id(run_dir: Path) -> str:
    """Return the run's id: its folder's name, and a suffix for runs of the same name elsewhere."""
    path = run_id_path(run_dir)
    known = path.read_text(encoding="utf-8") if path.exists() else ""
    if known:  # empty: there was no room for it
        return known
    name = re.sub(r"[/\\#?%:]", "-", run_dir.resolve().name)
    made = f"{name[:100]}-{secrets.token_hex(3)}"
    path.parent.mkdir(exist_ok=True)
    path.write_text(made, encoding="utf-8")
    return made


def _open_run(mirror: Mirror, say: Callable[[str], None]) -> Any:
    import wandb  # noqa: PLC0415 (seconds, and optional)

    options: dict[str, Any] = {
        "mode": mirror.mode,
        "project": mirror.project,
        "dir": mirror.run_dir,
        "config": mirror.resolved,
        "id": _run_id(Path(mirror.run_dir)),
        "name": Path(mirror.run_dir).resolve().name,
        "resume": "allow",
        "group": mirror.group or None,
        "tags": mirror.tags or None,
        "settings": wandb.Settings(silent=True, console="off", init_timeout=10),
    }
    if mirror.mode == "online" and not wandb.login(prompt=False, verify=False):
        options["mode"] = "offline"
        say("wandb: nobody is logged in here (wandb login), so the run is tracked offline")
    try:
        return wandb.init(**options)
    except Exception as error:
        if options["mode"] == "offline":
            raise
        say(f"wandb is out of reach ({_brief_error(error)}), so the run is tracked offline")
        wandb.teardown()  # else its own half-made run is in the way
        return wandb.init(**{**options, "mode": "offline"})


class Wandb:
    """A run on wandb, which accepts steps in ascending order only."""

    def __init__(self, mirror: Mirror, say: Callable[[str], None]):
        self._run, self._mirrored, self._step = _open_run(mirror, say), mirror.mirrored, 0
        self.finish = self._run.finish

    def log_record(self, record: dict[str, Any]) -> None:
        """Log a record, unless an earlier start has; a save's record comes when it has finished."""
        if not is_mirrored(record, self._mirrored):
            self._step = max(self._step, record["step"])
            self._run.log(to_wandb(record), step=self._step)


def _open_tensorboard(mirror: Mirror) -> Any:
    from trainer.metrics.tensorboard_mirror import TensorBoard  # noqa: PLC0415 (loads torch)

    return TensorBoard(tensorboard_dir(Path(mirror.run_dir)), mirror.start_step, mirror.resolved)


def _mirror_records(mirror: Mirror, ended: threading.Event, say: Callable[[str], None]) -> None:
    run = _open_tensorboard(mirror) if mirror.tool == "tensorboard" else Wandb(mirror, say)
    failed = False
    for record in follow_records(Path(mirror.run_dir) / NAME, mirror.offset, ended):
        try:
            run.log_record(record)
        except Exception as error:
            if not failed:
                say(f"{mirror.tool} does not take all records ({_brief_error(error)}); {KEPT}")
            failed = True
    try:
        run.finish()
    except Exception:
        if not failed:  # else it is said already
            raise


def _brief_error(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0] or type(error).__name__


def _run_process(text: str) -> None:
    mirror = Mirror(**json.loads(text))
    told = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what wandb writes is not for the run's console
    ended = threading.Event()

    def send_line(line: str) -> None:
        told.write(line + "\n")
        told.flush()

    def listen_for_end() -> None:
        sys.stdin.readline()  # a line, or nothing when the trainer is gone
        ended.set()
        threading.Event().wait(mirror.grace_seconds)
        os._exit(1)

    threading.Thread(target=listen_for_end, daemon=True).start()
    try:
        _mirror_records(mirror, ended, send_line)
    except ImportError as error:
        install = f'pip install "{TOOLS[mirror.tool]}"'
        send_line(f"{mirror.tool} cannot be imported ({_brief_error(error)}): {install}; {KEPT}")
    except Exception as error:
        send_line(f"{mirror.tool} gave up ({_brief_error(error)}); {KEPT}")


if __name__ == "__main__":
    _run_process(sys.argv[1])
