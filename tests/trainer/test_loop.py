"""The loop on real text: every layout, a restart, accumulation and bad numbers."""

import json
import shutil
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from unittest import mock

import pytest
import torch

from conf.validation.validate import fill_from_data
from parallel.grad_norm import local_tensor
from parallel.strategy import resolve_degrees, world_size
from trainer import loop
from trainer.checkpoint.folder import list_checkpoints
from trainer.config.train import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    LossConfig,
    MetricsConfig,
    ModelConfig,
    OptimConfig,
    StrategyConfig,
    TrainConfig,
    UserError,
)
from trainer.data import prepare_data
from trainer.data.loader import TrainLoader
from trainer.metrics.recorder import Recorder
from trainer.run.run_dir import open_run_dir

PLAY = files("trainer.data") / "bundled" / "shakespeare" / "valid.txt"


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> TrainConfig:
    folder = tmp_path_factory.mktemp("loop")
    (folder / "play.txt").write_text(PLAY.read_text()[:30_000])
    data = DataConfig(
        path=str(folder / "play.txt"), vocab_size=300, seq_len=16, cache=str(folder / "cache")
    )
    draft = TrainConfig(
        data=data,
        model=ModelConfig(layers=2, width=32, heads=4, kv_heads=2, ffn_width=64, dropout=0.1),
        optim=OptimConfig(lr=1e-2, warmup_steps=2),
        eval=EvalConfig(every=0, samples=8, test=False),
        checkpoint=CheckpointConfig(every=3, keep=2),
        metrics=MetricsConfig(every=1, sample_tokens=0),
        precision="fp64",
        device="cpu",
        steps=7,
        batch_size=8,
    )
    return fill_from_data(draft, prepare_data(data))


def run(runtime, config: TrainConfig, stop_after: int = 0) -> dict[str, torch.Tensor]:
    """Train on this rank, or until it is killed after a step; this rank's part of the weights."""
    config = replace(config, strategy=resolve_degrees(config.strategy, runtime.world_size))
    steps = iter(range(1, config.steps + 1))
    step_done = Recorder.step_done

    def kill(self: Recorder) -> None:
        step_done(self)
        if next(steps) == stop_after:
            raise KeyboardInterrupt

    with mock.patch.object(Recorder, "step_done", kill):
        try:
            loop.train(config, runtime)
        except KeyboardInterrupt:
            return {}
    worker = loop.start_run(config, runtime).worker
    return {name: local_tensor(p.detach()).clone() for name, p in worker.model.named_parameters()}


def lines(config: TrainConfig) -> list[dict]:
    text = (Path(config.run_dir) / "metrics.jsonl").read_text()
    found = [json.loads(line) for line in text.splitlines()]
    return [line for line in found if "event" not in line]


def losses(config: TrainConfig) -> list[float]:
    return [line["loss"] for line in lines(config) if "loss" in line]


def train(ranks, config: TrainConfig, run_dir: Path, stop_after: int = 0, **changes):
    config = replace(config, run_dir=str(run_dir), **changes)
    open_run_dir(config)
    world = world_size(config.strategy)
    return config, ranks.run(world, run, config, stop_after, timeout_seconds=300.0)


