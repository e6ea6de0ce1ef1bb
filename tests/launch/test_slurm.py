"""Jobs on a real Slurm of two hosts: whatever it does to a run, the loss curve is the unbroken one.

Skipped, with the reason, where Slurm cannot be started: it takes root, and two packages.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launched import ENVIRONMENT, PLAY, ROOT, SMALL, lines
from slurm_lab import Lab, missing

SUBMIT, TRAIN = (str(ROOT / "launch" / name) for name in ("submit.py", "train.py"))
JOB = ["cluster=slurm-cpu", "cluster.nodes=2", "cluster.hours=0.2", "cluster.signal_seconds=50"]
ENDLESS = "steps=1000000"


class Cluster:
    """The lab, a folder for runs, and what an unbroken run has for losses."""

    def __init__(self, lab: Lab, folder: Path):
        self.ask, self.folder = lab.ask, folder
        (folder / "play.txt").write_text(PLAY.read_text()[:30_000])
        data = [f"data.path={folder}/play.txt", f"data.cache={folder}/cache", "data=text"]
        # A step takes long enough that not thousands are done while Slurm makes up its mind.
        size = ["batch_size=64", "data.seq_len=64", "model.width=64"]
        # Losses that do not depend on where the run is to end, and make little of rounding.
        constant = ["optim.schedule=constant", "optim.warmup_steps=0", "optim.lr=1e-4"]
        self.run = [*SMALL, *data, *size, *constant, "checkpoint.every=5"]

    def call(self, *arguments: str) -> tuple[int, str]:
        """launch/submit.py as a user runs it; its exit status and all that it says."""
        done = subprocess.run(
            [sys.executable, SUBMIT, *arguments],
            capture_output=True,
            text=True,
            check=False,
            env=os.environ | ENVIRONMENT,
            cwd=self.folder,
        )
        return done.returncode, done.stdout + done.stderr

    def submit(self, name: str, *overrides: str) -> "Job":
        """A run that has been submitted, or submitted again."""
        code, said = self.call(*self.run, *JOB, f"run_dir={self.folder}/{name}", *overrides)
        assert code == 0, said
        return Job(self, self.folder / name)

    def queue(self) -> str:
        """The jobs that wait or run."""
        return self.ask("squeue", "-h", "-o", "%i %P %T %r %M")

    def check(self, run: Path) -> None:
        """The run has every step, and each time that it took one the unbroken run's loss."""
        reference, own = self.folder / "reference", lines(run)
        steps = max(line["step"] for line in own)
        if not lines(reference) or lines(reference)[-1]["step"] < steps:
            subprocess.run(
                [
                    sys.executable,
                    TRAIN,
                    *self.run,
                    f"steps={steps}",
                    f"run_dir={reference}",
                    "strategy=single",
                ],
                check=True,
                capture_output=True,
                env=os.environ | ENVIRONMENT,
            )
        losses = {line["step"]: line["loss"] for line in lines(reference)}
        assert {line["step"] for line in own} == set(range(1, steps + 1))
        for line in own:
            # Two ranks round otherwise than one, and training makes more of it with every step.
            assert line["loss"] == pytest.approx(losses[line["step"]], rel=1e-6), line


