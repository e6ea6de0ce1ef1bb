"""What is gone on from: the newest good checkpoint, whatever has happened to the newer ones."""

import os
import pickle
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from unittest import mock

import damage
import pytest
import tiny
import torch
from test_checkpoint import run_in, state_of
from test_manifest import Evil
from test_saver import config_of, heard, here

from parallel.grad_norm import local_tensor
from parallel.strategy import StrategyConfig
from trainer.checkpoint import restore as module
from trainer.checkpoint.folder import checkpoint_path, list_checkpoints
from trainer.checkpoint.manifest import Manifest
from trainer.checkpoint.restore import load_weights
from trainer.config.train import OptimConfig, UserError
from trainer.loop import open_saver, resume
from trainer.optim.lr_schedule import learning_rate_at

FSDP = StrategyConfig(shard=2)
STEPS = (10, 20, 30)


def saved(runtime, folder, strategy=None, keep=0):
    """A run with three checkpoints, whose tokens are its steps and whose weights differ."""
    state = state_of(runtime, tiny.LLAMA, strategy=strategy)
    with open_saver(config_of(folder, strategy, keep=keep), state, "data") as saver:
        for state.step in STEPS:
            state.tokens.fill_(state.step)
            for parameter in state.worker.model.parameters():
                local_tensor(parameter.detach()).add_(1.0)
            saver.save(state)
    return state


def resumed(runtime, config, data="") -> tuple[int, list[str]]:
    """The step that a new state goes on from, and what is said."""
    state = state_of(runtime, tiny.LLAMA, seed=1, strategy=config.strategy)
    with heard(module.log) as lines:
        try:
            resume(config, state, data)
        except UserError as error:
            return -1, error.problems
    assert state.tokens.item() == state.step
    return state.step, lines


def test_random_damage_is_found_named_and_got_over(ranks, tmp_path):
    assert ranks.run(2, damage.survive, tmp_path, 5) == [[], []]


def fall_back(runtime, folder) -> list[tuple[int, list[str]]]:
    saved(runtime, folder, FSDP)
    if runtime.rank == 0:
        (checkpoint_path(folder, 30) / "rank-00001.safetensors").unlink()
        # A save of another moment, mixed in: whole in itself, and still not this checkpoint's.
        name = "rank-00000.safetensors"
        shutil.copy(checkpoint_path(folder, 10) / name, checkpoint_path(folder, 20) / name)
    torch.distributed.barrier()
    found = [resumed(runtime, run_in(folder, FSDP))]
    torch.distributed.barrier()
    return [*found, resumed(runtime, run_in(folder, FSDP))]


def test_all_ranks_fall_back_to_the_newest_good_one(ranks, tmp_path):
    first, second = ranks.run(2, fall_back, tmp_path)
    assert [step for step, _ in first] == [step for step, _ in second] == [10, 10]
    assert second[0][1] == []  # told once
    thirty, twenty, lost, *aside = first[0][1]
    assert (
        thirty == f"{checkpoint_path(tmp_path, 30)} is damaged: rank-00001.safetensors is missing"
    )
    assert "step-00000020 is damaged: rank-00000.safetensors is not what was saved" in twenty
    assert lost == "going on from step 10: 20 steps are done again"
    assert "step-00000020 is not gone on from; it is now unused-step-00000020" in aside[0]
    assert first[1][1] == []  # the next start has nothing to say
    assert here(tmp_path) == ["step-00000010", "unused-step-00000020", "unused-step-00000030"]


def none_good(runtime, folder) -> list[tuple[int, list[str]]]:
    saved(runtime, folder)
    for step in STEPS:
        path = checkpoint_path(folder, step) / "manifest.json"
        path.write_bytes(path.read_bytes()[:-1])
    config = run_in(folder)
    return [resumed(runtime, config), resumed(runtime, replace(config, resume="scratch"))]


def test_never_from_scratch_unless_asked(ranks, tmp_path):
    (refused, problems), (step, lines) = ranks.run(1, none_good, tmp_path)[0]
    assert refused == -1
    for number in STEPS:
        assert f"step-000000{number} is damaged: manifest.json is garbled" in problems[0]
    assert "no checkpoint in run_dir=" in problems[0] and "resume=scratch" in problems[0]
    assert step == 0 and "going on from step 0: 30 steps are done again" in lines
    assert here(tmp_path) == [f"unused-step-000000{number}" for number in STEPS]


