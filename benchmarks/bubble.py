"""How long two CPU ranks are idle in a pipeline: measured, by formula, and simulated.

`python benchmarks/bubble.py [width] [blocks] [micro-batches of 128 tokens] [steps]` starts the
ranks itself, each on a core of its own where there are as many. Every schedule takes as many
recorded steps, in turn. Simulated: the schedule's own lists with the median time of each stage's
actions, as if messages took no time and no action ever waited for the machine.
"""

import statistics
from collections import defaultdict

from rich.console import Console
from rich.table import Table
from workload import by_sample, llama, on_ranks, pin, random_batch

from parallel.parallel_model import ParallelModel
from parallel.pipeline.schedules import (
    SCHEDULES,
    accepts_micro_batches,
    bubble_formula,
    stages_per_rank,
)
from parallel.pipeline.simulator import Action, Span, bubble_fraction, simulate_schedule
from parallel.pipeline.torch_schedules import list_actions
from parallel.runtime import Runtime
from parallel.strategy import StrategyConfig
from trainer.build import parallel_model
from trainer.precision import PRECISIONS

RANKS, SEQ_LEN, WARMUP_STEPS = 2, 128, 2


def strategy_of(schedule: str) -> StrategyConfig:
    """A pipeline of two ranks."""
    return StrategyConfig(pipeline=RANKS, schedule=schedule)


def workers(
    width: int, blocks: int, micro_batches: int, runtime: Runtime
) -> dict[str, ParallelModel]:
    """A pipeline of each schedule, cut where stages have equally many blocks."""
    config = llama(width, blocks, SEQ_LEN, vocab_size=256)
    return {
        schedule: parallel_model(config, strategy_of(schedule), runtime, PRECISIONS["fp32"])
        for schedule in SCHEDULES
        if accepts_micro_batches(schedule, RANKS, micro_batches)
    }


def measure(
    runtime: Runtime, width: int, blocks: int, micro_batches: int, steps: int
) -> dict[str, list[list[Span]]]:
    """The spans of every step, by schedule; on the first rank."""
    pin(runtime.rank)
    pipelines = workers(width, blocks, micro_batches, runtime)
    batches = by_sample(random_batch(micro_batches, SEQ_LEN, vocab_size=256))
    found: dict[str, list[list[Span]]] = {schedule: [] for schedule in pipelines}
    for step in range(WARMUP_STEPS + steps):
        for schedule, worker in pipelines.items():
            worker.zero_grad()
            with worker.record_pipeline() as recording:
                worker.forward_backward(batches)
            spans = recording.gather_spans()
            if step >= WARMUP_STEPS:
                found[schedule].append(spans)
    return found


def simulated(schedule: str, micro_batches: int, steps: list[list[Span]]) -> float:
    """The bubble of a schedule's lists whose actions take their stage's median time."""
    times: dict[tuple[int, str], list[float]] = defaultdict(list)
    for span in (span for spans in steps for span in spans):
        times[span.stage, span.kind].append(span.end - span.start)
    cost = {action: statistics.median(seconds) for action, seconds in times.items()}

    def cost_of(action: Action) -> float:
        return cost[action.stage, action.kind]

    stages = stages_per_rank(strategy_of(schedule))
    return bubble_fraction(
        simulate_schedule(list_actions(schedule, RANKS, stages, micro_batches), cost_of)
    )


if __name__ == "__main__":
    found, numbers = on_ranks(RANKS, measure, defaults=(512, 8, 4, 10))
    width, blocks, micro_batches, steps = numbers
    table = Table(
        "schedule",
        "bubble, median",
        "least and most",
        "formula",
        "simulated",
        "step, median ms",
        title=f"{blocks} blocks of width {width}, {micro_batches} × {SEQ_LEN} tokens, {RANKS} CPU "
        f"ranks, {steps} steps",
    )
    for schedule, ran in found.items():
        shares = [100 * bubble_fraction(spans) for spans in ran]
        lengths = [max(span.end for span in spans) for spans in ran]
        stages = stages_per_rank(strategy_of(schedule))
        formula = 100 * bubble_formula(schedule, RANKS, micro_batches, stages)
        table.add_row(
            schedule,
            f"{statistics.median(shares):.1f} %",
            f"{min(shares):.1f} to {max(shares):.1f}",
            f"{formula:.1f} %",
            f"{100 * simulated(schedule, micro_batches, ran):.1f} %",
            f"{1000 * statistics.median(lengths):.0f}",
        )
    Console().print(table)
