"""Check on one GPU what no CPU can show: numbers, graphs, kernels, waits, NCCL, saves, speed.

`python benchmarks/gpu.py [device=cuda|cpu] [json=gpu.json] [only=WORDS] [seconds=480] [beside=4]`

Needs torch and this repository; neither hydra nor what reads data of other kinds. Each check is a
process of its own with its own time limit. The report is written anew after each, as {env,
roofline, checks: [{name, ok, value, expected, seconds, …}], perf}; a table follows. `only=`: names
of checks, or parts of them, separated by commas. `beside=`: how many that time nothing run at once.
The exit status is 1 if a value is outside its band. device=cpu runs what needs no GPU, smaller.
"""

import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from gpu_checks.findings import CHECKS, failed
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
DEFAULTS = {"device": "cuda", "json": "gpu.json", "only": "", "seconds": "480", "beside": "4"}
LEAST_SECONDS = 10.0  # no check is started with less left
ASK = ["nvidia-smi", "--query-gpu=name,driver_version,power.limit,clocks.max.sm", "--format=csv"]
PROBE = """
import json, torch
from torch.cuda import nccl
from importlib.util import find_spec
from importlib.metadata import version
cuda = torch.cuda.is_available()
found = {"torch": torch.__version__, "cuda": torch.version.cuda}
if cuda:
    found |= {"device": torch.cuda.get_device_name(), "cudnn": torch.backends.cudnn.version(),
              "nccl": ".".join(map(str, nccl.version())),
              "memory_gib": torch.cuda.get_device_properties(0).total_memory / 2**30}
for name in ("triton", "torchao"):
    found[name] = version(name) if find_spec(name) else "missing"
print(json.dumps(found))
"""
Row = dict[str, Any]


class Report:
    """The report, which is whole at any time."""

    def __init__(self, path: Path, env: Row):
        self._path, self._env = path, env
        self.rows: list[Row] = []

    def add(self, rows: list[Row]) -> None:
        """Add the entries of a check and write the file anew."""
        self.rows += rows
        perf = [row["facts"] for row in self.rows if "step_seconds" in row["facts"]]
        rates = {r["name"]: r["value"] for r in self.rows if r["check"] == "roofline"}
        whole = {"env": self._env, "roofline": rates, "checks": self.rows, "perf": perf}
        beside = self._path.with_suffix(".partial")
        beside.write_text(json.dumps(whole, indent=1), encoding="utf-8")
        beside.replace(self._path)

    def table(self) -> Table:
        """Return the table of all values; those outside of their bands are flagged."""
        marks = {True: "[green]in[/]", False: "[bold red]OUT[/]", None: "–"}
        table = Table("", "check", "value", "expected", "s", title=self._env.get("device", "CPU"))
        for row in self.rows:
            value = row["value"]
            shown = value if isinstance(value, str) else f"{value:.5g} {row['unit']}".strip()
            table.add_row(
                marks[row["ok"]], row["name"], shown, row["expected"], f"{row['seconds']:.1f}"
            )
        return table


def environment(device: str, check: str = "") -> dict[str, str]:
    """Return the environment of a check's process."""
    found = dict(os.environ)
    paths = [str(ROOT), str(ROOT / "benchmarks"), found.get("PYTHONPATH", "")]
    found |= {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}
    if device == "cuda" and check:
        found |= CHECKS[check].environment
    return found


def describe(device: str) -> Row:
    """Return what the checks run on: device, driver, versions, commit."""
    probe = [sys.executable, "-c", PROBE]
    said = subprocess.run(
        probe, capture_output=True, text=True, check=True, env=environment(device)
    )
    env = {"asked": device, "python": platform.python_version(), "host": platform.machine()}
    env |= json.loads(said.stdout.splitlines()[-1])
    for name, words in (("commit", ["git", "-C", str(ROOT), "rev-parse", "HEAD"]), ("smi", ASK)):
        try:
            told = subprocess.run(words, capture_output=True, text=True, timeout=20, check=False)
            env[name] = told.stdout.strip()
        except OSError:
            env[name] = ""
    return env


