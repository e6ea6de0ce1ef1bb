"""Random kill -9 of all ranks while they train and save: no kill may lose a checkpoint.

`python benchmarks/kills.py [kills in all] [steps of a run] [most ranks] [fewest]`: 1, 2 and 4
ranks, synchronous and asynchronous saves in turn. After each kill the newest checkpoint is checked
byte by byte, and at most the save in flight may be lost; a run that has come to its end must have
the files of the unbroken one, to the bit. Exits with 1 if a kill did harm. Ranks are forked from a
process that has loaded everything: a start takes a fraction of a second.
"""

import mmap
import os
import random
import signal
import socket
import sys
import time
from collections import Counter
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import distributed as dist

from launch.cli.preflight import prepare_training
from parallel.runtime import JobQueue, process_group
from parallel.strategy import StrategyConfig
from trainer import loop
from trainer.checkpoint.folder import list_checkpoints
from trainer.checkpoint.manifest import CorruptCheckpointError, check_folder
from trainer.checkpoint.save import PendingSave, Saver
from trainer.config.train import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    MetricsConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
)
from trainer.metrics.recorder import Recorder

EVERY = 3  # steps between saves
WORLDS = {1: StrategyConfig(), 2: StrategyConfig(shard=2), 4: StrategyConfig(shard=2, tensor=2)}


def job(folder: Path, strategy: StrategyConfig, async_save: bool, steps: int) -> TrainConfig:
    """A tiny model on a scene of the bundled play, with a save every few steps."""
    play = folder / "play.txt"
    if not play.exists():
        text = files("trainer.data") / "bundled" / "shakespeare" / "valid.txt"
        play.write_text(text.read_text()[:30_000])
    return TrainConfig(
        data=DataConfig(path=str(play), vocab_size=300, seq_len=16, cache=str(folder / "cache")),
        model=ModelConfig(layers=2, width=64, heads=4, kv_heads=2, ffn_width=128, dropout=0.1),
        optim=OptimConfig(lr=1e-2, warmup_steps=2),
        strategy=strategy,
        device="cpu",
        eval=EvalConfig(every=0, samples=4, test=False),
        checkpoint=CheckpointConfig(every=EVERY, keep=2, async_save=async_save),
        metrics=MetricsConfig(every=1, sample_tokens=0),
        steps=steps,
        batch_size=8,
    )


def fork(work, *args) -> int:
    """Run work(*args) in a child; its process id."""
    child = os.fork()
    if child:
        return child
    try:
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115, PTH123
        work(*args)
        os._exit(0)
    except BaseException:
        os._exit(1)


def rank_main(config: TrainConfig, rank: int, ranks: int, port: int, reached: mmap.mmap) -> None:
    """What one rank does: the job, as its doors would start it; rank 0 tells which step is done."""
    step_done, begin, write = Recorder.step_done, Recorder.start_clock, Saver._write_all

    def tell(self: Recorder) -> None:
        step_done(self)
        reached[:8] = self._step.to_bytes(8, "little")

    def tell_start(self: Recorder, tokens: int) -> None:
        begin(self, tokens)
        reached[8] = 1

    def tell_save(self: Saver, save: PendingSave) -> None:
        reached[9:17] = save.step.to_bytes(8, "little")
        write(self, save)

    if rank == 0:
        Recorder.step_done, Recorder.start_clock = tell, tell_start  # type: ignore[method-assign]
        Saver._write_all = tell_save  # type: ignore[method-assign]
    store = dist.TCPStore("127.0.0.1", port, ranks, is_master=rank == 0)
    with process_group("cpu", JobQueue(store, rank, ranks)) as runtime:
        loop.train(config, runtime)


def start(config: TrainConfig, ranks: int, reached: mmap.mmap) -> list[int]:
    """Prepare as the door does, and start all ranks; their process ids."""
    config = prepare_training(config, ranks)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [fork(rank_main, config, rank, ranks, port, reached) for rank in range(ranks)]


def wait(children: list[int]) -> set[int]:
    """Exit statuses, once all have ended."""
    return {os.waitpid(child, 0)[1] for child in children}


def digests(config: TrainConfig) -> dict[str, str]:
    """SHA-256 of each file of the last checkpoint."""
    step, path = list_checkpoints(config.run_dir)[-1]
    assert step == config.steps, step
    return {name: entry.sha256 for name, entry in check_folder(path).files.items()}


def newest_good(config: TrainConfig) -> int:
    """The step of the newest checkpoint, all of which is as it was saved; 0 if there is none."""
    found = list_checkpoints(config.run_dir)
    if found:
        check_folder(found[-1][1])
    return found[-1][0] if found else 0