PIPELINE = StrategyConfig(pipeline=2)
ONE_F_ONE_B = StrategyConfig(pipeline=2, schedule="1f1b")
LAYOUTS = {
    "ddp 2": {"strategy": StrategyConfig(replicate=2)},
    "fsdp 2": {"strategy": StrategyConfig(shard=2)},
    "hsdp 2x2": {"strategy": StrategyConfig(replicate=2, shard=2)},
    "accumulation": {"micro_batch_size": 2},
    "unequal micro-batches": {"micro_batch_size": 3},
    "fsdp 2, accumulation": {"strategy": StrategyConfig(shard=2), "micro_batch_size": 1},
    "loss in pieces": {"loss": LossConfig(chunks=3)},
    "fsdp 2, loss in pieces": {"loss": LossConfig(chunks=5), "strategy": StrategyConfig(shard=2)},
    "tensor 2, loss in pieces": {
        "loss": LossConfig(chunks=3),
        "strategy": StrategyConfig(tensor=2),
    },
    "recomputation": {"activation_checkpointing": "block"},
    "compiled": {"compile": True, "strategy": StrategyConfig(shard=2)},
    "tensor 2": {"strategy": StrategyConfig(tensor=2)},
    "tensor 4, accumulation": {"strategy": StrategyConfig(tensor=4), "micro_batch_size": 3},
    "tensor 2, kept products": {
        "strategy": StrategyConfig(tensor=2),
        "activation_checkpointing": "selective",
    },
    "tensor 2, recomputation": {
        "strategy": StrategyConfig(tensor=2),
        "activation_checkpointing": "block",
    },
    "tensor 2, compiled": {"compile": True, "strategy": StrategyConfig(tensor=2)},
    "fsdp 2 x tensor 2": {"strategy": StrategyConfig(shard=2, tensor=2)},
    "ddp 2 x tensor 2": {"strategy": StrategyConfig(replicate=2, tensor=2), "micro_batch_size": 2},
    "pipeline 2": {"strategy": PIPELINE, "micro_batch_size": 2},
    "pipeline 2, one micro-batch": {"strategy": PIPELINE},
    "pipeline 2, unequal micro-batches": {"strategy": ONE_F_ONE_B, "micro_batch_size": 3},
    "pipeline 2, zero bubble": {
        "strategy": StrategyConfig(pipeline=2, schedule="zero_bubble"),
        "micro_batch_size": 2,
    },
    "pipeline 2, loss in pieces": {
        "strategy": ONE_F_ONE_B,
        "micro_batch_size": 2,
        "loss": LossConfig(chunks=3),
    },
    "fsdp 2 x pipeline 2, loss in pieces": {
        "strategy": StrategyConfig(shard=2, pipeline=2),
        "micro_batch_size": 1,
        "loss": LossConfig(chunks=3),
    },
    "pipeline 2, kept products": {
        "strategy": PIPELINE,
        "micro_batch_size": 2,
        "activation_checkpointing": "selective",
    },
    "pipeline 2, recomputation": {
        "strategy": ONE_F_ONE_B,
        "micro_batch_size": 2,
        "activation_checkpointing": "block",
    },
    "fsdp 2 x pipeline 2, 1f1b, compiled": {
        "strategy": StrategyConfig(shard=2, pipeline=2, schedule="1f1b"),
        "micro_batch_size": 2,
        "compile": True,
    },
    "ddp 2 x pipeline 2": {
        "strategy": StrategyConfig(replicate=2, pipeline=2),
        "micro_batch_size": 2,
    },
    "tensor 2 x pipeline 2": {
        "strategy": StrategyConfig(tensor=2, pipeline=2),
        "micro_batch_size": 2,
    },
}


