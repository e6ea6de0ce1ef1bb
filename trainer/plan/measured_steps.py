"""Seconds of real steps on the ranks there are, under small layouts of them."""

import time
from dataclasses import replace
from typing import Any

import torch
from torch import distributed as dist

from parallel.runtime import Runtime, all_gather_objects
from parallel.strategy import AXES, StrategyConfig, data_degree
from trainer.build import build_worker
from trainer.compress.compression import Compression
from trainer.config.train import TrainConfig
from trainer.loop import take_step
from trainer.plan.inputs import longest_inputs
from trainer.plan.layout_rules import batch_problems, micro_batch_size, model_problems
from trainer.plan.real_peak import draw_inputs
from trainer.state import untrained_state
from trainer.tasks.registry import task_of

WARM_UP, STEPS = 3, 5


def small_jobs(config: TrainConfig, ranks: int, per_host: int) -> list[TrainConfig]:
    """Return small runs on all ranks that tell the constants of a step apart.

    Two layers under each axis that takes all ranks, or those of a host, if the model can be so
    split; and copies with more layers, and with more micro-batches. `config` is complete.
    """
    model = replace(config.model, layers=2, encoder_layers=min(2, config.model.encoder_layers))
    base = replace(config, model=model)
    inner = dict.fromkeys(("pipeline", "context", "tensor"), per_host)
    strategies = [{"replicate": ranks}, {"shard": ranks}]
    if per_host > 1:
        strategies += [
            {axis: degree, "replicate": ranks // degree} for axis, degree in inner.items()
        ]
    ones: dict[str, Any] = dict.fromkeys(AXES, 1)
    jobs = [_job(base, replace(config.strategy, **ones | degrees)) for degrees in strategies]
    found = [job for job in jobs if job is not None]
    if not found:
        return []
    copies = found[0]
    deeper = replace(model, layers=4, encoder_layers=2 * model.encoder_layers)
    found.append(replace(copies, model=deeper))
    found += [
        replace(job, micro_batch_size=job.micro_batch_size // 4)
        for job in found[: 2 if ranks > 1 else 1]
        if job.micro_batch_size % 4 == 0
    ]
    return found


def _job(config: TrainConfig, strategy: StrategyConfig) -> TrainConfig | None:
    """Return a run under a strategy; None if model or batch do not allow it."""
    if model_problems(config.model, strategy) or config.batch_size % data_degree(strategy):
        return None
    job = replace(config, strategy=strategy, micro_batch_size=0)
    if batch_problems(job, strategy):
        return None
    return replace(job, micro_batch_size=micro_batch_size(job, strategy))


def step_seconds(runtime: Runtime, config: TrainConfig) -> float:
    """Return the median time of a step of random inputs; a collective call.

    The first ones are not counted; of a step's ranks the slowest counts.
    """
    count = config.batch_size // data_degree(config.strategy) // config.micro_batch_size
    compression = Compression(config.compress)
    worker = build_worker(config, runtime, compression, task_of(config.data, config.model))
    state = untrained_state(config, runtime, worker, compression, {})
    shapes = longest_inputs(config, config.micro_batch_size)
    inputs = [draw_inputs(shapes, config.model, number) for number in range(count)]
    seconds = []
    for _ in range(WARM_UP + STEPS):
        dist.barrier()
        began = time.perf_counter()
        take_step(config, state, inputs)
        if runtime.device.type == "cuda":
            torch.cuda.synchronize(runtime.device)
        seconds.append(time.perf_counter() - began)
    slowest = [max(times) for times in zip(*all_gather_objects(seconds[WARM_UP:]), strict=True)]
    return sorted(slowest)[len(slowest) // 2]
