"""The batch script as text, what is refused before anything is submitted, and a stand-in sbatch."""

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

from conf import schema
from conf.check import problems
from conf.submit import ClusterConfig, SubmitConfig, training_part
from launch import slurm
from launch.script import Job, Point, job_name, script, time_limit
from launch.slurm import Hosts
from parallel.config import StrategyConfig
from trainer.config import DataConfig, TrainConfig

SUBMIT = str(ROOT / "launch" / "submit.py")
THERE = [
    Hosts("cpu", True, 1440, 4, 0, 16),
    Hosts("gpu", False, 2880, 2, 8, 64),
    Hosts("gpu", False, 2880, 3, 4, 32),
]


def job(*runs: str, overrides: tuple[str, ...] = ("strategy=fsdp",), **cluster) -> Job:
    points = [
        Point(TrainConfig(run_dir=run), ClusterConfig(**cluster), list(overrides))
        for run in runs or ("/runs/big",)
    ]
    folder = Path(points[0].training.run_dir)
    swept = len(points) > 1
    return Job(folder.parent if swept else folder, points, swept, Path("/home/me"), "/venv/python")


def options(text: str) -> dict[str, str]:
    """The options of sbatch in a script."""
    lines = [line.partition(" ")[2] for line in text.splitlines() if line.startswith("#SBATCH")]
    return dict(shlex.split(line)[0].partition("=")[::2] for line in lines)


def bash(text: str, tmp_path: Path, **commands: str) -> subprocess.CompletedProcess:
    """Run a script with these commands in place of Slurm's."""
    folder = tmp_path / "bin"
    folder.mkdir(exist_ok=True)
    for name, lines in {"scontrol": "echo localhost", "squeue": "echo RUNNING", **commands}.items():
        (folder / name).write_text(f"#!/bin/bash\n{lines}\n")
        (folder / name).chmod(0o755)
    (tmp_path / "job.sbatch").write_text(text)
    given = {"PATH": f"{folder}:{os.environ['PATH']}", "SLURM_JOB_ID": "41007"}
    given |= {"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_ARRAY_TASK_ID": "1"}
    return subprocess.run(
        ["bash", str(tmp_path / "job.sbatch")], env=os.environ | given, capture_output=True,
        text=True, check=False,
    )  # fmt: skip


def test_the_options_of_a_job():
    text = script(
        job(nodes=2, gpus_per_node=8, cpus_per_rank=12, partition="gpu", account="me",
            options=["--qos=high"], chain=3)
    )  # fmt: skip
    assert options(text) == {
        "--job-name": job_name(Path("/runs/big")),
        "--nodes": "2",
        "--ntasks-per-node": "8",
        "--output": "/runs/big/slurm-%j.out",
        "--chdir": "/home/me",
        "--open-mode": "append",
        "--signal": "USR1@120",
        "--requeue": "",
        "--gres": "gpu:8",
        "--cpus-per-task": "12",
        "--time": "24:00:00",
        "--partition": "gpu",
        "--account": "me",
        "--dependency": "singleton",
        "--qos": "high",
    }
    assert "--gres" not in options(script(job(gpus_per_node=2, options=["--gpus-per-node=a100:2"])))
    assert "--gres" not in options(script(job()))
    assert "--time" not in options(script(job(hours=0.0)))
    assert "--no-requeue" in options(script(job(requeue=False)))
    assert options(script(job("/r/100% sure")))["--output"] == "/r/100%% sure/slurm-%j.out"


@pytest.mark.parametrize(
    ("hours", "limit"),
    [(24, "24:00:00"), (0.2, "00:12:00"), (0.01, "00:01:00"), (100, "100:00:00")],
)
def test_a_time_limit_is_whole_minutes(hours, limit):
    assert time_limit(hours) == limit


def test_a_name_is_of_one_folder_alone(tmp_path):
    first, second = job_name(tmp_path / "a" / "run"), job_name(tmp_path / "b" / "run")
    assert first != second
    assert first == job_name(tmp_path / "a" / ".." / "a" / "run")
    assert job_name(tmp_path / "ünd so, weiter").isprintable()


SHOW = """[ "$1" = --cpus-per-task=3 ] && shift
while [ "$1" != bash ]; do shift; done
SLURM_PROCID=5 SLURM_NTASKS=8 SLURM_LOCALID=1 exec "$@" """


