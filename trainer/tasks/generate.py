"""Apply a trained model: continue a text, answer, translate sentences, or classify an image."""

import sys

from rich.console import Console
from rich.table import Table

from parallel.runtime import Runtime, broadcast_from_rank0
from trainer.config.train import GenerateConfig, UserError
from trainer.inference.conversation import Dialogue
from trainer.inference.sampling import Sampling
from trainer.inference.trained_run import load_trained_run
from trainer.metrics.console import print_whole
from trainer.tasks.registry import task_of


def print_generation(config: GenerateConfig, runtime: Runtime) -> None:
    """Print the output of a run's newest checkpoint for config.prompt, on rank 0."""
    run = load_trained_run(config, runtime)
    if config.chat:
        sampling = Sampling(config.temperature, config.top_k, config.top_p, config.seed)
        dialogue = Dialogue(run.worker, run.load_tokenizer(), sampling)
        hold_conversation(dialogue, config.max_tokens, runtime)
        return
    output = task_of(run.config.data, run.config.model).generate(config, run)
    if runtime.rank == 0:
        if isinstance(output, Table):
            print_whole(output)
            return
        Console().print(output, markup=False, highlight=False, soft_wrap=True)


def hold_conversation(dialogue: Dialogue, max_tokens: int, runtime: Runtime) -> None:
    """Answer each line of rank 0's standard input, until its end.

    A line that cannot be answered, e.g. because no position of the model is left, ends the
    conversation, and the next line begins another.
    """
    while (line := broadcast_from_rank0(_read_line() if runtime.rank == 0 else None)) is not None:
        try:
            for piece in dialogue.answer(line, max_tokens):
                _write(piece, runtime)
            _write("\n", runtime)
        except UserError as error:
            _write(f"{error}\n", runtime)
            dialogue.messages = []


def _read_line() -> str | None:
    """Return the next line of standard input that is not blank; None at its end."""
    interactive = sys.stdin.isatty()
    while True:
        if interactive:
            sys.stdout.write("> ")
            sys.stdout.flush()
        line = sys.stdin.readline()
        if not line:
            return None
        if line.strip():
            return line.rstrip("\r\n")


def _write(text: str, runtime: Runtime) -> None:
    if runtime.rank == 0:
        sys.stdout.write(text)
        sys.stdout.flush()
