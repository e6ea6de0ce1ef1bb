"""What the benchmarks of split models share: a Llama's shape, a training step, a pool of ranks."""

import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from parallel.rank_pool import RankPool
from parallel.runtime import Runtime
from parallel.strategy import StrategyConfig
from trainer.build import parallel_model
from trainer.config.train import ModelConfig, OptimConfig
from trainer.optim.registry import build_optimizer
from trainer.precision import PRECISIONS

Batch = dict[str, Tensor]


def llama(width: int, blocks: int, seq_len: int, vocab_size: int) -> ModelConfig:
    """A Llama-style decoder with heads of 64 and Llama's ratio of the feed-forward layer, 8/3."""
    return ModelConfig(
        layers=blocks,
        width=width,
        heads=width // 64,
        ffn_width=8 * width // 3 // 64 * 64,
        vocab_size=vocab_size,
        max_positions=seq_len,
        tied=False,
    )


def train_step(
    config: ModelConfig, strategy: StrategyConfig, runtime: Runtime
) -> Callable[[list[Batch]], Tensor]:
    """The step that launch/train.py takes, but for the gradient norm: micro-batches -> loss."""
    worker = parallel_model(config, strategy, runtime, PRECISIONS["fp32"])
    optimizer = build_optimizer(worker.parameters(), OptimConfig())

    def step(micro_batches: list[Batch]) -> Tensor:
        worker.zero_grad()
        loss, _ = worker.forward_backward(micro_batches)
        optimizer.step(1e-3, torch.zeros(()))
        return loss

    return step


def random_batch(samples: int, seq_len: int, vocab_size: int) -> Batch:
    """Tokens and targets, (samples, seq_len) each; the same on every rank."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocab_size, (samples, seq_len + 1), generator=generator)
    return {"tokens": ids[:, :-1].contiguous(), "targets": ids[:, 1:].contiguous()}


def by_sample(batch: Batch) -> list[Batch]:
    """A micro-batch of each sample."""
    samples = len(batch["tokens"])
    return [{name: t[i : i + 1] for name, t in batch.items()} for i in range(samples)]


def alternate(
    ways: dict[str, Callable[[Batch], Any]], batch: Batch, segments: int, steps: int
) -> dict[str, list[float]]:
    """Seconds per step of each way, segment by segment in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(segments):
        for name, step in ways.items():
            dist.barrier()
            began = time.perf_counter()
            for _ in range(steps):
                step(batch)
            dist.barrier()
            seconds[name].append((time.perf_counter() - began) / steps)
    return seconds


def pin(rank: int) -> None:
    """Give this rank a core of its own, where there are as many."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})


def on_ranks(ranks: int, measure: Callable, defaults: Sequence[int]) -> tuple[Any, list[int]]:
    """What rank 0 measures with the command line's numbers, and these numbers."""
    numbers = [*map(int, sys.argv[1:]), *defaults[len(sys.argv) - 1 :]]
    pool = RankPool(ranks)
    found = pool.run(ranks, measure, *numbers, timeout_seconds=3600.0)[0]
    pool.close()
    return found, numbers
