"""The commands that README.md and docs/ name; `python tests/helpers/documented.py` runs them all.

`only=TEXT` runs those that hold a text. Training is cut to two steps of a small model; the inputs
and runs that the pages speak of are made first.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np
from PIL import Image

say = print
ROOT = Path(__file__).parents[2]
BUNDLED = files("trainer.data") / "bundled"
FENCE = re.compile(r"^ *```\w*\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`((?:python|torchrun) [^`\n]+)`")
COMMAND = re.compile(r"(?:\$ )?((?:[A-Z_]+=\S+ +)*(?:python|torchrun|make|pytest) .*)")
SHORT = [
    *("steps=2", "metrics.every=1", "metrics.sample_tokens=0", "eval.every=0"),
    *("eval.samples=8", "eval.test=false"),
]
# The runs that the pages name, and how they are made here.
RUNS = {
    "RUN": ["data.seq_len=32"],
    "A": ["experiment=images", "compress=[merge,int8]"],
    "B": ["experiment=images"],
    "TRANSLATION": ["experiment=translation"],
}
# What cannot run on one host without a network → why. The test refuses entries no page has.
ELSEWHERE = {
    "make train": "makes a virtual environment from the network",
    "make test": "makes a virtual environment from the network, and runs this test",
    "pytest tests/launch/test_slurm.py -rP": "needs root and Slurm's packages",
    "python launch/submit.py status runs/small": "needs Slurm",
    "python launch/submit.py status runs/big": "needs Slurm",
    "python launch/submit.py logs runs/big": "needs Slurm",
    "python launch/submit.py cancel runs/big": "needs Slurm",
    "python launch/train.py -m run_dir=runs/tuned hydra/sweeper=optuna hydra.sweeper.n_trials=20 "
    "hydra.sweeper.n_jobs=1 hydra.sweeper.max_failure_rate=1 "
    "'optim.lr=tag(log,interval(1e-4,1e-2))'": "needs hydra-optuna-sweeper",
    "torchrun --nnodes=2 --nproc_per_node=8 --rdzv-backend=c10d --rdzv-endpoint=host1:29400 "
    "--rdzv-id=big launch/train.py strategy=fsdp run_dir=runs/big": "needs two hosts",
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun --nnodes=1:2 --max-restarts=9 … "
    "launch/train.py strategy=hsdp strategy.elastic=true run_dir=runs/big": "needs two hosts",
}


@dataclass(frozen=True)
class Documented:
    """One command as a page has it."""

    page: str
    text: str  # without its comment
    comment: str

    @property
    def script(self) -> str:
        """The file that it runs."""
        return next((word for word in shlex.split(self.text) if word.endswith(".py")), "")

    @property
    def ranks(self) -> int:
        """The ranks that torchrun is to start; 0 without torchrun."""
        found = re.search(r"--nproc_per_node=(\d+)", self.text)
        return int(found[1]) if found else 0

    @property
    def arguments(self) -> list[str]:
        """The words behind the script."""
        words = shlex.split(self.text)
        return words[words.index(self.script) + 1 :]

    @property
    def short_arguments(self) -> list[str]:
        """The words behind the script, with what makes the command short or harmless."""
        more = {
            "launch/train.py": SHORT,
            "launch/submit.py": [] if "--dry-run" in self.arguments else ["--dry-run"],
            "launch/evaluate.py": ["samples=8"],
            "launch/compress_report.py": ["rounds=1"],
        }.get(self.script, [])
        given = [word.replace("cases=5500", "cases=20") for word in self.arguments]
        return [*given, *(word for word in more if word.partition("=")[0] + "=" not in self.text)]


def documented_commands() -> list[Documented]:
    """Return every command of a code block, and of README's running text, each once."""
    found: dict[str, Documented] = {}
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        text = path.read_text(encoding="utf-8")
        lines = [
            line
            for block in FENCE.findall(text)
            for line in block.replace("\\\n", " ").splitlines()
        ]
        if path.name == "README.md" and path.parent == ROOT:
            lines += SPAN.findall(text)
        for line in lines:
            if match := COMMAND.fullmatch(line.strip()):
                command, _, comment = match[1].partition(" #")
                command = re.sub(" +", " ", command.strip())
                page = str(path.relative_to(ROOT))
                found.setdefault(command, Documented(page, command, comment.strip()))
    return list(found.values())