def run_check(name: str, device: str, folder: Path, deadline: float) -> list[Row]:
    """Run a check in a process of its own; return its entries, also if it has not ended."""
    limit, began = min(CHECKS[name].seconds, deadline - time.monotonic()), time.monotonic()
    if limit < LEAST_SECONDS:
        return [failed(name, "not run: no time was left", None) | {"check": name}]
    file = name.replace(" ", "-")
    rows, log = folder / f"{file}.jsonl", folder / f"{file}.log"
    words = [sys.executable, "-m", "gpu_checks.child", name, device, str(rows)]
    with log.open("wb") as out:
        child = subprocess.Popen(
            words, stdout=out, stderr=out, env=environment(device, name), start_new_session=True
        )
        try:
            status = child.wait(limit)
            problem = f"its process ended with status {status}" if status else ""
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)  # it, and what it has started
            child.wait()
            problem = f"not finished after {limit:.0f} s"
    text = rows.read_text(encoding="utf-8") if rows.exists() else ""
    found = [json.loads(line) for line in text.splitlines() if line.endswith("}")]
    if problem or any(row["ok"] is False for row in found):
        said = log.read_text(encoding="utf-8", errors="replace").splitlines()[-30:]
        spent = time.monotonic() - began
        if problem:
            found.append(failed(name, problem, seconds=spent))
        found[-1]["facts"] |= {"log": said}
    return [row | {"check": name} for row in found]


def run_checks(
    names: list[str], device: str, folder: Path, deadline: float, beside: int
) -> Iterator[list[Row]]:
    """Yield the entries of each check: first the rates, then those that time nothing, then speed.

    Those that time nothing run beside each other.
    """
    crowd = [name for name in names if not CHECKS[name].alone]
    alone = [name for name in names if CHECKS[name].alone]
    first, rest = alone[: "roofline" in alone], alone["roofline" in alone :]
    for name in first:
        yield run_check(name, device, folder, deadline)
    with ThreadPoolExecutor(max(1, beside)) as pool:
        started = [pool.submit(run_check, n, device, folder, deadline) for n in crowd]
        for done in as_completed(started):
            yield done.result()
    for name in rest:
        yield run_check(name, device, folder, deadline)


def parse(words: list[str]) -> dict[str, str]:
    """Return the options of the command line; exits with a message if one is unknown."""
    given = dict(word.split("=", 1) for word in words if "=" in word)
    unknown = [word for word in words if "=" not in word] + [k for k in given if k not in DEFAULTS]
    if unknown or given.get("device", "cuda") not in ("cuda", "cpu"):
        sys.exit(f"{unknown or given['device']}: {' '.join(f'{k}=' for k in DEFAULTS)}")
    return DEFAULTS | given


def main(words: list[str]) -> int:
    """Run the checks, write the report after each and print the table."""
    options = parse(words)
    device, deadline = options["device"], time.monotonic() + float(options["seconds"])
    wanted = [word for word in options["only"].split(",") if word]
    names = [n for n in CHECKS if not wanted or any(word in n for word in wanted)]
    progress, env = Console(stderr=True), describe(device)
    if device == "cuda" and "device" not in env:
        sys.exit("device=cuda, but torch finds no CUDA device here; set device=cpu")
    report = Report(Path(options["json"]), env)
    with TemporaryDirectory() as folder:
        found = run_checks(names, device, Path(folder), deadline, int(options["beside"]))
        for rows in found:
            report.add(rows)
            bad = sum(row["ok"] is False for row in rows)
            progress.print(f"{rows[0]['check']}: {len(rows)} values, {bad} outside")
    Console(width=None if sys.stdout.isatty() else 150).print(report.table())
    outside = sum(row["ok"] is False for row in report.rows)
    judged = sum(row["ok"] is not None for row in report.rows)
    total = len(report.rows)
    Console().print(f"{total} values, {judged} judged, {outside} outside: {options['json']}")
    return int(outside > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
