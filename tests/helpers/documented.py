"""The commands that README.md and docs/ name, and how each is run in seconds."""

import json
import os
import re
import shlex
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import NoReturn

import numpy as np
import soundfile
from boxed import write_coco
from forked import ROOT, call_in_fork, run_script
from model_folder import write_model_folder
from PIL import Image
from tiny import speech_data
from whisper_folder import RATE, make_tone, write_whisper_folder

from launch.cli import entrypoint
from trainer.verify import compare

BUNDLED = files("trainer.data") / "bundled"
FENCE = re.compile(r"^ *```\w*\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`((?:python|torchrun|pytest) [^`\n]+)`")
COMMAND = re.compile(r"(?:\$ )?((?:[A-Z_]+=\S+ +)*(?:python|torchrun|make|pytest) .*)")
RECORDS = ("docs/benchmarks.md",)  # its text names the commands of measurements that are done
CHECKED = "checked, not started"
TIMEOUT_SECONDS = 900.0

SLURM = "needs Slurm"
HOSTS = "needs two hosts"
PRESET = "tests/launch/test_presets.py trains each preset on eight ranks"
CALIBRATED = "tests/trainer/plan/test_fit_calibration.py calibrates two ranks"
NETWORK = "makes a virtual environment from the network"
# Commands that are not run → why. The tests refuse entries that no page has.
NOT_RUN = {
    "make train": NETWORK,
    "make test": NETWORK,
    "pytest tests/launch/test_slurm.py -rP": "needs root and Slurm's packages",
    "python tests/helpers/slurm_lab.py /tmp/lab": "needs root and Slurm's packages",
    "python launch/submit.py status runs/small": SLURM,
    "python launch/submit.py status runs/big": SLURM,
    "python launch/submit.py logs runs/big": SLURM,
    "python launch/submit.py cancel runs/big": SLURM,
    "torchrun --nnodes=2 --nproc_per_node=8 --rdzv-backend=c10d --rdzv-endpoint=host1:29400 "
    "--rdzv-id=big launch/train.py strategy=fsdp run_dir=runs/big": HOSTS,
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun --nnodes=1:2 --max-restarts=9 … "
    "launch/train.py strategy=hsdp strategy.elastic=true run_dir=runs/big": HOSTS,
    "torchrun --nproc_per_node=4 launch/train.py -m …": "an outline",
    "python launch/plan.py model=llama-70b cluster=h100 data.seq_len=8192 batch_size=512 "
    "tokens=15e12 dollars_per_gpu_hour=2.5": "tests/launch/test_plan.py plans smaller models",
    "python launch/plan.py model=llama-405b cluster=h100 cluster.nodes=2048 data.seq_len=8192 "
    "batch_size=16384": "half a minute",
    "python benchmarks/published_runs.py published-calibrate.csv --fit": "needs published runs",
    "python benchmarks/plan_cpu.py": "needs a quiet machine for five minutes",
    "python benchmarks/plan_cpu.py ranks=N steps=30": "needs a quiet machine for ten minutes",
    "python benchmarks/gpu.py": "needs a GPU",
    "python benchmarks/gpu.py device=cpu": "tests/test_gpu_checks.py runs a short form of it",
    "python launch/plan.py calibrate launch.ranks=2 batch_size=8": CALIBRATED,
    "torchrun --nproc_per_node=8 launch/plan.py calibrate model=llama-8b data.seq_len=8192": (
        CALIBRATED
    ),
    "python launch/train.py -m run_dir=runs/tuned hydra/sweeper=optuna hydra.sweeper.n_trials=20 "
    "hydra.sweeper.n_jobs=1 hydra.sweeper.max_failure_rate=1 "
    "'optim.lr=tag(log,interval(1e-4,1e-2))'": "needs hydra-optuna-sweeper",
}
# Commands that are composed and checked as always, but whose work is not started → why.
ONLY_CHECKED = {
    "torchrun --nproc_per_node=8 launch/train.py strategy=tensor": PRESET,
    "torchrun --nproc_per_node=8 launch/train.py strategy=hybrid": PRESET,
    "torchrun --nproc_per_node=4 launch/train.py strategy=hsdp": PRESET,
    "python launch/verify.py": "ten minutes",
    "python launch/verify.py backend=nccl_like": "half an hour",
}
STATUSES = {  # the exit statuses other than 0
    "python launch/train.py precision=fp31 batch_size=10 micro_batch_size=3 model.heads=5": 2,
    "python launch/checkpoint.py diff runs/A runs/B": 1,
}
# What makes a command short, unless it sets the key itself.
SHORT_TRAINING = [
    *("steps=2", "batch_size=8", "optim.warmup_steps=0", "metrics.every=1"),
    *("metrics.sample_tokens=0", "eval.every=0", "eval.samples=8", "eval.test=false"),
]
SHORT = {
    "launch/train.py": SHORT_TRAINING,
    "launch/submit.py": ["--dry-run"],
    "launch/evaluate.py": ["samples=8"],
    "launch/generate.py": ["max_tokens=8"],
    "launch/compress_report.py": ["rounds=1"],
}
SHORTER = {
    "cases=6600": "cases=20",
    "data.path=FOLDER": "data.path=my-corpus",
    "optim.lr=1e-3,3e-4": "optim.lr=1e-3",
    "compress=none,merge,[merge,int4]": "compress=merge,[merge,int4]",
}
SMALL_DATA = ["data.vocab_size=512"]  # for texts as short as those of `make_inputs`
# The runs that the pages name and no command makes.
RUNS = {
    "runs/RUN": [],
    "runs/BOOK": ["data=text", "data.path=my-book.txt"],
    "runs/B": ["experiment=images"],
    "runs/PAIRS": ["experiment=translation"],
    "runs/CHAT": ["experiment=chat"],
    "runs/SPEECH": ["experiment=speech"],
}
# The run that is read, by a part of the command or its comment.
READ_RUNS = {
    "a translation run": ("runs/RUN", "runs/PAIRS"),
    "an image run": ("runs/RUN", "runs/B"),
    "a chat run": ("runs/RUN", "runs/CHAT"),
    "of a speech run": ("runs/NAME", "runs/SPEECH"),
    "launch/teach.py": ("runs/RUN", "runs/BOOK"),  # the full play takes a minute
    "runs/NAME": ("runs/NAME", "runs/RUN"),
}


