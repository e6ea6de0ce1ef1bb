"""The entry point of every command: rank 0 composes the configuration and sends it to all ranks.

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
    ensure_standard_streams,
    exit_code,
    explain_error,
    is_mistake,
    log_to_stderr,
    stdout_problem,
    write_error,
)
from parallel.errors import ConfigError, UserError
from parallel.strategy import check_torchrun, restart_count
from trainer.run.free_text import MARK, escape_text
from trainer.run.run_dir import AlreadyFinishedError

CONF = str(Path(schema.__file__).parent)
MULTIRUN = ("-m", "--multirun")
QUOTED = re.compile(r"'(?:\\.|[^'\\])*'|\"(?:\\.|[^\"\\])*\"", re.DOTALL)
SWEPT = re.compile(r"(choice|range|interval|glob|shuffle|sort|tag)\(.*\)\Z", re.DOTALL)
EXIT_SECONDS = 10.0  # limit for the exit of a process

log = logging.getLogger(__name__)


@dataclass
class Command:
    """One command of launch/: its name, which is that of its YAML file, and its functions."""

    name: str
    # Runs once, before any rank works: (config, world_size, held) → completed config, where `held`
    # is an ExitStack that is closed when the job has ended. With `together`: (config) → anything.
    check_config: Callable[..., Any]
    run_on_rank: Callable[..., None] | None = None  # runs on every rank: (config, runtime)
    # Runs once in this process in place of ranks, where they were not asked for: (config).
    run_in_process: Callable[..., None] | None = None
    # Runs once in this process in place of all work: (everything that `prepare` returned), when
    # all jobs of the command line are found to be good.
    run_on_all_points: Callable[..., None] | None = None
    prepared: list[Any] = field(default_factory=list)


def run_command(command: Command) -> None:
    """Run a command on all of its ranks and exit.

    Status 0 = done, 1 = failed, 2 = a mistake in configuration or data, 75 = stopped by a signal
    (the same command resumes), 77 = a rank hung, 128 + n = killed at once by signal n.
    """
    # When a launcher ends before its ranks torch writes a C++ trace of each lost connection.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # OpenMP's threads wait for each other by spinning, for milliseconds: where other processes want
    # the cores that costs ten times what it spares. libgomp reads this when torch is imported.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    ensure_standard_streams()
    ranks = _torchrun_queue(command.name)
    if ranks and ranks.rank:
        from launch.cli.rank import run_posted_jobs

        exit_process(run_posted_jobs(ranks, command.run_on_rank))
    now = time.time()
    started = time.localtime(ranks.launch_time(now) if ranks else now)
    with TemporaryDirectory(prefix="samestep-") if _is_multirun() else nullcontext("") as scratch:
        stamp = time.strftime("%Y-%m-%d_%H-%M-%S", started)
        schema.register_schemas(stamp, scratch, [command.name])
        code = _run_hydra(command, ranks, scratch)
    if ranks:
        ranks.close_queue()  # the ranks exit cleanly, so that the launcher shows only the cause
    exit_process(code)


def _torchrun_queue(name: str) -> Any:
    """Return the job queue of torchrun's ranks, None without torchrun; exits if it cannot start."""
    problem = _why_unreadable(sys.argv[1:])
    if not problem and (problem := torch_problem()) and os.environ.get("RANK", "0") != "0":
        sys.exit(2)  # rank 0 prints the error
    try:
        if not problem and check_torchrun(os.environ):
            from parallel.runtime import JobQueue

            return JobQueue.from_torchrun()
    except UserError as error:
        problem = explain_error(name, error)
    if problem:
        write_error(problem)
        sys.exit(2)
    return None


def has_own_name(words: Sequence[str]) -> bool:
    """Return whether a new folder is named after the time; a restart by torchrun reuses the old."""
    given = any(word.lstrip("+").startswith("run_dir=") for word in words)
    return not given and not restart_count(os.environ)


def _why_unreadable(words: Sequence[str]) -> str:
    """Return the reason that the command line cannot be decoded; empty if it can.

    Python represents bytes outside the locale's encoding as lone surrogates.
    """
    try:
        if "${" in str(Path.cwd()):
            return "the working directory has a ${ in its name, which Hydra fills in; change it"
    except FileNotFoundError:
        return "the working directory is gone; change to one that is there"
    try:
        gettempdir()
    except FileNotFoundError:  # torch cannot be imported without it
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


def exit_process(code: int) -> NoReturn:
    """Exit soon: remaining threads and process groups must not keep a finished process alive."""

    def end_process() -> None:
        threading.main_thread().join()
        time.sleep(EXIT_SECONDS)
        os._exit(code)

    threading.Thread(target=end_process, daemon=True).start()
    sys.exit(code)


