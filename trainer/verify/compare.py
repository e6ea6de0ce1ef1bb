"""Proof that a layout takes the same steps as one process: losses, norms, gradients, weights."""

import math
from dataclasses import dataclass, replace
from itertools import chain

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch import distributed as dist
from torch.distributed.tensor import DTensor

from parallel.grad_norm import local_tensor
from parallel.mesh import DATA_AXES
from parallel.parallel_model import ParallelModel
from parallel.parallelize import local_slices, parallelize
from parallel.pipeline.schedules import stage_to_rank
from parallel.rank_pool import RankFailedError, RankPool
from parallel.runtime import Runtime
from parallel.strategy import AXES, StrategyConfig, axis_degrees, resolve_degrees, world_size
from trainer.build import parallel_model
from trainer.compress.compression import Compression
from trainer.config.train import CompressConfig, LossConfig, VerifyConfig
from trainer.inference.trained_run import unwrap_transformer
from trainer.metrics.console import print_whole
from trainer.optim.lr_schedule import learning_rate_at
from trainer.optim.registry import build_optimizer, check_reference
from trainer.precision import PRECISIONS
from trainer.tasks.registry import task_of_model
from trainer.verify.cases import (
    STRATEGIES,
    draw_rows,
    iter_cases,
    make_batch,
    random_teacher,
    samples_per_step,
    scale_compression,
    scale_down,
    split_batch,
)
from trainer.verify.faults import FAULTS
from trainer.verify.nccl_like import NAME, on_nccl_like_ranks
from trainer.verify.reference import LABEL_SMOOTHING, Record, run_reference

COMPRESSED = 5  # compressed models have blocks for this many stages
QUANTITIES = ("loss", "norm", "gradient", "weight")


@dataclass(frozen=True)
class Difference:
    """The difference of one number or tensor from the reference, and its location."""

    quantity: str  # one of QUANTITIES
    step: int
    value: float
    parameter: str = ""
    axis: str = ""  # mesh axes that the parameter or its gradient spans


def _build_layout(
    config: VerifyConfig, runtime: Runtime, compression: Compression
) -> ParallelModel:
    if compression.uses_distillation:
        compression.teacher = random_teacher(config.model, config.seed).to(runtime.device)
    return parallel_model(
        config.model,
        config.strategy,
        runtime,
        PRECISIONS["fp64"],
        seed=config.seed,
        loss=LossConfig(LABEL_SMOOTHING),
        objective=task_of_model(config.model, config.task),
        activation_checkpointing=config.activation_checkpointing,
        compression=compression,
        lora=config.lora,
        draw_rows=draw_rows,
        parallelize=FAULTS[config.fault] if config.fault else parallelize,
    )


def run_layout(config: VerifyConfig, runtime: Runtime) -> tuple[Record, dict[str, str]]:
    """Take the steps under the strategy; return the record, and the mesh axes of each parameter.

    They are the axes that it is split on or its gradient summed over.
    """
    compression = Compression(config.compress)
    worker = _build_layout(config, runtime, compression)
    compression.pack_frozen(unwrap_transformer(worker))
    optimizer = build_optimizer(worker.parameters(), config.optim)
    samples = samples_per_step(config.strategy)
    record = Record([], [], [], {})
    compression.prepare_step(0, config.steps)
    for step in range(config.steps):
        batch = make_batch(config.model, config.seed, step, samples, config.task)
        worker.zero_grad()
        loss, _ = worker.forward_backward(split_batch(batch, worker))
        record.losses.append(worker.sum_over_data(loss).item())
        gradients = {n: p.grad for n, p in worker.parameters().items() if p.grad is not None}
        # Copies: clipping changes the gradients in place.
        record.gradients.append({n: _on_host(g) for n, g in gradients.items()})
        record.norms.append(worker.clip_grad_norm(config.optim.max_grad_norm).item())
        lr = learning_rate_at(step, config.steps, config.optim)
        optimizer.step(lr, torch.zeros((), device=runtime.device))
        compression.prepare_step(step + 1, config.steps)
    record.weights = {name: _on_host(p.detach()) for name, p in worker.parameters().items()}
    record.places = {name: local_slices(p) for name, p in worker.parameters().items()}
    return record, axes_of_parameters(worker)


