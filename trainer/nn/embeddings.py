"""Embeddings and heads: tokens or patches become vectors, and vectors logits."""

# B batch, S sequence, D width, P patches, C channels.

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.config.train import ModelConfig
from trainer.nn.layers import Dropout, Embedding, Linear, Norm
from trainer.nn.sequence import Stream


class TokenEmbedding(nn.Module):
    """Token vectors, plus learned positions (GPT-2) unless attention rotates (RoPE)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.tokens = Embedding(config.vocab_size, config.width)
        learned = config.positions == "learned"
        self.positions = Embedding(config.max_positions, config.width) if learned else None
        self.dropout = Dropout(config.dropout)

    def forward(
        self, tokens_BS: Tensor, positions_BS: Tensor, stream: Stream, dtype: torch.dtype
    ) -> Tensor:
        x_BSD = self.tokens(stream.context.take(tokens_BS), dtype)
        if self.positions is not None:
            own_BS = stream.context.take(positions_BS)
            x_BSD = x_BSD + stream.layout.own(self.positions(own_BS, dtype))
        return self.dropout(x_BSD, stream)


class PatchEmbedding(nn.Module):
    """Image patches as tokens, with learned positions (ViT, arXiv 2010.11929)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.patch_size = config.patch_size
        self.patches = Linear(config.channels * config.patch_size**2, config.width)
        has_class_token = config.pool == "class_token"
        self.class_token = nn.Parameter(torch.empty(1, config.width)) if has_class_token else None
        self.positions = nn.Embedding(image_length(config), config.width)
        self.dropout = Dropout(config.dropout)

    def forward(self, images_BCHW: Tensor, stream: Stream, dtype: torch.dtype) -> Tensor:
        patches = F.unfold(images_BCHW.to(dtype), self.patch_size, stride=self.patch_size)
        x_BPD = self.patches(patches.transpose(1, 2))
        if self.class_token is not None:
            first_B1D = self.class_token.to(dtype).expand(x_BPD.shape[0], 1, -1)
            x_BPD = torch.cat((first_B1D, x_BPD), dim=1)
        x_BPD = stream.context.take(x_BPD + self.positions.weight.to(dtype))
        return self.dropout(stream.layout.own(x_BPD), stream)


class Head(nn.Module):
    """Final norm and projection to logits; a classifier pools its sequence first.

    With `defers_output` a model in training ends before the projection, which the loss does.
    """

    defers_output = False

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.norm = Norm(config)
        classifies = config.family == "encoder"
        self.pool = config.pool if classifies else ""
        outputs = config.classes if classifies else config.vocab_size
        self.output = Linear(config.width, outputs, bias=classifies)

    def forward(self, x_BSD: Tensor, stream: Stream) -> Tensor:
        x_BSD = stream.whole(self.norm(x_BSD))
        if self.pool:
            x_BSD = stream.context.whole(x_BSD, stream.total)
        if self.pool == "class_token":
            x_BSD = x_BSD[:, 0]
        if self.pool == "mean" and stream.marks_BS2 is not None:
            sizes_BS = stream.marks_BS2[..., 0].to(x_BSD.dtype)
            x_BSD = (x_BSD * (sizes_BS / sizes_BS.sum(1, keepdim=True))[..., None]).sum(dim=1)
        elif self.pool == "mean":
            x_BSD = x_BSD.mean(dim=1)
        return x_BSD if self.defers_output and self.training else self.output(x_BSD)


def image_length(config: ModelConfig) -> int:
    """Vectors that an image is embedded as."""
    patches = (config.image_size // config.patch_size) ** 2
    return patches + (config.pool == "class_token")
