"""Schedules: torch's own lists, under unit costs, have the bubbles that the papers publish."""

import csv
from types import SimpleNamespace

import pytest
from torch.distributed.pipelining import schedules
from torch.distributed.pipelining._utils import generate_stage_to_rank_mapping

from parallel.errors import ConfigError
from parallel.pipeline.schedules import (
    SCHEDULES,
    accepts_micro_batches,
    bubble_formula,
    find_schedule_problems,
    find_schedule_warnings,
    rank_of_stage,
    read_csv,
    stages_of,
)
from parallel.pipeline.simulator import KINDS, Action, bubble_fraction, in_flight, simulate_schedule
from parallel.pipeline.torch_schedules import list_actions
from parallel.strategy import StrategyConfig


def pipeline(schedule, ranks, per_rank, path=""):
    return StrategyConfig(
        pipeline=ranks, schedule=schedule, stages_per_rank=per_rank, schedule_csv=str(path)
    )


def layouts(schedule, per_rank=4):
    """Pipelines of 1 to 4 ranks that torch runs: ranks, stages per rank, micro-batches."""
    rules = SCHEDULES[schedule]
    for ranks in (1, 2, 3, 4):
        for stages in range(rules.least_stages, (rules.most_stages or per_rank) + 1):
            for micro_batches in (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16):
                if accepts_micro_batches(schedule, ranks, micro_batches):
                    yield ranks, stages, micro_batches


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_stages_are_where_torch_has_them(schedule, ranks):
    rules = SCHEDULES[schedule]
    for per_rank in range(rules.least_stages, (rules.most_stages or 3) + 1):
        style = "v" if rules.v_shaped else "loop"
        mapping = generate_stage_to_rank_mapping(ranks, ranks * per_rank, style)
        stages = [stages_of(schedule, rank, ranks, per_rank) for rank in range(ranks)]
        assert stages == [tuple(s for s in mapping if mapping[s] == r) for r in range(ranks)]
        assert {s: rank_of_stage(schedule, s, ranks) for s in mapping} == mapping


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_micro_batches_are_those_that_torch_takes(schedule):
    stages = SCHEDULES[schedule].least_stages
    for ranks in (1, 2, 3, 4):
        for micro_batches in range(1, 20):
            try:
                list_actions(schedule, ranks, stages, micro_batches)
            except ValueError:
                assert not accepts_micro_batches(schedule, ranks, micro_batches), (
                    ranks,
                    micro_batches,
                )
            else:
                assert accepts_micro_batches(schedule, ranks, micro_batches), (ranks, micro_batches)


@pytest.mark.parametrize("schedule", [n for n, rules in SCHEDULES.items() if rules.v_shaped])
@pytest.mark.parametrize("stages", [1, 3])
def test_torch_refuses_other_stages_per_rank(schedule, stages):
    local = [SimpleNamespace(num_stages=4, group_size=2, group_rank=0, submod=None)] * stages
    with pytest.raises(ValueError, match="exactly 2 stages"):
        getattr(schedules, SCHEDULES[schedule].torch_class)(local, 8)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_stage_does_every_micro_batch_once(schedule):
    for ranks, per_rank, micro_batches in layouts(schedule):
        lists = list_actions(schedule, ranks, per_rank, micro_batches)
        for rank, listed in lists.items():
            stages = stages_of(schedule, rank, ranks, per_rank)
            assert {action.stage for action in listed} == set(stages)
            assert len(set(listed)) == len(listed)
            work = sum({"F": 0, "B": 2, "I": 1, "W": 1}[action.kind] for action in listed)
            assert work == 2 * len(stages) * micro_batches
            assert sum(a.kind == "F" for a in listed) == len(stages) * micro_batches


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_bubble_equals_the_formula(schedule):
    for layout in layouts(schedule):
        ranks, per_rank, micro_batches = layout
        spans = simulate_schedule(list_actions(*(schedule, *layout)))
        formula = bubble_formula(schedule, ranks, micro_batches, per_rank)
        assert bubble_fraction(spans) == formula, layout


