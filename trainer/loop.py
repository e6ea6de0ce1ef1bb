"""Training: build everything, then take the same steps whatever the layout."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from hashlib import blake2b
from pathlib import Path

import torch
from torch import Tensor

from parallel.errors import NumericalError, UserError
from parallel.health.watchdog import StoppedError
from parallel.parallel_model import MicroBatch
from parallel.runtime import Runtime, check_same_on_all_ranks
from trainer.build import build_worker
from trainer.checkpoint.identity import run_record
from trainer.checkpoint.restore import restore_checkpoint
from trainer.checkpoint.save import Saver, warn_rare_evaluation
from trainer.compress.compression import Compression
from trainer.config.train import TrainConfig
from trainer.data import data_fingerprint, open_split, open_tokenizer
from trainer.data.loader import TrainLoader
from trainer.data.record import data_of
from trainer.distill.logit_dataset import DistillationDataset
from trainer.distill.teacher import load_teacher, open_recorded_logits
from trainer.inference.huggingface import export_checkpoint, load_first_adapter
from trainer.inference.trained_run import (
    load_frozen_weights,
    load_initial_weights,
    unwrap_transformer,
)
from trainer.metrics.recorder import Recorder, RunInfo
from trainer.nn.flops import flops_per_sample
from trainer.optim.lr_schedule import learning_rate_at, schedule_warnings
from trainer.precision import resolve_precision
from trainer.resilience.bad_steps import (
    RolledBackError,
    check_replicas,
)
from trainer.resilience.supervisor import Supervisor, source_digest, supervise_run
from trainer.state import TrainState, not_finite, untrained_state
from trainer.tasks.evaluate import evaluate_model
from trainer.tasks.registry import task_of
from trainer.tasks.samples import make_samples
from trainer.tasks.task import Decoding

log = logging.getLogger(__name__)


def train(config: TrainConfig, runtime: Runtime) -> dict[str, float]:
    """Train one job on this rank to its end; return the values of the last evaluation.

    Raises UserError if a bad step or a failed save stops it, StoppedError after a signal when
    everything is saved, RankLostError if another rank is lost.
    """
    if config.deterministic:
        # Must be set before the first cuBLAS call for deterministic results.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(config.deterministic)
    torch.autograd.set_detect_anomaly(config.detect_anomaly)
    with supervise_run(config.run_dir, config.steps, config.timeout_seconds, runtime) as supervisor:
        data = data_fingerprint(data_of(config))
        if runtime.world_size > 1:
            resolved = blake2b(repr(asdict(config)).encode()).hexdigest()
            facts = {"the configuration": resolved, "the data": data}
            if answers := open_recorded_logits(config.compress):
                facts["what the teacher has said"] = answers.content_digest()
            check_same_on_all_ranks(runtime, facts | {"this project's code": source_digest()})
        state = start_run(config, runtime, data)
        supervisor.begin_at(state.step)
        with open_saver(config, state, data) as saver:
            if config.on_bad_step == "rollback" and state.step == 0:
                saver.save(state)  # so that a rollback has a target
            returns = 0  # rollbacks within this process
            while True:
                loader = open_loader(config, state)
                try:
                    with open_recorder(config, runtime, state) as recorder:
                        run = Run(config, state, loader, recorder, saver, supervisor)
                        if not returns:
                            recorder.log_start()
                        take_steps(run)
                        return finish_run(run)
                except RolledBackError:
                    returns += 1
                    saver.forget_last_save()
                    resume(config, state, data)  # like a restart, in the same processes
                finally:
                    loader.close()


def start_run(config: TrainConfig, runtime: Runtime, data: str = "") -> TrainState:
    """Build the training state at its first step, or restore the newest valid checkpoint.

    `data` is the fingerprint of the training data; empty = not compared with the checkpoint's.
    Raises NumericalError if a weight or optimizer state is not finite.
    """
    warnings = schedule_warnings(config.steps, config.optim)
    warnings += filter(None, [warn_rare_evaluation(config.checkpoint, config.eval.every)])
    for warning in warnings if runtime.rank == 0 else ():
        log.warning(warning)
    compression = Compression(config.compress)
    worker = build_worker(config, runtime, compression, task_of(config.data, config.model))
    precision = resolve_precision(config.precision, runtime.device)
    if compression.uses_distillation:
        compression.teacher = load_teacher(compression, worker, precision.compute)
    base = load_frozen_weights(config, worker)
    state = untrained_state(config, runtime, worker, compression, base)
    resume(config, state, data)
    if config.lora.adapter and state.step == 0:
        load_first_adapter(config, worker, state.base)
    if config.init_from and state.step == 0 and not worker.whole.frozen:
        load_initial_weights(config.init_from, config.run_dir, data_of(config), worker)
    if name := not_finite(state):
        remedy = "choose an earlier resume_step" if state.step else "choose another init_from"
        raise NumericalError(f"{name} is not finite before step {state.step + 1}; {remedy}")
    return state


def resume(config: TrainConfig, state: TrainState, data: str = "") -> None:
    """Resume from the checkpoint that `config` asks for, if there is one (restore.py)."""
    record = run_record(config, data)
    restore_checkpoint(record, state, config.resume_step, scratch=config.resume == "scratch")


def open_saver(config: TrainConfig, state: TrainState, data: str = "") -> Saver:
    """Open the saver of the run; `data` is the fingerprint of the training data."""
    return Saver(run_record(config, data), config.checkpoint, state)


def open_loader(config: TrainConfig, state: TrainState) -> TrainLoader:
    """Open this rank's loader of the train split, at the run's step."""
    worker, dataset = state.worker, open_split(data_of(config), "train")
    if answers := open_recorded_logits(config.compress):
        dataset = DistillationDataset(dataset, answers)
    return TrainLoader(
        dataset,
        config.seed,
        config.batch_size,
        config.micro_batch_size,
        worker.data_rank,
        worker.data_degree,
        first_step=state.step,
        pin_memory=worker.device.type == "cuda",
        first_sample=state.samples,
        left_out=state.guard.skipped_steps,
        order_batch_size=state.order_batch_size,
        repeated=config.overfit_steps * (state.order_batch_size or config.batch_size),
    )


def open_recorder(config: TrainConfig, runtime: Runtime, state: TrainState) -> Recorder:
    """Open the recorder of metrics.jsonl and the console, which writes on the first rank."""
    # The averages of a sample: text fills its samples, sentences do not; chats are learned in part.
    train_set = open_split(data_of(config), "train")
    targets = max(1, round(train_set.targets / len(train_set)))
    length = round(train_set.positions / len(train_set)) or targets
    lengths = unwrap_transformer(state.worker).block_lengths(length)
    flops = flops_per_sample(config.model, length, length, lengths, targets) / targets
    run = RunInfo(
        Path(config.run_dir),
        steps=config.steps,
        start_step=state.step,
        resolved=asdict(config),
        flops_per_token=flops,
        unit=task_of(config.data, config.model).unit,
        precision_name=resolve_precision(config.precision, runtime.device).name,
        device=runtime.device,
        devices=runtime.world_size,
    )
    return Recorder(config.metrics, run, first=runtime.rank == 0)


@dataclass(frozen=True)
class Run:
    """A run on this rank, with its data loader, recorder, saver and supervisor."""

    config: TrainConfig
    state: TrainState
    loader: TrainLoader
    recorder: Recorder
    saver: Saver
    supervisor: Supervisor


@dataclass(frozen=True)
class Step:
    """Results of a step, on the device: this rank's part of the mean loss, and gradient norm."""

    loss: Tensor
    grad_norm: Tensor
    lr: float


