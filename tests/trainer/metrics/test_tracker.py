"""The wandb mirror: right records, and whatever wandb does, the run goes on and says so once."""

import io
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import recorders
from rich.console import Console

from trainer.config.train import MetricsConfig
from trainer.metrics.trackers import (
    Tracker,
    follow_records,
    is_mirrored,
    latest_lines,
    to_wandb,
)

# The tracker's process imports this in wandb's place; what it does goes into a file.
FAKE_WANDB = """
import json, os, threading
def note(**what):
    with open(os.environ["FAKE_WANDB_NOTES"], "a") as file:
        file.write(json.dumps(what) + "\\n")
def act(name):
    if os.environ.get("FAKE_WANDB_HANGS") == name:
        note(hangs=name)
        threading.Event().wait()
    if os.environ.get("FAKE_WANDB_RAISES") == name:
        raise RuntimeError(name + " is broken")
class Run:
    def log(self, values, step):
        act("log")
        note(step=step, values=values)
    def finish(self):
        act("finish")
        note(finished=True)
def Settings(**settings): pass
def teardown(): pass
def login(prompt, verify):
    act("login")
    return os.environ.get("FAKE_WANDB_LOGIN") == "yes"
def init(**options):
    options.pop("settings")
    note(init=options)
    act("init" if options["mode"] == "online" else "offline init")
    return Run()
act("import")
if os.environ.get("FAKE_WANDB_RAISES") == "no module":
    raise ImportError("No module named wandb")
print("wandb chatters")
"""