@dataclass(frozen=True)
class Documented:
    """One command of a page."""

    page: str
    text: str  # without its comment
    comment: str = ""

    @property
    def script(self) -> str:
        """The file that it runs."""
        return next((word for word in shlex.split(self.text) if word.endswith(".py")), "")

    @property
    def ranks(self) -> int:
        """The number of ranks that torchrun starts; 0 without torchrun."""
        found = re.search(r"--nproc_per_node=(\d+)", self.text)
        return int(found[1]) if found else 0

    @property
    def made(self) -> str:
        """The folder of the run or export that it makes; empty = none with a name."""
        key = {"launch/train.py": "run_dir"}.get(self.script, "output_dir")
        found = re.search(rf" {key}=(runs/[\w-]+)", self.text)
        return found[1] if found else ""

    @property
    def read(self) -> set[str]:
        """The folders of runs that it reads."""
        return set(re.findall(r"runs/[\w-]+", self.text)) - {self.made}

    def short_arguments(self, number: int) -> list[str]:
        """Return the arguments after the script, shortened; `number` names an unnamed run."""
        text = self.text
        for part, (name, run) in READ_RUNS.items():
            if part in f"{self.text} {self.comment}":
                text = text.replace(name, run)
        words = shlex.split(text)
        given = [SHORTER.get(word, word) for word in words[words.index(self.script) + 1 :]]
        if "--help" in given:
            return given
        more = list(SHORT.get(self.script, []))
        if self.script == "launch/train.py":
            more.append(f"run_dir=runs/unnamed-{number}")
            if "init_from=my-" not in text:  # a folder that has a depth of its own
                more.append("model.layers=2")
        if re.search("data.path=(my-book|my-corpus|my-pairs|my-chats|my-labels|FOLDER)", text):
            more += SMALL_DATA
        keys = {word.partition("=")[0] for word in given}
        return [*given, *(word for word in more if word.partition("=")[0] not in keys)]


@dataclass
class Outcome:
    """What a command left."""

    status: int | None  # None = it did not end in time
    output: str = ""


