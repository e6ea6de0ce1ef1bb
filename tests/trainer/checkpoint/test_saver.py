"""Saves: in the background, agreed by all ranks, never half there, and never in the way."""

import errno
import json
import logging
import math
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import tiny
import torch
from test_checkpoint import run_in, state_of
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from parallel.strategy import StrategyConfig
from trainer.checkpoint import save as module
from trainer.checkpoint import shards as storage
from trainer.checkpoint.folder import checkpoint_path, list_checkpoints
from trainer.checkpoint.manifest import check_folder
from trainer.checkpoint.shards import DTYPES, read_tensors, read_whole
from trainer.config.train import CheckpointConfig, UserError
from trainer.loop import open_saver, resume
from trainer.state import TrainState

FSDP = StrategyConfig(shard=2)


@contextmanager
def heard(log: logging.Logger) -> Iterator[list[str]]:
    """What a logger says on this rank."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield lines
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


def here(run_dir) -> list[str]:
    return sorted(path.name for path in (Path(run_dir) / "checkpoints").iterdir())


def config_of(folder, strategy=None, **options):
    return replace(run_in(folder, strategy), checkpoint=CheckpointConfig(**options))


def changed_meanwhile(runtime, folder, async_save: bool) -> None:
    """A save holds what was there when it was asked for."""
    config = config_of(folder, FSDP, async_save=async_save)
    state = state_of(runtime, tiny.LLAMA, strategy=FSDP)
    state.step = 5
    expected = {
        n: storage.local_tensor(t.detach()).clone() for n, t in state.state_tensors().items()
    }
    at_once, checked = storage.Shard.write_file, threading.Event()
    if not async_save:
        checked.set()

    def write(self, path):
        assert checked.wait(240.0)
        return at_once(self, path)

    with mock.patch.object(storage.Shard, "write_file", write), open_saver(config, state) as saver:
        saver.save(state)
        there = checkpoint_path(folder, 5).exists()
        assert there is not async_save
        with torch.no_grad():
            for parameter in state.worker.model.parameters():
                parameter.add_(1.0)
        state.step = 6
        checked.set()
    assert list_checkpoints(folder) == [(5, checkpoint_path(folder, 5))]
    other = state_of(runtime, tiny.LLAMA, seed=1, strategy=FSDP)
    resume(config, other)
    for name, tensor in other.state_tensors().items():
        assert torch.equal(storage.local_tensor(tensor.detach()), expected[name]), name


@pytest.mark.parametrize("async_save", [True, False])
def test_a_save_is_of_one_moment(ranks, tmp_path, async_save):
    ranks.run(2, changed_meanwhile, tmp_path, async_save)


def failing(runtime, folder, on_error: str) -> tuple:
    """Saves of which the second fails on the last rank: messages, lines, folders and news."""
    config = config_of(folder, FSDP, on_error=on_error, keep=5)
    state = state_of(runtime, tiny.LLAMA, strategy=FSDP)
    write, messages, folders = storage.Shard.write_file, [], []

    def full(self, path):
        entry = write(self, path)  # the half that was written
        if state.step == 20 and runtime.rank == 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return entry

    with (
        heard(module.log) as lines,
        mock.patch.object(storage.Shard, "write_file", full),
        open_saver(config, state) as saver,
    ):
        for state.step in (10, 20, 30):
            try:
                saver.save(state)
                saver.wait()
            except UserError as error:
                messages.append(str(error))
                saver._outcome = {}
            torch.distributed.barrier()
            folders.append(here(folder))
            torch.distributed.barrier()  # the next save writes there
        news = list(saver.finished_saves())
        assert list(saver.finished_saves()) == []  # told once
    return messages, lines, folders, news


def test_a_full_disk_on_one_rank(ranks, tmp_path):
    first, second = ranks.run(2, failing, tmp_path / "a", "continue")
    assert first[0] == second[0] == []
    assert second[1] == []  # one message, from the first rank
    (line,) = first[1]
    assert "the save of step 20 failed on rank 1: No space left on device; it needs " in line
    assert " kB and " in line and "are free in run_dir=" in line
    assert line.endswith("training goes on, and the next save tries again")
    ten, thirty = ["step-00000010"], ["step-00000010", "step-00000030"]
    assert first[2] == second[2] == [ten, ten, thirty]
    told = [(news["event"], news["step"]) for news in first[3]]
    assert told == [("save", 10), ("save_failed", 20), ("save", 30)] and second[3] == []
    assert first[3][1]["reason"] in line and first[3][2]["seconds"] >= 0 < first[3][2]["gib"]


def test_a_full_disk_stops_the_run_where_asked(ranks, tmp_path):
    first, second = ranks.run(2, failing, tmp_path / "a", "stop")
    assert first[0] == second[0] and "No space left" in first[0][0]
    assert first[1] == second[1] == []  # it is told as the run's error
    assert first[2][1] == ["step-00000010"]


def last_fails(runtime, folder) -> str:
    state = state_of(runtime, tiny.LLAMA)
    full = mock.patch.object(storage.Shard, "write_file", side_effect=OSError(errno.ENOSPC, "full"))
    with full, pytest.raises(UserError) as raised, open_saver(run_in(folder), state) as saver:
        saver.save(state)
    return str(raised.value)


def test_a_run_whose_last_save_fails_does_not_end_well(ranks, tmp_path):
    assert "the save of step 0 failed on rank 0: full" in ranks.run(1, last_fails, tmp_path)[0]


def too_small(runtime, folder) -> str:
    state = state_of(runtime, tiny.LLAMA, strategy=FSDP)
    usage = mock.patch.object(module.shutil, "disk_usage", return_value=mock.Mock(free=1000))
    with usage, pytest.raises(UserError) as raised:
        open_saver(run_in(folder, FSDP), state)
    return str(raised.value)


def test_a_disk_too_small_is_refused_before_step_0(ranks, tmp_path):
    first, second = ranks.run(2, too_small, tmp_path)
    assert first == second and "but 1.0 kB are free in run_dir=" in first
    assert first.startswith("a checkpoint needs 1")


def crash(runtime, folder) -> tuple[float, bool]:
    """An error of training while the other rank's file is never written; seconds to leave."""
    config, state = run_in(folder, FSDP), state_of(runtime, tiny.LLAMA, strategy=FSDP)
    write = storage.Shard.write_file

    def stuck(self, path):
        if runtime.rank == 1:
            time.sleep(1000)
        return write(self, path)

    began = time.monotonic()
    with (
        mock.patch.object(storage.Shard, "write_file", stuck),
        mock.patch.object(module, "LEAVING_SECONDS", 0.2),
        pytest.raises(ValueError),
        open_saver(config, state) as saver,
    ):
        saver.save(state)
        raise ValueError("planted")
    return time.monotonic() - began, checkpoint_path(folder, 0).exists()


