"""Predict the memory of published FSDP2 runs: `python benchmarks/published_memory.py CSV`.

torchtitan reports what its allocator has reserved. What a plan takes that to be is compared with
it: `reserved_bytes`, with a share of splinters that is fitted here, to all rows and to those of the
other models. Where torchtitan's code is another than this one, its bytes are taken:

- selective: it keeps every second product (of query, value, gate and down) and attention's output,
  of an 8B's block 108 of the 184 MiB that ours does; a compiled block drops the one of down, which
  no backward reads (FEWER);
- split classes: `torch.distributed.tensor.parallel.loss_parallel` has 16 bytes a logit in its
  backward (`measure_loss`), ours 10;
- micro-batches: as many as there are pipeline stages (`micro_batches_of`).
"""

import csv
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from statistics import mean, median

import torch
from published_runs import micro_batches_of
from rich.console import Console
from rich.table import Table
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import loss_parallel
from torch.profiler import ProfilerActivity, profile
from torch.testing._internal.distributed.fake_pg import FakeStore

from parallel.strategy import StrategyConfig
from trainer.config.train import DataConfig, ModelConfig, TrainConfig
from trainer.plan.held_forms import likely_held
from trainer.plan.machine import GIB
from trainer.plan.memory import MemoryModel, MemoryTerms
from trainer.plan.planner import SPLINTERS, reserved_bytes

STACK = "torchtitan"
SELECTIVE_SHARE, FEWER = 108 / 184, 16 / 184
OWN_LOSS_BYTES = 10  # a logit of split classes here
AXES = ("shard", "context", "tensor", "pipeline")


@dataclass(frozen=True)
class Run:
    """A published run, and the tensors that it is predicted to have."""

    row: dict[str, str]
    reserved: float  # bytes, with the splinters of a plan
    measured: float

    def error(self, splinters: float) -> float:
        """Return by which share the prediction with so many splinters is too high."""
        return splinters / SPLINTERS * self.reserved / self.measured - 1


def measure_loss() -> float:
    """Return the bytes of a logit at the peak of torch's own loss of split classes."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    mesh, shape = init_device_mesh("cpu", (8,)), (2048, 8192)
    logits = torch.randn(shape, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.zeros(shape[0], dtype=torch.int64)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        split = DTensor.from_local(logits * 1, mesh, [Shard(1)], run_check=False)
        with loss_parallel():
            loss = torch.nn.functional.cross_entropy(split.float(), targets)
            del split
            loss.backward()
    dist.destroy_process_group()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(accumulate(sizes)) / logits.numel()


def predict(row: dict[str, str], loss_bytes: float) -> Run:
    """Return a published run beside what is predicted of it."""
    number = {column: int(row[column]) for column in row if row[column].isdecimal()}
    micro_batch, count = micro_batches_of(row)
    strategy, forms = strategy_of(row, number), forms_of(row, number)
    held = likely_held(strategy.schedule, strategy.pipeline, strategy.stages_per_rank or 1, count)

    def fullest(mode: str) -> MemoryTerms:
        found = forms.terms(strategy, micro_batch, count, mode, held)
        return max(found, key=reserved_bytes)

    terms = fullest("none" if row["ac"] == "none" else "block")
    reserved = reserved_bytes(terms)
    if row["ac"] == "selective":
        share = SELECTIVE_SHARE - FEWER * (row["compile"] == "1")
        reserved += share * (reserved_bytes(fullest("selective")) - reserved)
    if strategy.tensor > 1 and terms.logits:
        reserved += SPLINTERS * (loss_bytes / OWN_LOSS_BYTES - 1) * terms.logits
    return Run(row, reserved, float(row["mem_gib"]) * GIB)


def strategy_of(row: dict[str, str], number: dict[str, int]) -> StrategyConfig:
    """Return the layout of a row."""
    pipeline, context = number["pipeline"], number["context"]
    return StrategyConfig(
        pipeline=pipeline,
        shard=number["shard"] * context,  # torchtitan shards over context too
        context=context,
        tensor=number["tensor"],
        schedule=row["schedule"] or "gpipe",
        stages_per_rank=number["stages_per_rank"] if pipeline > 1 else 0,
    )


def forms_of(row: dict[str, str], number: dict[str, int]) -> MemoryModel:
    """Return the closed forms of a row's model."""
    model = ModelConfig(
        layers=number["layers"],
        width=number["width"],
        heads=number["heads"],
        kv_heads=number["kv_heads"],
        ffn_width=number["ffn_width"],
        vocab_size=number["vocab"],
        max_positions=number["seq_len"],
        tied=number["tied"] == 1,
    )
    data = DataConfig(kind="text", path="not read", seq_len=number["seq_len"])
    return MemoryModel.of(TrainConfig(model=model, data=data, precision=row["precision"]))


def fit_splinters(runs: Sequence[Run]) -> float:
    """Return the splinters with the least mean error of these runs."""
    candidates = [1 + step / 1000 for step in range(300)]
    return min(candidates, key=lambda splinters: mean(abs(r.error(splinters)) for r in runs))


def main(path: Path) -> None:
    """Print predicted against published memory."""
    if not path.exists():
        print(f"{path} is not there: nothing to predict")  # noqa: T201
        return
    with path.open(newline="", encoding="utf-8") as file:
        rows = [r for r in csv.DictReader(file) if r["group"].startswith(STACK) and r["mem_gib"]]
    loss_bytes = measure_loss()
    runs = [predict(row, loss_bytes) for row in rows]
    table, unseen = Table("run", "layout", "published GiB", "predicted", "error", "unseen"), []
    for run in runs:
        row = run.row
        others = [other for other in runs if other.row["model"] != row["model"]]
        unseen.append(run.error(fit_splinters(others) if others else SPLINTERS))
        layout = " ".join(f"{axis}={row[axis]}" for axis in AXES if row[axis] != "1")
        shown = f"{row['model']} {row['precision']} {row['ac']} compile={row['compile']}"
        sizes = f"{run.measured / GIB:.1f}", f"{run.reserved / GIB:.1f}"
        table.add_row(shown, layout, *sizes, f"{run.error(SPLINTERS):+.1%}", f"{unseen[-1]:+.1%}")
    console = Console(width=120)
    console.print(table)
    known = [abs(run.error(SPLINTERS)) for run in runs]
    console.print(f"a logit of torch's loss of split classes: {loss_bytes:.1f} bytes")
    console.print(f"splinters fitted to all rows {fit_splinters(runs):.3f}, in plans {SPLINTERS}")
    console.print(f"median {median(known):.1%} of {len(runs)}; with the splinters of the other")
    console.print(
        f"models' rows {median(map(abs, unseen)):.1%}, largest {max(map(abs, unseen)):.1%}"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
