"""Detectors on the canvas and on BCCD: `python benchmarks/detection.py JOB RUN_DIR [key=value …]`.

JOB is canvas or canvas-detr; or bccd or bccd-detr with data.path=FOLDER of a COCO folder of the 364
blood images of Shenggan/BCCD_Dataset (train.json, valid.json, test.json). Trains with
`launch/train.py` (with the given keys), and prints the metrics of the test split, and the seconds
of CPU time that all of it took.
"""

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console

ROOT = Path(__file__).parents[1]
BCCD = ("data=detection", "data.image_size=160", "data.flips=turns", "batch_size=8")
JOBS = {
    "canvas": (),
    "canvas-detr": ("model=detr-tiny", "optim.lr=1.5e-3"),
    "bccd": (*BCCD, "optim.lr=1.5e-3", "steps=2000", "eval.every=250"),
    "bccd-detr": (
        *BCCD,
        *("model=detr-tiny", "model.queries=49", "optim.lr=1e-3", "steps=1500", "eval.every=250"),
    ),
}


def main() -> None:
    """Train a job, and print the metrics of the test split."""
    job, run_dir, *keys = sys.argv[1:]
    environment = {"OMP_NUM_THREADS": "1"} | os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "launch" / "train.py"), "experiment=detection"]
    command += [*JOBS[job], f"run_dir={run_dir}", *keys]
    began = time.perf_counter()
    subprocess.run(command, check=True, env=environment)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    lines = (Path(run_dir) / "metrics.jsonl").read_text().splitlines()
    last = [json.loads(line) for line in lines if '"split": "test"' in line][-1]
    console = Console(width=100)
    console.print(last)
    seconds = time.perf_counter() - began
    console.print(f"{seconds:.0f} s, of CPU time {used.ru_utime + used.ru_stime:.0f} s")


if __name__ == "__main__":
    main()
