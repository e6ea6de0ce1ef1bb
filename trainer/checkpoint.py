"""Checkpoints: torch.distributed.checkpoint folders that appear whole or not at all."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from parallel.worker import Worker
from trainer.config import ConfigError
from trainer.guard import Guard
from trainer.optim import Optimizer
from trainer.precision import LossScale
from trainer.run_dir import checkpoint_path, checkpoints


@dataclass
class TrainState:
    """All that a training run is at one moment, under whatever layout.

    Learning rate, sample order and dropout are functions of (seed, step): the step is all of the
    state of the schedule, of the data and of the random numbers.
    """

    worker: Worker
    optimizer: Optimizer
    loss_scale: LossScale
    guard: Guard
    tokens: Tensor  # valid targets learned from so far, int64 on the device
    step: int = 0  # optimizer steps done


def _tensors(state: TrainState) -> dict[str, Any]:
    """What a checkpoint holds: every tensor by its canonical name."""
    return {
        "model": state.worker.parameters(),
        "optimizer": state.optimizer.state(),
        "updates": state.optimizer.updates(),
        "loss_scale": state.loss_scale.state(),
        "guard": state.guard.state(),
        "tokens": state.tokens,
        "step": torch.tensor(state.step),
    }


def save(run_dir: Path, keep: int, state: TrainState) -> Path:
    """Write a checkpoint, then forget all but the newest `keep` (0 = none); all ranks call it.

    It is written under a temporary name and renamed when every rank is done.
    """
    final = checkpoint_path(run_dir, state.step)
    partial = final.with_name(f".{final.name}.partial")
    first = dist.get_rank() == 0
    if first:
        shutil.rmtree(partial, ignore_errors=True)
    dist.barrier()
    dcp.save(_tensors(state), checkpoint_id=partial)
    if first:
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        for _, old in checkpoints(run_dir)[:-keep] if keep else []:
            shutil.rmtree(old)
    dist.barrier()
    return final


def load(path: Path, state: TrainState) -> None:
    """Read a whole checkpoint into a run, in place; the layout may be another one.

    Raises ConfigError if the checkpoint's model has other parameters or shapes.
    """
    tensors = _tensors(state)
    _check_shapes(path, state.worker)
    dcp.load(tensors, checkpoint_id=path)
    state.optimizer.set_updates(tensors["updates"].item())
    state.loss_scale.load(tensors["loss_scale"])
    state.guard.load(tensors["guard"])
    state.tokens.copy_(tensors["tokens"])
    state.step = int(tensors["step"].item())


def load_weights(path: Path, worker: Worker) -> None:
    """Read a checkpoint's weights alone; raises as `load`."""
    weights = {"model": worker.parameters()}
    _check_shapes(path, worker)
    dcp.load(weights, checkpoint_id=path)


def _check_shapes(path: Path, worker: Worker) -> None:
    metadata = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    saved = {
        name.removeprefix("model."): tuple(entry.size)
        for name, entry in metadata.items()
        if name.startswith("model.") and isinstance(entry, TensorStorageMetadata)
    }
    ours = {name: tuple(shape) for name, shape in worker.whole.shapes.items()}
    for name in [*ours, *saved]:
        if ours.get(name) != saved.get(name):
            raise ConfigError(
                f"checkpoint {path} has another shape: {name} is {saved.get(name, 'missing')} "
                f"there and {ours.get(name, 'missing')} in this model; set model=… as in the run's "
                "config.yaml, or choose another run_dir"
            )


def newest(run_dir: Path) -> Path:
    """The newest complete checkpoint; raises ConfigError if there is none."""
    found = checkpoints(run_dir)
    if not found:
        raise ConfigError(f"run_dir={run_dir} holds no checkpoint yet; train there first")
    return found[-1][1]
