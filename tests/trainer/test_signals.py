"""A signal to any rank: all stop at the same step, with a checkpoint that the run goes on from."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from tiny import LLAMA, text_data

from launch.cli.preflight import prepare_training
from parallel.grad_norm import local_tensor
from parallel.health.watchdog import StoppedError
from parallel.strategy import StrategyConfig
from trainer import loop
from trainer.checkpoint.folder import list_checkpoints
from trainer.config.train import (
    CheckpointConfig,
    EvalConfig,
    MetricsConfig,
    TrainConfig,
    UserError,
)
from trainer.metrics.recorder import Recorder
from trainer.resilience import supervisor
from trainer.run.run_dir import AlreadyFinishedError
from trainer.run.status import read_status


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> TrainConfig:
    return TrainConfig(
        model=replace(LLAMA, vocab_size=0, max_positions=0),
        data=text_data(tmp_path_factory.mktemp("signals")),
        precision="fp64",
        device="cpu",
        batch_size=4,
        steps=6,
        checkpoint=CheckpointConfig(every=4, keep=0),
        eval=EvalConfig(every=2),
        metrics=MetricsConfig(every=1, sample_tokens=0),
    )


def run(runtime, config: TrainConfig, signals: str = "", at: int = 0, rank: int = 0):
    """Train on this rank; `rank` is sent signals in step, evaluation or save number `at`."""
    calls = {"step": "take_step", "evaluation": "evaluate_split", "save": "save_checkpoint"}
    patches = []
    for where in calls if runtime.rank == rank else ():
        real, numbers = getattr(loop, calls[where]), iter(range(1, 100))

        def call(*args, where=where, real=real, numbers=numbers, **options):
            if f"{where} {next(numbers)}" == f"{signals.split(':')[0]} {at}":
                os.kill(os.getpid(), signal.Signals[signals.split(":")[1]])
            return real(*args, **options)

        patches.append(mock.patch.object(loop, calls[where], call))
    for patch in patches:
        patch.start()
    try:
        loop.train(config, runtime)
    except StoppedError:
        return "stopped"
    finally:
        for patch in patches:
            patch.stop()
    worker = loop.start_run(config, runtime).worker
    return {name: local_tensor(p.detach()).clone() for name, p in worker.model.named_parameters()}


def opened(config: TrainConfig, run_dir: Path, world: int) -> TrainConfig:
    strategy = StrategyConfig(shard=world)
    return prepare_training(replace(config, run_dir=str(run_dir), strategy=strategy), world)


def lines(config: TrainConfig) -> list[tuple]:
    """What is the same in every run of the same training."""
    text = (Path(config.run_dir) / "metrics.jsonl").read_text()
    keys = ("step", "split", "loss", "eval_loss", "tokens")
    records = [record for record in map(json.loads, text.splitlines()) if "event" not in record]
    return [tuple(record.get(key) for key in keys) for record in records]


@pytest.fixture(scope="module")
def unbroken(ranks, config, tmp_path_factory):
    whole = opened(config, tmp_path_factory.mktemp("whole"), 2)
    weights = ranks.run(2, run, whole)
    return lines(whole), weights


WHEN = {
    "in a step": ("step:SIGTERM", 3, 4),  # where an evaluation is due, and the ranks agree at once
    "in a step before one that is saved anyway": ("step:SIGINT", 4, 4),
    "in an evaluation": ("evaluation:SIGUSR1", 1, 2),
    "in a save": ("save:SIGTERM", 1, 4),
    "in the last evaluation but one": ("evaluation:SIGTERM", 3, 6),
    "in the evaluation of the test split": ("evaluation:SIGTERM", 4, 6),
}


@pytest.mark.parametrize("when", WHEN)
def test_all_ranks_stop_where_one_was_told_to(ranks, config, unbroken, tmp_path, when):
    signals, at, step = WHEN[when]
    config = opened(config, tmp_path, 2)
    assert ranks.run(2, run, config, signals, at, 1) == ["stopped", "stopped"]
    assert list_checkpoints(tmp_path)[-1][0] == step
    status = read_status(tmp_path)
    assert (status.state, status.step, status.checkpoint) == ("stopped", step, step)
    assert (status.reason, status.code) == (signals.split(":")[1], 75)
    again = opened(config, tmp_path, 2)
    weights = ranks.run(2, run, again)
    assert read_status(tmp_path).state == "finished"
    assert lines(again) == unbroken[0]  # none is missing, none comes twice
    for ours, theirs in zip(weights, unbroken[1], strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_one_process_stops_too(ranks, config, tmp_path):
    config = opened(config, tmp_path, 1)
    assert ranks.run(1, run, config, "step:SIGTERM", 2) == ["stopped"]
    assert [step for step, _ in list_checkpoints(tmp_path)] == [2]


def test_a_finished_run_is_left_alone(ranks, config, tmp_path):
    config = opened(config, tmp_path, 1)
    ranks.run(1, run, config)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with pytest.raises(AlreadyFinishedError, match=r"already finished at step 6 \(steps=6\)"):
        opened(config, tmp_path, 1)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    with pytest.raises(AlreadyFinishedError):
        opened(replace(config, steps=5), tmp_path, 1)
    opened(replace(config, steps=8), tmp_path, 1)


def told_before_it_starts(runtime, config: TrainConfig) -> str:
    begin = Recorder.start_clock

    def start(self: Recorder, tokens: int) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        begin(self, tokens)

    with mock.patch.object(Recorder, "start_clock", start):
        return run(runtime, config)


def test_a_signal_before_the_first_step_saves_nothing(ranks, config, tmp_path):
    config = opened(config, tmp_path, 1)
    assert ranks.run(1, told_before_it_starts, config) == ["stopped"]
    assert list_checkpoints(tmp_path) == []


def handlers_after(runtime, config: TrainConfig) -> list:
    run(runtime, config)
    return [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]


def test_handlers_are_given_back(ranks, config, tmp_path):
    config = opened(config, tmp_path, 1)
    assert ranks.run(1, handlers_after, config) == [[signal.SIG_DFL, signal.SIG_DFL]]


def restarted(runtime, config: TrainConfig, count: int) -> str:
    """What a run says that torchrun has restarted, and that fails at its first step."""
    with (
        mock.patch.dict(os.environ, TORCHELASTIC_RESTART_COUNT=str(count)),
        mock.patch.object(loop, "take_step", side_effect=RuntimeError("planted")),
        pytest.raises((RuntimeError, UserError)) as raised,
    ):
        loop.train(config, runtime)
    return str(raised.value)


def test_restarts_without_progress_end(ranks, config, tmp_path):
    config = opened(config, tmp_path, 2)
    said = [ranks.run(2, restarted, config, count)[0] for count in range(3)]
    assert said[:2] == ["planted", "planted"]
    assert said[2].startswith("no progress since step 0: 3 attempts from there have failed")
    assert "RuntimeError: planted" in said[2]
    assert read_status(tmp_path).reason.startswith("no progress since step 0")
    # Started by hand, it is tried again.
    assert ranks.run(2, restarted, config, 0)[0] == "planted"


def test_a_failed_run_leaves_word(ranks, config, tmp_path):
    config = opened(config, tmp_path, 1)
    assert ranks.run(1, restarted, config, 0) == ["planted"]
    status = read_status(tmp_path)
    assert (status.state, status.rank, status.code) == ("failed", 0, 1)
    assert (status.reason, status.error) == ("RuntimeError: planted", "RuntimeError")


def other_code(runtime, config: TrainConfig) -> str:
    code = str(runtime.rank) if runtime.rank < 2 else "1"
    with (
        mock.patch.object(loop, "source_digest", lambda: code),
        pytest.raises(UserError) as raised,
    ):
        loop.train(config, runtime)
    return str(raised.value)


def test_ranks_with_another_code_are_named(ranks, config, tmp_path):
    config = replace(config, batch_size=6)
    config = opened(config, tmp_path, 3)
    for message in ranks.run(3, other_code, config):
        assert "this project's code is another on rank 0 than on the other 2" in message


def test_the_code_is_that_of_the_files(tmp_path, monkeypatch):
    for name in ("trainer", "parallel"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.py").write_text("x = 1")
    file = tmp_path / "trainer" / "resilience" / "supervisor.py"
    monkeypatch.setattr(supervisor, "__file__", str(file))
    before = supervisor.source_digest()
    assert supervisor.source_digest() == before
    (tmp_path / "parallel" / "model.py").write_text("x = 2")
    assert supervisor.source_digest() != before
