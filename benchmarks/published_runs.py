"""Predict the step time of published runs, and fit the constants of `launch/plan.py` to them.

`python benchmarks/published_runs.py CSV` predicts each source by constants fitted to all others,
and takes the predicted best layout of each published sweep; `--kin` leaves out a source's kin too;
`--fit` writes trainer/plan/fitted.json. The CSV's columns are described beside it.
"""

import argparse
import csv
import math
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

import numpy as np
from rich.console import Console
from rich.table import Table
from scipy.optimize import least_squares

from parallel.strategy import StrategyConfig
from trainer.plan.constants import FITTED, Constants, Fit, fitted_text
from trainer.plan.layout import Layout
from trainer.plan.machine import Machine, named_machine
from trainer.plan.step_time import StepTime, TimeModel
from trainer.plan.work import BlockWork, Stack, Work

COMMAND = "python benchmarks/published_runs.py published-calibrate.csv --fit"
NOISE = 0.1  # errors beyond which count in proportion, not by their square
# What is expected of a constant, and its spread in the logarithm: data sheets say nothing of them,
# but a source that is left out should not take all knowledge of one with it.
EXPECTED = {
    "product_ampere": (0.79, 0.1),
    "product_hopper": (0.72, 0.1),
    "attention_ampere": (0.5, 0.25),
    "attention_hopper": (0.35, 0.25),
    "attention_unfused": (0.4, 0.3),
    "attention_cudnn": (1.7, 0.25),
    "attention_backward": (0.8, 0.2),
    "float8": (1.65, 0.12),
    "half_tokens": (100.0, 0.7),
    "half_width": (200.0, 0.7),
    "odd_width": (0.8, 0.1),
    "pointwise": (3.3, 0.5),
    "fused": (0.83, 0.3),
    "launch_seconds": (700e-6, 0.4),
    "network": (0.75, 0.2),
    "link": (0.5, 0.2),
    "latency_seconds": (50e-6, 0.7),
    "overlap": (0.7, 0.4),
    "overlap_sharded": (0.4, 0.5),
    "tensor_hidden": (0.9, 0.2),
    "optimizer": (0.7, 0.1),
}
AT_MOST_ONE = (
    *("product_ampere", "product_hopper", "fused", "network", "link", "overlap", "overlap_sharded"),
    *("tensor_hidden", "odd_width", "optimizer"),
)
DEVICES = {"A100": "a100", "H100": "h100", "H100-96G-500W": "h100", "H200": "h200", "V100": "v100"}
LOW_POWER = math.sqrt(500 / 700)  # of a card limited to 500 W: its clock's share
LOW_POWER_BANDWIDTH = 2.4e12  # bytes/s of HBM2e
RECOMPUTED = {"layer2": "every_second", "selective": "half"}  # words of the file → ours
KIN = {"mosaicml": "mosaicml", "nvidia-dgxc": "nvidia", "nemo": "nvidia", "megatron": "nvidia"}

# What the sources say of their stacks.
BY_HAND = ("bigscience", "megatron", "nvidia", "nemo", "megascale", "internevo", "paxml")
CUDNN = ("nvidia-dgxc", "nemo-fp8")
HIDING_SUMS = ("nvidia", "nemo", "internevo", "paxml")
TORCH_CHECKPOINT = ("mosaicml", "torchtitan", "fms-fsdp")  # not reentrant: it stops early
SUMS_OF_16_BITS = ("mosaicml", "internevo")


@dataclass(frozen=True)
class Run:
    """One row: what was run, and its time."""

    group: str
    name: str
    sweep: tuple[str, ...]  # runs of one model on one cluster share it
    seconds: float
    work: Work
    machine: Machine
    layout: Layout
    strategy: StrategyConfig

    def predict(self, constants: Constants) -> StepTime:
        """Return the predicted time."""
        return TimeModel(self.work, self.machine, constants, self.strategy).step(self.layout)


def micro_batches_of(row: dict[str, str]) -> tuple[int, int]:
    """Return the samples of a micro-batch, and the micro-batches of a rank's step.

    torchtitan makes as many micro-batches as there are pipeline stages. Where the file has assumed
    micro-batches of one sample (405B), interleaved would be 1.10 times as fast as 1f1b by the
    bubbles; with one for each rank it would be 1.30, and 1.28 was measured.
    """
    micro_batch, count = int(row["micro_batch"]), int(row["micro_batches"])
    if "micro-batch size 1 assumed" in row["note"]:
        return micro_batch * count // int(row["pipeline"]), int(row["pipeline"])
    return micro_batch, count


