"""Validate a strategy against model and batch: pure functions that collect all problems."""

from math import inf, isqrt
from typing import Any

from parallel.errors import UserError
from parallel.pipeline.schedules import (
    CSV_KEY,
    SCHEDULES,
    accepts_micro_batches,
    has_split_backward,
    stages_per_rank,
)
from parallel.pipeline.schedules import find_schedule_problems as schedule_problems
from parallel.strategy import HOW, StrategyConfig, axis_degrees, data_degree
from trainer.config.train import (
    DataConfig,
    ModelConfig,
    TrainConfig,
    VerifyConfig,
    head_width_of,
    is_encoder_decoder,
)
from trainer.config.verify import FAULT_AXES
from trainer.data import READERS

VERIFIED = 2  # micro-batches per rank of a pipeline that is verified


def _has_tokens(data: DataConfig) -> bool:
    """Return whether data.seq_len says how long a sample is."""
    return data.kind not in READERS or READERS[data.kind].inputs != "patches"


def layout_problems(config: Any, strategy: StrategyConfig) -> list[str]:
    """Return the problems of a resolved strategy, except those of the model."""
    found = []
    if isinstance(config, VerifyConfig):
        found += _fault_problems(config.fault, strategy, config.model)
    data = getattr(config, "data", None)
    seq_len = data.seq_len if isinstance(data, DataConfig) and _has_tokens(data) else inf
    if seq_len < 2 * strategy.context > 2:
        found.append(
            f"strategy.context={strategy.context} gives each rank two pieces of every sequence, "
            f"but data.seq_len={seq_len}; set strategy.context={max(1, int(seq_len) // 2)} or "
            "less"
        )
    compiles = getattr(config, "compile", False)
    if strategy.async_tensor and (strategy.tensor == 1 or not compiles):
        found.append(
            "strategy.async_tensor=true overlaps what compile=true has compiled of "
            f"strategy.tensor above 1, but strategy.tensor={strategy.tensor} and "
            f"compile={str(compiles).lower()}; set compile=true, or strategy.async_tensor=false"
        )
    metrics = getattr(config, "metrics", None)
    if metrics is not None and metrics.timeline and strategy.pipeline == 1:
        found.append(
            "metrics.timeline=true draws a pipeline's schedule, but strategy.pipeline=1; set "
            "strategy=pipeline, or metrics.timeline=false"
        )
    if strategy.pipeline > 1:
        found += _schedule_problems(config, strategy)
    return found + _reduction_problems(config, strategy)


def _reduction_problems(config: Any, strategy: StrategyConfig) -> list[str]:
    """Return the problems of strategy.reduce."""
    given = f"strategy.reduce={strategy.reduce}"
    if isinstance(config, VerifyConfig) and strategy.reduce != "auto":
        return [
            f"{given} rounds gradients, so that no layout equals one process; set "
            "strategy.reduce=auto"
        ]
    if strategy.reduce not in ("int8", "powersgd"):
        return []
    others = [
        f"strategy.{axis}={degree}"
        for axis, degree in axis_degrees(strategy).items()
        if axis != "replicate" and degree > 1
    ]
    found = []
    if others:
        found.append(
            f"{given} compresses whole gradients of whole copies, which {' and '.join(others)} "
            "does not leave; set strategy=ddp, or strategy.reduce=bf16"
        )
    elif strategy.replicate == 1 and not strategy.elastic:
        found.append(
            f"{given} compresses what copies tell each other, but strategy.replicate=1 makes none; "
            f"start 2 ranks or more {HOW}, or set strategy.reduce=auto"
        )
    if getattr(config, "precision", "") == "fp16":
        found.append(
            f"{given} adds to a step what was lost in the one before, but precision=fp16 scales "
            "each by another factor; set precision=bf16, or strategy.reduce=fp16"
        )
    return found


def _schedule_problems(config: Any, strategy: StrategyConfig) -> list[str]:
    """Return the problems of a pipeline schedule with other options."""
    found: list[str] = []
    # `batch_problems` checks the micro-batches of training; other commands have none.
    if isinstance(config, VerifyConfig) or not (
        isinstance(config, TrainConfig) or strategy.schedule_csv
    ):
        found = schedule_problems(strategy, VERIFIED * strategy.pipeline)
    try:
        return found + _one_pass(config, strategy)
    except UserError:
        return found  # reported where the schedule's lists are checked


