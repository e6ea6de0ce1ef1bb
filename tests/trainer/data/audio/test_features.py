"""Log-mel features beside Whisper's extractor of transformers."""

import numpy as np
import pytest
import torch
from transformers import WhisperFeatureExtractor
from transformers.audio_utils import mel_filter_bank

from trainer.data.audio.features import log_mel


def chirp(sample_rate: int, seconds: float) -> np.ndarray:
    """A rising tone that fades, with noise, and silence behind it."""
    draw, time = np.random.default_rng(0), np.arange(int(sample_rate * seconds)) / sample_rate
    tone = np.sin(2 * np.pi * (100 + 900 * time) * time) * np.exp(-time)
    samples = 0.3 * tone + 0.01 * draw.standard_normal(len(time))
    samples[len(time) // 2 :] = 0.0
    return samples.astype(np.float32)


@pytest.mark.parametrize("mels", [80, 128])
def test_features_are_those_of_whisper(mels):
    samples_N = chirp(16_000, 2.0)
    extractor = WhisperFeatureExtractor(mels, chunk_length=2)
    theirs = extractor(samples_N, sampling_rate=16_000, return_tensors="pt")
    ours_FM = log_mel(samples_N, mels=mels)
    assert ours_FM.shape == (200, mels)
    np.testing.assert_allclose(ours_FM, theirs.input_features[0].T, rtol=0, atol=2e-5)


def test_other_rates_have_filters_up_to_half_of_theirs():
    extractor = WhisperFeatureExtractor(20, 8_000, 80, chunk_length=2, n_fft=200)
    filters = mel_filter_bank(101, 20, 0.0, 4_000.0, 8_000, norm="slaney", mel_scale="slaney")
    extractor.mel_filters = filters
    samples_N = chirp(8_000, 2.0)
    theirs = extractor(samples_N, sampling_rate=8_000, return_tensors="pt")
    ours_FM = log_mel(samples_N, sample_rate=8_000, mels=20, window=200, hop=80)
    np.testing.assert_allclose(ours_FM, theirs.input_features[0].T, rtol=0, atol=2e-5)


def test_features_are_those_of_torch_in_float64():
    samples_N = chirp(16_000, 0.7).astype(np.float64)
    shape = torch.hann_window(400, dtype=torch.float64)
    spectrum = torch.stft(torch.from_numpy(samples_N), 400, 160, window=shape, return_complex=True)
    filters = mel_filter_bank(201, 80, 0.0, 8_000.0, 16_000, norm="slaney", mel_scale="slaney")
    power = (spectrum[:, :-1].abs() ** 2).T.numpy() @ filters
    log = np.log10(np.maximum(power, 1e-10))
    expected = (np.maximum(log, log.max() - 8.0) + 4.0) / 4.0
    np.testing.assert_allclose(log_mel(samples_N), expected, rtol=0, atol=1e-11)
