"""From a config to a model spread over ranks: the one place that joins trainer/ and parallel/."""

from collections.abc import Callable
from functools import partial

import torch

from parallel import apply
from parallel.config import StrategyConfig, resolve
from parallel.mesh import build_mesh
from parallel.runtime import Runtime
from parallel.worker import Worker
from trainer.config import ModelConfig, TrainConfig
from trainer.loss import count_valid, cross_entropy_sum
from trainer.model import TENSOR_LAYOUT, Transformer, draw_rows
from trainer.precision import Precision, resolve_precision


def build_worker(config: TrainConfig, runtime: Runtime) -> Worker:
    """The config's model under its strategy on the ranks there are, with its initial weights."""
    return parallel_model(
        config.model, resolve(config.strategy, runtime.world_size), runtime,
        resolve_precision(config.precision, runtime.device), seed=config.seed,
        label_smoothing=config.loss.label_smoothing,
        activation_checkpointing=config.activation_checkpointing, compile=config.compile,
    )  # fmt: skip


def parallel_model(
    config: ModelConfig, strategy: StrategyConfig, runtime: Runtime, precision: Precision, *,
    seed: int = 0, label_smoothing: float = 0.0, activation_checkpointing: str = "none",
    compile: bool = False, parallelize: Callable[..., Worker] = apply.parallelize,
) -> Worker:  # fmt: skip
    """A model under a resolved strategy; `parallelize` is another one to plant a fault."""
    mesh = build_mesh(strategy, runtime.device)
    with torch.device("meta"):
        model = Transformer(config, precision.compute)
    return parallelize(
        model, mesh, strategy, runtime.device, draw_rows=partial(draw_rows, config, seed),
        loss_sum=partial(cross_entropy_sum, label_smoothing=label_smoothing),
        count_valid=count_valid, layout=TENSOR_LAYOUT,
        parameters=precision.parameters, compute=precision.compute,
        activation_checkpointing=activation_checkpointing, compile=compile,
    )  # fmt: skip
