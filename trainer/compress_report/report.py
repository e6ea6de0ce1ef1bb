"""Report on a compressed run: a table and a figure, compared with a baseline run."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from rich.console import Console
from rich.table import Table

from parallel.runtime import Runtime
from parallel.strategy import StrategyConfig
from trainer.compress.compression import Compression
from trainer.compress.packing import pack_weight
from trainer.compress.quantized_linear import CompressedLinear, nm_pruned
from trainer.compress_report.throughput import (
    infer_batch,
    load_batch,
    on_cores,
    time_in_turn,
    train_batch,
)
from trainer.config.train import (
    CompressReportConfig,
    ConfigError,
    EvaluateConfig,
    ExportConfig,
    non_default_options,
)
from trainer.data import prepare_data
from trainer.inference.trained_run import (
    TrainedRun,
    export_run,
    is_export,
    load_trained_run,
    strip_pruned,
    unwrap_transformer,
)
from trainer.metrics.console import print_whole
from trainer.metrics.jsonl import last_values
from trainer.nn.flops import flops_per_sample
from trainer.run.run_dir import load_config

NAME = "compression.png"
METRICS = ("test_bleu", "test_accuracy", "test_bits_per_character", "test_loss", "valid_loss")


@dataclass
class RunFigures:
    """Measurements of a run; `training` and `inference` are samples per second, by round."""

    name: str
    compress: str
    metric: str
    parameters: int
    bytes: int  # size of the exported weights
    flops: float  # training FLOPs per sample
    lengths: list[int]  # sequence length at the input of each block; empty = full
    zeros: float  # fraction of zero weights between embedding and head
    training: list[float] = field(default_factory=list)
    inference: list[float] = field(default_factory=list)
    spread: dict[str, float] = field(default_factory=dict)  # inference by layout, samples/s

    @property
    def training_rate(self) -> float:
        """Return the median of the rounds."""
        return median(self.training)

    @property
    def inference_rate(self) -> float:
        """Return the median of the rounds."""
        return median(self.inference)


def write_comparison(config: CompressReportConfig, runtime: Runtime) -> None:
    """Print the table and write run_dir/compression.png, from the runs' newest checkpoints.

    Rates are measured alternately between the runs, per second of CPU time: a forward and backward
    of one batch of the run's size, and a forward of the exported model, with integer kernels if
    they support it. On several cores and ranks of this host they are per second of wall time.
    Raises ConfigError if the runs have different data.
    """
    names = [name for name in (config.baseline, config.run_dir) if name]
    reader = EvaluateConfig(strategy=StrategyConfig(), precision="fp32", device=config.device)
    trains = [
        strip_pruned(
            load_trained_run(replace(reader, run_dir=name), runtime, integers=False), runtime
        )
        for name in names
    ]
    if trains[0].config.data != trains[-1].config.data:
        raise ConfigError(
            f"baseline={config.baseline} was trained on other data than run_dir="
            f"{config.run_dir}; name a run that differs only in model and compress"
        )
    prepare_data(trains[0].data_config)
    found = [_run_figures(name, run) for name, run in zip(names, trains, strict=True)]
    with TemporaryDirectory() as scratch:  # inference is measured on exports
        folders = [
            _export_run(name, Path(scratch) / str(number), runtime)
            for number, name in enumerate(names)
        ]
        reads = [load_trained_run(replace(reader, run_dir=folder), runtime) for folder in folders]
        _measure_rates(found, trains, reads, config.rounds)
        if runtime.device.type == "cpu":
            spread = on_cores(folders, [run.config.model for run in reads], config.rounds)
            for number, facts in enumerate(found):
                facts.spread = {name: rates[number] for name, rates in spread.items()}
    path = Path(config.run_dir) / NAME
    _draw_comparison(found, path)
    console = Console()
    print_whole(comparison_table(found))
    console.print(f"picture: {path}", markup=False, soft_wrap=True)


def _measure_rates(
    found: list[RunFigures], trains: list[TrainedRun], reads: list[TrainedRun], rounds: int
) -> None:
    """Measure the rates on one rank, by CPU time, or by wall time on a GPU."""
    batch = load_batch(trains[-1])
    clock = time.perf_counter if batch["targets"].is_cuda else time.process_time
    training, inference = (
        time_in_turn(work, [run.worker for run in runs], batch, rounds, clock)
        for work, runs in ((train_batch, trains), (infer_batch, reads))
    )
    for number, facts in enumerate(found):
        facts.training, facts.inference = training[number], inference[number]


def _export_run(name: str, to: Path, runtime: Runtime) -> str:
    """Return the folder of a run's export; `name` itself if it is an export."""
    if is_export(name):
        return name
    export_run(ExportConfig(name, str(to), compress=load_config(name).compress), runtime, say=False)
    return str(to)


