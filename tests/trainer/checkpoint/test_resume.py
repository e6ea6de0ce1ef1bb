"""A run goes on under any other layout: the same state to the bit, the same samples, each once."""

import json
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from unittest import mock

import pytest
import tiny
import torch

from conf.validation.validate import fill_from_data
from parallel.strategy import StrategyConfig, resolve_degrees, world_size
from trainer import loop
from trainer.config.train import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    MetricsConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
)
from trainer.data import open_split, prepare_data
from trainer.data.sampler import SampleOrder, hash_to_seed
from trainer.loop import resume
from trainer.metrics.recorder import Recorder
from trainer.run.run_dir import open_run_dir
from trainer.state import TrainState

LAYOUTS = {
    "single": StrategyConfig(),
    "ddp 4": StrategyConfig(replicate=4),
    "fsdp 4": StrategyConfig(shard=4),
    "hsdp 2×2": StrategyConfig(replicate=2, shard=2),
    "tensor 2": StrategyConfig(tensor=2),
    "pipeline 2": StrategyConfig(pipeline=2),
    "tensor 2 × pipeline 2": StrategyConfig(tensor=2, pipeline=2),
    "fsdp 2 × tensor 2": StrategyConfig(shard=2, tensor=2),
}
SAVED, STEPS = 2, 4


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> TrainConfig:
    folder = tmp_path_factory.mktemp("resume")
    play = files("trainer.data") / "bundled" / "shakespeare" / "valid.txt"
    (folder / "play.txt").write_text(play.read_text()[:15_000])
    data = DataConfig(
        path=str(folder / "play.txt"), vocab_size=300, seq_len=16, cache=str(folder / "cache")
    )
    draft = TrainConfig(
        data=data,
        model=ModelConfig(layers=2, width=16, heads=4, ffn_width=32, dropout=0.1),
        optim=OptimConfig(lr=1e-2, warmup_steps=2),
        eval=EvalConfig(every=0, samples=8, test=False),
        checkpoint=CheckpointConfig(every=0, keep=0),
        metrics=MetricsConfig(every=1, sample_tokens=0),
        precision="fp64",
        device="cpu",
        steps=STEPS,
        batch_size=12,
        micro_batch_size=3,
    )
    return fill_from_data(draft, prepare_data(data))


def ids_of(config: TrainConfig, micro_batches: list[dict]) -> list[int]:
    """Which samples these are, told from what is in them."""
    train = open_split(config.data, "train")
    seed = hash_to_seed(config.seed, 0)  # of the first epoch, which none of these runs comes out of
    every = train.collate([train.sample(i, seed) for i in range(len(train))])
    known = {tuple(row.tolist()): i for i, row in enumerate(every["tokens"])}
    assert len(known) == len(train)
    return [known[tuple(row.tolist())] for micro in micro_batches for row in micro["tokens"]]


def steps_to(config: TrainConfig, state: TrainState, last: int) -> list[tuple[float, list[int]]]:
    """Train to a step; the loss of each, and the samples that this rank has learned from.

    Of the ranks that share samples only the first tells them.
    """
    loader, told = loop.open_loader(config, state), []
    mesh = state.worker.mesh
    tells = not any(mesh.get_local_rank(axis) for axis in ("pipeline", "context", "tensor"))
    while state.step < last:
        micro_batches = next(loader)
        step = loop.take_step(config, state, micro_batches)
        loss = state.worker.sum_over_data(step.loss).item()
        told.append((loss, ids_of(config, micro_batches) if tells else []))
    loader.close()
    return told


def gathered(state: TrainState) -> dict[str, torch.Tensor]:
    """Whole weights and moments of what this rank has a part of, and the number of updates."""
    found = {name: tiny.whole(p) for name, p in state.worker.parameters().items()}
    for name, moments in state.optimizer.state().items():
        found |= {f"{name}, {key}": tiny.whole(moment) for key, moment in moments.items()}
    return found | {
        "updates": state.optimizer.update_count().clone(),
        "tokens": state.tokens.clone(),
    }