def read_runs(path: Path) -> list[Run]:
    """Read the rows that ran and have a time."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return [_run(row) for row in rows if row["status"] == "ok" and row["step_seconds"]]


def _run(row: dict[str, str]) -> Run:
    strategy = StrategyConfig(sequence_parallel=row["sequence_parallel"] == "1")
    layout = _layout(row)
    sweep = ("group", "model", "gpu", "gpus", "precision", "seq_len", "global_batch")
    return Run(
        row["group"],
        row["id"],
        tuple(row[column] for column in sweep),
        float(row["step_seconds"]),
        _work(row, layout),
        _machine(row),
        layout,
        strategy,
    )


def _layout(row: dict[str, str]) -> Layout:
    number = {column: int(row[column]) for column in row if row[column].isdecimal()}
    replicate, shard = number["replicate"], number["shard"]
    if number["zero"] < 2 or (number["zero"] == 2 and "mosaicml" not in row["group"]):
        replicate, shard = replicate * shard, 1
    return Layout(
        number["pipeline"],
        replicate,
        shard,
        number["context"],
        number["tensor"],
        "all_gather",
        row["schedule"] or "1f1b",
        number["stages_per_rank"],
        micro_batches_of(row)[0],
        RECOMPUTED.get(row["ac"], row["ac"]),
    )


def _machine(row: dict[str, str]) -> Machine:
    precision = row["precision"]
    found = named_machine(
        DEVICES[row["gpu"]],
        precision,
        int(row["gpus_per_node"]),
        network_gbit=float(row["inter_gbit_per_gpu"]),
    )
    assert found is not None, row["id"]
    if row["gpu"] == "A100" and row["gpu_mem_gb"] == "40":
        found = replace(found, memory_bandwidth=1.555e12)
    if row["gpu"].endswith("500W"):
        found = replace(
            found,
            products=found.products * LOW_POWER,
            attention=found.attention * LOW_POWER,
            memory_bandwidth=LOW_POWER_BANDWIDTH,
        )
    return found


def _work(row: dict[str, str], layout: Layout) -> Work:
    number = {column: int(row[column]) for column in row if row[column].isdecimal()}
    block, stack = _block(number), _stack(row, layout)
    layers, width, vocabulary = number["layers"], number["width"], number["vocab"]
    length, ends = number["seq_len"], _counted_ends(row)
    zero, copies = number["zero"], number["replicate"] * number["shard"] * number["context"]
    states = copies if zero in (1, 2) and not stack.shards_gradients else 1
    if stack.state_ranks:
        states = stack.state_ranks
    update = 2 * number["optim_bytes"] + number["grad_bytes"] + 2 * number["param_bytes"]
    return Work(
        blocks=(block,) * layers,
        costs=(1.0 + ends, *(1.0,) * (layers - 2), 1.0 + ends),
        width=width,
        logits=float(length * vocabulary),
        head=float(length * vocabulary * width),
        outer_weights=vocabulary * width * (1 if number["tied"] else 2),
        samples=number["micro_batch"] * number["micro_batches"] * layout.data_ranks,
        flops=0.0,
        tokens=length,
        compute_bytes=2,
        sum_bytes=2 if row["group"].startswith(SUMS_OF_16_BITS) else number["grad_bytes"],
        update_bytes=update / states,
        stack=stack,
    )


def _counted_ends(row: dict[str, str]) -> float:
    """Return what embedding and head weigh, in blocks, where a source cut its pipeline."""
    return 1.0 if "count as layers of the cut" in row["note"] else 0.0


def _block(number: dict[str, int]) -> BlockWork:
    length, width, inner = number["seq_len"], number["width"], number["ffn_width"]
    heads, groups, size = number["heads"], number["kv_heads"], number["head_width"]
    matrices = 3 if number["gated"] else 2
    weights = 2 * width * (heads + groups) * size + matrices * width * inner
    scores = 2.0 * length * length * heads * size / (2 if number["flash"] else 1)
    return BlockWork(
        *(length, width, heads, groups, size, inner, bool(number["gated"])),
        *(length * weights, scores, weights + 2 * width),
    )


def _stack(row: dict[str, str], layout: Layout) -> Stack:
    group = row["group"]
    return Stack(
        fused_attention=row["flash"] == "1",
        cudnn_attention=group.startswith(CUDNN),
        fused_pointwise=row["compile"] == "1" or group.startswith(BY_HAND),
        hides_tensor=row["tp_overlap"] == "1",
        hides_sum=group.startswith(HIDING_SUMS),
        state_ranks=int(row["shard"]) if re.search(r"over \d ranks", row["note"]) else 0,
        shards_gradients=row["zero"] == "3" or layout.shard > 1,
        per_parameter=group.startswith("torchtitan"),
        gathers_again=row["zero"] == "3",
        staged_scatter=group.startswith("torchtitan"),
        float8=row["precision"] == "fp8",
        stops_early=group.startswith(TORCH_CHECKPOINT),
    )


def fit_constants(runs: Sequence[Run], start: Constants | None = None) -> Constants:
    """Return the constants that fit these runs' logarithmic times best; large groups weigh less."""
    names = list(EXPECTED)
    expected = np.log([EXPECTED[name][0] for name in names])
    spreads = np.array([EXPECTED[name][1] for name in names])
    measured = np.log([run.seconds for run in runs])
    sizes: defaultdict[str, int] = defaultdict(int)
    for run in runs:
        sizes[run.group] += 1
    weights = np.array([sizes[run.group] ** -0.35 for run in runs])
    weights *= math.sqrt(200 / len(runs)) / weights.mean()

    def constants_at(point: np.ndarray) -> Constants:
        return Constants(**dict(zip(names, np.exp(point).tolist(), strict=True)))

    def residuals(point: np.ndarray) -> np.ndarray:
        constants = constants_at(point)
        predicted = np.log([run.predict(constants).total for run in runs])
        squared = ((predicted - measured) / NOISE) ** 2
        robust = np.sqrt(2 * (np.sqrt(1 + squared) - 1))
        return np.concatenate([weights * robust, (point - expected) / spreads])

    most = np.array([0.0 if name in AT_MOST_ONE else np.inf for name in names])
    begin = expected if start is None else np.log([getattr(start, name) for name in names])
    bounds = (-np.inf, most + 1e-6)
    found = least_squares(
        residuals, begin, bounds=bounds, x_scale=spreads, max_nfev=30 if start is None else 3
    )
    return constants_at(found.x)