def _one_pass(config: Any, strategy: StrategyConfig) -> list[str]:
    """Return the options that do not work with a split backward.

    A compiled graph has a single backward, recomputation would run once per layer's weights, and
    float8 layers would multiply for both gradients in either pass.
    """
    asked = []
    if getattr(config, "compile", False):
        asked.append(("compile", "true", "false"))
    if isinstance(config, TrainConfig) and config.precision == "fp8":
        asked.append(("precision", "fp8", "bf16"))
    mode = getattr(config, "activation_checkpointing", "none")
    if mode != "none":
        asked.append(("activation_checkpointing", mode, "none"))
    if not asked or not has_split_backward(strategy):
        return []
    fit = " or ".join(n for n, rules in SCHEDULES.items() if not rules.splits_backward)
    name, other = f"strategy.schedule={strategy.schedule}", f"strategy.schedule={fit}"
    if strategy.schedule_csv:
        name, other = f"{CSV_KEY}={strategy.schedule_csv}", "write B for I and W there"
    return [
        f"{key}={value} needs a backward in one pass, but {name} computes gradients of inputs and "
        f"of weights apart; set {key}={off}, or {other}"
        for key, value, off in asked
    ]


def model_problems(model: ModelConfig, strategy: StrategyConfig) -> list[str]:
    """Return the problems of distributing a model's layers under a strategy."""
    return (
        tensor_problems(model, strategy.tensor)
        + _context_problems(model, strategy)
        + _stage_problems(model, strategy)
    )