def begun(runtime, config: TrainConfig, strategy: StrategyConfig, folder: Path) -> tuple:
    """The first half of a run, saved in `folder`; what it did, and its whole state."""
    config = replace(config, strategy=strategy, run_dir=str(folder))
    state = loop.start_run(config, runtime)
    told = steps_to(config, state, SAVED)
    tiny.save(config, state)
    return told, gathered(state)


def ended(runtime, config: TrainConfig, strategy: StrategyConfig, folders: dict) -> dict:
    """The second half of every run, under one layout; by layout: what it did, the state loaded."""
    state = loop.start_run(replace(config, strategy=strategy, run_dir="nowhere"), runtime)
    found = {}
    for name, folder in folders.items():
        resume(replace(config, run_dir=str(folder)), state)
        loaded = gathered(state)
        found[name] = steps_to(config, state, STEPS), loaded
    return found


def ids(results: list[list[tuple[float, list[int]]]]) -> Counter:
    """How often each sample was learned from, over all ranks and steps."""
    return Counter(i for rank in results for _, samples in rank for i in samples)


@pytest.fixture(scope="module")
def unbroken(ranks, config) -> list[tuple[float, list[int]]]:
    """The steps of a run in one process that nothing has stopped."""
    (told,) = ranks.run(1, one_process, config)
    return told


def one_process(runtime, config: TrainConfig) -> list[tuple[float, list[int]]]:
    state = loop.start_run(replace(config, run_dir="nowhere"), runtime)
    return steps_to(config, state, config.steps)


@pytest.fixture(scope="module")
def halves(ranks, config, tmp_path_factory) -> tuple[dict, dict]:
    """The first half of a run under every layout: its folder, and what each rank tells."""
    folders = {name: tmp_path_factory.mktemp("half") for name in LAYOUTS}
    told = {
        name: ranks.run(world_size(strategy), begun, config, strategy, folders[name])
        for name, strategy in LAYOUTS.items()
    }
    return folders, told


@pytest.mark.parametrize("then", LAYOUTS)
def test_every_layout_goes_on_with_the_run_of_every_other(ranks, config, halves, unbroken, then):
    folders, told = halves
    folders = {name: folder for name, folder in folders.items() if name != then}
    strategy = LAYOUTS[then]
    results = ranks.run(world_size(strategy), ended, config, strategy, folders)
    for first in folders:
        saved = {name: tensor for _, tensors in told[first] for name, tensor in tensors.items()}
        loaded = {name for result in results for name in result[first][1]}
        assert loaded == saved.keys()
        for result in results:
            for name, tensor in result[first][1].items():
                assert torch.equal(tensor, saved[name]), (first, then, name)
        losses = [loss for loss, _ in told[first][0][0] + results[0][first][0]]
        assert losses == pytest.approx([loss for loss, _ in unbroken], rel=1e-12), (first, then)
        seen = ids([told for told, _ in told[first]]) + ids([r[first][0] for r in results])
        assert set(seen.values()) == {1} and seen == ids([unbroken]), (first, then)


def part(runtime, config: TrainConfig, stop_after: int) -> list[tuple[int, list[int]]]:
    """Train until it is killed behind a step; what this rank has learned from, by step."""
    config = replace(config, strategy=resolve_degrees(config.strategy, runtime.world_size))
    take_step, seen = loop.take_step, []

    def watched(config, state, micro_batches):
        mesh = state.worker.mesh
        tells = not any(mesh.get_local_rank(axis) for axis in ("pipeline", "context", "tensor"))
        seen.append((state.step, ids_of(config, micro_batches) if tells else []))
        return take_step(config, state, micro_batches)

    step_done = Recorder.step_done

    def kill(self):
        step_done(self)
        if self._step == stop_after:
            raise KeyboardInterrupt

    with (
        mock.patch.object(loop, "take_step", watched),
        mock.patch.object(Recorder, "step_done", kill),
        suppress(KeyboardInterrupt),
    ):
        loop.train(config, runtime)
    return seen


