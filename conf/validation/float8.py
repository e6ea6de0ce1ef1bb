"""Validate a model for float8: pure functions that collect all problems."""

from math import lcm

from parallel.strategy import StrategyConfig
from trainer.config.train import CompressConfig, ModelConfig, head_width_of
from trainer.plan.layout_rules import near_multiples

STEP = 16  # sizes must be multiples of it for float8 kernels


def precision_problems(
    precision: str, model: ModelConfig, compress: CompressConfig, strategy: StrategyConfig
) -> list[str]:
    """Return the problems of a precision for a model under a resolved strategy that fits it."""
    if precision != "fp8":
        return []
    found = [
        f"precision=fp8 and compress.{key}={getattr(compress, key):g} both change how the same "
        f"layers multiply; set precision=bf16, or compress.{key}=0"
        for key in ("bits", "sparse_n", "prune_heads", "prune_ffn")
        if getattr(compress, key)
    ]
    return found + _size_problems(model, strategy.tensor)


def _size_problems(model: ModelConfig, tensor: int) -> list[str]:
    """Return the problems of weight sizes that float8 kernels do not support."""
    head_width = head_width_of(model)
    groups = model.kv_heads or model.heads
    each = f" on each of strategy.tensor={tensor} ranks" * (tensor > 1)
    wrong: dict[str, str] = {}
    if model.width % STEP:
        fits = STEP if model.head_width else lcm(STEP, model.heads)
        wrong[f"model.width={model.width}"] = f"model.width={near_multiples(model.width, fits)}"
    # Ranks that share a key/value head have all of it.
    heads = {"": model.heads // tensor, "key/value ": max(1, groups // tensor)}
    for kind, number in heads.items():
        if number * head_width % STEP:
            near = near_multiples(head_width, STEP)
            wrong[f"the {kind}heads ({number} × {head_width})"] = f"model.head_width={near}"
    if model.ffn_width % (STEP * tensor):
        near = near_multiples(model.ffn_width, STEP * tensor)
        wrong[f"model.ffn_width={model.ffn_width}"] = f"model.ffn_width={near}"
    if not wrong:
        return []
    remedies = " and ".join(dict.fromkeys(wrong.values()))
    return [
        f"precision=fp8 multiplies matrices whose sizes are multiples of {STEP}, but not those of "
        f"{' and '.join(wrong)}{each}; set precision=bf16, or {remedies}"
    ]