class Job:
    """What a run's jobs leave in its folder."""

    def __init__(self, cluster: Cluster, run: Path):
        self.cluster, self.run = cluster, run

    def status(self) -> dict:
        path = self.run / "status.json"
        return json.loads(path.read_text()) if path.exists() else {"state": "", "started": 0}

    def logs(self) -> list[Path]:
        return sorted(self.run.glob("slurm-*.out"), key=lambda log: int(log.stem.split("-")[1]))

    def said(self) -> str:
        return "".join(log.read_text() for log in self.logs())

    def number(self) -> str:
        return self.logs()[-1].stem.split("-")[1]

    def until(self, true, seconds: float = 300.0) -> None:
        deadline = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < deadline, "\n".join(
                [self.cluster.queue(), str(self.status()), self.said()]
            )
            time.sleep(0.1)

    def trains(self, since: float = 0.0) -> float:
        """Returns when a start later than `since` has saved; when it began."""

        def saves() -> bool:
            now = self.status()
            fresh = now["started"] > since and now["state"] == "running"
            return fresh and (now["checkpoint"] or 0) > now["from_step"]

        self.until(saves)
        return self.status()["started"]

    def ends(self) -> None:
        self.until(lambda: not self.cluster.queue())


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    if why := missing():
        pytest.skip(why)
    lab = Lab(tmp_path_factory.mktemp("lab"), hosts=3)
    before = os.environ.get("SLURM_CONF")
    os.environ["SLURM_CONF"] = str(lab.conf)
    try:
        lab.start()
        yield Cluster(lab, tmp_path_factory.mktemp("runs"))
    finally:
        lab.stop()
        os.environ.pop("SLURM_CONF")
        os.environ |= {"SLURM_CONF": before} if before else {}


LESS = (
    "Requested node configuration is not available; ask for less, or choose another "
    "cluster.partition"
)
LACKS = {
    "cluster.gpus_per_node=4": "cluster.gpus_per_node=4: sbatch says: " + LESS,
    "cluster.nodes=4": "cluster.nodes=4: sbatch says: " + LESS,
    "cluster.ranks_per_node=8": "cluster.ranks_per_node=8: sbatch says: " + LESS,
    "cluster.cpus_per_rank=5": "cluster.cpus_per_rank=5: sbatch says: " + LESS,
    "cluster.partition=urgnt": "cluster.partition=urgnt: sbatch says: Invalid partition name "
    "specified; it is one of batch, urgent; did you mean urgent?",
    "cluster.hours=169": "cluster.hours=169 is more than partition batch allows; set "
    "cluster.hours=168 or less, and cluster.chain for a longer run",
}


@pytest.mark.parametrize("wanted", LACKS)
def test_what_the_cluster_does_not_have_is_said_before_anything_is_submitted(cluster, wanted):
    run = cluster.folder / "refused"
    code, said = cluster.call(*cluster.run, *JOB, "device=auto", f"run_dir={run}", wanted)
    assert (code, said.strip()) == (2, LACKS[wanted])
    assert not cluster.queue()
    assert not run.exists()


def test_cancelled_and_gone_on_with_by_the_same_command(cluster):
    job = cluster.submit("cancelled", ENDLESS)
    job.trains()
    code, said = cluster.call("status", str(job.run))
    assert code == 0
    assert re.search(r"job \d+: RUNNING n\[\d-\d\], .* left\n.*cancelled: running at step", said)
    again = cluster.call(*cluster.run, *JOB, f"run_dir={job.run}", ENDLESS)
    assert again[0] == 2
    assert "has a job already" in again[1]
    assert cluster.call("cancel", str(job.run))[0] == 0
    job.ends()
    stopped = job.status()
    assert stopped["state"] == "stopped"
    assert stopped["checkpoint"] == stopped["step"] == lines(job.run)[-1]["step"]
    assert "Slurm has ended this job" in job.said()
    steps = stopped["step"] + 5
    cluster.submit("cancelled", f"steps={steps}")
    job.ends()
    assert job.status()["state"] == "finished", job.said()
    assert job.status()["from_step"] == stopped["step"]
    cluster.check(job.run)
    code, said = cluster.call("logs", str(job.run), "--lines=3")
    assert code == 0
    assert "the run is finished" in said


def test_limit_preemption_loss_of_a_rank_and_of_a_host(cluster):
    job = cluster.submit("tossed", ENDLESS)
    began = reach_the_limit(job, job.trains())
    began = preempt(job, began)
    began = kill_a_rank(job, began)
    lose_a_host(job, began)
    assert cluster.call("cancel", str(job.run))[0] == 0
    job.ends()
    assert len(re.findall(r"start \d\] on n", job.said())) >= 5
    cluster.check(job.run)


