"""The reference of all keys, from the dataclasses: `python -m conf.reference > docs/keys.md`."""

import sys
from dataclasses import fields, is_dataclass
from typing import Any

from conf.schema import SCHEMAS
from parallel.config_fields import facts_of, value_text

HEAD = """# Keys

All keys of all commands, with the defaults of the dataclasses; presets (`experiment=`, `model=`,
`data=`, `strategy=`) set many of them, and `--help` of a command shows its own. Written by
`python -m conf.reference > docs/keys.md`; a test holds it equal to the code.
"""


BAR = "\\|"  # inside a cell


def key_reference() -> str:
    """Return a page in Markdown: a table for each command, later ones with their own keys alone."""
    pages, told = [HEAD], set[str]()
    for name, schema in SCHEMAS.items():
        rows = [row for row in _rows(schema(), "") if row[0] not in told]
        told |= {key for key, *_ in rows}
        if rows:
            pages.append(f"## launch/{name}.py\n\n{_table(rows)}\n")
    return "\n".join(pages)


def _rows(section: Any, prefix: str) -> list[tuple[str, str, str, str]]:
    """Return the (key, default, meaning, values) of each field, and of all sections below."""
    found, below = [], []
    for field in fields(section):
        value, key = getattr(section, field.name), f"{prefix}{field.name}"
        if is_dataclass(value):
            below += _rows(value, f"{key}.")
        else:
            facts = facts_of(field)
            found.append((key, value_text(value), facts.meaning, facts.describe_values()))
    return found + below


def _table(rows: list[tuple[str, str, str, str]]) -> str:
    lines = ["| key | default | meaning | values |", "| --- | --- | --- | --- |"]
    for key, default, *texts in rows:
        cells = [f"`{key}`", f"`{default}`" if default else "", *texts]
        lines.append(f"| {' | '.join(cell.replace('|', BAR) for cell in cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.stdout.write(key_reference())
