"""Several hosts: network namespaces with names and addresses of their own, joined by a cable.

To make them takes root and `ip`; elsewhere these tests are skipped.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launched import ENVIRONMENT, Launched, until

HOSTS = {"hosta": "10.77.0.1", "hostb": "10.77.0.2"}
SHORT = "last_call_timeout=2,keep_alive_interval=1,keep_alive_max_attempt=3,heartbeat_timeout=5"
ELASTIC = (
    "--nnodes=1:2",
    "--nproc_per_node=1",
    "--max-restarts=9",
    "--rdzv-backend=c10d",
    "--rdzv-endpoint=hosta:29400",
    "--rdzv-id=one",
    f"--rdzv-conf={SHORT}",
)
ENDLESS = (
    "steps=100000",
    "checkpoint.every=50",
    "checkpoint.keep=3",
    "timeout_seconds=10",
    "optim.schedule=constant",
    "optim.warmup_steps=5",
    "optim.lr=1e-4",
)
TWO = ("strategy=ddp", "strategy.replicate=2", "strategy.elastic=true")


class Lab:
    """Two hosts and what runs on them."""

    def __init__(self, folder: Path):
        self._folder, self._started = folder, []
        self._names = {host: f"samestep-{host}-{os.getpid()}" for host in HOSTS}

    def up(self) -> None:
        """Make the hosts and the cable between them; CalledProcessError if that is not allowed."""
        for name in self._names.values():
            _ip("netns", "add", name)
            _ip("-n", name, "link", "set", "lo", "up")
            known = "".join(f"{address} {other}\n" for other, address in HOSTS.items())
            hosts = Path("/etc/netns") / name / "hosts"
            hosts.parent.mkdir(parents=True, exist_ok=True)
            hosts.write_text(f"127.0.0.1 localhost\n{known}")
        a, b = self._names.values()
        _ip("link", "add", "eth0", "netns", a, "type", "veth", "peer", "name", "eth0", "netns", b)
        for host, name in self._names.items():
            _ip("-n", name, "addr", "add", f"{HOSTS[host]}/24", "dev", "eth0")
            _ip("-n", name, "link", "set", "eth0", "up")

    def start(self, host: str, command: list[str]) -> subprocess.Popen:
        """A command on one host; what it says is in a file named after the host."""
        named = ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', host, *command]
        with (self._folder / f"{host}.txt").open("a") as file:
            self._started.append(
                subprocess.Popen(
                    ["ip", "netns", "exec", self._names[host], *named],
                    stdout=file,
                    stderr=file,
                    env=os.environ | ENVIRONMENT | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
                )
            )
        return self._started[-1]

    def said(self, host: str) -> str:
        """What the commands of a host have said."""
        return (self._folder / f"{host}.txt").read_text()

    def kill(self, host: str) -> None:
        """The power is cut: every process of a host ends, and none says goodbye."""
        done = _ip("netns", "pids", self._names[host])
        for pid in done.split():
            os.kill(int(pid), signal.SIGKILL)

    def cable(self, state: str) -> None:
        """`down`: nothing passes, and no connection is told of it."""
        _ip("-n", self._names["hostb"], "link", "set", "eth0", state)

    def down(self) -> None:
        """No process, no host is left."""
        for host, name in self._names.items():
            if Path("/run/netns", name).exists():
                self.kill(host)
                _ip("netns", "del", name)
            shutil.rmtree(Path("/etc/netns") / name, ignore_errors=True)
        for process in self._started:
            process.wait()


def _ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


@pytest.fixture
def lab(tmp_path):
    if os.geteuid() or not all(map(shutil.which, ("ip", "unshare", "hostname"))):
        pytest.skip("hosts of one's own take root, ip, unshare and hostname")
    lab = Lab(tmp_path)
    try:
        lab.up()
    except (OSError, subprocess.CalledProcessError) as error:
        lab.down()
        pytest.skip(f"no network namespaces here: {error}")
    yield lab
    lab.down()


def as_one_process(run: Launched, folder: Path, *overrides: str) -> None:
    """Every step was taken once, with the loss that one process has there."""
    lines = run.lines()
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    alone = Launched(folder)
    steps = ("strategy=single", f"steps={len(lines)}", *ENDLESS[2:], *overrides)
    assert alone.start(*steps).wait() == 0
    assert run.losses() == pytest.approx(alone.losses(), rel=1e-6)


def test_two_hosts_with_a_fixed_place_each(lab, tmp_path, tmp_path_factory):
    run = Launched(tmp_path)
    words = ("steps=20", *ENDLESS[2:], "strategy=fsdp")
    processes = []
    for rank, host in enumerate(HOSTS):
        place = (f"--node-rank={rank}", "--master-addr=hosta", "--master-port=29500")
        torchrun = ["--nnodes=2", "--nproc_per_node=2", *place]
        processes.append(lab.start(host, run.command(*words, torchrun=torchrun)))
    assert [process.wait(240) for process in processes] == [0, 0], lab.said("hosta")
    as_one_process(run, tmp_path_factory.mktemp("alone"))


def on_two(run: Launched, lab: Lab) -> list[subprocess.Popen]:
    """The run, begun on both hosts and under way."""
    command = run.command(*ENDLESS, *TWO, torchrun=list(ELASTIC))
    processes = [lab.start(host, command) for host in HOSTS]
    run.wait_for_step(60, processes[0])
    assert run.status()["step"] >= 0
    return processes


def world(run: Launched) -> int:
    """Copies of the model that the run has now."""
    text = (run.run_dir / "config.yaml").read_text()
    return int(text.split("replicate: ")[1].split("\n")[0])


def ended(run: Launched, process: subprocess.Popen) -> None:
    process.send_signal(signal.SIGTERM)
    process.wait(240)
    assert run.status()["state"] == "stopped"


def test_a_host_is_lost_and_comes_back(lab, tmp_path, tmp_path_factory, capsys):
    run = Launched(tmp_path)
    first, _ = on_two(run, lab)
    assert world(run) == 2
    before = run.lines()[-1]["step"]
    lost = time.monotonic()
    lab.kill("hostb")
    until(lambda: world(run) == 1 and run.lines()[-1]["step"] > before, first)
    alone = time.monotonic()
    back = lab.start("hostb", run.command(*ENDLESS, *TWO, torchrun=list(ELASTIC)))
    until(lambda: world(run) == 2, first)
    there = run.lines()[-1]["step"]
    until(lambda: run.lines()[-1]["step"] > there + 20, first)
    with capsys.disabled():
        now = time.monotonic()
        sys.stdout.write(
            f"\nhost lost: a step alone after {alone - lost:.0f} s; back: {now - alone:.0f} s"
        )
    for process in (first, back):
        process.send_signal(signal.SIGTERM)
    for process in (first, back):
        process.wait(240)
    assert run.status()["state"] == "stopped"
    as_one_process(run, tmp_path_factory.mktemp("alone"))


def test_a_cut_cable(lab, tmp_path, tmp_path_factory, capsys):
    run = Launched(tmp_path)
    first, _ = on_two(run, lab)
    before, cut = run.lines()[-1]["step"], time.monotonic()
    lab.cable("down")
    until(lambda: world(run) == 1 and run.lines()[-1]["step"] > before + 20, first)
    with capsys.disabled():
        sys.stdout.write(f"\ncable cut: a step alone after {time.monotonic() - cut:.0f} s")
    ended(run, first)
    as_one_process(run, tmp_path_factory.mktemp("alone"))
