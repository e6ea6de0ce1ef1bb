"""Saves while steps go on: the files hold the state as it was, and training hardly stops."""

import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from gpu_checks.findings import Band, Finding
from gpu_checks.jobs import (
    Job,
    needs_gpu,
    published_model,
    quick_weights,
    rank_of,
    run_config,
    small_llama,
    start_job,
    synchronise,
)
from trainer.checkpoint.folder import checkpoint_path
from trainer.checkpoint.manifest import check_folder
from trainer.checkpoint.save import Saver
from trainer.checkpoint.shards import read_tensors
from trainer.config.train import CheckpointConfig, LossConfig, TrainConfig
from trainer.loop import open_saver

MEMORY = Path("/dev/shm")  # a disk would be measured otherwise
ROOM = 2.5  # checkpoints that a folder must hold


def background_save(device: str) -> Iterator[Finding]:
    """Save a model of 1.2 billion parameters while steps go on."""
    config = run_config(small_llama(device), batch_size=2)
    if device == "cuda":
        model = published_model("llama-1b", max_positions=512)
        config = run_config(model, batch_size=2, precision="bf16", loss=LossConfig(chunks=4))
    with rank_of(device) as runtime:
        job = start_job(config, runtime, parallelize=quick_weights(runtime.device))
        bytes_ = sum(t.numel() * t.element_size() for t in job.state.state_tensors().values())
        with TemporaryDirectory(dir=_folder(bytes_)) as folder:
            run = replace(
                config, run_dir=str(Path(folder) / "run"), checkpoint=CheckpointConfig(keep=1)
            )
            yield from _saves(job, run, device, bytes_)


def _saves(job: Job, run: TrainConfig, device: str, bytes_: int) -> Iterator[Finding]:
    job.losses(2)
    with open_saver(run, job.state) as saver:
        first = _stall(saver, job, device)
        facts = {"gib": bytes_ / 2**30}
        yield Finding("save: the first stops training for", first, Band(most=5, unit="s"), facts)
        saver.wait()
        job.losses(1)
        kept = {n: t.detach().clone() for n, t in job.state.state_tensors().items()}
        second, step = _stall(saver, job, device), job.state.step
        job.losses(3)  # they overwrite what is being written
        began = time.perf_counter()
        saver.wait()
        facts["seconds_to_write"] = time.perf_counter() - began
        yield Finding("save: a later one for", second, Band(most=0.35, unit="s"), facts)
        yield Finding(
            "save: tensors in the file that differ", _differing(run, step, kept), Band(0, 0)
        )


def _stall(saver: Saver, job: Job, device: str) -> float:
    """Return how long the training thread, and the device, are stopped by a save."""
    synchronise(device)
    began = time.perf_counter()
    saver.save(job.state)
    return time.perf_counter() - began


def _differing(run: TrainConfig, step: int, kept: dict[str, Tensor]) -> int:
    path = checkpoint_path(run.run_dir, step)
    read = {name: torch.empty_like(tensor) for name, tensor in kept.items()}
    read_tensors(path, check_folder(path, hashed=()), read)
    return sum(not torch.equal(read[name], tensor) for name, tensor in kept.items())


def _folder(bytes_: int) -> str | None:
    """Return the folder in memory, if it is there and large enough; None = the default one."""
    if MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > ROOM * bytes_:
        return str(MEMORY)
    return None


def races(device: str) -> Iterator[Finding]:
    """Take steps and saves under torch's sanitizer, which raises where streams race."""
    needs_gpu(device)
    config = run_config(small_llama(device), precision="bf16")
    with rank_of(device) as runtime, TemporaryDirectory() as folder:
        run = replace(config, run_dir=str(Path(folder) / "run"))
        job = start_job(run, runtime, documents=True)
        with open_saver(run, job.state) as saver:
            job.losses(2)
            for _ in range(2):
                saver.save(job.state)
                job.losses(2)
        yield Finding("races of steps and saves", 0, Band(0, 0))
