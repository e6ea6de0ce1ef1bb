"""Log-mel features of audio, as Whisper computes them (arXiv 2212.04356); free of torch."""

# N samples, F frames, W window, M mels.

import functools

import numpy as np

RANGE = 8.0  # powers of ten below the loudest value at which features are cut off
FLOOR = 1e-10  # smallest power
AT_ONCE = 1 << 12  # frames transformed together


def log_mel(
    samples_N: np.ndarray,
    sample_rate: int = 16_000,
    mels: int = 80,
    window: int = 400,
    hop: int = 160,
) -> np.ndarray:
    """Return the features (N // hop, mels) of mono samples in ±1, as Whisper's extractor does.

    `window` and `hop` are in samples; there must be more than half a window of them. Features are
    relative to the loudest value of these samples: Whisper computes them of 30 s at a time. They
    are computed in float64, and returned in the dtype of the samples.
    """
    padded_N = np.pad(samples_N.astype(np.float64), window // 2, mode="reflect")
    windows_FW = np.lib.stride_tricks.sliding_window_view(padded_N, window)[::hop]
    windows_FW = windows_FW[: len(samples_N) // hop]
    shape_W, filters_WM = np.hanning(window + 1)[:-1], mel_filters(sample_rate, mels, window)
    power_FM = [
        np.abs(np.fft.rfft(windows_FW[first : first + AT_ONCE] * shape_W)) ** 2 @ filters_WM
        for first in range(0, len(windows_FW), AT_ONCE)
    ]
    log_FM = np.log10(np.maximum(np.concatenate(power_FM), FLOOR))
    found_FM: np.ndarray = (np.maximum(log_FM, log_FM.max() - RANGE) + 4.0) / 4.0
    return found_FM.astype(samples_N.dtype)


@functools.lru_cache
def mel_filters(sample_rate: int, mels: int, window: int) -> np.ndarray:
    """Return triangular filters of equal area up to half the rate, (window // 2 + 1, mels).

    Their centres are even on Slaney's scale (Auditory Toolbox, 1998): linear below 1 kHz,
    logarithmic above.
    """
    frequency_W = np.linspace(0.0, sample_rate / 2, window // 2 + 1)[:, None]
    edges_M = _to_hertz(np.linspace(0.0, _to_mel(sample_rate / 2), mels + 2))
    rising_WM = (frequency_W - edges_M[:-2]) / (edges_M[1:-1] - edges_M[:-2])
    falling_WM = (edges_M[2:] - frequency_W) / (edges_M[2:] - edges_M[1:-1])
    area_M = (edges_M[2:] - edges_M[:-2]) / 2
    found_WM: np.ndarray = np.maximum(0.0, np.minimum(rising_WM, falling_WM)) / area_M
    return found_WM


# Slaney's scale: 15 mels up to 1 kHz, then 27 for each factor of 6.4.
def _to_mel(hertz: float) -> float:
    return 3 * hertz / 200 if hertz < 1000 else 15 + 27 * np.log(hertz / 1000) / np.log(6.4)


def _to_hertz(mel: np.ndarray) -> np.ndarray:
    return np.where(mel < 15, 200 * mel / 3, 1000 * 6.4 ** ((mel - 15) / 27))