def test_an_error_does_not_wait_for_a_save_that_never_ends(ranks, tmp_path):
    for seconds, saved in ranks.run(2, crash, tmp_path):
        assert seconds < 240.0 and not saved


def bug(runtime, folder) -> str:
    state = state_of(runtime, tiny.LLAMA, strategy=FSDP)
    write = storage.Shard.write_file

    def broken(self, path):
        if runtime.rank == 1:
            raise ZeroDivisionError("planted")
        return write(self, path)

    with (
        mock.patch.object(storage.Shard, "write_file", broken),
        pytest.raises(RuntimeError) as raised,
        open_saver(run_in(folder, FSDP), state) as saver,
    ):
        saver.save(state)
    return str(raised.value)


def test_a_bug_in_one_ranks_writer_ends_all_of_them(ranks, tmp_path):
    for message in ranks.run(2, bug, tmp_path):
        assert "rank 1" in message and "ZeroDivisionError: planted" in message
    assert here(tmp_path) == []


def retained(runtime, folder) -> list[list[str]]:
    """Saves with evaluations, a restart, and damage in between: folders after each."""
    config = config_of(folder, keep=2, keep_best=True, keep_every=40)
    state, folders = state_of(runtime, tiny.LLAMA), []

    def saves(losses: dict[int, float | None]) -> None:
        with open_saver(config, state) as saver:
            for state.step, loss in losses.items():
                saver.save(state, loss)
                saver.wait()
                folders.append([str(step) for step, _ in list_checkpoints(folder)])

    saves({10: 3.0, 20: 1.0, 30: 2.0, 40: 2.0})
    resume(config, state)
    saves({50: 1.5, 60: None, 70: None})
    checkpoint_path(folder, 60).joinpath("rank-00000.safetensors").unlink()
    checkpoint_path(folder, 70).joinpath("manifest.json").write_text("{}")
    saves({80: None})
    return folders


def test_newest_best_and_every_nth_are_kept_over_a_restart(ranks, tmp_path):
    folders = ranks.run(1, retained, tmp_path)[0]
    assert folders[:4] == [["10"], ["10", "20"], ["20", "30"], ["20", "30", "40"]]
    assert folders[4:7] == [["20", "40", "50"], ["20", "40", "50", "60"], ["20", "40", "60", "70"]]
    # The damaged ones do not count, so that another good one stays.
    assert folders[7] == ["20", "40", "80"]


def test_saves_that_are_seldom_measured_are_told():
    def warning(saved, measured, best=True):
        return module.warn_rare_evaluation(CheckpointConfig(every=saved, keep_best=best), measured)

    told = warning(100, 30)
    assert "every 300th step; set eval.every=10 or checkpoint.every=90" in told
    assert "checkpoint.every=250" in warning(100, 250)
    for arguments in ((100, 50), (100, 100), (0, 30), (100, 0), (100, 30, False)):
        assert warning(*arguments) == ""


def unmeasurable(runtime, folder) -> list[float | None]:
    """Saves whose losses are not finite: those on record that a strict reader of JSON finds."""
    config, state = config_of(folder, keep=1, keep_best=True), state_of(runtime, tiny.LLAMA)
    with open_saver(config, state) as saver:
        for state.step, loss in {10: math.nan, 20: 2.5, 30: math.inf, 40: -math.inf}.items():
            saver.save(state, loss)
    texts = [path.joinpath("manifest.json").read_text() for _, path in list_checkpoints(folder)]
    return [json.loads(text, parse_constant=pytest.fail)["eval_loss"] for text in texts]


