"""kill -9 of all ranks at random moments: a short campaign of benchmarks/kills.py."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_no_kill_loses_a_checkpoint():
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    kills, steps, most_ranks = "12", "24", "2"
    found = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "kills.py", kills, steps, most_ranks],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )
    assert found.returncode == 0, found.stdout + found.stderr
    lines = found.stdout.splitlines()
    assert len(lines) == 4 and all("0 did harm" in line for line in lines)
    assert all("0 with other bits" in line for line in lines)
