"""The table of docs/reliability.md has every fault, and every test that it names is there."""

import re
from pathlib import Path

TESTS = Path(__file__).parent
ROWS = re.findall(
    r"^\| (\d+) \| (.+) \| (.+) \| (.+) \|$",
    (TESTS.parent / "docs" / "reliability.md").read_text(encoding="utf-8"),
    re.MULTILINE,
)


def test_every_fault_has_a_row():
    assert [int(number) for number, *_ in ROWS] == list(range(1, 69))


def test_every_test_that_is_named_exists():
    for number, _, _, cell in ROWS:
        named = re.findall(r"`(\w+)::(\w+)`", cell)
        assert named or "not played here: " in cell or "TODO" in cell, number
        for file, name in named:
            (path,) = TESTS.rglob(f"{file}.py")
            text = path.read_text(encoding="utf-8")
            assert f"\ndef {name}(" in text, f"{number}: {file}::{name}"