def test_each_rank_gets_what_torchrun_would_set(tmp_path):
    run, data = tmp_path / "a run", "data.path=it's here"
    show = tmp_path / "show"
    show.write_text(
        '#!/bin/bash\nfor name in RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_PORT LOADED '
        'TORCHELASTIC_RUN_ID TORCHELASTIC_RESTART_COUNT; do echo "$name=${!name}"; done\n'
        'printf "<%s>\\n" "$@"\n'
    )  # fmt: skip
    show.chmod(0o755)
    text = script(
        job(str(run), overrides=("strategy=ddp", data), ranks_per_node=4, cpus_per_rank=3,
            setup=["export LOADED=cuda"], wrap=str(show), srun_options=["--container-image=a b"])
    )  # fmt: skip
    done = bash(text, tmp_path, srun='printf "option <%s>\\n" "$@" >&2\n' + SHOW)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1:-1] == [
        *("RANK=5", "WORLD_SIZE=8", "LOCAL_RANK=1", "LOCAL_WORLD_SIZE=4", "MASTER_PORT=11007"),
        *("LOADED=cuda", "TORCHELASTIC_RUN_ID=41007", "TORCHELASTIC_RESTART_COUNT=0"),
        *("</venv/python>", f"<{ROOT}/launch/train.py>", "<strategy=ddp>", f"<{data}>"),
        f"<run_dir={run}>",
    ]
    assert "option <--cpus-per-task=3>\noption <--container-image=a b>" in done.stderr


def test_a_point_of_an_array_is_its_own_run(tmp_path):
    runs = [str(tmp_path / name) for name in ("0-a", "1-b, c")]
    text = script(job(*runs, parallel=1))
    assert options(text)["--array"] == "0-1%1"
    assert options(text)["--output"] == f"{tmp_path}/slurm-%A_%a.out"
    done = bash(text, tmp_path, srun='echo "${@: -1}"')
    assert f"run_dir={runs[1]}" in done.stdout
    assert runs[0] not in done.stdout


# What a start leaves in status.json and srun's exit code → what the script does about it.
ENDS = {
    "finished": ({"state": "finished", "code": 0}, 0, ""),
    "stopped by its time limit": (
        {"state": "stopped", "reason": "SIGUSR1", "code": 75},
        75,
        "stopped",
    ),
    "preempted": ({"state": "stopped", "reason": "SIGTERM", "code": 75}, 143, "stopped (SIGTERM)"),
    "hung": ({"state": "failed", "reason": "rank 1 is silent", "code": 77}, 77, "a rank hung"),
    "killed": ({"state": "running", "code": None}, 137, "a rank was lost"),
    "lost": (
        {"state": "failed", "reason": "rank 1 is gone (pid 5)", "code": 1},
        1,
        "a rank was lost",
    ),
    "a mistake": ({"state": "failed", "reason": "no progress", "code": 2}, 2, ""),
    "a bug": ({"state": "failed", "reason": "RuntimeError: a bug", "code": 1}, 1, ""),
    "a mistake before training": (None, 2, ""),
    "a signal before training": (None, 138, "a signal while it started"),
}


@pytest.mark.parametrize("end", ENDS)
def test_what_is_queued_again(end, tmp_path):
    status, code, again = ENDS[end]
    run = tmp_path / "run"
    run.mkdir()
    before = {"state": "stopped", "code": 75, "updated": 1.5}  # of the start before
    write_status(run, before)
    write_status(tmp_path, before | (status or {}) | {"updated": 1.5 if status is None else 2.5})
    commands = {
        "srun": f"cp {tmp_path}/status.json {run}/status.json; exit {code}",
        "scontrol": f'echo "$@" >> {tmp_path}/asked; echo localhost',
        "sleep": "exit 0",
    }
    done = bash(script(job(str(run))), tmp_path, **commands)
    asked = (tmp_path / "asked").read_text()
    assert ("requeue 41007" in asked) == bool(again), done.stdout
    assert again in done.stdout
    if not again:
        assert done.returncode == code
    # One that was cancelled, or belongs to a chain, or may not, is not.
    for text, more in (
        (script(job(str(run))), {"squeue": "echo COMPLETING"}),
        (script(job(str(run), requeue=False)), {}),
    ):
        write_status(run, before)
        (tmp_path / "asked").write_text("")
        bash(text, tmp_path, **commands, **more)
        assert "requeue" not in (tmp_path / "asked").read_text()


