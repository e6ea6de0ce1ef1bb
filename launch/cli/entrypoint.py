"""One way in for every command: rank 0 composes the configuration, the other ranks follow it.

Nothing here imports torch or the trainer before it is needed, so that `--help` answers at once.
"""

import logging
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Any, NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from conf import schema
from launch.cli.environment import torch_problem
from launch.cli.errors import (
    STOPPED,
    JobFailedError,
    exit_code,
    explain,
    is_mistake,
    log_to_stderr,
    occupy_standard_streams,
    unprinted,
    write_error,
)
from parallel.errors import ConfigError, UserError
from parallel.strategy import check_torchrun, restarts
from trainer.run.free_text import MARK, protected
from trainer.run.run_dir import AlreadyFinishedError

CONF = str(Path(schema.__file__).parent)
MULTIRUN = ("-m", "--multirun")
QUOTED = re.compile(r"'(?:\\.|[^'\\])*'|\"(?:\\.|[^\"\\])*\"", re.DOTALL)
SWEPT = re.compile(r"(choice|range|interval|glob|shuffle|sort|tag)\(.*\)\Z", re.DOTALL)
EXIT_SECONDS = 10.0  # that the end of a process may take

log = logging.getLogger(__name__)


@dataclass
class Command:
    """One command of launch/: its name, which is that of its YAML file, and what it runs."""

    name: str
    # Runs once, before any rank works: (config, world_size, held) → completed config, where `held`
    # is an ExitStack that is closed when the job has ended. With `together`: (config) → anything.
    prepare: Callable[..., Any]
    work: Callable[..., None] | None = None  # runs on every rank: (config, runtime)
    # Runs once in this process in place of ranks, where they were not asked for: (config).
    alone: Callable[..., None] | None = None
    # Runs once in this process in place of all work: (everything that `prepare` returned), when
    # all jobs of the command line are found to be good.
    together: Callable[..., None] | None = None
    prepared: list[Any] = field(default_factory=list)


def run_command(command: Command) -> None:
    """Run a command on all of its ranks and exit.

    0 = done, 1 = failed, 2 = a mistake in configuration or data, 75 = stopped by a signal: the
    same command goes on, 77 = a rank hung, 128 + n = left at once by signal n.
    """
    # When a launcher ends before its ranks torch writes a C++ trace of each lost connection.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # OpenMP's threads wait for each other by spinning, for milliseconds: where other processes want
    # the cores that costs ten times what it spares. libgomp reads this when torch is imported.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    occupy_standard_streams()
    ranks = _ranks(command.name)
    if ranks and ranks.rank:
        from launch.cli.rank import follow

        leave(follow(ranks, command.work))
    now = time.time()
    started = time.localtime(ranks.started(now) if ranks else now)
    with TemporaryDirectory(prefix="samestep-") if _sweeps() else nullcontext("") as scratch:
        schema.register(time.strftime("%Y-%m-%d_%H-%M-%S", started), scratch)
        code = _compose(command, ranks, scratch)
    if ranks:
        ranks.stop()  # which do not fail with it: a launcher shows the cause alone
    leave(code)


def _ranks(name: str) -> Any:
    """Return the ranks that torchrun has started, None without it.

    Exits where nothing can begin.
    """
    problem = _unreadable(sys.argv[1:])
    if not problem and (problem := torch_problem()) and os.environ.get("RANK", "0") != "0":
        sys.exit(2)  # rank 0 says it
    try:
        if not problem and check_torchrun(os.environ):
            from parallel.runtime import Ranks

            return Ranks.of_torchrun()
    except UserError as error:
        problem = explain(name, error)
    if problem:
        write_error(problem)
        sys.exit(2)
    return None


def names_itself(words: Sequence[str]) -> bool:
    """Return whether a new folder is named after the time.

    A restart by torchrun goes on in the old.
    """
    given = any(word.lstrip("+").startswith("run_dir=") for word in words)
    return not given and not restarts(os.environ)


def _unreadable(words: Sequence[str]) -> str:
    """Return what keeps a command from being read at all; empty = nothing.

    Python keeps bytes that are not in the locale's encoding as lone surrogates.
    """
    try:
        if "${" in str(Path.cwd()):
            return "the working directory has a ${ in its name, which Hydra fills in; change it"
    except FileNotFoundError:
        return "the working directory is gone; change to one that is there"
    try:
        gettempdir()
    except FileNotFoundError:  # torch is not even imported without
        return "no folder takes temporary files; set TMPDIR to one with room"
    for word in words:
        try:
            word.encode()
        except UnicodeEncodeError:
            try:
                os.fsencode(word).decode()
            except UnicodeDecodeError:
                return f"{word!a} holds bytes that are not UTF-8; write it in UTF-8"
            return f"{word!a} is no text in this locale; set LC_ALL=C.UTF-8"
    return ""


def leave(code: int) -> NoReturn:
    """Exits, and soon: what is left of threads and groups must not hold a process that is done."""

    def end() -> None:
        threading.main_thread().join()
        time.sleep(EXIT_SECONDS)
        os._exit(code)

    threading.Thread(target=end, daemon=True).start()
    sys.exit(code)


def _compose(command: Command, ranks: Any, scratch: str) -> int:
    """Let Hydra run every job of the command line; the exit status."""
    log_to_stderr(0)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # its errors come to us instead of to stderr
    keys = schema.free_text(command.name)
    if scratch:  # Hydra reads the flag in front of overrides only; a comma parts values
        words = sorted(sys.argv[1:], key=lambda word: word not in MULTIRUN)
        sys.argv[1:] = [quoted_values(word, keys) for word in words]
    else:
        sys.argv[1:] = [quoted(word, keys) for word in sys.argv[1:]]
    opened: Any = nullcontext()
    if scratch and command.name == "train":
        from launch.cli.sweep import Sweep

        opened = Sweep(Path(scratch), names_itself(sys.argv[1:]))

    try:
        with opened as sweep:
            job = _job_of(command, ranks, bool(scratch), sweep)
            hydra.main(version_base="1.3", config_path=CONF, config_name=command.name)(job)()
        if command.together and command.prepared:
            command.together(command.prepared)
        return sweep.code if sweep else 0
    except JobFailedError as failed:
        return failed.code
    except SystemExit as stop:
        return exit_code(stop)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        return _tell(command, error)


