"""Peak memory of a step: closed forms against the trace.

`python benchmarks/plan_forms.py [words]`: words choose the rows that have all of them in their
name. A row per pipeline rank.
"""

import sys

from rich.console import Console
from rich.table import Table

from parallel.strategy import world_size
from trainer.plan.cases import SAMPLES, iter_runs
from trainer.plan.in_flight import held_micro_batches
from trainer.plan.memory import MemoryModel
from trainer.plan.trace import trace_step

MIB = 2**20


def main(words: list[str]) -> None:
    """Print the table, each row as it is traced, and how many rows are within 2 %."""
    console, progress, gaps = Console(), Console(stderr=True), []
    table = Table("family", "strategy", "activations", "rank", "traced MiB", "closed form", "%")
    for family, name, mode, config, micro_batches in iter_runs():
        if not all(word in f"{family} {name} {mode}" for word in words):
            continue
        ranks, count = world_size(config.strategy), len(micro_batches)
        held = held_micro_batches(config.strategy, count)
        model = MemoryModel.of(config, device="cpu")
        for rank, terms in enumerate(model.terms(config.strategy, SAMPLES, count, mode, held)):
            first = rank * ranks // config.strategy.pipeline
            traced = trace_step(config, ranks, micro_batches, first).peak_bytes
            gaps.append(100 * (terms.total / traced - 1))
            sizes = f"{traced / MIB:.3f}", f"{terms.total / MIB:.3f}", f"{gaps[-1]:+.2f}"
            table.add_row(family, name, mode, str(rank), *sizes)
            progress.print(family, name, mode, rank, *sizes)
    console.print(table)
    inside = sum(abs(gap) <= 2 for gap in gaps)
    console.print(
        f"{len(gaps)} rows, {inside} within 2 %; from {min(gaps):.2f} to {max(gaps):.2f} %"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