def _run_hydra(command: Command, ranks: Any, scratch: str) -> int:
    """Let Hydra run every job of the command line; return the exit status."""
    log_to_stderr(0)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises its errors instead of printing them
    keys = schema.free_text(command.name)
    if scratch:  # Hydra reads the flag in front of overrides only; a comma parts values
        words = sorted(sys.argv[1:], key=lambda word: word not in MULTIRUN)
        sys.argv[1:] = [quoted_values(word, keys) for word in words]
    else:
        sys.argv[1:] = [quote_value(word, keys) for word in sys.argv[1:]]
    opened: Any = nullcontext()
    if scratch and command.name == "train":
        from launch.cli.sweep import Sweep

        opened = Sweep(Path(scratch), has_own_name(sys.argv[1:]))

    try:
        with opened as sweep:
            job = _hydra_task(command, ranks, bool(scratch), sweep)
            hydra.main(version_base="1.3", config_path=CONF, config_name=command.name)(job)()
        if command.run_on_all_points and command.prepared:
            command.run_on_all_points(command.prepared)
        return sweep.code if sweep else 0
    except JobFailedError as failed:
        return failed.code
    except SystemExit as stop:
        return exit_code(stop)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        return _print_error(command, error)


def _hydra_task(
    command: Command, ranks: Any, sweeps: bool, sweep: Any
) -> Callable[[DictConfig], Any]:
    """Return the function that Hydra calls with each composed configuration."""

    def run_point(cfg: DictConfig) -> float | None:
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

    return run_point


def _is_multirun() -> bool:
    return any(word in MULTIRUN for word in sys.argv[1:])


def _run_job(command: Command, cfg: DictConfig, ranks: Any, console: Path | None = None) -> None:
    """Check and prepare one composed job, then run it on every rank.

    `console` is the file that new processes write to (at least one is started then); None = the
    terminal. Raises JobFailedError if the job cannot start, SystemExit if it fails.
    """
    with ExitStack() as held:
        _run_held(command, cfg, ranks, held, console)


def _run_held(
    command: Command, cfg: DictConfig, ranks: Any, held: ExitStack, console: Path | None
) -> None:
    try:
        config = schema.build_config(command.name, cfg)
        world_size = _world_size(config, ranks)
        if command.run_on_all_points:
            if _is_multirun():
                from launch.cli.sweep import composed_job

                config.run_dir = str(Path(config.run_dir) / composed_job().folder_name)
            command.prepared.append(command.check_config(config))
            return
        if getattr(config, "device", "cpu") == "cuda":  # before anything is written
            from parallel.runtime import choose_device

            choose_device("cuda", ranks.local_world_size if ranks else world_size)
        config = command.check_config(config, world_size, held)
        if command.run_in_process and not ranks and world_size == 1 and not _strategy_given():
            command.run_in_process(config)
            return
    except AlreadyFinishedError as finished:
        log.info("%s", finished)
        return
    except Exception as error:
        raise JobFailedError(_print_error(command, error), str(error).splitlines()[0]) from None
    _start_job(
        command, {"command": command.name, "config": asdict(config)}, ranks, world_size, console
    )


def _start_job(
    command: Command, job: dict[str, Any], ranks: Any, world_size: int, console: Path | None
) -> None:
    """Run a job on torchrun's ranks, on new processes, or in this process."""
    from launch.cli.rank import run_alone, run_rank

    if ranks:
        ranks.post_job(job)
        run_rank(job, ranks, command.run_on_rank)
    elif world_size > 1 or console:
        from launch.cli.spawn import spawn_ranks

        spawn_ranks(job | {"console": str(console or "")}, world_size, command.run_on_rank)
    else:
        run_alone(job, command.run_on_rank)


def _print_error(command: Command, error: Exception) -> int:
    """Print a user's mistake as one message and a bug with its trace; return the exit status."""
    if is_mistake(error):
        write_error(explain_error(command.name, error))
        return getattr(error, "status", 2)
    if isinstance(error, OSError) and error.filename:
        write_error(f"{error.filename} cannot be used: {error.strerror}")
    else:
        write_error(stdout_problem(error) or traceback.format_exc())
    return 1


def quote_value(argument: str, keys: Collection[str]) -> str:
    """Return KEY=VALUE with the value quoted, if the key takes free text.

    The value may then hold characters that Hydra and OmegaConf would interpret. A quoted value is
    unchanged.
    """
    key, equals, text = argument.partition("=")
    if key.lstrip("+") not in keys or not equals or not text:
        return argument
    if QUOTED.fullmatch(text):
        inside = text[1:-1]
        kept = inside.startswith(MARK) or escape_text(inside) == inside  # a script's own words
        return argument if kept else f'{key}="{escape_text(inside)}"'
    return f"{key}={_in_quotes(text)}"


def quoted_values(argument: str, keys: Collection[str]) -> str:
    """Quote the values of a sweep, separated by commas; Hydra's functions (choice, glob) stay."""
    key, equals, text = argument.partition("=")
    if key.lstrip("+") not in keys or not equals or not text or SWEPT.match(text):
        return argument
    values = re.findall(rf"(?:{QUOTED.pattern}|[^,])+", text, re.DOTALL)
    return (
        f"{key}={','.join(quote_value(f'{key}={value}', keys)[len(key) + 1 :] for value in values)}"
    )


def _in_quotes(text: str) -> str:
    # Hydra reads \" and, only in front of quotes, \\ inside a quoted value.
    escaped = re.sub(r'(\\*)(?="|\Z)', r"\1\1", escape_text(text)).replace('"', '\\"')
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
