"""Load the teacher of a distillation: the full frozen model of a run, or its recorded logits."""

import logging
from pathlib import Path

import torch

from parallel.parallel_model import ParallelModel
from parallel.parallelize import allocate_parameters
from trainer.checkpoint.restore import load_parameters
from trainer.compress.compression import Compression
from trainer.config.train import CompressConfig
from trainer.distill.logit_dataset import RecordedLogits, is_logit_folder
from trainer.inference.trained_run import unwrap_transformer
from trainer.model import Transformer
from trainer.run.run_dir import load_config

log = logging.getLogger(__name__)

KEY = "compress.teacher"


def open_recorded_logits(compress: CompressConfig) -> RecordedLogits | None:
    """Open the recorded logits in compress.teacher; None if it is a run or unused.

    Raises ConfigError if they are damaged.
    """
    folder = compress.teacher
    used = Compression(compress).uses_distillation and is_logit_folder(folder)
    return RecordedLogits(folder) if used else None


def load_teacher(
    compression: Compression, worker: ParallelModel, dtype: torch.dtype
) -> Transformer | None:
    """Load compress.teacher with the weights of its newest valid checkpoint.

    All ranks must call it. Return None on ranks whose part of the model needs no teacher, and if
    the folder holds recorded logits. Weights and computation have `dtype`, the compute dtype of
    `worker`; the teacher is compressed as in its own run. Raises ConfigError.
    """
    folder = compression.config.teacher
    if is_logit_folder(folder):
        return None
    run = load_config(folder, KEY)
    with torch.device("meta"):
        model = Transformer(run.model, dtype)
    Compression(run.compress).reshape_model(model)
    model.eval().requires_grad_(False)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    needed = compression.needs_teacher(unwrap_transformer(worker))
    if needed:
        allocate_parameters(model.to(dtype), worker.device)
    parameters = dict(model.named_parameters()) if needed else {}
    path = load_parameters(Path(folder), parameters, shapes, KEY)
    if torch.distributed.get_rank() == 0:
        log.info("%s: distilling from %s", KEY, path)
    return model if needed else None
