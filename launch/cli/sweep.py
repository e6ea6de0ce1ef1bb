"""A sweep: one job per combination of values, in processes of its own; finished jobs are skipped.

Hydra's sweeper chooses the combinations. `run_dir` is the sweep's folder, and each job's run is a
subfolder named after its swept values: the same command with the same folder resumes.
"""

import csv
import io
import logging
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Self

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import OverrideParseException
from omegaconf import DictConfig
from rich.console import Console
from rich.live import Live
from rich.table import Table

from launch.cli.errors import LOG, STOPPED, JobFailedError, exit_code, write_error
from parallel.errors import ConfigError, UserError
from trainer.atomic_files import write_atomically
from trainer.metrics.console import live_display
from trainer.metrics.jsonl import last_values
from trainer.report.page import write_report
from trainer.report.run_history import runs_in
from trainer.run.lock import hold_lock
from trainer.run.run_dir import claim_folder
from trainer.run.status import read_status

NAME_LENGTH = 100
COLUMNS = ("point", "state", "code", "reason", "seconds")  # of sweep.csv, before swept keys
SHOWN = ("step", "loss", "valid_loss", "tokens_per_second")  # metrics of a job in the live table
log = logging.getLogger(__name__)
logging.getLogger("hydra").setLevel(logging.WARNING)  # this module logs the jobs


@dataclass
class SweepJob:
    """One job of a sweep; `values` are the last metrics of its run."""

    overrides: dict[str, str]
    state: str = "waiting"  # waiting | running | finished | stopped | failed
    code: int = 0  # exit code of its job
    reason: str = ""  # reason of a failure
    seconds: float = 0.0
    values: dict[str, float] = field(default_factory=dict)

    @property
    def folder_name(self) -> str:
        """Return the name of the job's folder."""
        whole = ",".join(f"{key}={value}" for key, value in sorted(self.overrides.items()))
        plain = re.sub(r"[^\w.=,+-]", "_", re.sub(r"[\[\]]", "", whole)) or "point"
        if len(plain) <= NAME_LENGTH:
            return plain
        return f"{plain[:NAME_LENGTH]}-{blake2b(whole.encode(), digest_size=4).hexdigest()}"


class Sweep:
    """The jobs of one command line; a context manager around Hydra's main.

    `scratch` is the folder that Hydra's sweeper writes to. `is_new`: its folder is named after the
    time, and must not exist, since another sweep may have started in the same second.
    """

    def __init__(self, scratch: Path, is_new: bool = False) -> None:
        self._scratch, self._is_new = scratch, is_new
        self._points: dict[str, SweepJob] = {}
        self._total = 0  # number of jobs; 0 = known by the sweeper only
        self.code = 0  # exit code of the first failed job
        self._folder: Path | None = None
        self._held = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        with self._held:
            if self._folder is not None:
                self._conclude_job(self._folder)

    def run(self, cfg: DictConfig, work: Callable[[DictConfig, Path], None]) -> float | None:
        """Run the composed job, unless it is finished; return the value for an optimising sweeper.

        `work` takes the configuration and the file for the job's console. An optimising sweeper
        gets JobFailedError if the job fails, or has failed before.
        """
        try:
            point = composed_job()
            if self._folder is None:
                self._open_folder(Path(cfg.run_dir))
        except (UserError, OSError) as error:  # errors of the sweep itself
            write_error(str(error))
            raise SystemExit(2) from None
        assert self._folder is not None
        point = self._points.setdefault(point.folder_name, point)
        folder = self._folder / point.folder_name
        cfg.run_dir = str(folder)
        cfg.metrics.wandb_group = cfg.metrics.wandb_group or self._folder.name
        try:
            if point.state == "failed" and not cfg.retry_failed:
                log.info(
                    "%s has failed before; retry_failed=true tries it again", point.folder_name
                )
                raise JobFailedError(point.code, point.reason)
            with self._mark_running(point, folder):
                work(cfg, folder / LOG)
                point.values = last_values(folder)
                return (
                    None if self._total else _objective_value(point.values, cfg.metrics.objective)
                )
        except JobFailedError as failed:
            self.code = self.code or failed.code
            if self._total:  # Hydra would print it again at the end
                return None
            raise

    def _open_folder(self, folder: Path) -> None:
        if self._is_new:
            folder = claim_folder(folder)
        else:
            folder.mkdir(parents=True, exist_ok=True)
        self._held.enter_context(hold_lock(folder))
        self._folder = folder
        known = _read_table(folder / "sweep.csv")
        for overrides in _swept_grid(_fixed_keys()):
            point = SweepJob(overrides)
            self._points[point.folder_name] = known.pop(point.folder_name, point)
        self._total = len(self._points)
        self._points |= known  # jobs of other values, or of an optimising sweeper
        log.info("sweep of %s points: %s", self._total or "unknown", folder)
        console = Console(stderr=True)
        if console.is_interactive and sys.stderr.isatty():
            live = Live(console=console, get_renderable=self._results_table, refresh_per_second=1)
            self._held.enter_context(live_display(live))

    @contextmanager
    def _mark_running(self, point: SweepJob, folder: Path) -> Iterator[None]:
        began = time.time()
        point.state, point.code, point.reason = "running", 0, ""
        log.info("%s: %s", point.folder_name, "goes on" if folder.exists() else "begins")
        try:
            yield
            point.state = "finished"
        except JobFailedError as failed:
            point.state, point.code, point.reason = "failed", failed.code, failed.reason
            raise
        except SystemExit as stop:
            point.code = exit_code(stop)
            point.state = "stopped" if point.code == STOPPED or point.code > 128 else "failed"
            point.reason = _failure_reason(folder, began)
            if point.state == "failed":
                raise JobFailedError(point.code, point.reason) from None
            log.info("the same command with run_dir=%s goes on with the sweep", self._folder)
            raise
        except BaseException:
            point.state = "stopped"
            raise
        finally:
            point.seconds += time.time() - began
            point.values = last_values(folder)
            self._save_table()
            words = [point.state, *_format_values(point.values)]
            words += [f"(exit {point.code}) {point.reason}"] if point.state == "failed" else []
            log.info("%s: %s", point.folder_name, "  ".join(words))

    def _save_table(self) -> None:
        """Write sweep.csv: a row for each job that was started."""
        assert self._folder is not None
        begun = [point for point in self._points.values() if point.state != "waiting"]
        keys = list(dict.fromkeys(key for point in begun for key in point.overrides))
        measured = list(dict.fromkeys(name for point in begun for name in point.values))
        text = io.StringIO()
        rows = csv.DictWriter(text, [*COLUMNS, *keys, *measured], lineterminator="\n")
        rows.writeheader()
        for p in begun:
            own = [p.folder_name, p.state, p.code, p.reason, round(p.seconds, 1)]
            rows.writerow(dict(zip(COLUMNS, own, strict=True)) | p.overrides | p.values)
        try:
            write_atomically(self._folder / "sweep.csv", text.getvalue())
        except OSError as error:
            log.warning("%s cannot be written: %s", self._folder / "sweep.csv", error)

    def _conclude_job(self, folder: Path) -> None:
        states = [point.state for point in self._points.values()]
        counts = {state: states.count(state) for state in dict.fromkeys(states)}
        told = ", ".join(f"{number} {state}" for state, number in counts.items())
        log.info("sweep: %s; %s", told, folder / "sweep.csv")
        try:
            for path in self._scratch.iterdir():
                shutil.copy(path, folder)
        except OSError as error:
            log.warning("%s cannot be written: %s", folder, error)
        if runs_in(folder):
            try:
                log.info("its report: %s", write_report([folder])[0])
            except (UserError, OSError) as error:
                log.warning("%s", error)

    def _results_table(self) -> Table:
        table = Table(title=f"sweep {self._folder}", title_justify="left")
        for column in ("point", "state", *SHOWN):
            table.add_column(column.replace("_", " "), overflow="fold")
        for name, point in list(self._points.items()):
            running = self._folder if point.state == "running" else None
            values = last_values(running / name) if running else point.values
            numbers = [f"{values[key]:.5g}" if key in values else "" for key in SHOWN]
            table.add_row(name, point.state, *numbers)
        return table


