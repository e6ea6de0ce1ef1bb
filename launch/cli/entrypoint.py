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
from importlib import import_module
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
from parallel.strategy import ConfigError, check_torchrun, restarts
from trainer.run.free_text import MARK, protected
from trainer.run.run_dir import AlreadyFinishedError

CONF = str(Path(schema.__file__).parent)
MULTIRUN = ("-m", "--multirun")
QUOTED = re.compile(r"'(?:\\.|[^'\\])*'|\"(?:\\.|[^\"\\])*\"", re.DOTALL)
SWEPT = re.compile(r"(choice|range|interval|glob|shuffle|sort|tag)\(.*\)\Z", re.DOTALL)
EXIT_SECONDS = 10.0  # that the end of a process may take

log = logging.getLogger(__name__)


@dataclass
class Door:
    """One command: the YAML file it composes and the functions it runs, as "module:function"."""

    name: str
    work: str  # runs on every rank: (config, runtime)
    # Runs once, before any rank works: (config, world_size, held) → completed config. What it
    # enters in `held` is left when the job has ended.
    prepare: str
    alone: str = ""  # runs once in this process in place of ranks, where they were not asked for
    # Runs once in this process in place of all work: (everything that `prepare` returned), when
    # all jobs of the command line are found to be good.
    together: str = ""
    prepared: list[Any] = field(default_factory=list)


def open_door(name: str, work: str, prepare: str, alone: str = "", together: str = "") -> None:
    """Runs a command on all of its ranks and exits.

    0 = done, 1 = failed, 2 = a user's mistake, 75 = stopped by a signal: the same command goes on,
    77 = a rank hung, 128 + n = left at once by signal n.
    """
    # When a launcher ends before its ranks torch writes a C++ trace of each lost connection.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # OpenMP's threads wait for each other by spinning, for milliseconds: where other processes want
    # the cores that costs ten times what it spares. libgomp reads this when torch is imported.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    occupy_standard_streams()
    ranks = _ranks(name)
    if ranks and ranks.rank:
        leave(import_module("launch.cli.rank").follow(ranks))
    now = time.time()
    started = time.localtime(ranks.started(now) if ranks else now)
    with TemporaryDirectory(prefix="samestep-") if _sweeps() else nullcontext("") as scratch:
        schema.register(time.strftime("%Y-%m-%d_%H-%M-%S", started), scratch)
        code = _compose(Door(name, work, prepare, alone, together), ranks, scratch)
    if ranks:
        ranks.stop()  # which do not fail with it: a launcher shows the cause alone
    leave(code)


def _ranks(name: str) -> Any:
    """The ranks that torchrun has started, None without it; exits where nothing can begin."""
    problem = _unreadable(sys.argv[1:])
    if not problem and (problem := torch_problem()) and os.environ.get("RANK", "0") != "0":
        sys.exit(2)  # rank 0 says it
    try:
        if not problem and check_torchrun(os.environ):
            return import_module("parallel.runtime").Ranks.of_torchrun()
    except ConfigError as error:
        problem = explain(name, error)
    if problem:
        write_error(problem)
        sys.exit(2)
    return None


def names_itself(words: Sequence[str]) -> bool:
    """Whether a new folder is named after the time; a restart by torchrun goes on in the old."""
    given = any(word.lstrip("+").startswith("run_dir=") for word in words)
    return not given and not restarts(os.environ)


