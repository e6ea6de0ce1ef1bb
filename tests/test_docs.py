"""Every command of README.md and docs/ is run, or checked, or listed with the reason."""

import re
from pathlib import Path

import pytest
from documented import (
    CHECKED,
    NOT_RUN,
    ONLY_CHECKED,
    ROOT,
    STATUSES,
    Documented,
    Outcome,
    Runner,
    documented_commands,
    make_inputs,
    rounds,
)

COMMANDS = [command for command in documented_commands() if command.text not in NOT_RUN]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> dict[str, Outcome]:
    """What came of all commands, run in one folder with the data and runs that the pages name."""
    folder = tmp_path_factory.mktemp("documented")
    make_inputs(folder)
    runner = Runner(folder)
    runner.run_all(COMMANDS)
    return runner.outcomes


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.text)
def test_a_documented_command_does_what_its_page_says(command, outcomes):
    outcome = outcomes[command.text]
    assert outcome.status == STATUSES.get(command.text, 0), outcome.output
    assert (CHECKED in outcome.output) == (command.text in ONLY_CHECKED), outcome.output


def test_a_refusal_reads_as_documented(outcomes):
    (refused,) = (command for command in COMMANDS if STATUSES.get(command.text) == 2)
    message = outcomes[refused.text].output.strip()
    assert message.startswith("4 problems")
    for page in ("README.md", "docs/configuration.md"):
        assert message in (ROOT / page).read_text()


@pytest.mark.fast
@pytest.mark.parametrize("table", [NOT_RUN, ONLY_CHECKED, STATUSES])
def test_a_command_with_an_exception_is_still_documented(table):
    assert table.keys() <= {command.text for command in documented_commands()}


@pytest.mark.fast
def test_a_command_runs_after_those_that_make_what_it_reads():
    train = Documented("", "python launch/train.py run_dir=runs/A")
    export = Documented("", "python launch/export.py run_dir=runs/A output_dir=runs/A-small")
    use = Documented("", "python launch/evaluate.py run_dir=runs/A-small")
    assert list(rounds([use, export, train])) == [[train], [export], [use]]


@pytest.mark.fast
def test_every_page_is_linked_and_every_link_has_a_file():
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    linked: set[Path] = set()
    for page in pages:
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
            if "://" not in target:
                path = (page.parent / target).resolve()
                assert path.exists(), f"{page.name}: {target}"
                linked.add(path)
    assert {page.resolve() for page in (ROOT / "docs").rglob("*.md")} <= linked


@pytest.mark.fast
def test_readme_is_short():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    assert len(text.split()) <= 1300
