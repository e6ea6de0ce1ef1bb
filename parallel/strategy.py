"""Strategy degrees and their validation; does not import torch, to keep `--help` fast."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from parallel.config_fields import key
from parallel.errors import ConfigError

# The five axes, outermost first: ranks are numbered along them, the last fastest, so that ranks
# that communicate most are adjacent.
AXES = ("pipeline", "replicate", "shard", "context", "tensor")
# The same in the order of the device mesh: hybrid sharding needs the axes of replicas (replicate
# and context) before the shard axis.
MESH_AXES = ("pipeline", "replicate", "context", "shard", "tensor")
HOW = "(torchrun --nproc_per_node=N, or launch.ranks=N)"


@dataclass
class StrategyConfig:
    """Degrees of the device mesh; -1 = all remaining ranks (on one axis at most)."""

    pipeline: int = key(1, "Ranks that hold successive stages of the layers", off=1)
    replicate: int = key(1, "Replicas of the model, each with a part of the batch (DDP)", off=1)
    shard: int = key(
        1, "Ranks that one copy of weights and optimizer state is sharded over (FSDP)", off=1
    )
    context: int = key(1, "Ranks that each sequence is split over", off=1)
    tensor: int = key(1, "Ranks that every layer is split over", off=1)
    elastic: bool = key(
        False,
        "With torchrun --nnodes=MIN:MAX: adapt replicate and shard to the available ranks, also "
        "after a host is lost or returns",
        off=False,
        off_means="the number of ranks must be the product of the degrees",
    )
    auto: str = key(
        "no",
        "Choose the degrees, micro_batch_size, activation_checkpointing and loss.chunks that the "
        "command line leaves open, by the plan of launch/plan.py",
        choices={
            "no": "as they are set",
            "once": "a run that goes on with as many ranks keeps what was chosen",
            "always": "at every start",
        },
    )
    reshard_after_forward: bool = key(
        True,
        "FSDP: free a block's gathered weights after its forward (ZeRO-3) or keep them until "
        "its backward is done (one all-gather less, more memory)",
    )
    sequence_parallel: bool = key(
        True,
        "Tensor: split the sequence's positions over the ranks between split layers (less "
        "memory, a quarter more bytes on the wire)",
        off=False,
        off_means="all of them on every rank",
    )
    async_tensor: bool = key(
        False,
        "Tensor, CUDA with NVLink and compile=true: collectives overlap with the matrix "
        "products that they feed, through symmetric memory",
    )
    context_method: str = key(
        "all_gather",
        "Context: how attention accesses the positions of other ranks",
        choices=("all_gather", "ring", "ulysses"),
    )
    schedule: str = key(
        "gpipe",
        "Pipeline: order of forwards and backwards",
        choices=("gpipe", "1f1b", "interleaved", "looped_bfs", "zero_bubble", "zbv", "dualpipev"),
    )
    schedule_csv: str = key(
        "", "Pipeline: a file with a custom schedule, in torch's CSV format", off=""
    )
    stages_per_rank: int = key(
        0,
        "Pipeline: stages per rank",
        off=0,
        off_means="the fewest that the schedule allows",
        at_least=0,
    )
    split: list[int] = key(
        [],
        "Pipeline: the first block of each stage but the first",
        off=[],
        off_means="stages of equal cost",
    )
    bucket_mib: float = key(25.0, "DDP: gradients per all-reduce", unit="MiB", above=0)
    reduce: str = key(
        "auto",
        "How gradients are summed over replicate, shard and context; int8 and powersgd support "
        "plain replicas only, and add the compression error to the next gradient (error feedback)",
        choices={
            "auto": "in the dtype of the weights: fp32, or fp64 with precision=fp64",
            "fp32": "rounded first",
            "bf16": "rounded first",
            "fp16": "rounded first, with a loss scale as precision=fp16",
            "int8": "compressed to a quarter of fp32's bytes",
            "powersgd": "compressed to low-rank factors",
        },
    )
    powersgd_rank: int = key(4, "reduce=powersgd: rank of the factors", at_least=1)
    powersgd_start_step: int = key(
        100,
        "reduce=powersgd: steps with uncompressed sums before it starts",
        off=0,
        off_means="none",
        at_least=0,
    )


def check_torchrun(environment: Mapping[str, str]) -> bool:
    """Return whether torchrun's variables are set; ConfigError if they are inconsistent."""
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if "RANK" not in environment:
        return False
    how = "start the ranks with torchrun, or unset RANK to run without it"
    if missing := [name for name in names if not environment.get(name, "").strip()]:
        given = f"RANK={environment['RANK']} is set"
        raise ConfigError(f"{given}, but {', '.join(missing)} not (or to nothing); {how}")
    optional = [n for n in ("LOCAL_RANK", "LOCAL_WORLD_SIZE") if n in environment]
    numbers = {}
    for name in ("RANK", "WORLD_SIZE", "MASTER_PORT", *optional):
        try:
            numbers[name] = int(environment[name])
        except ValueError:
            raise ConfigError(f"{name}={environment[name]} must be a whole number; {how}") from None
    if not 0 <= numbers["RANK"] < numbers["WORLD_SIZE"]:
        raise ConfigError(
            f"RANK={numbers['RANK']} must be from 0 to WORLD_SIZE - 1 = {numbers['WORLD_SIZE'] - 1}"
            f"; {how}"
        )
    if not 0 < numbers["MASTER_PORT"] < 65536:
        raise ConfigError(f"MASTER_PORT={numbers['MASTER_PORT']} must be from 1 to 65535; {how}")
    local, of = numbers.get("LOCAL_RANK", 0), numbers.get("LOCAL_WORLD_SIZE", 1 << 30)
    if not 0 <= local < of:
        raise ConfigError(f"LOCAL_RANK={local} must be from 0 to LOCAL_WORLD_SIZE - 1; {how}")
    return True


