"""Step times of real runs on CPU ranks against the plan's, calibrated here.

`python launch/plan.py calibrate launch.ranks=2 batch_size=8` first; then
`python benchmarks/plan_cpu.py [ranks=2] [steps=40] [calibration=calibration.json] [words]` runs the
training loop with its data and metrics on a pool of ranks; words choose the rows that have all of
them in their name. Of the lines of metrics the first ones are left out, the median is taken. The
plan is told the mean length of the data's sequences, as a run's plan is. The last row of a job is
what `strategy=auto` chooses for the ranks.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import numpy as np
from hydra import compose, initialize_config_dir
from rich.console import Console
from rich.table import Table

from conf import schema
from conf.submit import ClusterConfig
from conf.validation.validate import fill_from_data
from launch.cli.auto import with_chosen_layout
from launch.cli.devices import Devices, devices_of
from launch.cli.layouts import list_schedule
from parallel.errors import ConfigError
from parallel.rank_pool import RankPool
from parallel.runtime import Runtime
from parallel.strategy import StrategyConfig, world_size
from trainer.config.train import TrainConfig
from trainer.data import open_split, prepare_data
from trainer.loop import train
from trainer.metrics.jsonl import NAME
from trainer.plan.cases import preset
from trainer.plan.layout import layout_of_job
from trainer.plan.layout_rules import micro_batch_size
from trainer.plan.result import planned_layout
from trainer.run.run_dir import open_run_dir

JOBS = ("language", "images", "translation", "speech", "detection", "chat")
AUTO = "auto"
OF_TWO = ("ddp", "fsdp", "tensor", "pipeline", "context")
OF_FOUR = (*OF_TWO, "hsdp", "hybrid")
EVERY, WARM_UP = 2, 10  # steps: of a line of metrics, left out
CLOSE = 0.15  # presets that differ by less have no order
QUIET = (
    "eval.every=0",
    "eval.test=false",
    "eval.samples=64",
    "checkpoint.every=0",
    "metrics.sample_tokens=0",
)


@dataclass(frozen=True)
class Row:
    """One run: seconds of a step, measured and predicted."""

    job: str
    name: str
    measured: float
    predicted: float

    @property
    def error(self) -> float:
        """Return the relative error of the prediction."""
        return self.predicted / self.measured - 1


def strategies(ranks: int) -> dict[str, StrategyConfig]:
    """Return seven layouts by name, and that which is chosen by plan."""
    found = {"single": preset("single", 1)} if ranks < 4 else {}
    found |= {name: preset(name, ranks) for name in (OF_TWO if ranks < 4 else OF_FOUR)}
    if ranks < 4:
        found["pipeline 1f1b"] = replace(found["pipeline"], schedule="1f1b")
    return found | {AUTO: StrategyConfig(auto="always")}


def configured(job: str, strategy: StrategyConfig, steps: int, run_dir: str) -> TrainConfig:
    """Return the complete configuration of an experiment under a strategy."""
    schema.register_schemas("now")
    words = [f"experiment={job}", f"steps={steps}", f"metrics.every={EVERY}", f"run_dir={run_dir}"]
    with initialize_config_dir(str(Path(schema.__file__).parent), version_base="1.3"):
        config = schema.build_config("train", compose("train", [*QUIET, *words]))
    assert isinstance(config, TrainConfig)
    config = replace(config, strategy=strategy, device="cpu")
    if strategy.auto == "no":
        config = replace(config, micro_batch_size=micro_batch_size(config, strategy))
    return fill_from_data(config, prepare_data(config.data))


def run_on_rank(runtime: Runtime, config: TrainConfig) -> None:
    """Train."""
    train(config, runtime)


def measured_seconds(pool: RankPool, config: TrainConfig) -> float:
    """Return the median of what the run's own metrics say of a step."""
    open_run_dir(config)
    pool.run(world_size(config.strategy), run_on_rank, config, timeout_seconds=600.0)
    lines = (Path(config.run_dir) / NAME).read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    return median(r["step_seconds"] for r in records if "step_seconds" in r and r["step"] > WARM_UP)


