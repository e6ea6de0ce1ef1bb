"""The rules that a layout must keep, of a model and of a batch: pure functions.

Validation and the planner share them; each returns all problems that it finds.
"""

from math import isqrt

from parallel.pipeline.schedules import accepts_micro_batches, stages_per_rank
from parallel.pipeline.schedules import find_schedule_problems as schedule_problems
from parallel.strategy import StrategyConfig, data_degree
from trainer.config.train import ModelConfig, TrainConfig, head_width_of, is_encoder_decoder


def sequence_problems(seq_len: int, degree: int) -> list[str]:
    """Return the problems of sharing a sequence of tokens among `degree` ranks."""
    if not seq_len < 2 * degree > 2:
        return []
    return [
        f"strategy.context={degree} gives each rank two pieces of every sequence, but "
        f"data.seq_len={seq_len}; set strategy.context={max(1, seq_len // 2)} or less"
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
