"""Free text in a configuration: values that OmegaConf would interpret (`${…}`, `???`), encoded.

OmegaConf cannot mark a string as literal, so such a value is encoded as hexadecimal digits with a
prefix before OmegaConf sees it, and decoded in the typed configuration.
"""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

MARK = "text-as-hex:"


def escape_text(value: Any) -> Any:
    """Encode a value, or all values in dicts and lists, so that OmegaConf takes them literally."""
    if isinstance(value, str) and ("${" in value or value == "???" or value.startswith(MARK)):
        return MARK + value.encode("utf-8", "surrogateescape").hex()
    if isinstance(value, Mapping):
        return {key: escape_text(inner) for key, inner in value.items()}
    return [escape_text(inner) for inner in value] if isinstance(value, list | tuple) else value


def unescape_text(value: Any) -> Any:
    """Decode what `escape_text` encoded, also in the fields of dataclasses."""
    if isinstance(value, str) and value.startswith(MARK):
        return bytes.fromhex(value.removeprefix(MARK)).decode("utf-8", "surrogateescape")
    if is_dataclass(value) and not isinstance(value, type):
        found = {f.name: unescape_text(getattr(value, f.name)) for f in fields(value) if f.init}
        return replace(value, **found)
    return [unescape_text(inner) for inner in value] if isinstance(value, list) else value
