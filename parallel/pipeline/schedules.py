"""Pipeline schedules by name, their stage placement and validation; does not import torch.

A schedule is the order in which a rank runs the forwards and backwards of its stages (consecutive
layers) for the micro-batches of a step. torch.distributed.pipelining runs them.
"""

import csv
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from parallel.config_fields import key_facts
from parallel.errors import ConfigError, UserError
from parallel.pipeline.simulator import KINDS, Action, bubble_fraction, simulate_schedule
from parallel.strategy import StrategyConfig

CSV_KEY = "strategy.schedule_csv"
BATCH = "batch_size / (micro_batch_size × ranks that see different samples)"
BATCH_CHANGE = "change batch_size or micro_batch_size"
# A cell of a custom schedule: one action, or an overlapped pair of a forward and a backward.
ACTION = re.compile(r"(\d{1,6})([FBIW])(\d{1,6})")
PAIR = re.compile(r"\((\d+F\d+);(\d+B\d+)\)OVERLAP_F_B")
SHOWN = 3  # problems reported per file; the rest is counted


@dataclass(frozen=True)
class Schedule:
    """The torch class of a schedule, its stage placement and its restrictions."""

    torch_class: str  # in torch.distributed.pipelining.schedules
    least_stages: int  # per rank
    most_stages: int | None = None  # per rank; None = any number
    v_shaped: bool = False  # rank 0 has the first stage and the last, not stages 0, ranks, …
    least_micro_batches: int = 0  # per rank of the pipeline; 0 = one is enough
    whole_rounds: bool = False  # micro-batches go in rounds, of at least as many as ranks
    splits_backward: bool = False  # gradients of inputs and of weights apart, in two passes


SCHEDULES = {
    "gpipe": Schedule("ScheduleGPipe", 1, 1),
    "1f1b": Schedule("Schedule1F1B", 1, 1),
    # torch takes one stage per rank here too, but the two are 1f1b and gpipe then.
    "interleaved": Schedule("ScheduleInterleaved1F1B", 2, whole_rounds=True),
    "looped_bfs": Schedule("ScheduleLoopedBFS", 2),
    # With one stage per rank this is the ZB-H1 of the paper.
    "zero_bubble": Schedule(
        "ScheduleInterleavedZeroBubble", 1, whole_rounds=True, splits_backward=True
    ),
    "zbv": Schedule("ScheduleZBVZeroBubble", 2, 2, v_shaped=True, splits_backward=True),
    "dualpipev": Schedule(
        "ScheduleDualPipeV", 2, 2, v_shaped=True, least_micro_batches=2, splits_backward=True
    ),
}
assert set(SCHEDULES) == set(key_facts(StrategyConfig, "schedule").choices)


def stages_of(schedule: str, rank: int, ranks: int, stages_per_rank: int) -> tuple[int, ...]:
    """Return the stages of a rank of the pipeline, in the order of the layers.

    A loop gives rank r the stages r, r + ranks, …; a V the stages r and 2·ranks - 1 - r.
    """
    stages = range(ranks * stages_per_rank)
    return tuple(stage for stage in stages if rank_of_stage(schedule, stage, ranks) == rank)


def stages_per_rank(strategy: StrategyConfig) -> int:
    """Return the stages per pipeline rank; if unset, the fewest that the schedule allows."""
    return strategy.stages_per_rank or SCHEDULES[strategy.schedule].least_stages


def stage_to_rank(strategy: StrategyConfig, ranks: int) -> list[int]:
    """Return the rank of each stage; a custom schedule defines it in its file."""
    count = ranks * stages_per_rank(strategy)
    if not strategy.schedule_csv:
        return [rank_of_stage(strategy.schedule, stage, ranks) for stage in range(count)]
    lists = _read_action_lists(strategy.schedule_csv, ranks)
    owner = {action.stage: rank for rank, listed in lists.items() for action in listed}
    return [owner[stage] for stage in range(count)]