def batch_problems(config: TrainConfig, strategy: StrategyConfig) -> list[str]:
    """Return the problems of distributing a step's samples over ranks and micro-batches."""
    size, micro, degree = config.batch_size, config.micro_batch_size, data_degree(strategy)
    if size % degree:
        return [
            f"batch_size={size} is not divisible by the {degree} ranks that see different samples "
            f"(strategy.replicate × strategy.shard); try {near_multiples(size, degree)}"
        ]
    share = size // degree
    if micro and share % micro and not strategy.elastic:
        return [
            f"micro_batch_size={micro} does not divide the {share} samples of one rank "
            f"(batch_size={size} / {degree} ranks); try {near_divisors(share, micro)}"
        ]
    if strategy.pipeline == 1:
        return []
    return schedule_problems(strategy, share // micro_batch_size(config, strategy))


def micro_batch_size(config: TrainConfig, strategy: StrategyConfig) -> int:
    """Return the samples per forward; where the key is 0, all of a rank's samples.

    In a pipeline it is the largest size that gives at least two micro-batches per rank, and for an
    elastic strategy the largest divisor of the local batch up to the given size.
    """
    share, given = config.batch_size // data_degree(strategy), config.micro_batch_size
    if given and strategy.elastic:
        return max(size for size in divisors_of(share) if size <= given)
    if given or strategy.pipeline == 1:
        return given or share
    counts = [
        count
        for count in divisors_of(share)
        if accepts_micro_batches(strategy.schedule, strategy.pipeline, count)
    ]
    enough = [count for count in counts if count >= 2 * strategy.pipeline]
    return share // (enough[0] if enough else max(counts, default=1))


def _context_problems(model: ModelConfig, strategy: StrategyConfig) -> list[str]:
    """Return the problems of attention over positions that the context axis shards."""
    if strategy.context > 1 and strategy.context_method == "ring" and model.positions == "relative":
        return [
            "strategy.context_method=ring passes no gradient to the scores, but model.positions="
            "relative learns a bias of them; set strategy.context_method=all_gather or ulysses"
        ]
    heads = model.heads // strategy.tensor
    if strategy.context_method != "ulysses" or heads % strategy.context == 0:
        return []
    fit = ", ".join(map(str, divisors_of(heads)))
    each = f" on each of strategy.tensor={strategy.tensor} ranks" if strategy.tensor > 1 else ""
    return [
        f"strategy.context={strategy.context} does not divide the {heads} heads{each}, which "
        f"strategy.context_method=ulysses deals out; try strategy.context={fit}, or "
        "strategy.context_method=ring or all_gather"
    ]


def _stage_problems(model: ModelConfig, strategy: StrategyConfig) -> list[str]:
    """Return the problems of cutting a model into pipeline stages."""
    if strategy.pipeline == 1:
        return []
    blocks, sizes = model.layers, f"model.layers={model.layers}"
    if is_encoder_decoder(model):
        depth = model.encoder_layers or model.layers
        blocks, sizes = blocks + depth, f"{sizes} and {depth} of the encoder"
    per_rank = stages_per_rank(strategy)
    stages = strategy.pipeline * per_rank
    if stages > blocks:
        near = f"set strategy.pipeline={max(1, blocks // per_rank)}"
        return [
            f"strategy.pipeline={strategy.pipeline} with {per_rank} stages per rank needs {stages} "
            f"blocks, one for each stage, but the model has {blocks} ({sizes}); {near} or less"
        ]
    firsts = list(strategy.split)
    rises = all(a < b for a, b in zip([0, *firsts], [*firsts, blocks], strict=True))
    if firsts and (len(firsts) != stages - 1 or not rises):
        even = [round(blocks * stage / stages) for stage in range(1, stages)]
        return [
            f"strategy.split={_format_numbers(firsts)} must be the first blocks of stages 1 to "
            f"{stages - 1}: {stages - 1} rising numbers from 1 to {blocks - 1}, e.g. "
            f"{_format_numbers(even)}; or empty, to cut where all stages cost alike"
        ]
    return []


def _format_numbers(numbers: list[int]) -> str:
    return f"[{','.join(map(str, numbers))}]"


def _fault_problems(fault: str, strategy: StrategyConfig, model: ModelConfig) -> list[str]:
    """Return the problems of planting a fault in this layout of a model."""
    axis = FAULT_AXES.get(fault)
    if axis == "tensor" and strategy.tensor == 1:
        return [f"fault={fault} is one of split layers; set strategy=tensor"]
    if axis == "context" and (strategy.context == 1 or strategy.context_method != "ring"):
        return [
            f"fault={fault} is one of a ring; set strategy=context strategy.context_method=ring"
        ]
    if axis == "pipeline" and strategy.pipeline == 1:
        return [f"fault={fault} is one of a pipeline; set strategy=pipeline"]
    whole = not strategy.sequence_parallel
    shared = fault == "skip_partial_gradient_sum" and model.qk_norm == "head"
    if fault in ("skip_sequence_gather", "skip_partial_gradient_sum") and whole and not shared:
        return [
            f"fault={fault} is one of sequence parallelism; set strategy.sequence_parallel=true"
        ]
    if fault == "skip_norm_gradient_mean" and model.qk_norm != "width":
        return [f"fault={fault} is one of norms over all heads; set model.qk_norm=width"]
    return []


def tensor_problems(model: ModelConfig, degree: int) -> list[str]:
    """Return the problems of splitting the model's layers over `degree` ranks."""
    fit = [d for d in divisors_of(model.heads) if _splits_heads(model, d)]
    found = []
    if degree not in fit:
        given = f"model.heads={model.heads}"
        if model.kv_heads:
            given += f" and model.kv_heads={model.kv_heads}"
        found.append(
            f"strategy.tensor={degree} does not divide {given}; try {', '.join(map(str, fit))}"
        )
    # All ranks have equally many rows, except that the last ones may have fewer.
    rows = -(-model.vocab_size // degree)
    if 0 < model.vocab_size <= rows * (degree - 1):
        found.append(
            f"strategy.tensor={degree} leaves a rank without any of model.vocab_size="
            f"{model.vocab_size}; set model.vocab_size={degree**2} or more"
        )
    return found


def _splits_heads(model: ModelConfig, degree: int) -> bool:
    """Return whether ranks get full query heads, and full or equal parts of key/value heads."""
    groups = model.kv_heads or model.heads
    head_width = head_width_of(model)
    shared = degree % groups == 0 and groups * head_width % degree == 0
    return model.heads % degree == 0 and (groups % degree == 0 or shared)


def divisors_of(number: int) -> list[int]:
    """Return the divisors of `number` in ascending order; 1 and itself beyond any possible size."""
    if number > 1e12:
        return [1, number]
    low = [d for d in range(1, isqrt(number) + 1) if number % d == 0]
    return low + [number // d for d in reversed(low) if d * d != number]


def near_divisors(number: int, wanted: int) -> str:
    """Return the divisors of `number` just below and above `wanted`."""
    found = divisors_of(number)
    near = [*[d for d in found if d < wanted][-1:], *[d for d in found if d > wanted][:1]]
    return " or ".join(map(str, near))


def near_multiples(number: int, factor: int) -> str:
    """Return the multiples of `factor` just below and above `number`."""
    below = number // factor * factor
    return " or ".join(str(multiple) for multiple in (below, below + factor) if multiple)
