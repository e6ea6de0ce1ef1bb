"""A training step in a pipeline of two CPU ranks: ours against bare torch.distributed.pipelining.

`python benchmarks/pipeline.py [width] [blocks] [micro-batches of 128 tokens] [segments] [steps per
segment]` starts the ranks itself. Both run torch's GPipe and 1F1B:

* ours: the step that launch/train.py takes, but for the gradient norm, which torch's has not;
* torch's: a `PipelineStage` of the same blocks, cut by hand, with its own exchange of shapes, its
  loss function and a fused AdamW.

The segments alternate within one run, and ratios are taken segment by segment.
"""

import statistics
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.nn import functional as F
from workload import Batch, alternate, by_sample, llama, on_ranks, pin, random_batch, train_step

from parallel.runtime import Runtime
from parallel.strategy import StrategyConfig
from trainer.config.train import ModelConfig
from trainer.model import Transformer
from trainer.nn.init import init_rows
from trainer.nn.sequence import FullSequence, SequenceInfo

RANKS, SEQ_LEN = 2, 128
TORCH_CLASSES = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}
Step = Callable[[Batch], float | None]  # the loss, on ranks that know it


def ours(config: ModelConfig, runtime: Runtime, schedule: str) -> Step:
    """A micro-batch per sample."""
    strategy = StrategyConfig(pipeline=RANKS, schedule=schedule)
    step = train_step(config, strategy, runtime)
    return lambda batch: step(by_sample(batch)).item()


class Part(nn.Module):
    """Half of the model, from token ids or to logits."""

    def __init__(self, config: ModelConfig, rank: int):
        super().__init__()
        whole = Transformer(config)
        half = config.layers // RANKS
        names = [str(i) for i in range(rank * half, (rank + 1) * half)]
        self.blocks = nn.ModuleDict({name: whole.blocks[name] for name in names})
        self.embed = whole.embed if rank == 0 else None
        self.head = whole.head if rank == RANKS - 1 else None
        self.angles = whole._rotary_angles
        with torch.no_grad():
            for name, p in self.named_parameters():
                p.copy_(init_rows(config, 0, name, p.shape, 0, p.shape[0]))

    def forward(self, x: Tensor) -> Tensor:
        positions = torch.arange(SEQ_LEN, device=x.device)[None]
        stream = SequenceInfo(SEQ_LEN, FullSequence(), causal=True, rope=self.angles(positions))
        if self.embed is not None:
            x = self.embed(x, positions, stream, torch.float32)
        for block in self.blocks.values():
            x, _ = block(x, None, {"target": stream}, None)
        return x if self.head is None else self.head(x, stream)


def bare(config: ModelConfig, runtime: Runtime, schedule: str, micro_batches: int) -> Step:
    """torch's pipelining, as its tutorial shows it."""
    part = Part(config, runtime.rank)
    stage = PipelineStage(part, runtime.rank, RANKS, runtime.device)
    driver = TORCH_CLASSES[schedule](
        stage,
        micro_batches,
        loss_fn=lambda logits, targets: F.cross_entropy(logits.flatten(0, 1), targets.flatten()),
    )
    optimizer = torch.optim.AdamW(part.parameters(), lr=1e-3, fused=True)

    def step(batch: Batch) -> float | None:
        optimizer.zero_grad(set_to_none=True)
        losses: list[Tensor] = []
        if runtime.rank == 0:
            driver.step(batch["tokens"])
        else:
            driver.step(target=batch["targets"], losses=losses)
        optimizer.step()
        return torch.stack(losses).mean().item() if losses else None

    return step


def measure(
    runtime: Runtime, width: int, blocks: int, micro_batches: int, segments: int, steps: int
) -> dict[str, list[float]]:
    """Seconds per step of each way, segment by segment; all must have the same first losses."""
    pin(runtime.rank)
    config = llama(width, blocks, SEQ_LEN, vocab_size=256)  # embedding and head cost little
    ways: dict[str, Step] = {}
    for schedule in TORCH_CLASSES:
        ways[f"{schedule}, torch"] = bare(config, runtime, schedule, micro_batches)
        ways[f"{schedule}, ours"] = ours(config, runtime, schedule)
    batch = random_batch(micro_batches, SEQ_LEN, config.vocab_size)
    for _ in range(2):  # the second loss is of weights that both have trained
        losses = [loss for step in ways.values() if (loss := step(batch)) is not None]
        assert max(losses) - min(losses) < 1e-4, losses
    return alternate(ways, batch, segments, steps)


if __name__ == "__main__":
    seconds, numbers = on_ranks(RANKS, measure, defaults=(512, 8, 8, 10, 3))
    width, blocks, micro_batches, segments, steps = numbers
    table = Table(
        "step of",
        "median ms",
        "least ms",
        "tokens/s",
        "ours / torch, tokens/s",
        "least and most",
        title=f"{blocks} blocks of width {width}, {micro_batches} × {SEQ_LEN} tokens, {RANKS} CPU "
        f"ranks, {segments} segments of {steps} steps",
    )
    for name, times in seconds.items():
        bare_times = seconds[f"{name.split(',')[0]}, torch"]
        ratios = [theirs / own for theirs, own in zip(bare_times, times, strict=True)]
        middle = statistics.median(times)
        table.add_row(
            name,
            f"{1000 * middle:.0f}",
            f"{1000 * min(times):.0f}",
            f"{micro_batches * SEQ_LEN / middle:,.0f}",
            f"{statistics.median(ratios):.3f}",
            f"{min(ratios):.3f} to {max(ratios):.3f}",
        )
    Console().print(table)
