"""Traces of large models: a few of their blocks and micro-batches, extrapolated exactly.

Between the second block of a stack and the last but one all are alike, so every window's peak and
every count is linear in the number of blocks, and where micro-batches pile up in their number too.
The step is traced at two sizes of each, and each window is extrapolated by itself: which of them
is the highest may change with the size.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, product
from math import prod

from parallel.pipeline.partition import balance_stages, stage_blocks
from parallel.pipeline.schedules import (
    accepts_micro_batches,
    stage_to_rank,
    stages_per_rank,
)
from parallel.pipeline.simulator import in_flight
from parallel.pipeline.torch_schedules import list_actions
from trainer.config.train import TrainConfig, is_encoder_decoder, longest_source
from trainer.nn.flops import flops_per_block
from trainer.plan.inputs import Shapes
from trainer.plan.live_bytes import REST
from trainer.plan.trace import StepTrace, Window, WindowTrace, trace_windows

ENDS = 2  # blocks, and micro-batches, at either end that are told apart
SHORTEST = 3  # blocks of a stack that are traced
COUNT_BYTES = 8  # a number of targets
Role = tuple[str, int, int, int, int]  # action, stage, stack, places of block and micro-batch


@dataclass(frozen=True)
class Cut:
    """The blocks of each stage, (of the encoder or only stack, of the decoder behind it)."""

    stages: tuple[tuple[int, int], ...]

    @property
    def stacks(self) -> tuple[int, int]:
        """Return the blocks of each stack."""
        first, second = zip(*self.stages, strict=True)
        return sum(first), sum(second)

    def place(self, block: int) -> tuple[int, int, int, int]:
        """Return a block's stage and stack, its number there, and how many there are."""
        before = [0, self.stacks[0]]
        for stage, counts in enumerate(self.stages):
            for stack in (0, 1):
                if before[stack] <= block < before[stack] + counts[stack]:
                    return stage, stack, block - before[stack], counts[stack]
                before[stack] += counts[stack]
        raise AssertionError(f"no stage has block {block}")


def trace_stages(
    config: TrainConfig,
    world_size: int,
    inputs: Shapes,
    micro_batches: int,
    device: str = "cpu",
    pipeline_ranks: Sequence[int] = (),
) -> list[StepTrace]:
    """Return the trace of a step on the first rank of each of these pipeline ranks; empty = of all.

    The others of it hold as much or less. `config` is complete, with resolved degrees; all micro-
    batches of a step have the shapes `inputs`. The process must have no process group.
    """
    each = world_size // config.strategy.pipeline
    return [
        _extrapolate(config, world_size, inputs, micro_batches, rank, rank * each, device)
        for rank in pipeline_ranks or range(config.strategy.pipeline)
    ]


def cut_of(config: TrainConfig) -> Cut:
    """Return how a run's model is cut into stages."""
    model, strategy = config.model, config.strategy
    first, second = model.layers, 0
    if is_encoder_decoder(model):
        first, second = model.encoder_layers or model.layers, model.layers
    costs = flops_per_block(model, model.max_positions, longest_source(model))
    count = strategy.pipeline * stages_per_rank(strategy) if strategy.pipeline > 1 else 1
    firsts = strategy.split or balance_stages(costs, count)
    stages = []
    for blocks in stage_blocks(first + second, firsts):
        encoder = sum(int(block) < first for block in blocks)
        stages.append((encoder, len(blocks) - encoder))
    return Cut(tuple(stages))


