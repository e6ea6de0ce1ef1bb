"""Hydra's errors in one readable message: what is, what must be, and the nearest valid value."""

import atexit
import difflib
import errno
import io
import json
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import OmegaConfBaseException

from conf.help import config_groups
from conf.schema import SCHEMAS
from parallel.config_fields import known_keys
from parallel.errors import UserError
from trainer.metrics.console import CONSOLE

TYPES = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "a text",
    "list[int]": "a list of whole numbers, e.g. [1,2]",
    "list[float]": "a list of numbers, e.g. [0.9,0.95]",
    "list[str]": "a list of texts, e.g. [a,b]",
    "list[list[int]]": "a list of pairs of whole numbers, e.g. [[1,3],[3,7]]",
}


LOG = "log.txt"  # copy of a run's console output, in its folder
NO_ROOM = (errno.EPIPE, errno.ENOSPC, errno.EFBIG, errno.EIO)  # disk full, or no reader
STOPPED = 75  # the exit code of a run that a signal has stopped (parallel/health/watchdog.py)


class JobFailedError(Exception):
    """A job has failed and has printed its error; a sweep continues with the next job."""

    def __init__(self, code: int, reason: str = ""):
        super().__init__(code, reason)
        self.code, self.reason = code, reason


def exit_code(stop: SystemExit) -> int:
    """Return the exit status of a process."""
    return stop.code if isinstance(stop.code, int) else int(stop.code is not None)


def write_error(text: str) -> None:
    """Write one message to stderr in a single write, so that ranks do not interleave.

    torchrun prints 30 lines of its own when a rank fails; the last is the content of the rank's
    error file (torch.distributed.elastic's protocol): the message again.
    """
    # AttributeError: there is no stderr. The exit status tells as well, and must not change.
    with suppress(OSError, AttributeError):
        sys.stderr.write(text.rstrip("\n") + "\n")
        sys.stderr.flush()
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        more = {"timestamp": str(int(time.time()))}
        try:
            Path(path).write_text(
                json.dumps({"message": {"message": text.strip(), "extraInfo": more}})
            )
        except OSError:  # a truncated file would make torchrun fail itself
            with suppress(OSError):
                Path(path).unlink()


def ensure_standard_streams() -> None:
    """Redirect closed stdin, stdout and stderr to the null device; let open ones take any text.

    Otherwise the next files would get their descriptors, and a library's stderr could land in a
    checkpoint; and a console without é would end the run.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(number)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def stdout_problem(error: BaseException) -> str:
    """Return a message if stdout is full or closed; empty for other errors."""
    if not isinstance(error, OSError) or error.filename or error.errno not in NO_ROOM:
        return ""
    return f"what was to be printed cannot be written: {error.strerror}"


def run_simple_command(command: Callable[[list[str]], int], arguments: list[str]) -> int:
    """Run a command that needs no ranks; return its status, 2 after a user's mistake."""
    ensure_standard_streams()
    atexit.register(release_streams)
    try:
        code = command(arguments)
        if sys.stdout:
            sys.stdout.flush()
    except UserError as error:
        write_error("\n".join(error.problems))
        return error.status
    except OSError as error:
        if not (said := stdout_problem(error)):
            raise
        write_error(said)
        return 1
    return code


def log_to_stderr(rank: int) -> None:
    """Configure logging: rank 0 logs everything, the others only warnings, with their rank."""
    logging.basicConfig(
        level=logging.WARNING if rank else logging.INFO,
        format=f"[rank {rank}] %(message)s" if rank else "%(message)s",
    )
    atexit.register(release_streams)


class _TolerantHandler(logging.FileHandler):
    """A file handler that ignores write errors: a full disk must not stop training."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Nothing."""


@contextmanager
def log_to_file(path: Path) -> Iterator[None]:
    """Write the log and the lines of the run's console to this file as well."""
    try:
        handler = _TolerantHandler(path, encoding="utf-8")
    except OSError:
        yield
        return
    handler.setFormatter(logging.Formatter("%(asctime)s  %(message)s", "%Y-%m-%d %H:%M:%S"))
    console = logging.getLogger(CONSOLE)
    console.setLevel(logging.INFO)
    loggers = (logging.getLogger(), console)
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
        with suppress(OSError):
            handler.close()


