"""Weight initialisation as a pure function of seed, name and rows, independent of the layout."""

import hashlib
import math

import torch
from torch import Tensor, nn

from trainer.config.train import ModelConfig, is_encoder_decoder

ROWS_ELEMENTS = 1 << 20  # approximate number of elements per independently seeded block of rows

CONVOLUTIONS = ("embed.convolution", "embed.encoder.convolution")


def stable_hash(*parts: object) -> int:
    """Return a 62-bit hash of the parts that, unlike Python's, is the same in every process."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 2


def _init_std(config: ModelConfig, name: str, shape: torch.Size) -> float | None:
    """Return the standard deviation of a parameter's initial values; None = ones, 0 = zeros."""
    if name.endswith("norm.weight"):
        return None
    if name.endswith(("bias", "lora_b")) or name == "embed.class_token":
        return 0.0
    if config.init == "vit" and name == "head.output.weight":
        return 0.0
    if name.endswith("patches.weight") or name.startswith(CONVOLUTIONS):
        # LeCun initialisation, as in the published ViT.
        return 1.0 / math.sqrt(shape[1])
    residual = name.endswith(("attention.output.weight", "feed_forward.down.weight"))
    if config.init == "gpt2" and residual:
        # GPT-2 scales by the number of residual branches that the stack adds up.
        branches = 3 if is_encoder_decoder(config) else 2
        return config.init_std / math.sqrt(branches * config.layers)
    return config.init_std


def init_rows(
    config: ModelConfig, seed: int, name: str, shape: torch.Size, start: int, stop: int
) -> Tensor:
    """Return rows start:stop (dim 0) of a parameter's initial value, in float32 on the CPU.

    Each block of rows has a generator seeded by (seed, name, block), so that a rank generates only
    its local rows and the values do not depend on the layout. gpt2: normal; vit: normal truncated
    at two standard deviations; both as in the published models. An adapter's factor A: uniform in
    ±1/sqrt(inputs), as in the published LoRA and PEFT.
    """
    std = _init_std(config, name, shape)
    if std is None or std == 0.0:
        return torch.full((stop - start, *shape[1:]), 1.0 if std is None else 0.0)
    rows = max(1, ROWS_ELEMENTS // max(1, shape[1:].numel()))
    first = start // rows
    blocks = []
    for block in range(first, -(-stop // rows)):
        generator = torch.Generator().manual_seed(stable_hash(seed, name, block))
        values = torch.empty(min(rows, shape[0] - block * rows), *shape[1:])
        if name.endswith("lora_a"):
            bound = 1.0 / math.sqrt(shape[1])
            values.uniform_(-bound, bound, generator=generator)
        elif config.init == "vit":
            nn.init.trunc_normal_(values, 0.0, std, -2 * std, 2 * std, generator=generator)
        else:
            values.normal_(0.0, std, generator=generator)
        blocks.append(values)
    return torch.cat(blocks)[start - first * rows : stop - first * rows]