def _extrapolate(
    config: TrainConfig,
    world_size: int,
    inputs: Shapes,
    micro_batches: int,
    pipeline_rank: int,
    rank: int,
    device: str,
) -> StepTrace:
    """Trace the corners of a grid of sizes, and continue it to the real ones."""
    cut, placement = cut_of(config), stage_to_rank(config.strategy, config.strategy.pipeline)
    own = [stage for stage, of in enumerate(placement) if of == pipeline_rank]
    shortest = [_shortest(cut, own, stack) for stack in (0, 1)]
    grid = [*(_two_sizes(n, config) for n in shortest), _traced_counts(config, micro_batches)]
    corners: dict[tuple[int, ...], dict[Role, WindowTrace]] = {}
    for sizes in product(*grid):
        saved = [long - short for long, short in zip(shortest, sizes[:2], strict=True)]
        short_cut = _shorten(cut, own, saved, _period(config))
        windows = trace_windows(
            _with_cut(config, short_cut), world_size, [inputs] * sizes[2], rank, device
        )
        fixed = [len(axis) == 1 for axis in grid]
        corners[sizes] = _by_role(windows, short_cut, sizes[2], fixed)
    weights = _weights(grid, [*shortest, micro_batches])
    repeated = micro_batches - grid[2][0] if len(grid[2]) == 1 else 0
    trace = _join(rank, corners, weights, grid[2][0] // 2 if repeated else -1, repeated)
    # The inputs of all micro-batches are there, and the number of targets of each.
    waiting = repeated * (COUNT_BYTES + sum(shape.nbytes for shape in inputs.values()))
    kinds = {**trace.kinds, REST: trace.kinds[REST] + waiting}
    return replace(trace, peak_bytes=trace.peak_bytes + waiting, kinds=kinds)


def _join(
    rank: int,
    corners: Mapping[tuple[int, ...], Mapping[Role, WindowTrace]],
    weights: Mapping[tuple[int, ...], float],
    middle: int,
    repeated: int,
) -> StepTrace:
    """Return the trace at the real sizes.

    `middle` is a micro-batch like which there are `repeated` more than were traced.
    """

    def continued(value: Callable[[Mapping[Role, WindowTrace]], float]) -> int:
        return round(sum(weights[sizes] * value(found) for sizes, found in corners.items()))

    def counted(value: Callable[[WindowTrace], int]) -> int:
        def total(found: Mapping[Role, WindowTrace]) -> int:
            # A window may have two roles: near the start, and near the end.
            turns = {id(window): role[4] for role, window in found.items()}
            windows = {id(window): window for window in found.values()}
            times = {key: 1 + repeated * (turns[key] == middle) for key in windows}
            return sum(times[key] * value(window) for key, window in windows.items())

        return continued(total)

    shared = set.intersection(*(set(found) for found in corners.values()))
    peaks = {role: continued(lambda f, r=role: f[r].peak_bytes) for role in shared}  # type: ignore[misc]
    top = max(peaks, key=lambda role: peaks[role])
    every = [window for found in corners.values() for window in found.values()]
    kinds = sorted({kind for window in every for kind in window.kinds})
    wires = sorted({key for window in every for key in window.wire_bytes})
    return StepTrace(
        rank,
        peaks[top],
        {kind: continued(lambda f, k=kind: f[top].kinds.get(k, 0)) for kind in kinds},  # type: ignore[misc]
        {key: counted(lambda w, k=key: w.wire_bytes.get(k, 0)) for key in wires},  # type: ignore[misc]
        counted(lambda window: window.collectives),
        counted(lambda window: window.operators),
        counted(lambda window: window.host_reads),
    )


def _weights(grid: Sequence[Sequence[int]], real: Sequence[int]) -> dict[tuple[int, ...], float]:
    """Return the weight of each corner in the multilinear continuation to the real sizes."""
    axes = []
    for sizes, size in zip(grid, real, strict=True):
        if len(sizes) == 1:
            axes.append({sizes[0]: 1.0})
            continue
        share = (size - sizes[0]) / (sizes[1] - sizes[0])
        axes.append({sizes[0]: 1.0 - share, sizes[1]: share})
    return {
        corner: prod(axis[size] for axis, size in zip(axes, corner, strict=True))
        for corner in product(*grid)
    }


def _by_role(
    windows: Mapping[Window, WindowTrace], cut: Cut, micro_batches: int, fixed: Sequence[bool]
) -> dict[Role, WindowTrace]:
    """Return the windows by what their block and micro-batch are, whatever their number.

    Along axes with one traced size a number is its own role.
    """
    found: dict[Role, WindowTrace] = {}
    for window, trace in windows.items():
        if not window.action:
            found["", 0, 0, 0, 0] = trace
            continue
        stage, stack, number, count = cut.place(int(window.block))
        for place in _places(number, count, fixed[stack]):
            for turn in _places(window.micro_batch, micro_batches, fixed[2]):
                found[window.action, stage, stack, place, turn] = trace
    return found


def _places(number: int, count: int, fixed: bool) -> Iterator[int]:
    """Yield the place from the start, and from the end as a negative number, if near to it."""
    if fixed or number < ENDS:
        yield number
    if not fixed and number >= count - ENDS:
        yield number - count


def _shortest(cut: Cut, own: Sequence[int], stack: int) -> int:
    """Return the blocks of a stack in the stage of this rank that has the fewest, if any."""
    return min((cut.stages[stage][stack] for stage in own if cut.stages[stage][stack]), default=0)


def _shorten(cut: Cut, own: Sequence[int], saved: Sequence[int], period: int) -> Cut:
    """Return a cut with `saved` blocks less in each own stage, by stack, and few in the others."""
    stages = []
    for stage, counts in enumerate(cut.stages):
        if stage in own:
            stages.append(tuple(n and n - less for n, less in zip(counts, saved, strict=True)))
        else:
            stages.append(tuple(n and (n - 1) % period + 1 for n in counts))
    return Cut(tuple((first, second) for first, second in stages))


def _with_cut(config: TrainConfig, cut: Cut) -> TrainConfig:
    """Return a configuration with a model of this many blocks, cut there."""
    first, second = cut.stacks
    two = is_encoder_decoder(config.model)
    model = replace(
        config.model, layers=second if two else first, encoder_layers=first if two else 0
    )
    firsts = list(accumulate(sum(counts) for counts in cut.stages))[:-1]
    return replace(config, model=model, strategy=replace(config.strategy, split=firsts))


def _period(config: TrainConfig) -> int:
    """Return after how many blocks their kinds repeat."""
    return config.model.full_attention_every or 1


def _two_sizes(blocks: int, config: TrainConfig) -> tuple[int, ...]:
    """Return the two numbers of blocks to trace, or the number itself if it is no larger."""
    compress, period = config.compress, _period(config)
    uneven = compress.merge or compress.pool_after or compress.drop or compress.match
    short = blocks - (blocks - SHORTEST) // period * period
    if not blocks or uneven or short + period >= blocks:
        return (blocks,)
    return short, short + period


def _traced_counts(config: TrainConfig, micro_batches: int) -> tuple[int, ...]:
    """Return the numbers of micro-batches to trace, no more than a schedule holds at once."""
    strategy, ranks = config.strategy, config.strategy.pipeline
    if ranks == 1:
        return (min(micro_batches, 3),)  # the first, one in between, the last
    if strategy.schedule_csv:
        return (micro_batches,)
    schedule, per_rank = strategy.schedule, stages_per_rank(strategy)

    def held(count: int) -> Mapping[int, int]:
        return in_flight(list_actions(schedule, ranks, per_rank, count))

    counts = range(2 * ranks + 1, micro_batches)
    accepted = [n for n in counts if accepts_micro_batches(schedule, ranks, n)]
    if not accepted:
        return (micro_batches,)
    enough = next((n for n in accepted if n >= 6 * ranks), micro_batches)
    most = held(enough)
    if max(most.values()) == enough:  # all of them
        return (3, 4) if micro_batches > 4 else (micro_batches,)
    return (next((n for n in accepted if n < enough and held(n) == most), enough),)
