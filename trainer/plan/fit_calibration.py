"""From measured rates and steps to a machine and the constants of the time model."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from parallel.comm_volume.closed_form import StepBytes
from trainer.config.train import TrainConfig, is_encoder_decoder
from trainer.plan.collective_time import Ring, ring_seconds, sent_bytes
from trainer.plan.constants import Constants
from trainer.plan.layout import layout_name, layout_of_job
from trainer.plan.machine import Machine
from trainer.plan.measurements import BETWEEN, INSIDE, Collective, MeasuredStep, Overlap, Rates
from trainer.plan.planner import job_work
from trainer.plan.step_time import TimeModel

# Constants that steps tell, each with a size that it may well differ by from what is expected.
CPU_UNKNOWNS = {
    "traffic": 2.0,
    "operator_seconds": 1e-5,
    "group_seconds": 2e-3,
    "collective_seconds": 2e-3,
    "action_seconds": 1e-3,
    "step_seconds": 2e-3,
    "sync_seconds": 2e-3,
}
GPU_UNKNOWNS = {"pointwise": 6.0, "group_seconds": 1e-4, "step_seconds": 1e-3}
NOISE = 0.05  # of a measured step
ROUNDS = 3  # of a fit that is nearly linear


def fit_rates(rates: Rates, machine: Machine, constants: Constants) -> tuple[Machine, Constants]:
    """Return machine and constants with what was measured of single operations.

    `machine` and `constants` are those of the data sheet, or of the nominal CPU. A CPU's peak is
    what its products reach; a GPU keeps its own, of which they reach a share.
    """
    peak, half_tokens, half_width = _product_rate(rates)
    found = {"half_tokens": half_tokens, "half_width": half_width, "odd_width": 1.0}
    if machine.generation == "cpu":
        machine = replace(machine, products=peak, attention=peak)
    else:
        share = peak / machine.attention
        found |= {"product_ampere": share, "product_hopper": share}
    forward, found["half_length"], found["attention_backward"] = _attention_rate(rates)
    share = forward / machine.attention
    of_gpus, of_cpus = ("attention_ampere", "attention_hopper"), ("attention_unfused",)
    found |= dict.fromkeys(of_cpus if machine.generation == "cpu" else of_gpus, share)
    machine = replace(machine, memory_bandwidth=rates.copy_bandwidth)
    machine, wires = _wires(rates.collectives, machine)
    found |= wires
    if rates.overlap is not None:
        found |= dict.fromkeys(("overlap", "overlap_sharded"), paid_share(rates.overlap))
    return machine, replace(constants, **found)


def _product_rate(rates: Rates) -> tuple[float, float, float]:
    """Return the FLOP/s of large products, and tokens and width at which half is reached."""
    rows, due = [], []
    for product in rates.products:
        flops = 6.0 * product.tokens * product.width * product.outputs
        narrow = min(product.width, product.outputs)
        rows.append([1.0, 1 / product.tokens, 1 / narrow])
        due.append(product.seconds / flops)
    slope, by_tokens, by_width = _positive_solution(rows, due)
    return 1 / slope, by_tokens / slope, by_width / slope


def _attention_rate(rates: Rates) -> tuple[float, float, float]:
    """Return the forward's FLOP/s for long sequences, the length at which half is reached, and
    the backward's share of that rate.
    """
    rows, due, shares = [], [], []
    for one in rates.attention:
        flops = 2.0 * one.samples * one.heads * one.length**2 * one.head_width
        rows.append([1.0, 1 / one.length])
        due.append(one.forward / flops)
        shares.append(2.5 * one.forward / one.backward)
    slope, by_length = _positive_solution(rows, due)
    return 1 / slope, by_length / slope, float(np.exp(np.mean(np.log(shares))))


def _wires(collectives: Sequence[Collective], machine: Machine) -> tuple[Machine, dict[str, float]]:
    """Return the machine with its links, and the latency of collectives."""
    found: dict[str, float] = {}
    for where in (BETWEEN, INSIDE):  # the latency is that of a host's, if there is one
        chosen = [c for c in collectives if c.where == where]
        if not chosen:
            continue
        rows = [[np.log2(c.ranks), sent_bytes(moved_bytes(c), c.ranks)] for c in chosen]
        latency, per_byte = _positive_solution(rows, [c.seconds for c in chosen])
        found["latency_seconds"] = latency
        if where == BETWEEN:
            machine, found["network"] = replace(machine, network=1 / per_byte), 1.0
        else:
            machine, found["link"] = replace(machine, link=1 / per_byte), 1.0
    if machine.generation == "cpu" and not any(c.where == BETWEEN for c in collectives):
        machine = replace(machine, network=machine.link)
    return machine, found


def moved_bytes(collective: Collective) -> StepBytes:
    """Return the bytes of a collective, under its name."""
    return StepBytes(**{collective.name: collective.payload_bytes})


def collective_seconds(collective: Collective, machine: Machine, constants: Constants) -> float:
    """Return the time of a collective by the model."""
    near = collective.ranks if collective.where == INSIDE else 1
    ring = Ring(collective.ranks, near)
    return ring_seconds(moved_bytes(collective), ring, machine, constants)


def paid_share(overlap: Overlap) -> float:
    """Return the share of hidden communication that it costs the products beside it."""
    alone = sorted((overlap.products, overlap.collective))
    return float(np.clip((overlap.together - alone[1]) / alone[0], 0.0, 1.0))


def _positive_solution(rows: Sequence[Sequence[float]], due: Sequence[float]) -> list[float]:
    """Return the least relative squares of a sum of positive terms; the first is above 0."""
    weights = 1 / np.array(due)
    solution = least_squares(np.array(rows) * weights[:, None], np.ones(len(due)))
    least = 1e-6 * np.array(due).mean() / np.array(rows).mean(0)  # a term that is not seen
    found: list[float] = np.maximum(solution, least).tolist()
    return found


def least_squares(matrix: np.ndarray, due: np.ndarray) -> np.ndarray:
    """Return the x of least squares with no entry below 0; entries that would be are left out."""
    scale = np.abs(matrix).max(0)
    scale[scale == 0] = 1.0
    active, x = list(range(matrix.shape[1])), np.zeros(matrix.shape[1])
    while active:
        found = np.linalg.lstsq(matrix[:, active] / scale[active], due, rcond=None)[0]
        if (found >= 0).all():
            x[active] = found / scale[active]
            break
        active = [column for column, value in zip(active, found, strict=True) if value > 0]
    return x


def predicted_seconds(step: MeasuredStep, machine: Machine, constants: Constants) -> float:
    """Return the time of a step by the model."""
    config = step.config
    work = job_work(config, config.precision)
    return TimeModel(work, machine, constants, config.strategy).step(layout_of_job(config)).total


def fit_steps(steps: Sequence[MeasuredStep], machine: Machine, expected: Constants) -> Constants:
    """Return the constants that steps are fitted best by, as near the expected as that allows."""
    sizes = CPU_UNKNOWNS if machine.generation == "cpu" else GPU_UNKNOWNS
    names, due = list(sizes), np.array([step.seconds for step in steps])
    if not names or not len(due):
        return expected
    scale = np.array([sizes[name] for name in names])
    center = np.array([getattr(expected, name) for name in names])
    point = center.copy()

    def errors(at: np.ndarray) -> np.ndarray:
        constants = _with(expected, names, at)
        times = [predicted_seconds(step, machine, constants) for step in steps]
        return (np.array(times) / due - 1) / NOISE

    for _ in range(ROUNDS):
        now = errors(point)
        shifts = [errors(point + scale * unit) - now for unit in np.eye(len(names))]
        slopes = np.array(shifts).T  # for a change by `scale`
        matrix = np.vstack([slopes, np.eye(len(names))])
        right = np.concatenate([slopes @ (point / scale) - now, center / scale])
        point = scale * least_squares(matrix, right)
    return _with(expected, names, point)


def _with(constants: Constants, names: Sequence[str], values: np.ndarray) -> Constants:
    changed: Mapping[str, float] = dict(zip(names, values.tolist(), strict=True))
    return replace(constants, **changed)


def left_out_errors(
    steps: Sequence[MeasuredStep], machine: Machine, expected: Constants
) -> list[float]:
    """Return the relative error of each step, predicted by constants fitted to all others."""
    found = []
    for number, step in enumerate(steps):
        others = [*steps[:number], *steps[number + 1 :]]
        constants = fit_steps(others, machine, expected)
        found.append(predicted_seconds(step, machine, constants) / step.seconds - 1)
    return found


def step_name(config: TrainConfig) -> str:
    """Return a step in words: its degrees above 1, layers, and samples of a micro-batch."""
    model, layout = config.model, layout_of_job(config)
    layers = model.layers + (model.encoder_layers if is_encoder_decoder(model) else 0)
    count = config.batch_size // (layout.data_ranks * layout.micro_batch)
    return f"{layout_name(layout)}, {layers} layers, {count} × {layout.micro_batch} samples"
