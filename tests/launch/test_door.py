"""The doors as a user meets them: one configuration for all ranks, one message for a mistake."""

import json
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hydra.core.override_parser.overrides_parser import OverridesParser

from conf import schema
from conf.schema import SCHEMAS
from conf.validation.validate import find_problems
from launch.cli.entrypoint import Command, has_own_name, quote_value, run_command
from parallel.errors import ConfigError
from parallel.runtime import JobQueue, process_group
from parallel.strategy import resolve_degrees
from trainer.run.free_text import unescape_text

ROOT = Path(__file__).parents[2]
SCRIPT = """
from launch.cli.entrypoint import Command, run_command
from test_door import check, work

if __name__ == "__main__":
    run_command(Command("train", check, work))
"""


# What the doors below run, on ranks that are processes of their own.


def check(config, world_size, held):
    found = find_problems(config, world_size)
    if found:
        raise ConfigError(*found)
    config.strategy = resolve_degrees(config.strategy, world_size)
    return config


def work(config, runtime):
    total = torch.ones(())
    dist.all_reduce(total)
    seen = asdict(config) | {"total": total.item(), "world_size": runtime.world_size}
    Path(f"seed{config.seed}-rank{runtime.rank}.json").write_text(json.dumps(seen))
    dist.barrier()  # all have written: a rank that fails ends the others
    if config.seed == 1:
        raise ConfigError("seed=1 is unlucky; set seed=2")
    if config.seed == 2 and runtime.rank == 1:
        raise RuntimeError("a bug")
    if config.seed == 3:
        time.sleep(600)
    dist.barrier()


@pytest.fixture
def run(tmp_path):
    (tmp_path / "door.py").write_text(SCRIPT)
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests/launch", ROOT / "tests/helpers")))
    here = {"cwd": tmp_path, "env": os.environ | {"PYTHONPATH": paths}}

    def start(*arguments, ranks=0, **options):
        torchrun = ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}"] if ranks else []
        command = [sys.executable, *torchrun, "door.py", *arguments]
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **here, **options
        )

    def finish(*arguments, ranks=0):
        process = start(*arguments, ranks=ranks)
        try:
            out, error = process.communicate(timeout=240)  # no rank waits for one that left
        finally:
            process.terminate()  # torchrun takes its ranks with it
        return process.returncode, out, error

    finish.start = start
    return finish


def seen(tmp_path, seed, ranks):
    files = [tmp_path / f"seed{seed}-rank{rank}.json" for rank in range(ranks)]
    return [json.loads(file.read_text()) for file in files]


def test_torchrun_sweep_gives_every_rank_the_same_config(run, tmp_path):
    code, _, error = run("-m", "strategy=fsdp", "seed=0,5", ranks=2)
    assert code == 0, error
    for seed in (0, 5):
        first, second = seen(tmp_path, seed, 2)
        assert first == second
        assert first["total"] == 2
        assert first["strategy"]["shard"] == 2
        assert Path(first["run_dir"]).name == f"seed={seed}"


def test_the_door_starts_ranks_where_torchrun_did_not(run, tmp_path):
    code, _, error = run("launch.ranks=2", "seed=1")
    first, second = seen(tmp_path, 1, 2)
    assert first == second
    assert first["total"] == 2
    assert (code, error.strip()) == (2, "seed=1 is unlucky; set seed=2")


def test_a_bug_on_one_rank_shows_its_trace_once(run):
    code, _, error = run("seed=2", ranks=2)
    assert code == 1
    assert error.count("RuntimeError: a bug") == 2  # and once more at torchrun's end
    assert "RuntimeError: a bug" in error.splitlines()[-2]


def test_a_bad_override_under_torchrun_is_said_first_and_last(run, tmp_path):
    code, _, error = run("optm.lr=1", "steps=0.5", ranks=3)
    assert code == 1
    message = "optm.lr does not exist; did you mean optim.lr?"
    assert error.count(message) == 2
    lines = error.splitlines()
    assert lines[0] == message and lines[-2].endswith(f": {message}")
    ours = [line for line in error.splitlines() if "launch/cli/entrypoint.py" in line]
    assert ours == []  # torchrun shows its own trace, none of it ours
    assert sorted(path.name for path in tmp_path.iterdir()) == ["door.py"]


def test_a_sweep_without_torchrun_goes_on_after_a_mistake(run, tmp_path):
    code, _, error = run("-m", "seed=1,0")
    assert code == 2
    assert error.count("seed=1 is unlucky") == 1
    assert "Traceback" not in error
    assert seen(tmp_path, 0, 1)[0]["total"] == 1


def test_an_interrupt_ends_every_rank(run, tmp_path):
    process = run.start("launch.ranks=2", "seed=3", start_new_session=True)
    wanted = [tmp_path / f"seed3-rank{rank}.json" for rank in range(2)]
    while not all(path.exists() for path in wanted):
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=240)
    assert process.returncode == 130
    assert "Traceback" not in error
    with pytest.raises(ProcessLookupError):
        for _ in range(1200):
            os.killpg(process.pid, 0)  # asks whether the group has a process left
            time.sleep(0.1)