def write_status(folder: Path, values: dict) -> None:
    """As trainer/status.py writes it: a line for each key."""
    shown = {None: "null"}
    lines = [
        f' "{key}": ' + (f'"{value}"' if isinstance(value, str) else str(shown.get(value, value)))
        for key, value in values.items()
    ]
    (folder / "status.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


def test_a_chain_goes_on_with_the_next_job_at_its_limit_alone(tmp_path):
    for reason, code, requeued in (("SIGUSR1", 0, False), ("SIGTERM", 0, True)):
        write_status(tmp_path, {"state": "stopped", "code": 75, "reason": reason, "updated": 2})
        commands = {
            "srun": f"cp {tmp_path}/status.json {tmp_path}/run/status.json; exit 75",
            "scontrol": f'echo "$@" >> {tmp_path}/asked; echo localhost',
            "sleep": "exit 0",
        }
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run" / "status.json").unlink(missing_ok=True)
        (tmp_path / "asked").write_text("")
        done = bash(script(job(str(tmp_path / "run"), chain=2)), tmp_path, **commands)
        assert done.returncode == code
        assert ("requeue 41007" in (tmp_path / "asked").read_text()) == requeued


def test_starts_that_get_nowhere_end(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    commands = {
        "srun": "exit 143",
        "scontrol": f'echo "$@" >> {tmp_path}/asked; echo localhost',
        "sleep": "exit 0",
    }
    for _ in range(5):
        done = bash(script(job(str(run))), tmp_path, **commands)
    assert (tmp_path / "asked").read_text().count("requeue") == 3
    assert "no start came as far as training" in done.stdout


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
    assert problems(submitted(**BAD[message]), 1) == [message]


def test_a_sound_job_is_not_refused():
    cluster = ClusterConfig(nodes=2, gpus_per_node=8, options=["--qos=high", "-x n3"])
    assert problems(submitted(cluster=cluster, batch_size=32), 16) == []


LACKS = {
    "cluster.partition=gpus does not exist; it is one of cpu, gpu; did you mean gpu?": {
        "partition": "gpus"
    },
    "cluster.gpus_per_node=1 is more than a host of partition cpu has, 0 gpus; ask for less, or "
    "choose another cluster.partition": {"gpus_per_node": 1},
    "cluster.gpus_per_node=16 is more than a host of partition gpu has, 8 gpus; ask for less, or "
    "choose another cluster.partition": {"gpus_per_node": 16, "partition": "gpu"},
    "cluster.hours=72 is more than partition gpu allows; set cluster.hours=48 or less, and "
    "cluster.chain for a longer run": {"hours": 72.0, "partition": "gpu"},
    "cluster.cpus_per_rank=9 for 2 ranks is more than a host of partition cpu has, 16 cores; ask "
    "for less, or choose another cluster.partition": {"cpus_per_rank": 9, "ranks_per_node": 2},
    "cluster.nodes=3 is more than the 2 such hosts of partition gpu": {
        "nodes": 3,
        "gpus_per_node": 8,
        "partition": "gpu",
    },
}


@pytest.mark.parametrize("message", LACKS)
def test_what_the_cluster_does_not_have(message):
    assert slurm.problems(ClusterConfig(**LACKS[message]), THERE) == [message]


def test_what_the_cluster_has():
    assert slurm.problems(ClusterConfig(nodes=5, gpus_per_node=4, partition="gpu"), THERE) == []
    assert slurm.problems(ClusterConfig(nodes=4, cpus_per_rank=8, ranks_per_node=2), THERE) == []
    assert slurm.problems(ClusterConfig(nodes=99), [replace(THERE[0], default=False)]) == []


def test_kinds_of_hosts_as_sinfo_tells_them(monkeypatch):
    told = (
        "cpu*|1-00:00:00|4|(null)|16\n"
        "gpu|infinite|2|gpu:a100:6(S:0-1),gpu:h100:2,shard:8|64+\n"
        "short|30:00|1|gpu:2(S:0)|8\n"
    )
    monkeypatch.setattr(slurm, "_command", lambda *command: told)
    assert slurm.hosts() == [
        Hosts("cpu", True, 1440, 4, 0, 16),
        Hosts("gpu", False, float("inf"), 2, 8, 64),
        Hosts("short", False, 30, 1, 2, 8),
    ]


def test_points_that_cannot_be_one_array():
    first, second = (
        Point(TrainConfig(run_dir=f"/runs/{name}"), ClusterConfig(), []) for name in "ab"
    )
    for points, message in (
        ([first, replace(second, cluster=ClusterConfig(nodes=2))], "cluster.* differs"),
        ([first, first], "would be the folder of several points"),
        ([replace(p, cluster=ClusterConfig(chain=2)) for p in (first, second)], "cluster.chain=2"),
    ):
        with pytest.raises(slurm.ConfigError) as raised:
            slurm.submit(points)
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
        "3 problems w", "- precision=", "- cluster.ho", "- batch_size",
    ]  # fmt: skip
    assert not (tmp_path / "run").exists()


def test_data_that_are_not_there_and_a_run_that_is_another(door, tmp_path):
    code, _, said = door("run_dir=run", "data.path=none.txt", "--dry-run")
    assert code == 2
    assert "data.path=none.txt" in said
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
        schema.register("now")
        config = schema.load("train", compose("train", trainer["args"]))
    assert problems(config, trainer["numNodes"] * trainer["numProcPerNode"]) == []


def test_the_example_by_hand_saves_and_is_queued_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SLURM_JOB_NAME", "run")
    (tmp_path / "run.json").write_text('{\n "state": "stopped",\n "step": 5\n}\n')
    text = (ROOT / "docs" / "train.sbatch").read_text().replace("runs/$SLURM", "$SLURM")
    commands = {
        "srun": 'mkdir -p run; cp run.json run/status.json; echo "${@: -2}"; exit 75',
        "scontrol": f'echo "$@" >> {tmp_path}/asked',
        "sleep": "exit 0",
    }
    done = bash(text, tmp_path, **commands)
    assert done.stdout.split()[-2:] == ["rank", "run_dir=run"]
    assert (tmp_path / "asked").read_text() == "requeue 41007\n"
