"""Peak memory of a step: real CPU ranks, as torch's allocator sees them, against a trace.

`python benchmarks/plan_memory.py [words]` starts CPU ranks itself; words choose the rows that have
all of them in their name. A row per pipeline rank.
"""

import sys

from rich.console import Console
from rich.table import Table

from parallel.rank_pool import RankPool
from parallel.strategy import world_size
from trainer.plan.cases import iter_runs
from trainer.plan.real_peak import real_peaks
from trainer.plan.trace import trace_step

MIB = 2**20


def main(words: list[str]) -> None:
    """Print the table, each row as it is measured, and the largest difference."""
    pool, console, gaps = RankPool(4), Console(), []
    progress = Console(stderr=True)
    table = Table("family", "strategy", "activations", "rank", "real MiB", "traced MiB", "%")
    for family, name, mode, config, micro_batches in iter_runs():
        if not all(word in f"{family} {name} {mode}" for word in words):
            continue
        ranks = world_size(config.strategy)
        real = pool.run(ranks, real_peaks, config, micro_batches)
        for rank in range(0, ranks, ranks // config.strategy.pipeline):
            traced = trace_step(config, ranks, micro_batches, rank).peak_bytes
            gap = 100 * (traced / min(real[rank]) - 1)
            gaps.append(abs(gap))
            sizes = f"{min(real[rank]) / MIB:.3f}", f"{traced / MIB:.3f}", f"{gap:+.2f}"
            table.add_row(family, name, mode, str(rank), *sizes)
            progress.print(family, name, mode, rank, *sizes)
    pool.close()
    console.print(table)
    inside = sum(gap <= 1 for gap in gaps)
    console.print(f"{len(gaps)} rows, {inside} within 1 %; the largest gap is {max(gaps):.2f} %")


if __name__ == "__main__":
    main(sys.argv[1:])
