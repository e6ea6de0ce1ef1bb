"""What watching costs in a healthy run: steps with heartbeats, agreement and status, and without.

`python benchmarks/watching.py [ranks] [segments] [steps per segment] [width]`: segments of both
kinds alternate in the same processes; the ratio is taken segment by segment, so that a machine
whose speed drifts does not decide it. The unwatched loop takes the very same training steps.
Beside the time on the clock stands the processor's (of rank 0, all threads), which other programs
on the machine disturb less; it has no waiting in it.
"""

import statistics
import sys
import time
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import distributed as dist
from workload import llama, on_ranks, pin, random_batch, train_step

from parallel.runtime import Runtime
from parallel.strategy import StrategyConfig
from trainer.config.train import TrainConfig
from trainer.resilience.supervisor import Supervisor
from trainer.run.lock import share_lock

SEQ_LEN, VOCAB = 128, 1024
KINDS = ("plain", "watched", "plain, processor", "watched, processor")


def times() -> np.ndarray:
    """Seconds on the clock and of the processor, once all ranks are here."""
    dist.barrier()
    return np.array([time.perf_counter(), time.process_time()])


def measure(runtime: Runtime, _ranks: int, segments: int, steps: int, width: int) -> dict:
    """Seconds per step of each kind, segment by segment."""
    torch.set_num_threads(1)
    pin(runtime.rank)
    model = llama(width, 4, SEQ_LEN, VOCAB)
    step = train_step(model, StrategyConfig(replicate=runtime.world_size), runtime)
    batch = [random_batch(4, SEQ_LEN, VOCAB)]
    seconds: dict[str, list[float]] = {name: [] for name in KINDS}
    with TemporaryDirectory() as folder:
        limits = TrainConfig()
        watched = folder, limits.steps, limits.timeout_seconds, runtime
        supervisor = Supervisor(*watched)
        for segment in range(segments + 1):
            began = times()
            for _ in range(steps):
                step(batch)
            plain = times() - began
            with share_lock(folder), Supervisor(*watched).watch as watch:
                supervisor.watch = watch
                began = times()
                for number in range(1, steps + 1):
                    with watch.track_step():
                        step(batch)
                    supervisor.finish_step(number)
                    if number % 10 == 0:
                        supervisor.write_status()
                watched = times() - began
            if segment:  # the first one warms up
                for name, value in zip(
                    KINDS, (plain[0], watched[0], plain[1], watched[1]), strict=True
                ):
                    seconds[name].append(value / steps)
    return seconds


if __name__ == "__main__":
    ranks = int(sys.argv[1]) if len(sys.argv) > 1 else 2
    found, _ = on_ranks(ranks, measure, (2, 15, 20, 256))
    for name, values in found.items():
        sys.stdout.write(f"{name}: {1000 * statistics.median(values):.2f} ms a step\n")
    for kind, (plain, watched) in {"clock": KINDS[:2], "processor": KINDS[2:]}.items():
        ratios = sorted(w / p for w, p in zip(found[watched], found[plain], strict=True))
        sys.stdout.write(
            f"ratio watched / plain, {kind}: {statistics.median(ratios):.4f} "
            f"(from {ratios[0]:.4f} to {ratios[-1]:.4f})\n"
        )
