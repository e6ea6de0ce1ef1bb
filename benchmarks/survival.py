"""Whole runs through the front door: killed over and over, and moved from layout to layout.

`python benchmarks/survival.py [kills]` trains a small Llama on Shakespeare for a few hundred steps:

* unbroken, in one process;
* killed (SIGKILL) so many times at random moments, the start-up and saves included: its last
  checkpoint must be that of the unbroken run, bit for bit;
* begun as strategy=ddp on 4 ranks, stopped by a signal, gone on with as strategy=tensor
  strategy.pipeline=2 on 4, stopped, and ended as strategy=single: the same losses to rounding.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

STEPS, EVERY = 600, 20
JOB = (
    f"steps={STEPS}",
    f"checkpoint.every={EVERY}",
    "metrics.every=1",
    "eval.every=0",
    "eval.test=false",
    "metrics.sample_tokens=0",
    "model.width=64",
    "model.heads=4",
    "model.kv_heads=2",
    "model.layers=4",
    "model.ffn_width=128",
    "data.seq_len=64",
    "batch_size=8",
    "precision=fp64",  # training makes much of rounding: in fp32 no layouts can be compared
)
DOOR = str(Path(__file__).parents[1] / "launch" / "train.py")


def start(run_dir: Path, *overrides: str) -> subprocess.Popen:
    """The run, in a session of its own, so that all of its processes can be killed together."""
    return subprocess.Popen(
        [sys.executable, DOOR, f"run_dir={run_dir}", *JOB, *overrides],
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(process: subprocess.Popen, *allowed: int) -> None:
    """Wait for the run to end; it must leave with one of these exit codes."""
    _, errors = process.communicate()
    assert process.returncode in allowed, (process.returncode, errors)


def losses(run_dir: Path) -> dict[int, float]:
    """The loss of each step; every step must be there once."""
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    found = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    assert [step for step, _ in found] == list(range(1, len(found) + 1))
    return dict(found)


def wait_until(process: subprocess.Popen, ready: Callable[[], bool]) -> None:
    """Return when it is so, or when the run has ended."""
    while process.poll() is None and not ready():
        time.sleep(0.05)


def reached(run_dir: Path, step: int) -> bool:
    """Whether the run has told of this step."""
    path = run_dir / "metrics.jsonl"
    return path.exists() and path.read_text().count('"loss"') >= step


def killed(run_dir: Path, kills: int) -> int:
    """Kill a run at random moments, then let it end; how many lives got something done."""
    at_random, lives = random.Random(0), 0
    for number in range(kills):
        process = start(run_dir)
        if at_random.random() < 0.8:  # most lives take some steps before they end
            before = len(losses(run_dir)) if (run_dir / "metrics.jsonl").exists() else 0
            wait_until(process, lambda b=before: reached(run_dir, b + 1))  # type: ignore[misc]
            lives += 1
        time.sleep(at_random.uniform(0.0, 2.0))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        sys.stdout.write(f"kill {number + 1} of {kills}\n")
    end(start(run_dir), 0)
    return lives


def moved(run_dir: Path) -> None:
    """A run that changes its layout twice; a signal ends each part but the last."""
    layouts = (
        ("launch.ranks=4", "strategy=ddp"),
        (
            "launch.ranks=4",
            "strategy=tensor",
            "strategy.pipeline=2",
            "micro_batch_size=2",
            "strategy.tensor=2",
        ),
        ("strategy=single",),
    )
    for part, layout in enumerate(layouts, 1):
        process = start(run_dir, *layout)
        if part < len(layouts):
            wait_until(process, lambda n=part: reached(run_dir, 200 * n))  # type: ignore[misc]
            os.kill(process.pid, signal.SIGTERM)
            end(process, 75)
        else:
            end(process, 0)
        step = max(losses(run_dir))
        sys.stdout.write(f"{' '.join(layout)}: up to step {step}\n")


def differences(one: Path, other: Path) -> str:
    """What launch/checkpoint.py says of the newest checkpoints of two runs."""
    door = str(Path(DOOR).with_name("checkpoint.py"))
    done = subprocess.run(
        [sys.executable, door, "diff", one, other], capture_output=True, text=True, check=False
    )
    return f"exit code {done.returncode}: {(done.stdout or done.stderr).strip().splitlines()[-1]}"


if __name__ == "__main__":
    kills = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    with TemporaryDirectory() as folder:
        unbroken, broken, mover = (Path(folder) / name for name in ("unbroken", "killed", "moved"))
        end(start(unbroken), 0)
        curve = losses(unbroken)
        lives = killed(broken, kills)
        assert losses(broken) == curve
        sys.stdout.write(
            f"killed {kills} times, {lives} of them after some steps: all {STEPS} losses are those "
            f"of the unbroken run; checkpoints: {differences(unbroken, broken)}\n"
        )
        moved(mover)
        apart = max(abs(loss - curve[step]) for step, loss in losses(mover).items())
        sys.stdout.write(f"moved through three layouts: losses at most {apart:.1e} apart\n")
