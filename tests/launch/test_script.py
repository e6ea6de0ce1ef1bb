"""The batch script as text, and as bash runs it with stand-ins for the commands of Slurm."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest
from launched import ROOT

from conf.submit import ClusterConfig
from launch.slurm.batch_script import Job, SlurmRun, batch_script, job_name, time_limit
from trainer.config.train import TrainConfig


def job(*runs: str, overrides: tuple[str, ...] = ("strategy=fsdp",), **cluster) -> Job:
    points = [
        SlurmRun(TrainConfig(run_dir=run), ClusterConfig(**cluster), list(overrides))
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
        ["bash", str(tmp_path / "job.sbatch")],
        env=os.environ | given,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_options_of_a_job():
    text = batch_script(
        job(
            nodes=2,
            gpus_per_node=8,
            cpus_per_rank=12,
            partition="gpu",
            account="me",
            options=["--qos=high"],
            chain=3,
        )
    )
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
    assert "--gres" not in options(
        batch_script(job(gpus_per_node=2, options=["--gpus-per-node=a100:2"]))
    )
    assert "--gres" not in options(batch_script(job()))
    assert "--time" not in options(batch_script(job(hours=0.0)))
    assert "--no-requeue" in options(batch_script(job(requeue=False)))
    assert options(batch_script(job("/r/100% sure")))["--output"] == "/r/100%% sure/slurm-%j.out"


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
        "#!/bin/bash\nfor name in RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_PORT LOADED "
        'TORCHELASTIC_RUN_ID TORCHELASTIC_RESTART_COUNT; do echo "$name=${!name}"; done\n'
        'printf "<%s>\\n" "$@"\n'
    )
    show.chmod(0o755)
    text = batch_script(
        job(
            str(run),
            overrides=("strategy=ddp", data),
            ranks_per_node=4,
            cpus_per_rank=3,
            setup=["export LOADED=cuda"],
            wrap=str(show),
            srun_options=["--container-image=a b"],
        )
    )
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
    text = batch_script(job(*runs, parallel=1))
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
    done = bash(batch_script(job(str(run))), tmp_path, **commands)
    asked = (tmp_path / "asked").read_text()
    assert ("requeue 41007" in asked) == bool(again), done.stdout
    assert again in done.stdout
    if not again:
        assert done.returncode == code
    # One that was cancelled, or belongs to a chain, or may not, is not.
    for text, more in (
        (batch_script(job(str(run))), {"squeue": "echo COMPLETING"}),
        (batch_script(job(str(run), requeue=False)), {}),
    ):
        write_status(run, before)
        (tmp_path / "asked").write_text("")
        bash(text, tmp_path, **commands, **more)
        assert "requeue" not in (tmp_path / "asked").read_text()


def write_status(folder: Path, values: dict) -> None:
    """Return a status file as trainer/run/status.py writes it: a line for each key."""
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
        done = bash(batch_script(job(str(tmp_path / "run"), chain=2)), tmp_path, **commands)
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
        done = bash(batch_script(job(str(run))), tmp_path, **commands)
    assert (tmp_path / "asked").read_text().count("requeue") == 3
    assert "no start came as far as training" in done.stdout


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