def _on_host(tensor: Tensor) -> Tensor:
    """Return a copy of the local part in the host's memory, where the reference is."""
    return local_tensor(tensor).to("cpu", copy=True)


def axes_of_parameters(worker: ParallelModel) -> dict[str, str]:
    """Return the mesh axes that each parameter is split on or its gradient summed over."""
    wide = [axis for axis in AXES if worker.mesh[axis].size() > 1]
    found = {}
    for name, parameter in worker.parameters().items():
        axes = {"pipeline", "context", *DATA_AXES}
        if isinstance(parameter, DTensor):
            axes |= set(parameter.device_mesh.mesh_dim_names or ())
        axes |= {axis.name for axis in worker.axes if name in axis.partial}
        found[name] = " × ".join(axis for axis in wide if axis in axes)
    return found


def compare_records(ours: Record, reference: Record, axes: dict[str, str]) -> list[Difference]:
    """Return all differences that a rank can compare, in the order in which training computes them.

    Gradients and weights are those of `axes`, the parameters with a local shard. Losses, norms and
    weights: absolute. Gradients: relative to the largest entry of the tensor, or to a thousandth of
    the global norm if that is larger, since some gradients (of a key's bias) are zero but for
    rounding.
    """
    found = []
    for step, gradients in enumerate(reference.gradients):
        for name in axes:
            place, floor = ours.places[name], 1e-3 * reference.norms[step]
            whole = gradients.get(name)  # None: the weight is frozen
            scale = floor if whole is None else max(whole.abs().max().item(), floor)
            theirs = torch.zeros_like(ours.weights[name]) if whole is None else whole[place]
            mine = ours.gradients[step].get(name, torch.zeros_like(theirs))
            gap = _largest_gap(mine, theirs) / scale
            found.append(Difference("gradient", step, gap, name, axes[name]))
        found.append(
            Difference("loss", step, _largest_gap(ours.losses[step], reference.losses[step]))
        )
        found.append(
            Difference("norm", step, _largest_gap(ours.norms[step], reference.norms[step]))
        )
    last = len(ours.losses) - 1
    for name in axes:
        gap = _largest_gap(ours.weights[name], reference.weights[name][ours.places[name]])
        found.append(Difference("weight", last, gap, name, axes[name]))
    return found


def worst_differences(found: list[list[Difference]], names: list[str]) -> list[Difference]:
    """Merge the differences of all ranks into one list in training's order, keeping the largest."""
    worst: dict[tuple, Difference] = {}
    for difference in chain.from_iterable(found):
        key = (difference.quantity, difference.step, difference.parameter)
        if key not in worst or difference.value > worst[key].value:
            worst[key] = difference
    place = {name: i for i, name in enumerate(names)}
    order = ("gradient", "loss", "norm", "weight")

    def when(d: Difference) -> tuple:
        return d.quantity == "weight", d.step, order.index(d.quantity), place.get(d.parameter, 0)

    return sorted(worst.values(), key=when)


def _largest_gap(mine: Tensor | float, theirs: Tensor | float) -> float:
    gaps = torch.as_tensor(mine - theirs, dtype=torch.float64).abs()
    gap = gaps.max().item() if gaps.numel() else 0.0  # fewer rows than ranks: no local shard
    return math.inf if math.isnan(gap) else gap  # NaN compares with nothing: it must fail


def compare_layout(runtime: Runtime, config: VerifyConfig) -> list[Difference]:
    """Run layout and reference and compare them; the same list on every rank.

    Model and compression are scaled down first, the strategy resolved for the ranks there are.
    Raises ConfigError if config.optim.name has no reference.
    """
    check_reference(config.optim.name)
    if config.backend == NAME:
        plain = replace(config, backend="auto")
        return on_nccl_like_ranks(runtime, compare_layout, plain)
    strategy = resolve_degrees(config.strategy, runtime.world_size)
    stages = len(stage_to_rank(strategy, strategy.pipeline))
    compressed = config.compress != CompressConfig()
    if compressed:
        stages = max(stages, COMPRESSED)
    model = scale_down(config.model, strategy.tensor, stages, groups=compressed)
    if config.lora.rank and model.init == "vit":  # whose head is zero, so that no adapter learns
        model = replace(model, init="gpt2")
    compress = scale_compression(config.compress, model)
    config = replace(config, model=model, strategy=strategy, compress=compress)
    record, axes = run_layout(config, runtime)
    reference: list = [None]
    if runtime.rank == 0:
        reference = [run_reference(config, samples_per_step(strategy))]
    dist.broadcast_object_list(reference, src=0)
    # Each stage of a pipeline compares what it has; the first ranks of all stages have it all.
    found: list = [None] * runtime.world_size
    dist.all_gather_object(found, compare_records(record, reference[0], axes))
    return worst_differences(found, list(reference[0].weights))