@pytest.mark.parametrize(
    "chain",
    [
        [
            StrategyConfig(replicate=4),
            StrategyConfig(shard=2),
            StrategyConfig(),
            StrategyConfig(shard=3),
        ],
        [
            StrategyConfig(shard=2, tensor=2),
            StrategyConfig(pipeline=2),
            StrategyConfig(),
            StrategyConfig(replicate=3),
        ],
        [
            StrategyConfig(replicate=4),
            StrategyConfig(tensor=2, pipeline=2),
            StrategyConfig(),
            StrategyConfig(tensor=3, sequence_parallel=False),
        ],
    ],
    ids=["4→2→1→3", "fsdp 2 × tensor 2→pipeline 2→single→ddp 3", "ddp 4→tensor 2 × pipeline 2→…"],
)
def test_a_run_moves_through_the_world(ranks, config, tmp_path, chain):
    """Each part is killed one step behind its checkpoint, which the next goes on from."""
    config = replace(config, steps=8, checkpoint=CheckpointConfig(every=2))
    if chain[-1].tensor == 3:
        config = replace(config, model=replace(config.model, heads=6, width=24))
    (unbroken,) = ranks.run(1, one_process, config)
    config = replace(config, run_dir=str(tmp_path))
    kept: dict[int, list[int]] = {}
    for number, strategy in enumerate(chain):
        here = replace(config, strategy=strategy)
        open_run_dir(here)
        stop = 2 * number + 3 if number < len(chain) - 1 else 0
        results = ranks.run(world_size(strategy), part, here, stop)
        steps = [step for step, _ in results[0]]
        assert steps == list(range(2 * number, stop or 8))  # it went on from the checkpoint
        for step in steps:
            kept[step] = [i for told in results for s, own in told if s == step for i in own]
    assert sorted(kept) == list(range(8))
    everything = Counter(i for samples in kept.values() for i in samples)
    assert set(everything.values()) == {1} and everything == ids([unbroken])
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["loss"] for line in lines if "loss" in line}
    assert list(losses) == list(range(1, 9))
    assert list(losses.values()) == pytest.approx([loss for loss, _ in unbroken], rel=1e-10)


@pytest.mark.parametrize("sizes", [(12, 24, 6), (6, 12, 4)])
def test_a_run_moves_through_batch_sizes(ranks, config, tmp_path, sizes):
    """Each part is killed one step behind its checkpoint, which the next goes on from."""
    config = replace(
        config,
        steps=8,
        checkpoint=CheckpointConfig(every=2),
        run_dir=str(tmp_path),
        resume_changed=["batch_size"],
        micro_batch_size=2,
    )
    kept: dict[int, list[int]] = {}
    layouts = [StrategyConfig(), StrategyConfig(shard=2), StrategyConfig(replicate=2)]
    for number, (batch_size, strategy) in enumerate(zip(sizes, layouts, strict=True)):
        here = replace(config, batch_size=batch_size, strategy=strategy)
        open_run_dir(here)
        stop = 2 * number + 3 if number < len(sizes) - 1 else 0
        results = ranks.run(world_size(strategy), part, here, stop)
        for step in (step for step, _ in results[0]):
            kept[step] = [i for told in results for s, own in told if s == step for i in own]
    seen = [len(kept[step]) for step in range(8)]
    assert seen == [sizes[0]] * 2 + [sizes[1]] * 2 + [sizes[2]] * 4
    order = SampleOrder(config.seed, len(open_split(config.data, "train")))
    everything = Counter(i for samples in kept.values() for i in samples)
    assert everything == Counter(order(place)[1] for place in range(sum(seen)))
