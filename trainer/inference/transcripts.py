"""Transcripts by an encoder-decoder of audio, and of long recordings by windows."""

# N samples, F frames, M mels, B utterances, T vectors.

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from parallel.parallel_model import ParallelModel
from trainer.config.train import DataConfig
from trainer.data.audio.decode import window_features
from trainer.data.audio.transcription import prefix_ids
from trainer.data.tokenizer import Tokenizer
from trainer.inference.beam_search import translate_tokens
from trainer.inference.trained_run import unwrap_transformer

OVERLAP_SECONDS = 5.0  # of the windows that a long recording is read in


@dataclass(frozen=True)
class Decoder:
    """How transcripts are decoded: what they begin with, and what they may not say."""

    tokenizer: Tokenizer
    prefix: Sequence[int]
    beams: int = 1
    length_penalty: float = 1.0

    @classmethod
    def of(
        cls, data: DataConfig, tokenizer: Tokenizer, beams: int, length_penalty: float = 1.0
    ) -> "Decoder":
        """Return that of a run's data section."""
        return cls(tokenizer, prefix_ids(data, tokenizer), beams, length_penalty)

    def decode(
        self,
        worker: ParallelModel,
        frames_BFM: Tensor,
        valid_BT: Tensor | None = None,
        max_tokens: int = 1 << 20,
    ) -> list[list[int]]:
        """Return the tokens of what is said in utterances; all data ranks must call it."""
        value = self.tokenizer.files.generation_value
        return translate_tokens(
            worker,
            frames_BFM,
            valid_BT,
            max_tokens=min(max_tokens, unwrap_transformer(worker).config.max_positions),
            bos_id=self.tokenizer.eot_id,
            end_ids=self.tokenizer.end_ids,
            prefix_ids=self.prefix,
            beams=self.beams,
            length_penalty=self.length_penalty,
            banned=(value("suppress_tokens") or (), value("begin_suppress_tokens") or ()),
        )


def transcribe_recording(
    worker: ParallelModel, decoder: Decoder, samples_N: np.ndarray, data: DataConfig, limit: int
) -> str:
    """Return what is said in a recording of any length, read in windows that overlap.

    At most `limit` tokens of a window.
    """
    window, overlap = (
        int(seconds * data.sample_rate) for seconds in (data.max_seconds, OVERLAP_SECONDS)
    )
    step = window - min(overlap, window // 2)
    starts = range(0, max(1, len(samples_N) - window + step), step)
    said: list[int] = []
    for start in starts:
        frames_FM = window_features(samples_N[start : start + window], window, data)
        (found,) = decoder.decode(worker, torch.from_numpy(frames_FM)[None], max_tokens=limit)
        said = join_overlap(said, found)
    return decoder.tokenizer.decode(said).strip()


def join_overlap(left: list[int], right: list[int]) -> list[int]:
    """Return two sequences joined in the middle of what the end of one and the other share.

    Of all lengths of the overlap it is the one with the largest share of equal tokens, two at
    least; without any the sequences follow each other.
    """
    best, cut = 0.0, (len(left), 0)
    for shared in range(2, min(len(left), len(right)) + 1):
        pairs = zip(left[-shared:], right[:shared], strict=True)
        equal = sum(a == b for a, b in pairs)
        if equal >= 2 and equal / shared + shared / 1e6 > best:
            best = equal / shared + shared / 1e6
            cut = len(left) - shared + shared // 2, shared // 2
    return left[: cut[0]] + right[cut[1] :]
