"""Checkpoints: torch.distributed.checkpoint folders that appear whole or not at all."""

import shutil
from pathlib import Path

import torch
from torch import distributed as dist
from torch.distributed import checkpoint as dcp

from parallel.worker import Worker
from trainer.config import CheckpointConfig, ConfigError
from trainer.optim import Optimizer
from trainer.precision import LossScale
from trainer.run_dir import checkpoint_path, checkpoints


def _state(worker: Worker, optimizer: Optimizer | None, scale: LossScale | None,
           step: int) -> dict:  # fmt: skip
    """What a checkpoint holds: every tensor by its canonical name, whatever the layout.

    Learning rate, sample order and dropout are functions of (seed, step): the step is all of the
    state of the schedule, of the data and of the random numbers.
    """
    state: dict = {"model": dict(worker.model.named_parameters()), "step": torch.tensor(step)}
    if optimizer is not None and scale is not None:
        state["optimizer"] = optimizer.state()
        state["updates"] = optimizer.updates()
        state["loss_scale"] = scale.state()
    return state


def save(run_dir: Path, config: CheckpointConfig, step: int, worker: Worker,
         optimizer: Optimizer, scale: LossScale) -> Path:  # fmt: skip
    """Write checkpoint `step`, then forget all but the newest `checkpoint.keep`; all ranks call it.

    It is written under a temporary name and renamed when every rank is done.
    """
    final = checkpoint_path(run_dir, step)
    partial = final.with_name(f".{final.name}.partial")
    first = dist.get_rank() == 0
    if first:
        shutil.rmtree(partial, ignore_errors=True)
    dist.barrier()
    dcp.save(_state(worker, optimizer, scale, step), checkpoint_id=partial)
    if first:
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        if config.keep:
            for _, old in checkpoints(run_dir)[: -config.keep]:
                shutil.rmtree(old)
    dist.barrier()
    return final


def load(path: Path, worker: Worker, optimizer: Optimizer | None = None,
         scale: LossScale | None = None) -> int:  # fmt: skip
    """Read a checkpoint into the worker, under whatever layout it has now; returns its step.

    Raises ConfigError if the checkpoint's model has other parameters or shapes.
    """
    state = _state(worker, optimizer, scale, 0)
    _check_shapes(path, state["model"])
    dcp.load(state, checkpoint_id=path)
    if optimizer is not None and scale is not None:
        optimizer.set_updates(state["updates"].item())
        scale.load(state["loss_scale"])
    return int(state["step"].item())


def _check_shapes(path: Path, model: dict) -> None:
    metadata = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    saved = {
        name.removeprefix("model."): tuple(entry.size)
        for name, entry in metadata.items()
        if name.startswith("model.")
    }
    ours = {name: tuple(parameter.shape) for name, parameter in model.items()}
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