def reach_the_limit(job: Job, began: float) -> float:
    """The job's time is nearly up."""
    seconds = time.time() - began + 10
    limit = int(seconds // 60) + 1
    job.cluster.ask("scontrol", "update", f"JobId={job.number()}", f"TimeLimit={limit}")
    job.until(lambda: "stopped (SIGUSR1)" in job.said())
    assert "queued again" in job.said()
    job.cluster.ask("scontrol", "update", f"JobId={job.number()}", "TimeLimit=60")
    return job.trains(began)


def preempt(job: Job, began: float) -> float:
    """Another job of a partition that comes first wants all hosts."""
    before, now = lines(job.run)[-1]["step"], time.monotonic()
    urgent = ["-p", "urgent", "--exclusive", "-N", "3", "-o", "/dev/null", "--wrap", "true"]
    job.cluster.ask("sbatch", *urgent)
    job.until(lambda: "stopped (SIGTERM)" in job.said())
    stopped, at = time.monotonic(), job.status()["step"]
    assert at > before
    job.until(lambda: lines(job.run)[-1]["step"] > at)
    sys.stdout.write(
        f"preempted: {stopped - now:.1f} s until all was saved and the job in the queue again, "
        f"{time.monotonic() - now:.1f} s until the next step\n"
    )
    return job.trains(began)


def kill_a_rank(job: Job, began: float) -> float:
    """As the kernel does where memory runs out."""
    for folder in Path("/proc").iterdir():
        command = folder / "cmdline"
        ours = folder.name.isdigit() and f"run_dir={job.run}".encode() in read(command)
        if ours and b"\0RANK=1\0" in read(folder / "environ"):
            os.kill(int(folder.name), signal.SIGKILL)
    job.until(lambda: "a rank was lost: queued again" in job.said())
    return job.trains(began)


def read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def lose_a_host(job: Job, began: float) -> float:
    """One host of the job goes down, and another takes its place."""
    hosts = job.cluster.ask("squeue", "-h", "-j", job.number(), "-o", "%N").strip()
    lost = f"n{max(re.findall(r'[0-9]', hosts))}"
    job.cluster.ask("scontrol", "update", f"NodeName={lost}", "State=DOWN", "Reason=test")
    began = job.trains(began)
    assert job.cluster.ask("squeue", "-h", "-j", job.number(), "-o", "%N").strip() != hosts
    job.cluster.ask("scontrol", "update", f"NodeName={lost}", "State=RESUME")
    return began


def test_a_chain_ends_where_the_run_is_finished(cluster):
    job = cluster.submit("chained", "steps=60", "cluster.chain=3")
    job.trains()
    cluster.ask("scancel", "--signal=USR1", job.number())  # what its time limit would do
    job.ends()
    first, second, third = (log.read_text() for log in job.logs())
    assert "the next job goes on" in first
    assert "srun ended with 0, the run is finished" in second
    assert "already finished at step 60" in third
    assert job.status()["attempts"] == 1
    cluster.check(job.run)


def test_a_sweep_is_an_array(cluster):
    one = ["-m", *cluster.run, "cluster=slurm-cpu", "cluster.hours=0.2", "steps=4"]
    code, said = cluster.call(*one, "optim.lr=1e-3,3e-3", "optm.eps=1")
    assert (code, said.strip()) == (2, "optm.eps does not exist; did you mean optim.eps?")
    assert not cluster.queue()
    code, said = cluster.call(*one, "optim.lr=1e-4,3e-3", "cluster.parallel=1")
    assert code == 0, said
    (sweep,) = (cluster.folder / "runs").iterdir()
    job = Job(cluster, sweep)
    job.ends()
    points = sorted(path.parent for path in sweep.glob("*/config.yaml"))
    assert [Job(cluster, point).status()["state"] for point in points] == ["finished"] * 2
    cluster.check(points[0])  # of the rate that the unbroken run has
    code, said = cluster.call("status", str(sweep))
    assert said.count("finished at step 4 of 4") == 2
