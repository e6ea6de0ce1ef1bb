"""What is refused before anything is submitted, and what a dry run shows."""

import os
import runpy
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from kubeflow_trainer_api.models import TrainerV1alpha1TrainJob
from launched import PLAY, ROOT
from test_script import options

from conf import schema
from conf.submit import ClusterConfig, SubmitConfig, training_part
from conf.validation.validate import find_problems
from launch.slurm import commands as slurm
from launch.slurm.batch_script import Job, SlurmRun, batch_script
from parallel.strategy import StrategyConfig
from trainer.config.train import DataConfig, TrainConfig

SUBMIT = str(ROOT / "launch" / "submit.py")


def submitted(**changes) -> SubmitConfig:
    changes = {"data": DataConfig(path="bundled:shakespeare"), **changes}
    return SubmitConfig(strategy=StrategyConfig(replicate=-1), **changes)


BAD = {
    "cluster.nodes=0 must be at least 1": {"cluster": ClusterConfig(nodes=0)},
    "cluster.hours=0.03 is a time limit of 108 s, but the run is told to save "
    "cluster.signal_seconds=120 before it and would do nothing else; set cluster.hours=0.06 or "
    "more, or fewer cluster.signal_seconds": {"cluster": ClusterConfig(hours=0.03)},
    "cluster.ranks_per_node=4 is more than cluster.gpus_per_node=2, and a GPU has one rank; set "
    "cluster.ranks_per_node=0": {"cluster": ClusterConfig(gpus_per_node=2, ranks_per_node=4)},
    "device=cuda, but cluster.gpus_per_node=0 takes no GPU; set cluster.gpus_per_node, or "
    "device=cpu": {"device": "cuda"},
    "device=cpu leaves cluster.gpus_per_node=2 idle; set cluster.gpus_per_node=0, or device=auto": {
        "device": "cpu",
        "cluster": ClusterConfig(gpus_per_node=2),
    },
    "cluster.options holds --nodes=3, which cluster.nodes sets; set that": {
        "cluster": ClusterConfig(options=["--nodes=3"])
    },
    "cluster.options holds 'qos', but each must be an option of sbatch, e.g. "
    '["--qos=high","--exclusive"]': {"cluster": ClusterConfig(options=["qos"])},
}


@pytest.mark.parametrize("message", BAD)
def test_a_job_that_cannot_be_is_refused(message):
    assert find_problems(submitted(**BAD[message]), 1) == [message]


def test_a_sound_job_is_not_refused():
    cluster = ClusterConfig(nodes=2, gpus_per_node=8, options=["--qos=high", "-x n3"])
    assert find_problems(submitted(cluster=cluster, batch_size=32), 16) == []


SHAPE = "Requested node configuration is not available"
LACKS = {
    "cluster.partition=gpus: sbatch says: Invalid partition name specified; it is one of cpu, gpu; "
    "did you mean gpu?": {"partition": "gpus"},
    f"cluster.gpus_per_node=1: sbatch says: {SHAPE}; ask for less, or choose another "
    "cluster.partition": {"gpus_per_node": 1},
    f"cluster.nodes=5: sbatch says: {SHAPE}; ask for less, or choose another cluster.partition": {
        "nodes": 5
    },
    f"cluster.cpus_per_rank=9: sbatch says: {SHAPE}; ask for less, or choose another "
    "cluster.partition": {"cpus_per_rank": 9, "nodes": 2},
    f"cluster.nodes=5, cluster.cpus_per_rank=9: sbatch says: {SHAPE}; ask for less, or choose "
    "another cluster.partition": {"cpus_per_rank": 9, "nodes": 5},
    "cluster.hours=72 is more than partition gpu allows; set cluster.hours=48 or less, and "
    "cluster.chain for a longer run": {"hours": 72.0, "partition": "gpu"},
    "cluster.hours=24.02 is more than partition cpu allows; set cluster.hours=24 or less, and "
    "cluster.chain for a longer run": {"hours": 24.02},
    "sbatch: unrecognized option '--foo'; Try \"sbatch --help\" for more information": {
        "options": ["--foo"]
    },
}


