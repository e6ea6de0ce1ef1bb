"""Memory and time of the import of a large Hugging Face folder under FSDP.

`python benchmarks/import_memory.py [layers] [ranks] [folder]` writes a random folder with the sizes
of Llama 2 7B (of `layers` blocks; 32 = all) in bf16, in files of at most 2 GB, unless it is there;
builds the model on the ranks with bf16 parameters, and loads it. It prints for each rank the peak
of memory that belongs to the process alone (RssAnon; pages of the files are the kernel's to drop),
less what it held before, beside its share of the weights and the largest layer.
"""

import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

from parallel.mesh import build_mesh
from parallel.parallelize import ModelSpec, parallelize
from parallel.rank_pool import RankPool
from parallel.runtime import Runtime
from parallel.strategy import StrategyConfig
from trainer.config.train import ModelConfig
from trainer.huggingface.registry import architecture_for
from trainer.huggingface.weights import load_folder, parameter_shapes
from trainer.huggingface.writer import write_config, write_weights
from trainer.model import Transformer
from trainer.nn.tensor_layout import TENSOR_LAYOUT

SHARD_BYTES = 2 * 10**9
LLAMA_7B = ModelConfig(
    width=4096,
    heads=32,
    ffn_width=11_008,
    vocab_size=32_000,
    max_positions=4096,
    tied=False,
    attention_bias="none",
)


def write_folder(folder: Path, model: ModelConfig) -> None:
    """Write random weights, one parameter at a time."""
    folder.mkdir(parents=True)
    shapes, generator = parameter_shapes(model), torch.Generator().manual_seed(0)

    def weights(name: str) -> torch.Tensor:
        return torch.empty(shapes[name], dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)

    architecture = architecture_for(model)
    write_weights(folder, architecture, model, weights, torch.bfloat16, SHARD_BYTES)
    write_config(folder, architecture, model, torch.bfloat16, {})


def own_bytes() -> int:
    """Return the memory of this process that no file backs."""
    line = next(s for s in Path("/proc/self/status").read_text().splitlines() if "RssAnon" in s)
    return int(line.split()[1]) * 1024


@contextmanager
def peak_bytes():
    """Yield a list that holds the peak of `own_bytes` above its start at the end."""
    before, peaks, done = own_bytes(), [0], threading.Event()

    def sample() -> None:
        while not done.wait(0.005):
            peaks[0] = max(peaks[0], own_bytes() - before)

    thread = threading.Thread(target=sample)
    thread.start()
    yield peaks
    done.set()
    thread.join()


def load(runtime: Runtime, folder: str, model: ModelConfig) -> tuple[int, int, float, float]:
    """Return this rank's peak and share in bytes, and the seconds to build and to load."""
    strategy = StrategyConfig(shard=runtime.world_size)
    facts = ModelSpec(
        draw_rows=lambda name, shape, start, stop: torch.zeros(1).expand(stop - start, *shape[1:]),
        loss_sum=lambda logits, inputs: logits.sum(),
        count_valid=lambda inputs: torch.ones(1),
        layout=TENSOR_LAYOUT,
    )
    began = time.perf_counter()
    with peak_bytes() as peaks:
        with torch.device("meta"):
            transformer = Transformer(model, torch.bfloat16)
        worker = parallelize(
            transformer,
            facts,
            build_mesh(strategy, runtime.device),
            strategy,
            runtime.device,
            parameters=torch.bfloat16,
            compute=torch.bfloat16,
        )
        built = time.perf_counter()
        load_folder(Path(folder), worker.parameters())
        loaded = time.perf_counter()
    share = sum(p.to_local().nbytes for p in worker.parameters().values())
    return peaks[0], share, built - began, loaded - built


def main() -> None:
    arguments = sys.argv[1:]
    layers, ranks = int((arguments or ["32"])[0]), int((arguments[1:] or ["4"])[0])
    folder = Path((arguments[2:] or [f".cache/llama-7b-{layers}"])[0])
    model, console = replace(LLAMA_7B, layers=layers), Console(width=100)
    if not folder.exists():
        began = time.perf_counter()
        write_folder(folder, model)
        console.print(f"written: {folder}, {time.perf_counter() - began:.0f} s")
    shapes = parameter_shapes(model)
    largest = max(shape.numel() for shape in shapes.values()) * 2
    block = sum(s.numel() for n, s in shapes.items() if n.startswith("blocks.0.")) * 2
    total = sum(shape.numel() for shape in shapes.values())
    console.print(f"{total / 1e9:.2f} billion parameters, {ranks} ranks, strategy.shard={ranks}")
    console.print(f"one block {block / 1e9:.2f} GB, largest tensor {largest / 1e9:.2f} GB")
    pool = RankPool(ranks)
    results = pool.run(ranks, load, str(folder), model, timeout_seconds=3600.0)
    pool.close()
    for rank, (peak, share, built, loaded) in enumerate(results):
        console.print(
            f"rank {rank}: share {share / 1e9:.3f} GB, peak {peak / 1e9:.3f} GB, above its share "
            f"{(peak - share) / 1e9:.3f} GB; built in {built:.0f} s, loaded in {loaded:.0f} s"
        )


if __name__ == "__main__":
    main()
