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
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random

from odd_environments import ODDITIES, Setting

ROOT = Path(__file__).parents[2]
PLAY = ROOT / "trainer/data/bundled/shakespeare/valid.txt"
# That a command may take; one that takes more hangs. A sweep takes 12 s on a quiet machine.
SECONDS = 180.0
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
    "a finished run": ["launch/train.py", *SMALL, "run_dir=NEW/copy", "steps=2"],
    "prepare": ["launch/prepare.py", "data.vocab_size=300", "data.seq_len=16"],
    "generate": ["launch/generate.py", "run_dir=RUN", "prompt=O", "max_tokens=4"],
    "evaluate": ["launch/evaluate.py", "run_dir=RUN"],
    "export": ["launch/export.py", "run_dir=RUN", "output_dir=NEW"],
    "checkpoint": ["launch/checkpoint.py", "verify", "RUN"],
    "report": ["launch/report.py", "RUN"],
    "help": ["launch/train.py", "--help"],
    "mistake": ["launch/train.py", "strategy=tensr"],
}
FINE, REFUSED = "fine", "refused"
FAULTS = ("traceback", "different", "hang", "silent")


@dataclass(frozen=True)
class Verdict:
    """The result of a case."""

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
        self.in_plain("train")
        self.losses = losses(self.run_dir)
        self.plain = {name: self.in_plain(name) for name in ("generate", "evaluate")}

    def words(self, command: str) -> list[str]:
        """Return what is behind `python`, with scripts by their whole path; NEW stands still."""
        words = list(COMMANDS[command])
        if any(word.startswith("run_dir=NEW") for word in words) or command == "prepare":
            words += self.data
        words = [str(ROOT / word) if word.startswith("launch/") else word for word in words]
        return [word.replace("RUN", str(self.run_dir)) for word in words]

    def in_plain(self, command: str) -> str:
        """Return what a command prints in a plain environment."""
        words = [word.replace("NEW", str(self.run_dir)) for word in self.words(command)]
        done = subprocess.run(
            [sys.executable, *words], env=plain(), capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def case(self, number: int, seed: int, odd: Sequence[str] = ()) -> Verdict:
        """Make and judge one case; `odd`: its oddities, drawn where none are given."""
        rng = Random(f"{seed} {number}")
        command = list(COMMANDS)[number % len(COMMANDS)]
        odd = odd or rng.sample(sorted(ODDITIES), rng.choice((1, 1, 2, 3)))
        with tempfile.TemporaryDirectory(prefix="case-", dir=self.folder) as name, ExitStack() as h:
            setting = Setting(rng, Path(name), plain(), self.words(command), held=h)
            for oddity in odd:
                ODDITIES[oddity](setting)
            if command == "a finished run":
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
        if command in ("train", "train on two ranks", "torchrun", "a finished run"):
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
    """Return what a command has written, without how torchrun itself ends."""
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