def take_step(config: TrainConfig, state: TrainState, micro_batches: list[MicroBatch]) -> Step:
    """Take one optimizer step; nothing is read back, so that the host runs ahead of the device."""
    worker, scale = state.worker, state.loss_scale.scale
    lr = learning_rate_at(state.step, config.steps, config.optim)
    worker.zero_grad()
    loss, count = worker.forward_backward(micro_batches, scale)
    grad_norm = worker.clip_grad_norm(config.optim.max_grad_norm, scale)
    drop, overflow = state.guard.check_step(worker, loss, grad_norm, state.loss_scale)
    state.optimizer.step(lr, drop)
    state.tokens += count
    state.step += 1
    state.samples += config.batch_size
    state.compression.prepare_step(state.step, config.steps)
    state.loss_scale.update(overflow)
    return Step(loss, grad_norm, lr)


def take_steps(run: Run) -> None:
    """Train until `config.steps`; log, evaluate and save when due.

    Raises StoppedError after a checkpoint, if a signal has requested it.
    """
    config, state, recorder, supervisor = run.config, run.state, run.recorder, run.supervisor
    recorder.start_clock(int(state.tokens.item()))
    state.compression.prepare_step(state.step, config.steps)
    supervisor.raise_if_stopping()
    # the previous start stopped before this evaluation
    if state.step and supervisor.any_rank(recorder.needs_evaluation("valid", state.step)):
        evaluate_if_due(run)
        supervisor.raise_if_stopping()
    saved_every = config.checkpoint.every
    while state.step < config.steps:
        with recorder.track_data_wait():
            micro_batches = next(run.loader)
        with supervisor.watch.track_step(), record_timeline(state, recorder):
            step = take_step(config, state, micro_batches)
        recorder.step_done()
        due = any(is_due(state.step, n, config.steps) for n in (config.eval.every, saved_every))
        supervisor.finish_step(state.step, settle=due)
        if recorder.is_due(state.step):
            log_step(run, step)
        compared = config.checkpoint.check_replicas_every
        if compared and state.step % compared == 0:
            with recorder.pause_training("other"):
                check_replicas(state.step, state.worker, state.optimizer, recorder, config.run_dir)
        eval_loss = evaluate_if_due(run)
        if supervisor.stopping or is_due(state.step, saved_every, config.steps):
            save_checkpoint(run, eval_loss)
            supervisor.raise_if_stopping()


