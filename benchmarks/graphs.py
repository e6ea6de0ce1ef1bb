"""Graphs and breaks of compiled blocks: every family, preset and activation checkpointing.

`python benchmarks/graphs.py [words]` needs one process, no GPU and no other rank; words choose the
rows that have all of them in their name, of which one is the precision.
"""

import sys
from dataclasses import replace

from rich.console import Console
from rich.table import Table

from parallel.pipeline.schedules import has_split_backward
from parallel.strategy import world_size
from trainer.plan.cases import iter_runs
from trainer.plan.step_faults import count_graphs

PRECISIONS = ("fp32", "bf16", "fp16", "fp8")


def main(words: list[str]) -> None:
    """Print a row for each combination, and how many have one graph per kind of block."""
    console, progress, good, rows = Console(), Console(stderr=True), 0, 0
    table = Table("family", "strategy", "activations", "precision", "kinds", "graphs", "breaks")
    for family, name, mode, config, micro_batches in iter_runs(layers=2):
        for precision in PRECISIONS:
            chosen = all(word in f"{family} {name} {mode} {precision}" for word in words)
            if not chosen or has_split_backward(config.strategy):
                continue
            found = count_graphs(
                replace(config, compile=True, precision=precision),
                world_size(config.strategy),
                micro_batches,
            )
            rows, good = rows + 1, good + found.one_per_kind
            row = family, name, mode, precision, str(found.kinds), str(found.graphs)
            table.add_row(*row, "; ".join(found.breaks))
            progress.print(*row, *found.breaks)
    console.print(table)
    console.print(f"{rows} rows, {good} with one graph for each kind of block, and no break")


if __name__ == "__main__":
    main(sys.argv[1:])
