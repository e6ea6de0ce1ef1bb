"""Training: build everything, then take the same steps whatever the layout."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path

import torch
from torch import Tensor

from parallel.runtime import Runtime, same_everywhere
from parallel.worker import MicroBatch, Worker
from trainer.build import build_worker
from trainer.checkpoint import TrainState, restore
from trainer.config import TrainConfig
from trainer.data import fingerprint, open_split, open_tokenizer
from trainer.data.loader import TrainLoader
from trainer.evaluate import evaluate
from trainer.flops import flops_per_sample
from trainer.generate import sample
from trainer.guard import Guard, RolledBackError, check_replicas
from trainer.metrics import Recorder
from trainer.optim import Optimizer, lr_at
from trainer.precision import LossScale, resolve_precision
from trainer.saver import Saver
from trainer.tokenizer import Tokenizer


def train(config: TrainConfig, runtime: Runtime) -> dict[str, float]:
    """Train one job on this rank, to its end; returns the last evaluation's values.

    Raises ConfigError where a bad step stops it (guard.py).
    """
    if config.deterministic:
        # cuBLAS wants this before its first call; torch asks for it by this very name.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(config.deterministic)
    data = fingerprint(config.data)
    if runtime.world_size > 1:
        resolved = blake2b(repr(asdict(config)).encode()).hexdigest()
        same_everywhere(runtime, {"the configuration": resolved, "the data": data})
    state = start(config, runtime, data)
    with Saver(config, state, data) as saver:
        if config.on_bad_step == "rollback" and state.step == 0:
            saver.save(state)  # something to go back to
        while True:
            loader = open_loader(config, state)
            try:
                with open_recorder(config, runtime, state) as recorder:
                    run = Run(config, state, loader, recorder, saver)
                    take_steps(run)
                    return finish(run)
            except RolledBackError:
                saver.forget()
                restore(config, state, data)  # as a run started again, but for its processes
            finally:
                loader.close()


def start(config: TrainConfig, runtime: Runtime, data: str = "") -> TrainState:
    """The run at its first step, or where its newest good checkpoint left it.

    `data` is the fingerprint of what it learns from; empty = not compared with the checkpoint's.
    """
    worker = build_worker(config, runtime)
    precision = resolve_precision(config.precision, runtime.device)
    state = TrainState(
        worker,
        Optimizer(worker.parameters(), config.optim),
        LossScale(precision, runtime.device),
        Guard(config, runtime.device),
        tokens=torch.zeros((), dtype=torch.int64, device=runtime.device),
    )
    restore(config, state, data)
    return state


def open_loader(config: TrainConfig, state: TrainState) -> TrainLoader:
    """This rank's share of the training split's micro-batches, from the run's step on."""
    worker = state.worker
    return TrainLoader(
        open_split(config.data, "train"), config.seed, config.batch_size, config.micro_batch_size,
        worker.data_rank, worker.data_degree, first_step=state.step,
        pin_memory=worker.device.type == "cuda", left_out=state.guard.left_out,
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


@dataclass(frozen=True)
class Run:
    """A run on this rank, with what serves it."""

    config: TrainConfig
    state: TrainState
    loader: TrainLoader
    recorder: Recorder
    saver: Saver


@dataclass(frozen=True)
class Step:
    """What a step leaves on the device: this rank's part of the mean loss, and the norm."""

    loss: Tensor
    grad_norm: Tensor
    lr: float


def take_step(config: TrainConfig, state: TrainState, micro_batches: list[MicroBatch]) -> Step:
    """One optimizer step; nothing is read back, so that the host runs ahead of the device."""
    worker, scale = state.worker, state.loss_scale.scale
    lr = lr_at(state.step, config.steps, config.optim)
    worker.zero_grad()
    loss, count = worker.forward_backward(micro_batches, scale)
    grad_norm = worker.clip_grad_norm(config.optim.max_grad_norm, scale)
    drop, overflow = state.guard.judge(worker, loss, grad_norm, state.loss_scale)
    state.optimizer.step(lr, drop)
    state.tokens += count
    state.step += 1
    state.loss_scale.update(overflow)
    return Step(loss, grad_norm, lr)


def take_steps(run: Run) -> None:
    """Steps until `config.steps`; metrics, evaluations and checkpoints as they fall due."""
    config, state, recorder = run.config, run.state, run.recorder
    recorder.start(int(state.tokens.item()))
    while state.step < config.steps:
        with recorder.waiting():
            micro_batches = next(run.loader)
        with drawn(state, recorder):
            step = take_step(config, state, micro_batches)
        recorder.step_done()
        if recorder.due(state.step):
            report(run, step)
        compared = config.checkpoint.check_replicas_every
        if compared and state.step % compared == 0:
            with recorder.pause("other"):
                check_replicas(state.step, state.worker, state.optimizer, recorder, config.run_dir)
        eval_loss = None
        if due(state.step, config.eval.every, config.steps):
            with recorder.pause("evaluation"):
                values = measure(config, state.worker, "valid", config.eval.samples)
            recorder.evaluation(state.step, "valid", values)
            eval_loss = values["eval_loss"]
        if due(state.step, config.checkpoint.every, config.steps):
            with recorder.pause("save"):
                run.saver.wait()  # then all know what is newest
                state.guard.look(state.step, state.worker, run.loader, recorder)  # saves no NaN
                run.saver.save(state, eval_loss)


@contextmanager
def drawn(state: TrainState, recorder: Recorder) -> Iterator[None]:
    """Around a step: the one that metrics.timeline asks for is recorded, and drawn."""
    if not recorder.draws(state.step + 1):
        yield
        return
    with state.worker.recording() as recording:
        yield
    with recorder.pause():
        recorder.timeline(state.step, recording.gather(), recording.schedule)


def report(run: Run, step: Step) -> None:
    """A line of metrics; here, and only here, the host waits for the device."""
    state = run.state
    state.guard.look(state.step, state.worker, run.loader, run.recorder)
    run.recorder.training(
        state.step, state.worker.sum_over_data(step.loss).item(), step.grad_norm.item(), step.lr,
        int(state.tokens.item()), run.loader.wait_seconds,
    )  # fmt: skip


def finish(run: Run) -> dict[str, float]:
    """The test split's values and, of a language model, a sample of what it writes."""
    config, state, recorder = run.config, run.state, run.recorder
    values: dict[str, float] = {}
    if config.eval.test:
        tokenizer = open_tokenizer(config.data) if config.data.kind == "pairs" else None
        with recorder.pause("evaluation"):
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
