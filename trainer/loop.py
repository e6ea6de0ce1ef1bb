"""Training: build everything, then take the same steps whatever the layout."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path

import torch
from torch import Tensor

from parallel.runtime import Runtime, same_everywhere
from parallel.watch import StoppedError
from parallel.worker import MicroBatch, Worker
from trainer.build import build_worker
from trainer.checkpoint import TrainState, load, save
from trainer.config import ConfigError, TrainConfig
from trainer.data import fingerprint, open_split, open_tokenizer
from trainer.data.loader import TrainLoader
from trainer.evaluate import evaluate
from trainer.flops import flops_per_sample
from trainer.generate import sample
from trainer.guard import Guard, guarded, own_code
from trainer.metrics import Recorder
from trainer.optim import Optimizer, lr_at
from trainer.precision import LossScale, resolve_precision
from trainer.run_dir import checkpoints
from trainer.tokenizer import Tokenizer


def train(config: TrainConfig, runtime: Runtime) -> dict[str, float]:
    """Train one job on this rank, to its end; returns the last evaluation's values.

    Raises ConfigError when a loss or gradient is no longer finite, StoppedError when a signal has
    asked for an end and all is saved, and PeerLostError when another rank is gone.
    """
    if config.deterministic:
        # cuBLAS wants this before its first call; torch asks for it by this very name.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(config.deterministic)
    with guarded(config, runtime) as guard:
        if runtime.world_size > 1:
            resolved = blake2b(repr(asdict(config)).encode()).hexdigest()
            data, code = fingerprint(config.data), own_code()
            facts = {"the configuration": resolved, "the data": data, "this project's code": code}
            same_everywhere(runtime, facts)
        state = start(config, runtime)
        guard.begin(state.step)
        loader = open_loader(config, state)
        try:
            with open_recorder(config, runtime, state) as recorder:
                take_steps(config, state, loader, recorder, guard)
                return finish(config, state, recorder, guard)
        finally:
            loader.close()


def start(config: TrainConfig, runtime: Runtime) -> TrainState:
    """The run at its first step, or where its newest checkpoint left it."""
    worker = build_worker(config, runtime)
    precision = resolve_precision(config.precision, runtime.device)
    state = TrainState(
        worker,
        Optimizer(worker.parameters(), config.optim),
        LossScale(precision, runtime.device),
        tokens=torch.zeros((), dtype=torch.int64, device=runtime.device),
        bad_step=torch.zeros((), device=runtime.device),
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
    skip = (~grad_norm.isfinite()).float()
    state.optimizer.step(lr, skip)
    state.tokens += count
    state.step += 1
    remember_if_bad(state, skip)
    state.loss_scale.update(skip)
    return Step(loss, grad_norm, lr)


def take_steps(config: TrainConfig, state: TrainState, loader: TrainLoader,
               recorder: Recorder, guard: Guard) -> None:  # fmt: skip
    """Steps until `config.steps`; metrics, evaluations and checkpoints as they fall due.

    Raises StoppedError after a checkpoint, where a signal has asked for an end.
    """
    recorder.start(int(state.tokens.item()))
    guard.go_on()
    if state.step and guard.on_any(recorder.lacks("valid")):  # it was stopped in an evaluation
        evaluate_if_due(config, state, recorder, guard)
        guard.go_on()
    while state.step < config.steps:
        micro_batches = next(loader)
        with guard.watch.training(), drawn(state, recorder):
            step = take_step(config, state, micro_batches)
        recorder.step_done()
        guard.done(state.step)
        if recorder.due(state.step):
            report(config, state, step, loader, recorder)
            guard.note()
        evaluate_if_due(config, state, recorder, guard)
        if guard.stopping or due(state.step, config.checkpoint.every, config.steps):
            stop_if_bad(state, config.run_dir)
            with recorder.pause(), guard.watch.long():
                save(Path(config.run_dir), config.checkpoint.keep, state)
            guard.go_on()


def evaluate_if_due(config: TrainConfig, state: TrainState, recorder: Recorder,
                    guard: Guard) -> None:  # fmt: skip
    """The valid split's values, where they fall due; left to the next start if this run stops."""
    if guard.stopping or not due(state.step, config.eval.every, config.steps):
        return
    with recorder.pause(), suppress(StoppedError):
        values = measure(config, state.worker, "valid", config.eval.samples, between=guard.go_on)
        recorder.evaluation(state.step, "valid", values)


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


def report(config: TrainConfig, state: TrainState, step: Step, loader: TrainLoader,
           recorder: Recorder) -> None:  # fmt: skip
    """A line of metrics; here, and only here, the host waits for the device."""
    stop_if_bad(state, config.run_dir)
    recorder.training(
        state.step, state.worker.sum_over_data(step.loss).item(), step.grad_norm.item(), step.lr,
        int(state.tokens.item()), loader.wait_seconds,
    )  # fmt: skip


def finish(config: TrainConfig, state: TrainState, recorder: Recorder,
           guard: Guard) -> dict[str, float]:  # fmt: skip
    """The test split's values and, of a language model, a sample of what it writes."""
    values: dict[str, float] = {}
    if config.eval.test and guard.on_any(recorder.lacks("test")):
        tokenizer = open_tokenizer(config.data) if config.data.kind == "pairs" else None
        values = measure(config, state.worker, "test", samples=0, tokenizer=tokenizer,
                         between=guard.go_on)  # fmt: skip
        recorder.evaluation(state.step, "test", values)
    if config.data.kind == "text" and config.metrics.sample_tokens:
        writer = open_tokenizer(config.data)
        assert writer is not None
        with guard.watch.long():
            text = sample(
                state.worker, [], max_tokens=config.metrics.sample_tokens, eot_id=writer.eot_id,
                temperature=0.8, seed=config.seed,
            )  # fmt: skip
        recorder.say(f"a sample:\n{writer.decode(text)}")
    return values


def measure(config: TrainConfig, worker: Worker, split: str, samples: int,
            tokenizer: Tokenizer | None = None,
            between: Callable[[], None] | None = None) -> dict[str, float]:  # fmt: skip
    """The values of a split (evaluate.py); BLEU too where a tokenizer is given."""
    share = config.batch_size // worker.data_degree
    return evaluate(
        worker, open_split(config.data, split), samples=samples, tokenizer=tokenizer,
        micro_batch_size=config.micro_batch_size or share, beams=config.eval.beams,
        between=between,
    )  # fmt: skip


def due(step: int, every: int, steps: int) -> bool:
    """Whether something that happens every so many steps (0 = only at the end) happens now."""
    return step == steps or (every > 0 and step % every == 0)


def remember_if_bad(state: TrainState, skip: Tensor) -> None:
    """Keep the number of the first bad step on the device.

    fp16 overflows now and then and its scale adapts: it is bad once the scale has fallen below 1
    and still overflows.
    """
    scale = state.loss_scale
    bad = (skip > 0) & (scale.scale < 1.0) if scale.dynamic else skip > 0
    state.bad_step = torch.where((state.bad_step == 0) & bad, float(state.step), state.bad_step)


def stop_if_bad(state: TrainState, run_dir: str) -> None:
    """Raise ConfigError if a step was bad; it is the same on every rank, as the norm is."""
    step = int(state.bad_step.item())
    if not step:
        return
    saved = checkpoints(run_dir)
    good = f"the last good checkpoint is {saved[-1][1]}" if saved else "there is no checkpoint yet"
    raise ConfigError(
        f"loss or gradient is not finite at step {step}; no update was made with it, and {good}. "
        "Try a lower optim.lr, a longer optim.warmup_steps, or precision=fp32 (or bf16 for fp16)"
    )
