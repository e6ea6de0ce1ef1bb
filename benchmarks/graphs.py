"""Graphs and breaks of compiled blocks, and what waits for a device: every combination.

`python benchmarks/graphs.py [words]` needs one process, no GPU and no other rank; words choose the
rows that have all of them in their name: family, preset, activation checkpointing, precision. A row
of a schedule that splits backwards, which are not compiled, has its waits alone.
"""

import sys
from dataclasses import replace

from rich.console import Console
from rich.table import Table

from parallel.pipeline.schedules import has_split_backward
from parallel.strategy import world_size
from trainer.plan.cases import iter_runs
from trainer.plan.step_faults import count_graphs, find_host_waits

PRECISIONS = ("fp32", "bf16", "fp16", "fp8")


def main(words: list[str]) -> None:
    """Print a row for each combination, and how many have one graph per kind and no waits."""
    console, progress, rows, good = Console(), Console(stderr=True), 0, 0
    names = "family", "strategy", "activations", "precision", "kinds", "graphs", "breaks", "waits"
    table = Table(*names)
    for family, name, mode, config, micro_batches in iter_runs():
        for precision in PRECISIONS:
            chosen = all(word in f"{family} {name} {mode} {precision}" for word in words)
            splits = has_split_backward(config.strategy)
            if not chosen or (splits and precision == "fp8"):
                continue
            config = replace(config, compile=not splits, precision=precision)
            run = config, world_size(config.strategy), micro_batches
            waits, shown = find_host_waits(*run), ("", "", "")
            rows, fine = rows + 1, not waits
            if not splits:
                found = count_graphs(*run)
                shown = str(found.kinds), str(found.graphs), "; ".join(found.breaks)
                fine = fine and found.one_per_kind
            good += fine
            row = family, name, mode, precision, *shown, "; ".join(waits)
            table.add_row(*row)
            progress.print(*row)
    console.print(table)
    console.print(f"{rows} rows, {good} with a graph per kind of block, no break and no wait")


if __name__ == "__main__":
    main(sys.argv[1:])
