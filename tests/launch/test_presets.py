"""The user's own command: every preset takes 8 ranks of every default job, as it is typed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=8"]
PRESETS = ("ddp", "fsdp", "hsdp", "tensor", "pipeline", "context", "hybrid")
JOBS = ("language", "images", "translation", "chat")
SHORT = [
    "steps=2",
    "metrics.every=1",
    "metrics.sample_tokens=0",
    "eval.every=0",
    "eval.samples=8",
    "eval.test=false",
    "checkpoint.every=0",
]
ROUNDING = 1e-6  # of float32


def train(folder: Path, *words: str, launcher: list[str] | None = None) -> None:
    """Run launch/train.py and expect it to succeed."""
    environment = {k: v for k, v in os.environ.items() if k != "RANK"} | {"OMP_NUM_THREADS": "1"}
    command = [*(launcher or [sys.executable]), str(ROOT / "launch/train.py"), *words, *SHORT]
    done = subprocess.run(
        command,
        cwd=folder,
        capture_output=True,
        text=True,
        env=environment,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def losses(run: Path) -> list[float]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A folder with a sweep of all presets on 8 ranks, and one of single processes."""
    folder = tmp_path_factory.mktemp("presets")
    jobs = f"experiment={','.join(JOBS)}"
    train(folder, "-m", jobs, "strategy=single,single", "run_dir=alone")
    train(folder, "-m", jobs, f"strategy={','.join(PRESETS)}", "run_dir=eight", launcher=TORCHRUN)
    return folder


@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_on_eight_ranks_takes_the_steps_of_one_process(runs, preset, job):
    alone = losses(runs / "alone" / f"experiment={job},strategy=single")
    assert len(alone) == 2
    found = losses(runs / "eight" / f"experiment={job},strategy={preset}")
    assert found == pytest.approx(alone, rel=ROUNDING)


def test_the_very_words(tmp_path):
    train(tmp_path, "strategy=tensor", launcher=TORCHRUN)
    (run,) = (tmp_path / "runs").iterdir()
    assert len(losses(run)) == 2 and (run / "data.txt").is_file()