def test_published_bubbles_by_hand():
    for p, m in ((2, 4), (4, 8), (8, 32)):
        assert bubble_formula("gpipe", p, m, 1) == (p - 1) / (m + p - 1)
        assert bubble_formula("1f1b", p, m, 1) == (p - 1) / (m + p - 1)
        for v in (2, 4):
            assert bubble_formula("interleaved", p, m, v) == (p - 1) / (v * m + p - 1)
            assert bubble_formula("looped_bfs", p, m, v) == (p - 1) / (v * m + p - 1)
            assert bubble_formula("zero_bubble", p, m, v) == (p - 1) / (3 * v * m + p - 1)
        assert bubble_formula("zbv", p, m, 2) == (p - 1) / (6 * m + p - 1)
        assert bubble_formula("dualpipev", p, m, 2) == (p - 1) / (3 * m + p - 1)


@pytest.mark.parametrize(("ranks", "micro_batches"), [(2, 3), (2, 8), (4, 8), (4, 9)])
def test_ranks_of_zbv_never_wait_once_they_began(ranks, micro_batches):
    spans = simulate_schedule(list_actions("zbv", ranks, 2, micro_batches))
    for rank in range(ranks):
        own = [span for span in spans if span.rank == rank]
        assert max(s.end for s in own) - min(s.start for s in own) == 6 * micro_batches


@pytest.mark.parametrize(("ranks", "micro_batches"), [(2, 2), (2, 5), (4, 4), (4, 6), (4, 16)])
def test_micro_batches_in_flight(ranks, micro_batches):
    stages = range(ranks)
    gpipe = in_flight(list_actions("gpipe", ranks, 1, micro_batches))
    assert gpipe == dict.fromkeys(stages, micro_batches)
    one = in_flight(list_actions("1f1b", ranks, 1, micro_batches))
    assert one == {stage: min(micro_batches, ranks - stage) for stage in stages}
    # ZB-H1 holds activations until the gradient of the weights: as 1F1B's first rank, on all.
    zero = in_flight(list_actions("zero_bubble", ranks, 1, micro_batches - micro_batches % ranks))
    assert zero == dict.fromkeys(stages, ranks)


def test_a_simulation_by_hand():
    lists = {
        0: [Action(0, "F", 0), Action(0, "F", 1), Action(0, "B", 0), Action(0, "B", 1)],
        1: [Action(1, "F", 0), Action(1, "I", 0), Action(1, "F", 1), Action(1, "I", 1)],
    }
    lists[1] += [Action(1, "W", 0), Action(1, "W", 1)]
    spans = {
        f"{s.stage}{s.kind}{s.micro_batch}": (s.start, s.end) for s in simulate_schedule(lists)
    }
    assert spans == {
        "0F0": (0, 1),
        "0F1": (1, 2),
        "1F0": (1, 2),
        "1I0": (2, 3),
        "0B0": (3, 5),
        "1F1": (3, 4),
        "1I1": (4, 5),
        "0B1": (5, 7),
        "1W0": (5, 6),
        "1W1": (6, 7),
    }
    assert bubble_fraction(simulate_schedule(lists)) == 2 / 14

    late = [
        span._replace(start=span.start + 9, end=span.end + 9) for span in simulate_schedule(lists)
    ]
    assert bubble_fraction(late) == 2 / 14

    slow = simulate_schedule(lists, lambda action: 3 if action.stage else 2)
    assert max(span.end for span in slow) == 20
    assert bubble_fraction(slow) == 1 - (4 * 2 + 6 * 3) / (2 * 20)


def test_results_of_an_overlapped_pair_leave_together():
    pair = {0: [Action(0, "F", 0), Action(0, "F", 1), Action(0, "B", 0), Action(0, "B", 1)]}
    pair[1] = [Action(1, "F", 0), Action(1, "F", 1, joined=True), Action(1, "B", 0)]
    pair[1].append(Action(1, "B", 1))
    ends = {span[:4]: span.end for span in simulate_schedule(pair)}
    assert ends[1, 1, "F", 1] == 3 and ends[1, 1, "B", 0] == 5 and ends[0, 0, "B", 0] == 7
    whole = {0: [Action(0, "F", 0, joined=True), Action(0, "B", 0)]}
    assert [span.end for span in simulate_schedule(whole)] == [1, 3]
    pair[0][1] = Action(0, "F", 1, joined=True)  # now with 0B0: the two wait for each other
    with pytest.raises(ConfigError, match="rank 0 at 0B0 waits for 1B0 of rank 1; rank 1 at 1F1"):
        simulate_schedule(pair)


def write(path, lists):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(map(in_torchs_words, lists.values()))
    return str(path)


