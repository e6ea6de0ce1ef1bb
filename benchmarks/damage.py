"""Random damage to a run's newest checkpoint: all of it must be found, named and got over.

`python benchmarks/damage.py [damages of each kind]`: a bit flipped, a file cut short or missing,
a garbled manifest; 2 ranks. Each time the file must be named, and the run must go on from the older
checkpoint, to the bit. Exits with 1 if one was missed.
"""

import logging
import random
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor
from torch import distributed as dist
from workload import on_ranks

from parallel.grad_norm import local_tensor
from parallel.runtime import Runtime
from parallel.strategy import StrategyConfig
from trainer.checkpoint.folder import checkpoint_path
from trainer.checkpoint.manifest import NAME
from trainer.checkpoint.restore import find_newest_valid
from trainer.config.train import ConfigError, ModelConfig, TrainConfig
from trainer.loop import open_saver, resume, start_run
from trainer.state import TrainState

KINDS = ("bit", "cut", "missing", "manifest")
GOOD, DAMAGED = 20, 30  # steps


def damage(folder: Path, kind: str, draw: random.Random) -> str:
    """Damage one file of a checkpoint; its name."""
    path = draw.choice(sorted(folder.glob("rank-*")))
    if kind == "manifest":
        path = folder / NAME
    content = bytearray(path.read_bytes())
    if kind == "missing":
        path.unlink()
        return path.name
    if kind == "bit":
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    elif kind == "cut" or draw.random() < 0.3:
        content = content[: draw.randrange(len(content))]
    else:
        begin = draw.randrange(len(content))
        for place in range(begin, min(len(content), begin + draw.randint(1, 300))):
            content[place] ^= draw.randint(1, 255)
    path.write_bytes(content)
    return path.name


def here(state: TrainState) -> dict[str, Tensor]:
    """A copy of what this rank has of the state."""
    return {name: local_tensor(t.detach()).clone() for name, t in state.state_tensors().items()}


def survive(runtime: Runtime, folder: Path, count: int) -> list[str]:
    """Damage checkpoints `count` times in each way; what went wrong."""
    model = ModelConfig(layers=1, width=16, heads=2, ffn_width=32, vocab_size=23, max_positions=8)
    config = TrainConfig(
        model=model,
        strategy=StrategyConfig(shard=2),
        precision="fp32",
        device="cpu",
        run_dir=str(folder / "whole"),
    )
    state = start_run(config, runtime)
    expected: dict[str, Tensor] = {}
    with open_saver(config, state) as saver:
        for state.step in (10, GOOD, DAMAGED):
            for parameter in state.worker.parameters().values():
                local_tensor(parameter.detach()).add_(0.25)
            saver.save(state)
            expected = here(state) if state.step == GOOD else expected
    config = replace(config, run_dir=str(folder / "hit"))
    wrong, draw = [], random.Random(0)
    for kind in KINDS * count:
        name = [""]
        if runtime.rank == 0:
            shutil.rmtree(config.run_dir, ignore_errors=True)
            shutil.copytree(folder / "whole", config.run_dir)
            name = [damage(checkpoint_path(config.run_dir, DAMAGED), kind, draw)]
        dist.broadcast_object_list(name, src=0)
        found = find_newest_valid(Path(config.run_dir)).damaged.get(DAMAGED, "not found")
        try:
            resume(config, state)
        except ConfigError as error:
            found = f"refused: {error}"
        same = here(state)
        if name[0] not in found or not all(torch.equal(same[n], t) for n, t in expected.items()):
            wrong.append(f"{kind}, {name[0]}: {found}; at step {state.step}")
    return wrong


def measure(runtime: Runtime, count: int) -> list[str]:
    """`survive` in a folder of its own."""
    folder = [TemporaryDirectory()] if runtime.rank == 0 else []
    names = [folder[0].name if folder else ""]
    dist.broadcast_object_list(names, src=0)
    logging.disable(logging.WARNING)  # each damage is told by the run
    wrong = survive(runtime, Path(names[0]), count)
    dist.barrier()
    return wrong


if __name__ == "__main__":
    wrong, (count,) = on_ranks(2, measure, [100])
    for line in wrong:
        sys.stdout.write(line + "\n")
    total = len(KINDS) * count
    sys.stdout.write(f"{total - len(wrong)} of {total} damages found, named and got over\n")
    sys.exit(1 if wrong else 0)
