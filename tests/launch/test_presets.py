"""The user's own command: every preset takes 8 ranks of every default job, as it is typed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from forked import ROOT, call_in_fork, run_script

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=8"]
# Eight stages need all blocks of a default model. To the other presets its depth makes no
# difference, and a rank's time goes into the blocks: they train two.
PRESETS = ("ddp", "fsdp", "hsdp", "tensor", "context", "hybrid")
JOBS = ("language", "images", "translation")
# Speech has fewer heads and blocks than eight ranks, chats have the model of language.
FEWER_JOBS, FEWER = ("speech", "chat"), ("fsdp", "context", "hybrid")
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


def train(folder: Path, *words: str, ranks: int = 0) -> None:
    """Run launch/train.py in forks and expect it to succeed."""
    command = [str(ROOT / "launch/train.py"), *words, *SHORT]
    output = folder / "output.txt"
    status = call_in_fork(900.0, run_script, command, folder, output, ranks)
    assert status == 0, output.read_text()[-3000:]


def losses(run: Path) -> list[float]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A folder with a sweep of all presets on 8 ranks, and one of single processes."""
    folder = tmp_path_factory.mktemp("presets")
    jobs, shallow = f"experiment={','.join(JOBS)}", "model.layers=2"
    for name, (words, strategies) in {
        "shallow": ((jobs, shallow), PRESETS),
        "deep": ((jobs,), ("pipeline", "pipeline")),  # swept, so that folders are named alike
        "fewer": ((f"experiment={','.join(FEWER_JOBS)}", shallow), FEWER),
    }.items():
        train(folder, "-m", *words, "strategy=single,single", f"run_dir={name}-alone")
        strategy = f"strategy={','.join(strategies)}"
        train(folder, "-m", *words, strategy, f"run_dir={name}", ranks=8)
    return folder


@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize("preset", [*PRESETS, "pipeline"])
def test_a_preset_on_eight_ranks_takes_the_steps_of_one_process(runs, preset, job):
    depth = "deep" if preset == "pipeline" else "shallow"
    alone = losses(runs / f"{depth}-alone" / f"experiment={job},strategy=single")
    assert len(alone) == 2
    found = losses(runs / depth / f"experiment={job},strategy={preset}")
    assert found == pytest.approx(alone, rel=ROUNDING)


@pytest.mark.parametrize("job", FEWER_JOBS)
@pytest.mark.parametrize("preset", FEWER)
def test_fewer_presets_of_a_job_take_the_steps_of_one_process(runs, preset, job):
    alone = losses(runs / "fewer-alone" / f"experiment={job},strategy=single")
    assert len(alone) == 2
    found = losses(runs / "fewer" / f"experiment={job},strategy={preset}")
    assert found == pytest.approx(alone, rel=ROUNDING)


# Heads and blocks for eight ranks, which a detector of this size has not.
DETECTOR = ("experiment=detection", "model.layers=8", "model.heads=8", "model.width=64")


@pytest.fixture(scope="module")
def detectors(tmp_path_factory) -> Path:
    """A folder with a sweep of all presets on 8 ranks, and a single process."""
    folder = tmp_path_factory.mktemp("detectors")
    train(folder, "-m", *DETECTOR, "strategy=single,single", "run_dir=alone")
    presets = ",".join((*PRESETS, "pipeline"))
    train(folder, "-m", *DETECTOR, f"strategy={presets}", "run_dir=ranks", ranks=8)
    return folder


@pytest.mark.parametrize("preset", [*PRESETS, "pipeline"])
def test_a_detector_under_a_preset_takes_the_steps_of_one_process(detectors, preset):
    alone = losses(detectors / "alone" / "strategy=single")
    assert len(alone) == 2
    found = losses(detectors / "ranks" / f"strategy={preset}")
    assert found == pytest.approx(alone, rel=ROUNDING)


def test_the_very_words(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "RANK"} | {"OMP_NUM_THREADS": "1"}
    command = [*TORCHRUN, str(ROOT / "launch/train.py"), "strategy=tensor", *SHORT]
    options = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True}
    done = subprocess.run(command, timeout=900, check=False, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    (run,) = (tmp_path / "runs").iterdir()
    assert len(losses(run)) == 2 and (run / "data.txt").is_file()