def _unreadable(words: Sequence[str]) -> str:
    """What keeps a command from being read at all; empty = nothing.

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


def _compose(door: Door, ranks: Any, scratch: str) -> int:
    """Lets Hydra run every job of the command line; the exit status."""
    log_to_stderr(0)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # its errors come to us instead of to stderr
    keys = schema.free_text(door.name)
    if scratch:  # Hydra reads the flag in front of overrides only; a comma parts values
        words = sorted(sys.argv[1:], key=lambda word: word not in MULTIRUN)
        sys.argv[1:] = [quoted_values(word, keys) for word in words]
    else:
        sys.argv[1:] = [quoted(word, keys) for word in sys.argv[1:]]
    opened: Any = nullcontext()
    if scratch and door.name == "train":
        opened = import_module("launch.cli.sweep").Sweep(Path(scratch), names_itself(sys.argv[1:]))

    try:
        with opened as sweep:
            job = _job_of(door, ranks, bool(scratch), sweep)
            hydra.main(version_base="1.3", config_path=CONF, config_name=door.name)(job)()
        if door.prepared:
            function(door.together)(door.prepared)
        return sweep.code if sweep else 0
    except JobFailedError as failed:
        return failed.code
    except SystemExit as stop:
        return exit_code(stop)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        return _tell(door, error)


def _job_of(door: Door, ranks: Any, sweeps: bool, sweep: Any) -> Callable[[DictConfig], Any]:
    """What Hydra calls with each composed configuration."""

    def task(cfg: DictConfig) -> float | None:
        if sweep is not None:
            return sweep.run(cfg, lambda point, console: _run_job(door, point, ranks, console))
        try:
            _run_job(door, cfg, ranks)
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


def _run_job(door: Door, cfg: DictConfig, ranks: Any, console: Path | None = None) -> None:
    """Checks and prepares one composed job, then runs it on every rank.

    `console`: the file that new processes write to, of which there is then at least one; None =
    the terminal. JobFailedError if the job cannot begin, SystemExit if it fails.
    """
    with ExitStack() as held:
        _run_held(door, cfg, ranks, held, console)


def _run_held(
    door: Door, cfg: DictConfig, ranks: Any, held: ExitStack, console: Path | None
) -> None:
    try:
        config = schema.load(door.name, cfg)
        world_size = _world_size(config, ranks)
        if door.together:
            if _sweeps():
                config.run_dir = str(
                    Path(config.run_dir) / import_module("launch.cli.sweep").composed().name
                )
            door.prepared.append(function(door.prepare)(config))
            return
        if getattr(config, "device", "cpu") == "cuda":  # before anything is written
            runtime = import_module("parallel.runtime")
            runtime.choose_device("cuda", ranks.local_world_size if ranks else world_size)
        if door.prepare:
            config = function(door.prepare)(config, world_size, held)
        if door.alone and not ranks and world_size == 1 and not _strategy_given():
            function(door.alone)(config)
            return
    except AlreadyFinishedError as finished:
        log.info("%s", finished)
        return
    except Exception as error:
        raise JobFailedError(_tell(door, error), str(error).splitlines()[0]) from None
    job = {"door": door.name, "work": door.work, "config": asdict(config)}
    if ranks:
        ranks.post(job)
        import_module("launch.cli.rank").run(job, ranks)
    elif world_size > 1 or console:
        import_module("launch.cli.spawn").spawn(job | {"console": str(console or "")}, world_size)
    else:
        import_module("launch.cli.rank").run_alone(job)


def _tell(door: Door, error: Exception) -> int:
    """Writes a user's mistake as one message and a bug with its trace; the exit status."""
    if is_mistake(error):
        write_error(explain(door.name, error))
        return 2
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
    """As `quoted`, in a sweep: commas part values, and Hydra's own words (choice, glob) stay."""
    key, equals, text = argument.partition("=")
    if key.lstrip("+") not in keys or not equals or not text or SWEPT.match(text):
        return argument
    values = re.findall(rf"(?:{QUOTED.pattern}|[^,])+", text, re.DOTALL)
    return f"{key}={','.join(quoted(f'{key}={value}', keys)[len(key) + 1 :] for value in values)}"


def _in_quotes(text: str) -> str:
    # Hydra reads \" and, only in front of quotes, \\ inside a quoted value.
    escaped = re.sub(r'(\\*)(?="|\Z)', r"\1\1", protected(text)).replace('"', '\\"')
    return f'"{escaped}"'


def function(path: str) -> Any:
    """The function that "module:function" names."""
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)


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
