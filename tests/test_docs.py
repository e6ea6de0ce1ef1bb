"""Every command of README.md and docs/: it is run, or checked by the command's own preflight.

`python tests/helpers/documented.py` runs all of them for real.
"""

import re
import runpy
import sys
from pathlib import Path

import pytest
from documented import (
    ELSEWHERE,
    ROOT,
    RUNS,
    documented_commands,
    is_expected,
    lay_out_runs,
    make_inputs,
    make_runs,
    run_command,
)

from launch.cli import entrypoint
from trainer.verify import compare

COMMANDS = [command for command in documented_commands() if command.text not in ELSEWHERE]
# Whose work takes a second or less: it is done.
CHEAP = ("launch/checkpoint.py", "launch/report.py", "launch/submit.py", "launch/prepare.py")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """A folder with the inputs and the runs that the pages name."""
    folder = tmp_path_factory.mktemp("documented")
    make_inputs(folder)
    make_runs(folder, RUNS)
    return folder


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.text)
def test_a_documented_command_passes_its_own_checks(command, prepared, monkeypatch, capsys):
    if not command.script.startswith("launch/"):
        done = run_command([command.script, *command.short_arguments], prepared)
        assert done.returncode == 0, done.stderr
        return
    lay_out_runs(command, prepared)
    ranks = [f"launch.ranks={command.ranks}"] if command.ranks else []
    started = []
    monkeypatch.setattr(entrypoint, "_start_job", lambda *job: started.append(job))
    monkeypatch.setattr(compare, "verify_all", started.append)
    monkeypatch.chdir(prepared)
    script = ROOT / command.script
    monkeypatch.setattr(sys, "argv", [str(script), *command.short_arguments, *ranks])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(script), run_name="__main__")
    told = capsys.readouterr()
    if "fp31" in command.text:
        assert told.err.strip() in (ROOT / command.page).read_text()
    assert is_expected(command, stop.value.code), told.err
    asks = {"--help", "--dry-run"} & set(command.short_arguments)
    refused = "fp31" in command.text
    assert bool(started) != bool(command.script in CHEAP or asks or refused)


@pytest.mark.fast
def test_what_is_run_elsewhere_is_still_documented():
    assert ELSEWHERE.keys() <= {command.text for command in documented_commands()}


@pytest.mark.fast
def test_every_page_is_linked_and_every_link_has_a_file():
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    linked = set()
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
