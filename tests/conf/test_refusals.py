"""Bad input, made from the configuration itself: each is refused in one line, with its key."""

import copy
import math
import random
import sys
from dataclasses import fields, is_dataclass

import pytest

from conf.validation.validate import find_problems
from launch.cli.entrypoint import Command, run_command
from launch.cli.errors import TYPES, explain_error
from parallel.config_fields import facts_of, known_keys
from parallel.errors import ConfigError
from parallel.strategy import world_size
from trainer import data
from trainer.config.train import DataConfig, TrainConfig

KEYS = known_keys(TrainConfig)
NUMBERS = {key: field.type for key, field in KEYS.items() if field.type in (int, float)}
CHOICES = {key: facts_of(field).choices for key, field in KEYS.items()}
ENUMS = [key for key, choices in CHOICES.items() if choices]


def changed(key, value):
    config = TrainConfig(data=DataConfig(path="bundled:shakespeare"))
    owner = config
    *sections, leaf = key.split(".")
    for section in sections:
        owner = getattr(owner, section)
    setattr(owner, leaf, value)
    return config


def found(config):
    """What is said before step 0: of the configuration, and if that is good of the data's."""
    messages = find_problems(config, 1)
    if messages:
        return messages
    try:
        data.prepare_data(config.data)
    except ConfigError as error:
        return error.problems
    return []


def test_the_configuration_that_is_spoilt_below_is_good():
    assert find_problems(changed("steps", 1), 1) == []


@pytest.mark.parametrize("key", KEYS)
def test_a_typo_is_answered_with_the_key(key):
    section, dot, leaf = key.rpartition(".")
    middle = len(leaf) // 2
    typo = section + dot + leaf[:middle] + leaf[middle + 1 :]
    error = ValueError(f"Could not override '{typo}'. Key is not in struct")
    assert explain_error("train", error) == f"{typo} does not exist; did you mean {key}?"


@pytest.mark.parametrize("key", KEYS)
def test_a_value_of_another_type_is_answered_with_the_right_one(key):
    error = ValueError(f"Error merging override {key}=?!")
    message = explain_error("train", error)
    assert message.startswith(f"{key}=?! must be ")
    assert message.removeprefix(f"{key}=?! must be ") in TYPES.values()


@pytest.mark.parametrize("key", NUMBERS)
def test_a_number_out_of_range_is_named_alone(key):
    values = [-7] if NUMBERS[key] is int else [-7.0, math.nan, math.inf]
    for value in values:
        (message,) = found(changed(key, value))
        assert message.startswith(f"{key}={value} must be ")


@pytest.mark.parametrize("key", ENUMS)
def test_an_unknown_choice_is_answered_with_the_nearest(key):
    for choice in filter(None, CHOICES[key]):
        (message,) = found(changed(key, f"{choice}x"))
        assert message.startswith(f"{key}={choice}x is not one of {', '.join(CHOICES[key])}")
        near = message.partition("; did you mean ")[2]
        assert near.removesuffix("?") in ("", *CHOICES[key])


def spoil(config, draw):
    """A config with some values of each kind wrong at once."""
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value):
            spoil(value, draw)
        elif draw.random() < 0.2:
            bad = {int: [-3, 0, 10**30], float: [-1.0, math.nan, 1e300], str: ["", "?", "é" * 400]}
            kind = bad.get(type(value))
            if kind:
                setattr(config, field.name, draw.choice(kind))


def test_any_mixture_of_bad_values_is_said_without_a_trace():
    for seed in range(300):
        config = TrainConfig(data=DataConfig(path="bundled:shakespeare"))
        spoil(config, random.Random(seed))
        before = copy.deepcopy(config)
        messages = find_problems(config, seed % 9 + 1)
        assert config == before
        assert all(message and "\n" not in message for message in messages)


@pytest.mark.parametrize("size", [10**9, 10**30])
def test_huge_sizes_are_answered_at_once(size):
    """The nearest valid values are searched among divisors, not among all numbers."""
    for overrides in (
        {"model.heads": size, "model.width": 3 * size, "strategy.tensor": 7},
        {"batch_size": size, "micro_batch_size": 7},
        {"batch_size": size, "strategy.pipeline": 2},
    ):
        config = changed("steps", 1)
        for key, value in overrides.items():
            section, _, leaf = key.rpartition(".")
            setattr(getattr(config, section) if section else config, leaf, value)
        find_problems(config, world_size(config.strategy))


def refuse(config, world_size, _held):
    """A preparation that lets nothing through: a run is not what is asked for here."""
    raise ConfigError(*(find_problems(config, world_size) or ["nothing wrong"]))


NASTY = [
    "=",
    "a=b=c",
    "steps=",
    "+",
    "~",
    "steps=1e400",
    "steps=true",
    "steps=1,2",
    "steps=range(1,3)",
    "optim.lr=1e-400",
    "optim.betas=[]",
    "optim.betas=[a,b]",
    "optim=null",
    "hydra=5",
    "model=",
    "precision=[fp32]",
    "steps='3",
    "steps=${steps}",
    "optim.lr=${oc.env:NOPE}",
    "optim..lr=1",
    "+model.foo.bar=1",
    "checkpoint.every={a:1}",
    "strategy/x=1",
    "x@y=z",
    "é=1",
    "--config-name=no",
]
LETTERS = "abz=.+~[]{}(),'\"$@ 01\\/:%é"


@pytest.mark.parametrize("number", range(len(NASTY) + 10))
def test_any_text_on_the_command_line_is_answered_in_a_line(number, monkeypatch, capsys):
    draw = random.Random(number)
    noise = "".join(draw.choice(LETTERS) for _ in range(draw.randint(2, 12)))
    argument = NASTY[number] if number < len(NASTY) else noise
    monkeypatch.setattr(sys, "argv", ["train.py", argument])
    with pytest.raises(SystemExit) as stop:
        run_command(Command("train", refuse))
    said = capsys.readouterr().err.strip()
    assert stop.value.code == 2, said
    assert said and "Traceback" not in said and len(said.splitlines()) == 1
    assert said != "nothing wrong"
