"""Validate a compression against model and layout: pure functions that collect all problems."""

import math

from conf.validation.outputs import rules_of
from parallel.strategy import StrategyConfig
from trainer.config.train import (
    CompressConfig,
    ModelConfig,
    head_width_of,
    is_encoder_decoder,
)
from trainer.plan.layout_rules import divisors_of

SHORTENS = ("merge", "pool_after", "drop")


def compress_problems(
    compress: CompressConfig, model: ModelConfig, strategy: StrategyConfig
) -> list[str]:
    """Return the problems of compressing a model under a resolved strategy."""
    asked = [key for key in SHORTENS if getattr(compress, key)]
    if of_outputs := rules_of(model).compression(compress, model):
        return of_outputs
    found = _sharded_sequence_problems(asked, compress, strategy) + _pooling_problems(
        compress, model
    )
    if model.family == "encoder":
        found += _patch_problems(compress, model)
    elif compress.drop:
        found.append(
            f"compress.drop={compress.drop:g} leaves patches of images out, but "
            f"model.family={model.family} learns from text; set compress.drop=0"
        )
    if model.family == "decoder" and compress.merge:
        found.append(
            f"compress.merge={compress.merge} would let a token see the ones behind it: what is "
            "merged stands for all of its positions, and model.family=decoder predicts them one "
            "by one; set compress.merge=0, and compress=pool instead, which is shifted"
        )
    found += [
        f"compress.{key}=1 tells zero from nothing; set compress.{key}=2 or more, or 0 for all bits"
        for key in ("bits", "input_bits")
        if getattr(compress, key) == 1
    ]
    if model.positions == "relative":
        found += [
            f"compress.{key}={getattr(compress, key):g} changes the distances or the heads that "
            f"model.positions=relative has a bias for; set compress.{key}=0"
            for key in (*SHORTENS, "prune_heads")
            if getattr(compress, key)
        ]
    return found + _width_problems(compress, model, strategy) + _pruning_problems(compress, model)


def _sharded_sequence_problems(
    asked: list[str], compress: CompressConfig, strategy: StrategyConfig
) -> list[str]:
    """Return the problems of reducing sequences that the context axis shards."""
    if strategy.context == 1:
        return []
    return [
        f"compress.{key}={getattr(compress, key):g} needs all of a sequence on each rank, but "
        f"strategy.context={strategy.context} shares it; set strategy.context=1, or "
        f"compress.{key}=0"
        for key in asked
    ]


def encoder_blocks(model: ModelConfig) -> int:
    """Return the number of blocks of the encoder, or of the only stack."""
    two = is_encoder_decoder(model)
    return (model.encoder_layers or model.layers) if two else model.layers


def _pooling_problems(compress: CompressConfig, model: ModelConfig) -> list[str]:
    if model.family == "decoder":
        return _hourglass_problems(compress, model)
    blocks = encoder_blocks(model)
    if compress.pool_after >= blocks:
        return [
            f"compress.pool_after={compress.pool_after} must be below the {blocks} blocks of the "
            f"encoder; set compress.pool_after={max(0, blocks - 1)} or less"
        ]
    return []


def _hourglass_problems(compress: CompressConfig, model: ModelConfig) -> list[str]:
    """Return the problems of an hourglass: equal blocks before and after, and some in between."""
    found, most = [], (model.layers - 1) // 2
    if compress.pool_after and model.sliding_window:
        found.append(
            f"compress.pool_after={compress.pool_after} lets blocks work on pooled tokens, which "
            f"model.sliding_window={model.sliding_window} does not count; set "
            "compress.pool_after=0, or model.sliding_window=0"
        )
    if compress.pool_after > most:
        found.append(
            f"compress.pool_after={compress.pool_after} leaves none of model.layers={model.layers} "
            f"to work on pooled tokens, as many blocks in front of them as behind; set "
            f"compress.pool_after={most}"
        )
    if compress.pool_after and 0 < model.max_positions < compress.pool_stride:
        found.append(
            f"compress.pool_stride={compress.pool_stride} is more than the {model.max_positions} "
            f"tokens of a sample; set compress.pool_stride={model.max_positions} or less"
        )
    return found


