"""Goodput on a fake clock: every second once, and under the right name; sums outlive a kill."""

import json
from pathlib import Path

import pytest

from trainer.metrics import goodput
from trainer.metrics.goodput import (
    KINDS,
    Goodput,
    TimeLedger,
    begin_start,
    goodput_record,
    goodput_sentence,
    read_ledger,
    write_ledger,
)


class FakeClock:
    """A clock that stands still until told."""

    def __init__(self, seconds: float = 0.0):
        self.seconds = seconds

    def __call__(self) -> float:
        return self.seconds


def steps(meter: Goodput, clock: FakeClock, numbers: range, seconds: float = 2.0) -> None:
    for number in numbers:
        clock.seconds += seconds
        meter.step_done(number)


def kinds(meter: Goodput) -> dict[str, float]:
    return {kind: seconds for kind, seconds in meter.ledger.seconds.items() if seconds}


def test_every_second_has_one_name(tmp_path: Path) -> None:
    clock = FakeClock(50.0)
    meter = Goodput(tmp_path, clock)
    clock.seconds += 10  # loading
    with meter.track("data_wait"):  # for the first batch
        clock.seconds += 1
    steps(meter, clock, range(1, 2))  # compiles
    steps(meter, clock, range(2, 6))
    with meter.track("data_wait"):
        clock.seconds += 3
    clock.seconds += 0.5  # half a step, an evaluation, the other half
    with meter.track("evaluation"):
        clock.seconds += 4
        with meter.track("save"):
            clock.seconds += 5
        clock.seconds += 1
    clock.seconds += 0.5
    meter.step_done(6)
    clock.seconds += 7  # what has no name
    values = meter.close()
    assert kinds(meter) == {
        "restart": 13.0,
        "useful": 9.0,
        "data_wait": 3.0,
        "evaluation": 5.0,
        "save": 5.0,
        "other": 7.0,
    }
    assert values["total_seconds"] == clock.seconds - 50.0
    assert sum(values[f"{kind}_share"] for kind in KINDS) == pytest.approx(1, abs=1e-4)
    assert values["useful_share"] == pytest.approx(9 / 42, abs=1e-4)


def test_the_sums_outlive_a_kill_and_steps_done_again_are_lost(tmp_path: Path) -> None:
    clock = FakeClock()
    meter = Goodput(tmp_path, clock)
    steps(meter, clock, range(1, 9))
    meter.save()  # with the line of step 8
    steps(meter, clock, range(9, 11))  # and killed: nobody knows of these
    clock = FakeClock(1000.0)
    meter = Goodput(tmp_path, clock)
    clock.seconds += 5
    steps(meter, clock, range(6, 13))  # from the checkpoint of step 5 on
    assert kinds(meter) == {"useful": 14.0 + 8.0, "restart": 2.0 + 7.0, "repeated": 4.0}
    steps(meter, clock, range(10, 14))  # back to step 9 without a restart
    assert kinds(meter)["repeated"] == 4.0 + 6.0
    assert kinds(meter)["useful"] == 22.0 + 2.0


def test_a_start_counts_from_its_process_on(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(goodput.time, "monotonic", lambda: 103.0)
    begin_start(tmp_path, opened=100.0, now=5000.0)
    clock = FakeClock(110.0)  # another process of the host goes on with it
    meter = Goodput(tmp_path, clock)
    clock.seconds += 1
    meter.step_done(1)
    meter.save()
    assert kinds(meter) == {"restart": 11.0}
    written = read_ledger(tmp_path)
    assert (written.starts, written.down_seconds, written.opened) == (1, 0.0, None)
    # The next start begins 60 s later, 3 s before it says so.
    begin_start(tmp_path, opened=100.0, now=written.written + 63.0)
    assert read_ledger(tmp_path).starts == 2
    assert read_ledger(tmp_path).down_seconds == pytest.approx(60.0)
    # A clock that was set back takes nothing away.
    begin_start(tmp_path, opened=100.0, now=0.0)
    assert read_ledger(tmp_path).down_seconds == pytest.approx(60.0)


def test_what_comes_between_two_meters_of_a_process_is_booked(tmp_path: Path) -> None:
    clock = FakeClock()
    meter = Goodput(tmp_path, clock)
    steps(meter, clock, range(1, 4))
    meter.close()
    clock.seconds += 9  # the weights of step 2 are loaded again
    meter = Goodput(tmp_path, clock)
    steps(meter, clock, range(3, 5))
    assert kinds(meter) == {"restart": 2.0 + 11.0, "useful": 6.0}
    assert meter.ledger.starts == 1


@pytest.mark.parametrize(
    "content", ["", "[]", "{", '{"steps": 1}', '{"seconds": {"useful": 1}}', '{"seconds": "a"}']
)
def test_a_ledger_that_cannot_be_understood_is_begun_anew(tmp_path: Path, content: str) -> None:
    (tmp_path / goodput.NAME).write_text(content)
    assert read_ledger(tmp_path) == TimeLedger()


def test_a_ledger_is_replaced_whole_and_a_full_disk_costs_no_run(tmp_path: Path) -> None:
    write_ledger(tmp_path, TimeLedger(step=3), now=1.0)
    assert read_ledger(tmp_path) == TimeLedger(step=3, written=1.0)
    assert [path.name for path in tmp_path.iterdir()] == [goodput.NAME]
    write_ledger(tmp_path / "gone", TimeLedger(), now=2.0)


def test_the_line_and_the_sentence() -> None:
    ledger = TimeLedger(starts=2, step=9)
    ledger.seconds |= {"useful": 90.0, "restart": 6.0, "repeated": 4.0}
    values = goodput_record(ledger)
    assert json.loads(json.dumps(values))["event"] == "goodput"
    assert (values["useful_share"], values["repeated_seconds"]) == (0.9, 4.0)
    assert goodput_sentence(values) == (
        "goodput 90.0 % of 100 s in 2 starts; lost: restart 6.0 %, save 0.0 %, data wait 0.0 %, "
        "evaluation 0.0 %, steps done again 4.0 %, other 0.0 %"
    )
    assert goodput_record(TimeLedger())["useful_share"] == 0.0


def test_the_age_of_a_process() -> None:
    assert 0.0 < goodput.process_seconds() < 1e6
