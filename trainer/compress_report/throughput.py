"""Compare the throughput of models, measured alternately, since a machine's speed drifts."""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from statistics import median

import torch

from parallel.parallel_model import MicroBatch, ParallelModel
from parallel.rank_pool import RankPool
from parallel.runtime import Runtime
from parallel.strategy import StrategyConfig
from trainer.config.train import EvaluateConfig, ModelConfig
from trainer.data import open_split
from trainer.data.loader import evaluation_batches
from trainer.inference.trained_run import TrainedRun, load_trained_run

Rates = list[list[float]]  # samples per second, by model and round


def load_batch(run: TrainedRun) -> MicroBatch:
    """Return a batch of the run's size from the train split, with dropout seeds."""
    dataset = open_split(run.data_config, "train")
    batch = next(iter(evaluation_batches(dataset, run.config.batch_size, 0, 1)))
    return run.worker.to_device(batch | {"seeds": torch.arange(len(batch["targets"]))})


def train_batch(worker: ParallelModel, batch: MicroBatch) -> None:
    """Run a forward and backward in training mode."""
    worker.zero_grad()
    worker.forward_backward([batch])


def infer_batch(worker: ParallelModel, batch: MicroBatch) -> None:
    """Run a forward in evaluation mode."""
    with worker.evaluation_mode():
        worker.forward(batch)


def time_in_turn(
    work: Callable[[ParallelModel, MicroBatch], None],
    workers: Sequence[ParallelModel],
    batch: MicroBatch,
    rounds: int,
    clock: Callable[[], float],
) -> Rates:
    """Return each worker's rates; an extra warm-up round is discarded, a GPU is synchronized."""
    jobs = [partial(work, worker, batch) for worker in workers]
    found: Rates = [[] for _ in workers]
    for number in range(rounds + 1):
        for job, rates in zip(jobs, found, strict=True):
            began = clock()
            job()
            if batch["targets"].is_cuda:
                torch.cuda.synchronize()
            if number:
                rates.append(len(batch["targets"]) / (clock() - began))
    return found


def inference_layouts(models: Sequence[ModelConfig]) -> dict[str, tuple[int, StrategyConfig]]:
    """Return the inference layouts of this host by name: threads per rank, and strategy."""
    cores = len(os.sched_getaffinity(0))
    if cores == 1:
        return {}
    found = {
        "1 core": (1, StrategyConfig()),
        f"{cores} cores": (cores, StrategyConfig()),
        "2 ranks, ddp": (1, StrategyConfig(replicate=2)),
    }
    if all(model.heads % 2 == model.ffn_width % 2 == 0 for model in models):
        found["2 ranks, tensor"] = (1, StrategyConfig(tensor=2))
    return found


def on_cores(
    folders: Sequence[str], models: Sequence[ModelConfig], rounds: int
) -> dict[str, list[float]]:
    """Return the median samples per second of wall time of each model, by layout of this host."""
    pool, found = RankPool(2), {}
    try:
        for name, (threads, strategy) in inference_layouts(models).items():
            ranks = strategy.replicate * strategy.tensor
            rates = pool.run(
                ranks, spread_rates, folders, strategy, threads, rounds, timeout_seconds=3600.0
            )
            # Replicas process different samples, so their rates add up; tensor ranks share them.
            found[name] = [strategy.replicate * median(own) for own in rates[0]]
    finally:
        pool.close()
    return found


def spread_rates(
    runtime: Runtime, folders: Sequence[str], strategy: StrategyConfig, threads: int, rounds: int
) -> Rates:
    """Return the inference rates of the models in these folders, on one rank of a layout."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        reader = EvaluateConfig(strategy=strategy, precision="fp32", device="cpu")
        runs = [load_trained_run(replace(reader, run_dir=folder), runtime) for folder in folders]
        workers = [run.worker for run in runs]
        return time_in_turn(infer_batch, workers, load_batch(runs[-1]), rounds, time.perf_counter)
    finally:
        torch.set_num_threads(before)