@pytest.fixture(scope="module")
def single(ranks, config, tmp_path_factory):
    return train(ranks, config, tmp_path_factory.mktemp("single"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_has_the_losses_of_one_process(ranks, config, single, tmp_path, layout):
    if "compiled" in layout and shutil.which("g++") is None:
        pytest.skip("torch.compile on a CPU needs a C++ compiler")
    other, _ = train(ranks, config, tmp_path, **LAYOUTS[layout])
    assert len(losses(other)) == 7
    assert losses(other) == pytest.approx(losses(single[0]), rel=1e-12)
    assert lines(other)[-1]["eval_loss"] == pytest.approx(
        lines(single[0])[-1]["eval_loss"], rel=1e-12
    )
    assert losses(other)[-1] < losses(other)[0] - 0.5  # and it learns


# fp16 adds the loss scale to what is kept, and who has seen an overflow: on every axis once.
@pytest.mark.parametrize(
    ("strategy", "precision"),
    [
        (StrategyConfig(), "fp32"),
        (StrategyConfig(), "fp16"),
        (StrategyConfig(replicate=2), "fp16"),
        (StrategyConfig(shard=2), "fp32"),
        (StrategyConfig(tensor=2), "fp16"),
        (PIPELINE, "fp32"),
        (StrategyConfig(shard=2, pipeline=2), "fp16"),
    ],
    ids=[
        "single, fp32",
        "single, fp16",
        "ddp 2, fp16",
        "fsdp 2, fp32",
        "tensor 2, fp16",
        "pipeline 2, fp32",
        "fsdp 2 x pipeline 2, fp16",
    ],
)
def test_a_restart_is_bit_for_bit_the_unbroken_run(ranks, config, tmp_path, strategy, precision):
    changes = {"strategy": strategy, "precision": precision, "micro_batch_size": 2}
    unbroken, weights = train(ranks, config, tmp_path / "unbroken", **changes)
    broken, nothing = train(ranks, config, tmp_path / "broken", stop_after=5, **changes)
    assert nothing[0] == {}
    # Of the five steps three are saved; the lines of the others were written and come again.
    assert [step for step, _ in list_checkpoints(broken.run_dir)] == [3]
    assert lines(broken)[-1]["step"] == 4
    broken, again = train(ranks, config, tmp_path / "broken", **changes)
    assert losses(broken) == losses(unbroken)
    assert [line["step"] for line in lines(broken)] == [line["step"] for line in lines(unbroken)]
    assert [line["tokens"] for line in lines(broken) if "tokens" in line] == [
        line["tokens"] for line in lines(unbroken) if "tokens" in line
    ]
    for rank, tensors in enumerate(weights):
        assert all(torch.equal(again[rank][name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize(
    ("first", "then"),
    [
        (StrategyConfig(shard=2), StrategyConfig(tensor=4)),
        (ONE_F_ONE_B, StrategyConfig(tensor=2, pipeline=2)),
        (StrategyConfig(replicate=2, pipeline=2), StrategyConfig()),
    ],
)
def test_another_layout_goes_on_with_the_same_run(ranks, config, single, tmp_path, first, then):
    config = replace(config, micro_batch_size=2)
    train(ranks, config, tmp_path, stop_after=5, strategy=first)
    resumed, _ = train(ranks, config, tmp_path, strategy=then)
    assert losses(resumed) == pytest.approx(losses(single[0]), rel=1e-10)


def test_the_newest_checkpoints_are_kept(single):
    assert [step for step, _ in list_checkpoints(single[0].run_dir)] == [6, 7]
    left = [p.name for p in (Path(single[0].run_dir) / "checkpoints").iterdir()]
    assert sorted(left) == ["step-00000006", "step-00000007"]


def test_lines_have_the_contract_keys(single):
    training = next(line for line in lines(single[0]) if "loss" in line)
    assert {
        "step",
        "loss",
        "grad_norm",
        "lr",
        "tokens",
        "tokens_per_second",
        "step_seconds",
        "memory_gib",
    } <= set(training)
    assert training["tokens"] == 8 * 16
    evaluation = lines(single[0])[-1]
    assert {"step", "eval_loss", "split", "bits_per_character", "perplexity"} <= set(evaluation)


def poisoned(runtime, config: TrainConfig, bad_step: int) -> tuple[str, bool]:
    """Train with a loss that is NaN at one step; the message, and whether weights stayed finite."""
    calls = iter(range(1, 100))

    def loss(logits, targets, label_smoothing=0.0):
        total = logits.float().square().sum()
        return total * float("nan") if next(calls) == bad_step else total

    with mock.patch("trainer.loss.cross_entropy_sum", loss):
        try:
            loop.train(config, runtime)
        except UserError as error:
            worker = loop.start_run(config, runtime).worker
            finite = all(bool(p.isfinite().all()) for p in worker.model.parameters())
            return str(error), finite
    return "", False


@pytest.mark.parametrize("world", [1, 2])
def test_a_loss_that_is_not_finite_stops_the_run(ranks, config, tmp_path, world):
    config = replace(
        config,
        run_dir=str(tmp_path),
        strategy=StrategyConfig(replicate=world),
        metrics=MetricsConfig(every=100, sample_tokens=0),
    )
    open_run_dir(config)
    for message, finite in ranks.run(world, poisoned, config, 5):
        # Nothing is read back before step 6's checkpoint, and yet the step is known.
        assert "not finite at step 5" in message
        assert "step-00000003" in message
        assert "optim.lr" in message
        assert finite
    assert [step for step, _ in list_checkpoints(tmp_path)] == [3]


def stuck_loader(runtime, config: TrainConfig) -> bool:
    """Whether the data thread has ended after a run that failed in its first step."""
    closed = []
    close = TrainLoader.close
    with (
        mock.patch.object(TrainLoader, "close", lambda self: (close(self), closed.append(True))),
        mock.patch.object(Recorder, "start_clock", side_effect=RuntimeError("planted")),
        pytest.raises(RuntimeError, match="planted"),
    ):
        loop.train(config, runtime)
    return bool(closed)


def test_a_failure_closes_the_loader(ranks, config, tmp_path):
    config = replace(config, run_dir=str(tmp_path))
    open_run_dir(config)
    assert ranks.run(1, stuck_loader, config) == [True]


def test_due():
    assert [s for s in range(1, 11) if loop.is_due(s, 4, 10)] == [4, 8, 10]
    assert [s for s in range(1, 11) if loop.is_due(s, 0, 10)] == [10]
