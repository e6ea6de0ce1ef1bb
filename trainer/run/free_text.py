"""Text that OmegaConf would take for more than text: `${…}` and `???` travel under a mark.

A path or a sentence is what its user has typed. OmegaConf has no way to say so of a value that
holds an interpolation or is its word for "missing", so such a value is written as hexadecimal
digits behind a mark before OmegaConf sees it, and read back in the typed configuration.
"""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

MARK = "text-as-hex:"


def escape_text(value: Any) -> Any:
    """Return a value, or all values in dicts and lists, that OmegaConf takes as they are."""
    if isinstance(value, str) and ("${" in value or value == "???" or value.startswith(MARK)):
        return MARK + value.encode("utf-8", "surrogateescape").hex()
    if isinstance(value, Mapping):
        return {key: escape_text(inner) for key, inner in value.items()}
    return [escape_text(inner) for inner in value] if isinstance(value, list | tuple) else value


def unescape_text(value: Any) -> Any:
    """Return what `escape_text` was given; also of the fields of dataclasses."""
    if isinstance(value, str) and value.startswith(MARK):
        return bytes.fromhex(value.removeprefix(MARK)).decode("utf-8", "surrogateescape")
    if is_dataclass(value) and not isinstance(value, type):
        found = {f.name: unescape_text(getattr(value, f.name)) for f in fields(value) if f.init}
        return replace(value, **found)
    return [unescape_text(inner) for inner in value] if isinstance(value, list) else value
