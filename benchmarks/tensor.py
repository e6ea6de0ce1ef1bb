"""An eager training step on two CPU ranks, every layer split over them, in three ways.

`python benchmarks/tensor.py [width] [samples of 128 tokens] [segments] [steps per segment]` starts
the ranks itself:

* ours: DTensors at rest, plain tensors in compute, with and without sequence parallelism;
* DTensor compute: torch's `parallelize_module` on the same model, with and without sequence
  parallelism and its parallel loss;
* the floor: the same model with plain sliced weights, and two all-reduces a block by hand.

The segments alternate within one run, and ratios are taken segment by segment.
"""

import statistics
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)
from workload import alternate, llama, on_ranks, random_batch, train_step

from parallel.mesh import build_mesh
from parallel.runtime import Runtime
from parallel.strategy import StrategyConfig
from parallel.tensor.vocab_parallel import VocabParallel
from trainer.config.train import ModelConfig
from trainer.loss import cross_entropy_sum
from trainer.model import Transformer
from trainer.nn.init import init_rows
from trainer.nn.sequence import FullSequence

RANKS, SEQ_LEN, LAYERS = 2, 128, 4
Step = Callable[[dict[str, Tensor]], Tensor]


def ours(config: ModelConfig, runtime: Runtime, sequence_parallel: bool) -> Step:
    """The whole batch in one micro-batch."""
    strategy = StrategyConfig(tensor=RANKS, sequence_parallel=sequence_parallel)
    step = train_step(config, strategy, runtime)
    return lambda batch: step([batch])


