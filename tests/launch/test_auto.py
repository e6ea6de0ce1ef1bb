"""`strategy=auto`: the layout is chosen once, said, and kept; what will not fit is refused."""

import logging
from dataclasses import replace
from pathlib import Path

import pytest
from forked import ROOT
from hydra import compose, initialize_config_dir

from conf import schema
from conf.submit import ClusterConfig
from conf.validation.validate import find_problems
from launch.cli.auto import check_memory, with_chosen_layout
from launch.cli.devices import devices_here, devices_of
from launch.cli.preflight import prepare_training
from parallel.errors import ConfigError
from parallel.strategy import StrategyConfig, axis_degrees, resolve_degrees, world_size
from trainer.config.train import DataConfig, ModelConfig, TrainConfig
from trainer.plan.layout import layout_of_job
from trainer.plan.machine import GIB
from trainer.run.plan_record import read_plan
from trainer.run.run_dir import load_config

AUTO = StrategyConfig(auto="once")
SMALL = ModelConfig(layers=4, width=64, heads=8, kv_heads=4, ffn_width=128)
LARGE = ModelConfig(
    layers=32, width=4096, heads=32, kv_heads=8, ffn_width=14336, vocab_size=128256, tied=False
)


@pytest.fixture
def job(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("In the beginning all layouts were one process. " * 400)
    data = DataConfig(path=str(text), seq_len=32, characters=True)
    run_dir = str(tmp_path / "run")
    return TrainConfig(
        model=SMALL, data=data, strategy=AUTO, batch_size=16, run_dir=run_dir, device="cpu"
    )


def large(**changes) -> TrainConfig:
    model = replace(LARGE, max_positions=8192)
    data = DataConfig(path="not read", seq_len=8192)
    return TrainConfig(model=model, data=data, strategy=AUTO, batch_size=64, **changes)


@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_a_run_gets_a_sound_layout_and_says_why(job, ranks, caplog):
    caplog.set_level(logging.INFO)
    chosen = prepare_training(job, ranks)
    assert world_size(chosen.strategy) == ranks and chosen.strategy.auto == "no"
    assert find_problems(chosen, ranks) == []
    assert (chosen.batch_size, chosen.data) == (job.batch_size, job.data)
    assert load_config(job.run_dir).strategy == chosen.strategy
    lines = caplog.text.split("strategy=auto: ")[1].splitlines()[:3]
    plan = read_plan(Path(job.run_dir))
    assert plan is not None and lines[0] == plan.layout
    assert "legal on" in lines[1] and " GiB, step " in lines[2]
    assert 0 < plan.memory_gib < plan.device_gib and plan.step_seconds > 0


def test_two_starts_choose_the_same(job):
    assert prepare_training(job, 8).strategy == prepare_training(job, 8).strategy


def test_keys_of_the_command_line_are_kept(job):
    strategy = replace(AUTO, tensor=2, pipeline=2, schedule="1f1b")
    config = replace(job, strategy=strategy, micro_batch_size=2, model=LARGE)
    config = replace(config, data=replace(job.data, seq_len=64))
    keys = {"strategy.tensor", "strategy.pipeline", "strategy.schedule", "micro_batch_size"}
    devices = devices_of(ClusterConfig(gpu="h100", gpus_per_node=8), "auto")
    chosen = with_chosen_layout(config, devices, 8, keys)
    assert axis_degrees(chosen.strategy) | {"tensor": 2, "pipeline": 2} == axis_degrees(
        chosen.strategy
    )
    assert (chosen.strategy.schedule, chosen.micro_batch_size) == ("1f1b", 2)
    other = with_chosen_layout(config, devices, 8, ())
    assert (other.strategy.tensor, other.strategy.pipeline) != (2, 2)


def test_degrees_that_cannot_be_are_told_as_ever(job):
    config = replace(job, strategy=replace(AUTO, tensor=3))
    with pytest.raises(ConfigError, match=r"strategy\.tensor=3 does not divide model\.heads=8"):
        with_chosen_layout(config, devices_here(config, 6), 6, {"strategy.tensor"})


def test_a_cluster_that_does_not_say_its_device_is_refused(job):
    with pytest.raises(ConfigError, match=r"cluster\.gpu is empty; set it to one of a100-40, "):
        with_chosen_layout(job, None, 2, ())


@pytest.mark.parametrize("gpu", ["cpu", "h100"])
def test_what_keys_say_of_a_device_replaces_what_is_known_of_it(gpu):
    cluster = ClusterConfig(gpu=gpu, memory_gib=4.0, network_gbit=8.0)
    machine = devices_of(cluster, "auto").machine
    assert (machine.memory, machine.network) == (4 * GIB, 1e9)


def test_other_commands_need_a_named_strategy():
    with pytest.raises(ConfigError, match=r"strategy\.auto=once plans a training run"):
        resolve_degrees(AUTO, 2)


def test_what_fits_nowhere_is_refused():
    config = large()
    with pytest.raises(ConfigError, match=r"no layout of 1 ranks fits into 92% of 79\.6 GiB"):
        with_chosen_layout(config, devices_of(ClusterConfig(gpu="h100"), "auto"), 1, ())


def test_a_layout_that_will_not_fit_is_refused_with_its_terms_and_the_nearest(caplog):
    config = large(micro_batch_size=8)
    config = replace(config, strategy=StrategyConfig(replicate=8))
    devices = devices_of(ClusterConfig(gpu="h100", gpus_per_node=8), "auto")
    with pytest.raises(ConfigError) as refused:
        check_memory(config, devices, 8)
    text = str(refused.value)
    assert "but H100 SXM has 79.6 GiB for it: activations " in text
    words = text.split("; set ")[1].split(", or check_memory")[0].split()
    nearest = composed(words)
    strategy = resolve_degrees(nearest.strategy, 8)
    assert (strategy.tensor, strategy.pipeline, strategy.context) == (1, 1, 1)
    fitting = replace(
        config,
        strategy=strategy,
        micro_batch_size=nearest.micro_batch_size,
        activation_checkpointing=nearest.activation_checkpointing,
        loss=nearest.loss,
    )
    assert check_memory(fitting, devices, 8).memory_gib * GIB < devices.machine.memory
    caplog.clear()
    assert check_memory(replace(config, check_memory=False), devices, 8).memory_gib > 80
    assert "the tensors of a rank need about" in caplog.text


def composed(words):
    schema.register_schemas("now")
    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
        return schema.build_config("train", compose("train", words))


def test_a_run_that_goes_on_keeps_its_layout_unless_asked(job, monkeypatch):
    saved = replace(job, strategy=StrategyConfig(tensor=2), micro_batch_size=4)
    prepare_training(saved, 2)
    monkeypatch.setattr("launch.cli.auto.list_checkpoints", lambda run_dir: [1])

    def strategy(wish: StrategyConfig, ranks: int, keys=()):
        config = replace(job, strategy=wish, model=load_config(job.run_dir).model)
        return layout_of_job(with_chosen_layout(config, devices_here(job, ranks), ranks, keys))

    assert (strategy(AUTO, 2).tensor, strategy(AUTO, 2).micro_batch) == (2, 4)
    assert strategy(replace(AUTO, auto="always"), 2).tensor == 1
    assert strategy(AUTO, 4).tensor == 1  # other ranks, as after an elastic restart
    assert strategy(replace(AUTO, replicate=2), 2, {"strategy.replicate"}).tensor == 1