def evaluate_if_due(run: Run) -> float | None:
    """Return the loss on the valid split, if an evaluation is due.

    A stopping run leaves it to its next start.
    """
    config, state, supervisor = run.config, run.state, run.supervisor
    if supervisor.stopping or not is_due(state.step, config.eval.every, config.steps):
        return None
    with run.recorder.pause_training("evaluation"), suppress(StoppedError):
        values = evaluate_split(run, "valid", config.eval.samples)
        run.recorder.log_evaluation(state.step, "valid", values)
        return values["eval_loss"]
    return None


def save_checkpoint(run: Run, eval_loss: float | None) -> None:
    """Save a checkpoint; a stopping run waits for it."""
    with run.recorder.pause_training("save"), run.supervisor.watch.allow_long():
        process_bad_steps(run, saving=True)  # never save NaN
        run.saver.save(run.state, eval_loss)
        if run.supervisor.stopping or run.config.checkpoint.huggingface_every:
            run.saver.wait()
        if not run.supervisor.stopping:
            export_checkpoint(run.config, run.state.step, run.state.worker.device)
    log_saves(run)


def log_saves(run: Run) -> None:
    """Write a metrics record for each save finished since the last call."""
    for record in run.saver.finished_saves():
        run.recorder.log_save(record)


def process_bad_steps(run: Run, saving: bool = False) -> None:
    """Handle the bad steps recorded since the last call: stop, skip or roll back."""
    state = run.state
    state.guard.process_bad_steps(
        state.step,
        state.worker,
        run.loader,
        run.recorder,
        run.saver.wait,
        partial(not_finite, state),
        saving,
    )


@contextmanager
def record_timeline(state: TrainState, recorder: Recorder) -> Iterator[None]:
    """Record and draw the step in this context, if metrics.timeline asks for it."""
    if not recorder.records_timeline(state.step + 1):
        yield
        return
    with state.worker.record_pipeline() as recording:
        yield
    with recorder.pause_training():
        recorder.draw_timeline(state.step, recording.gather_spans(), recording.schedule)


def log_step(run: Run, step: Step) -> None:
    """Write a metrics record; only here the host waits for the device."""
    state = run.state
    process_bad_steps(run)
    run.recorder.log_training(
        state.step,
        state.worker.sum_over_data(step.loss).item(),
        step.grad_norm.item(),
        step.lr,
        int(state.tokens.item()),
        run.loader.wait_seconds,
    )
    log_saves(run)
    run.supervisor.write_status()


def finish_run(run: Run) -> dict[str, float]:
    """Evaluate the test split, show a sample, finish the last save; return the test values."""
    config, state, recorder = run.config, run.state, run.recorder
    values: dict[str, float] = {}
    if config.eval.test and run.supervisor.any_rank(recorder.needs_evaluation("test", state.step)):
        with recorder.pause_training("evaluation"):
            values = evaluate_split(run, "test", samples=0)
        recorder.log_evaluation(state.step, "test", values)
    show_sample(run)
    with recorder.pause_training("save"), run.supervisor.watch.allow_long():
        run.saver.wait(last=True)
    log_saves(run)
    return values


def show_sample(run: Run) -> None:
    """Show samples of the trained model's output, where its task has any."""
    if not run.config.metrics.sample_tokens:
        return
    try:
        with run.supervisor.watch.allow_long():
            text = make_samples(run.config, run.state.worker)
        if text:
            run.recorder.log_sample(text)
    except UserError as error:  # the model has diverged
        run.recorder.print_line(f"no sample: {error}")


def evaluate_split(run: Run, split: str, samples: int) -> dict[str, float]:
    """Return the metrics of a split (evaluate.py); the test split also decodes.

    Raises StoppedError if a signal requests it meanwhile.
    """
    config, worker = run.config, run.state.worker
    task = task_of(config.data, config.model)
    local_batch = config.batch_size // worker.data_degree
    decoding = None
    if task.decodes_in_test and split == "test":
        tokenizer = open_tokenizer(data_of(config))
        assert tokenizer is not None
        decoding = Decoding(tokenizer, config.eval.beams)
    values = evaluate_model(
        worker,
        open_split(data_of(config), split),
        task=task,
        samples=samples,
        decoding=decoding,
        micro_batch_size=config.micro_batch_size or local_batch,
        between=partial(run.supervisor.raise_if_stopping, settle=False),
    )
    run.supervisor.raise_if_stopping()
    return values


def is_due(step: int, every: int, steps: int) -> bool:
    """Return whether an event of this interval (0 = only at the end) is due at this step."""
    return step == steps or (every > 0 and step % every == 0)
