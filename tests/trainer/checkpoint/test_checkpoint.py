"""Checkpoints: whole or not there, loaded in place, refused when the shape is another."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import tiny
import torch

from parallel.strategy import StrategyConfig, world_size
from trainer.checkpoint.manifest import read_manifest
from trainer.checkpoint.restore import load_weights
from trainer.config.train import OptimConfig, TrainConfig, UserError
from trainer.loop import resume
from trainer.optim.registry import build_optimizer
from trainer.precision import PRECISIONS, LossScale
from trainer.resilience.bad_steps import BadStepGuard, BadStepPolicy
from trainer.state import TrainState


def state_of(runtime, model, seed: int = 0, strategy: StrategyConfig | None = None) -> TrainState:
    worker = tiny.make_worker(runtime, model, strategy, seed)
    zero = torch.zeros((), dtype=torch.int64)
    scale = LossScale(PRECISIONS["fp16"], runtime.device)
    optimizer = build_optimizer(worker.parameters(), OptimConfig())
    guard = BadStepGuard(BadStepPolicy("stop", 5, 0.0, 64), "nowhere", runtime.device)
    return TrainState(worker, optimizer, scale, guard, zero)


def run_in(folder, strategy: StrategyConfig | None = None) -> TrainConfig:
    return TrainConfig(run_dir=str(folder), strategy=strategy or StrategyConfig())


def round_trip(runtime, folder) -> None:
    state = state_of(runtime, tiny.LLAMA)
    for parameter in state.worker.model.parameters():
        parameter.grad = torch.randn_like(parameter)
    for _ in range(3):
        state.optimizer.step(0.1, torch.zeros(()))
    state.step, state.tokens = 7, torch.tensor(123)
    state.loss_scale.scale.fill_(512.0)
    tiny.save(run_in(folder), state)
    other = state_of(runtime, tiny.LLAMA, seed=1)
    resume(run_in(folder), other)
    assert other.step == 7 and other.tokens.item() == 123
    assert other.loss_scale.scale.item() == 512.0
    assert other.optimizer.update_count().item() == 3
    for mine, theirs in zip(
        other.worker.model.parameters(), state.worker.model.parameters(), strict=True
    ):
        assert torch.equal(mine, theirs)
    for name, moments in other.optimizer.state().items():
        for key, moment in moments.items():
            assert torch.equal(moment, state.optimizer.state()[name][key])
    weights = tiny.make_worker(runtime, tiny.LLAMA, seed=1)
    load_weights(folder, weights)
    assert torch.equal(weights.model.head.norm.weight, state.worker.model.head.norm.weight)


def test_all_of_the_state_comes_back(ranks, tmp_path):
    ranks.run(1, round_trip, tmp_path)


def whole_state(state: TrainState) -> dict[str, torch.Tensor]:
    """Weights and moments that this rank has a part of, as whole tensors."""
    moments = {
        f"{name}, {key}": moment
        for name, moments in state.optimizer.state().items()
        for key, moment in moments.items()
    }
    return {name: tiny.whole(t) for name, t in {**state.worker.parameters(), **moments}.items()}


def write(runtime, folder, model, strategy) -> tuple[Path, dict[str, torch.Tensor]]:
    state = state_of(runtime, model, strategy=strategy)
    for parameter in state.worker.model.parameters():
        parameter.grad = 0.1 * parameter.detach() + 0.01  # of a tied one the same on both ranks
    for _ in range(2):
        state.optimizer.step(0.1, torch.zeros(()))
    return tiny.save(run_in(folder, strategy), state), whole_state(state)


def read(runtime, folder, model, strategy) -> dict[str, torch.Tensor]:
    state = state_of(runtime, model, seed=1, strategy=strategy)
    resume(run_in(folder, strategy), state)
    return whole_state(state)


LAYOUTS = {
    "single": StrategyConfig(),
    "pipeline 2": StrategyConfig(pipeline=2),
    "tensor 2 × pipeline 2": StrategyConfig(tensor=2, pipeline=2),
    "fsdp 2": StrategyConfig(shard=2),
    "fsdp 2 × pipeline 2": StrategyConfig(shard=2, pipeline=2),
    "ddp 2 × pipeline 2": StrategyConfig(replicate=2, pipeline=2),
}


@pytest.mark.parametrize("model", [tiny.GPT, tiny.TRANSLATOR], ids=["decoder", "encoder-decoder"])
@pytest.mark.parametrize(("first", "then"), list(pairwise([*LAYOUTS, "single"])))
def test_another_layout_reads_the_very_same_state(ranks, tmp_path, model, first, then):
    assert model.tied
    wrote = ranks.run(world_size(LAYOUTS[first]), write, tmp_path, model, LAYOUTS[first])
    saved = {name: tensor for _, tensors in wrote for name, tensor in tensors.items()}
    found = ranks.run(world_size(LAYOUTS[then]), read, tmp_path, model, LAYOUTS[then])
    assert {name for tensors in found for name in tensors} == saved.keys()
    for tensors in found:
        assert all(torch.equal(tensor, saved[name]) for name, tensor in tensors.items())
    names = read_manifest(wrote[0][0]).tensors
    assert "model.embed.tokens.weight" in names
    assert not [name for name in names if "head.output.weight" in name]  # it is the same


def other_shape(runtime, folder) -> list[str]:
    tiny.save(run_in(folder), state_of(runtime, tiny.LLAMA))
    messages = []
    for changes in ({"ffn_width": 48}, {"layers": 3}, {"layers": 1}):
        try:
            resume(run_in(folder), state_of(runtime, replace(tiny.LLAMA, **changes)))
        except UserError as error:
            messages.append(str(error))
    return messages


def test_another_shape_is_refused_with_the_parameter(ranks, tmp_path):
    wider, deeper, flatter = ranks.run(1, other_shape, tmp_path)[0]
    assert "blocks.0.feed_forward.gate.weight is (32, 16) there and (48, 16)" in wider
    assert "blocks.2.attention_norm.weight is missing there" in deeper
    assert "blocks.1.attention_norm.weight is (16,) there and missing in this model" in flatter
