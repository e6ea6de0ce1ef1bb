"""The fit finds the constants that made its data, and a calibration of real ranks is read back."""

from dataclasses import asdict, replace

import numpy as np
import pytest

from parallel.strategy import StrategyConfig
from trainer.config.train import DataConfig, ModelConfig, TrainConfig
from trainer.plan.calibrate import calibrate
from trainer.plan.calibration import load_calibration, read_calibration
from trainer.plan.collective_time import sent_bytes
from trainer.plan.constants import CPU_FITTED, Fit
from trainer.plan.fit_calibration import (
    CPU_UNKNOWNS,
    fit_rates,
    fit_steps,
    least_squares,
    left_out_errors,
    moved_bytes,
    paid_share,
    predicted_seconds,
)
from trainer.plan.machine import nominal_cpu
from trainer.plan.measured_steps import small_jobs
from trainer.plan.measurements import (
    BETWEEN,
    INSIDE,
    Collective,
    FusedAttention,
    MeasuredStep,
    Overlap,
    Product,
    Rates,
)

MODEL = ModelConfig(
    layers=2, width=64, heads=4, kv_heads=2, ffn_width=128, vocab_size=96, max_positions=32
)
CONFIG = TrainConfig(
    model=MODEL,
    data=DataConfig(kind="text", path="not read", seq_len=32),
    strategy=StrategyConfig(),
    batch_size=16,
    precision="fp32",
    device="cpu",
)
NOMINAL = Fit.read(CPU_FITTED).constants
# What a fit is to find: all of its constants, none as expected.
TRUTH = replace(
    NOMINAL,
    **{
        name: size * (1.5 - 0.1 * number)
        for number, (name, size) in enumerate(CPU_UNKNOWNS.items())
    },
)


def steps_of(constants, machine):
    jobs = small_jobs(CONFIG, 2, 2)
    return [
        MeasuredStep(job, predicted_seconds(MeasuredStep(job, 0.0), machine, constants))
        for job in jobs
    ]


def test_the_steps_tell_the_constants_that_made_them():
    machine = nominal_cpu(2)
    steps = steps_of(TRUTH, machine)
    axes = {axis for s in steps for axis, n in asdict(s.config.strategy).items() if n == 2}
    assert {"replicate", "shard", "context", "tensor", "pipeline"} <= axes
    found = fit_steps(steps, machine, NOMINAL)
    times = [predicted_seconds(step, machine, found) for step in steps]
    assert times == pytest.approx([step.seconds for step in steps], rel=0.02)
    for name in ("operator_seconds", "group_seconds", "collective_seconds"):
        assert getattr(found, name) == pytest.approx(getattr(TRUTH, name), rel=0.25), name
    errors = left_out_errors(steps, machine, NOMINAL)
    assert 0 < np.median(np.abs(errors)) < 0.15


def test_a_step_that_is_slower_for_no_reason_shows_in_the_error():
    machine = nominal_cpu(2)
    steps = steps_of(TRUTH, machine)
    odd = [*steps[:-1], replace(steps[-1], seconds=2 * steps[-1].seconds)]
    assert left_out_errors(odd, machine, NOMINAL)[-1] < -0.4


def rates_of(peak, half_tokens, half_width, wires):
    def seconds(tokens, width, outputs):
        reached = peak * tokens / (tokens + half_tokens)
        narrow = min(width, outputs)
        return 6 * tokens * width * outputs / reached * (1 + half_width / narrow)

    shapes = [(t, d, n) for t in (4096, 1024) for d, n in ((64, 256), (256, 64), (512, 512))]
    collectives = [
        Collective(name, where, 2, size, 0.0)
        for where in wires
        for name in ("all_reduce", "all_gather")
        for size in (2**14, 2**18, 2**22)
    ]
    collectives = [
        replace(
            c, seconds=wires[c.where][0] + sent_bytes(moved_bytes(c), c.ranks) / wires[c.where][1]
        )
        for c in collectives
    ]
    scores = [
        FusedAttention(4, 8, s, 16, (t := 2 * 4 * 8 * s**2 * 16 / 2e10 * (1 + 50 / s)), 5 * t)
        for s in (128, 256)
    ]
    products = [Product(*shape, seconds(*shape)) for shape in shapes]
    return Rates(products, scores, 3e10, collectives, Overlap(1.0, 2.0, 2.25))


def test_operations_tell_the_rates_that_made_them():
    rates = rates_of(1e11, 20.0, 8.0, {INSIDE: (1e-4, 2e9), BETWEEN: (3e-4, 5e8)})
    machine, constants = fit_rates(rates, nominal_cpu(2), NOMINAL)
    assert machine.products == machine.attention
    # Of tokens and of width the product of both shares is left out of the fit.
    assert machine.products == pytest.approx(1e11, rel=0.02)
    assert constants.half_tokens == pytest.approx(20, rel=0.2)
    assert constants.half_width == pytest.approx(8, rel=0.2)
    assert machine.attention * constants.attention_unfused == pytest.approx(2e10)
    assert (constants.half_length, constants.attention_backward) == pytest.approx((50, 0.5))
    assert (machine.link, machine.network) == pytest.approx((2e9, 5e8))
    assert constants.latency_seconds == pytest.approx(1e-4)
    assert constants.overlap_sharded == pytest.approx(0.25)
    assert machine.memory_bandwidth == 3e10


def test_hidden_work_that_costs_all_or_nothing():
    assert paid_share(Overlap(1.0, 0.5, 1.5)) == 1.0
    assert paid_share(Overlap(1.0, 0.5, 1.0)) == 0.0
    assert paid_share(Overlap(1.0, 0.5, 0.9)) == 0.0


def test_no_constant_is_below_zero():
    matrix = np.array([[1.0, 1.0], [1.0, 2.0], [1.0, 3.0]])
    assert least_squares(matrix, np.array([3.0, 2.0, 1.0])).tolist() == [2.0, 0.0]
    assert least_squares(matrix, np.array([3.0, 4.0, 5.0])) == pytest.approx([2.0, 1.0])


def calibrate_here(runtime, config, path):
    return calibrate(config, runtime, path)


def test_real_ranks_are_calibrated(ranks, tmp_path):
    path = tmp_path / "calibration.json"
    config = replace(CONFIG, batch_size=8, data=replace(CONFIG.data, seq_len=16))
    found, _ = ranks.run(2, calibrate_here, config, path)
    assert load_calibration(path) == found
    assert (found.kind, found.precision, found.ranks_per_host) == ("cpu", "fp32", 2)
    assert read_calibration(path, "cpu", "fp32", 2) is not None
    assert len(found.measured["steps"]) == 8 and len(found.measured["collectives"]) == 9
    assert all(step["seconds"] > 0 < step["fitted"] for step in found.measured["steps"])
    assert found.fit.calibrated and 0 < found.fit.median_error <= found.fit.ninetieth_error