def rank_of_stage(schedule: str, stage: int, ranks: int) -> int:
    """Return the rank of the pipeline that has a stage."""
    if SCHEDULES[schedule].v_shaped:
        return min(stage, 2 * ranks - 1 - stage)
    return stage % ranks


def accepts_micro_batches(schedule: str, ranks: int, micro_batches: int) -> bool:
    """Return whether torch runs the schedule with this number of micro-batches per step."""
    rules = SCHEDULES[schedule]
    if micro_batches < max(1, rules.least_micro_batches * ranks):
        return False
    # torch runs micro_batches // ranks rounds, all with the same number of micro-batches.
    rounds = max(1, micro_batches // ranks)
    return not rules.whole_rounds or micro_batches % rounds == 0


def has_split_backward(strategy: StrategyConfig) -> bool:
    """Return whether gradients of inputs and of weights are computed separately.

    Raises ConfigError if a custom schedule cannot be read.
    """
    if not strategy.schedule_csv:
        return SCHEDULES[strategy.schedule].splits_backward
    lists = _read_action_lists(strategy.schedule_csv, strategy.pipeline)
    return any(action.kind in "IW" for listed in lists.values() for action in listed)


def bubble_formula(schedule: str, ranks: int, micro_batches: int, stages_per_rank: int) -> float:
    """Return the bubble fraction if a forward and each half of a backward take one unit of time.

    With p ranks, m micro-batches, v stages per rank, idle time per rank is:

    - gpipe (arXiv 1811.06965), 1f1b: 3 (p - 1) of 3 m + 3 (p - 1);
    - interleaved (2104.04473), looped_bfs (2211.05953): the same while a rank works v times as
      long, for m of p and more;
    - zero_bubble (2401.10241, ZB-H1): forward + input - weight per rank before, p - 1, from m = p;
    - zbv (2401.10241, section 6): none on a rank from its first action to its last, but ranks
      start, and end, one after the other: p - 1 of the whole step, for enough micro-batches;
    - dualpipev (2412.19437's DualPipe on half the ranks): p - 1 times pair + backward - 3 weights,
      2 (p - 1). What overlaps in a pair is not counted: it takes a forward and a backward.

    For fewer micro-batches than ranks no paper says; those terms are what torch's lists cost.
    """
    p, m, v = ranks, micro_batches, stages_per_rank
    short = max(0, p - m)
    idle = {
        "gpipe": 3 * (p - 1),
        "1f1b": 3 * (p - 1),
        "interleaved": 3 * (p - 1) + 3 * (v - 1) * short,
        "looped_bfs": 3 * (p - 1) + 3 * (v - 1) * short,
        "zero_bubble": p - 1 + v * short + (v - 1) * max(0, p - 2 * m),
        "zbv": max(p - 1, 4 * (p - 1) - 2 * (m - 1)),
        "dualpipev": 2 * (p - 1),
    }[schedule]
    return idle / (3 * v * m + idle)


def find_schedule_problems(strategy: StrategyConfig, micro_batches: int) -> list[str]:
    """Return the reasons why this pipeline cannot run; a custom schedule replaces the named one."""
    ranks, per_rank, path = strategy.pipeline, stages_per_rank(strategy), strategy.schedule_csv
    if path:
        try:
            simulate_schedule(read_csv(path, ranks, per_rank, micro_batches))
        except UserError as error:
            start = f"{CSV_KEY}={path}"
            return [p if p.startswith(start) else f"{start}: {p}" for p in error.problems]
        return []
    found = []
    schedule, rules = strategy.schedule, SCHEDULES[strategy.schedule]
    least, most = rules.least_stages, rules.most_stages
    if per_rank < least or (most is not None and per_rank > most):
        must = f"exactly {least}" if least == most else f"at least {least}"
        found.append(
            f"strategy.stages_per_rank={per_rank} must be {must} for strategy.schedule={schedule}; "
            f"set strategy.stages_per_rank={least}{_suggest_schedule(schedule, per_rank)}"
        )
    if micro_batches < 1 or not accepts_micro_batches(schedule, ranks, micro_batches):
        found.append(_wrong_count(schedule, ranks, micro_batches))
    return found


def find_schedule_warnings(strategy: StrategyConfig, micro_batches: int) -> list[str]:
    """Return a warning if there are fewer micro-batches than ranks; requires a valid schedule."""
    ranks, per_rank, path = strategy.pipeline, stages_per_rank(strategy), strategy.schedule_csv
    if micro_batches >= ranks:
        return []
    if path:
        name = f"{CSV_KEY}={path}"
        share = bubble_fraction(simulate_schedule(read_csv(path, ranks, per_rank, micro_batches)))
    else:
        name = f"strategy.schedule={strategy.schedule}"
        share = bubble_formula(strategy.schedule, ranks, micro_batches, per_rank)
    return [
        f"{name}: {micro_batches} micro-batches ({BATCH}) are fewer than strategy.pipeline={ranks} "
        f"ranks, which are idle for {100 * share:.0f} % of a step (bubble); {BATCH_CHANGE} for "
        f"{ranks} or more"
    ]


def read_csv(
    path: str, ranks: int, stages_per_rank: int, micro_batches: int
) -> dict[int, list[Action]]:
    """Read a custom schedule in torch's compute-only CSV format.

    One row per pipeline rank, cells like 0F0, 1B2, 0I1 and 0W1 (stage, kind, micro-batch), empty =
    idle. The file defines the placement of stages. Raises ConfigError if it is incomplete.
    """
    actions = _read_action_lists(path, ranks)
    found = _find_misplaced_stages(actions, stages_per_rank) or _find_miscounted_actions(
        actions, micro_batches
    )
    if found:
        raise ConfigError(*(f"{CSV_KEY}={path}: {problem}" for problem in found))
    return actions


def _read_action_lists(path: str, ranks: int) -> dict[int, list[Action]]:
    try:
        with Path(path).open(newline="", encoding="utf-8") as file:
            rows = list(csv.reader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{CSV_KEY}={path} cannot be read: {error}") from error
    while rows and not any(cell.strip() for cell in rows[-1]):
        rows.pop()  # lines at the end without anything
    if len(rows) != ranks:
        raise ConfigError(
            f"{CSV_KEY}={path} has {len(rows)} rows, but strategy.pipeline={ranks}; it must have "
            f"one row per rank: set strategy.pipeline={max(1, len(rows))}"
        )
    return {rank: _parse_row(path, rank, row) for rank, row in enumerate(rows)}


def _suggest_schedule(schedule: str, stages_per_rank: int) -> str:
    """Return a hint naming the schedules that allow this number of stages per rank."""
    fit = [
        name
        for name, rules in SCHEDULES.items()
        if rules.least_stages <= stages_per_rank <= (rules.most_stages or stages_per_rank)
    ]
    return f", or strategy.schedule={' or '.join(fit)}" if fit else ""


def _wrong_count(schedule: str, ranks: int, micro_batches: int) -> str:
    below = next(
        (m for m in range(micro_batches - 1, 0, -1) if accepts_micro_batches(schedule, ranks, m)),
        None,
    )
    above = next(
        m
        for m in range(max(1, micro_batches + 1), 3 * ranks + micro_batches + 3)
        if accepts_micro_batches(schedule, ranks, m)
    )
    rules = SCHEDULES[schedule]
    if micro_batches < max(1, rules.least_micro_batches * ranks):
        least = max(1, rules.least_micro_batches * ranks)
        rule = f"at least {least} micro-batches"
    else:
        rounds = micro_batches // ranks
        rule = f"{rounds} rounds of equally many micro-batches"
    near = " or ".join(str(m) for m in (below, above) if m)
    return (
        f"strategy.schedule={schedule} on strategy.pipeline={ranks} ranks takes {rule}, but there "
        f"are {micro_batches} ({BATCH}); {BATCH_CHANGE} for {near}"
    )


def _parse_row(path: str, rank: int, row: Sequence[str]) -> list[Action]:
    actions = []
    for number, cell in enumerate(row, 1):
        text = cell.strip()
        pair = PAIR.fullmatch(text)
        for part in pair.groups() if pair else [text] if text else []:
            match = ACTION.fullmatch(part)
            if match is None:
                raise ConfigError(
                    f"{CSV_KEY}={path}: row {rank + 1} (rank {rank}), cell {number}: {text!r} is "
                    "not an action; write stage, F, B, I or W, and micro-batch, e.g. 0F0, or "
                    "leave it empty for idle"
                )
            stage, kind, micro_batch = match.groups()
            joined = pair is not None and kind == "F"
            actions.append(Action(int(stage), kind, int(micro_batch), joined))
    return actions


def _find_misplaced_stages(actions: dict[int, list[Action]], stages_per_rank: int) -> list[str]:
    """Return problems: stages on two ranks, too few or too many on one, or beyond the last."""
    where = {rank: f"{rank + 1} (rank {rank})" for rank in actions}
    stages = {rank: sorted({a.stage for a in listed}) for rank, listed in actions.items()}
    found = []
    for stage, times in sorted(Counter(s for own in stages.values() for s in own).items()):
        if times > 1:
            rows = " and ".join(where[rank] for rank, own in stages.items() if stage in own)
            found.append(f"stage {stage} is in rows {rows}; a stage is on one rank")
    if found:
        return found
    last = len(actions) * stages_per_rank - 1
    for rank, own in stages.items():
        if len(own) != stages_per_rank:
            shown = ", ".join(map(str, own)) or "none"
            found.append(
                f"row {where[rank]} has {len(own)} stages ({shown}), but strategy.stages_per_rank="
                f"{stages_per_rank}; every row must have {stages_per_rank}"
            )
        elif own[-1] > last:
            found.append(
                f"row {where[rank]} has stage {own[-1]}, but strategy.pipeline={len(actions)} × "
                f"strategy.stages_per_rank={stages_per_rank} are stages 0 to {last}"
            )
    return found


def _find_miscounted_actions(actions: dict[int, list[Action]], micro_batches: int) -> list[str]:
    """Return problems: actions missing, repeated or of a micro-batch that does not exist."""
    done = {(a.stage, a.micro_batch) for listed in actions.values() for a in listed}
    counts = Counter(Counter(stage for stage, _ in done).values())
    if micro_batches not in counts:  # of no stage: it is not one wrong cell
        held = counts.most_common(1)[0][0]
        return [
            f"it is for {held} micro-batches, but there are {micro_batches} ({BATCH}); "
            f"{BATCH_CHANGE} for {held}"
        ]
    found = []
    for rank, listed in actions.items():
        where = f"row {rank + 1} (rank {rank})"
        count = Counter((a.stage, a.kind, a.micro_batch) for a in listed)
        for (stage, kind, micro_batch), times in count.items():
            name = f"{where} has {stage}{kind}{micro_batch}"
            if times > 1:
                found.append(f"{name} {times} times; it must be there once")
            if micro_batch >= micro_batches:
                found.append(f"{name}, but micro-batches are 0 to {micro_batches - 1}")
        for stage in sorted({a.stage for a in listed}):
            for m in range(micro_batches):
                kinds = {kind for kind in KINDS if count[stage, kind, m]}
                found += _require_both_kinds(where, f"{stage}{{}}{m}", kinds)
    rest = len(found) - SHOWN
    return found[:SHOWN] + ([f"and {rest} more like these"] if rest > 0 else [])


def _require_both_kinds(where: str, cell: str, kinds: set[str]) -> list[str]:
    if kinds in ({"F", "B"}, {"F", "I", "W"}):
        return []
    has = ", ".join(cell.format(kind) for kind in KINDS if kind in kinds)
    whole, split = (" and ".join(cell.format(k) for k in kinds) for kinds in ("FB", "FIW"))
    return [f"{where} must have {whole}, or {split}, but has {has or 'none of them'}"]
