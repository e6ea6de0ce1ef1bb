"""Fuzz what a command runs in: `python tests/fuzz/environment.py cases=300 seed=0`, or `only=7`.

Each case is one command of launch/, as a process of its own, in an environment with one to three
oddities. It may end with a message of its own and say what is wrong; where it ends well, what it
has computed must be what it computes in a plain environment.
"""

import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import Random

ROOT = Path(__file__).parents[2]
PLAY = ROOT / "trainer/data/bundled/shakespeare/valid.txt"
SECONDS = 30.0  # that a command may take; one that takes more hangs
SMALL = [
    *("model.layers=1", "model.width=16", "model.heads=2", "model.kv_heads=2", "steps=2"),
    *("model.ffn_width=16", "data.vocab_size=300", "data.seq_len=16", "batch_size=4"),
    *("eval.every=0", "eval.samples=8", "metrics.every=1", "metrics.sample_tokens=4"),
    *("device=cpu", "precision=fp64", "seed=3"),
]
COMMANDS = {  # the words behind `python`; RUN is a trained run, NEW a folder to write to
    "train": ["launch/train.py", *SMALL, "run_dir=NEW"],
    "train on two ranks": ["launch/train.py", *SMALL, "run_dir=NEW", "launch.ranks=2"],
    "torchrun": [
        *("-m", "torch.distributed.run", "--nproc_per_node=2", "launch/train.py"),
        *(*SMALL, "run_dir=NEW"),
    ],
    "sweep": ["launch/train.py", *SMALL, "run_dir=NEW", "optim.lr=0.001,0.002", "-m"],
    "resume": ["launch/train.py", *SMALL, "run_dir=NEW/copy", "steps=2"],
    "prepare": ["launch/prepare.py", "data.vocab_size=300", "data.seq_len=16"],
    "generate": ["launch/generate.py", "run_dir=RUN", "prompt=O", "max_tokens=4"],
    "evaluate": ["launch/evaluate.py", "run_dir=RUN"],
    "export": ["launch/export.py", "run_dir=RUN", "to=NEW"],
    "checkpoint": ["launch/checkpoint.py", "verify", "RUN"],
    "report": ["launch/report.py", "RUN"],
    "help": ["launch/train.py", "--help"],
    "mistake": ["launch/train.py", "strategy=tensr"],
}
FINE, REFUSED = "fine", "refused"
FAULTS = ("traceback", "different", "hang", "silent")


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


@dataclass(frozen=True)
class Verdict:
    """What came of a case."""

    name: str
    result: str
    detail: str = ""
    seconds: float = 0.0


