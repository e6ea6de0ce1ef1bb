"""Random changes of features while training: tempo, and masks of time and of mels.

F frames · M mels
"""

import numpy as np

from trainer.config.train import DataConfig
from trainer.data.sampler import hash_to_seed

RANGE = float(1 << 63)  # of hash_to_seed


class Draws:
    """Numbers in [0, 1), a function of the seed and of how many were drawn before."""

    def __init__(self, seed: int):
        self._seed, self._drawn = seed, 0

    def uniform(self) -> float:
        """Return the next number."""
        self._drawn += 1
        return hash_to_seed(self._seed, self._drawn) / RANGE

    def span(self, widest: int, length: int) -> slice:
        """Return a range of at most `widest` of `length` places."""
        width = int(self.uniform() * (min(widest, length) + 1))
        start = int(self.uniform() * (length - width + 1))
        return slice(start, start + width)


def augment_frames(
    frames_FM: np.ndarray, config: DataConfig, seed: int, least: int = 1
) -> np.ndarray:
    """Return the frames at another tempo, and with masks (SpecAugment, arXiv 1904.08779).

    What is masked is 0, the mean of standardized features. There are at least `least` frames.
    """
    draws = Draws(seed)
    factor = 1.0 + config.tempo * (2.0 * draws.uniform() - 1.0)
    frames_FM = change_tempo(frames_FM, max(least, round(len(frames_FM) / factor)))
    for _ in range(config.time_masks):
        frames_FM[draws.span(config.time_mask, len(frames_FM))] = 0.0
    for _ in range(config.mel_masks):
        frames_FM[:, draws.span(config.mel_mask, frames_FM.shape[1])] = 0.0
    return frames_FM


def change_tempo(frames_FM: np.ndarray, length: int) -> np.ndarray:
    """Return `length` frames, linearly interpolated; pitch stays."""
    place_F = np.linspace(0.0, len(frames_FM) - 1.0, length)
    low_F = place_F.astype(np.int64)
    share_F1 = (place_F - low_F)[:, None].astype(np.float32)
    high_F = np.minimum(low_F + 1, len(frames_FM) - 1)
    changed_FM: np.ndarray = frames_FM[low_F] * (1 - share_F1) + frames_FM[high_F] * share_F1
    return changed_FM
