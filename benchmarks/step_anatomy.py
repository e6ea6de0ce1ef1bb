"""Count what a block of the real step does, traced per strategy on ranks that do not exist.

`python benchmarks/step_anatomy.py [words] [model=llama-1b] [ranks=8] [samples=1] [seq_len=2048]
[activation_checkpointing=none] [precision=bf16]`: words choose the rows that have all of them in
their name. Per block and micro-batch: operators that write memory, which is about what a GPU
launches without compilation; bytes that they read and write, each tensor counted once for each
operator; collectives, and bytes of the tensors that they reduce, gather or exchange. Behind it the
rest of the step: first and last layers, loss, norm of the gradients, optimizer. The first row is a
block written by hand in plain torch, with weights in the precision of the step.
"""

import sys
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import yaml
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from parallel.comm_volume.counter import collectives_of
from parallel.strategy import StrategyConfig, data_degree
from trainer.config.train import DataConfig, ModelConfig, TrainConfig, head_width_of
from trainer.plan import trace
from trainer.plan.cases import preset
from trainer.plan.fake_ranks import visible_memory
from trainer.plan.inputs import longest_inputs
from trainer.plan.live_bytes import LiveBytes
from trainer.plan.trace import Window, WindowTrace, trace_windows
from trainer.precision import PRECISIONS

ROOT = Path(__file__).parents[1]
OPTIONS = {
    "model": "llama-1b",
    "ranks": "8",
    "samples": "1",
    "seq_len": "2048",
    "activation_checkpointing": "none",
    "precision": "bf16",
}
TOKENS = 4096  # of a model whose vocabulary is the data's
BLOCKS = 4  # of a stage; one in the middle is counted


class Traffic(LiveBytes):
    """Live bytes, and the bytes that operators read and write in each window of a step."""

    def begin_step(self) -> None:
        """Forget the counts of the step before."""
        super().begin_step()
        self.moved: dict[Hashable, int] = defaultdict(int)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        window = self.window
        before = self.counts[window].operators
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if self.counts[window].operators > before and not collectives_of(func, args):
            self.moved[window] += sum(map(_bytes_of, tree_leaves((args, kwargs, out))))
        return out


def _bytes_of(leaf: Any) -> int:
    """Return the bytes of a tensor; those of an expanded one are in memory once."""
    if not isinstance(leaf, Tensor):
        return 0
    return min(leaf.numel() * leaf.element_size(), leaf.untyped_storage().nbytes())


@dataclass(frozen=True)
class Anatomy:
    """Counts of a block and a micro-batch, forward and backward, and of the rest of the step."""

    forward_operators: float
    backward_operators: float
    moved_bytes: float
    collectives: float
    wire_bytes: float
    rest_operators: float = 0
    rest_collectives: float = 0