def _patch_problems(compress: CompressConfig, model: ModelConfig) -> list[str]:
    """Return the problems of pooling or dropping patches; none while the image size is unknown."""
    side = model.image_size // model.patch_size
    if not side:
        return []
    found = []
    if compress.pool_after and compress.pool_stride > side:
        found.append(
            f"compress.pool_stride={compress.pool_stride} is more than the {side} patches of an "
            f"image's side; set compress.pool_stride={side} or less"
        )
    if compress.pool_after and compress.drop:
        found.append(
            f"compress.pool_after={compress.pool_after} joins squares of patches, in which "
            f"compress.drop={compress.drop:g} leaves holes; set one of them to 0"
        )
    pooled = -(-side // compress.pool_stride) if compress.pool_after else side
    patches = max(1, round(pooled**2 * (1 - compress.drop)))
    times = model.layers - 1 - compress.pool_after
    most = _max_merged(patches, times)
    if compress.merge > most:
        found.append(
            f"compress.merge={compress.merge} is more than half of the vectors that are left "
            f"after {times - 1} merges of {patches}; set compress.merge={most} or less"
        )
    return found


def _max_merged(vectors: int, times: int) -> int:
    """Return the largest number of tokens that can be merged this often: at most half each time."""
    # vectors - (times - 1) r >= 2 r
    return vectors // (times + 1) if times > 0 else 0


def _neighbour_sizes(compress: CompressConfig) -> dict[str, int]:
    """Return the group sizes along a layer's inputs, by config key."""
    sizes = {
        "group": compress.group if compress.bits else 0,
        "sparse_m": compress.sparse_m if compress.sparse_n else 0,
    }
    return {key: size for key, size in sizes.items() if size}


def _width_problems(
    compress: CompressConfig, model: ModelConfig, strategy: StrategyConfig
) -> list[str]:
    """Return the problems of groups along a layer's inputs, of which each rank needs full ones."""
    head_width = head_width_of(model)
    inputs = {
        f"model.width={model.width}": model.width,
        f"{model.heads} heads of {head_width}": _local_width(
            model.heads * head_width, strategy.tensor
        ),
        f"model.ffn_width={model.ffn_width}": _local_width(model.ffn_width, strategy.tensor),
    }
    found = []
    for key, size in _neighbour_sizes(compress).items():
        wrong = [name for name, width in inputs.items() if not width or width % size]
        if wrong:
            fit = [
                d
                for d in divisors_of(min(filter(None, inputs.values())))
                if all(width and width % d == 0 for width in inputs.values())
            ]
            each = f" on each of strategy.tensor={strategy.tensor} ranks" * (strategy.tensor > 1)
            near = min(fit, key=lambda d: abs(d - size), default=0)
            found.append(
                f"compress.{key}={size} does not divide the inputs of {' and '.join(wrong)}{each}; "
                f"try compress.{key}={near}"
            )
    if compress.sparse_n and compress.sparse_n >= compress.sparse_m:
        found.append(
            f"compress.sparse_n={compress.sparse_n} must be below compress.sparse_m="
            f"{compress.sparse_m}; set compress.sparse_n={max(1, compress.sparse_m // 2)}, or 0"
        )
    return found


def _pruning_problems(compress: CompressConfig, model: ModelConfig) -> list[str]:
    """Return the problems of pruning heads and channels."""
    found, groups = [], model.kv_heads or model.heads
    counts = {"prune_heads": (groups, "heads"), "prune_ffn": (model.ffn_width, "channels")}
    if model.kv_heads:
        counts["prune_heads"] = (groups, "key/value heads")
    for key, (count, what) in counts.items():
        share = getattr(compress, key)
        if share and not 0 < round(share * count) < count:
            near = min(max(1, round(share * count)), count - 1) / count
            found.append(
                f"compress.{key}={share:g} of {count} {what} is {round(share * count)}: "
                f"set compress.{key}={near:.3g}" + (", or 0" if near else "")
            )
    if (compress.prune_heads or compress.prune_ffn) and compress.prune_end < compress.prune_start:
        found.append(
            f"compress.prune_end={compress.prune_end:g} is before compress.prune_start="
            f"{compress.prune_start:g}; set compress.prune_end={compress.prune_start:g} or more"
        )
    if compress.prune_heads and model.qk_norm == "width":
        found.append(
            f"compress.prune_heads={compress.prune_heads:g} removes heads, but model.qk_norm=width "
            "divides each by all of them, so that the others would change; set "
            "compress.prune_heads=0"
        )
    return found + _regrouping_problems(compress, model, model.heads // groups)


def _regrouping_problems(compress: CompressConfig, model: ModelConfig, queries: int) -> list[str]:
    """Return the problems of groups along inputs that pruning would break up."""
    head = queries * head_width_of(model)
    found = []
    for key, size in _neighbour_sizes(compress).items():
        if compress.prune_ffn:
            found.append(
                f"compress.prune_ffn={compress.prune_ffn:g} removes channels one by one, and the "
                f"others would have new neighbours in compress.{key}={size}; set "
                + ("compress.group=0" if key == "group" else "compress.sparse_n=0")
            )
        if compress.prune_heads and head % size:
            found.append(
                f"compress.{key}={size} does not divide the {head} inputs of a head that "
                f"compress.prune_heads removes; set compress.{key}={math.gcd(size, head)}"
            )
    return found


def _local_width(width: int, degree: int) -> int:
    """Return the local width of a layer on each rank; 0 if the ranks' parts differ."""
    return width // degree if width % degree == 0 else 0


def match_problems(
    compress: CompressConfig, model: ModelConfig, strategy: StrategyConfig
) -> list[str]:
    """Return the problems of matching a teacher's hidden states."""
    match, named = compress.match, f"compress.match={compress.match}"
    if not match or not compress.match_weight:
        return []
    ours = [pair[0] for pair in match if len(pair) == 2 and min(pair) >= 0]
    if len(set(ours)) < len(match):
        return [
            f"{named} must be pairs of blocks, ours and the teacher's, counted from 0 and each of "
            "ours once, e.g. [[1,3],[3,7]]"
        ]
    found = []
    if not compress.teacher:
        found.append(f"{named} learns from a teacher; set compress.teacher, or compress.match=[]")
    if strategy.context > 1:
        found.append(
            f"{named} compares all positions of a sample, but strategy.context={strategy.context} "
            "shares them; set strategy.context=1, or compress.match=[]"
        )
    found += [
        f"{named} compares positions one by one, but compress.{key}={getattr(compress, key):g} "
        f"leaves fewer; set compress.{key}=0, or compress.match=[]"
        for key in SHORTENS
        if getattr(compress, key)
    ]
    last = encoder_depth(model) - 1
    if max(ours) > last:
        near = [[min(one, last), other] for one, other in match]
        found.append(f"{named}, but the blocks here are 0 to {last}; try compress.match={near}")
    return found


def encoder_depth(model: ModelConfig) -> int:
    """Return the number of all blocks."""
    return model.layers + (encoder_blocks(model) if is_encoder_decoder(model) else 0)
