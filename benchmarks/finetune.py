"""A LoRA fine-tuning step beside transformers' Trainer with peft, on the CPU.

`python benchmarks/finetune.py FOLDER [rounds] [steps] [chats] [key=value …]` trains adapters of
rank 8 on all linear layers of the blocks of a Hugging Face folder, 8 samples of 128 tokens of
Shakespeare a step, with AdamW, in fp32; with `precision=bf16` both train in mixed precision. With
`chats` the samples are 4 rows of 256 tokens of packed chats, of which answers are learned; the
Trainer gets the same rows and labels, but no mask between the chats of a row. It runs
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
TOKENS, RANK, WARM_UP = 8 * 128, 8, 2
LR = 1e-3
SEQ_LEN = {"shakespeare": 128, "home-assistant-chats": 256}
Row = dict[str, list[int]]


def data_of(keys: list[str]) -> tuple[str, int]:
    """Return the name of the data, and the tokens of a sample."""
    name = "home-assistant-chats" if "chats" in keys else "shakespeare"
    return name, SEQ_LEN[name]


def text_rows(tokenizer: Any, rows: int) -> list[Row]:
    """Return windows of Shakespeare, of which each token is learned."""
    length = SEQ_LEN["shakespeare"]
    text = (files("trainer.data") / "bundled" / "shakespeare" / "train.txt").read_text()
    ids = tokenizer(text[: rows * length * 8])["input_ids"]
    windows = [ids[i : i + length] for i in range(0, rows * length, length)]
    return [{"input_ids": window, "labels": window} for window in windows]


def chat_rows(folder: str, rows: int) -> list[Row]:
    """Return rows of packed chats as `launch/train.py` reads them, padded at the end."""
    from trainer.config.data import DataConfig  # noqa: PLC0415
    from trainer.data import open_split, prepare_data  # noqa: PLC0415

    path, length = "bundled:home-assistant-chats", SEQ_LEN["home-assistant-chats"]
    config = DataConfig(kind="chat", path=path, tokenizer=folder, seq_len=length)
    prepare_data(config)
    split, found = open_split(config, "train"), []
    for index in range(rows):
        sample = split.sample(index % len(split), None)
        # A label is of the token itself; a target of the one behind it.
        tokens, targets = sample["tokens"].tolist(), sample["targets"].tolist()
        short = length - len(tokens)
        labels = [-100, *targets[:-1]] + short * [-100]
        found.append({"input_ids": tokens + short * [0], "labels": labels})
    return found


def train_here(folder: str, steps: int, keys: list[str]) -> list[float]:
    """Return the seconds of each step of `launch/train.py`."""
    data, length = data_of(keys)
    with tempfile.TemporaryDirectory() as run_dir:
        command = [
            *(sys.executable, str(ROOT / "launch" / "train.py"), f"run_dir={run_dir}/run"),
            *(f"init_from={folder}", f"lora.rank={RANK}", f"lora.alpha={2 * RANK}"),
            *(f"data={data}", f"data.seq_len={length}", f"batch_size={TOKENS // length}"),
            *(f"steps={steps}", "optim.warmup_steps=0", f"optim.lr={LR}", "metrics.every=1"),
            *("eval.every=0", "eval.samples=8", "eval.test=false", "metrics.sample_tokens=0"),
            *("checkpoint.every=0", *(key for key in keys if "=" in key)),
        ]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        lines = (Path(run_dir) / "run" / "metrics.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        return [r["step_seconds"] for r in records if "step_seconds" in r]


def train_there(folder: str, steps: int, keys: list[str]) -> list[float]:
    """Return the seconds of each step of the Trainer."""
    import peft  # noqa: PLC0415 (slow, and not in the other process)
    import transformers  # noqa: PLC0415

    transformers.logging.set_verbosity_error()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    name, length = data_of(keys)
    samples = TOKENS // length
    chats = name != "shakespeare"
    rows = chat_rows(folder, steps * samples) if chats else text_rows(tokenizer, steps * samples)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    lora = peft.LoraConfig(
        r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(model, lora)
    seconds: list[float] = []

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            seconds.append(-time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds[-1] += time.perf_counter()

    with tempfile.TemporaryDirectory() as output:
        arguments = transformers.TrainingArguments(
            output_dir=output,
            per_device_train_batch_size=samples,
            max_steps=steps,
            learning_rate=LR,
            use_cpu=True,
            bf16="precision=bf16" in keys,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        trainer = transformers.Trainer(model, arguments, train_dataset=rows, callbacks=[Clock()])
        trainer.train()
    return seconds


def measure(which: str, arguments: list[str]) -> tuple[float, float]:
    """Return tokens per second and peak GiB of one process and its children."""
    command = [sys.executable, __file__, "--one", which, *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    found = json.loads(done.stdout.splitlines()[-1])
    seconds = statistics.median(found["seconds"][WARM_UP:])
    return TOKENS / seconds, found["kib"] / 2**20


def run_one(which: str, folder: str, steps: str, *keys: str) -> None:
    """Print the result of one process as JSON."""
    import resource  # noqa: PLC0415

    train = train_here if which == "here" else train_there
    seconds = train(folder, int(steps), list(keys))
    kinds = (resource.RUSAGE_CHILDREN,) if which == "here" else (resource.RUSAGE_SELF,)
    kib = max(resource.getrusage(kind).ru_maxrss for kind in kinds)
    sys.stdout.write(json.dumps({"seconds": seconds, "kib": kib}) + "\n")


def main() -> None:
    """Run both in turn and print the ratios."""
    folder, *rest = sys.argv[1:]
    numbers = [word for word in rest if word.isdecimal()]
    keys = [word for word in rest if not word.isdecimal()]
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