def test_a_loss_that_is_not_finite_is_saved_as_unknown(ranks, tmp_path):
    assert ranks.run(1, unmeasurable, tmp_path) == [[2.5, None]]
    assert [step for step, _ in list_checkpoints(tmp_path)] == [20, 40]


def order(runtime, folder) -> list[str]:
    """What is written to the disk, in which order, by name."""
    state, steps = state_of(runtime, tiny.LLAMA), []
    fsync, rename = os.fsync, Path.rename

    def note(descriptor):
        steps.append(f"sync {Path(f'/proc/self/fd/{descriptor}').readlink().suffix}")
        fsync(descriptor)

    def renamed(self, target):
        steps.append(f"{self.suffix} -> {target.name}")
        return rename(self, target)

    with (
        open_saver(run_in(folder), state) as saver,
        mock.patch.object(os, "fsync", note),
        mock.patch.object(Path, "rename", renamed),
    ):
        saver.save(state)
        saver.wait()
    return steps


def test_all_is_on_the_disk_before_a_checkpoint_has_its_name(ranks, tmp_path):
    assert ranks.run(1, order, tmp_path)[0] == [
        "sync .safetensors",
        "sync .json",
        "sync .partial",
        ".partial -> step-00000000",
        "sync ",
    ]


def grace(runtime, folder) -> list[str]:
    state = state_of(runtime, tiny.LLAMA)
    write = storage.Shard.write_file

    def slow(self, path):
        time.sleep(0.05)
        return write(self, path)

    config = config_of(folder, grace_seconds=0.04)
    with (
        heard(module.log) as lines,
        mock.patch.object(storage.Shard, "write_file", slow),
        open_saver(config, state) as saver,
    ):
        for state.step in (1, 2):
            saver.save(state)
    return lines


def test_a_save_longer_than_the_grace_is_told_once(ranks, tmp_path):
    (line,) = ranks.run(1, grace, tmp_path)[0]
    assert "more than checkpoint.grace_seconds=0.04" in line and "step 1" in line


def twice(runtime, folder) -> list[int]:
    """Numbers of saves begun: of one step there is one."""
    config, state = run_in(folder), state_of(runtime, tiny.LLAMA)
    with open_saver(config, state) as saver:
        saver.save(state)
        saver.save(state)
        number = saver._number
    with open_saver(config, state) as again:
        again.save(state)
    return [number, again._number]


def test_a_step_is_saved_once(ranks, tmp_path):
    assert ranks.run(1, twice, tmp_path)[0] == [1, 0]


def any_tensor(runtime, folder) -> None:
    """Every dtype; no dims; shards that are uneven, empty, or of two axes; and read as others."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    torch.manual_seed(0)
    whole = {f"{dtype}": torch.randint(0, 2, (3, 5)).to(dtype) for dtype in DTYPES}
    whole |= {f"none {dtype}": torch.tensor(1).to(dtype) for dtype in DTYPES}
    layouts = [
        (Shard(0), Shard(0)),
        (Shard(0), Shard(1)),
        (Shard(1), Replicate()),
        (Replicate(),) * 2,
    ]

    def spread(values: dict[str, torch.Tensor], first: int) -> dict[str, torch.Tensor]:
        found = {}
        for number, (name, tensor) in enumerate(values.items()):
            layout = layouts[(number + first) % len(layouts)]
            found[name] = tensor
            if tensor.dim():  # without a word between ranks: gloo has no 16-bit integers
                found[name] = distribute_tensor(tensor, mesh, layout, src_data_rank=None)
        return found

    state = tensors = spread(whole, 0)
    if runtime.rank == 3:  # what only some ranks have, as in a pipeline
        state = {**tensors, "own": torch.arange(3.0)}
    tiny_state = state_of(runtime, tiny.LLAMA, strategy=StrategyConfig(replicate=4))
    config = run_in(folder, StrategyConfig(replicate=4))
    with mock.patch.object(TrainState, "state_tensors", lambda _: state):
        tiny.save(config, tiny_state)
    path = checkpoint_path(folder, 0)
    manifest = check_folder(path)
    assert sum(file.size for file in manifest.files.values()) < 2 * 2000 + 4 * 3000
    for first in range(len(layouts)):
        target = spread({name: torch.zeros_like(tensor) for name, tensor in whole.items()}, first)
        read_tensors(path, manifest, target)
        for name, tensor in spread(whole, first).items():
            assert torch.equal(storage.local_tensor(target[name]), storage.local_tensor(tensor)), (
                name
            )
    for name, tensor in whole.items():
        assert torch.equal(read_whole(path, manifest, name), tensor)
    assert read_whole(path, manifest, "own").tolist() == [0.0, 1.0, 2.0]


def test_any_tensor_comes_back_under_any_layout(ranks, tmp_path):
    ranks.run(4, any_tensor, tmp_path)
