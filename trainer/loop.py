"""Training: build everything, then take the same steps whatever the layout."""

import os
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from parallel.runtime import Runtime
from parallel.worker import Worker
from trainer.build import build_worker
from trainer.checkpoint import TrainState, load, save
from trainer.config import ConfigError, TrainConfig
from trainer.data import open_split, open_tokenizer
from trainer.data.loader import TrainLoader
from trainer.evaluate import evaluate
from trainer.flops import flops_per_sample
from trainer.generate import sample
from trainer.metrics import Recorder
from trainer.optim import Optimizer, lr_at
from trainer.precision import LossScale, resolve_precision
from trainer.run_dir import checkpoints
from trainer.tokenizer import Tokenizer


def train(config: TrainConfig, runtime: Runtime) -> dict[str, float]:
    """Train one job on this rank, to its end; returns the last evaluation's values.

    Raises ConfigError when a loss or gradient is no longer finite.
    """
    if config.deterministic:
        # cuBLAS wants this before its first call; torch asks for it by this very name.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(config.deterministic)
    state = start(config, runtime)
    loader = open_loader(config, state)
    try:
        with open_recorder(config, runtime, state) as recorder:
            take_steps(config, state, loader, recorder)
            return finish(config, state, recorder)
    finally:
        loader.close()


def start(config: TrainConfig, runtime: Runtime) -> TrainState:
    """The run at its first step, or where its newest checkpoint left it."""
    worker = build_worker(config, runtime)
    precision = resolve_precision(config.precision, runtime.device)
    state = TrainState(
        worker,
        Optimizer(worker.model, config.optim),
        LossScale(precision, runtime.device),
        tokens=torch.zeros((), dtype=torch.int64, device=runtime.device),
    )
    saved = checkpoints(config.run_dir)
    if saved:
        load(saved[-1][1], state)
    return state


def open_loader(config: TrainConfig, state: TrainState) -> TrainLoader:
    """This rank's share of the training split's micro-batches, from the run's step on."""
    worker = state.worker
    return TrainLoader(
        open_split(config.data, "train"), config.seed, config.batch_size, config.micro_batch_size,
        worker.data_rank, worker.data_degree, first_step=state.step,
        pin_memory=worker.device.type == "cuda",
    )  # fmt: skip


def open_recorder(config: TrainConfig, runtime: Runtime, state: TrainState) -> Recorder:
    """What writes metrics.jsonl and the console, on the first rank."""
    classifies = config.model.family == "encoder"
    # Text fills every sample; of sentences the length is that of an average one.
    train_set = open_split(config.data, "train")
    length = max(1, round(train_set.targets / len(train_set))) if train_set.targets else 1
    flops = flops_per_sample(config.model, length, source_len=length) / length
    return Recorder(
        config.metrics, Path(config.run_dir), first=runtime.rank == 0, steps=config.steps,
        start_step=state.step, resolved=asdict(config), flops_per_token=flops,
        devices=runtime.world_size, device=runtime.device, unit="img" if classifies else "tok",
        precision_name=resolve_precision(config.precision, runtime.device).name,
    )  # fmt: skip


def take_steps(config: TrainConfig, state: TrainState, loader: TrainLoader,
               recorder: Recorder) -> None:  # fmt: skip
    """Steps until `config.steps`; evaluations, checkpoints and metrics as they fall due."""
    worker, optimizer, loss_scale = state.worker, state.optimizer, state.loss_scale
    bad_step = torch.zeros((), device=worker.device)  # the first that was not finite; 0 = none
    recorder.start(int(state.tokens.item()))
    while state.step < config.steps:
        lr = lr_at(state.step, config.steps, config.optim)
        worker.zero_grad()
        loss, count = worker.forward_backward(next(loader), loss_scale.scale)
        grad_norm = worker.clip_grad_norm(config.optim.max_grad_norm, loss_scale.scale)
        skip = (~grad_norm.isfinite()).float()
        optimizer.step(lr, skip)
        state.tokens += count
        state.step += 1
        bad_step = remember_bad_step(bad_step, skip, loss_scale, state.step)
        loss_scale.update(skip)
        recorder.step_done()
        if recorder.due(state.step):
            stop_if_bad(bad_step, config.run_dir)
            recorder.training(
                state.step, worker.sum_over_data(loss).item(), grad_norm.item(), lr,
                int(state.tokens.item()), loader.wait_seconds,
            )  # fmt: skip
        if due(state.step, config.eval.every, config.steps):
            with recorder.pause():
                values = measure(config, worker, "valid", config.eval.samples)
            recorder.evaluation(state.step, "valid", values)
        if due(state.step, config.checkpoint.every, config.steps):
            stop_if_bad(bad_step, config.run_dir)
            with recorder.pause():
                save(Path(config.run_dir), config.checkpoint.keep, state)


def finish(config: TrainConfig, state: TrainState, recorder: Recorder) -> dict[str, float]:
    """The test split's values and, of a language model, a sample of what it writes."""
    values: dict[str, float] = {}
    if config.eval.test:
        tokenizer = open_tokenizer(config.data) if config.data.kind == "pairs" else None
        values = measure(config, state.worker, "test", samples=0, tokenizer=tokenizer)
        recorder.evaluation(state.step, "test", values)
    if config.data.kind == "text" and config.metrics.sample_tokens:
        writer = open_tokenizer(config.data)
        assert writer is not None
        text = sample(
            state.worker, [], max_tokens=config.metrics.sample_tokens, eot_id=writer.eot_id,
            temperature=0.8, seed=config.seed,
        )  # fmt: skip
        recorder.say(f"a sample:\n{writer.decode(text)}")
    return values


def measure(config: TrainConfig, worker: Worker, split: str, samples: int,
            tokenizer: Tokenizer | None = None) -> dict[str, float]:  # fmt: skip
    """The values of a split (evaluate.py); BLEU too where a tokenizer is given."""
    share = config.batch_size // worker.data_degree
    return evaluate(
        worker, open_split(config.data, split), samples=samples, tokenizer=tokenizer,
        micro_batch_size=config.micro_batch_size or share, beams=config.eval.beams,
    )  # fmt: skip


def due(step: int, every: int, steps: int) -> bool:
    """Whether something that happens every so many steps (0 = only at the end) happens now."""
    return step == steps or (every > 0 and step % every == 0)


def remember_bad_step(bad_step: Tensor, skip: Tensor, loss_scale: LossScale, step: int) -> Tensor:
    """The first bad step, kept on the device so that a healthy step waits for nothing.

    fp16 overflows now and then and its scale adapts: it is bad once the scale has fallen below 1
    and still overflows.
    """
    bad = (skip > 0) & (loss_scale.scale < 1.0) if loss_scale.dynamic else skip > 0
    return torch.where((bad_step == 0) & bad, float(step), bad_step)


def stop_if_bad(bad_step: Tensor, run_dir: str) -> None:
    """Raise ConfigError if a step was bad; it is the same on every rank, as the norm is."""
    step = int(bad_step.item())
    if not step:
        return
    saved = checkpoints(run_dir)
    good = f"the last good checkpoint is {saved[-1][1]}" if saved else "there is no checkpoint yet"
    raise ConfigError(
        f"loss or gradient is not finite at step {step}; no update was made with it, and {good}. "
        "Try a lower optim.lr, a longer optim.warmup_steps, or precision=fp32 (or bf16 for fp16)"
    )
