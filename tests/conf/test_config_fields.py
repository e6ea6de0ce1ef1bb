"""A key's field says all of it: meaning, unit, range, choices and "off" value."""

import ast
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from conf.help import help_text
from conf.schema import SCHEMAS
from parallel.config_fields import Interval, KeyFacts, facts_of, key_facts, known_keys, value_at
from trainer.config.train import OptimConfig, TrainConfig

ROOT = Path(__file__).parents[2]
KEYS = {(door, key): field for door, s in SCHEMAS.items() for key, field in known_keys(s).items()}
# What is a word by default, and may be any other text.
FREE_WORDS = {"run_dir", "metrics.wandb_project", "metrics.objective"}
# Numbers whose range depends on others: trainer/data/ and parallel/strategy.py say it.
CHECKED_ELSEWHERE = {"data.vocab_size", "data.held_out"} | {
    f"strategy.{axis}" for axis in ("pipeline", "replicate", "shard", "context", "tensor")
}


def test_every_key_has_a_meaning():
    for (door, key), field in KEYS.items():
        facts = facts_of(field)
        assert facts.meaning and not facts.meaning.endswith("."), (door, key)
        assert facts.off is None or facts.off_means, (door, key)


def test_default_and_off_value_are_among_the_values():
    for (door, key), field in KEYS.items():
        facts, default = facts_of(field), value_at(SCHEMAS[door](), key)
        for value in [default] + [facts.off] * (facts.off is not None):
            assert type(value) is type(default), (door, key)
            assert not facts.choices or value in facts.choices, (door, key)
            if field.type in (int, float) and facts.interval:
                assert value in facts.interval, (door, key)


def test_every_number_has_a_range():
    for (door, key), field in KEYS.items():
        if field.type in (int, float):
            assert key in CHECKED_ELSEWHERE or facts_of(field).interval, (door, key)


def words_compared_with() -> set[str]:
    """Names of attributes that our code compares with a word, or looks up in a table."""
    found = set()
    for package in ("trainer", "parallel", "conf", "launch"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Attribute):
                    found.add(node.slice.attr)
                if isinstance(node, ast.Compare):
                    sides = [node.left, *node.comparators]
                    parts = [part for side in sides for part in getattr(side, "elts", [side])]
                    if any(isinstance(getattr(part, "value", 0), str) for part in parts):
                        found |= {side.attr for side in sides if isinstance(side, ast.Attribute)}
    return found


def test_every_word_that_the_code_asks_for_has_choices():
    compared = words_compared_with()
    assert {"family", "norm", "resume", "activation"} <= compared
    for (_, key), field in KEYS.items():
        word = str(field.default).isidentifier() and key not in FREE_WORDS
        if field.type is str and (word or field.name in compared):
            assert facts_of(field).choices, key


@pytest.mark.parametrize("door", SCHEMAS)
def test_help_shows_all_of_it(door):
    text = " ".join(help_text(door, SCHEMAS[door], OmegaConf.structured(SCHEMAS[door])).split())
    for key, field in known_keys(SCHEMAS[door]).items():
        facts = facts_of(field)
        values = facts.describe_values()
        shown = f"{facts.meaning} [{values}]" if values else facts.meaning
        assert f" {key}=" in text
        assert " ".join(shown.split()) in text, key


def test_the_values_in_words():
    def said(**facts):
        empty = {"meaning": "", "unit": "", "off": None, "off_means": "off", "choices": {}}
        return KeyFacts(**{**empty, "interval": None, **facts}).describe_values()

    assert said() == ""
    assert said(off=0, off_means="all", interval=Interval(0)) == "at least 0; 0 = all"
    assert said(unit="MiB", interval=Interval(0, 1, True, True)) == "MiB, above 0 and below 1"
    assert said(choices={"a": "", "b": "the other"}) == "a | b = the other"
    assert said(choices={"": "", "b": ""}, off="") == "b; empty = off"
    assert said(off=[], off_means="none") == "empty = none"
    assert said(off=False, off_means="it ends") == "false = it ends"


def test_the_ends_of_a_range():
    def inside(interval):
        return [x for x in (-1, 0, 0.5, 1, 2, float("inf"), float("nan")) if x in interval]

    share, step = key_facts(OptimConfig, "decay_share"), key_facts(TrainConfig, "steps")
    assert inside(share.interval) == [0, 0.5, 1]
    assert inside(step.interval) == [1, 2]
    assert inside(key_facts(OptimConfig, "lr").interval) == [0.5, 1, 2]
    assert inside(key_facts(OptimConfig, "betas").interval) == [0, 0.5]


def test_lists_are_not_shared():
    assert OptimConfig().betas == OptimConfig().betas
    assert OptimConfig().betas is not OptimConfig().betas
