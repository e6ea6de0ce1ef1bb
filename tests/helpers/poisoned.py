"""Runs with bad numbers in them, and the same runs made by hand without the bad steps."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from parallel.errors import UserError
from parallel.grad_norm import local_tensor
from parallel.strategy import StrategyConfig, resolve_degrees, world_size
from trainer import loop
from trainer.config.train import TrainConfig
from trainer.data.sampler import SampleOrder, order_positions
from trainer.loss import cross_entropy_sum
from trainer.metrics.recorder import Recorder
from trainer.run.run_dir import open_run_dir
from trainer.state import TrainState

LAYOUTS = {
    "single": StrategyConfig(),
    "ddp 2": StrategyConfig(replicate=2),
    "fsdp 2": StrategyConfig(shard=2),
    "tensor 2": StrategyConfig(tensor=2),
    "pipeline 2": StrategyConfig(pipeline=2),
}
BATCH = 8


class NanGradient(torch.autograd.Function):
    """Nothing forwards, NaN backwards."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * torch.nan


POISONS = {
    "nan": lambda loss: loss * torch.nan,
    "inf": lambda loss: loss + torch.inf,  # of a finite gradient
    "gradient": NanGradient.apply,
    "spike": lambda loss: loss * 1e4,
}


def train(
    runtime, config: TrainConfig, poison: str, bad: set[int], rank: int, kill_after: int = 0
) -> tuple[TrainState | None, str]:
    """Train where, on one rank, `bad` steps of the data are poisoned: a loss, or what they leave.

    The state at the end, None after the kill at that step (counted as they are made); and the
    message of the error that ended the run.
    """
    config = replace(config, strategy=resolve_degrees(config.strategy, runtime.world_size))
    pending, states, steps = [], [], iter(range(1, 100))
    take_step, step_done = loop.take_step, Recorder.step_done

    def poisoned_step(config, state, micro_batches):
        states[:] = [state]
        place = order_positions(state.samples, 1, state.guard.skipped_steps)[0]
        now = place // BATCH in bad and runtime.rank == rank
        pending[:] = [True] * (now and poison in POISONS)
        done = take_step(config, state, micro_batches)
        if now and poison not in POISONS:
            moments = next(iter(state.optimizer.state().values()))
            weight = next(iter(state.worker.parameters().values())).detach()
            local_tensor({"weight": weight, **moments}[poison]).view(-1)[:1] = torch.inf
        return done

    def poisoned_loss(*args, **options):
        loss = cross_entropy_sum(*args, **options)
        return POISONS[poison](loss) if pending and pending.pop() else loss

    def kill(self):
        step_done(self)
        if next(steps) == kill_after:
            raise KeyboardInterrupt

    with (
        mock.patch.object(loop, "take_step", poisoned_step),
        mock.patch("trainer.loss.cross_entropy_sum", poisoned_loss),
        mock.patch.object(Recorder, "step_done", kill),
    ):
        try:
            loop.train(config, runtime)
        except KeyboardInterrupt:
            return None, ""
        except UserError as error:
            return states[0], str(error)
    return states[0], ""


def by_hand(runtime, config: TrainConfig, data_steps: list[int | None]) -> TrainState:
    """A run that learns from these steps of the data; from nothing at a step of None."""
    config = replace(
        config,
        run_dir=f"{config.run_dir}/none",
        strategy=resolve_degrees(config.strategy, runtime.world_size),
    )
    state = loop.start_run(config, runtime)
    loader = loop.open_loader(config, state)
    for step in data_steps:
        if step is None:
            state.step += 1
        else:
            loop.take_step(config, state, loader._load_step(step))
    loader.close()
    return state


def parts(state: TrainState) -> dict[str, Tensor]:
    """This rank's part of weights and moments, and the number of updates."""
    found = {
        name: local_tensor(p.detach()).clone() for name, p in state.worker.parameters().items()
    }
    for name, moments in state.optimizer.state().items():
        found |= {f"{name}, {key}": local_tensor(m).clone() for key, m in moments.items()}
    return found | {"updates": state.optimizer.update_count().clone()}


def compared(runtime, config, poison, bad, rank, data_steps, kill_after=0) -> tuple[list[str], str]:
    """What differs between the poisoned run, resumed if it is killed, and one by hand."""
    state, error = train(runtime, config, poison, bad, rank, kill_after)
    if state is None:
        state, error = train(runtime, config, poison, bad, rank)
    assert state is not None
    ours, theirs = parts(state), parts(by_hand(runtime, config, data_steps))
    return [name for name in theirs if not torch.equal(ours[name], theirs[name])], error


def run(ranks, config: TrainConfig, layout: str, function, *args, **changes) -> tuple:
    """The config it was run with, and what the ranks return."""
    config = replace(config, strategy=LAYOUTS[layout], **changes)
    open_run_dir(config)
    return config, ranks.run(world_size(config.strategy), function, config, *args)


def lines(config: TrainConfig) -> list[dict]:
    text = (Path(config.run_dir) / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


OF_GUARD = ("bad_step", "replicas_differ")


def events(config: TrainConfig) -> list[dict]:
    return [line for line in lines(config) if line.get("event") in OF_GUARD]


def samples(config: TrainConfig, step: int, shares: slice = slice(None)) -> list[int]:
    """The samples of a step of the data, by the pure order of samples."""
    size = len(loop.open_split(config.data, "train"))
    order = SampleOrder(config.seed, size)
    ids = [order(position)[1] for position in range(step * BATCH, (step + 1) * BATCH)]
    return sorted(ids[shares])


def ended(runtime, config, poison, bad, rank) -> str:
    return train(runtime, config, poison, bad, rank)[1]


def again_and_again(runtime, config, bad, kill_after) -> str:
    last = runtime.world_size - 1
    state, message = train(runtime, config, "nan", bad, last, kill_after)
    return ended(runtime, config, "nan", bad, last) if state is None else message
