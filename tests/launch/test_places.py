"""Where a run lives: odd names, disks without room, readers that leave, and what is not installed.

The disks are small tmpfs mounts, for which one has to be root; elsewhere those tests are skipped.
"""

import io
import json
import logging
import os
import shutil
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from launch.cli import entrypoint as door
from launch.cli import environment as versions
from launch.cli import preflight as before
from launch.cli.errors import log_to_file, write_error
from launch.cli.preflight import prepare_training
from trainer.config.train import DataConfig, ModelConfig, TrainConfig, UserError
from trainer.metrics.console import Display
from trainer.metrics.jsonl import MetricsFile

ROOT = Path(__file__).parents[2]
PLAY = ROOT / "trainer/data/bundled/shakespeare/valid.txt"


@pytest.fixture
def config(tmp_path) -> TrainConfig:
    (tmp_path / "play.txt").write_text(PLAY.read_text()[:20_000])
    data = DataConfig(
        path=str(tmp_path / "play.txt"), vocab_size=300, seq_len=16, cache=str(tmp_path / "cache")
    )
    model = ModelConfig(layers=1, width=16, heads=2, ffn_width=16)
    return TrainConfig(data=data, model=model, run_dir=str(tmp_path / "run"))


@pytest.fixture
def disk(tmp_path):
    """A function that makes a small file system and returns where it is."""
    made = []

    def mount(options: str) -> Path:
        place = tmp_path / f"disk{len(made)}"
        place.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", options, "none", str(place)]
        if shutil.which("mount") is None or subprocess.run(command, check=False).returncode:
            pytest.skip("a file system cannot be mounted here")
        made.append(place)
        return place

    yield mount
    for place in made:
        subprocess.run(["umount", str(place)], check=True)


def refused(config) -> str:
    with pytest.raises(UserError) as raised:
        prepare_training(config, 1)
    (problem,) = raised.value.problems
    assert "\n" not in problem
    return problem


FULL = "No space left on device"
DISKS = {
    "ro": "Read-only file system",
    "size=4k": FULL,  # room for config.yaml, and none for the tokenizer
    "size=1m,nr_inodes=1": FULL,
    "size=1m,nr_inodes=3": FULL,
}


@pytest.mark.parametrize("options", DISKS)
def test_a_run_dir_that_cannot_be_written(config, disk, options):
    config = replace(config, run_dir=str(disk(options) / "run"))
    assert refused(config) == (
        f"run_dir={config.run_dir} cannot be written ({DISKS[options]}); choose another run_dir"
    )


def test_a_cache_without_room(config, disk):
    config.data.cache = str(disk("size=8k") / "cache")
    problem = refused(config)
    assert problem.startswith(f"data.cache={config.data.cache} cannot be written: ")
    assert FULL in problem
    assert not Path(config.run_dir).exists()


def test_a_name_that_is_too_long(config):
    config = replace(config, run_dir=str(Path(config.run_dir) / ("x" * 300)))
    assert "cannot be written (File name too long); choose another run_dir" in refused(config)


def test_half_a_tokenizer_is_not_taken_for_one(config, monkeypatch):
    """The disk was full when it was written first: the next start writes it whole."""

    write_text = Path.write_text

    def full(path, text, **options):
        if path.parent != Path(config.run_dir) or "tokenizer" not in path.name:
            return write_text(path, text, **options)
        write_text(path, text[:100], **options)
        raise OSError(28, FULL)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        assert f"cannot be written ({FULL})" in refused(config)
    assert prepare_training(config, 1).model.vocab_size == 300


def test_metrics_on_a_real_disk_without_room(tmp_path, disk):
    path = disk("size=16k") / "metrics.jsonl"
    (path.parent / "other").write_bytes(b"x" * 4096)
    said: list[str] = []
    file = MetricsFile(path, 0, said.append)
    for step in range(1, 201):
        file.append({"step": step, "text": "x" * 100})
    assert len(said) == 1 and FULL in said[0]
    steps = [json.loads(line)["step"] for line in path.read_text().splitlines()]
    assert steps == list(range(1, len(steps) + 1)) and 50 < len(steps) < 150
    file.close()
    assert said[1].endswith(f"no room for the last {200 - len(steps)} lines")


WATCHED = ["steps=4", "checkpoint.every=2", "metrics.every=1", "eval.samples=2", "batch_size=4"]
WATCHED += ["model.layers=1", "model.width=16", "model.heads=2", "model.kv_heads=0"]
WATCHED += ["model.ffn_width=16", "data=text", "data.vocab_size=300", "data.seq_len=16"]
WATCHED += ["device=cpu", "metrics.sample_tokens=2"]