def earlier(runtime, folder) -> list:
    saved(runtime, folder)
    found = [resumed(runtime, replace(run_in(folder), resume_step=20))]
    state = state_of(runtime, tiny.LLAMA)
    resume(run_in(folder), state)
    with open_saver(config_of(folder, keep=2), state) as saver:
        state.step = 25
        saver.save(state)
    return [*found, here(folder)]


def test_an_earlier_step_becomes_the_newest(ranks, tmp_path):
    (step, lines), left = ranks.run(1, earlier, tmp_path)[0]
    assert step == 20 and len(lines) == 1 and "step-00000030 is not gone on from" in lines[0]
    assert left == ["step-00000020", "step-00000025", "unused-step-00000030"]


def order_by_step(runtime, folder) -> list:
    """No pointer and no time of a file decides."""
    saved(runtime, folder)
    for age, step in enumerate(STEPS):
        os.utime(checkpoint_path(folder, step), (2e9 - age, 2e9 - age))
    for text in ("", "abc", "step-00000099"):
        (folder / "checkpoints" / "latest").write_text(text)
        (folder / "latest").write_text(text)
    partial = folder / "checkpoints" / ".step-00000040.abc.partial"
    partial.mkdir()
    (partial / "rank-00000.safetensors").write_bytes(b"half")
    found = resumed(runtime, run_in(folder))
    return [*found, partial.exists()]


def test_steps_alone_say_what_is_newest(ranks, tmp_path):
    step, lines, partial = ranks.run(1, order_by_step, tmp_path)[0]
    assert step == 30 and not partial
    (line,) = lines
    assert line.startswith("removed what a killed run left unfinished")
    assert line.endswith("checkpoints: .step-00000040.abc.partial")


def evil(runtime, folder) -> list:
    """An old checkpoint as the newest, and a pickle in place of a file."""
    saved(runtime, folder)
    old = checkpoint_path(folder, 40)
    old.mkdir()
    (old / ".metadata").write_bytes(pickle.dumps(Evil(folder / "ran")))
    found = [resumed(runtime, run_in(folder))]
    shutil.rmtree(old)
    file = checkpoint_path(folder, 30) / "rank-00000.safetensors"
    file.write_bytes(pickle.dumps(Evil(folder / "ran")))
    return [*found, resumed(runtime, run_in(folder)), (folder / "ran").exists()]


def test_no_pickle_is_opened(ranks, tmp_path):
    (refused, problems), (step, _), ran = ranks.run(1, evil, tmp_path)[0]
    assert refused == -1 and "holds pickled code and is not read" in problems[0]
    assert step == 20 and not ran


def other_run(runtime, folder) -> list:
    saved(runtime, folder)
    config = run_in(folder)
    changed = replace(config, seed=3, model=replace(config.model, layers=9))
    return [
        resumed(runtime, config, "other")[1],
        resumed(runtime, changed)[1],
        resumed(runtime, config, "data")[0],
        resumed(runtime, replace(config, seed=3, resume_changed=["seed"]), "data"),
        resumed(runtime, replace(config, resume_changed=["data"]), "other"),
    ]


def test_other_data_and_another_config_are_refused(ranks, tmp_path):
    data, config, step, seed_changed, data_changed = ranks.run(1, other_run, tmp_path)[0]
    assert seed_changed[0] == data_changed[0] == 30  # as they were named
    assert "going on with seed=3, not 0" in seed_changed[1][0]
    assert "going on with other data" in data_changed[1][0]
    assert "was trained on other data" in data[0] and "since step 30" in data[0]
    layers, seed = config
    assert "model.layers=4, not 9; set model.layers=4" in layers and "set seed=0" in seed
    assert step == 30


def changed_run(runtime, folder) -> list[list[str]]:
    """What is said where a run goes on with other steps, another batch or another rate."""
    config, state = config_of(folder), state_of(runtime, tiny.LLAMA)
    state.step, state.samples, state.order_batch_size = 900, 900 * 32, 16  # as it began
    tiny.save(config, state)
    batch = {"batch_size": 64, "resume_changed": ["batch_size"]}
    state.tokens.fill_(900)
    changes = [
        {},
        {"steps": 4000},
        {"optim": OptimConfig(lr=2e-3)},
        {"optim": OptimConfig(schedule="constant")},
        batch,
        batch | {"optim": OptimConfig(lr=2e-3)},
    ]
    return [heard_from(runtime, replace(config, **change)) for change in changes]


