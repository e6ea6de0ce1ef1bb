"""Evaluate a model: the loss per valid target on a split, and the metrics of the task."""

import logging
from collections.abc import Callable
from dataclasses import replace

from rich.console import Console
from rich.table import Table

from parallel.parallel_model import ParallelModel
from parallel.runtime import Runtime
from parallel.strategy import data_degree
from trainer.checkpoint.identity import absolute_path
from trainer.config.train import EvaluateConfig
from trainer.data import Dataset, open_split, prepare_data
from trainer.data.loader import evaluation_batches
from trainer.data.record import data_of, describe_changes, read_record
from trainer.inference.trained_run import load_trained_run, unwrap_transformer
from trainer.metrics.console import print_whole
from trainer.run.run_dir import load_config
from trainer.tasks.registry import task_of, task_of_model
from trainer.tasks.task import Decoding, Task

log = logging.getLogger(__name__)


def evaluate_model(
    worker: ParallelModel,
    dataset: Dataset,
    *,
    micro_batch_size: int,
    samples: int = 0,
    task: Task | None = None,
    decoding: Decoding | None = None,
    between: Callable[[], None] | None = None,
) -> dict[str, float]:
    """Return the metrics over the same `samples` samples (0 = all) at each call, on every rank.

    `eval_loss`: nats per valid target, without label smoothing. Text: `bits_per_character` (or
    `bits_per_token`, if the tokenizer is lossy) and `perplexity` per token. Images: `accuracy` (0
    to 1). Pairs: `perplexity`, and with `decoding` the `bleu` (0 to 100) of the translations. If
    logits are NaN, so is each value: an argmax over NaN has no meaning.
    `micro_batch_size` is per rank. `between` is called after each micro-batch, on all ranks.
    `task`: None = the task that the model's configuration implies.
    """
    task = task or task_of_model(unwrap_transformer(worker).config)
    metrics = task.build_metrics(worker, dataset, decoding)
    shard, pinned = (worker.data_rank, worker.data_degree), worker.device.type == "cuda"
    batches = evaluation_batches(dataset, micro_batch_size, *shard, samples, pin_memory=pinned)
    with worker.evaluation_mode():
        for batch in batches:
            inputs = worker.to_device(batch)
            metrics.update(worker.forward(inputs), inputs)
            if between is not None:
                between()
    return metrics.compute()


def evaluate_run(config: EvaluateConfig, runtime: Runtime) -> None:
    """Evaluate the newest checkpoint of a run on config.split; rank 0 prints a table.

    The data are read with the tokenizer, or the classes and pixel statistics, of the run; a warning
    is logged if they differ from the training data. Raises ConfigError if they are incompatible.
    """
    trained = load_config(config.run_dir)
    reads = data_of(trained, config.run_dir)
    reads = replace(reads, path=absolute_path(config.data.path) or reads.path)
    facts, before = prepare_data(reads), read_record(config.run_dir)
    if runtime.rank == 0 and before and (what := describe_changes(before, facts, config.split)):
        log.warning("%s", what)
    run = load_trained_run(config, runtime)
    task = task_of(reads, trained.model)
    decoding = Decoding(run.load_tokenizer(), config.beams) if task.decodes_in_test else None
    local_batch = trained.batch_size // data_degree(trained.strategy)
    values = evaluate_model(
        run.worker,
        open_split(reads, config.split),
        micro_batch_size=config.micro_batch_size or trained.micro_batch_size or local_batch,
        samples=config.samples,
        task=task,
        decoding=decoding,
    )
    if runtime.rank == 0:
        console = Console()
        console.print(f"{config.run_dir}, {config.split} split:", soft_wrap=True, markup=False)
        print_whole(metrics_table(values))
        for note in task.notes(values):
            console.print(note, soft_wrap=True, highlight=False)


def metrics_table(values: dict[str, float]) -> Table:
    """Return a table with one row of values, the names as header."""
    shown = Table()
    for name in values:
        shown.add_column(name, justify="right")
    shown.add_row(*(f"{value:.4f}" for value in values.values()))
    return shown
