"""Bytes of a training step by strategy: counted from the collectives issued, and the closed form.

`python benchmarks/traffic.py` starts CPU ranks itself; the model is a small Llama in bf16. Words
behind it choose the strategies that have one of them in their name.
"""

import sys

from rich.console import Console
from rich.table import Table

from parallel.pipeline.schedules import stage_to_rank
from parallel.rank_pool import RankPool
from parallel.strategy import world_size
from trainer.verify.cases import FAMILIES, REDUCED, STRATEGIES, scale_down
from trainer.verify.comm_volume import step_traffic

if __name__ == "__main__":
    table = Table("strategy", "collective", "dtype", "counted", "closed form")
    pool = RankPool(max(map(world_size, STRATEGIES.values())))
    for name, strategy in (STRATEGIES | REDUCED).items():
        if sys.argv[1:] and not any(word in name for word in sys.argv[1:]):
            continue
        stages = len(stage_to_rank(strategy, strategy.pipeline))
        model = scale_down(FAMILIES["decoder (Llama)"], strategy.tensor, stages)
        counted, due = pool.run(world_size(strategy), step_traffic, strategy, model)[0]
        for collective, dtype in sorted(counted.keys() | due.keys(), key=str):
            key = (collective, dtype)
            numbers = (f"{sizes.get(key, 0):,}" for sizes in (counted, due))
            table.add_row(name, collective, str(dtype)[6:], *numbers)
        table.add_section()
    pool.close()
    Console().print(table)
