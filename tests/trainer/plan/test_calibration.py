"""Read back what was measured as it was written; refuse it where it is not of the plan."""

import json
from dataclasses import replace

import pytest

from parallel.errors import ConfigError
from trainer.plan import machine as machines
from trainer.plan.calibration import Calibration, read_calibration, write_calibration
from trainer.plan.constants import Fit
from trainer.plan.machine import host_memory, nominal_cpu

FIT = Fit(replace(Fit.read().constants, latency_seconds=3e-4), 0.07, 0.21, calibrated=True)


@pytest.fixture
def written(tmp_path):
    machine = replace(nominal_cpu(2), products=1.25e11, attention=1.25e11)
    cores = machines.host_cores()
    path = tmp_path / "calibration.json"
    write_calibration(
        path, Calibration("cpu", "a CPU", "fp32", cores, cores, machine, FIT, "2026-11-28")
    )
    return path


def test_a_calibration_is_read_as_it_was_written(written):
    cores = machines.host_cores()
    found = read_calibration(written, "cpu", "fp32", cores)
    assert found is not None
    machine, fit = found
    assert fit == FIT and fit.calibrated
    assert (machine.products, machine.linked) == (1.25e11, cores)
    assert machine.memory == host_memory() / cores


def test_more_ranks_than_cores_share_them(written):
    cores = machines.host_cores()
    found = read_calibration(written, "cpu", "fp32", 4 * cores)
    assert found is not None
    assert found[0].products == pytest.approx(1.25e11 / 4)
    assert found[0].memory == host_memory() / (4 * cores)


def test_one_of_another_device_or_precision_is_not_used(written, caplog):
    assert read_calibration(written, "h100", "fp32", 2) is None
    assert read_calibration(written, "cpu", "bf16", 2) is None
    assert "is of cpu in fp32, not of h100 in fp32" in caplog.messages[0]
    assert len(caplog.messages) == 2
    assert read_calibration(written.with_name("none.json"), "cpu", "fp32", 2) is None
    assert len(caplog.messages) == 2


def change(path, *keys, value=None):
    values = json.loads(path.read_text())
    inside = values
    for key in keys[:-1]:
        inside = inside[key]
    inside[keys[-1]] = value
    path.write_text(json.dumps(values))


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_text(path.read_text()[:-20]),
        lambda path: path.write_text("[]"),
        lambda path: change(path, "format", value=7),
        lambda path: change(path, "machine", "products", value=float("nan")),
        lambda path: change(path, "machine", "link", value=0.0),
        lambda path: change(path, "fit", "constants", "pointwise", value="many"),
        lambda path: change(path, "fit", "constants", value={}),
        lambda path: change(path, "unknown", value=1),
    ],
)
def test_a_damaged_file_is_refused_in_one_line(written, damage):
    damage(written)
    with pytest.raises(ConfigError, match=r"is no calibration .*launch/plan.py calibrate") as error:
        read_calibration(written, "cpu", "fp32", 2)
    assert len(str(error.value).splitlines()) == 1


def test_a_nominal_cpu_is_a_function_of_cores_and_memory(monkeypatch):
    monkeypatch.setattr(machines, "host_cores", lambda: 8)
    monkeypatch.setattr(machines, "host_memory", lambda: 2**36)
    two, four = nominal_cpu(2), nominal_cpu(4)
    assert two == nominal_cpu(2)
    assert two.products == 2 * four.products == 4 * machines.CORE_PRODUCTS["fp32"]
    assert (two.memory, two.linked) == (2**35, 2)
    assert nominal_cpu(2, "bf16").products > two.products


def test_memory_is_the_least_of_the_machine_and_its_cgroups(monkeypatch, tmp_path):
    physical = host_memory()
    (tmp_path / "memory.max").write_text("max\n")
    monkeypatch.setattr(machines, "CGROUP", tmp_path)
    assert host_memory() >= physical
    (tmp_path / "memory.max").write_text("4096\n")
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text("4096\n")  # version 1
    assert host_memory() == 4096
