"""Runs of one rank on synthetic data: the product's own model, state and step."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

from gpu_checks.findings import SkippedError
from parallel import parallelize as apply
from parallel.parallel_model import MicroBatch
from parallel.runtime import JobQueue, Runtime, process_group
from trainer.build import build_worker
from trainer.compress.compression import Compression
from trainer.config.train import DataConfig, ModelConfig, TrainConfig, inputs_of
from trainer.data.loader import TrainLoader
from trainer.data.text import Text
from trainer.loop import Step, take_step
from trainer.plan.inputs import longest_inputs
from trainer.plan.real_peak import draw_inputs
from trainer.state import TrainState, untrained_state
from trainer.tasks.registry import task_of

ROOT = Path(__file__).parents[2]
START_ID, FIRST_ID = 2, 3  # of documents, of other tokens
DRAWN = 4  # different steps


@contextmanager
def rank_of(device: str) -> Iterator[Runtime]:
    """Open the process group of a single rank; skips a check that needs a GPU where none is."""
    if device == "cuda" and not torch.cuda.is_available():
        raise SkippedError("there is no CUDA device here")
    with process_group(device, JobQueue.single_process()) as runtime:
        yield runtime


def needs_gpu(device: str) -> None:
    """Skip a check on a CPU."""
    if device != "cuda":
        raise SkippedError("it needs a GPU")


def small_llama(device: str, **changes: Any) -> ModelConfig:
    """Return a small Llama with grouped heads; heads of 64, so that fused attention takes them."""
    wide = device == "cuda"
    base = ModelConfig(
        layers=4,
        width=512 if wide else 64,
        heads=8 if wide else 4,
        kv_heads=2,
        ffn_width=1024 if wide else 128,
        vocab_size=4096 if wide else 256,
        max_positions=512 if wide else 32,
        tied=False,
    )
    return replace(base, **changes)


def published_model(name: str, **changes: Any) -> ModelConfig:
    """Return the model of conf/model/NAME.yaml."""
    values = yaml.safe_load((ROOT / "conf" / "model" / f"{name}.yaml").read_text("utf-8"))
    return ModelConfig(**values | changes)


def run_config(model: ModelConfig, batch_size: int = 4, **keys: Any) -> TrainConfig:
    """Return a run of a complete model on synthetic data of its longest samples."""
    images = inputs_of(model) == "patches"
    data = DataConfig(kind="images" if images else "text", seq_len=model.max_positions or 1)
    given = {"model": model, "data": data, "batch_size": batch_size, "compile": False}
    return TrainConfig(**given | {"micro_batch_size": batch_size, "precision": "fp32"} | keys)


@dataclass
class Job:
    """A run: its configuration, its state, and steps of micro-batches that repeat for ever."""

    config: TrainConfig
    state: TrainState
    batches: Iterator[list[MicroBatch]]

    def step(self) -> Step:
        """Take one optimizer step."""
        return take_step(self.config, self.state, next(self.batches))

    def losses(self, steps: int) -> list[float]:
        """Take so many steps and return their losses."""
        return [self.step().loss.item() for _ in range(steps)]

    def gradient(self) -> tuple[float, Tensor]:
        """Return the loss and all gradients of the next micro-batches, on the CPU in float64."""
        worker = self.state.worker
        worker.zero_grad()
        loss, _ = worker.forward_backward(next(self.batches), self.state.loss_scale.scale)
        whole = torch.cat([g.flatten().double().cpu() for g in worker.gradients()])
        return loss.item(), whole / self.state.loss_scale.scale.item()

    def weights(self) -> dict[str, Tensor]:
        """Return copies of weights, moments and the number of updates."""
        found = self.state.state_tensors()
        kept = {n: t for n, t in found.items() if n.startswith(("model.", "optimizer."))}
        return {n: t.detach().clone() for n, t in (kept | {"updates": found["updates"]}).items()}


def start_job(
    config: TrainConfig,
    runtime: Runtime,
    documents: bool = False,
    parallelize: apply.Parallelize = apply.parallelize,
) -> Job:
    """Build a run's state before its first step; `documents`: several in each sample."""
    compression = Compression(config.compress)
    task = task_of(config.data, config.model)
    worker = build_worker(config, runtime, compression, task, parallelize)
    state = untrained_state(config, runtime, worker, compression, {})
    batches = draw_batches(config, runtime.device, documents)
    return Job(config, state, cycle(batches))


def draw_batches(
    config: TrainConfig, device: torch.device, documents: bool
) -> list[list[MicroBatch]]:
    """Return the micro-batches of a few steps, in pinned memory for a GPU as the loader's are."""
    pinned = device.type == "cuda"
    if config.data.kind != "text":
        shapes = longest_inputs(config, config.micro_batch_size)
        count = config.batch_size // config.micro_batch_size
        drawn = [
            [draw_inputs(shapes, config.model, count * step + i) for i in range(count)]
            for step in range(DRAWN)
        ]
        return [[_pinned(batch) if pinned else batch for batch in step] for step in drawn]
    loader = TrainLoader(
        _text(config, documents),
        config.seed,
        config.batch_size,
        config.micro_batch_size,
        data_rank=0,
        data_degree=1,
        first_step=0,
        pin_memory=pinned,
    )
    try:
        return list(islice(loader, DRAWN))
    finally:
        loader.close()


def _pinned(batch: MicroBatch) -> MicroBatch:
    return {name: tensor.pin_memory() for name, tensor in batch.items()}


class _Tokens:
    """Tokens in memory, with the methods of a TokenFile."""

    def __init__(self, tokens: np.ndarray):
        self._tokens = tokens

    def __len__(self) -> int:
        return len(self._tokens)

    def read(self, begin: int, end: int) -> np.ndarray:
        """Return the tokens [begin, end)."""
        return self._tokens[begin:end]


def _text(config: TrainConfig, documents: bool) -> Text:
    """Return a text of random tokens; its documents have a quarter of a sample, on average."""
    random, seq_len = np.random.default_rng(config.seed), config.data.seq_len
    count = DRAWN * config.batch_size * seq_len + 1
    tokens = random.integers(FIRST_ID, config.model.vocab_size, count)
    if documents:
        tokens[random.random(count) < 4 / seq_len] = START_ID
        tokens[seq_len // 2 :: seq_len] = START_ID  # none without
    facts = {"splits": {"train": {"characters": count, "lost": 0}}, "pad_id": 0}
    return Text(_Tokens(tokens), seq_len, facts | {"eot_id": START_ID}, "train")  # type: ignore


def quick_weights(device: torch.device) -> apply.Parallelize:
    """Return `parallelize` with weights drawn on the device: a billion take seconds on a CPU."""

    def draw(name: str, shape: torch.Size, begin: int, end: int) -> Tensor:
        rows = torch.empty(end - begin, *shape[1:], device=device)
        if rows.dim() == 1:
            return rows.fill_(0.0 if name.endswith("bias") else 1.0)
        return rows.normal_(std=0.02)

    def parallelize(model: Any, facts: apply.ModelSpec, *args: Any, **options: Any) -> Any:
        return apply.parallelize(model, replace(facts, draw_rows=draw), *args, **options)

    return parallelize


def synchronise(device: str) -> None:
    """Wait for the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def without_torchao(error: ImportError) -> SkippedError:
    """Return why float8 is not checked."""
    return SkippedError(f"{error.name or error} is not installed; carry its wheel (docs/gpu.md)")