def trace_block(config: TrainConfig, ranks: int, rank: int = 0) -> Anatomy:
    """Trace a rank's step and return the counts of its middle block, and of all but blocks."""
    count = config.batch_size // data_degree(config.strategy) // config.micro_batch_size
    inputs, made = longest_inputs(config, config.micro_batch_size), []

    def follow(*args: Any, **options: Any) -> Traffic:
        made.append(Traffic(*args, **options))
        return made[-1]

    with mock.patch.object(trace, "LiveBytes", follow):
        windows = trace_windows(config, ranks, [inputs] * count, rank, device="cuda")
    blocks = sorted({int(window.block) for window in windows if window.block})
    middle = str(blocks[len(blocks) // 2])
    own = {window: found for window, found in windows.items() if window.block == middle}
    rest = [found for window, found in windows.items() if not _of_a_block(window, blocks)]
    return Anatomy(
        _operators(own, "F") / count,
        _operators(own, "B") / count,
        sum(made[-1].moved[window] for window in own) / count,
        sum(found.collectives for found in own.values()) / count,
        sum(sum(found.wire_bytes.values()) for found in own.values()) / count,
        sum(found.operators for found in rest),
        sum(found.collectives for found in rest),
    )


def _of_a_block(window: Window, blocks: list[int]) -> bool:
    """Return whether a window is a block's alone: the last forward and the first backward end late.

    Behind the last block's forward comes the loss, behind the first block's backward the update.
    """
    last, first = window.action == "F end", window.action == "B" and window.block == str(blocks[0])
    return bool(window.block) and not last and not first


def _operators(windows: Mapping[Window, WindowTrace], action: str) -> int:
    return sum(found.operators for w, found in windows.items() if w.action.startswith(action))


def plain_block(model: ModelConfig, samples: int, seq_len: int, dtype: torch.dtype) -> Anatomy:
    """Count a block written by hand, forward and backward, of the same shape as a Llama's."""
    mode, counted = FakeTensorMode(), Traffic()
    with mode:
        block = PlainBlock(model, dtype)
        x_BSD = torch.zeros(samples, seq_len, model.width, dtype=dtype).requires_grad_()
        angles_SK = torch.zeros(seq_len, head_width_of(model), dtype=dtype)
    with visible_memory(counted, "cuda"), mode, counted:
        counted.follow([x_BSD, angles_SK, *block.parameters()])
        counted.window = "F"
        y_BSD = block(x_BSD, angles_SK.cos(), angles_SK.sin())
        grad_BSD = torch.empty_like(y_BSD)
        counted.window = "B"
        y_BSD.backward(grad_BSD)
    operators = [counted.counts[window].operators for window in ("F", "B")]
    # Cosine, sine and the gradient of the output are made outside of a block.
    return Anatomy(operators[0] - 3, operators[1], sum(counted.moved.values()), 0, 0)


class PlainBlock(nn.Module):
    """A Llama block as one writes it with torch alone."""

    def __init__(self, model: ModelConfig, dtype: torch.dtype):
        super().__init__()
        self.head_width = head_width_of(model)
        groups = (model.kv_heads or model.heads) * self.head_width
        heads, D, inner = model.heads * self.head_width, model.width, model.ffn_width
        sizes = [(D, heads), (D, groups), (D, groups), (heads, D), (D, inner), (D, inner)]
        self.products = nn.ModuleList(
            nn.Linear(a, b, bias=False, dtype=dtype) for a, b in [*sizes, (inner, D)]
        )
        self.norms = nn.ParameterList(torch.ones(D, dtype=dtype) for _ in range(2))

    def forward(self, x_BSD: Tensor, cos_SK: Tensor, sin_SK: Tensor) -> Tensor:
        """Return the block's output."""
        query, key, value, output, gate, up, down = self.products
        y_BSD = F.rms_norm(x_BSD, self.norms[0].shape, self.norms[0])
        q_BHSK, k_BGSK, v_BGSK = (
            layer(y_BSD).unflatten(-1, (-1, self.head_width)).transpose(1, 2)
            for layer in (query, key, value)
        )
        q_BHSK, k_BGSK = (_rotate(t, cos_SK, sin_SK) for t in (q_BHSK, k_BGSK))
        mixed_BHSK = F.scaled_dot_product_attention(
            q_BHSK, k_BGSK, v_BGSK, is_causal=True, enable_gqa=True
        )
        x_BSD = x_BSD + output(mixed_BHSK.transpose(1, 2).flatten(2))
        y_BSD = F.rms_norm(x_BSD, self.norms[1].shape, self.norms[1])
        return x_BSD + down(F.silu(gate(y_BSD)) * up(y_BSD))


def _rotate(x_BHSK: Tensor, cos_SK: Tensor, sin_SK: Tensor) -> Tensor:
    first, second = x_BHSK.chunk(2, dim=-1)
    return x_BHSK * cos_SK + torch.cat((-second, first), dim=-1) * sin_SK


def strategies(ranks: int) -> Iterator[tuple[str, StrategyConfig]]:
    """Yield strategies of so many ranks, and one rank alone."""
    yield "single", StrategyConfig()
    for name in ("ddp", "fsdp", "hsdp", "tensor"):
        yield f"{name} {ranks}", preset(name, ranks)
    yield f"tensor {ranks}, whole sequences", StrategyConfig(tensor=ranks, sequence_parallel=False)
    yield (
        f"pipeline {ranks // 2} × fsdp 2, 1f1b",
        StrategyConfig(pipeline=ranks // 2, shard=2, schedule="1f1b"),
    )
    for method in ("all_gather", "ring", "ulysses"):
        yield f"context {ranks}, {method}", StrategyConfig(context=ranks, context_method=method)
    yield f"fsdp {ranks // 2} × tensor 2", StrategyConfig(shard=ranks // 2, tensor=2)
    yield f"hybrid {ranks}", preset("hybrid", ranks)


def job_of(options: Mapping[str, str], strategy: StrategyConfig) -> TrainConfig:
    """Return a run with four blocks in each stage and two micro-batches for each."""
    seq_len, samples = int(options["seq_len"]), int(options["samples"])
    values = yaml.safe_load((ROOT / "conf" / "model" / f"{options['model']}.yaml").read_text())
    layers = {"layers": BLOCKS * strategy.pipeline, "max_positions": seq_len}
    model = ModelConfig(**{"vocab_size": TOKENS} | values | layers)
    micro_batches = 2 * strategy.pipeline if strategy.pipeline > 1 else 1
    return TrainConfig(
        model=model,
        strategy=strategy,
        data=DataConfig(kind="text", seq_len=seq_len),
        precision=options["precision"],
        batch_size=samples * micro_batches * data_degree(strategy),
        micro_batch_size=samples,
        activation_checkpointing=options["activation_checkpointing"],
        compile=False,
    )


def rows(options: Mapping[str, str], words: Iterable[str]) -> Iterator[tuple[str, Anatomy]]:
    """Yield the name and the counts of each strategy that has all `words` in its name."""
    words, ranks = list(words), int(options["ranks"])
    model = job_of(options, StrategyConfig()).model
    if all(word in "plain torch" for word in words):
        sizes = int(options["samples"]), int(options["seq_len"])
        yield "plain torch", plain_block(model, *sizes, PRECISIONS[options["precision"]].compute)
    for name, strategy in strategies(ranks):
        if all(word in name for word in words):
            world = 1 if name == "single" else ranks
            yield name, trace_block(job_of(options, replace(strategy)), world)


def main(arguments: list[str]) -> None:
    """Print a row for each strategy."""
    given = dict(word.split("=", 1) for word in arguments if "=" in word)
    if unknown := given.keys() - OPTIONS.keys():
        sys.exit(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(OPTIONS)}")
    options = OPTIONS | given
    if int(options["ranks"]) % 8:
        sys.exit(f"ranks={options['ranks']} must be a multiple of 8, for the three axes of hybrid")
    console = Console(width=None if sys.stdout.isatty() else 130)
    title = ", ".join(f"{name} {value}" for name, value in options.items())
    columns = ("forward", "backward", "MB in memory", "collectives", "MB in them")
    rest = ("rest: operators", "rest: collectives")
    table = Table("operators of a block", *columns, *rest, title=title)
    for name, found in rows(options, [word for word in arguments if "=" not in word]):
        table.add_row(
            name,
            f"{found.forward_operators:g}",
            f"{found.backward_operators:g}",
            f"{found.moved_bytes / 1e6:,.0f}",
            f"{found.collectives:g}",
            f"{found.wire_bytes / 1e6:,.1f}",
            f"{found.rest_operators:g}",
            f"{found.rest_collectives:g}",
        )
    console.print(table)


if __name__ == "__main__":
    main(sys.argv[1:])