def answer_as_slurm(command, text=""):
    """Answer as a cluster of four hosts with eight cores and two partitions, which have no GPU."""
    limits = {"cpu": "1-00:00:00", "gpu": "2-00:00:00"}
    if command[0] == "sinfo":
        names = {"%P|%l": "cpu*|1-00:00:00\ngpu|2-00:00:00", "%R": "cpu\ngpu\ncpu"}[command[3]]
        of = dict(word.split("=") for word in command[4:]).get("--partition", "")
        told = f"{of}|{limits.get(of, '')}" if of else names
        return subprocess.CompletedProcess(command, 0, told, "")
    asked = options(text) | dict(word.partition("=")[::2] for word in command[2:])
    shape = (int(asked["--nodes"]), int(asked.get("--cpus-per-task", 1)))
    refused = ""
    if "--foo" in asked:
        refused = (
            "sbatch: unrecognized option '--foo'\nTry \"sbatch --help\" for more information\n"
        )
    elif (name := asked.get("--partition", "cpu")) not in limits:
        refused = f"sbatch: error: invalid partition specified: {name}\n"
        refused += "allocation failure: Invalid partition name specified\n"
    elif shape > (4, 8) or shape[1] > 8 or asked.get("--gres", "none") != "none":
        refused = f"allocation failure: {SHAPE}\n"
    return subprocess.CompletedProcess(command, int(bool(refused)), "", refused)


def cluster_problems(**changes) -> list[str]:
    cluster = ClusterConfig(**changes)
    point = SlurmRun(TrainConfig(run_dir="/runs/a"), cluster, [])
    return slurm.problems(
        cluster, batch_script(Job(Path("/runs/a"), [point], False, Path("/"), "py"))
    )


@pytest.mark.parametrize("message", LACKS)
def test_what_the_cluster_does_not_have(message, monkeypatch):
    monkeypatch.setattr(slurm, "_run", answer_as_slurm)
    assert cluster_problems(**LACKS[message]) == [message]


def test_what_the_cluster_has(monkeypatch):
    monkeypatch.setattr(slurm, "_run", answer_as_slurm)
    assert cluster_problems(nodes=4, cpus_per_rank=8, hours=48.0, partition="gpu") == []
    assert cluster_problems(hours=24.0) == []
    monkeypatch.setattr(slurm, "_run_slurm", lambda *command: "cpu*|infinite\n")
    assert cluster_problems(hours=1e4) == []


def test_a_long_time_and_a_shape_are_said_at_once(monkeypatch):
    monkeypatch.setattr(slurm, "_run", answer_as_slurm)
    found = cluster_problems(hours=72.0, nodes=5)
    assert [problem.split(" ")[0] for problem in found] == ["cluster.hours=72", "cluster.nodes=5:"]


@pytest.mark.parametrize(
    ("limit", "minutes"),
    [("30:00", 30), ("4:30:00", 270), ("1-00:00:00", 1440), ("infinite", float("inf"))],
)
def test_time_limits_as_sinfo_shows_them(limit, minutes):
    assert slurm._parse_minutes(limit) == minutes


def test_points_that_cannot_be_one_array():
    first, second = (
        SlurmRun(TrainConfig(run_dir=f"/runs/{name}"), ClusterConfig(), []) for name in "ab"
    )
    for points, message in (
        ([first, replace(second, cluster=ClusterConfig(nodes=2))], "cluster.* differs"),
        ([first, first], "would be the folder of several points"),
        ([replace(p, cluster=ClusterConfig(chain=2)) for p in (first, second)], "cluster.chain=2"),
    ):
        with pytest.raises(slurm.ConfigError) as raised:
            slurm.submit_job(points)
        assert message in str(raised.value)


@pytest.fixture
def door(tmp_path, monkeypatch, capfd):
    """launch/submit.py in this process, on a little data of its own."""
    (tmp_path / "play.txt").write_text(PLAY.read_text()[:20_000])
    data = [f"data.path={tmp_path}/play.txt", f"data.cache={tmp_path}/cache", "data=text"]
    sizes = ["data.vocab_size=300", "data.seq_len=16", "cluster=slurm-cpu", "cluster.nodes=2"]

    def run(*arguments: str) -> tuple[int, str, str]:
        flags = [argument for argument in arguments if argument.startswith("-")]
        keys = [argument for argument in arguments if argument not in flags]
        monkeypatch.setattr(sys, "argv", ["submit.py", *flags, *data, *sizes, *keys])
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(SUBMIT, run_name="__main__")
        return stop.value.code, *capfd.readouterr()

    return run


