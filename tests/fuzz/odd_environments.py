"""Oddities of the environment that a command is started in."""

import resource
import socket
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from random import Random


@dataclass
class Setting:
    """How a command is started; oddities change it."""

    rng: Random
    folder: Path  # of this case alone
    environment: dict[str, str]
    words: list[str] = field(default_factory=list)
    limits: dict[int, int] = field(default_factory=dict)
    streams: dict[int, str] = field(default_factory=dict)  # number → file, or "" = closed
    working_dir: str = ""
    umask: int = -1
    ignored: list[int] = field(default_factory=list)  # signals
    held: ExitStack = field(default_factory=ExitStack)
    may_refuse: bool = False  # else it must do its work


Oddity = Callable[[Setting], None]


def variable(name: str, *values: str | None, may_refuse: bool = False) -> Oddity:
    """One of these values, of which None takes the variable away."""

    def apply(setting: Setting) -> None:
        value = setting.rng.choice(values)
        setting.environment.pop(name, None)
        if value is not None:
            setting.environment[name] = value.replace("FOLDER", str(setting.folder))
        setting.may_refuse |= may_refuse

    return apply


def stream(number: int, *files: str) -> Oddity:
    """A standard stream that is closed, full, or something else."""

    def apply(setting: Setting) -> None:
        setting.streams[number] = setting.rng.choice(files)

    return apply


def limit(kind: int, *values: int) -> Oddity:
    """A limit of the operating system's, which may keep the command from its work."""

    def apply(setting: Setting) -> None:
        setting.limits[kind] = setting.rng.choice(values)
        # Python would leave half a .pyc behind, for all that come after.
        setting.environment["PYTHONDONTWRITEBYTECODE"] = "1"
        setting.may_refuse = True

    return apply


def port_taken(setting: Setting) -> None:
    """The port that torchrun's store would listen on is another's."""
    taken = setting.held.enter_context(socket.socket())
    taken.bind(("127.0.0.1", 0))
    taken.listen()
    setting.environment["MASTER_PORT"] = str(taken.getsockname()[1])


def working_dir(setting: Setting) -> None:
    """Started elsewhere, with scripts named by their whole path."""
    place = setting.rng.choice(("/", "/proc", "FOLDER/ü 'x' \"y\" ${z}", "FOLDER/gone"))
    setting.working_dir = place.replace("FOLDER", str(setting.folder))
    setting.may_refuse |= place not in ("/",)


def run_dir(setting: Setting) -> None:
    """A run folder where none can be, or with a name that few would give."""
    place = setting.rng.choice(
        (
            "/dev/null/x",
            "/proc/x",
            "/sys/x",
            "/dev/full",
            "FILE",
            "FILE/x",
            "FOLDER/" + "n" * 300,
            "FOLDER/a b",
            "FOLDER/ü",
            "FOLDER/a=b,c",
            "FOLDER/new\nline",
            "FOLDER/${x}",
            "FOLDER/'q'",
            "FOLDER/link",
            "FOLDER/" + "deep/" * 40 + "er",
        )
    )
    setting.may_refuse = True
    (setting.folder / "file").write_text("not empty")
    (setting.folder / "link").symlink_to(setting.folder / "nowhere")
    place = place.replace("FILE", f"{setting.folder}/file").replace("FOLDER", str(setting.folder))
    setting.words = [word.replace("NEW", place) for word in setting.words]


def umask(setting: Setting) -> None:
    """Files that others, or nobody, may read."""
    setting.umask = setting.rng.choice((0o077, 0o000, 0o027, 0o222, 0o777))
    setting.may_refuse |= setting.umask in (0o222, 0o777)


ODDITIES: dict[str, Oddity] = {
    "HOME": variable("HOME", None, "", "/nowhere", "/dev/null", "/", ".", "/proc", "~"),
    "TMPDIR": variable("TMPDIR", "", "/nowhere", "/dev/null", "FOLDER/ü x", "/proc", "."),
    "TZ": variable("TZ", "", "Nowhere/City", "UTC+25", ":/etc/localtime", "Asia/Kolkata", "X"),
    "locale": variable("LC_ALL", "C", "POSIX", "xx_YY.UTF-8", "tr_TR.UTF-8", "", "de_DE@euro"),
    "LANG": variable("LANG", None, "C", "zz"),
    "console's encoding": variable(
        "PYTHONIOENCODING", "ascii", "latin1", "utf-16", "cp1252", ":strict", "ascii:strict"
    ),
    "UTF-8 mode": variable("PYTHONUTF8", "0", "1"),
    "warnings": variable("PYTHONWARNINGS", "default", "always", "ignore"),
    "optimised": variable("PYTHONOPTIMIZE", "1", "2"),
    "unbuffered": variable("PYTHONUNBUFFERED", "1"),
    "hash seed": variable("PYTHONHASHSEED", "0", "77"),
    "developer mode": variable("PYTHONDEVMODE", "1"),
    "safe path": variable("PYTHONSAFEPATH", "1"),
    "columns": variable("COLUMNS", "0", "1", "7", "-1", "x", "100000", ""),
    "lines": variable("LINES", "0", "1", "x"),
    "terminal": variable("TERM", "", "dumb", "unknown", "xterm-256color", None),
    "colours": variable("FORCE_COLOR", "1", "0"),
    "no colours": variable("NO_COLOR", "1"),
    "user": variable("USER", None, "", "ü"),
    "log name": variable("LOGNAME", None, ""),
    "path": variable("PATH", "", "/nowhere", None),
    "cache of others": variable("XDG_CACHE_HOME", "/nowhere", "/dev/null", ""),
    "matplotlib's folder": variable("MPLCONFIGDIR", "/proc/x", "/dev/null"),
    "threads": variable("OMP_NUM_THREADS", "0", "-1", "x", "", "3"),
    "wait policy": variable("OMP_WAIT_POLICY", "ACTIVE", "passive", "x"),
    "devices": variable("CUDA_VISIBLE_DEVICES", "", "7", "-1", "x"),
    "a rank alone": variable("RANK", "0", "3", "", "x", may_refuse=True),
    "a size alone": variable("WORLD_SIZE", "1", "4", "x", ""),
    "a local rank alone": variable("LOCAL_RANK", "0", "5", "x", may_refuse=True),
    "an address alone": variable("MASTER_ADDR", "localhost", "nowhere.invalid", ""),
    "a job of Slurm": variable("SLURM_JOB_ID", "12", "x", ""),
    "tasks of Slurm": variable("SLURM_NTASKS", "4", "x", ""),
    "restarts": variable("TORCHELASTIC_RESTART_COUNT", "1", "x", ""),
    "an error file": variable("TORCHELASTIC_ERROR_FILE", "/proc/x", "", "FOLDER/error.json"),
    "Hydra's errors": variable("HYDRA_FULL_ERROR", "0", "1"),
    "wandb": variable("WANDB_MODE", "disabled", "x"),
    "a taken port": port_taken,
    "stdin": stream(0, "", "/dev/zero", "/dev/full"),
    "stdout": stream(1, "", "/dev/full"),
    "stderr": stream(2, "", "/dev/full"),
    "file size": limit(resource.RLIMIT_FSIZE, 0, 100, 3000, 30_000),
    "open files": limit(resource.RLIMIT_NOFILE, 64, 256),
    "core files": limit(resource.RLIMIT_CORE, 0),
    "stack": limit(resource.RLIMIT_STACK, 1 << 20),
    "working directory": working_dir,
    "run folder": run_dir,
    "umask": umask,
    "no hangups": lambda setting: setting.ignored.append(1),
    "no interrupts": lambda setting: setting.ignored.append(2),
}