def largest_difference(found: list[Difference], quantity: str) -> float:
    """Return the largest difference of one quantity."""
    return max(difference.value for difference in found if difference.quantity == quantity)


def first_mismatch(found: list[Difference], tolerance: float) -> Difference | None:
    """Return the first difference above the tolerance in training's order, nearest to the cause."""
    return next((d for d in found if not d.value <= tolerance), None)


def format_verdict(found: list[Difference], tolerance: float) -> str:
    """Return `equal`, or the first mismatch: quantity, parameter, axis and step."""
    fault = first_mismatch(found, tolerance)
    if fault is None:
        return "equal"
    where = f" of {fault.parameter} (axis {fault.axis or 'none'})" if fault.parameter else ""
    return f"first differs: {fault.quantity}{where}, step {fault.step}"


Rows = dict[tuple[str, str], list[Difference]]  # by model and strategy


def print_report(rows: Rows, tolerance: float) -> bool:
    """Print the largest differences and the first mismatch of each row; True if all are equal."""
    title = f"largest differences from one process in float64; {tolerance:g} pass"
    shown = Table(box=box.SIMPLE_HEAD, title=title, padding=(0, 1, 0, 0), pad_edge=False)
    for column in ("model", "strategy", *QUANTITIES, "verdict"):
        shown.add_column(column, justify="right" if column in QUANTITIES else "left", no_wrap=True)
    faults = []
    for (model, strategy), found in rows.items():
        values = [f"{largest_difference(found, quantity):.1e}" for quantity in QUANTITIES]
        equal = first_mismatch(found, tolerance) is None
        shown.add_row(model, strategy, *values, "equal" if equal else "DIFFERS")
        if not equal:
            faults.append(f"{model}, {strategy}: {format_verdict(found, tolerance)}")
    print_whole(shown)
    for fault in faults:
        Console().print(fault, soft_wrap=True, highlight=False)
    return not faults


def verify_layout(config: VerifyConfig, runtime: Runtime) -> None:
    """Verify one strategy and model on the current ranks; exits with 1 if they differ."""
    found = compare_layout(runtime, config)
    if runtime.rank == 0:
        row = (config.model.family, _degrees_text(config.strategy))
        print_report({row: found}, config.tolerance)
    dist.barrier()  # a launcher kills all ranks as soon as one has exited
    if first_mismatch(found, config.tolerance):
        raise SystemExit(1)


def _degrees_text(strategy: StrategyConfig) -> str:
    above_one = (
        f"{axis} {degree}" for axis, degree in axis_degrees(strategy).items() if degree > 1
    )
    return " × ".join(above_one) or "-"


def verify_all(config: VerifyConfig) -> None:
    """Verify all strategies, families and compressions on CPU ranks; exits with 1 if any differ."""
    check_reference(config.optim.name)
    log = Console(stderr=True)
    pool = RankPool(max(map(world_size, STRATEGIES.values())))
    rows: Rows = {}
    try:
        for model, name, case in iter_cases():
            log.print(f"verifying {model}: {name}", style="dim", highlight=False)
            parts = ("strategy", "model", "compress", "task", "lora")
            case = replace(config, **{part: getattr(case, part) for part in parts})
            rows[model, name] = pool.run(world_size(case.strategy), compare_layout, case)[0]
    except RankFailedError as failure:
        log.print(str(failure), markup=False)
        raise SystemExit(1) from None
    finally:
        pool.close()
    if not print_report(rows, config.tolerance):
        raise SystemExit(1)