def _run_figures(name: str, run: TrainedRun) -> RunFigures:
    config, model = run.config, unwrap_transformer(run.worker)
    lens = Compression(config.compress).lens
    compressed = [module for module in model.modules() if isinstance(module, CompressedLinear)]
    parts = [pack_weight(module.weight.detach(), lens) for module in compressed]
    inside = sum(module.weight.numel() for module in compressed)
    parameters = sum(p.numel() for p in run.worker.parameters().values())
    size = sum(tensor.nbytes for part in parts for tensor in part.values())
    length = config.data.seq_len
    lengths = model.block_lengths(length)
    values = last_values(Path(name))
    metric = next((key for key in METRICS if key in values), "")
    changed = non_default_options(load_config(name).compress)  # including pruning, unlike `config`
    zeros = [
        nm_pruned(m.weight.detach(), lens.n, lens.m) if lens.n else m.weight for m in compressed
    ]
    return RunFigures(
        name,
        " ".join(f"{key}={value}" for key, value in changed.items()) or "none",
        f"{metric.removeprefix('test_')} {values[metric]:.4g}" if metric else "not measured",
        parameters,
        size + 4 * (parameters - inside),
        flops_per_sample(config.model, length, length, lengths),
        lengths,
        sum(int((weight == 0).sum()) for weight in zeros) / max(1, inside),
    )


def comparison_table(found: list[RunFigures]) -> Table:
    """Return a table with a column per run; with two, also the ratio of the second to the first."""
    shown = Table(*["", *(facts.name for facts in found)])
    if len(found) > 1:
        shown.add_column("ratio", justify="right")
    rows: list[tuple[str, Callable[[RunFigures], str], Callable[[RunFigures], float] | None]] = [
        ("compress", lambda f: f.compress, None),
        ("metric", lambda f: f.metric, None),
        ("parameters", lambda f: f"{f.parameters:,}", lambda f: f.parameters),
        ("MB on disk", lambda f: f"{f.bytes / 1e6:.3g}", lambda f: f.bytes),
        ("GFLOP per sample", lambda f: f"{f.flops / 1e9:.3g}", lambda f: f.flops),
        ("length by block", lambda f: " ".join(map(str, f.lengths)) or "all", None),
        ("zeros", lambda f: f"{f.zeros:.1%}", None),
        ("training, samples/s", lambda f: f"{f.training_rate:.4g}", lambda f: f.training_rate),
        ("inference, samples/s", lambda f: f"{f.inference_rate:.4g}", lambda f: f.inference_rate),
    ]
    for layout in found[0].spread:
        rate = partial(_spread_rate, layout)
        rows.append((f"  {layout}", partial(_spread_text, layout), rate))
    for name, text, number in rows:
        ratio = f"{number(found[-1]) / number(found[0]):.3g}" if number else ""
        shown.add_row(name, *map(text, found), *[ratio] * (len(found) > 1))
    return shown


def _spread_rate(layout: str, facts: RunFigures) -> float:
    return facts.spread[layout]


def _spread_text(layout: str, facts: RunFigures) -> str:
    return f"{facts.spread[layout]:.4g}"


def _draw_comparison(found: list[RunFigures], path: Path) -> None:
    """Plot sequence lengths by block and the ratios; raises ConfigError if it cannot be written."""
    pyplot = import_module("matplotlib.pyplot")  # imported only here: it takes 0.5 s
    pyplot.switch_backend("agg")
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for facts in found:
        blocks = range(1, len(facts.lengths) + 1)
        axes[0].plot(blocks, facts.lengths, marker="o", label=f"{facts.name}: {facts.compress}")
    axes[0].set(title="sequence length by block", xlabel="block", ylim=(0, None))
    axes[0].xaxis.get_major_locator().set_params(integer=True)
    axes[0].legend(fontsize="small")
    bars = {
        "training\nsamples/s": lambda f: f.training_rate,
        "inference\nsamples/s": lambda f: f.inference_rate,
        "FLOPs\nper sample": lambda f: f.flops,
        "bytes\non disk": lambda f: f.bytes,
    }
    values = [number(found[-1]) / number(found[0]) for number in bars.values()]
    container = axes[1].bar(list(bars), values, color=["C1", "C1", "C2", "C2"])
    axes[1].bar_label(container, fmt="%.2f")
    axes[1].margins(y=0.1)  # space for the bar labels
    axes[1].axhline(1.0, color="grey", linewidth=0.8)
    axes[1].set(title=f"{found[-1].name} / {found[0].name}")
    try:
        figure.savefig(path, dpi=110)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error.strerror})") from error
    finally:
        pyplot.close(figure)
