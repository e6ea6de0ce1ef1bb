"""How long training is stopped by a save: asynchronous against synchronous, in turn.

`python benchmarks/async_save.py [rounds] [width] [blocks]`: one process, a model of about 100 M
parameters with AdamW's moments. The asynchronous save is followed by a training step, beside which
its files are written.
"""

import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from workload import llama, random_batch

from parallel.runtime import JobQueue, process_group
from trainer import loop
from trainer.config.train import CheckpointConfig, OptimConfig, TrainConfig
from trainer.loop import open_saver
from trainer.state import TrainState

SEQ_LEN, VOCABULARY = 64, 8192


def timed(function, *arguments) -> float:
    """Seconds that a call takes."""
    began = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - began


def measure(config: TrainConfig, state: TrainState, rounds: int) -> dict[str, list[float]]:
    """Seconds of each kind of save, and of a step with and without one beside it."""
    batch = [random_batch(1, SEQ_LEN, VOCABULARY)]
    batch[0]["index"] = torch.zeros(1, dtype=torch.int64)
    seconds: dict[str, list[float]] = {
        "synchronous save": [],
        "asynchronous save": [],
        "step": [],
        "step beside a save": [],
    }
    loop.take_step(config, state, batch)
    with open_saver(config, state) as saver:
        seconds["first save (takes the memory)"] = [timed(saver.save, state)]
        saver.wait()
        for _ in range(rounds):
            seconds["step"].append(timed(loop.take_step, config, state, batch))
            config.checkpoint.async_save = False
            seconds["synchronous save"].append(timed(saver.save, state))
            loop.take_step(config, state, batch)
            config.checkpoint.async_save = True
            seconds["asynchronous save"].append(timed(saver.save, state))
            seconds["step beside a save"].append(timed(loop.take_step, config, state, batch))
            saver.wait()
    return seconds


if __name__ == "__main__":
    defaults = [7, 768, 12]
    rounds, width, blocks = [*map(int, sys.argv[1:]), *defaults[len(sys.argv) - 1 :]]
    with TemporaryDirectory() as folder, process_group("cpu", JobQueue.single_process()) as runtime:
        model = llama(width, blocks, SEQ_LEN, VOCABULARY)
        config = TrainConfig(
            model=model,
            precision="fp32",
            device="cpu",
            steps=1000,
            run_dir=str(Path(folder)),
            checkpoint=CheckpointConfig(keep=1),
            optim=OptimConfig(lr=1e-4),
        )
        state = loop.start_run(replace(config), runtime)
        numbers = sum(p.numel() for p in state.worker.parameters().values())
        sys.stdout.write(f"{numbers / 1e6:.0f} M parameters, {3 * 4 * numbers / 1e9:.2f} GB\n")
        found = measure(config, state, rounds)
        for name, values in found.items():
            low, high = min(values), max(values)
            sys.stdout.write(
                f"{name}: {statistics.median(values):.3f} s (from {low:.3f} to {high:.3f})\n"
            )
        pairs = zip(found["asynchronous save"], found["synchronous save"], strict=True)
        ratios = sorted(a / s for a, s in pairs)
        sys.stdout.write(
            f"asynchronous / synchronous: {statistics.median(ratios):.3f} "
            f"(from {ratios[0]:.3f} to {ratios[-1]:.3f})\n"
        )