def heard_from(runtime, config) -> list[str]:
    state = state_of(runtime, tiny.LLAMA)
    with heard(module.log) as lines:
        resume(config, state)
    assert (state.samples, state.order_batch_size) == (900 * 32, 16)
    return lines


def test_a_leap_of_the_learning_rate_and_another_batch_size_are_told(ranks, tmp_path):
    same, steps, lr, schedule, batch, both = ranks.run(1, changed_run, tmp_path)[0]
    assert same == []
    now, before = (learning_rate_at(900, count, OptimConfig()) for count in (4000, 1000))
    for lines, rate in ((steps, now), (lr, 2 * before), (schedule, 1e-3), (both[1:], 2 * before)):
        (line,) = lines
        assert f"step 901 is {rate:.3g}, where" in line and f"had {before:.3g}" in line
    assert "batch_size=64, not 32" in batch[0] and "batch_size=64, not 32" in both[0]
    assert "64 samples, not 32, at the same learning rate" in batch[1] and len(batch) == 2


def older(runtime, folder) -> tuple[int, int]:
    """Go on, with another batch size, from a checkpoint that knows no samples."""
    config, state = config_of(folder), state_of(runtime, tiny.LLAMA)
    state.step = 30

    def manifest(samples, lr, order_batch_size, **known):
        return Manifest(**known)

    with mock.patch("trainer.checkpoint.save.Manifest", manifest):
        tiny.save(config, state)
    resume(replace(config, batch_size=8, resume_changed=["batch_size"]), state)
    return state.samples, state.order_batch_size


def test_an_older_checkpoint_has_learned_from_all_samples_of_its_steps(ranks, tmp_path):
    assert ranks.run(1, older, tmp_path) == [(30 * 32, 32)]


def read_beside(runtime, folder) -> list[int]:
    """Read again and again what another thread writes and removes; the steps seen."""
    config, state = config_of(folder, keep=1), state_of(runtime, tiny.LLAMA)
    done, seen = threading.Event(), []
    reader = tiny.make_worker(runtime, tiny.LLAMA, seed=1)

    def write(saver) -> None:
        for state.step in range(1, 60):
            with torch.no_grad():
                for parameter in state.worker.model.parameters():
                    parameter.fill_(float(state.step))
            saver.save(state)
        saver.wait()
        done.set()

    with open_saver(config, state) as saver:
        saver.save(state)
        saver.wait()
        thread = threading.Thread(target=write, args=(saver,))
        thread.start()
        while not done.is_set():
            path = load_weights(folder, reader)
            values = {p.flatten()[0].item() for p in reader.model.parameters()}
            seen.append(int(path.name[-8:]))
            if seen[-1]:
                assert values == {float(seen[-1])}
        thread.join()
    return seen


def test_a_reader_sees_a_whole_checkpoint_or_another(ranks, tmp_path):
    seen = ranks.run(1, read_beside, tmp_path)[0]
    assert seen == sorted(seen) and len(set(seen)) > 3


def test_a_run_without_a_good_checkpoint_is_not_used(ranks, tmp_path):
    assert "no checkpoint yet" in ranks.run(1, unread, tmp_path)[0]
    checkpoint_path(tmp_path, 3).mkdir(parents=True)
    assert "holds no good checkpoint" in ranks.run(1, unread, tmp_path)[0]
    assert [step for step, _ in list_checkpoints(tmp_path)] == [3]  # and left alone


def unread(runtime, folder) -> str:
    with pytest.raises(UserError) as raised:
        load_weights(Path(folder), tiny.make_worker(runtime, tiny.LLAMA))
    return str(raised.value)


def test_the_state_has_no_tensor_that_is_not_saved(ranks, tmp_path):
    names = ranks.run(1, names_of)[0]
    kinds = {name.split(".")[0] for name in names}
    assert kinds == {"model", "optimizer", "loss_scale", "guard", "updates", "tokens", "step"}


def names_of(runtime) -> list[str]:
    return list(state_of(runtime, tiny.LLAMA).state_tensors())
