"""What may be continued in a run's folder, and what is refused before anything is lost."""

from dataclasses import replace

import pytest

from parallel.errors import UserError
from trainer.checkpoint.folder import checkpoint_path, list_checkpoints
from trainer.checkpoint.manifest import NAME, Manifest, write_manifest
from trainer.config.train import OptimConfig, StrategyConfig, TrainConfig
from trainer.run.run_dir import AlreadyFinishedError, load_config, open_run_dir
from trainer.run.status import StatusFile


def started(run_dir, *steps, **values):
    config = TrainConfig(run_dir=str(run_dir), **values)
    open_run_dir(config)
    for step in steps:
        folder = checkpoint_path(run_dir, step)
        folder.mkdir(parents=True)
        write_manifest(folder, Manifest("", step, {}, {}, "", None, {}, {}))
    return config


def refused(config):
    with pytest.raises(UserError) as raised:
        open_run_dir(config)
    return raised.value.problems


def test_config_comes_back(tmp_path):
    config = started(tmp_path / "a" / "run", optim=OptimConfig(lr=0.1 + 0.2), steps=7)
    assert load_config(tmp_path / "a" / "run") == config
    assert [path.name for path in (tmp_path / "a" / "run").iterdir()] == ["config.yaml"]


def test_checkpoints_are_in_order_and_complete(tmp_path):
    started(tmp_path, 900, 1000, 200)
    (tmp_path / "checkpoints" / ".step-00001100").mkdir()
    assert [step for step, _ in list_checkpoints(tmp_path)] == [200, 900, 1000]
    assert list_checkpoints(tmp_path)[0][1] == tmp_path / "checkpoints" / "step-00000200"
    assert list_checkpoints(tmp_path / "nowhere") == []


def test_a_run_goes_on_under_another_layout(tmp_path):
    config = started(tmp_path, 500)
    other = replace(
        config, strategy=StrategyConfig(shard=8), micro_batch_size=1, device="cpu", steps=2000
    )
    other = replace(other, data=replace(other.data, cache="elsewhere"))
    open_run_dir(other)
    assert load_config(tmp_path) == other


def test_another_run_is_refused_with_every_difference(tmp_path):
    config = started(tmp_path, 500)
    other = replace(config, seed=1, batch_size=64, model=replace(config.model, layers=9))
    assert refused(other) == [
        f"run_dir={tmp_path} holds a run with {key}={old}, not {new}; set {key}={old}, "
        f"choose another run_dir, or go on all the same with resume_changed=[{key}]"
        for key, old, new in [("model.layers", 4, 9), ("batch_size", 32, 64), ("seed", 0, 1)]
    ]
    assert load_config(tmp_path) == config


def test_what_may_change_is_named(tmp_path):
    config = started(tmp_path, 500)
    other = replace(config, seed=1, data=replace(config.data, path="other.txt", seq_len=128))
    (problem,) = refused(replace(other, resume_changed=["data"]))
    assert "holds a run with seed=0, not 1" in problem
    (problem,) = refused(replace(other, resume_changed=["data.path", "seed"]))
    assert "data.seq_len=256, not 128" in problem
    (problem,) = refused(replace(other, resume_changed=["data.pth"]))
    assert "did you mean data.path?" in problem
    open_run_dir(replace(other, resume_changed=["seed", "data"]))
    assert load_config(tmp_path).seed == 1


def test_a_finished_run_is_not_trained_again(tmp_path):
    config = started(tmp_path, 500, 1000)
    with pytest.raises(AlreadyFinishedError, match=r"finished at step 1000 .*; raise steps"):
        open_run_dir(config)
    open_run_dir(replace(config, steps=1001))


def test_a_damaged_end_is_no_end(tmp_path):
    config = started(tmp_path, 500, 1000)
    (checkpoint_path(tmp_path, 1000) / NAME).write_text("{}")
    open_run_dir(config)


def test_resume_always(tmp_path):
    started(tmp_path / "llama-tiny")
    typo = TrainConfig(run_dir=str(tmp_path / "lama-tiny"), resume="always")
    assert "did you mean" in refused(typo)[0] and "llama-tiny" in refused(typo)[0]
    assert (
        "holds no checkpoint and resume=always"
        in refused(TrainConfig(run_dir=str(tmp_path / "llama-tiny"), resume="always"))[0]
    )
    started(tmp_path / "vit-tiny", 10)
    open_run_dir(TrainConfig(run_dir=str(tmp_path / "vit-tiny"), resume="always"))


def test_resume_step(tmp_path):
    config = started(tmp_path, 500, 1000)
    open_run_dir(replace(config, resume_step=500))  # though the run is finished
    assert "there are: 500, 1000; 0 is the newest" in refused(replace(config, resume_step=999))[0]
    with pytest.raises(AlreadyFinishedError, match="finished at step 1000"):
        open_run_dir(replace(config, resume_step=1000))
    nowhere = TrainConfig(run_dir=str(tmp_path / "x"), resume_step=500)
    assert "holds no run" in refused(nowhere)[0]


def test_a_run_that_was_stopped_at_its_last_step_goes_on(tmp_path):
    config = started(tmp_path, 1000)
    status = StatusFile(tmp_path, steps=1000)
    status.write("stopped", 1000)
    open_run_dir(config)  # the test split is not measured yet
    with pytest.raises(AlreadyFinishedError):
        open_run_dir(replace(config, steps=900))
    status.write("finished", 1000)
    with pytest.raises(AlreadyFinishedError):
        open_run_dir(config)


def test_resume_never(tmp_path):
    config = started(tmp_path)
    open_run_dir(replace(config, resume="never"))
    checkpoint_path(tmp_path, 10).mkdir(parents=True)
    assert (
        "at step 10 and resume=never; set resume=auto"
        in refused(replace(config, resume="never"))[0]
    )


def test_other_folders_are_left_alone(tmp_path):
    (tmp_path / "thesis.tex").touch()
    assert "is not empty and holds no run" in refused(TrainConfig(run_dir=str(tmp_path)))[0]
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    in_a_file = TrainConfig(run_dir=str(tmp_path / "thesis.tex"))
    assert f"run_dir={tmp_path}/thesis.tex cannot be written" in refused(in_a_file)[0]
    assert "cannot be written" in refused(TrainConfig(run_dir="/proc/nowhere/run"))[0]


def test_a_folder_without_a_run_names_the_nearest(tmp_path):
    started(tmp_path / "llama-tiny")
    started(tmp_path / "vit-tiny")
    with pytest.raises(UserError, match=r"did you mean run_dir=.*llama-tiny\?"):
        load_config(tmp_path / "lama-tiny")
    with pytest.raises(UserError, match="the newest run is run_dir="):
        load_config(tmp_path / "x")
    with pytest.raises(UserError, match="run_dir is empty"):
        load_config("")


@pytest.mark.parametrize("text", ["steps: many", "from_the_future: 1", "steps: [1", "- 1"])
def test_a_config_of_another_version(tmp_path, text):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(UserError, match=r"config\.yaml does not fit this version"):
        load_config(tmp_path)