def release_streams() -> None:
    """Redirect a stdout or stderr that cannot be flushed to the null device.

    Python flushes them at exit, and if that fails the exit status is 120: a launcher would take a
    finished run for a failed one.
    """
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)


def redirect_streams(path: str) -> None:
    """Append stdout and stderr to a file from now on."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.flush()
        os.dup2(file, stream.fileno())
    os.close(file)


def explain_error(name: str, error: BaseException) -> str:
    """Return the message of a user's mistake in command `name`."""
    if isinstance(error, UserError):
        lines = error.problems
        head = f"{len(lines)} problems with this configuration:\n" if len(lines) > 1 else ""
        return head + "\n".join(f"- {line}" if head else line for line in lines)
    if isinstance(error, MissingConfigException):
        return _missing_option(error)
    if isinstance(error, OverrideParseException):
        reason = error.message.splitlines()[0]
        if reason.startswith("Lexer"):
            reason = "it holds a character that must be quoted"
        return f"cannot read {error.override}: {reason}; write KEY=VALUE, quoted for the shell"
    for pattern, say in HYDRA_MESSAGES.items():
        found = re.search(pattern, str(error))
        if found:
            return say(name, *found.groups())
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    return "; ".join(dict.fromkeys([_first_line(error), _first_line(cause)]))


def is_mistake(error: BaseException) -> bool:
    """Return whether an error is a user's; Hydra refuses `strategy=5` with a bare ValueError."""
    bare = isinstance(error, ValueError) and str(error).startswith("Config group override must")
    return bare or isinstance(error, (UserError, HydraException, OmegaConfBaseException))


def _unknown_key(name: str, key: str) -> str:
    """Return the message for an unknown `key`, with the nearest known one."""
    known = [*known_keys(SCHEMAS[name]), *config_groups(name)]
    same_leaf = [k for k in known if k.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]]
    by_leaf = {k.rsplit(".", 1)[-1]: k for k in known}
    near = difflib.get_close_matches(key, same_leaf, n=1, cutoff=0.0)
    near = near or difflib.get_close_matches(key, known, n=1)
    near = near or [by_leaf[leaf] for leaf in difflib.get_close_matches(key, by_leaf, n=1)]
    return f"{key} does not exist; " + (
        f"did you mean {near[0]}?" if near else "--help lists the keys"
    )


def _refused_value(name: str, key: str, value: str) -> str:
    known = known_keys(SCHEMAS[name])
    if key in known:
        kind = known[key].type
        plain = kind.__name__ if type(kind) is type else str(kind)
        return f"{key}={value} must be {TYPES[plain]}"
    below = [known_key for known_key in known if known_key.startswith(f"{key}.")]
    return f"{key}={value}: {key} is a section; set its keys: {', '.join(below)}"


# Pattern of a Hydra or OmegaConf error → (command, *groups) → our message.
HYDRA_MESSAGES: dict[str, Callable[..., str]] = {
    r"Could not override '([^']+)'": _unknown_key,
    r"Error merging override \+*([^=~]+)=(.*)": _refused_value,
    r"Error merging override (~.+)": lambda _, key: f"{key}: a key cannot be taken away; set it",
    r"An item is already at '(.+)'": lambda _, key: f"{key} exists; write {key}=VALUE without +",
    r"Multiple values for (\w+)": lambda _, group: (
        f"{group} is set twice; write {group}=OPTION once"
    ),
    r"Config group override must": lambda _: "a group's option is a name; --help lists them",
}


def _missing_option(error: MissingConfigException) -> str:
    group, _, option = (error.missing_cfg_file or "").rpartition("/")
    options = sorted(error.options or ())
    if not group or not options:
        return _first_line(error)
    near = difflib.get_close_matches(option, options, n=1)
    hint = f"; did you mean {group}={near[0]}?" if near else ""
    return f"{group}={option} does not exist; {group} is one of {', '.join(options)}{hint}"


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n", 1)[0]
