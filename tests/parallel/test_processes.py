"""Real runs whose ranks or launcher are killed or stopped; a restarted run is identical."""

import os
import signal
import socket

import pytest
from launched import Launched, alive, ranks_of, until

from trainer.checkpoint.folder import checkpoint_path

ENDLESS = ("steps=100000", "checkpoint.every=0")


@pytest.fixture
def run(tmp_path):
    return Launched(tmp_path)


def test_a_killed_rank_is_restarted_and_the_run_is_the_same(run, tmp_path_factory):
    steps = ("steps=50", "checkpoint.every=20")
    process = run.start(*steps, torchrun=["--nproc_per_node=2", "--max-restarts=1"])
    until(checkpoint_path(run.run_dir, 20).exists, process)  # whole, while steps go on
    os.kill(ranks_of(process.pid)[1], signal.SIGKILL)
    _, said = process.communicate(timeout=240)
    assert process.returncode == 0, said
    assert said.count("rank 1 is gone") == 1 + said.count("restart 1 of 1, from step 20: rank 1 is")
    assert "restart 1 of 1, from step 20: rank 1 is gone" in said
    assert "RuntimeError" not in said  # what the survivor's collective made of it
    assert (run.status()["state"], run.status()["step"]) == ("finished", 50)
    whole = Launched(tmp_path_factory.mktemp("whole"))
    assert whole.start(*steps, "strategy=single").wait() == 0
    assert [line["step"] for line in run.lines()] == list(range(1, 51))
    assert run.losses() == pytest.approx(whole.losses(), rel=1e-12)


def test_ranks_end_with_their_launcher_and_the_folder_is_free(run):
    process = run.start(*ENDLESS, "launch.ranks=2")
    run.wait_for_step(3, process)
    ranks = ranks_of(process.pid)
    assert len(ranks) == 2
    process.kill()
    process.communicate()
    again = run.start("steps=5", "launch.ranks=2")  # at once: it waits for the ranks to end
    until(lambda: not any(map(alive, ranks)))
    _, said = again.communicate(timeout=240)
    assert again.returncode == 0, said
    assert f"the lock of a run that has died is taken over (pid {process.pid} on" in said
    assert run.status()["state"] == "finished"
    assert [line["step"] for line in run.lines()] == [1, 2, 3, 4, 5]


def test_a_stopped_rank_ends_the_run_with_its_name(run):
    process = run.start(*ENDLESS, "launch.ranks=2", "timeout_seconds=8")
    run.wait_for_step(3, process)
    second = run.start(*ENDLESS, "launch.ranks=2")
    _, refused = second.communicate(timeout=240)
    assert second.returncode == 2
    assert f"is in use by another run (pid {process.pid} on {socket.gethostname()}" in refused
    victim = ranks_of(process.pid)[1]
    os.kill(victim, signal.SIGSTOP)
    _, said = process.communicate(timeout=240)
    assert process.returncode == 77
    assert not alive(victim)
    assert said.count("rank 1 silent for 8 s") == 1
    assert "rank 0: waiting in gloo:all_reduce #" in said
    assert "Traceback" not in said
    status = run.status()
    assert (status["state"], status["rank"], status["code"]) == ("failed", 1, 77)
    assert status["reason"].startswith("rank 1 silent for 8 s")


def test_a_launcher_hands_a_signal_on(run):
    process = run.start(*ENDLESS, "launch.ranks=2")
    run.wait_for_step(3, process)
    process.send_signal(signal.SIGUSR1)
    _, said = process.communicate(timeout=240)
    assert process.returncode == 75, said
    status = run.status()
    assert (status["state"], status["reason"], status["code"]) == ("stopped", "SIGUSR1", 75)
    assert status["checkpoint"] == status["step"] == run.lines()[-1]["step"]
    assert "Traceback" not in said
    assert f"the same command goes on from step {status['step']}" in said
