"""Embeddings of tokens and patches; one class for each value of model.inputs."""

# B batch, S sequence, D width, P patches, C channels.

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.config.train import ModelConfig, inputs_of, is_encoder_decoder
from trainer.nn.audio import AudioEmbedding
from trainer.nn.layers import Dropout, Embedding, Linear, Norm
from trainer.nn.positions import sinusoids
from trainer.nn.queries import grid_sinusoids
from trainer.nn.sequence import SequenceInfo


class TokenEmbedding(nn.Module):
    """Token embedding, plus learned (GPT-2) or sinusoidal position embeddings, if any."""

    source = "tokens"

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.tokens = Embedding(config.vocab_size, config.width)
        self.config = config
        learned = config.positions == "learned" and not config.queries
        self.positions = Embedding(config.max_positions, config.width) if learned else None
        self.segments = Embedding(config.segments, config.width) if config.segments else None
        self.norm = Norm(config) if config.embed_norm else nn.Identity()
        self.dropout = Dropout(config.dropout)

    @staticmethod
    def sequence_length(config: ModelConfig, length: int) -> int:
        """Return the sequence length of `length` tokens: one vector per token."""
        return length

    @staticmethod
    def source_positions(config: ModelConfig, tokens_BS: Tensor) -> Tensor | None:
        """Return the positions of a source sequence, (1,S)."""
        return torch.arange(tokens_BS.shape[1], device=tokens_BS.device)[None]

    def forward(
        self, tokens_BS: Tensor, positions_BS: Tensor, stream: SequenceInfo, dtype: torch.dtype
    ) -> Tensor:
        x_BSD = self.tokens(stream.context.take_local(tokens_BS), dtype)
        if self.config.embed_scale != 1.0:
            x_BSD = x_BSD * self.config.embed_scale
        if (added_BSD := self._position_vectors(positions_BS, stream, dtype)) is not None:
            x_BSD = x_BSD + stream.layout.local_positions(added_BSD)
        if self.segments is not None:
            segments_BS = stream.segments_BS
            segments_BS = torch.zeros_like(tokens_BS) if segments_BS is None else segments_BS
            added_BSD = self.segments(stream.context.take_local(segments_BS), dtype)
            x_BSD = x_BSD + stream.layout.local_positions(added_BSD)
        return self.dropout(self.norm(x_BSD), stream)

    def _position_vectors(
        self, positions_BS: Tensor, stream: SequenceInfo, dtype: torch.dtype
    ) -> Tensor | None:
        """Return what the local positions add to the embedding; None = nothing."""
        if self.positions is not None:
            return self.positions(stream.context.take_local(positions_BS), dtype)
        if self.config.queries:
            numbers_BS = stream.context.take_local(positions_BS) % self.config.queries
            like = positions_BS.new_empty((), dtype=dtype)
            return grid_sinusoids(self.config.queries, self.config.width, like)[numbers_BS]
        if self.config.positions == "sinusoidal":
            return sinusoids(stream.context.take_local(positions_BS), self.config, dtype)
        return None


class PatchEmbedding(nn.Module):
    """Patch embedding with learned position embeddings (ViT, arXiv 2010.11929)."""

    source = "images"

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.patch_size = config.patch_size
        self.patches = Linear(config.channels * config.patch_size**2, config.width)
        has_class_token = config.pool == "class_token"
        self.class_token = nn.Parameter(torch.empty(1, config.width)) if has_class_token else None
        self.positions = nn.Embedding(image_length(config), config.width)
        self.finds_places = config.queries > 0  # by a decoder's queries
        self.dropout = Dropout(config.dropout)

    @staticmethod
    def sequence_length(config: ModelConfig, length: int) -> int:
        """Return the sequence length of an image; `length` is ignored."""
        return image_length(config)

    @staticmethod
    def source_positions(config: ModelConfig, images_BCHW: Tensor) -> Tensor | None:
        """Return None: patches have two coordinates, to which RoPE is not applied."""
        return None

    def forward(
        self, images_BCHW: Tensor, positions_BS: None, stream: SequenceInfo, dtype: torch.dtype
    ) -> Tensor:
        patches = F.unfold(images_BCHW.to(dtype), self.patch_size, stride=self.patch_size)
        x_BPD = self.patches(patches.transpose(1, 2))
        if self.class_token is not None:
            first_B1D = self.class_token.to(dtype).expand(x_BPD.shape[0], 1, -1)
            x_BPD = torch.cat((first_B1D, x_BPD), dim=1)
        if self.finds_places:
            x_BPD = x_BPD + grid_sinusoids(x_BPD.shape[1], x_BPD.shape[2], x_BPD)
        x_BPD = stream.context.take_local(x_BPD + self.positions.weight.to(dtype))
        return self.dropout(stream.layout.local_positions(x_BPD), stream)


class TwoEmbeddings(TokenEmbedding):
    """The embeddings of an encoder-decoder whose source is no tokens: of both its sequences."""

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.encoder = embedding_type(config)(config)

    def forward(
        self, input: Tensor, positions_BS: Tensor, stream: SequenceInfo, dtype: torch.dtype
    ) -> Tensor:
        if input.is_floating_point():
            return self.encoder(input, positions_BS, stream, dtype)
        return super().forward(input, positions_BS, stream, dtype)


Embedded = TokenEmbedding | PatchEmbedding | AudioEmbedding
INPUTS: dict[str, type[Embedded]] = {
    "tokens": TokenEmbedding,
    "patches": PatchEmbedding,
    "audio": AudioEmbedding,
}


def build_embedding(config: ModelConfig) -> Embedded:
    """Build a model's embedding."""
    if is_encoder_decoder(config) and inputs_of(config) != "tokens":
        return TwoEmbeddings(config)
    return embedding_type(config)(config)


def embedding_type(config: ModelConfig) -> type[Embedded]:
    """Return the class of the embedding of what a model reads first.

    Its `source` is the key of the batch tensor that an encoder-only model reads. Its static methods
    `sequence_length` and `source_positions` serve pipeline stages that have no embedding.
    """
    return INPUTS[inputs_of(config)]


def image_length(config: ModelConfig) -> int:
    """Return the sequence length of an embedded image: its patches, plus any class token."""
    patches = (config.image_size // config.patch_size) ** 2
    return patches + (config.pool == "class_token")
