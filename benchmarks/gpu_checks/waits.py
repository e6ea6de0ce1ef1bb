"""The host never waits for the device in a step: it only queues work."""

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from gpu_checks.findings import Band, Finding
from gpu_checks.jobs import (
    DRAWN,
    Job,
    needs_gpu,
    rank_of,
    run_config,
    small_llama,
    start_job,
)
from parallel.runtime import Runtime
from trainer.config.train import LossConfig, OptimConfig, TrainConfig
from trainer.loop import open_saver
from trainer.plan.inputs import longest_inputs
from trainer.plan.trace import trace_step

# Without compilation; with documents, if the key `documents` is there.
OPTIONS: dict[str, dict[str, Any]] = {
    "eager": {},
    "fp16": {"precision": "fp16"},
    "8-bit moments": {"optim": OptimConfig(name="adamw8bit")},
    "spike_sigma": {"spike_sigma": 3.0},
    "documents": {"documents": True},
    "accumulation": {"micro_batch_size": 1},
    "loss in chunks": {"loss": LossConfig(chunks=4)},
    "activation checkpointing": {"activation_checkpointing": "selective"},
}
COMPILED: dict[str, dict[str, Any]] = {
    "compile": {"compile": True},
    "compile, documents": {"compile": True, "documents": True},
    "compile, fp16, selective": {
        "compile": True,
        "precision": "fp16",
        "activation_checkpointing": "selective",
    },
}
KERNEL_CYCLES = 2_000_000_000  # about a second of a Hopper


def eager_steps(device: str) -> Iterator[Finding]:
    """Take five steps under each option, and a save, where a wait is an error.

    On a CPU the traced step is asked for numbers that a host would wait for.
    """
    base = run_config(small_llama(device), precision="bf16")
    if device == "cpu":
        for name, options in OPTIONS.items():
            yield Finding(f"waits, {name}", _traced_waits(base, **options), Band(0, 0))
        return
    with rank_of(device) as runtime:
        yield from _guarded_options(base, runtime, OPTIONS)
        with TemporaryDirectory() as folder:
            yield Finding("waits, a save", _guarded_save(base, runtime, folder), Band(0, 0))


def compiled_steps(device: str) -> Iterator[Finding]:
    """Take five steps with compiled blocks, where a wait is an error."""
    needs_gpu(device)
    base = run_config(small_llama(device), precision="bf16")
    with rank_of(device) as runtime:
        yield from _guarded_options(base, runtime, COMPILED)


def _traced_waits(base: TrainConfig, documents: bool = False, **keys: Any) -> int:
    config = replace(base, **keys)
    inputs = longest_inputs(config, config.micro_batch_size, packed=documents)
    count = config.batch_size // config.micro_batch_size
    return trace_step(config, 1, [inputs] * count).host_reads


def _guarded_options(
    base: TrainConfig, runtime: Runtime, options: dict[str, dict[str, Any]]
) -> Iterator[Finding]:
    for name, keys in options.items():
        keys = dict(keys)
        documents = keys.pop("documents", False)
        job = start_job(replace(base, **keys), runtime, documents)
        job.losses(DRAWN)  # of all shapes
        yield Finding(f"waits, {name}", _guarded(lambda job=job: _take(job, 5)), Band(0, 0))


def _take(job: Job, steps: int) -> None:
    for _ in range(steps):
        job.step()


def _guarded(work: Any) -> float | str:
    """Return 0, or the error of a wait for the device within `work`."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        work()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return 0.0


def _guarded_save(base: TrainConfig, runtime: Runtime, folder: str) -> float | str:
    """Return 0, or the error of a wait in a second save; the first takes its memory."""
    job = start_job(replace(base, run_dir=str(Path(folder) / "run")), runtime)
    with open_saver(job.config, job.state) as saver:
        job.losses(2)
        saver.save(job.state)
        saver.wait()
        job.losses(1)

        def save_and_go_on() -> None:
            saver.save(job.state)
            _take(job, 2)

        found = _guarded(save_and_go_on)
        saver.wait()
    return found


def sleeping_kernel(device: str) -> Iterator[Finding]:
    """Take a step behind a kernel of a second: the host is back long before it ends."""
    needs_gpu(device)
    with rank_of(device) as runtime:
        for precision in ("bf16", "fp16"):
            job = start_job(run_config(small_llama(device), precision=precision), runtime)
            job.losses(5)
            torch.cuda.synchronize()
            began = time.perf_counter()
            torch.cuda._sleep(KERNEL_CYCLES)
            job.step()
            returned = time.perf_counter() - began
            torch.cuda.synchronize()
            ended = time.perf_counter() - began
            name = f"behind a kernel of a second, {precision}"
            yield Finding(f"{name}: the host", 1000 * returned, Band(most=100, unit="ms"))
            yield Finding(f"{name}: the device", ended, Band(least=0.5, unit="s"))