class Fuzzer:
    """Judges cases against what the commands do in a plain environment."""

    def __init__(self, folder: Path):
        self.folder = folder
        (folder / "play.txt").write_text(PLAY.read_text()[:30_000])
        self.data = [f"data.path={folder}/play.txt", f"data.cache={folder}/cache"]
        self.run_dir = folder / "run"
        words = self.words("train", self.run_dir)
        done = subprocess.run(
            [sys.executable, *words], env=plain(), capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        self.losses = losses(self.run_dir)
        self.plain = {name: self.output(name) for name in ("generate", "evaluate")}

    def words(self, command: str, new: Path) -> list[str]:
        """What is behind `python`, with scripts by their whole path."""
        with_data = (
            self.data if {"launch/train.py", "launch/prepare.py"} & set(COMMANDS[command]) else []
        )
        words = [*COMMANDS[command], *(with_data if command not in ("help", "mistake") else [])]
        named = [str(ROOT / word) if word.startswith("launch/") else word for word in words]
        ran = [word.replace("RUN", str(self.run_dir)) for word in named]
        return [word if str(new) == "" else word.replace("NEW", str(new)) for word in ran]

    def output(self, command: str) -> str:
        """What a command prints in a plain environment."""
        return subprocess.run(
            [sys.executable, *self.words(command, Path())],
            env=plain(),
            capture_output=True,
            text=True,
            check=True,
        ).stdout

    def case(self, number: int, seed: int, odd: Sequence[str] = ()) -> Verdict:
        """Make and judge one case; `odd`: its oddities, drawn where none are given."""
        rng = Random(f"{seed} {number}")
        command = list(COMMANDS)[number % len(COMMANDS)]
        odd = odd or rng.sample(sorted(ODDITIES), rng.choice((1, 1, 2, 3)))
        with tempfile.TemporaryDirectory(prefix="case-", dir=self.folder) as name, ExitStack() as h:
            words = self.words(command, Path("NEW"))
            setting = Setting(rng, Path(name), plain(), words, held=h)
            for oddity in odd:
                ODDITIES[oddity](setting)
            if command == "resume":
                shutil.copytree(self.run_dir, setting.folder / "new/copy")
            new = str(setting.folder / "new")
            setting.words = [word.replace("NEW", new) for word in setting.words]
            started = time.monotonic()
            code, output, error = run(setting)
            verdict = self.judge(command, setting, code, output, error)
        seconds = time.monotonic() - started
        label = f"{number}: {command} with {', '.join(odd)}"
        return Verdict(label, verdict[0], f"exit {code}; {verdict[1]}", seconds)

    def judge(
        self, command: str, setting: Setting, code: int, output: str, error: str
    ) -> tuple[str, str]:
        """Return the result and what is wrong."""
        said = error + output
        if code == HANG:
            return "hang", said[-2000:]
        if "Traceback" in ours(said) or "Exception ignored" in said or code in (-6, -11):
            return "traceback", said[-3000:]
        if command == "mistake":
            return (FINE, "") if code in (1, 2) else ("different", said)
        if code != 0:
            unheard = 2 in setting.streams or 1 in setting.streams
            if not unheard and not error.strip():
                return "silent", "no message"
            allowed = setting.may_refuse or 1 in setting.streams
            return (REFUSED, said[-300:]) if allowed else ("different", said[-2000:])
        return self._compare(command, setting, output)

    def _compare(self, command: str, setting: Setting, output: str) -> tuple[str, str]:
        if command in ("train", "train on two ranks", "torchrun", "resume"):
            new = next(w[8:] for w in setting.words if w.startswith("run_dir="))
            found = losses(Path(new))
            close = len(found) == len(self.losses) and all(
                abs(a - b) < 1e-9 for a, b in zip(found, self.losses, strict=True)
            )
            return (FINE, "") if close else ("different", f"losses {found}, not {self.losses}")
        if command in self.plain and 1 not in setting.streams:
            same = plain_words(output) == plain_words(self.plain[command])
            return (FINE, "") if same else ("different", f"{output}\nnot\n{self.plain[command]}")
        return FINE, ""


def plain_words(text: str) -> str:
    """Letters and numbers alone: not how they are wrapped, coloured, framed or escaped."""
    return "".join(
        re.findall(r"[a-zA-Z0-9.]+", re.sub(r"\x1b\[[\d;]*m|\\[xuU][0-9a-f]+", "", text))
    )


def ours(text: str) -> str:
    """What a command has written, without how torchrun itself ends."""
    its_own = r'Traceback [^\n]*\n +File "<frozen runpy>.*?(?=Traceback|\Z)'
    return re.sub(its_own, "", text, flags=re.DOTALL)


HANG = 10_000


def plain() -> dict[str, str]:
    """An environment without oddities."""
    kept = {k: v for k, v in os.environ.items() if k in ("PATH", "HOME", "LANG", "USER")}
    return kept | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def losses(folder: Path) -> list[float]:
    """The training losses that a run has written."""
    try:
        lines = (folder / "metrics.jsonl").read_text().splitlines()
    except OSError:
        return []
    return [line["loss"] for line in map(json.loads, lines) if "loss" in line]


def run(setting: Setting) -> tuple[int, str, str]:
    """Return the exit status, HANG after SECONDS, and what the command wrote to both streams."""
    folder = setting.folder
    for name in ("ü x", "ü 'x' \"y\" ${z}", "gone"):
        (folder / name).mkdir(exist_ok=True)

    def begin() -> None:
        for number in setting.ignored:
            signal.signal(number, signal.SIG_IGN)
        for number, name in setting.streams.items():
            if name:
                flags = os.O_RDONLY if number == 0 else os.O_WRONLY
                os.dup2(os.open(name, flags), number)
            else:
                os.close(number)
        if setting.working_dir.endswith("gone"):
            Path(setting.working_dir).rmdir()
        for kind, value in setting.limits.items():
            resource.setrlimit(kind, (value, value))

    process = subprocess.Popen(
        [sys.executable, *setting.words],
        env=setting.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        cwd=setting.working_dir or ROOT,
        umask=setting.umask,
        preexec_fn=begin,
        start_new_session=True,
    )
    try:
        output, error = process.communicate(timeout=SECONDS)
        code = process.returncode
    except subprocess.TimeoutExpired:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        output, error = process.communicate()
        code = HANG
    return code, output.decode(errors="replace"), error.decode(errors="replace")


def main() -> int:
    """Run what the command line asks for, and print each fault and a table."""
    keys = dict(argument.partition("=")[::2] for argument in sys.argv[1:])
    seed, started = int(keys.get("seed", 0)), time.monotonic()
    numbers = [int(keys["only"])] if "only" in keys else range(int(keys.get("cases", 300)))
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        fuzzer = Fuzzer(Path(name))
        with ThreadPoolExecutor(int(keys.get("workers", 2))) as pool:
            verdicts = []
            for verdict in pool.map(partial(fuzzer.case, seed=seed), numbers):
                verdicts.append(verdict)
                if verdict.result in FAULTS or "only" in keys:
                    say(f"{verdict.result}: {verdict.name}\n{verdict.detail}\n", flush=True)
    counts = Counter(verdict.result for verdict in verdicts)
    say("  ".join(f"{name} {counts[name]}" for name in (FINE, REFUSED, *FAULTS)))
    slowest = max(verdicts, key=lambda verdict: verdict.seconds)
    say(f"{time.monotonic() - started:.0f} s; slowest {slowest.seconds:.0f} s: {slowest.name}")
    return sum(counts[name] for name in FAULTS)


say = print


if __name__ == "__main__":
    sys.exit(bool(main()))
