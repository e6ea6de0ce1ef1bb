"""Simulation of pipeline schedules: timing of the actions, bubbles, micro-batches in flight."""

from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from parallel.errors import ConfigError

KINDS = {
    "F": "forward",
    "B": "backward",
    "I": "backward of the inputs",
    "W": "backward of the weights",
}
# The papers' unit: a forward and each half of a backward take the same time.
UNIT_COSTS = {"F": 1, "B": 2, "I": 1, "W": 1}


class Action(NamedTuple):
    """A computation of one stage on one micro-batch; written `1F0` as in torch."""

    stage: int
    kind: str  # one of KINDS
    micro_batch: int
    # Overlapped with the next action: the results of both are sent together.
    joined: bool = False

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.micro_batch}"


class Span(NamedTuple):
    """Start and end of an action on its rank, in the unit of the costs (recorded: seconds)."""

    rank: int
    stage: int
    kind: str
    micro_batch: int
    start: float
    end: float


Lists = Mapping[int, Sequence[Action]]  # rank -> its actions in order
Result = tuple[int, str, int]  # stage, kind ("B" = the gradient of its inputs) and micro-batch


def unit_cost(action: Action) -> float:
    """Return the cost of an action in UNIT_COSTS."""
    return UNIT_COSTS[action.kind]


def simulate_schedule(actions: Lists, cost: Callable[[Action], float] = unit_cost) -> list[Span]:
    """Return the spans of the actions, each rank strictly in order, with instant communication.

    A forward waits for the previous stage's, a backward for its own forward and the next stage's
    backward. Raises ConfigError at a deadlock, naming the action that each rank waits for.
    """
    last = max(action.stage for listed in actions.values() for action in listed)
    queues = {rank: deque(_group_joined(listed)) for rank, listed in actions.items()}
    clock: dict[int, float] = dict.fromkeys(actions, 0)
    arrived: dict[Result, float] = {}
    spans: list[Span] = []
    while any(queues.values()):
        before = len(spans)
        for rank, queue in queues.items():
            while queue and not _missing_inputs(queue[0], arrived, last):
                ran = _run_group(rank, queue.popleft(), clock[rank], arrived, last, cost)
                clock[rank] = ran[-1].end
                spans += ran
        if len(spans) == before:
            raise ConfigError(_describe_deadlock(queues, actions, arrived, last))
    return spans


def bubble_fraction(spans: Sequence[Span]) -> float:
    """Return the idle fraction of the ranks' total time, from the first start to the last end.

    GPipe's and 1F1B's is (ranks - 1) / (micro-batches + ranks - 1) by this definition, which is
    GPipe's own (arXiv 1811.06965, section 2.3). Megatron-LM (arXiv 2104.04473) and the zero bubble
    paper (2401.10241) report idle over busy time, or omit the ranks' idle time at start and end.
    """
    ranks = len({span.rank for span in spans})
    whole = ranks * (max(span.end for span in spans) - min(span.start for span in spans))
    return (whole - sum(span.end - span.start for span in spans)) / whole


def in_flight(actions: Lists) -> dict[int, int]:
    """Return the maximum number of micro-batches whose activations each stage holds.

    Activations are held from a forward to the end of its backward (of the weights, if split).
    """
    held: Counter[int] = Counter()
    most: dict[int, int] = {}
    for listed in actions.values():
        for action in listed:
            held[action.stage] += {"F": 1, "I": 0}.get(action.kind, -1)
            most[action.stage] = max(most.get(action.stage, 0), held[action.stage])
    return dict(sorted(most.items()))


def _group_joined(listed: Iterable[Action]) -> list[list[Action]]:
    """Group joined actions; most groups have one action."""
    groups: list[list[Action]] = [[]]
    for action in listed:
        groups[-1].append(action)
        if not action.joined:
            groups.append([])
    return [group for group in groups if group]


def _result_of(action: Action) -> Result:
    return action.stage, "B" if action.kind == "I" else action.kind, action.micro_batch


def _inputs_of(action: Action, last: int) -> list[Result]:
    stage, kind, micro_batch, _ = action
    if kind == "F":
        return [(stage - 1, "F", micro_batch)] if stage else []
    if kind == "W":
        return [(stage, "B", micro_batch)]
    behind = [(stage + 1, "B", micro_batch)] if stage < last else []
    return [(stage, "F", micro_batch), *behind]


def _missing_inputs(
    group: Sequence[Action], arrived: Mapping[Result, float], last: int
) -> list[Result]:
    """Return the inputs of a group that have not been computed yet."""
    own = {_result_of(action) for action in group}
    needed = (need for action in group for need in _inputs_of(action, last))
    return [need for need in needed if need not in arrived and need not in own]


def _run_group(
    rank: int,
    group: Sequence[Action],
    clock: float,
    arrived: dict[Result, float],
    last: int,
    cost: Callable[[Action], float],
) -> list[Span]:
    """Return the spans of a group whose inputs are available; add its results to `arrived`."""
    spans = []
    for action in group:
        start = max([clock, *(arrived.get(need, clock) for need in _inputs_of(action, last))])
        clock = start + cost(action)
        spans.append(Span(rank, action.stage, action.kind, action.micro_batch, start, clock))
    arrived |= {_result_of(action): clock for action in group}
    return spans


def _describe_deadlock(
    queues: Mapping[int, Sequence[list[Action]]],
    actions: Lists,
    arrived: Mapping[Result, float],
    last: int,
) -> str:
    where = {_result_of(a): (rank, a) for rank, listed in actions.items() for a in listed}
    stuck = []
    for rank, queue in queues.items():
        if not queue:
            continue
        missing = _missing_inputs(queue[0], arrived, last)[0]
        action = next(a for a in queue[0] if missing in _inputs_of(a, last))
        if missing in where:
            owner, awaited = where[missing]
            stuck.append(f"rank {rank} at {action} waits for {awaited} of rank {owner}")
        else:
            stuck.append(f"rank {rank} at {action} waits for {Action(*missing)}, which none runs")
    return f"the schedule cannot go on (deadlock): {'; '.join(stuck)}"