def cross_validate(runs: Sequence[Run], kin: bool, start: Constants) -> dict[str, float]:
    """Return each run's time, predicted by constants fitted to all other sources.

    Only the first point of the fit knows all sources.
    """
    predicted = {}
    for group in sorted({run.group for run in runs}):
        others = [run for run in runs if _family(run.group, kin) != _family(group, kin)]
        constants = fit_constants(others, start)
        for run in runs:
            if run.group == group:
                predicted[run.name] = run.predict(constants).total
    return predicted


def _family(group: str, kin: bool) -> str:
    return next((name for start, name in KIN.items() if kin and group.startswith(start)), group)


@dataclass(frozen=True)
class Errors:
    """Relative errors: as predicted, and with one factor for each source."""

    plain: list[float]
    by_factor: list[float]
    bias: float = 0.0

    def cells(self) -> list[str]:
        """Return the cells of a table's row."""
        shown = [f"{len(self.plain)}", f"{self.bias:+.1%}"]
        for errors in (self.plain, self.by_factor):
            shown += [f"{median(errors):.1%}", f"{np.quantile(errors, 0.9):.1%}"]
        return shown


def errors_of(runs: Iterable[Run], predicted: dict[str, float]) -> Errors:
    """Return the errors of one source's runs."""
    logs = [math.log(predicted[run.name] / run.seconds) for run in runs]
    middle = median(logs)
    plain = [abs(math.expm1(log)) for log in logs]
    return Errors(plain, [abs(math.expm1(log - middle)) for log in logs], math.expm1(middle))


def print_errors(runs: Sequence[Run], predicted: dict[str, float], title: str) -> Errors:
    """Print the errors by source; return those of all runs."""
    table = Table("source", "runs", "bias", "median", "90th", "one factor", "90th", title=title)
    every = Errors([], [])
    for group in sorted({run.group for run in runs}):
        found = errors_of([run for run in runs if run.group == group], predicted)
        table.add_row(group, *found.cells())
        every.plain.extend(found.plain)
        every.by_factor.extend(found.by_factor)
    table.add_section()
    table.add_row("all", *every.cells())
    Console(width=100).print(table)
    return every


def regrets(runs: Sequence[Run], predicted: dict[str, float]) -> dict[tuple[str, ...], float]:
    """Return for each sweep how much slower the layout predicted best is than the measured best."""
    sweeps = defaultdict(list)
    for run in runs:
        sweeps[run.sweep].append(run)
    found = {}
    for sweep, members in sweeps.items():
        if len({run.layout for run in members}) < 3:
            continue
        chosen = min(members, key=lambda run: predicted[run.name])
        found[sweep] = chosen.seconds / min(run.seconds for run in members) - 1
    return found


def main(arguments: list[str]) -> None:
    """Print the errors of predictions, and write the fitted constants if asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("csv", type=Path, help="the published runs; nothing is done without them")
    parser.add_argument("--fit", action="store_true", help=f"write {FITTED.name}")
    parser.add_argument("--kin", action="store_true", help="leave out a source's kin as well")
    parser.add_argument("--fresh", action="store_true", help="fit from what is expected, longer")
    given = parser.parse_args(arguments)
    if not given.csv.exists():
        print(f"{given.csv} is not there: nothing to predict")  # noqa: T201
        return
    runs = read_runs(given.csv)
    known = Fit.read().constants if FITTED.exists() and not given.fresh else None
    constants = fit_constants(runs, known)
    inside = {run.name: run.predict(constants).total for run in runs}
    print_errors(runs, inside, "fitted to all of these")
    outside = cross_validate(runs, given.kin, constants)
    every = print_errors(runs, outside, "each source by constants fitted without it")
    losses = regrets(runs, outside)
    for sweep, loss in losses.items():
        print(f"{loss:6.1%} lost by the predicted best of {' '.join(sweep)}")  # noqa: T201
    print(f"{median(losses.values()):6.1%} in the median")  # noqa: T201
    if given.fit:
        fit = Fit(constants, median(every.plain), float(np.quantile(every.plain, 0.9)))
        FITTED.write_text(fitted_text(fit, {"made_by": COMMAND, "runs": len(runs)}))
    print({name: float(f"{value:.3g}") for name, value in asdict(constants).items()})  # noqa: T201


if __name__ == "__main__":
    main(sys.argv[1:])