def make_inputs(folder: Path) -> None:
    """Write the data that the pages name as the reader's own."""
    play = (BUNDLED / "shakespeare" / "train.txt").read_text()
    (folder / "my-book.txt").write_text(play)
    (folder / "my-corpus").mkdir()
    for split in ("train", "valid", "test"):
        (folder / "my-corpus" / f"{split}.txt").write_text(play)
    pairs = sorted(Path(str(BUNDLED / "home-assistant-en-de")).rglob("train*.tsv"))
    (folder / "my-pairs.tsv").write_bytes(b"".join(path.read_bytes() for path in pairs))
    draw = np.random.default_rng(0)
    for number in range(60):
        picture = folder / "my-photos" / "ab"[number % 2] / f"{number}.png"
        picture.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 255, (28, 28), dtype=np.uint8)).save(picture)


def environment() -> dict[str, str]:
    """Return the environment of a command's process."""
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def run_command(arguments: list[str], folder: Path, ranks: int = 0) -> subprocess.CompletedProcess:
    """Run a script of the repository in a folder, under torchrun where ranks are asked for."""
    torchrun = ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}"] if ranks else []
    script, *rest = arguments
    return subprocess.run(
        [sys.executable, *torchrun, str(ROOT / script), *rest],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )


def make_runs(folder: Path, runs: dict[str, list[str]]) -> None:
    """Train the runs that the pages name for two steps, and export one, in `folder`/made."""
    for name, overrides in runs.items():
        run = ["launch/train.py", *overrides, *SHORT, "batch_size=8", f"run_dir=made/{name}"]
        done = run_command(run, folder)
        assert done.returncode == 0, done.stderr[-2000:]
    done = run_command(["launch/export.py", "run_dir=made/A", "to=made/A-small"], folder)
    assert done.returncode == 0, done.stderr[-2000:]
    shutil.copytree(folder / "made/A", folder / "made/NAME")
    shutil.copytree(folder / "made/RUN", folder / "made/lr/optim.lr=0.001")


def lay_out_runs(command: Documented, folder: Path) -> None:
    """Put the runs that the pages name where they say, without what the command is to make."""
    shutil.rmtree(folder / "runs", ignore_errors=True)
    shutil.copytree(folder / "made", folder / "runs")
    key = "run_dir=" if command.script == "launch/train.py" else "to="
    for word in command.arguments:
        if word.startswith(key):
            shutil.rmtree(folder / word.removeprefix(key), ignore_errors=True)


def is_expected(command: Documented, status: object) -> bool:
    """Return whether a command ends as its page says: 1 of runs that differ, 2 of a mistake."""
    expected = 1 if "checkpoint.py diff" in command.text else 2 if "fp31" in command.text else 0
    return (status or 0) == expected


def main(only: str) -> int:
    """Run the commands for real, in a folder that is removed; the number that failed."""
    failed = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_inputs(folder)
        make_runs(folder, RUNS)
        for command in documented_commands():
            if command.text in ELSEWHERE or only not in command.text:
                continue
            arguments = command.short_arguments
            other = {"translation": "TRANSLATION", "image": "B"}
            for kind, run in other.items():
                if f"n {kind} run" in command.comment or f"a {kind} run" in command.comment:
                    arguments = [word.replace("runs/RUN", f"runs/{run}") for word in arguments]
            lay_out_runs(command, folder)
            began = time.monotonic()
            done = run_command([command.script, *arguments], folder, command.ranks)
            good = is_expected(command, done.returncode)
            failed += not good
            seconds = time.monotonic() - began
            say(f"{'ok' if good else 'FAILED':6}  {seconds:5.1f} s  {command.text}", flush=True)
            if not good:
                say(done.stdout[-800:], done.stderr[-1500:], flush=True)
    return failed


if __name__ == "__main__":
    words = dict(word.partition("=")[::2] for word in sys.argv[1:])
    sys.exit(main(words.get("only", "")) > 0)
