"""The inputs of a step by their shapes, and a model's sizes, without any data."""

# B batch, S sequence, T source sequence, F frames of audio, N rows of boxes.

from dataclasses import dataclass
from math import prod

import torch

from trainer.config.train import ConfigError, DataConfig, ModelConfig, TrainConfig, longest_source
from trainer.data.dataset import DataFacts

FRAMES_PER_SECOND = 100
BOXES = 16  # in a picture of a micro-batch, at most
BUNDLED = {
    "bundled:fashion-mnist": DataFacts(classes=10, image_size=28, channels=1),
    "bundled:fashion-canvas": DataFacts(classes=10, image_size=64, channels=1),
    "bundled:trees": DataFacts(classes=1, image_size=256, channels=3),
}
CHARACTERS = 64  # entries of a tokenizer of characters, at most


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


def assumed_facts(config: TrainConfig) -> DataFacts:
    """Return the facts about the data that the sizes of a model follow from, unread.

    What only the data know must be given; raises ConfigError naming the keys.
    """
    model, data = config.model, config.data
    known = BUNDLED.get(data.path, DataFacts())
    pictures = data.kind in ("images", "detection")
    image_size = known.image_size or model.image_size
    if data.kind == "detection":
        image_size = data.image_size if not known.image_size else known.image_size
    facts = DataFacts(
        kind=data.kind,
        vocab_size=0 if pictures else _entries(model, data),
        classes=known.classes or model.classes,
        image_size=image_size,
        channels=known.channels or model.channels or (3 if pictures else 0),
        mels=data.mels if data.kind in ("speech", "transcription") else 0,
    )
    missing = []
    if pictures and not facts.image_size:
        missing.append("model.image_size")
    if data.kind in ("images", "detection", "labelled_text") and not facts.classes:
        missing.append("model.classes")
    if missing:
        raise ConfigError(
            *(
                f"{key}=0 follows the data, which a plan does not read; set {key} to theirs"
                for key in missing
            )
        )
    return facts


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
    if data.kind in ("speech", "transcription"):
        stride = model.audio_stride
        frames = min(int(data.max_seconds * FRAMES_PER_SECOND), _longest_frames(model))
        vectors = -(-frames // stride)
        read = TensorShape((samples, vectors * stride, model.mels), torch.float32)
        shapes["source_valid"] = TensorShape((samples, vectors), torch.bool)
        if data.kind == "speech":
            return shapes | {
                "frames": read,
                "targets": TensorShape((samples, vectors), torch.int64),
            }
        return shapes | {"source": read, "tokens": tokens, "targets": tokens}
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


def _entries(model: ModelConfig, data: DataConfig) -> int:
    """Return the tokens that the data have, at most."""
    if data.characters:
        return CHARACTERS
    return model.vocab_size if data.tokenizer and model.vocab_size else data.vocab_size


def _longest_frames(model: ModelConfig) -> int:
    return longest_source(model) or 1 << 40