def in_torchs_words(listed):
    """The same actions as torch's own kind, which a CSV file holds printed."""
    pair = ()
    for action in listed:
        kind = schedules._ComputationType(action.kind)
        pair += (schedules._Action(action.stage, kind, action.micro_batch),)
        if not action.joined:
            joint = schedules._Action(-1, schedules.OVERLAP_F_B, None, pair)
            yield joint if len(pair) > 1 else pair[0]
            pair = ()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_own_schedule_is_read_as_torch_writes_it(tmp_path, schedule):
    rules = SCHEDULES[schedule]
    per_rank, ranks, micro_batches = rules.least_stages, 2, 4
    lists = list_actions(schedule, ranks, per_rank, micro_batches)
    path = write(tmp_path / "own.csv", lists)
    assert read_csv(path, ranks, per_rank, micro_batches) == lists
    assert find_schedule_problems(pipeline(schedule, ranks, per_rank, path), micro_batches) == []
    stage = SimpleNamespace(num_stages=ranks * per_rank, group_size=ranks, group_rank=0)
    runtime = schedules._PipelineScheduleRuntime([stage], micro_batches)
    runtime._load_csv(path)
    ran = {
        rank: [str(part) for a in order for part in a.sub_actions or [a] if part.is_compute_op]
        for rank, order in runtime.pipeline_order_with_comms.items()
    }
    assert ran == {rank: [str(action) for action in listed] for rank, listed in lists.items()}


GOOD = ["0F0,0F1,,0B0,0B1", ",1F0,1I0,1F1,1I1,1W0,1W1"]
BAD = {
    ("0F0,0F1,,0B0,0B1",): "has 1 rows, but strategy.pipeline=2; it must have one row per rank: "
    "set strategy.pipeline=1",
    (GOOD[0], ",1F0,1X0,1F1,1I1,1W0,1W1"): "row 2 (rank 1), cell 3: '1X0' is not an action",
    (GOOD[0], ",1F0,1RECV_F0"): "row 2 (rank 1), cell 3: '1RECV_F0' is not an action",
    (GOOD[0], ",1F0,1I0,1F1 1I1,1W0,1W1"): "row 2 (rank 1), cell 4: '1F1 1I1' is not an action",
    ("0F0,0F1,0F00,0B0,0B1", GOOD[1]): "row 1 (rank 0) has 0F0 2 times; it must be there once",
    ("0F0,0F1,1B0,0B1", GOOD[1]): "stage 1 is in rows 1 (rank 0) and 2 (rank 1); a stage is on one "
    "rank",
    ("0F0,0F1,2F0,0B0,0B1", GOOD[1]): "row 1 (rank 0) has 2 stages (0, 2), but "
    "strategy.stages_per_rank=1; every row must have 1",
    (GOOD[0], GOOD[0]): "stage 0 is in rows 1 (rank 0) and 2 (rank 1); a stage is on one rank",
    (GOOD[0], "2F0,2F1,2B0,2B1"): "row 2 (rank 1) has stage 2, but strategy.pipeline=2 × "
    "strategy.stages_per_rank=1 are stages 0 to 1",
    ("0F0,0F1,,0B0", GOOD[1]): "row 1 (rank 0) must have 0F1 and 0B1, or 0F1 and 0I1 and 0W1, but "
    "has 0F1",
    (GOOD[0], "1F0,1I0,1F1,1I1,1W0"): "row 2 (rank 1) must have 1F1 and 1B1, or 1F1 and 1I1 and "
    "1W1, but has 1F1, 1I1",
    ("0F0,0F1,0F2,0B0,0B1", GOOD[1] + ",1F2,1B2"): "it is for 3 micro-batches, but there are 2",
    (GOOD[0], "1F0,1I0,1F1,1I1,1W0,1W1,1B5"): "row 2 (rank 1) has 1B5, but micro-batches are 0 "
    "to 1",
    (GOOD[0], "1F1,1I1,1F0,1I0,1W0,1W1"): "",  # another order, but it runs
    ("0F0,0B0,0F1,0B1", GOOD[1]): "",
    ("0F0,0B0,0F1,0B1", "1F0,1F1,1B0,1B1"): "the schedule cannot go on (deadlock): rank 0 at 0B0 "
    "waits for 1B0 of rank 1; rank 1 at 1F1 waits for 0F1 of rank 0",
    (GOOD[0], ",1I0,1F0,1F1,1I1,1W0,1W1"): "rank 1 at 1I0 waits for 1F0 of rank 1",
    (GOOD[0], ",1F0,1W0,1I0,1F1,1I1,1W1"): "rank 1 at 1W0 waits for 1I0 of rank 1",
    (*GOOD, ",,"): "",  # a line of nothing at the end
}


