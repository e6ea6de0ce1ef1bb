"""Peak memory of a training step with a large vocabulary, the loss whole and in pieces.

`python benchmarks/loss_memory.py [vocabulary] [ranks]` starts CPU ranks anew for every row; with
two or more the layers, the vocabulary and its loss are split over them. On a GPU:
`python launch/train.py model=llama-1b loss.chunks=8`, `memory_gib` in metrics.jsonl.
"""

import re
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from parallel.rank_pool import RankPool
from parallel.runtime import Runtime
from parallel.strategy import StrategyConfig
from trainer.build import parallel_model
from trainer.config.train import LossConfig, ModelConfig
from trainer.precision import PRECISIONS

SAMPLES, SEQ_LEN = 4, 512


def resident_mib(key: str) -> float:
    """VmRSS (now) or VmHWM (the most so far) of this process."""
    status = Path("/proc/self/status").read_text()
    found = re.search(rf"{key}:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) / 1024


def peak(runtime: Runtime, vocabulary: int, chunks: int) -> tuple[float, float]:
    """MiB that a step needs at most beyond the model, and its loss."""
    config = ModelConfig(layers=1, vocab_size=vocabulary, max_positions=SEQ_LEN)
    worker = parallel_model(
        config,
        StrategyConfig(tensor=runtime.world_size),
        runtime,
        PRECISIONS["fp32"],
        loss=LossConfig(chunks=chunks),
    )
    tokens = torch.arange(SAMPLES * SEQ_LEN).view(SAMPLES, SEQ_LEN) % vocabulary
    before = resident_mib("VmRSS")
    loss, _ = worker.forward_backward([{"tokens": tokens, "targets": tokens.roll(-1, 1)}])
    return resident_mib("VmHWM") - before, loss.item()


if __name__ == "__main__":
    vocabulary, ranks = [*map(int, sys.argv[1:]), *(65_536, 1)[len(sys.argv) - 1 :]]
    logits_mib = SAMPLES * SEQ_LEN * vocabulary * 4 / 2**20
    table = Table(
        "loss.chunks",
        "peak of a step, MiB",
        "loss",
        title=f"vocabulary {vocabulary:,}, {ranks} ranks; all logits in fp32: {logits_mib:.0f} MiB",
    )
    for chunks in (1, 4, 16):
        pool = RankPool(ranks)
        most, loss = pool.run(ranks, peak, vocabulary, chunks, timeout_seconds=600.0)[0]
        pool.close()
        table.add_row(str(chunks), f"{most:.0f}", f"{loss:.6f}")
    Console().print(table)
