"""A LoRA fine-tuning step beside transformers' Trainer with peft, on the CPU.

`python benchmarks/finetune.py FOLDER [rounds] [steps] [key=value …]` trains adapters of rank 8 on
all linear layers of the blocks of a Hugging Face folder, 8 samples of 128 tokens of Shakespeare a
step, with AdamW, in fp32; with `precision=bf16` both train in mixed precision. It runs
`launch/train.py` (with the given keys) and the Trainer in turn, each in a process of its own, and
prints for each round the median tokens per second after two steps of warming up, and the peak of
resident memory. Needs transformers, peft and accelerate.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.resources import files
from pathlib import Path
from typing import Any

from rich.console import Console

ROOT = Path(__file__).parents[1]
SAMPLES, SEQ_LEN, RANK, WARM_UP = 8, 128, 8, 2
LR = 1e-3


def train_here(folder: str, steps: int, keys: list[str]) -> list[float]:
    """Return the seconds of each step of `launch/train.py`."""
    with tempfile.TemporaryDirectory() as run_dir:
        command = [
            *(sys.executable, str(ROOT / "launch" / "train.py"), f"run_dir={run_dir}/run"),
            *(f"init_from={folder}", f"lora.rank={RANK}", f"lora.alpha={2 * RANK}"),
            *("data=shakespeare", f"data.seq_len={SEQ_LEN}", f"batch_size={SAMPLES}"),
            *(f"steps={steps}", "optim.warmup_steps=0", f"optim.lr={LR}", "metrics.every=1"),
            *("eval.every=0", "eval.samples=8", "eval.test=false", "metrics.sample_tokens=0"),
            *("checkpoint.every=0", *keys),
        ]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        lines = (Path(run_dir) / "run" / "metrics.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        return [r["step_seconds"] for r in records if "step_seconds" in r]


def train_there(folder: str, steps: int, bf16: bool) -> list[float]:
    """Return the seconds of each step of the Trainer."""
    import peft  # noqa: PLC0415 (slow, and not in the other process)
    import transformers  # noqa: PLC0415

    transformers.logging.set_verbosity_error()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    lora = peft.LoraConfig(
        r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(model, lora)
    text = (files("trainer.data") / "bundled" / "shakespeare" / "train.txt").read_text()
    ids = tokenizer(text[: steps * SAMPLES * SEQ_LEN * 8])["input_ids"]
    windows = [ids[i : i + SEQ_LEN] for i in range(0, steps * SAMPLES * SEQ_LEN, SEQ_LEN)]
    data = [{"input_ids": window, "labels": window} for window in windows]
    seconds: list[float] = []

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            seconds.append(-time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds[-1] += time.perf_counter()

    with tempfile.TemporaryDirectory() as output:
        arguments = transformers.TrainingArguments(
            output_dir=output,
            per_device_train_batch_size=SAMPLES,
            max_steps=steps,
            learning_rate=LR,
            use_cpu=True,
            bf16=bf16,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        trainer = transformers.Trainer(model, arguments, train_dataset=data, callbacks=[Clock()])
        trainer.train()
    return seconds


def measure(which: str, arguments: list[str]) -> tuple[float, float]:
    """Return tokens per second and peak GiB of one process and its children."""
    command = [sys.executable, __file__, "--one", which, *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    found = json.loads(done.stdout.splitlines()[-1])
    seconds = statistics.median(found["seconds"][WARM_UP:])
    return SAMPLES * SEQ_LEN / seconds, found["kib"] / 2**20


def run_one(which: str, folder: str, steps: str, *keys: str) -> None:
    """Print the result of one process as JSON."""
    import resource  # noqa: PLC0415

    seconds = (
        train_here(folder, int(steps), list(keys))
        if which == "here"
        else train_there(folder, int(steps), "precision=bf16" in keys)
    )
    kinds = (resource.RUSAGE_CHILDREN,) if which == "here" else (resource.RUSAGE_SELF,)
    kib = max(resource.getrusage(kind).ru_maxrss for kind in kinds)
    sys.stdout.write(json.dumps({"seconds": seconds, "kib": kib}) + "\n")


def main() -> None:
    """Run both in turn and print the ratios."""
    folder, *rest = sys.argv[1:]
    numbers = [word for word in rest if "=" not in word]
    keys = [word for word in rest if "=" in word]
    rounds, steps = int((numbers or ["3"])[0]), (numbers[1:] or ["8"])[0]
    console, results = Console(width=100), []
    for number in range(rounds):
        here = measure("here", [folder, steps, *keys])
        there = measure("there", [folder, steps, *keys])
        results.append((here, there))
        console.print(
            f"round {number + 1}: here {here[0]:.0f} tokens/s, {here[1]:.2f} GiB; "
            f"Trainer and peft {there[0]:.0f} tokens/s, {there[1]:.2f} GiB"
        )
    speed = statistics.median(here[0] / there[0] for here, there in results)
    memory = statistics.median(here[1] / there[1] for here, there in results)
    console.print(f"tokens/s {speed:.2f} ×, peak memory {memory:.2f} ×")


if __name__ == "__main__":
    run_one(*sys.argv[2:]) if sys.argv[1] == "--one" else main()
