"""Odd environments: torchrun's variables in part, consoles that know no é, texts of any kind."""

import os
import signal
import subprocess
import sys
from importlib import import_module
from operator import attrgetter
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from launched import Launched

from conf.schema import build_config, free_text, register_schemas
from launch.cli.entrypoint import quote_value, quoted_values
from launch.cli.preflight import prepare_training
from parallel.errors import ConfigError
from parallel.strategy import check_torchrun
from trainer.config.train import DataConfig, ModelConfig, TrainConfig
from trainer.run.free_text import unescape_text
from trainer.run.run_dir import claim_folder, load_config

ROOT = Path(__file__).parents[2]
PLAY = ROOT / "trainer/data/bundled/shakespeare/valid.txt"
WHOLE = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
BAD = [
    ({"RANK": "0"}, r"RANK=0 is set, but WORLD_SIZE, MASTER_ADDR, MASTER_PORT not.*unset RANK"),
    ({"RANK": ""}, r"RANK= is set, but RANK, WORLD_SIZE"),
    (WHOLE | {"MASTER_PORT": ""}, r"RANK=0 is set, but MASTER_PORT not"),
    (WHOLE | {"WORLD_SIZE": "two"}, r"WORLD_SIZE=two must be a whole number"),
    (WHOLE | {"RANK": "2"}, r"RANK=2 must be from 0 to WORLD_SIZE - 1 = 1"),
    (WHOLE | {"RANK": "-1"}, r"RANK=-1 must be from 0"),
    (WHOLE | {"MASTER_PORT": "99999"}, r"MASTER_PORT=99999 must be from 1 to 65535"),
    (WHOLE | {"LOCAL_RANK": "x"}, r"LOCAL_RANK=x must be a whole number"),
    (WHOLE | {"LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "2"}, r"LOCAL_RANK=3 must be from 0"),
]


@pytest.mark.parametrize("variables, message", BAD)
def test_torchruns_variables_in_part_are_one_line(variables, message):
    with pytest.raises(ConfigError, match=message):
        check_torchrun(variables)


def test_torchruns_variables_are_taken_or_left_alone():
    assert check_torchrun(WHOLE) and not check_torchrun({"WORLD_SIZE": "4", "MASTER_PORT": ""})


def command(door: str, *words: str | bytes, **variables: str) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k not in variables} | variables
    return subprocess.run(
        [sys.executable, str(ROOT / f"launch/{door}.py"), *words],
        env=environment,
        timeout=240,
        capture_output=True,
        check=False,
    )


@pytest.mark.parametrize(
    "variables",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    ],
)
def test_a_console_that_knows_ascii_alone(tmp_path, variables):
    for words in (
        ("--help",),
        (f"run_dir={tmp_path / 'é'}", "precision=fp31"),
        (f"data.path={tmp_path / '日本'}", "data=text"),
    ):
        done = command("train", *words, **variables)
        assert done.returncode in (0, 2) and b"Traceback" not in done.stderr, done.stderr


def test_bytes_that_are_no_text_and_a_lone_rank_are_one_line(tmp_path):
    done = command("generate", b"prompt=caf\xe9", f"run_dir={tmp_path}")
    assert done.returncode == 2 and done.stderr.count(b"\n") == 1
    assert b"holds bytes that are not UTF-8" in done.stderr
    done = command("train", RANK="0")
    assert done.returncode == 2 and done.stderr.startswith(b"RANK=0 is set, but WORLD_SIZE")
    assert done.stderr.count(b"\n") == 1


@pytest.mark.parametrize("text", ["${nowhere}", "a${b", "???", "x=y", "'q\"", "${oc.env:HOME}"])
def test_a_run_keeps_free_text_as_it_was_typed(tmp_path, text):
    folder = tmp_path / text
    folder.mkdir()
    (folder / "play.txt").write_text(PLAY.read_text()[:20_000])
    data = DataConfig(path=str(folder), vocab_size=300, seq_len=16, cache=str(tmp_path / "cache"))
    data.document_separator = text
    model = ModelConfig(layers=1, width=16, heads=2, ffn_width=16)
    config = prepare_training(TrainConfig(data=data, model=model, run_dir=str(tmp_path / "run")), 1)
    assert load_config(config.run_dir) == config
    assert load_config(config.run_dir).data.document_separator == text


def test_free_text_arrives_through_the_command_line(tmp_path):
    for text in ("runs/lr/optim.lr=0.01", "${x}", "???", "'a' and 'b'"):
        done = command("train", f"init_from={text}", "device=cpu", f"run_dir={tmp_path / 'r'}")
        assert done.returncode == 2
        assert f"init_from={Path.cwd() / text} holds no run" in done.stderr.decode(), text


