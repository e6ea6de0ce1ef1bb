"""What the loop costs: its tokens/s against a hand-written plain torch loop, alternating.

`python benchmarks/loop_overhead.py [segments] [steps per segment] [overrides of launch/train.py]`
Both train the same model on the same text with the same optimizer in one process; the ratio is
taken segment by segment, so that a machine whose speed drifts does not decide it.
"""

import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from torch import nn

from conf import schema
from conf.validation.validate import fill_from_data
from parallel.runtime import JobQueue, Runtime, process_group
from trainer import loop
from trainer.config.train import TrainConfig
from trainer.data import open_split, prepare_data
from trainer.loop import open_saver
from trainer.loss import cross_entropy_sum
from trainer.model import Transformer
from trainer.nn.init import init_rows
from trainer.optim.lr_schedule import learning_rate_at
from trainer.optim.parameter_groups import has_weight_decay
from trainer.precision import resolve_precision
from trainer.resilience.supervisor import supervise_run
from trainer.run.run_dir import open_run_dir


def configured(overrides: list[str], run_dir: str) -> TrainConfig:
    """launch/train.py's configuration, without what is not a training step."""
    schema.register_schemas("now")
    quiet = ["eval.every=0", "eval.test=false", "checkpoint.every=0", "metrics.sample_tokens=0"]
    with initialize_config_dir(str(Path(schema.__file__).parent), version_base="1.3"):
        config = schema.build_config(
            "train", compose("train", [*quiet, *overrides, f"run_dir={run_dir}"])
        )
    assert isinstance(config, TrainConfig)
    config = fill_from_data(config, prepare_data(config.data))
    open_run_dir(config)
    return config


class PlainLoop:
    """What one writes by hand: a model, AdamW, random windows of one long array."""

    def __init__(self, config: TrainConfig, device: torch.device):
        self.config, self.device = config, device
        compute = resolve_precision(config.precision, device).compute
        self.model = Transformer(config.model, compute).to(device)
        for name, p in self.model.named_parameters():
            rows = init_rows(config.model, config.seed, name, p.shape, 0, p.shape[0])
            p.data.copy_(rows)
        named = list(self.model.named_parameters())
        groups = [
            {
                "params": [p for n, p in named if has_weight_decay(n, p.shape)],
                "weight_decay": config.optim.weight_decay,
            },
            {
                "params": [p for n, p in named if not has_weight_decay(n, p.shape)],
                "weight_decay": 0.0,
            },
        ]
        self.optimizer = torch.optim.AdamW(
            groups, betas=tuple(config.optim.betas), eps=config.optim.eps, fused=True
        )
        train = open_split(config.data, "train")
        samples = [train.sample(i, None) for i in range(len(train))]
        self.tokens = np.stack(
            [s["tokens"] for s in samples if len(s["tokens"]) == config.data.seq_len]
        )
        self.targets = np.stack(
            [s["targets"] for s in samples if len(s["tokens"]) == config.data.seq_len]
        )
        self.random = np.random.default_rng(0)
        self.step = 0

    def take_steps(self, steps: int) -> None:
        """Train."""
        config = self.config
        for _ in range(steps):
            rows = self.random.integers(len(self.tokens), size=config.batch_size)
            tokens = torch.from_numpy(self.tokens[rows]).to(self.device)
            targets = torch.from_numpy(self.targets[rows]).to(self.device)
            logits = self.model({"tokens": tokens})
            loss = cross_entropy_sum(logits, targets) / targets.numel()
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), config.optim.max_grad_norm)
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate_at(self.step, 10_000, config.optim)
            self.optimizer.step()
            self.step += 1
            if self.step % config.metrics.every == 0:
                loss.item()


def synchronise(device: torch.device) -> float:
    """The time, once the device is idle."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def measure(config: TrainConfig, runtime: Runtime, segments: int, steps: int) -> None:
    """Alternate the two loops and print tokens/s of each and the ratio."""
    plain = PlainLoop(config, runtime.device)
    state = loop.start_run(config, runtime)
    loader = loop.open_loader(config, state)
    seconds: dict[str, list[float]] = {"plain": [], "samestep": []}
    for segment in range(segments + 1):
        started = synchronise(runtime.device)
        plain.take_steps(steps)
        between = synchronise(runtime.device)
        part = replace(config, steps=state.step + steps)  # for the recorder's last line
        with (
            supervise_run(part.run_dir, part.steps, part.timeout_seconds, runtime) as supervisor,
            open_saver(part, state) as saver,
            loop.open_recorder(part, runtime, state) as recorder,
        ):
            run = loop.Run(part, state, loader, recorder, saver, supervisor)
            began = synchronise(runtime.device)
            recorder.start_clock(int(state.tokens.item()))
            for _ in range(steps):
                with recorder.track_data_wait():
                    micro_batches = next(loader)
                with supervisor.watch.track_step():
                    step = loop.take_step(config, state, micro_batches)
                recorder.step_done()
                supervisor.finish_step(state.step)
                if recorder.is_due(state.step):
                    loop.log_step(run, step)
            ended = synchronise(runtime.device)
        if segment:  # the first one warms up
            seconds["plain"].append(between - started)
            seconds["samestep"].append(ended - began)
    loader.close()
    tokens = steps * config.batch_size * config.data.seq_len
    ratios = [p / s for p, s in zip(seconds["plain"], seconds["samestep"], strict=True)]
    for name, values in seconds.items():
        sys.stdout.write(f"{name}: {tokens / statistics.median(values):,.0f} tokens/s\n")
    low, middle, high = min(ratios), statistics.median(ratios), max(ratios)
    sys.stdout.write(f"ratio samestep / plain: {middle:.3f} (from {low:.3f} to {high:.3f})\n")


if __name__ == "__main__":
    numbers = [int(a) for a in sys.argv[1:3] if a.isdigit()]
    segments, steps = (numbers + [10, 20][len(numbers) :])[:2]
    with TemporaryDirectory() as folder:
        config = configured([a for a in sys.argv[1:] if "=" in a], f"{folder}/run")
        with process_group(config.device, JobQueue.single_process()) as runtime:
            measure(config, runtime, segments, steps)
