"""Find what would make a GPU wait in the real training step, on fake ranks and without a GPU."""

from collections import Counter
from dataclasses import dataclass, replace
from functools import partial, partialmethod
from unittest import mock

import torch
import torch._dynamo
from torch import nn
from torch._dynamo.utils import counters

from parallel.parallelize import parallelize
from parallel.runtime import Runtime
from trainer.build import build_worker
from trainer.compress.compression import Compression
from trainer.config.train import TrainConfig
from trainer.loop import take_step
from trainer.nn.sequence import Inputs
from trainer.plan.fake_ranks import fake_ranks
from trainer.plan.host_waits import HostWaits
from trainer.plan.inputs import Shapes
from trainer.plan.traced_replicas import wrap_traced
from trainer.state import TrainState, untrained_state
from trainer.tasks.registry import task_of

STEPS = 2  # the second compiles nothing


@dataclass(frozen=True)
class GraphCount:
    """The graphs of a step whose blocks are compiled."""

    graphs: int
    kinds: int  # of blocks, each of which may have one graph
    breaks: tuple[str, ...]  # the reason of each
    later: int  # graphs made after the first step

    @property
    def one_per_kind(self) -> bool:
        """Return whether each kind of block is one graph, made in the first step."""
        return self.graphs == self.kinds and not self.breaks and not self.later


def count_graphs(
    config: TrainConfig, world_size: int, micro_batches: list[Shapes], rank: int = 0
) -> GraphCount:
    """Trace the blocks of one rank's step with torch.compile and count their graphs.

    The step runs on zeros, without a compiler behind the graphs of forward and backward; the other
    ranks do not exist. The process must have no process group.
    """
    torch._dynamo.reset()
    counters.clear()
    traced = partialmethod(nn.Module.compile, backend="aot_eager")
    with mock.patch.object(nn.Module, "compile", traced), fake_ranks(rank, world_size) as runtime:
        state, made = _build_state(config, runtime), []
        for _ in range(STEPS):
            take_step(config, state, _zeros(micro_batches))
            made.append(counters["stats"]["unique_graphs"])
        kinds = Counter(_kind_of(block) for block in state.worker.model.blocks.values())
    breaks = tuple(reason.partition("\n")[0] for reason in counters["graph_break"])
    return GraphCount(made[-1], len(kinds), breaks, made[-1] - made[0])


def find_host_waits(
    config: TrainConfig, world_size: int, micro_batches: list[Shapes], rank: int = 0
) -> list[str]:
    """Return what makes the host wait for a GPU in one rank's step, an entry for each time.

    These are numbers read from it, sizes that only it knows, and copies that are not pinned. Blocks
    run as eager ones. The process must have no process group.
    """
    with fake_ranks(rank, world_size) as runtime:
        state = _build_state(replace(config, compile=False), runtime)
        for _ in range(STEPS):
            inputs = _zeros(micro_batches)
            waits = HostWaits(tensor for each in inputs for tensor in each.values())
            with waits, waits.copies:
                take_step(config, state, inputs)
    return waits.found


def _build_state(config: TrainConfig, runtime: Runtime) -> TrainState:
    compression, task = Compression(config.compress), task_of(config.data, config.model)
    build = partial(parallelize, wrap=wrap_traced)
    worker = build_worker(config, runtime, compression, task, build)
    return untrained_state(config, runtime, worker, compression, {})


def _zeros(micro_batches: list[Shapes]) -> list[Inputs]:
    return [
        {name: torch.zeros(shape.sizes, dtype=shape.dtype) for name, shape in shapes.items()}
        for shapes in micro_batches
    ]


def _kind_of(block: nn.Module) -> tuple[object, ...]:
    """Return what tells blocks of one model apart: their layers, and their place."""
    facts = ("stream", "windowed", "turn_norm")
    shapes = tuple((name, p.shape) for name, p in block.named_parameters())
    return (shapes, *(str(getattr(block, fact, None)) for fact in facts))