@dataclass
class Runner:
    """Runs commands in one folder, in forks of a process that has imported torch."""

    folder: Path
    started: int = 0
    outcomes: dict[str, Outcome] = field(default_factory=dict)

    def run_all(self, commands: list[Documented]) -> None:
        """Run the commands two at a time, those that read a run after the one that makes it."""
        self._run_together([Documented("", _training(run)) for run in RUNS])
        for ready in rounds(commands):
            self._run_together(ready)

    def _run_together(self, commands: list[Documented]) -> None:
        numbers = range(self.started, self.started + len(commands))
        self.started += len(commands)
        with ThreadPoolExecutor(2) as threads:
            outcomes = threads.map(self._run, commands, numbers)
            texts = (command.text for command in commands)
            self.outcomes |= dict(zip(texts, outcomes, strict=True))

    def _run(self, command: Documented, number: int) -> Outcome:
        output = self.folder / f"output-{number}.txt"
        output.touch()
        status = call_in_fork(TIMEOUT_SECONDS, _run_script, command, number, output)
        return Outcome(status, output.read_text())


def _training(run: str) -> str:
    return shlex.join(["python", "launch/train.py", *RUNS[run], f"run_dir={run}"])


def _run_script(command: Documented, number: int, output: Path) -> None:
    """Run a documented command in this process, with its output in a file."""
    words = [str(ROOT / command.script), *command.short_arguments(number)]
    ranks = command.ranks
    if command.text in ONLY_CHECKED:
        entrypoint._start_job = _report_checked
        compare.verify_all = _report_checked
        words += [f"launch.ranks={ranks}"] if ranks else []
        ranks = 0
    run_script(words, output.parent, output, ranks)


def _report_checked(*_: object) -> NoReturn:
    os.write(1, CHECKED.encode())
    raise SystemExit(0)


def rounds(commands: list[Documented]) -> Iterator[list[Documented]]:
    """Yield the commands in groups, each of which reads only what the groups before it make."""
    waiting = list(commands)
    while waiting:
        to_come = {command.made for command in waiting}
        ready = [command for command in waiting if not command.read & to_come]
        assert ready, f"each of these waits for another: {waiting}"
        yield ready
        waiting = [command for command in waiting if command not in ready]


def documented_commands() -> list[Documented]:
    """Return every command of a code block or of the text, each once."""
    found: dict[str, Documented] = {}
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        page = str(path.relative_to(ROOT))
        text = path.read_text(encoding="utf-8")
        lines = [
            line
            for block in FENCE.findall(text)
            for line in block.replace("\\\n", " ").splitlines()
        ]
        if page not in RECORDS:
            spans = SPAN.findall(FENCE.sub("", text))
            lines += [span for span in spans if ".py" in span and "=…" not in span]
        for line in lines:
            if match := COMMAND.fullmatch(line.strip()):
                command, _, comment = match[1].partition(" #")
                command = re.sub(" +", " ", command.strip())
                found.setdefault(command, Documented(page, command, comment.strip()))
    return list(found.values())


def make_inputs(folder: Path) -> None:
    """Write the data that the pages name as the reader's own."""
    play = (BUNDLED / "shakespeare" / "train.txt").read_text()[:100_000]
    (folder / "my-book.txt").write_text(play)
    (folder / "my-corpus").mkdir()
    for split in ("train", "valid", "test"):
        (folder / "my-corpus" / f"{split}.txt").write_text(play[:80_000])
    pairs = [f"turn on lamp {number}\tschalte Lampe {number} ein\n" for number in range(2000)]
    (folder / "my-pairs.tsv").write_text("".join(pairs))
    labelled = [f"o{'nf'[number % 2]}\tswitch lamp {number}\n" for number in range(500)]
    (folder / "my-labels.tsv").write_text("".join(labelled))
    chats = [
        {"prompt": f"is lamp {number} on?", "completion": f"lamp {number} is off"}
        for number in range(500)
    ]
    (folder / "my-chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    speech_data(folder / "my-recordings")
    write_model_folder(folder / "my-model", play)
    write_whisper_folder(folder / "my-whisper", positions=1500, text_positions=256)
    soundfile.write(folder / "file.wav", make_tone(1.0), RATE)
    write_coco(folder / "my-boxes", {"train": 8, "valid": 2, "test": 2})
    draw = np.random.default_rng(0)
    for number in range(60):
        picture = folder / "my-photos" / "ab"[number % 2] / f"{number}.png"
        picture.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 255, (28, 28), dtype=np.uint8)).save(picture)