def test_dry_run_shows_the_script_and_writes_nothing(door, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")  # no Slurm either
    code, shown, _ = door("--dry-run", "strategy=fsdp", "run_dir=runs/big one", "seed=3")
    assert code == 0
    assert options(shown)["--nodes"] == "2"
    trained = next(line for line in shown.splitlines() if line.startswith("set -- "))
    assert shlex.split(trained)[2:] == [
        *(f'data.path="{tmp_path}/play.txt"', f'data.cache="{tmp_path}/cache"', "data=text"),
        *("data.vocab_size=300", "data.seq_len=16", "strategy=fsdp", "seed=3"),
        *("checkpoint.grace_seconds=120", f"run_dir={tmp_path}/runs/big one"),
    ]
    assert subprocess.run(["/bin/bash", "-n"], input=shown, text=True).returncode == 0
    assert not (tmp_path / "runs").exists()


def test_a_cluster_without_sbatch_is_one_message(door, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    code, _, said = door("run_dir=run")
    assert code == 2
    assert said.splitlines()[-1].startswith("there is no sinfo here: a job is submitted where")
    assert not (tmp_path / "run").exists()


def test_all_mistakes_of_job_and_training_at_once(door, tmp_path):
    code, _, said = door("run_dir=run", "cluster.hours=0.01", "batch_size=7", "precision=fp31")
    assert code == 2
    assert [line[:12] for line in said.splitlines()] == [
        "3 problems w",
        "- precision=",
        "- cluster.ho",
        "- batch_size",
    ]
    assert not (tmp_path / "run").exists()


def test_data_that_are_not_there_and_a_run_that_is_another(door, tmp_path):
    code, _, said = door("run_dir=run", "data.path=none.txt", "--dry-run")
    assert code == 2
    assert "none.txt: no such file" in said
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").touch()
    code, _, said = door("run_dir=run", "--dry-run")
    assert code == 2
    assert "run_dir=run is not empty and holds no run" in said


def test_a_sweep_with_one_bad_point_submits_none(door, tmp_path, monkeypatch):
    (tmp_path / "sinfo").write_text("#!/bin/bash\nexit 7\n")
    (tmp_path / "sinfo").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    code, _, said = door("-m", "batch_size=8,7")
    assert code == 2
    assert "batch_size=7 is not divisible by the 2 ranks" in said
    assert "sinfo" not in said
    assert not list(tmp_path.glob("runs/*/*/"))


def test_an_array_trains_what_a_sweep_would(door, tmp_path):
    code, shown, _ = door("-m", "strategy=ddp,fsdp", "optim.lr=1e-3", "--dry-run")
    assert code == 0
    folders = [line.split("/")[-1] for line in shown.splitlines() if line.startswith("  run_dir=")]
    assert folders == ["strategy=ddp", "strategy=fsdp"]
    assert "cluster" not in "".join(folders)
    trained = [line for line in shown.splitlines() if line.startswith("  set -- ")]
    assert ["strategy=ddp" in trained[0], "strategy=fsdp" in trained[1]] == [True, True]
    assert "cluster" not in "".join(trained)
    assert options(shown)["--array"] == "0-1"


def test_a_job_trains_what_the_command_would(tmp_path):
    train, submit = (
        yaml.safe_load((ROOT / "conf" / f"{name}.yaml").read_text()) for name in ("train", "submit")
    )
    own = ("train_schema", "submit_schema", {"cluster": "slurm"})
    of_train, of_submit = ([d for d in y["defaults"] if d not in own] for y in (train, submit))
    assert of_train == of_submit
    assert submit["run_dir"] == train["run_dir"]
    config = submitted(seed=4)
    assert type(training_part(config)) is TrainConfig
    assert training_part(config).seed == 4


def test_the_kubernetes_example_is_what_a_train_job_may_hold():
    job = yaml.safe_load((ROOT / "docs" / "kubernetes.yaml").read_text())
    read = TrainerV1alpha1TrainJob.from_dict(job)
    assert read is not None
    assert read.to_dict() == job  # keys that it does not know are dropped
    trainer = job["spec"]["trainer"]
    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
        schema.register_schemas("now")
        config = schema.build_config("train", compose("train", trainer["args"]))
    assert find_problems(config, trainer["numNodes"] * trainer["numProcPerNode"]) == []
