"""metrics.jsonl: no step twice, valid JSON, every line as soon as there is room for it."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
from recorders import lines, make, shown

from trainer.config.train import UserError


@pytest.mark.parametrize(
    ("start_step", "kept"), [(4, [0, 2, 4, 4]), (5, [0, 2, 4, 4]), (0, []), (6, [0, 2, 4, 4, 6])]
)
def test_a_resumed_run_repeats_no_step(tmp_path: Path, start_step: int, kept: list[int]) -> None:
    steps = (0, 2, 4, 4, 6)
    whole = "".join(json.dumps({"step": step}) + "\n" for step in steps)
    (tmp_path / "metrics.jsonl").write_text(whole + '{"step": 1, "lo')  # killed while writing
    with make(tmp_path, start_step=start_step) as recorder:
        recorder.start_clock(0)
        recorder.log_evaluation(8, "test", {"eval_loss": 1.0})
    assert [line["step"] for line in lines(tmp_path)] == [*kept, 8]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["goodput.json", "metrics.jsonl"]


@pytest.mark.parametrize(("start_step", "kept"), [(0, ["rollback"]), (4, ["skip", "rollback"])])
def test_what_was_left_out_of_the_data_stays_said(
    tmp_path: Path, start_step: int, kept: list[str]
) -> None:
    # The other lines behind the checkpoint come again, but for those of earlier starts.
    with make(tmp_path) as recorder:
        for step, action in ((3, "skip"), (5, "rollback"), (6, "skip"), (7, "stop")):
            record = {"event": "bad_step", "step": step, "rank": None, "action": action}
            recorder.log_event(record, f"step {step} is bad")
        assert "step 7 is bad\n" in shown(recorder)
    with make(tmp_path, start_step=start_step):
        pass
    assert [line["action"] for line in lines(tmp_path)] == kept


def test_starts_and_saves_are_lines(tmp_path: Path) -> None:
    save = {"event": "save", "step": 4, "seconds": 0.5, "gib": 0.1}
    for starts, start_step in ((1, 0), (2, 6), (3, 4)):  # the last one from an older checkpoint
        (tmp_path / "goodput.json").write_text(json.dumps({"starts": starts}))
        with make(tmp_path, start_step=start_step) as recorder:
            recorder._goodput.ledger.starts = starts
            recorder.log_start()
            recorder.log_save(save | {"step": start_step + 4})
        with make(tmp_path, first=False) as recorder:
            recorder.log_start()
            recorder.log_save(save)
    found = lines(tmp_path)
    kept = [(line["event"], line["step"], line.get("start")) for line in found]
    # Every start is told, however far the run went back; a save only if the run still has it.
    assert kept == [
        ("start", 0, 1),
        ("save", 4, None),
        ("start", 6, 2),
        ("start", 4, 3),
        ("save", 8, None),
    ]
    assert found[0]["ranks"] == 2 and found[0]["time"] > 1.7e9


def test_numbers_that_are_not_finite_become_null(tmp_path: Path) -> None:
    with make(tmp_path) as recorder:
        recorder.start_clock(0)
        recorder.log_training(2, float("nan"), float("inf"), 1e-3, tokens=10, wait_seconds=0.0)
        recorder.log_evaluation(2, "valid", {"eval_loss": float("-inf")})
        console = shown(recorder)
    training, evaluation = lines(tmp_path)
    assert training["loss"] is training["grad_norm"] is evaluation["eval_loss"] is None
    assert "loss nan  grad inf" in console


def test_a_line_is_in_the_file_at_once(tmp_path: Path) -> None:
    with make(tmp_path) as recorder:
        recorder.log_evaluation(1, "valid", {"eval_loss": 1.0})
        assert len(lines(tmp_path)) == 1


class FullDisk:
    """Stands in for an open file: takes so many bytes more, then there is no room."""

    def __init__(self, file: Any, room: int):
        self.file, self.room = file, room

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def write(self, data: bytes) -> int:
        if not self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        taken = min(self.room, len(data))
        self.room -= taken
        return self.file.write(data[:taken])


def test_lines_wait_for_room_on_a_full_disk(tmp_path: Path) -> None:
    with make(tmp_path) as recorder:
        disk = FullDisk(recorder._file._file, room=70)
        recorder._file._file = disk
        for step in (1, 2, 3):  # the second is cut in the middle
            recorder.log_evaluation(step, "valid", {"eval_loss": 1.0})
            assert [line["step"] for line in lines(tmp_path)] == [1]
        disk.room = 10_000
        recorder.log_evaluation(4, "valid", {"eval_loss": 1.0})
        assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4]
        disk.room = 0
        recorder.log_evaluation(5, "valid", {"eval_loss": 1.0})
    said = [line for line in shown(recorder).splitlines() if "metrics.jsonl" in line]
    assert len(said) == 3  # once for each time that it was full, and at the end
    assert "cannot be written (No space left on device); training goes on" in said[0]
    assert said[-1].endswith("there was no room for the last 1 lines")
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4]


def test_a_metrics_file_that_cannot_be_opened_is_a_mistake(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match=r"metrics\.jsonl cannot be written \(Is a directory\)"):
        make(tmp_path)


def test_bytes_that_are_no_text_are_dropped_with_their_line(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n{"st\xff\xfe\x00p": 2}\n{"step": 2}\n')
    with make(tmp_path, start_step=2):
        pass
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]


def test_a_sample_is_shown_and_kept(tmp_path: Path) -> None:
    with make(tmp_path) as recorder:
        recorder.log_sample("> said\nheard")
        assert "a sample:\n> said\nheard" in shown(recorder)
    assert (tmp_path / "sample.txt").read_text() == "> said\nheard\n"
    with make(tmp_path / "other", first=False) as recorder:
        recorder.log_sample("said")
    assert not (tmp_path / "other").exists()
