"""The trained run that another one learns from: its model, whole and frozen."""

import logging
from pathlib import Path

import torch

from parallel.parallel_model import ParallelModel
from parallel.parallelize import allocate
from trainer.checkpoint.restore import load_parameters
from trainer.compress.compression import Compression
from trainer.config.train import CompressConfig
from trainer.distill.logit_dataset import Answers, is_answers
from trainer.inference.trained_run import transformer
from trainer.model import Transformer
from trainer.run.run_dir import load_config

log = logging.getLogger(__name__)

KEY = "compress.teacher"


def open_answers(compress: CompressConfig) -> Answers | None:
    """Return what compress.teacher has said, where that is kept and learned from; ConfigError."""
    folder = compress.teacher
    learned = Compression(compress).distills and is_answers(folder)
    return Answers(folder) if learned else None


def load_teacher(
    compression: Compression, worker: ParallelModel, dtype: torch.dtype
) -> Transformer | None:
    """Return the model of compress.teacher with the weights of its newest good checkpoint.

    All ranks call it; None on those where `compression` asks it nothing, and where its answers are
    kept. It computes in `dtype`, as `worker` does, keeps its weights in it, and is compressed as in
    its own run. Raises ConfigError.
    """
    folder = compression.config.teacher
    if is_answers(folder):
        return None
    run = load_config(folder, KEY)
    with torch.device("meta"):
        model = Transformer(run.model, dtype)
    Compression(run.compress).reshape(model)
    model.eval().requires_grad_(False)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    asked = compression.asks(transformer(worker))
    if asked:
        allocate(model.to(dtype), worker.device)
    parameters = dict(model.named_parameters()) if asked else {}
    path = load_parameters(Path(folder), parameters, shapes, KEY)
    if torch.distributed.get_rank() == 0:
        log.info("%s: learning from %s too", KEY, path)
    return model if asked else None