PUNCTUATION = [
    *"!#%&*+-./:;<>@^_`|~",
    "=",
    ",",
    "'",
    '"',
    "()",
    "[]",
    "{}",
    "$",
    "${}",
    "${a}",
    "?",
    "???",
    "\\",
    " ",
    "\n",
    "null",
    "true",
    "1e3",
    "#",
    "é",
    "日本",
    "🙂",
    "a=b",
    "[1,2]",
    "{a: b}",
    'x"y',
    "\\${x}",
    "~",
    "%20",
    "--",
    "&&",
    "|| exit",
    "\t",
    "*.txt",
    "@package",
]


@pytest.mark.parametrize("door", ["train", "generate", "export"])
def test_every_key_for_text_takes_every_punctuation(door):
    """As many inputs as keys times texts: all keys of a door hold a text at once."""
    keys = sorted(free_text(door))
    assert len(keys) >= 5
    register_schemas("now")
    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
        for number, text in enumerate(PUNCTUATION):
            typed = f"a{text}b" if number % 2 else f"{text}c{text}d"
            words = [quote_value(f"{key}={typed}", keys) for key in keys]
            config = build_config(door, compose(door, words))
            for key in keys:
                assert attrgetter(key)(config) == typed, (key, typed)


def test_a_command_that_cannot_be_read_is_one_line(tmp_path, monkeypatch):
    gone = tmp_path / "gone"
    gone.mkdir()
    script = f"cd {gone} && rmdir {gone} && {sys.executable} {ROOT}/launch/train.py steps=0"
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert done.stderr.startswith("the working directory is gone")
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = command("train", "run_dir=é", **plain)
    assert done.returncode == 2 and b"set LC_ALL=C.UTF-8" in done.stderr
    with open("/dev/full", "wb") as full:  # noqa: PTH123
        done = subprocess.run(
            [sys.executable, str(ROOT / "launch/train.py"), "--help"],
            stdout=full,
            stderr=subprocess.PIPE,
            check=False,
        )
    assert done.returncode == 1 and b"Traceback" not in done.stderr


def test_signals_that_were_ignored_stay_so(monkeypatch):
    handled = import_module("launch.cli.spawn")
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    assert not handled._is_ignored("SIGHUP")
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert handled._is_ignored("SIGHUP") and not handled._is_ignored("SIGTERM")
    finally:
        signal.signal(signal.SIGHUP, before)


def test_quotes_of_ones_own_keep_what_is_inside():
    assert quote_value("prompt='x y'", ["prompt"]) == "prompt='x y'"
    assert unescape_text(quote_value("prompt='${x}'", ["prompt"]).partition("=")[2][1:-1]) == "${x}"
    for text in ("${x}", 'a"b', "plain"):  # what a job script repeats is quoted already
        once = quote_value(f"prompt={text}", ["prompt"])
        assert quote_value(once, ["prompt"]) == once


@pytest.mark.parametrize(
    "typed, values",
    [
        ("a,b", ["a", "b"]),
        ("${x},b", ["${x}", "b"]),
        ("'a,b',c", ["a,b", "c"]),
        ("x{y},[z]", ["x{y}", "[z]"]),
        ("don't", ["don't"]),
        ("f(x),g", ["f(x)", "g"]),
        ('say "hi, you",b', ['say "hi, you"', "b"]),
        ("choice(a,b)", ["a", "b"]),
    ],
)
def test_a_sweep_takes_every_text(typed, values):
    parser = OverridesParser.create()
    override = parser.parse_override(quoted_values(f"init_from={typed}", ["init_from"]))
    if override.is_sweep_override():
        swept = [parser.parse_override(f"k={v}").value() for v in override.sweep_string_iterator()]
    else:
        swept = [override.value()]
    assert [unescape_text(value) for value in swept] == values


def test_two_starts_in_one_second_have_a_folder_each(tmp_path):
    folders = [claim_folder(tmp_path / "runs" / "job-12:00") for _ in range(3)]
    assert [folder.name for folder in folders] == ["job-12:00", "job-12:00-2", "job-12:00-3"]


@pytest.mark.parametrize("how", ["alone", "spawned", "torchrun"])
def test_a_closed_terminal_is_a_signal_to_save(tmp_path, how):
    run = Launched(tmp_path)
    words = ["steps=100000", "checkpoint.every=0", "metrics.every=1"]
    words += ["launch.ranks=2", "strategy=ddp"] if how == "spawned" else []
    # Else it would be ignored there too, where whoever runs the tests ignores it.
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    process = run.start(*words, torchrun=["--nproc_per_node=1"] if how == "torchrun" else None)
    signal.signal(signal.SIGHUP, before)
    try:
        run.wait_for_step(3, process)
        process.send_signal(signal.SIGHUP)
        process.wait(240)
    finally:
        process.kill()
    status = run.status()
    assert (status["state"], status["reason"], status["code"]) == ("stopped", "SIGHUP", 75)
    assert status["checkpoint"] == status["step"] >= 3
    assert how == "torchrun" or process.returncode == 75