def _objective_value(values: dict[str, float], name: str) -> float:
    plain = name.removeprefix("eval_")
    for split in ("valid", "test"):
        if (value := values.get(f"{split}_{plain}")) is not None:
            return value
    there = sorted(key.partition("_")[2] for key in values if key.startswith("valid_"))
    missing = f"metrics.objective={name} was not measured, or is not finite"
    what = f"{missing}; there are: {', '.join(there)}"
    raise JobFailedError(2, what)


def _failure_reason(folder: Path, began: float) -> str:
    """Return the reason that a job failed: its last message."""
    status = read_status(folder)
    if status and status.reason and status.updated >= began:
        return status.reason.splitlines()[0]
    try:
        lines = (folder / LOG).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def _format_values(values: dict[str, float]) -> list[str]:
    return [f"{key} {values[key]:.5g}" for key in SHOWN if key in values]


def composed_job() -> SweepJob:
    """Return the job that Hydra has composed; ConfigError if its folder is swept."""
    point = SweepJob(_parse_pairs(HydraConfig.get().overrides.task, _fixed_keys()))
    if "run_dir" in point.overrides:
        raise ConfigError(
            "run_dir cannot be swept: it is the sweep's folder, and each point's is below it; "
            "give one run_dir"
        )
    return point


def _fixed_keys() -> set[str]:
    """Return the keys with a single value on the command line: all others are swept."""
    given = _given_overrides()
    swept = {word.key_or_group for word in given if word.is_sweep_override()}
    return {word.key_or_group for word in given} - swept


def _given_overrides() -> list[Override]:
    """Return the command line's overrides; none if Hydra cannot parse it."""
    words = [w for w in sys.argv[1:] if "=" in w and not w.startswith(("-", "hydra"))]
    try:
        return OverridesParser.create().parse_overrides(words)
    except OverrideParseException:
        return []


def _swept_grid(fixed: set[str]) -> list[dict[str, str]]:
    """Return the swept values of each job of Hydra's basic sweeper; unknown for others."""
    sweeper = HydraConfig.get().sweeper
    if not str(sweeper.get("_target_", "")).endswith("BasicSweeper"):
        return []
    params = [f"{key}={value}" for key, value in (sweeper.get("params") or {}).items()]
    parsed = _given_overrides() + OverridesParser.create().parse_overrides(params)
    (batch,) = BasicSweeper.split_arguments(parsed, None)
    return [_parse_pairs(words, fixed) for words in batch]


def _parse_pairs(words: Iterable[str], fixed: set[str]) -> dict[str, str]:
    pairs = (word.partition("=") for word in words)
    return {key: value for key, _, value in pairs if key not in fixed}


def _read_table(path: Path) -> dict[str, SweepJob]:
    """Return the jobs of a sweep.csv by name."""
    if not path.exists():
        return {}
    found = {}
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            values = last_values(path.parent / row["point"])
            overrides = {k: v for k, v in row.items() if k not in (*COLUMNS, *values) and v}
            found[row["point"]] = SweepJob(
                overrides,
                row["state"],
                int(row["code"]),
                row["reason"],
                float(row["seconds"]),
                values,
            )
    return found
