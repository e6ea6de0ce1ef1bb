"""Predict the memory of published FSDP2 runs: `python benchmarks/published_memory.py CSV`.

What torchtitan reports is what its allocator has reserved; a plan's card is compared with it.
"""

import csv
import sys
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

from parallel.strategy import StrategyConfig
from trainer.config.train import DataConfig, ModelConfig, TrainConfig
from trainer.plan.held_forms import likely_held
from trainer.plan.machine import GIB
from trainer.plan.memory import MemoryModel
from trainer.plan.planner import RESERVED, SPLINTERS

STACK = "torchtitan"
# Its selective mode keeps every second product (of query, value, gate and down) and attention's
# output: of an 8B's block 108 of the 184 MiB that ours does.
SELECTIVE_SHARE = 108 / 184


def predicted_gib(row: dict[str, str]) -> float:
    """Return the memory of the fullest pipeline rank of a row."""
    number = {column: int(row[column]) for column in row if row[column].isdecimal()}
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
    pipeline, context = number["pipeline"], number["context"]
    strategy = StrategyConfig(
        pipeline=pipeline,
        shard=number["shard"] * context,  # torchtitan shards over context too
        context=context,
        tensor=number["tensor"],
        schedule=row["schedule"] or "gpipe",
        stages_per_rank=number["stages_per_rank"] if pipeline > 1 else 0,
    )
    data = DataConfig(kind="text", path="not read", seq_len=number["seq_len"])
    forms = MemoryModel.of(TrainConfig(model=model, data=data, precision=row["precision"]))
    count = number["micro_batches"]
    stages = number["stages_per_rank"]
    held = likely_held(strategy.schedule, pipeline, stages if pipeline > 1 else 1, count)

    def fullest(mode: str) -> float:
        found = forms.terms(strategy, number["micro_batch"], count, mode, held)
        return max(terms.total for terms in found)

    total = fullest("none" if row["ac"] == "none" else "block")
    if row["ac"] == "selective":
        total += SELECTIVE_SHARE * (fullest("selective") - total)
    return (SPLINTERS * total + RESERVED) / GIB


def main(path: Path) -> None:
    """Print predicted against published memory."""
    if not path.exists():
        print(f"{path} is not there: nothing to predict")  # noqa: T201
        return
    table, errors = Table("run", "layout", "published GiB", "predicted", "error"), []
    with path.open(newline="", encoding="utf-8") as file:
        rows = [r for r in csv.DictReader(file) if r["group"].startswith(STACK) and r["mem_gib"]]
    for row in rows:
        found, measured = predicted_gib(row), float(row["mem_gib"])
        errors.append(abs(found / measured - 1))
        axes = ("shard", "context", "tensor", "pipeline")
        layout = " ".join(f"{axis}={row[axis]}" for axis in axes if row[axis] != "1")
        shown = f"{row['model']} {row['precision']} {row['ac']} compile={row['compile']}"
        table.add_row(
            shown, layout, f"{measured:.1f}", f"{found:.1f}", f"{found / measured - 1:+.1%}"
        )
    Console(width=120).print(table)
    print(f"median {median(errors):.1%} of {len(errors)}")  # noqa: T201


if __name__ == "__main__":
    main(Path(sys.argv[1]))
