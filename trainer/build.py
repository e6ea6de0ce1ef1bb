"""From a config to a model spread over ranks: the one place that joins trainer/ and parallel/."""

from functools import partial

import torch

from parallel.apply import parallelize
from parallel.config import resolve
from parallel.mesh import build_mesh
from parallel.runtime import Runtime
from parallel.worker import Worker
from trainer.config import TrainConfig
from trainer.loss import count_valid, cross_entropy_sum
from trainer.model import Transformer, draw_rows
from trainer.precision import resolve_precision


def build_worker(config: TrainConfig, runtime: Runtime) -> Worker:
    """The config's model under its strategy on the ranks there are, with its initial weights."""
    strategy = resolve(config.strategy, runtime.world_size)
    precision = resolve_precision(config.precision, runtime.device)
    mesh = build_mesh(strategy, runtime.device)
    with torch.device("meta"):
        model = Transformer(config.model, precision.compute)
    return parallelize(
        model, mesh, strategy, runtime.device,
        draw_rows=partial(draw_rows, config.model, config.seed),
        loss_sum=partial(cross_entropy_sum, label_smoothing=config.loss.label_smoothing),
        count_valid=count_valid,
        parameters=precision.parameters, compute=precision.compute,
        activation_checkpointing=config.activation_checkpointing, compile=config.compile,
    )  # fmt: skip