def _job_of(command: Command, ranks: Any, sweeps: bool, sweep: Any) -> Callable[[DictConfig], Any]:
    """Return what Hydra calls with each composed configuration."""

    def task(cfg: DictConfig) -> float | None:
        if sweep is not None:
            return sweep.run(cfg, lambda point, console: _run_job(command, point, ranks, console))
        try:
            _run_job(command, cfg, ranks)
        except JobFailedError as failed:
            if not sweeps:
                raise SystemExit(failed.code) from None
            raise
        except SystemExit as stop:
            if sweeps and not ranks and stop.code != STOPPED:
                raise JobFailedError(exit_code(stop)) from None
            raise
        return None

    return task


def _sweeps() -> bool:
    return any(word in MULTIRUN for word in sys.argv[1:])


def _run_job(command: Command, cfg: DictConfig, ranks: Any, console: Path | None = None) -> None:
    """Check and prepare one composed job, then run it on every rank.

    `console`: the file that new processes write to, of which there is then at least one; None =
    the terminal. JobFailedError if the job cannot begin, SystemExit if it fails.
    """
    with ExitStack() as held:
        _run_held(command, cfg, ranks, held, console)


def _run_held(
    command: Command, cfg: DictConfig, ranks: Any, held: ExitStack, console: Path | None
) -> None:
    try:
        config = schema.load(command.name, cfg)
        world_size = _world_size(config, ranks)
        if command.together:
            if _sweeps():
                from launch.cli.sweep import composed

                config.run_dir = str(Path(config.run_dir) / composed().name)
            command.prepared.append(command.prepare(config))
            return
        if getattr(config, "device", "cpu") == "cuda":  # before anything is written
            from parallel.runtime import choose_device

            choose_device("cuda", ranks.local_world_size if ranks else world_size)
        config = command.prepare(config, world_size, held)
        if command.alone and not ranks and world_size == 1 and not _strategy_given():
            command.alone(config)
            return
    except AlreadyFinishedError as finished:
        log.info("%s", finished)
        return
    except Exception as error:
        raise JobFailedError(_tell(command, error), str(error).splitlines()[0]) from None
    _start(command, {"command": command.name, "config": asdict(config)}, ranks, world_size, console)


def _start(
    command: Command, job: dict[str, Any], ranks: Any, world_size: int, console: Path | None
) -> None:
    """Run a job on torchrun's ranks, on new processes, or in this one."""
    from launch.cli.rank import run, run_alone

    if ranks:
        ranks.post(job)
        run(job, ranks, command.work)
    elif world_size > 1 or console:
        from launch.cli.spawn import spawn

        spawn(job | {"console": str(console or "")}, world_size, command.work)
    else:
        run_alone(job, command.work)


def _tell(command: Command, error: Exception) -> int:
    """Write a user's mistake as one message and a bug with its trace; the exit status."""
    if is_mistake(error):
        write_error(explain(command.name, error))
        return getattr(error, "status", 2)
    if isinstance(error, OSError) and error.filename:
        write_error(f"{error.filename} cannot be used: {error.strerror}")
    else:
        write_error(unprinted(error) or traceback.format_exc())
    return 1


def quoted(argument: str, keys: Collection[str]) -> str:
    """KEY=VALUE with the value in quotes, if it is that of a key for text.

    It may then hold whatever Hydra and OmegaConf read as more than text. One that is in quotes
    already stays so.
    """
    key, equals, text = argument.partition("=")
    if key.lstrip("+") not in keys or not equals or not text:
        return argument
    if QUOTED.fullmatch(text):
        inside = text[1:-1]
        kept = inside.startswith(MARK) or protected(inside) == inside  # a script's own words
        return argument if kept else f'{key}="{protected(inside)}"'
    return f"{key}={_in_quotes(text)}"


def quoted_values(argument: str, keys: Collection[str]) -> str:
    """Like `quoted`, in a sweep: commas part values, and Hydra's own words (choice, glob) stay."""
    key, equals, text = argument.partition("=")
    if key.lstrip("+") not in keys or not equals or not text or SWEPT.match(text):
        return argument
    values = re.findall(rf"(?:{QUOTED.pattern}|[^,])+", text, re.DOTALL)
    return f"{key}={','.join(quoted(f'{key}={value}', keys)[len(key) + 1 :] for value in values)}"


def _in_quotes(text: str) -> str:
    # Hydra reads \" and, only in front of quotes, \\ inside a quoted value.
    escaped = re.sub(r'(\\*)(?="|\Z)', r"\1\1", protected(text)).replace('"', '\\"')
    return f'"{escaped}"'


def _world_size(config: Any, ranks: Any) -> int:
    wanted = config.launch.ranks if hasattr(config, "launch") else 0
    if ranks and wanted not in (0, ranks.world_size):
        raise ConfigError(
            f"launch.ranks={wanted}, but torchrun started {ranks.world_size} ranks; "
            "leave launch.ranks to runs without torchrun"
        )
    return ranks.world_size if ranks else max(1, wanted)


def _strategy_given() -> bool:
    given = HydraConfig.get().overrides.task
    return any(override.startswith(("strategy=", "strategy.")) for override in given)
