"""The default job beside other busy processes: `python benchmarks/busy.py`.

Threads of OpenMP wait for each other by spinning. On a machine with nothing else to do that is the
fastest way; where other processes want the cores, each wait costs a time slice. Prints tokens per
second, with libgomp's own waiting and with that of launch/cli, alternately; on a quiet machine
and beside so many busy processes.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parents[1]
BUSY, ROUNDS = 10, 3
WAITS = {"libgomp's": {"GOMP_SPINCOUNT": "300000"}, "launch/cli's": {}}
STEPS = {0: 60, BUSY: 12}  # few where each takes long


def tokens_per_second(steps: int, environment: dict[str, str]) -> float:
    """Of the last two thirds of a short run of the default job."""
    with tempfile.TemporaryDirectory() as folder:
        words = [
            f"steps={steps}",
            f"metrics.every={steps // 3}",
            "eval.every=0",
            "eval.samples=8",
            "eval.test=false",
            "metrics.sample_tokens=0",
            f"run_dir={folder}/run",
        ]
        subprocess.run(
            [sys.executable, str(ROOT / "launch/train.py"), *words],
            check=True,
            cwd=ROOT,
            env=os.environ | environment,
            capture_output=True,
        )
        text = (Path(folder) / "run/metrics.jsonl").read_text()
        lines = [json.loads(line) for line in text.splitlines()]
    rates = [line["tokens_per_second"] for line in lines if "tokens_per_second" in line]
    return sum(rates[1:]) / len(rates[1:])


def main() -> None:
    """Print a row for each machine and way of waiting."""
    cores = os.cpu_count() or 1
    quiet = 0.0
    for busy, steps in STEPS.items():
        loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(busy)]
        try:
            found: dict[str, list[float]] = {name: [] for name in WAITS}
            for _ in range(ROUNDS):
                for name, environment in WAITS.items():
                    found[name].append(tokens_per_second(steps, environment))
        finally:
            for loop in loops:
                loop.kill()
        first = median(next(iter(found.values())))
        quiet = quiet or first
        fair = quiet * min(1.0, cores / (busy + cores))  # each of our threads is one of so many
        for name, rates in found.items():
            rate = median(rates)
            print(  # noqa: T201
                f"{busy:3} busy processes, {name} waiting: {rate:6.0f} tokens/s, "
                f"{rate / first:.2f} of libgomp's, {rate / fair:.2f} of the fair share"
            )


if __name__ == "__main__":
    main()