def filled(config: ModelConfig) -> Transformer:
    """The whole model with its initial weights."""
    model = Transformer(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(init_rows(config, 0, name, p.shape, 0, p.shape[0]))
    return model


def plain_step(
    model: nn.Module, loss_sum: Callable[[Tensor, Tensor], Tensor], context: Callable = nullcontext
) -> Step:
    """Forward, backward and torch's fused AdamW by hand."""
    # Fused AdamW takes no list of DTensors and plain tensors together.
    kinds = (True, False)
    groups = [[p for p in model.parameters() if isinstance(p, DTensor) is kind] for kind in kinds]
    optimizer = torch.optim.AdamW(
        [{"params": group} for group in groups if group], lr=1e-3, fused=True
    )

    def step(batch: dict[str, Tensor]) -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with context():
            loss = loss_sum(model(batch), batch["targets"]) / batch["targets"].numel()
            loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def dtensor_compute(
    config: ModelConfig, runtime: Runtime, sequence_parallel: bool, splits_loss: bool = True
) -> Step:
    """torch's tensor parallelism, as its tutorial applies it; there logits are gathered."""
    mesh = build_mesh(StrategyConfig(tensor=RANKS), runtime.device)["tensor"]
    between = Shard(1) if sequence_parallel else Replicate()
    plan: dict = {
        "embed.tokens": RowwiseParallel(input_layouts=Replicate(), output_layouts=between),
        "head.output": ColwiseParallel(
            input_layouts=between,
            output_layouts=Shard(-1) if splits_loss else Replicate(),
            use_local_output=not splits_loss,
        ),
    }
    for i in range(LAYERS):
        branches = {"attention": ("query", "key", "value"), "feed_forward": ("gate", "up")}
        rows = {"attention": "output", "feed_forward": "down"}
        for branch, columns in branches.items():
            for column in columns:
                plan[f"blocks.{i}.{branch}.{column}"] = ColwiseParallel()
            plan[f"blocks.{i}.{branch}.{rows[branch]}"] = RowwiseParallel(output_layouts=between)
            if sequence_parallel:
                plan[f"blocks.{i}.{branch}_norm"] = SequenceParallel()
                others = (None,) * (2 if branch == "attention" else 0)  # stream and cache
                plan[f"blocks.{i}.{branch}"] = PrepareModuleInput(
                    input_layouts=(between, *others),
                    desired_input_layouts=(Replicate(), *others),
                )
    if sequence_parallel:
        plan["head.norm"] = SequenceParallel()
    return plain_step(
        parallelize_module(filled(config), mesh, plan),
        cross_entropy_sum,
        loss_parallel if splits_loss else nullcontext,
    )


class _F(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def]
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad


class _G(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def]
        dist.all_reduce(x)
        ctx.mark_dirty(x)
        return x

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return grad


class _FloorLayout(FullSequence):
    def gather_sequence(self, x_BSD: Tensor, length: int) -> Tensor:
        return _F.apply(x_BSD)


def floor(config: ModelConfig, runtime: Runtime) -> Step:
    """Slices of the weights as plain parameters of a narrower model, and f and g by hand."""
    whole = filled(config).state_dict()
    model = Transformer(
        replace(
            config,
            heads=config.heads // RANKS,
            head_width=config.width // config.heads,
            ffn_width=config.ffn_width // RANKS,
            vocab_size=config.vocab_size // RANKS,
        )
    )
    with torch.no_grad():
        for name, p in model.named_parameters():
            for dim in range(p.dim()):
                if p.shape[dim] != whole[name].shape[dim]:
                    whole[name] = whole[name].chunk(RANKS, dim)[runtime.rank]
            p.copy_(whole[name])
    model.layout = _FloorLayout()
    for block in model.blocks.values():
        for row in (block.attention.output, block.feed_forward.down):
            row.register_forward_hook(lambda module, inputs, output: _G.apply(output))
    vocabulary = VocabParallel(config.vocab_size, dist.group.WORLD)
    tokens = model.embed.tokens  # type: ignore[union-attr]
    look_up = tokens.forward

    def own_rows(ids: Tensor, dtype: torch.dtype) -> Tensor:
        row, mine = vocabulary.local_rows(ids)
        return _G.apply(look_up(row, dtype) * mine.unsqueeze(-1))

    tokens.forward = own_rows
    return plain_step(
        model,
        lambda logits, targets: cross_entropy_sum(
            logits, targets, cross_entropy=vocabulary.cross_entropy
        ),
    )


def measure(
    runtime: Runtime, width: int, samples: int, segments: int, steps: int
) -> dict[str, list[float]]:
    """Seconds per step of each way, segment by segment; all must have the same first loss."""
    config = llama(width, LAYERS, SEQ_LEN, vocab_size=4096)
    ways = {
        "floor": floor(config, runtime),
        "ours": ours(config, runtime, sequence_parallel=False),
        "DTensor compute": dtensor_compute(config, runtime, sequence_parallel=False),
        "ours, sequence parallel": ours(config, runtime, sequence_parallel=True),
        "DTensor compute, sequence parallel": dtensor_compute(
            config, runtime, sequence_parallel=True
        ),
        "DTensor compute, sequence parallel, logits gathered": dtensor_compute(
            config, runtime, sequence_parallel=True, splits_loss=False
        ),
    }
    batch = random_batch(samples, SEQ_LEN, config.vocab_size)
    first = [float(step(batch)) for step in ways.values()]
    assert max(first) - min(first) < 1e-4, first
    return alternate(ways, batch, segments, steps)


if __name__ == "__main__":
    seconds, numbers = on_ranks(RANKS, measure, defaults=(512, 4, 10, 3))
    width, samples, segments, steps = numbers
    table = Table(
        "step of",
        "median ms",
        "ours is faster by",
        "least and most",
        title=f"width {width}, {samples} × {SEQ_LEN} tokens, {RANKS} CPU ranks",
    )
    for name, times in seconds.items():
        mine = seconds["ours, sequence parallel" if "sequence" in name else "ours"]
        ratios = [theirs / own for theirs, own in zip(times, mine, strict=True)]
        table.add_row(
            name,
            f"{1000 * statistics.median(times):.0f}",
            f"{statistics.median(ratios):.3f}",
            f"{min(ratios):.3f} to {max(ratios):.3f}",
        )
    Console().print(table)
