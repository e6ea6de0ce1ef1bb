"""Load a trained model from a run's newest checkpoint or from an export."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console

from parallel.parallel_model import ParallelModel
from parallel.runtime import Runtime
from parallel.strategy import StrategyConfig
from trainer.build import build_worker
from trainer.checkpoint.restore import base_weights, load_weights
from trainer.checkpoint.vocabulary import map_vocabulary
from trainer.checkpoint.weight_digest import weight_digests
from trainer.compress.structured_pruning import remove_pruned
from trainer.config.train import (
    CompressConfig,
    DataConfig,
    EvaluateConfig,
    ExportConfig,
    GenerateConfig,
    LoraConfig,
    TeachConfig,
    TrainConfig,
    used_compression,
)
from trainer.data import open_tokenizer
from trainer.data.record import TOKENIZER, data_of, read_record
from trainer.data.tokenizer import Tokenizer
from trainer.huggingface.registry import is_model_folder
from trainer.huggingface.weights import load_folder
from trainer.inference import export
from trainer.inference.huggingface import export_adapter, export_folder
from trainer.inference.weights import load_merged
from trainer.model import Transformer
from trainer.precision import resolve_precision
from trainer.run.run_dir import EXPORTED, load_config


@dataclass(frozen=True)
class TrainedRun:
    """A run and its newest model, on the current ranks."""

    config: TrainConfig
    worker: ParallelModel

    def load_tokenizer(self) -> Tokenizer:
        """Return the tokenizer that the model was trained with."""
        return Tokenizer.load(Path(self.config.run_dir) / TOKENIZER)

    @property
    def data_config(self) -> DataConfig:
        """Return its data section, with the tokenizer or classes that it was trained with."""
        return data_of(self.config)


def load_trained_run(
    config: GenerateConfig | EvaluateConfig | TeachConfig,
    runtime: Runtime,
    compress: CompressConfig | None = None,
    integers: bool = True,
) -> TrainedRun:
    """Load the newest valid checkpoint of config.run_dir, or the export that it holds instead.

    The model is built under config.strategy; `compress` replaces the run's. Raises ConfigError if
    there is neither. With `integers` an export is loaded for inference only: layers that integer
    kernels support hold int8 weights.
    """
    run = load_config(config.run_dir)
    loaded = replace(
        run,
        run_dir=config.run_dir,
        compress=compress or used_compression(run),
        lora=LoraConfig(),  # its adapters are merged
        strategy=config.strategy,
        precision=config.precision,
        device=config.device,
        activation_checkpointing="none",
        compile=False,
    )
    worker = build_worker(loaded, runtime)
    load_run_weights(Path(config.run_dir), worker)
    replicated = worker.mesh["replicate"].size() == worker.mesh.size()  # full model on each rank
    if integers and replicated and worker.device.type == "cpu" and is_export(config.run_dir):
        export.compute_with_integers(unwrap_transformer(worker))
    return TrainedRun(loaded, worker)


def is_export(run_dir: str | Path) -> bool:
    """Return whether a folder holds an exported model instead of checkpoints."""
    return (Path(run_dir) / EXPORTED).exists()


def load_run_weights(run_dir: Path, worker: ParallelModel, rows: list[int] | None = None) -> None:
    """Load the weights of a run, an export or a Hugging Face folder into a worker's model.

    Of a run, those of its newest valid checkpoint. `rows`: for each token or class its row there,
    -1 = none (checkpoint/vocabulary.py); None = the rows are identical. Raises ConfigError if there
    are no weights, or if they belong to another model.
    """
    if is_model_folder(run_dir):
        load_folder(run_dir, base_weights(worker), rows)
    elif is_export(run_dir):
        export.load_export(run_dir, worker, load_config(run_dir).compress, rows)
    elif load_config(run_dir).lora.rank:
        load_merged(run_dir, base_weights(worker), rows)
    else:
        load_weights(run_dir, worker, rows)


def load_initial_weights(
    init_from: str, run_dir: str, data: DataConfig, worker: ParallelModel
) -> None:
    """Load the weights of `init_from`; rows of new tokens or classes stay as initialised.

    `data` is the data section of the run in `run_dir`.
    """
    facts, tokenizer = read_record(run_dir), open_tokenizer(data)
    assert facts is not None, run_dir
    rows = map_vocabulary(init_from, facts, tokenizer)
    load_run_weights(Path(init_from), worker, rows.theirs if rows else None)


def load_frozen_weights(config: TrainConfig, worker: ParallelModel) -> dict[str, str]:
    """Load the weights that no checkpoint holds, from init_from, and return their digests."""
    frozen = {n: p for n, p in worker.parameters().items() if not p.requires_grad}
    if config.lora.rank and config.init_from:
        load_initial_weights(config.init_from, config.run_dir, data_of(config), worker)
    return weight_digests(frozen)


def strip_pruned(run: TrainedRun, runtime: Runtime) -> TrainedRun:
    """Return the run without the heads and channels that it prunes, on one rank."""
    if run.config.compress.prune_heads == run.config.compress.prune_ffn == 0.0:
        return run
    model, weights = remove_pruned(
        run.config.model, run.config.compress, unwrap_transformer(run.worker)
    )
    compress = replace(run.config.compress, prune_heads=0.0, prune_ffn=0.0)
    config = replace(run.config, model=model, compress=compress)
    worker = build_worker(config, runtime)
    with torch.no_grad():
        for name, parameter in worker.parameters().items():
            parameter.copy_(weights[name])
    return TrainedRun(config, worker)


def unwrap_transformer(worker: ParallelModel) -> Transformer:
    """Return the worker's model as a Transformer; parallel/ knows its protocol alone."""
    assert isinstance(worker.model, Transformer)
    return worker.model


def export_run(config: ExportConfig, runtime: Runtime, say: bool = True) -> None:
    """Export the newest valid checkpoint of config.run_dir to config.output_dir.

    config.compress is complete: the settings of training, and those applied at export only.
    """
    to, dtype = Path(config.output_dir), resolve_precision(config.dtype, runtime.device).compute
    if config.format != "native":
        write = export_adapter if config.format == "peft" else export_folder
        write(Path(config.run_dir), to, dtype, config.step)
        return
    reader = EvaluateConfig(
        config.run_dir, strategy=StrategyConfig(), precision="fp32", device=config.device
    )
    run = strip_pruned(load_trained_run(reader, runtime, config.compress, integers=False), runtime)
    asked = load_config(config.run_dir)
    asked = replace(
        asked, model=run.config.model, compress=run.config.compress, lora=run.config.lora
    )
    export.write_export(run.worker, asked, dtype, Path(config.run_dir), to)
    if say:
        size = (to / EXPORTED).stat().st_size
        Console().print(f"exported: {to}, {size / 1e6:.3g} MB", markup=False, soft_wrap=True)
