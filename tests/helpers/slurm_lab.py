"""A Slurm of several hosts on this one: a controller and a daemon for each host, in one folder.

python tests/helpers/slurm_lab.py FOLDER [HOSTS]    until Ctrl-C; then:
export SLURM_CONF=FOLDER/slurm.conf
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

PACKAGES = ("slurm-wlm", "munge")
COMMANDS = ("slurmctld", "slurmd", "munged", "sbatch")
CONF = """\
ClusterName=lab
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
FirstJobId={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,sched_min_interval=100000,batch_sched_delay=0
SlurmdParameters=config_overrides
SwitchType=switch/none
MpiDefault=none
MailProg=/bin/true
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=1
KillWait=30
MinJobAge=3600
SlurmctldTimeout=30
SlurmdTimeout=60
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
PartitionName=batch Nodes=ALL Default=YES MaxTime=7-00:00:00 PriorityTier=1 PreemptMode=REQUEUE \
GraceTime=60
PartitionName=urgent Nodes=ALL PriorityTier=10 PreemptMode=OFF
"""
NODE = "NodeName=n{number} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=4 Gres=gpu:2\n"


def missing() -> str:
    """Why no lab can be started here, installing what it takes if need be; empty = it can."""
    if os.geteuid():
        return "a Slurm of one's own takes root"
    if all(map(shutil.which, COMMANDS)):
        return ""
    if not shutil.which("apt-get"):
        return f"there is no {' or '.join(COMMANDS)}, and no apt-get to install them"
    options = ["-qq", "-o", "DPkg::Lock::Timeout=120", "-o", "Acquire::Retries=0"]
    install = ["install", "-y", "--no-install-recommends", *PACKAGES]
    for command in (["update"], install):
        subprocess.run(
            ["apt-get", *options, *command],
            capture_output=True,
            check=False,
            env=os.environ | {"DEBIAN_FRONTEND": "noninteractive"},
        )
    gone = [command for command in COMMANDS if not shutil.which(command)]
    return f"{', '.join(gone)} could not be installed ({' '.join(PACKAGES)})" if gone else ""


class Lab:
    """A running Slurm; its commands work while `conf` is in the environment as SLURM_CONF."""

    def __init__(self, folder: Path, hosts: int = 2):
        self.folder, self.hosts = folder.resolve(), hosts
        self.conf = self.folder / "slurm.conf"

    def start(self) -> None:
        """Starts all daemons and returns when the hosts are idle."""
        (self.folder / "state").mkdir(parents=True)
        host, ports = socket.gethostname().split(".")[0], _free_ports(self.hosts + 1)
        text = CONF.format(host=host, folder=self.folder, port=ports[0])
        nodes = [
            NODE.format(number=i + 1, host=host, port=port) for i, port in enumerate(ports[1:])
        ]
        self.conf.write_text(text.replace("PartitionName", "".join(nodes) + "PartitionName", 1))
        # Counted only: no job of a test touches a GPU.
        (self.folder / "gres.conf").write_text("Name=gpu File=/dev/null,/dev/zero\n")
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        files = {name: f"{self.folder}/munge.{name}" for name in ("socket", "log", "seed")}
        # It is strict about who owns the folders above; --force makes warnings of that.
        _quietly(
            "munged",
            "--force",
            f"--key-file={key}",
            f"--socket={files['socket']}",
            f"--log-file={files['log']}",
            f"--seed-file={files['seed']}",
            f"--pid-file={self.folder}/munged.pid",
        )
        _quietly("slurmctld", "-c", "-f", str(self.conf))
        for i in range(self.hosts):
            (self.folder / f"spool-n{i + 1}").mkdir()
            _quietly("slurmd", "-N", f"n{i + 1}", "-f", str(self.conf))
        deadline = time.monotonic() + 240
        while self.ask("sinfo", "-h", "-p", "batch", "-N", "-t", "idle", "-o", "%N").count("n") < (
            self.hosts
        ):
            assert time.monotonic() < deadline, (self.folder / "slurmctld.log").read_text()
            time.sleep(0.1)

    def ask(self, *command: str) -> str:
        """What one of Slurm's commands says."""
        done = subprocess.run(
            command,
            env=os.environ | {"SLURM_CONF": str(self.conf)},
            capture_output=True,
            text=True,
            check=False,
        )
        return done.stdout

    def stop(self) -> None:
        """Ends all jobs and daemons that this lab started."""
        self.ask("scancel", "--me")
        deadline = time.monotonic() + 240
        while self.ask("squeue", "-h") and time.monotonic() < deadline:
            time.sleep(0.2)
        daemons = [f"slurmd-n{i + 1}" for i in range(self.hosts)]
        for name in [*daemons, "slurmctld", "munged"]:
            _end(self.folder / f"{name}.pid")


def _quietly(*command: str) -> None:
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)


def _end(file: Path) -> None:
    if not file.exists():
        return
    pid = int(file.read_text())
    for number in (signal.SIGTERM, signal.SIGKILL):
        for _ in range(100):
            try:
                os.kill(pid, number if _ == 0 else 0)
            except ProcessLookupError:
                return
            time.sleep(0.1)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


if __name__ == "__main__":
    lab = Lab(Path(sys.argv[1]), int((*sys.argv[2:], "2")[0]))
    sys.exit(missing()) if missing() else lab.start()
    sys.stdout.write(f"export SLURM_CONF={lab.conf}\n")
    sys.stdout.flush()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.default_int_handler)
    try:
        signal.pause()
    except KeyboardInterrupt:
        lab.stop()
