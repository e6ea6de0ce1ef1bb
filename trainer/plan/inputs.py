"""The inputs of a step by their shapes, without any data."""

from dataclasses import dataclass
from math import prod

import torch

from trainer.config.train import (
    DataConfig,
    ModelConfig,
    TrainConfig,
    is_encoder_decoder,
    longest_source,
)

FRAMES_PER_SECOND = 100
BOXES = 16  # in a picture of a micro-batch, at most


@dataclass(frozen=True)
class TensorShape:
    """The shape and dtype of an input."""

    sizes: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Return the bytes of the input."""
        return prod(self.sizes) * self.dtype.itemsize


Shapes = dict[str, TensorShape]


def longest_inputs(config: TrainConfig, samples: int, packed: bool | None = None) -> Shapes:
    """Return the inputs of a micro-batch of the longest samples that the data can have.

    `config` is complete: its model has all sizes. `packed`: whether text has a start of a document
    inside a sample, which hides keys; None = chats have, if they are packed, and other texts not.
    """
    model, data = config.model, config.data
    packed = (data.kind == "chat" and data.pack) if packed is None else packed
    shapes = {"seeds": TensorShape((samples,), torch.int64)}
    tokens = TensorShape((samples, data.seq_len), torch.int64)
    if data.kind in ("images", "detection"):
        size = (samples, model.channels, model.image_size, model.image_size)
        shapes["images"] = TensorShape(size, torch.float32)
        targets = TensorShape((samples, BOXES, 6), torch.float32)
        one = TensorShape((samples,), torch.int64)
        return shapes | {"targets": targets if data.kind == "detection" else one}
    if data.kind == "speech":
        return shapes | _speech_shapes(model, data, samples)
    shapes |= {"tokens": tokens, "targets": tokens}
    if data.kind == "labelled_text":
        shapes["targets"] = TensorShape((samples,), torch.int64)
    if data.kind == "pairs":
        shapes["source"] = tokens
    if data.kind in ("pairs", "labelled_text"):
        shapes["source_valid"] = TensorShape((samples, data.seq_len), torch.bool)
    if packed:
        shapes |= {"documents": tokens, "positions": tokens}
    return shapes


def _speech_shapes(model: ModelConfig, data: DataConfig, samples: int) -> Shapes:
    """Return the features of utterances, and a target for each vector (CTC) or token."""
    longest = longest_source(model) or 1 << 40
    frames = min(int(data.max_seconds * FRAMES_PER_SECOND), longest)
    vectors = -(-frames // model.audio_stride)
    sizes = (samples, vectors * model.audio_stride, model.mels)
    read = TensorShape(sizes, torch.float32)
    shapes = {"source_valid": TensorShape((samples, vectors), torch.bool)}
    if not is_encoder_decoder(model):
        targets = TensorShape((samples, vectors), torch.int64)
        return shapes | {"frames": read, "targets": targets}
    tokens = TensorShape((samples, data.seq_len), torch.int64)
    return shapes | {"source": read, "tokens": tokens, "targets": tokens}
