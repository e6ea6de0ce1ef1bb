"""Encodings of positions that are no rotation: a fixed table, and a bias of attention scores."""

# B batch, S sequence, D width, H heads, R query and C key positions.

import math

import torch
from torch import Tensor, nn

from trainer.config.train import ModelConfig
from trainer.nn.local_layer import LocalLayer


def sinusoids(positions_BS: Tensor, config: ModelConfig, dtype: torch.dtype) -> Tensor:
    """Return the vectors (B,S,D) of positions: sines in the first half, cosines in the second.

    marian: wavelengths as in "Attention is all you need" (arXiv 1706.03762), section 3.5; whisper
    and m2m100: as in tensor2tensor, where the last one is exactly 2π × 10,000.
    """
    precise = torch.promote_types(dtype, torch.float32)
    half, last = config.width // 2, config.width // 2 - (config.sinusoid != "marian")
    index = torch.arange(half, device=positions_BS.device, dtype=precise)
    frequency = torch.exp(index * (-math.log(10_000) / last))
    first = 2 if config.sinusoid == "m2m100" else 0
    angle = (positions_BS + first)[..., None].to(precise) * frequency
    return torch.cat((angle.sin(), angle.cos()), dim=-1).to(dtype)


class RelativeBias(LocalLayer):
    """T5's bias of attention scores: a number per head and bucket of distances (arXiv 1910.10683).

    One table serves all blocks of the encoder, another those of the decoder.
    """

    def __init__(self, config: ModelConfig, causal: bool):
        super().__init__()
        self.causal, self.buckets = causal, config.relative_buckets
        self.distance = config.relative_distance
        self.weight = nn.Parameter(torch.empty(config.heads, config.relative_buckets))

    def forward(self, dtype: torch.dtype, rows_R: Tensor, columns_C: Tensor) -> Tensor:
        """Return what is added to the scores of queries at rows and keys at columns, (1,H,R,C)."""
        weight_HN = self.local_part("weight").to(dtype)
        return weight_HN[:, self.bucket(rows_R, columns_C)][None]

    def bucket(self, rows_R: Tensor, columns_C: Tensor) -> Tensor:
        """Return the bucket of each distance, (R,C): exact when short, logarithmic beyond."""
        ahead_RC = columns_C - rows_R[:, None]
        buckets = self.buckets if self.causal else self.buckets // 2
        first = 0 if self.causal else (ahead_RC > 0) * buckets
        far_RC = (-ahead_RC).clamp(min=0) if self.causal else ahead_RC.abs()
        exact = buckets // 2
        # In float32, as the published weights were learned: a boundary must not move.
        share = (far_RC.float() / exact).log() / math.log(self.distance / exact)
        beyond_RC = exact + (share.clamp(min=0) * (buckets - exact)).long()
        return first + torch.where(far_RC < exact, far_RC, beyond_RC.clamp(max=buckets - 1))


def build_relative_biases(config: ModelConfig) -> dict[str, nn.Module]:
    """Build the tables of positions=relative by stream; other encodings have none."""
    if config.positions != "relative":
        return {}
    streams = {"encoder": ["source"], "decoder": ["target"]}
    return {
        stream: RelativeBias(config, causal=stream == "target")
        for stream in streams.get(config.family, ["source", "target"])
    }
