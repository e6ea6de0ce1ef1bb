"""Fine-tune a published chat model by LoRA, and in full for as long: loss and BLEU, before → after.

`python benchmarks/finetune_chats.py FOLDER OUTPUT [minutes] [key=value …]` trains the model of a
Hugging Face folder on the bundled chats about the texts of a smart home, each way for as many steps
as fit into the minutes (10) by the time of a few steps before. It prints the loss per assistant
token of the test split, and the BLEU of greedy translations of its chats by `transformers` from the
exported folders. Needs transformers.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from importlib.resources import files
from pathlib import Path
from typing import Any

import sacrebleu
import torch
import transformers
from rich.console import Console

ROOT = Path(__file__).parents[1]
DATA = ["data=home-assistant-chats", "data.seq_len=256", "batch_size=4", "precision=bf16"]
WAYS = {
    "LoRA": ["lora.rank=16", "lora.alpha=32", "optim.lr=1e-3"],
    "full": ["optim.lr=1e-4"],
}
PROBED_STEPS, BATCH, ANSWER_TOKENS = 8, 20, 64


def run(command: str, *words: str) -> None:
    """Run a command of the project in silence; raise CalledProcessError if it fails."""
    script = [sys.executable, str(ROOT / "launch" / f"{command}.py")]
    subprocess.run([*script, *words], check=True, stdout=subprocess.DEVNULL)


def records_of(run_dir: Path) -> list[dict[str, Any]]:
    """Return the records of a run's metrics."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def seconds_of_step(folder: str, keys: list[str]) -> float:
    """Return the median seconds of a step, from a short run."""
    small = ["eval.samples=4", "eval.test=false", "metrics.sample_tokens=0", "metrics.every=1"]
    with tempfile.TemporaryDirectory() as parent:
        run_dir = Path(parent) / "run"
        words = [f"run_dir={run_dir}", f"init_from={folder}", *DATA, *keys, *small]
        run("train", *words, f"steps={PROBED_STEPS}", "optim.warmup_steps=2")
        seconds = [r["step_seconds"] for r in records_of(run_dir) if "step_seconds" in r]
        return statistics.median(seconds[2:])


def train(folder: str, run_dir: Path, steps: int, keys: list[str]) -> float:
    """Train, and return the loss per assistant token of the test split."""
    rest = ["eval.every=0", "checkpoint.every=0", "metrics.sample_tokens=0", "metrics.every=10"]
    words = [f"run_dir={run_dir}", f"init_from={folder}", *DATA, *keys, *rest]
    run("train", *words, f"steps={steps}", f"optim.warmup_steps={max(1, steps // 20)}")
    return next(r["eval_loss"] for r in records_of(run_dir)[::-1] if r.get("split") == "test")


def translations() -> list[tuple[list[dict[str, str]], str]]:
    """Return the test split's conversations up to an answer that is a translation, and that."""
    text = (files("trainer.data") / "bundled/home-assistant-chats/test.jsonl").read_text()
    found = []
    for chat in map(json.loads, text.splitlines()):
        messages = chat.get("messages") or [
            {"role": "user", "content": chat["prompt"]},
            {"role": "assistant", "content": chat["completion"]},
        ]
        for number, message in enumerate(messages):
            asked = messages[number - 1]["content"] if number else ""
            if message["role"] == "assistant" and asked.startswith("Translate"):
                found.append((messages[:number], message["content"]))
    return found


@torch.no_grad()
def bleu_of(folder: Path) -> float:
    """Return the BLEU of greedy answers of a model in Hugging Face's format."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    answers, chats = [], translations()
    for first in range(0, len(chats), BATCH):
        prompts = [messages for messages, _ in chats[first : first + BATCH]]
        batch = tokenizer.apply_chat_template(
            prompts, add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt"
        )
        ids = model.generate(**batch, max_new_tokens=ANSWER_TOKENS, do_sample=False)
        ids = ids[:, batch["input_ids"].shape[1] :]
        answers += [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]
    return sacrebleu.corpus_bleu(answers, [[reference for _, reference in chats]]).score


def main() -> None:
    """Measure both ways, and print a line for each."""
    folder, output, *rest = sys.argv[1:]
    numbers = [word for word in rest if "=" not in word]
    keys = [word for word in rest if "=" in word]
    minutes, console = float((numbers or ["10"])[0]), Console(width=100)
    transformers.logging.set_verbosity_error()
    # A rate of nearly zero: the test split's loss of the model as it is.
    loss = train(folder, Path(output) / "before", 1, [*keys, "optim.lr=1e-12"])
    console.print(f"before: loss {loss:.3f}, BLEU {bleu_of(Path(folder)):.1f}")
    for name, own in WAYS.items():
        seconds = seconds_of_step(folder, [*keys, *own])
        steps, run_dir = max(1, round(60 * minutes / seconds)), Path(output) / name.lower()
        loss = train(folder, run_dir, steps, [*keys, *own])
        exported = Path(output) / f"{name.lower()}-exported"
        run("export", f"run_dir={run_dir}", f"output_dir={exported}", "format=huggingface")
        rate = f"{steps} steps of {seconds:.2f} s"
        console.print(f"{name}: {rate}, loss {loss:.3f}, BLEU {bleu_of(exported):.1f}")


if __name__ == "__main__":
    main()