@pytest.mark.parametrize("rows", BAD, ids=" | ".join)
def test_own_schedule_that_is_wrong_gets_its_message(tmp_path, rows):
    path = tmp_path / "own.csv"
    path.write_text("\n".join(rows) + "\n")
    found = find_schedule_problems(pipeline("1f1b", 2, 1, path), 2)
    assert len(found) == bool(BAD[rows])
    if found:
        assert found[0].startswith(f"strategy.schedule_csv={path}") and BAD[rows] in found[0]


def test_own_schedule_that_cannot_be_read(tmp_path):
    found = find_schedule_problems(pipeline("1f1b", 2, 1, tmp_path / "none.csv"), 2)
    assert len(found) == 1 and "none.csv cannot be read: [Errno 2]" in found[0]
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00")
    assert (
        "cannot be read"
        in find_schedule_problems(pipeline("1f1b", 2, 1, tmp_path / "binary.csv"), 2)[0]
    )


def test_a_file_that_is_wrong_throughout_is_told_in_short(tmp_path):
    (tmp_path / "own.csv").write_text("\n".join(f"{rank}F0,{rank}F1" for rank in range(8)))
    found = find_schedule_problems(pipeline("1f1b", 8, 1, tmp_path / "own.csv"), 2)
    assert len(found) == 4 and found[-1].endswith("and 13 more like these")


WRONG = {
    ("gpipe", 2, 2, 4): "strategy.stages_per_rank=2 must be exactly 1 for strategy.schedule=gpipe; "
    "set strategy.stages_per_rank=1, or strategy.schedule=interleaved or looped_bfs",
    ("interleaved", 2, 1, 4): "strategy.stages_per_rank=1 must be at least 2 for "
    "strategy.schedule=interleaved; set strategy.stages_per_rank=2, or strategy.schedule=gpipe or",
    ("zbv", 2, 3, 4): "must be exactly 2 for strategy.schedule=zbv",
    ("dualpipev", 4, 2, 6): "strategy.schedule=dualpipev on strategy.pipeline=4 ranks takes at "
    "least 8 micro-batches, but there are 6 (batch_size / (micro_batch_size × ranks that see "
    "different samples)); change batch_size or micro_batch_size for 8",
    ("interleaved", 4, 2, 9): "takes 2 rounds of equally many micro-batches, but there are 9",
    ("zero_bubble", 2, 1, 7): "change batch_size or micro_batch_size for 6 or 8",
}


@pytest.mark.parametrize("layout", WRONG, ids=str)
def test_a_layout_that_does_not_run_gets_its_message(layout):
    found = find_schedule_problems(pipeline(*layout[:3]), layout[3])
    assert len(found) == 1 and WRONG[layout] in found[0]


def test_what_runs_has_no_problems_and_what_waits_a_warning(tmp_path):
    for schedule in SCHEDULES:
        for layout in layouts(schedule, per_rank=3):
            assert find_schedule_problems(pipeline(schedule, *layout[:2]), layout[2]) == []
            told = find_schedule_warnings(pipeline(schedule, *layout[:2]), layout[2])
            assert len(told) == (layout[2] < layout[0])
    assert find_schedule_warnings(pipeline("gpipe", 4, 1), 2) == [
        "strategy.schedule=gpipe: 2 micro-batches (batch_size / (micro_batch_size × ranks that see "
        "different samples)) are fewer than strategy.pipeline=4 ranks, which are idle for 60 % of "
        "a step (bubble); change batch_size or micro_batch_size for 4 or more"
    ]
    path = write(tmp_path / "own.csv", list_actions("looped_bfs", 4, 2, 2))
    assert "own.csv: 2 micro-batches" in find_schedule_warnings(pipeline("1f1b", 4, 2, path), 2)[0]
    assert "idle for 56 % of a step" in find_schedule_warnings(pipeline("1f1b", 4, 2, path), 2)[0]


def test_kinds_are_torchs():
    torchs = (schedules.F, schedules.B, schedules.I, schedules.W)
    assert tuple(KINDS) == tuple(kind.value for kind in torchs)