def test_odd_names_a_reader_that_leaves_and_a_full_log(tmp_path):
    """Through the real door, in folders that a shell must quote."""
    place = tmp_path / "my run [1] {ünï},=(x) #2"
    place.mkdir()
    (place / "a play, [2].txt").write_text(PLAY.read_text()[:20_000])
    command = [
        sys.executable,
        str(ROOT / "launch" / "train.py"),
        *WATCHED,
        f"run_dir={place / 'r=[0]'}",
        f"data.path={place / 'a play, [2].txt'}",
        f"data.cache={place / 'cache'}",
    ]
    ours, theirs = os.pipe()
    with open("/dev/full", "w") as full:  # noqa: PTH123
        process = subprocess.Popen(
            command,
            stdout=theirs,
            stderr=full,
            cwd=place,
            env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""},
        )
    os.close(theirs)
    assert os.read(ours, 100).startswith(b"step 1/4")
    os.close(ours)  # as `| head -1` does
    assert process.wait(240) == 0
    lines = [json.loads(line) for line in (place / "r=[0]" / "metrics.jsonl").open()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
    assert [line["split"] for line in lines if "split" in line][-1] == "test"
    events = [(line["event"], line["step"]) for line in lines if "event" in line]
    assert events == [("start", 0), ("save", 2), ("save", 4), ("goodput", 4)]
    assert (lines[-1]["event"], lines[-1]["starts"]) == ("goodput", 1)
    assert lines[-1]["restart_seconds"] > lines[-1]["useful_seconds"] > 0
    assert (place / "r=[0]" / "checkpoints" / "step-00000004").is_dir()


TALKS = """
from trainer.metrics.console import open_console
console = open_console()
for _ in range(3):
    console.print("a line")
"""


def test_a_console_that_failed_does_not_fail_again_at_the_end():
    """What Python still holds for stdout is written when it ends: status 120 if that fails."""
    command = f'exec "{sys.executable}" -c "$0" > /dev/full'
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""}
    done = subprocess.run(
        ["sh", "-c", command, TALKS], check=False, env=environment, stderr=subprocess.PIPE
    )
    assert (done.returncode, done.stderr) == (0, b"")


LOGS = """
import logging, sys
from launch.cli.errors import release_streams, log_to_stderr
log_to_stderr(0)
logging.info("a line")
if "let go" in sys.argv:
    release_streams()
    sys.stderr.flush()  # as multiprocessing does where it starts and ends a process
"""


@pytest.mark.parametrize("argument", ["", "let go"])
def test_a_full_log_changes_no_exit_status(argument):
    command = f'exec "{sys.executable}" -c "$0" "$1" > /dev/full 2> /dev/full'
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""}
    asked = ["sh", "-c", command, LOGS, argument]
    assert subprocess.run(asked, check=False, env=environment).returncode == 0


CLOSED = """
import os, sys
from launch.cli.errors import ensure_standard_streams, write_error
ensure_standard_streams()
number = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT)
os.write(2, b"a library complains")
write_error("a mistake")
os.write(number, str(number).encode())
"""


def test_a_log_has_what_is_logged_and_shown_and_a_full_one_is_silent(tmp_path, disk, capsys):
    shown = Display(Console(file=io.StringIO()), 10, "tok")
    with log_to_file(tmp_path / "log.txt"):
        logging.getLogger("trainer.checkpoint.save").warning("a warning")
        shown.print_line("a line")
    shown.print_line("too late")
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert [line.split("  ", 1)[1] for line in lines] == ["a warning", "a line"]
    full = disk("size=16k")
    with log_to_file(full / "log.txt"):
        for _ in range(100):
            logging.getLogger("trainer.checkpoint.save").warning("x" * 1000)
    assert (full / "log.txt").stat().st_size < 20_000
    assert "Logging error" not in capsys.readouterr().err


def test_no_file_gets_the_number_of_a_closed_stream(tmp_path):
    path = tmp_path / "checkpoint"
    command = f'exec "{sys.executable}" -c "$0" "$1" <&- >&- 2>&-'
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    asked = ["sh", "-c", command, CLOSED, str(path)]
    assert subprocess.run(asked, check=False, env=environment).returncode == 0
    assert path.read_text() == "3"


def test_a_mistake_keeps_its_exit_status_without_stderr(monkeypatch):
    with open("/dev/full", "w") as full:  # noqa: PTH123
        for stream in (None, full):
            monkeypatch.setattr(sys, "stderr", stream)
            write_error("a mistake")
        monkeypatch.undo()
        full.close = lambda: None  # type: ignore[method-assign]  # it would try once more


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ("2.13.0+cpu", ""),
        ("2.11.0", ""),
        ("3.0.0a0+git1", ""),
        ("2.10.1+cu128", "torch is 2.10.1+cu128, but must be torch>=2.11; pip install --upgrade"),
        ("1.13.1", "torch is 1.13.1, but must be torch>=2.11"),
        (None, "torch is not installed"),
    ],
)
def test_the_version_of_torch(monkeypatch, capsys, found, said):
    def version(name):
        if found is None:
            raise versions.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(versions, "version", version)
    assert versions.torch_problem().startswith(said)
    if not said:
        assert versions.torch_problem() == ""
        return
    with pytest.raises(SystemExit) as stop:
        door.run_command(door.Command("train", print))
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == versions.torch_problem()
    monkeypatch.setenv("RANK", "1")  # one rank says it
    with pytest.raises(SystemExit):
        door.run_command(door.Command("train", print))
    assert capsys.readouterr().err == ""


def test_the_oldest_torch_is_that_of_the_project():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "torch>=" + ".".join(map(str, versions.OLDEST_TORCH)) in project["dependencies"]


def test_compiling_without_a_compiler(config, monkeypatch):
    monkeypatch.setattr(before.shutil, "which", lambda name: None)
    assert "compile=true needs a C++ compiler" in refused(replace(config, compile=True))
    prepare_training(config, 1)


def test_fewer_samples_than_a_step_takes(config, caplog):
    prepare_training(config, 1)
    assert caplog.messages == []
    many = replace(config, batch_size=5000, run_dir=config.run_dir + "2")
    prepare_training(many, 1)
    (message,) = caplog.messages
    assert message.startswith("the train split has ")
    assert "fewer than batch_size=5000: a step sees some of them more than once" in message
