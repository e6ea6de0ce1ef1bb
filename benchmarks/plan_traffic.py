"""Bytes on the wire of every product of axes on 8 ranks: traced on fake ranks, and closed form.

`python benchmarks/plan_traffic.py [ranks]`: a row per product, over all its ranks; the model is a
small Llama in bf16.
"""

import sys

from rich.console import Console
from rich.table import Table

from parallel.strategy import AXES
from trainer.plan.traffic import products_of_axes, traced_traffic
from trainer.verify.cases import FAMILIES, scale_down

if __name__ == "__main__":
    ranks = int(sys.argv[1]) if sys.argv[1:] else 8
    table, different, total = Table(*AXES, "MB of a step, all ranks", "closed form"), 0, 0
    for strategy in products_of_axes(ranks):
        model = scale_down(FAMILIES["decoder (Llama)"], strategy.tensor, strategy.pipeline)
        counted = due = 0
        for rank in range(ranks):
            traced, formula = traced_traffic(strategy, model, rank)
            counted, due = counted + sum(traced.values()), due + sum(formula.values())
            different += traced != formula
        total += 1
        degrees = (str(getattr(strategy, axis)) for axis in AXES)
        table.add_row(*degrees, f"{counted / 1e6:.3f}", f"{due / 1e6:.3f}")
    console = Console()
    console.print(table)
    console.print(f"{total} products of axes, {total * ranks} ranks, {different} differ")
