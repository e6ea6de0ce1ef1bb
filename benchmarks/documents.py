"""Measure what documents in a sample cost: tokens/s of a step with and without, alternating.

`python benchmarks/documents.py [width] [blocks] [length] [samples] [mean document] [segments]`
The least seconds of a segment count. On CUDA (bf16) documents go by their lengths; on a CPU, and on
CUDA without `document_ends`, by a mask.
"""

import sys
import time
from collections.abc import Callable

import torch
from rich.console import Console
from workload import Batch, llama, random_batch

from trainer.data.loader import document_ends
from trainer.loss import cross_entropy_sum
from trainer.model import Transformer
from trainer.nn.init import init_rows

VOCABULARY = 8192


def with_documents(batch: Batch, mean_length: int) -> dict[str, Batch]:
    """The batch as one document a row, as documents by a mask, and by their lengths."""
    samples, length = batch["tokens"].shape
    starts_BS = torch.rand(samples, length) < 1 / mean_length
    starts_BS[:, 0] = True
    column_S = torch.arange(length)
    first_BS = torch.where(starts_BS, column_S, 0).cummax(1).values
    documents = starts_BS.cumsum(1) - 1
    masked = batch | {"documents": documents, "positions": column_S - first_BS}
    ends = torch.from_numpy(document_ends(documents.numpy()))
    return {"one": batch, "mask": masked, "lengths": masked | {"document_ends": ends}}


def main(numbers: list[int]) -> None:
    """Print tokens/s of each way."""
    width, blocks, length, samples, mean_length, segments = numbers
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    config = llama(width, blocks, length, VOCABULARY)
    compute = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = Transformer(config, compute)
    for name, p in model.named_parameters():
        p.data.copy_(init_rows(config, 0, name, p.shape, 0, p.shape[0]))
    model.to(device)

    def step_of(batch: Batch) -> Callable[[], None]:
        inputs = {name: x.to(device) for name, x in batch.items()}

        def step() -> None:
            model.zero_grad()
            cross_entropy_sum(model(inputs), inputs["targets"]).backward()
            if device.type == "cuda":
                torch.cuda.synchronize()

        step()
        return step

    batches = with_documents(random_batch(samples, length, VOCABULARY), mean_length)
    steps = {name: step_of(batch) for name, batch in batches.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(segments):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - began)
    console = Console(highlight=False)
    count = int((batches["mask"]["positions"] == 0).sum())
    console.print(f"{device.type}, {samples} × {length} tokens, {count} documents")
    for name, taken in seconds.items():
        tokens_per_second = samples * length / min(taken)
        share = min(seconds["one"]) / min(taken)
        console.print(f"{name:8s} {tokens_per_second:10.0f} tok/s  {share:6.1%} of one document")


if __name__ == "__main__":
    given = [*map(int, sys.argv[1:])]
    main(given + [512, 4, 1024, 4, 256, 5][len(given) :])
