"""Hydra's errors in one readable message: what is, what must be, and the nearest valid value."""

import difflib
import re
import sys

from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import OmegaConfBaseException

from conf.schema import SCHEMAS, known_keys
from parallel.config import ConfigError

USER_ERRORS = (ConfigError, HydraException, OmegaConfBaseException)
TYPES = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "a text",
    "list[int]": "a list of whole numbers, e.g. [1,2]",
    "list[float]": "a list of numbers, e.g. [0.9,0.95]",
    "list[str]": "a list of texts, e.g. [a,b]",
}


def write_error(text: str) -> None:
    """Writes one message to stderr, in one piece so that ranks do not mix theirs."""
    sys.stderr.write(text.rstrip("\n") + "\n")
    sys.stderr.flush()


def explain(name: str, error: BaseException) -> str:
    """The message of a user's mistake at door `name`."""
    if isinstance(error, ConfigError):
        lines = error.problems
        head = f"{len(lines)} problems with this configuration:\n" if len(lines) > 1 else ""
        return head + "\n".join(f"- {line}" if head else line for line in lines)
    if isinstance(error, MissingConfigException):
        return _missing_option(error)
    if isinstance(error, OverrideParseException):
        reason = error.message.splitlines()[0]
        return f"cannot read {error.override}: {reason}; write KEY=VALUE, quoted for the shell"
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    key = str(getattr(cause, "full_key", None) or "")
    known = known_keys(SCHEMAS[name])
    unknown = re.search(r"Could not (?:override|append to config.*) '([^']+)'", str(error))
    if unknown:
        return unknown_key(name, unknown[1])
    if key in known and "could not be converted" in str(cause):
        expected = TYPES.get(_type_name(known[key].type), str(known[key].type))
        return f"{key}={getattr(cause, 'value', '?')} must be {expected}"
    return "\n".join(line for line in [_first(error), _first(cause)] if line)


def unknown_key(name: str, key: str) -> str:
    """Says that `key` does not exist, with the key that was likely meant."""
    known = [*known_keys(SCHEMAS[name]), "strategy", "model", "data", "experiment", "debug"]
    same_leaf = [k for k in known if k.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]]
    by_leaf = {k.rsplit(".", 1)[-1]: k for k in known}
    near = difflib.get_close_matches(key, same_leaf, n=1, cutoff=0.0)
    near = near or difflib.get_close_matches(key, known, n=1)
    near = near or [by_leaf[leaf] for leaf in difflib.get_close_matches(key, by_leaf, n=1)]
    return f"{key} does not exist; " + (
        f"did you mean {near[0]}?" if near else "--help lists the keys"
    )


def _missing_option(error: MissingConfigException) -> str:
    group, _, option = (error.missing_cfg_file or "").rpartition("/")
    options = sorted(error.options or ())
    if not group or not options:
        return _first(error)
    near = difflib.get_close_matches(option, options, n=1)
    hint = f"; did you mean {group}={near[0]}?" if near else ""
    return f"{group}={option} does not exist; {group} is one of {', '.join(options)}{hint}"


def _type_name(kind: object) -> str:
    return kind.__name__ if isinstance(kind, type) and not hasattr(kind, "__args__") else str(kind)


def _first(error: BaseException) -> str:
    return str(error).strip().split("\n", 1)[0]
