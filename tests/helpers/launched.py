"""Real runs of launch/train.py, small and endless, to be killed, stopped and started again."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

ROOT = Path(__file__).parents[2]
PLAY = files("trainer.data") / "bundled" / "shakespeare" / "valid.txt"
SMALL = [
    *("model.layers=2", "model.width=32", "model.heads=4", "model.kv_heads=2"),
    *("model.ffn_width=64", "data.vocab_size=300", "data.seq_len=16", "batch_size=8"),
    *("eval.every=0", "eval.samples=8", "eval.test=false", "metrics.sample_tokens=0"),
    *("metrics.every=1", "device=cpu", "precision=fp64", "strategy=ddp"),
]


ENVIRONMENT = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


class Launched:
    """A run in a folder of its own, with the processes that work for it."""

    def __init__(self, folder: Path):
        self.folder, self.run_dir = folder, folder / "run"
        (folder / "play.txt").write_text(PLAY.read_text()[:30_000])

    def start(self, *overrides: str, torchrun: list[str] | None = None) -> subprocess.Popen:
        """`launch/train.py` with these overrides, under torchrun with these options."""
        return subprocess.Popen(
            self.command(*overrides, torchrun=torchrun),
            env=os.environ | ENVIRONMENT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def command(self, *overrides: str, torchrun: list[str] | None = None) -> list[str]:
        """What `start` runs."""
        started = [] if torchrun is None else ["-m", "torch.distributed.run", *torchrun]
        data = [f"data.path={self.folder}/play.txt", f"data.cache={self.folder}/cache"]
        return [
            sys.executable,
            *started,
            str(ROOT / "launch" / "train.py"),
            *SMALL,
            *data,
            f"run_dir={self.run_dir}",
            *overrides,
        ]

    def lines(self) -> list[dict]:
        """The training lines so far."""
        return lines(self.run_dir)

    def losses(self) -> list[float]:
        """Of the steps so far."""
        return [line["loss"] for line in self.lines()]

    def status(self) -> dict:
        """What status.json says."""
        return json.loads((self.run_dir / "status.json").read_text())

    def wait_for_step(self, step: int, process: subprocess.Popen) -> None:
        """Returns when the step is done."""
        until(lambda: self.lines()[-1:] and self.lines()[-1]["step"] >= step, process)


def lines(run_dir: Path) -> list[dict]:
    """The training lines of a run so far; without the last one if it is being written."""
    path = run_dir / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    whole = [json.loads(line) for line in text.splitlines(keepends=True) if line[-1] == "\n"]
    return [line for line in whole if "loss" in line]


def until(
    true: Callable[[], object], process: subprocess.Popen | None = None, seconds: float = 240.0
) -> None:
    """Wait for something to become true, as long as the process runs."""
    deadline = time.monotonic() + seconds
    while not true():
        if process is not None and process.poll() is not None:
            raise AssertionError(process.communicate()[1])
        assert time.monotonic() < deadline
        time.sleep(0.02)


def ranks_of(launcher: int) -> list[int]:
    """Process ids of the ranks that a launcher has started, in that order."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and parent(int(folder.name)) == launcher:
                command = (folder / "cmdline").read_bytes()
                if b"train.py" in command or b"spawn_main" in command:
                    found.append(int(folder.name))
        except (OSError, IndexError):
            continue
    return sorted(found)


def parent(pid: int) -> int:
    """The parent of a process."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def alive(pid: int) -> bool:
    """Whether a process runs, and is not just waiting to be asked for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