class Campaign:
    """Kills of one kind of run, again and again, until it has had enough."""

    def __init__(self, folder: Path, ranks: int, async_save: bool, steps: int, draw: random.Random):
        self.name = f"{ranks} ranks, {'asynchronous' if async_save else 'synchronous'} saves"
        self.base, self.ranks = job(folder, WORLDS[ranks], async_save, steps), ranks
        self.draw = draw
        self.folder, self.runs = folder / self.name.replace(" ", "-"), 0
        self.counts: Counter[str] = Counter()
        self.most_steps_lost = 0
        # The step done, whether training has begun, the step of the newest save that has begun:
        # in shared memory, so that a kill does not lose them.
        self.reached = mmap.mmap(-1, 17)
        whole = replace(self.base, run_dir=str(self.folder / "unbroken"))
        children = start(whole, ranks, self.reached)
        began = time.monotonic()
        while not self.reached[8]:
            assert not os.waitpid(children[0], os.WNOHANG)[0], "the unbroken run never began"
            time.sleep(0.001)
        self.start_seconds, began = time.monotonic() - began, time.monotonic()
        assert wait(children) == {0}, "the unbroken run failed"
        self.step_seconds = (time.monotonic() - began) / steps
        self.expected = digests(whole)

    def run(self, kills: int) -> None:
        """Kill, look, go on; begin a new run where one has ended."""
        while self.counts["kills"] < kills:
            self.runs += 1
            config = replace(self.base, run_dir=str(self.folder / f"{self.runs}"))
            while not self.attempt(config):
                pass
            self.counts["ends"] += 1
            self.counts["other ends"] += digests(config) != self.expected

    def attempt(self, config: TrainConfig) -> bool:
        """Start the run once more, and kill it unless it ends before; whether it has ended."""
        saved = newest_good(config)
        if saved == config.steps:  # the kill before came after the last save
            return True
        self.reached[:17] = saved.to_bytes(8, "little") + b"\0" + saved.to_bytes(8, "little")
        children = start(config, self.ranks, self.reached)
        # One in ten while it starts; the others in or just behind a step drawn from those to come.
        step, seconds = 0, self.draw.uniform(0.0, self.start_seconds)
        if self.draw.random() < 0.9:
            step = saved + self.draw.randrange(1, config.steps - saved + 1)
            seconds = self.draw.uniform(0.0, 1.5 * self.step_seconds)
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            time.sleep(self.draw.uniform(0.0, 0.002))
            if self.step(0) < step:
                deadline = time.monotonic() + seconds
            ended = [child for child in children if os.waitpid(child, os.WNOHANG)[0]]
            if ended:
                statuses = wait([child for child in children if child not in ended])
                if len(ended) == self.ranks or statuses <= {0}:
                    return newest_good(config) == config.steps or self.harm("a run ended early")
                return self.harm(f"a rank failed: {statuses}")
        for child in children:
            os.kill(child, signal.SIGKILL)
        wait(children)
        self.counts["kills"] += 1
        self.look(config, saved)
        return False

    def step(self, place: int) -> int:
        """A step that the run has told of."""
        return int.from_bytes(self.reached[place : place + 8], "little")

    def look(self, config: TrainConfig, before: int) -> None:
        """What a kill has left."""
        reached, begun = self.step(0), self.step(9)
        try:
            newest = newest_good(config)
        except CorruptCheckpointError as error:
            self.harm(f"unloadable: {error}")
            return
        if newest < max(before, begun - EVERY):
            self.harm(f"at step {newest} when the save of step {begun} had begun")
        self.counts["during a save"] += any((Path(config.run_dir) / "checkpoints").glob(".step*"))
        self.most_steps_lost = max(self.most_steps_lost, reached - newest)

    def harm(self, what: str) -> bool:
        """Note what must not happen."""
        sys.stdout.write(f"{self.name}: {what}\n")
        self.counts["harm"] += 1
        return False


def main(kills: int = 500, steps: int = 60, most_ranks: int = 4, least_ranks: int = 1) -> int:
    """All kinds of runs in turn, and a line for each; the exit status."""
    draw, harm = random.Random(0), 0
    worlds = [ranks for ranks in WORLDS if least_ranks <= ranks <= most_ranks]
    kinds = [(ranks, async_save) for ranks in worlds for async_save in (False, True)]
    with TemporaryDirectory() as folder:
        for number, (ranks, async_save) in enumerate(kinds):
            campaign = Campaign(Path(folder), ranks, async_save, steps, draw)
            campaign.run(kills * (number + 1) // len(kinds) - kills * number // len(kinds))
            counts = campaign.counts
            sys.stdout.write(
                f"{campaign.name}: {counts['kills']} kills, {counts['during a save']} of them in a "
                f"save; {counts['harm']} did harm, at most {campaign.most_steps_lost} steps lost "
                f"(a save every {EVERY}); {counts['ends']} ends, {counts['other ends']} with other "
                "bits than the unbroken run\n"
            )
            sys.stdout.flush()
            harm += counts["harm"] + counts["other ends"]
    return 1 if harm else 0


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