class FakeWandb:
    """What the fake module in the other process is told, and what it noted."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch):
        (folder / "module").mkdir()
        (folder / "module" / "wandb.py").write_text(FAKE_WANDB)
        self._notes = folder / "notes.jsonl"
        self._setenv = monkeypatch.setenv
        self._setenv("PYTHONPATH", str(folder / "module"))
        self._setenv("FAKE_WANDB_NOTES", str(self._notes))

    def set(self, **values: str) -> None:
        for name, value in values.items():
            self._setenv(f"FAKE_WANDB_{name.upper()}", value)

    def notes(self) -> list[dict[str, Any]]:
        text = self._notes.read_text() if self._notes.exists() else ""
        return [json.loads(line) for line in text.splitlines()]

    def steps(self) -> list[int]:
        return [note["step"] for note in self.notes() if "step" in note]


@pytest.fixture
def fake_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    return FakeWandb(tmp_path, monkeypatch)


def wait_until(happened: Callable[[], object]) -> None:
    for _ in range(4800):
        if happened():
            return
        time.sleep(0.05)
    raise AssertionError("it did not happen in 240 s")


def track(
    run_dir: Path,
    mode: str = "offline",
    start_step: int = 0,
    steps: tuple[int, ...] = (1, 2, 3),
    **changes: Any,
) -> list[str]:
    """A short run of a record a step; returns what the console showed of its mirrors."""
    run_dir.mkdir(exist_ok=True, parents=True)
    said = io.StringIO()
    with recorders.make(
        run_dir,
        config=MetricsConfig(wandb=mode, **changes),
        steps=3,
        start_step=start_step,
        clock=time.monotonic,
        console=Console(file=said),
    ) as recorder:
        # These tests may wait long on a busy machine; a run waits for seconds.
        for tracker in recorder._trackers:
            tracker._patience_seconds = 240.0
        for step in steps:
            recorder.log_evaluation(step, "valid", {"eval_loss": 1.0, "accuracy": float("nan")})
    written = (run_dir / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in written] == [*range(1, start_step + 1), *steps]
    return [line for line in said.getvalue().splitlines() if not line.startswith("step ")]


def test_wandb_mirrors_the_records(tmp_path: Path, fake_wandb: FakeWandb) -> None:
    assert track(tmp_path / "a run") == []
    init, *records, end = fake_wandb.notes()
    run_dir = str(tmp_path / "a run")
    assert re.fullmatch("a run-[0-9a-f]{6}", init["init"].pop("id"))
    assert init["init"] == {
        "mode": "offline",
        "project": "samestep",
        "dir": run_dir,
        "config": {"seed": 1},
        "name": "a run",
        "resume": "allow",
        "group": None,
        "tags": None,
    }
    assert records[0] == {"step": 1, "values": {"valid/eval_loss": 1.0}}
    assert fake_wandb.steps() == [1, 2, 3]
    assert end == {"finished": True}


@pytest.mark.parametrize(
    ("fault", "mode", "said", "steps"),
    [
        ("no module", "offline", "cannot be imported (No module named wandb)", []),
        ("import", "offline", "gave up (import is broken)", []),
        ("login", "online", "gave up (login is broken)", []),
        ("offline init", "offline", "gave up (offline init is broken)", []),
        ("log", "offline", "does not take all records (log is broken)", []),
        ("finish", "offline", "gave up (finish is broken)", [1, 2, 3]),
    ],
)
def test_what_wandb_raises_is_said_once(
    tmp_path: Path, fake_wandb: FakeWandb, fault: str, mode: str, said: str, steps: list[int]
) -> None:
    fake_wandb.set(raises=fault)
    (line,) = track(tmp_path / "a run", mode)
    assert said in line
    assert fake_wandb.steps() == steps


def test_wandb_without_login_or_network_goes_offline(tmp_path: Path, fake_wandb: FakeWandb) -> None:
    (line,) = track(tmp_path / "a run", "online")
    assert "nobody is logged in" in line
    fake_wandb.set(login="yes", raises="init")
    (line,) = track(tmp_path / "another", "online")
    assert "out of reach (init is broken)" in line
    modes = [note["init"]["mode"] for note in fake_wandb.notes() if "init" in note]
    assert modes == ["offline", "online", "offline"]
    assert fake_wandb.steps() == [1, 2, 3, 1, 2, 3]


@pytest.mark.parametrize("where", ["import", "offline init", "log", "finish"])
def test_a_wandb_that_hangs_for_ever_holds_nothing_up(
    tmp_path: Path, fake_wandb: FakeWandb, where: str
) -> None:
    fake_wandb.set(hangs=where)
    said: list[str] = []
    (tmp_path / "metrics.jsonl").touch()
    config = MetricsConfig(wandb="offline")
    tracker = Tracker(config, tmp_path, {}, said.append, patience_seconds=0.1, grace_seconds=1.0)
    process = tracker._process
    assert process is not None
    record = {"step": 1, "long": "x" * 1000}
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(200 * (json.dumps(record) + "\n"))  # more than a pipe holds
    hangs = {"hangs": where}
    wait_until(lambda: fake_wandb.steps() if where == "finish" else hangs in fake_wandb.notes())
    tracker.poll_messages()
    tracker.close_tool()
    assert said == ["wandb is not done after 0.1 s: left to itself"]
    wait_until(lambda: process.poll() is not None)  # and it does not stay for ever
    assert hangs in fake_wandb.notes()


@pytest.mark.parametrize("polls", [0, 2])
def test_a_tracker_that_is_killed_is_missed_once(
    tmp_path: Path, fake_wandb: FakeWandb, polls: int
) -> None:
    fake_wandb.set(hangs="offline init")
    said: list[str] = []
    (tmp_path / "metrics.jsonl").touch()
    tracker = Tracker(MetricsConfig(wandb="offline"), tmp_path, {}, said.append)
    process = tracker._process
    assert process is not None
    process.kill()
    process.wait()
    for _ in range(polls):
        tracker.poll_messages()
    tracker.close_tool()
    assert said == ["wandb ended with status -9; metrics.jsonl has everything"]


def test_the_tracker_ends_when_the_trainer_is_killed(tmp_path: Path, fake_wandb: FakeWandb) -> None:
    (tmp_path / "metrics.jsonl").touch()
    code = (
        "import os, signal, sys, pathlib; from trainer.config.train import MetricsConfig;"
        "from trainer.metrics.trackers import Tracker; folder = pathlib.Path(sys.argv[1]);"
        "tracker = Tracker(MetricsConfig(wandb='offline'), folder, {}, lambda text: None);"
        "(folder / 'metrics.jsonl').write_text('{\"step\": 7}\\n');"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    root = str(Path(__file__).resolve().parents[3])
    paths = os.pathsep.join([root, os.environ["PYTHONPATH"]])
    environment = {**os.environ, "PYTHONPATH": paths}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False, env=environment)
    wait_until(lambda: {"finished": True} in fake_wandb.notes())
    assert fake_wandb.steps() == [7]


def test_a_resumed_run_is_mirrored_from_where_it_goes_on(
    tmp_path: Path, fake_wandb: FakeWandb
) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    said: list[str] = []
    config = MetricsConfig(wandb="offline")
    tracker = Tracker(config, tmp_path, {}, said.append, patience_seconds=100.0)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3}\n')
    tracker.close_tool()
    assert fake_wandb.steps() == [3]


def test_every_start_has_the_same_id_and_no_line_comes_twice(
    tmp_path: Path, fake_wandb: FakeWandb
) -> None:
    track(tmp_path / "run")  # to step 3; killed, and resumed from the checkpoint of step 1
    track(tmp_path / "run", start_step=1, steps=(2, 3, 4))
    track(tmp_path / "elsewhere" / "run")
    ids = [note["init"]["id"] for note in fake_wandb.notes() if "init" in note]
    assert ids[0] == ids[1] != ids[2]
    assert fake_wandb.steps() == [1, 2, 3, 4, 1, 2, 3]


def test_what_was_never_mirrored_is_not_left_out(tmp_path: Path, fake_wandb: FakeWandb) -> None:
    track(tmp_path / "run", "off")
    track(tmp_path / "run", start_step=1, steps=(2, 3, 4))
    assert fake_wandb.steps() == [2, 3, 4]


def test_the_furthest_lines_say_what_was_mirrored() -> None:
    lines = ['{"step": 4}', '{"step": 5}', '{"step": 5, "event": "skip"}', "{", "[1]", "{}", "5"]
    assert latest_lines(lines) == [[5, ""], [5, "skip"]]
    assert latest_lines([]) == []
    seen = latest_lines(lines)
    assert is_mirrored({"step": 4, "split": "valid"}, seen)
    assert is_mirrored({"step": 5, "loss": 1.0}, seen)
    assert not is_mirrored({"step": 5, "split": "valid"}, seen)
    assert not is_mirrored({"step": 6}, seen)
    assert not is_mirrored({"step": 1}, [])


def test_half_a_line_is_read_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"st')

    class Ended(threading.Event):
        """The trainer writes on while the tracker waits, and ends."""

        def wait(self, timeout: float | None = None) -> bool:
            with path.open("a") as file:
                file.write('ep": 2}\n')
            self.set()
            return True

    assert list(follow_records(path, 0, Ended())) == [{"step": 1}, {"step": 2}]


def test_wandb_names() -> None:
    assert to_wandb({"step": 1, "loss": 2.0, "grad_norm": None}) == {"loss": 2.0}
    assert to_wandb({"step": 1, "split": "test", "bleu": 3.0}) == {"test/bleu": 3.0}
    event = {"event": "bad_step", "step": 5, "rank": None, "kind": "spike", "samples": [1, 2]}
    assert to_wandb(event) == {"bad_step/step": 5}
    assert to_wandb(event | {"rank": 3}) == {"bad_step/step": 5, "bad_step/rank": 3}


def test_wandb_is_told_of_group_and_tags(tmp_path: Path, fake_wandb: FakeWandb) -> None:
    assert track(tmp_path / "run", wandb_group="a sweep", wandb_tags=["one", "two"]) == []
    init = fake_wandb.notes()[0]["init"]
    assert (init["group"], init["tags"]) == ("a sweep", ["one", "two"])


def test_a_late_line_goes_to_the_newest_step_of_wandb(
    tmp_path: Path, fake_wandb: FakeWandb
) -> None:
    (tmp_path / "metrics.jsonl").touch()
    config = MetricsConfig(wandb="offline")
    tracker = Tracker(config, tmp_path, {}, print, patience_seconds=100.0)
    with (tmp_path / "metrics.jsonl").open("a") as file:  # wandb takes no step below its last one
        file.write('{"step": 6}\n{"event": "save", "step": 5, "seconds": 0.5}\n')
    tracker.close_tool()
    assert fake_wandb.steps() == [6, 6]
    assert fake_wandb.notes()[2]["values"] == {"save/step": 5, "save/seconds": 0.5}


def curves(run_dir: Path) -> dict[str, list[int]]:
    """The steps of each curve, as TensorBoard shows them."""
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    read = accumulators.EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0})
    read.Reload()
    return {tag: [event.step for event in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


def test_tensorboard_mirrors_the_records_once(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    run_dir = tmp_path / "run"
    assert track(run_dir, "off") == []  # not asked for yet
    assert not (run_dir / "tensorboard").exists()
    assert track(run_dir, "off", start_step=1, steps=(2, 3), tensorboard=True) == []
    # What was written before it was asked for is there too.
    assert curves(run_dir) == {"valid/eval_loss": [1, 2, 3]}
    assert track(run_dir, "off", start_step=2, steps=(3, 4), tensorboard=True) == []
    assert curves(run_dir) == {"valid/eval_loss": [1, 2, 3, 4]}
    assert track(run_dir, "off", steps=(1, 2), tensorboard=True) == []  # begun again
    assert curves(run_dir) == {"valid/eval_loss": [1, 2]}


def test_tensorboard_names() -> None:
    mirror = pytest.importorskip("trainer.metrics.tensorboard_mirror")
    to_tensorboard = mirror.to_tensorboard
    assert to_tensorboard({"step": 1, "loss": 2.0, "grad_norm": None}) == {"train/loss": 2.0}
    assert to_tensorboard({"step": 1, "split": "test", "bleu": 3.0}) == {"test/bleu": 3.0}
    start = {"event": "start", "step": 5, "start": 2, "time": 1.7e9}
    assert to_tensorboard(start) == {"start/start": 2}


def test_what_keeps_tensorboard_from_writing_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tensorboard.py").write_text("raise ImportError('none here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (line,) = track(tmp_path / "run", "off", tensorboard=True)
    assert line == (
        'tensorboard cannot be imported (none here): pip install "samestep[tensorboard]"; '
        "metrics.jsonl has everything"
    )
    monkeypatch.delenv("PYTHONPATH")
    pytest.importorskip("tensorboard")
    (tmp_path / "another").mkdir()
    (tmp_path / "another" / "tensorboard").write_text("a file, and no folder")
    (line,) = track(tmp_path / "another", "off", tensorboard=True)
    assert line.startswith("tensorboard gave up (")


def test_real_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_X_DISABLE_STATS", "true")
    assert track(tmp_path / "a run") == []
    (kept,) = (tmp_path / "a run" / "wandb").glob("offline-run-*/run-a run-*.wandb")
    assert kept.stat().st_size > 0