QUESTIONS = [(door, ["--help"]) for door in SCHEMAS] + [("train", ["--cfg", "job"])]


@pytest.mark.parametrize(("door", "question"), QUESTIONS)
def test_questions_are_answered_at_once(door, question, tmp_path):
    name, words = ("plan", ["calibrate"]) if door == "calibrate" else (door, [])
    script = ROOT / "launch" / f"{name}.py"
    asked = [str(script), *words, *question]
    code = (
        f"import runpy, sys\nsys.argv = {asked!r}\n"
        f"try: runpy.run_path({str(script)!r}, run_name='__main__')\n"
        "except SystemExit as stop: assert not stop.code\n"
        "assert 'hydra' in sys.modules\n"
        "assert not sys.modules.keys() & {'torch', 'numpy', 'tokenizers'}, 'slow'"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"kind[=:] ?text|shard[=:] ?1|device[=:] ?cpu", done.stdout)
    assert list(tmp_path.iterdir()) == []


def test_help_tells_what_a_key_means(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", "--help", "optim.lr=0.5"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(ROOT / "launch" / "train.py"), run_name="__main__")
    text = " ".join(capsys.readouterr().out.split())
    assert "optim.lr=0.5 Peak learning rate [above 0]" in text
    assert "bucket_mib=25.0 DDP: gradients per all-reduce [MiB, above 0]" in text
    assert "checkpoint.keep=2 Newest checkpoints kept [at least 0; 0 = all]" in text
    assert "model.pool=mean What the classifier reads [class_token | mean]" in text
    assert "| skip = leave it out and log it]" in text
    assert "compress.match=[] Pairs of (student, teacher) blocks" in text
    assert "after the teacher's block 3 [empty = off]" in text
    assert "strategy auto context ddp fsdp hsdp hybrid pipeline single" in text


MISTAKES = {
    "optm.lr=1": "optm.lr does not exist; did you mean optim.lr?",
    "lr=1": "lr does not exist; did you mean optim.lr?",
    "modle=gpt2": "modle does not exist; did you mean model?",
    "strategy=dpp": "strategy=dpp does not exist; strategy is one of auto, context, ddp, fsdp, "
    "hsdp, hybrid, pipeline, single, tensor; did you mean strategy=ddp?",
    "strategy=5": "a group's option is a name; --help lists them",
    "steps=abc": "steps=abc must be a whole number",
    "steps=null": "steps=null must be a whole number",
    "optim.lr=fast": "optim.lr=fast must be a number",
    "optim.betas=3": "optim.betas=3 must be a list of numbers, e.g. [0.9,0.95]",
    "compile=maybe": "compile=maybe must be true or false",
    "loss=1": "loss=1: loss is a section; set its keys: loss.label_smoothing, "
    "loss.box_weight, loss.chunks",
    "optim.lr=[1": "cannot read optim.lr=[1: no viable alternative at input '[1'; "
    "write KEY=VALUE, quoted for the shell",
    "+steps=1": "steps exists; write steps=VALUE without +",
    "+optim.foo=1": "optim.foo does not exist; remove +optim.foo",
    "+experiment=images": "experiment is set twice; write experiment=OPTION once",
    "~optim.lr": "~optim.lr: a key cannot be taken away; set it",
    "launch.ranks=3": "batch_size=16 is not divisible by the 3 ranks that see different samples "
    "(strategy.replicate × strategy.shard); try 15 or 18",
    "optim.lr=${nowhere}": "Interpolation key 'nowhere' not found",
    f"seed={10**20}": f"seed={10**20} must be at most 9223372036854775807",
    "optim.lr=nan": "optim.lr=nan must be above 0",
}


@pytest.mark.parametrize("override", MISTAKES)
def test_a_mistake_is_one_sentence(override, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["door.py", "batch_size=16", override])
    with pytest.raises(SystemExit) as stop:
        run_command(Command("train", check))
    assert stop.value.code == 2
    assert capsys.readouterr().err.strip() == MISTAKES[override]


def test_several_problems_are_a_list(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["door.py", "steps=0", "precision=fp31"])
    with pytest.raises(SystemExit):
        run_command(Command("train", check))
    lines = capsys.readouterr().err.splitlines()
    assert [line[:2] for line in lines] == ["2 ", "- ", "- "]


def test_a_bug_keeps_its_trace(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["door.py"])
    with pytest.raises(SystemExit) as stop:
        run_command(Command("train", broken))
    assert stop.value.code == 1
    assert "Traceback" in capsys.readouterr().err


ALONE = []


def broken(*args):
    return 1 / 0


def walk(config):
    ALONE.append(config)


@pytest.mark.parametrize(("overrides", "walks"), [(["steps=1"], True), (["strategy=ddp"], False)])
def test_verify_walks_where_no_layout_is_asked_for(monkeypatch, capsys, overrides, walks):
    monkeypatch.setattr(sys, "argv", ["door.py", *overrides])
    ALONE.clear()
    with pytest.raises(SystemExit):
        run_command(Command("verify", check, broken, run_in_process=walk))
    assert bool(ALONE) == walks
    assert ("ZeroDivisionError" in capsys.readouterr().err) != walks


def test_ranks_follow_what_rank_0_posts():
    store = dist.HashStore()
    first, second = JobQueue(store, 0, 2), JobQueue(store, 1, 2)
    got = []
    thread = threading.Thread(target=lambda: got.extend([next(jobs), next(jobs)]))
    jobs = second.receive_jobs()
    thread.start()
    first.post_job({"lr": 0.1 + 0.2})
    first.post_job({"stop": 0})
    thread.join(60)
    assert got == [{"lr": 0.1 + 0.2}, {"stop": 0}]


def test_a_restart_keeps_the_start_time_and_forgets_the_jobs():
    store = dist.HashStore()
    before, after = JobQueue(store, 0, 1, restart="0"), JobQueue(store, 0, 1, restart="1")
    before.post_job("old")
    assert not after.store.check(["job1"])
    after.post_job("new")
    assert before.launch_time(1.5) == after.launch_time(2.5) == 1.5
    assert next(JobQueue(store, 1, 1, restart="1").receive_jobs()) == "new"


def test_only_the_first_rank_tells_an_error():
    store = dist.HashStore()
    assert [JobQueue(store, rank, 2).is_first("error") for rank in (1, 0)] == [True, False]


def test_one_process_is_a_group_of_one():
    for _ in range(2):  # a second group, as in a sweep
        with process_group("cpu", JobQueue.single_process()) as runtime:
            assert (runtime.rank, runtime.world_size) == (0, 1)
            assert dist.get_world_size() == 1
        assert not dist.is_initialized()


def test_cuda_without_a_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with (
        pytest.raises(ConfigError, match="there is no CUDA device"),
        process_group("cuda", JobQueue.single_process()),
    ):
        pass


def test_more_ranks_than_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    three = JobQueue(dist.HashStore(), 0, 3)
    with (
        pytest.raises(ConfigError, match="3 ranks on this host, but it has 2 GPUs; start 2 ranks"),
        process_group("auto", three),
    ):
        pass


def test_cuda_is_refused_before_anything_is_prepared(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["door.py", "device=cuda"])
    with pytest.raises(SystemExit) as stop:
        run_command(Command("train", broken))
    assert stop.value.code == 2
    assert "there is no CUDA device here; set device=cpu" in capsys.readouterr().err


TEXTS = [
    "To be, or not: (that) is [the] 'question'",
    'what\'s "x"=5?',
    "a\\b",
    "end\\",
    'q"\\"',
    "5",
    "cost ${price}",
    "${",
    "???",
    "'a' and 'b'",
    '"a" and "b"',
    "runs/lr/optim.lr=0.01",
    " spaces ",
    "a,b={c: d}[0]~!@#$%^&*()+|<>?;`",
    "null",
    "line\nbreak\ttab",
    "🙂 é 日本",
    "text-as-hex:41",
    "\\${x}\\",
    "a\\\n",
]


@pytest.mark.parametrize("text", TEXTS)
def test_a_prompt_may_hold_anything(text):
    (override,) = OverridesParser.create().parse_overrides(
        [quote_value(f"prompt={text}", ["prompt"])]
    )
    assert unescape_text(override.value()) == text


def test_only_free_text_is_quoted():
    keys = schema.free_text("train") | schema.free_text("generate")
    for word in (
        "optim.betas=[0.9,0.95]",
        'prompt="in quotes already"',
        "--help",
        "model=gpt2",
        "prompt=",
        "compress=[merge,int8]",
    ):
        assert quote_value(word, keys) == word
    assert {"run_dir", "init_from", "compress.teacher", "prompt", "data.path"} <= keys
    assert not {"steps", "optim.lr", "data.fields"} & keys
    assert quote_value("++run_dir=a=b", keys) == '++run_dir="a=b"'
    for words, named in (([], True), (["run_dir=x"], False), (["++run_dir=x"], False)):
        assert has_own_name(words) == named


def test_a_port_in_use_is_one_line(monkeypatch, capsys):
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = str(busy.getsockname()[1])
        for name, value in {
            "RANK": "0",
            "WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "argv", ["door.py"])
        with pytest.raises(SystemExit) as stop:
            run_command(Command("train", broken))
    assert stop.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "MASTER_PORT" in line]
    assert len(lines) == 1
    assert f"MASTER_PORT={port} cannot be used" in lines[0]
    assert "choose a free port" in lines[0]


def test_a_thread_that_does_not_end_holds_no_process():
    code = (
        "import threading, time; from launch.cli import entrypoint as door\n"
        "door.EXIT_SECONDS = 0.5\n"
        "threading.Thread(target=time.sleep, args=[600]).start()\n"
        "door.exit_process(75)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=240
    )
    assert done.returncode == 75