def measured_ranks(calibration: Path, ranks: int) -> Devices:
    """Return the ranks of this host as they were measured."""
    found = devices_of(ClusterConfig(gpu="cpu", ranks_per_node=ranks), "fp32", str(calibration))
    if not found.fit.calibrated:
        sys.exit(f"{calibration} is not there: python launch/plan.py calibrate launch.ranks=2")
    return found


def predicted_seconds(config: TrainConfig, calibration: Path) -> float:
    """Return the time of a step by the plan."""
    devices = measured_ranks(calibration, world_size(config.strategy))
    planner = devices.planner(config, open_split(config.data, "train").mean_length())
    layout = layout_of_job(config)
    return planned_layout(planner, layout, list_schedule).time.total


def ordered_pairs(rows: list[Row]) -> tuple[int, int]:
    """Return in how many pairs of a job's runs the order is right, and how many there are.

    Of those that differ by more than `CLOSE`.
    """
    right = pairs = 0
    for job in JOBS:
        for a, b in combinations([row for row in rows if row.job == job], 2):
            fast, slow = sorted((a, b), key=lambda row: row.measured)
            if slow.measured > (1 + CLOSE) * fast.measured:
                pairs += 1
                right += slow.predicted > fast.predicted
    return right, pairs


def measure_rows(pool: RankPool, options: dict[str, str], words: list[str]) -> Iterator[Row]:
    """Yield each run when it is done."""
    calibration = Path(options.get("calibration", "calibration.json"))
    for job in JOBS:
        for name, strategy in strategies(pool.size).items():
            if not all(word in f"{job} {name}" for word in words):
                continue
            with TemporaryDirectory() as folder:
                steps = int(options.get("steps", 40))
                try:
                    config = configured(job, strategy, steps, f"{folder}/run")
                except ConfigError as error:  # heads that are fewer than the ranks
                    print(f"{job} {name} is left out: {error}", file=sys.stderr)  # noqa: T201
                    continue
                if name == AUTO:
                    devices = measured_ranks(calibration, pool.size)
                    length = open_split(config.data, "train").mean_length()
                    config = with_chosen_layout(config, devices, pool.size, (), length)
                predicted = predicted_seconds(config, calibration)
                yield Row(job, name, measured_seconds(pool, config), predicted)


def main(arguments: list[str]) -> None:
    """Print the table, each row as it is measured, and the errors."""
    options = dict(word.split("=", 1) for word in arguments if "=" in word)
    pool, rows = RankPool(int(options.get("ranks", 2))), []
    table = Table("job", "layout", "measured ms", "predicted ms", "error")
    progress = Console(stderr=True)
    for row in measure_rows(pool, options, [word for word in arguments if "=" not in word]):
        rows.append(row)
        times = f"{1e3 * row.measured:.1f}", f"{1e3 * row.predicted:.1f}", f"{row.error:+.0%}"
        table.add_row(row.job, row.name, *times)
        progress.print(row.job, row.name, *times)
    pool.close()
    console = Console()
    console.print(table)
    for job in JOBS:
        times = {row.name: row.measured for row in rows if row.job == job}
        if chosen := times.pop(AUTO, 0.0):
            more = chosen / min(times.values(), default=chosen) - 1
            console.print(f"{job}: strategy=auto takes {more:+.0%} of the fastest of these")
    rows = [row for row in rows if row.name != AUTO]
    if not rows:
        return
    errors = [abs(row.error) for row in rows]
    right, pairs = ordered_pairs(rows)
    console.print(
        f"{len(rows)} runs: median error {median(errors):.1%}, nine of ten within "
        f"{np.quantile(errors, 0.9):.1%}; order right in {right} of {pairs} pairs that differ by "
        f"more than {CLOSE:.0%}"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
