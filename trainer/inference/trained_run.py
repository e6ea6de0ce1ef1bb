"""A trained model, from a run's newest checkpoint or from what was exported of it."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console

from parallel.parallel_model import ParallelModel
from parallel.runtime import Runtime
from parallel.strategy import StrategyConfig
from trainer.build import build_worker
from trainer.checkpoint.restore import load_weights
from trainer.checkpoint.vocabulary import carried_rows
from trainer.compress.structured_pruning import removed
from trainer.config.train import (
    CompressConfig,
    DataConfig,
    EvaluateConfig,
    ExportConfig,
    GenerateConfig,
    TeachConfig,
    TrainConfig,
)
from trainer.data import open_tokenizer
from trainer.data.record import TOKENIZER, data_of, read_record
from trainer.data.tokenizer import Tokenizer
from trainer.inference import export
from trainer.model import Transformer
from trainer.precision import resolve_precision
from trainer.run.run_dir import EXPORTED, load_config


@dataclass(frozen=True)
class TrainedRun:
    """A run, and its newest model on the ranks there are now."""

    config: TrainConfig
    worker: ParallelModel

    def tokenizer(self) -> Tokenizer:
        """Return the tokenizer that the model learned with."""
        return Tokenizer.load(Path(self.config.run_dir) / TOKENIZER)

    @property
    def data(self) -> DataConfig:
        """Its data section, read with the tokenizer or classes that it learned with."""
        return data_of(self.config)


def open_run(
    config: GenerateConfig | EvaluateConfig | TeachConfig,
    runtime: Runtime,
    compress: CompressConfig | None = None,
    integers: bool = True,
) -> TrainedRun:
    """Return the newest good checkpoint of config.run_dir, or the export that it holds instead.

    Under config.strategy, and under `compress` in place of the run's; ConfigError if there is
    neither. With `integers` an export is for reading alone: its layers keep whole numbers where
    kernels fit.
    """
    run = load_config(config.run_dir)
    here = replace(
        run,
        run_dir=config.run_dir,
        compress=compress or run.compress,
        strategy=config.strategy,
        precision=config.precision,
        device=config.device,
        activation_checkpointing="none",
        compile=False,
    )
    worker = build_worker(here, runtime)
    load(Path(config.run_dir), worker)
    whole = worker.mesh["replicate"].size() == worker.mesh.size()  # on each rank
    if integers and whole and worker.device.type == "cpu" and is_export(config.run_dir):
        export.compute_with_integers(transformer(worker))
    return TrainedRun(here, worker)


def is_export(run_dir: str | Path) -> bool:
    """Return whether a folder holds an exported model instead of checkpoints."""
    return (Path(run_dir) / EXPORTED).exists()


def load(run_dir: Path, worker: ParallelModel, rows: list[int] | None = None) -> None:
    """Read the weights of a run's newest good checkpoint, or of an export, into a worker's model.

    `rows`: of each token or class, its row there, -1 for none (carried.py); None = they are alike.
    Raises ConfigError if there are none, or if they are another model's.
    """
    if is_export(run_dir):
        export.load(run_dir, worker, load_config(run_dir).compress, rows)
    else:
        load_weights(run_dir, worker, rows)


def load_first(init_from: str, run_dir: str, data: DataConfig, worker: ParallelModel) -> None:
    """Begin with the weights of `init_from`; rows of other tokens or classes stay as drawn.

    `data` is what the run in `run_dir` learns from.
    """
    facts, tokenizer = read_record(run_dir), open_tokenizer(data)
    assert facts is not None, run_dir
    rows = carried_rows(init_from, facts, tokenizer)
    load(Path(init_from), worker, rows.theirs if rows else None)


def smaller(run: TrainedRun, runtime: Runtime) -> TrainedRun:
    """Return the run as it is used, on one rank: without the heads and channels that it prunes."""
    if run.config.compress.prune_heads == run.config.compress.prune_ffn == 0.0:
        return run
    model, weights = removed(run.config.model, run.config.compress, transformer(run.worker))
    compress = replace(run.config.compress, prune_heads=0.0, prune_ffn=0.0)
    config = replace(run.config, model=model, compress=compress)
    worker = build_worker(config, runtime)
    with torch.no_grad():
        for name, parameter in worker.parameters().items():
            parameter.copy_(weights[name])
    return TrainedRun(config, worker)


def transformer(worker: ParallelModel) -> Transformer:
    """Return the worker's model, of which parallel/ knows what it asks of any."""
    assert isinstance(worker.model, Transformer)
    return worker.model


def export_run(config: ExportConfig, runtime: Runtime, say: bool = True) -> None:
    """Write config.to, from the newest good checkpoint of config.run_dir.

    config.compress is complete: what the run was trained with, and what is compressed just here.
    """
    reader = EvaluateConfig(
        config.run_dir, strategy=StrategyConfig(), precision="fp32", device=config.device
    )
    run = smaller(open_run(reader, runtime, config.compress, integers=False), runtime)
    asked = load_config(config.run_dir)
    asked = replace(asked, model=run.config.model, compress=run.config.compress)
    dtype = resolve_precision(config.precision, run.worker.device).compute
    export.write(run.worker, asked, dtype, Path(config.run_dir), Path(config.to))
    size = (Path(config.to) / EXPORTED).stat().st_size
    if say:
        Console().print(f"exported: {config.to}, {size / 1e6:.3g} MB", markup=False, soft_wrap=True)
