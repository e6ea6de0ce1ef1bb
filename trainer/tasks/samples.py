"""Samples of a trained model's output: a text for the console, pictures for the report."""

from functools import partial
from pathlib import Path

from torch import distributed as dist

from parallel.parallel_model import ParallelModel
from trainer.config.train import TrainConfig
from trainer.data import open_split, open_tokenizer
from trainer.data.record import data_of
from trainer.run.run_dir import SAMPLES
from trainer.tasks.registry import task_of


def make_samples(config: TrainConfig, worker: ParallelModel) -> str:
    """Write the sample pictures of a run into its folder; return its sample text, empty = none.

    All ranks must call it; rank 0 writes.
    """
    task, reads = task_of(config.data, config.model), data_of(config)
    text = task.sample_output(
        worker,
        partial(open_tokenizer, reads),
        partial(open_split, reads),
        config.metrics.sample_tokens,
        config.seed,
    )
    pictures = task.sample_pictures(worker, partial(open_split, reads))
    if pictures and dist.get_rank() == 0:
        folder = Path(config.run_dir) / SAMPLES
        folder.mkdir(exist_ok=True)
        for name, content in pictures.items():
            (folder / name).write_bytes(content)
    return text
