"""The reference of all keys, from the dataclasses: `python -m conf.reference > docs/keys.md`."""

import sys
from dataclasses import Field
from typing import Any

from conf.schema import SCHEMAS
from parallel.config_fields import facts_of, known_keys, value_at, value_text

HEAD = """# Keys

All keys of all commands, with the defaults of the dataclasses; presets (`experiment=`, `model=`,
`data=`, `strategy=`) set many of them, and `--help` of a command shows its own. Written by
`python -m conf.reference > docs/keys.md`; a test holds it equal to the code.
"""
TABLE = "| key | default | meaning | values |\n| --- | --- | --- | --- |\n"
SCRIPTS = {"calibrate": "launch/plan.py calibrate"}  # of commands without a file of that name
BAR = "\\|"  # inside a cell


def key_reference() -> str:
    """Return a page in Markdown: a table for each command, later ones with their own keys alone."""
    pages, told = [HEAD], set[str]()
    for name, schema in SCHEMAS.items():
        keys, defaults = known_keys(schema), schema()
        rows = [_row(key, value_at(defaults, key), keys[key]) for key in keys if key not in told]
        told |= keys.keys()
        if rows:
            pages.append(f"## {SCRIPTS.get(name, f'launch/{name}.py')}\n\n{TABLE}{''.join(rows)}")
    return "\n".join(pages)


def _row(key: str, default: Any, field: Field) -> str:
    facts, shown = facts_of(field), value_text(default)
    cells = [f"`{key}`", shown and f"`{shown}`", facts.meaning, facts.describe_values()]
    return f"| {' | '.join(cell.replace('|', BAR) for cell in cells)} |\n"


if __name__ == "__main__":
    sys.stdout.write(key_reference())
