"""The bytes on the wire of a step on fake ranks, beside their closed form."""

from collections.abc import Iterator
from functools import partial

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from parallel.comm_volume.counter import Payload
from parallel.parallelize import parallelize
from parallel.strategy import AXES, StrategyConfig, world_size
from trainer.build import parallel_model
from trainer.config.train import LoraConfig, ModelConfig
from trainer.plan.fake_ranks import fake_materialize, fake_ranks, visible_memory
from trainer.plan.live_bytes import LiveBytes
from trainer.plan.traced_replicas import wrap_traced
from trainer.precision import PRECISIONS
from trainer.verify.comm_volume import count_traffic


def traced_traffic(
    strategy: StrategyConfig, model: ModelConfig, rank: int = 0, lora: LoraConfig | None = None
) -> tuple[Payload, Payload]:
    """Return what `step_traffic` returns, for one of ranks that do not exist.

    The process must have no process group.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    build = partial(parallelize, materialize=fake_materialize(mode), wrap=wrap_traced)
    with fake_ranks(rank, world_size(strategy)) as runtime, visible_memory(LiveBytes(), "cpu"):
        worker = parallel_model(
            model, strategy, runtime, PRECISIONS["bf16"], lora=lora, parallelize=build
        )
        # Each position of targets without data has logits.
        worker.count_valid = lambda targets: torch.tensor(targets.numel())
        with mode:
            return count_traffic(worker, strategy)


def products_of_axes(ranks: int) -> Iterator[StrategyConfig]:
    """Yield every product of the degrees of all axes that makes this many ranks."""

    def split(left: int, axes: tuple[str, ...]) -> Iterator[dict[str, int]]:
        if len(axes) == 1:
            yield {axes[0]: left}
            return
        for degree in range(1, left + 1):
            if left % degree == 0:
                for rest in split(left // degree, axes[1:]):
                    yield {axes[0]: degree} | rest

    for degrees in split(ranks, AXES):
        yield StrategyConfig(**degrees)  # type: ignore[arg-type]