def restart_count(environment: Mapping[str, str]) -> int:
    """Return the number of restarts of these ranks by torchrun; 0 if unknown."""
    count = environment.get("TORCHELASTIC_RESTART_COUNT", "")
    return int(count) if count.isdecimal() else 0


def axis_degrees(strategy: StrategyConfig) -> dict[str, int]:
    """Return the degree of each mesh axis, in the mesh's order."""
    return {axis: getattr(strategy, axis) for axis in AXES}


def world_size(strategy: StrategyConfig) -> int:
    """Return the number of ranks of a strategy without a degree of -1."""
    return math.prod(axis_degrees(strategy).values())


def data_degree(strategy: StrategyConfig) -> int:
    """Return the number of ranks with different samples: replicate × shard."""
    return strategy.replicate * strategy.shard


def without_degrees(strategy: StrategyConfig) -> StrategyConfig:
    """Return a strategy of one rank, with all that is no degree."""
    ones: dict[str, Any] = dict.fromkeys(AXES, 1)
    return replace(strategy, auto="no", elastic=False, **ones)


def resolve_degrees(strategy: StrategyConfig, world_size: int) -> StrategyConfig:
    """Return the strategy with -1 resolved for `world_size` ranks; ConfigError if none fits."""
    if strategy.auto != "no":
        raise ConfigError(
            f"strategy.auto={strategy.auto} plans a training run; name a strategy here, e.g. "
            "strategy=fsdp"
        )
    problems = []
    for axis, degree in axis_degrees(strategy).items():
        if degree == 0 or degree < -1:
            problems.append(f"strategy.{axis}={degree} must be at least 1, or -1 (all ranks left)")
    open_axes = [axis for axis, degree in axis_degrees(strategy).items() if degree == -1]
    if len(open_axes) > 1:
        keys = ", ".join(f"strategy.{axis}" for axis in open_axes)
        problems.append(f"only one degree can be -1 (all ranks that are left), but {keys} are")
    if problems:
        raise ConfigError(*problems)
    if strategy.elastic and not open_axes:
        return _refit_degrees(strategy, world_size)
    fixed = math.prod(degree for degree in axis_degrees(strategy).values() if degree != -1)
    if not open_axes:
        if fixed != world_size:
            raise ConfigError(_wrong_world(strategy, fixed, world_size))
        return strategy
    if world_size % fixed:
        raise ConfigError(_indivisible_message(strategy, fixed, world_size))
    changes: dict[str, Any] = {open_axes[0]: world_size // fixed}
    return replace(strategy, **changes)


def _refit_degrees(strategy: StrategyConfig, world_size: int) -> StrategyConfig:
    """Return the strategy with replicate and shard adapted to `world_size` ranks.

    The pipeline, context and tensor degrees are kept, so that the model still fits; the shard
    degree is kept if it divides the remaining ranks, otherwise all of them shard one replica.
    Raises ConfigError if the fixed degrees do not divide `world_size`.
    """
    model = strategy.pipeline * strategy.context * strategy.tensor
    left, over = divmod(world_size, model)
    if over or not left:
        alone = replace(strategy, replicate=1, shard=1)
        raise ConfigError(
            f"{world_size} ranks are there, but {_format_product(alone)} takes a multiple of "
            f"{model}: "
            f"{_nearest_multiples(world_size, model)}; start (or bring back) hosts until it fits"
        )
    if left % strategy.shard == 0 and (strategy.replicate > 1 or strategy.shard == 1):
        return replace(strategy, replicate=left // strategy.shard)
    return replace(strategy, replicate=1, shard=left)


def _nearest_multiples(number: int, of: int) -> str:
    below = number // of * of
    return f"{below} or {below + of}" if below else str(of)


def _format_product(strategy: StrategyConfig) -> str:
    shown = [f"strategy.{axis}={d}" for axis, d in axis_degrees(strategy).items() if d != 1]
    return " × ".join(shown) or "every degree 1 (strategy=single)"


def _wrong_world(strategy: StrategyConfig, used: int, world_size: int) -> str:
    if used == 1:
        return (
            f"{world_size} ranks were started but {_format_product(strategy)} uses one; start 1 "
            f"rank, "
            "or choose strategy=ddp or strategy=fsdp, or set degrees whose product is "
            f"{world_size}, e.g. strategy.shard={world_size}"
        )
    near = _near_layouts(strategy, used, world_size)
    instead = f"; {world_size} ranks fit {' or '.join(near)}" if near else ""
    return (
        f"{world_size} ranks were started but {_format_product(strategy)} uses {used}; "
        f"start {used} ranks {HOW}, or set one degree to -1 (all ranks that are left){instead}"
    )


def _near_layouts(strategy: StrategyConfig, used: int, world_size: int) -> list[str]:
    """Return strategies for `world_size` ranks that differ in one degree from the requested one."""
    near = []
    for axis, degree in axis_degrees(strategy).items():
        others = used // degree
        if degree > 1 and world_size % others == 0:
            changes: dict[str, Any] = {axis: world_size // others}
            near.append(_format_product(replace(strategy, **changes)))
    return near


def _indivisible_message(strategy: StrategyConfig, fixed: int, world_size: int) -> str:
    fit = sorted({max(fixed, world_size // fixed * fixed), (world_size // fixed + 1) * fixed})
    return (
        f"{_format_product(strategy)}: the fixed degrees make {fixed}, which does not divide "
        f"{world_size} ranks; start {' or '.join(map(str, fit))} ranks {HOW}"
    )
