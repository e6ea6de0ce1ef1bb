"""Initial weights: a function of seed, name and block of rows, so that no layout changes one."""

import hashlib
import math

import torch
from torch import Tensor, nn

from trainer.config.train import ModelConfig

ROWS_ELEMENTS = 1 << 20  # weights are drawn in blocks of whole rows of about this many entries


def stable_hash(*parts: object) -> int:
    """Return a stable 62-bit integer of the parts; Python's own hash changes from run to run."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 2


def _spread(config: ModelConfig, name: str, shape: torch.Size) -> float | None:
    """Standard deviation of a parameter's initial values; None = all ones; 0 = all zeros."""
    if name.endswith("norm.weight"):
        return None
    if name.endswith("bias") or name == "embed.class_token":
        return 0.0
    if config.init == "vit" and name == "head.output.weight":
        return 0.0
    if name == "embed.patches.weight":  # LeCun's, as the published ViT
        return 1.0 / math.sqrt(shape[1])
    residual = name.endswith(("attention.output.weight", "feed_forward.down.weight"))
    if config.init == "gpt2" and residual:
        # GPT-2 scales by the number of residual branches that add up at the end of the stack.
        branches = 3 if config.family == "encoder_decoder" else 2
        return config.init_std / math.sqrt(branches * config.layers)
    return config.init_std


def draw_rows(
    config: ModelConfig, seed: int, name: str, shape: torch.Size, start: int, stop: int
) -> Tensor:
    """Rows start:stop (dim 0) of a parameter's initial value, in float32 on the CPU.

    Each block of whole rows has a generator seeded by (seed, name, block), so that any rank draws
    just what it holds and no layout changes a weight. gpt2: normal; vit: normal cut at two
    standard deviations, as the published models.
    """
    std = _spread(config, name, shape)
    if std is None or std == 0.0:
        return torch.full((stop - start, *shape[1:]), 1.0 if std is None else 0.0)
    rows = max(1, ROWS_ELEMENTS // max(1, shape[1:].numel()))
    first = start // rows
    drawn = []
    for block in range(first, -(-stop // rows)):
        generator = torch.Generator().manual_seed(stable_hash(seed, name, block))
        values = torch.empty(min(rows, shape[0] - block * rows), *shape[1:])
        if config.init == "vit":
            nn.init.trunc_normal_(values, 0.0, std, -2 * std, 2 * std, generator=generator)
        else:
            values.normal_(0.0, std, generator=generator)
        drawn.append(values)
    return torch.cat(drawn)[start - first * rows : stop - first * rows]
