"""The reference of keys in docs/ is that of the code."""

from pathlib import Path

from conf.reference import key_reference

PAGE = Path(__file__).parents[2] / "docs" / "keys.md"


def test_the_reference_is_fresh():
    assert PAGE.read_text(encoding="utf-8") == key_reference(), (
        "run: python -m conf.reference > docs/keys.md"
    )


def test_every_key_has_a_meaning():
    rows = [line.split(" | ") for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    assert len(rows) > 150
    assert all(row[2].removesuffix(" |").strip() for row in rows)
