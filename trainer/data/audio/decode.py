"""Audio files, decoded and mixed down to one channel at one rate, and files of features.

N samples of a recording · F frames · M mels
"""

import math
import re
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import numpy as np
import soundfile

from trainer.config.train import DataConfig, DataError
from trainer.data.audio.features import log_mel

ARRAYS = (".npz", ".npy")  # of features, computed elsewhere
FRAMES_PER_SECOND = 100
FEATURES = "features"  # the array of an .npz that has several
COMPLETE = 0.9  # of the length that a file states, which is an estimate for some mp3
READ = "wav, flac, ogg, opus or mp3"
# What libsndfile notes of a file that ends too early. A size of 2 GiB or more is that of a stream.
SIZE = re.compile(r"^(?:data|SSND) : (\d+) \(should be (\d+)\)", re.MULTILINE)
UNKNOWN_SIZE = 0x7FFF0000
NO_END = ("Junk after the last page", "lacks an end-of-stream bit", "without an End-Of-Stream flag")


@dataclass(frozen=True)
class Recording:
    """The samples of an audio file as they are read, and what the file has."""

    samples_N: np.ndarray  # float32, at the rate asked for
    rate: int  # of the file
    channels: int
    ends: bool = True  # whether the file has the mark of its end, where its format has one


def read_audio(path: Path, rate: int, key: str = "data.path") -> Recording:
    """Decode a file at `rate`, its channels mixed down; raises DataError, prefixed by `key`."""
    if not path.is_file():
        raise DataError(f"{key}: {path} does not exist")
    try:
        with soundfile.SoundFile(path) as file:
            expected, found, notes = file.frames, file.samplerate, file.extra_info
            samples_NC = file.read(dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, RuntimeError, ValueError, OSError) as error:
        why = " ".join(str(error).split())
        raise DataError(
            f"{key}: {path} cannot be decoded as audio ({why}); it must be a {READ} file"
        ) from error
    if len(samples_NC) == 0:
        raise DataError(f"{key}: {path} holds no samples: its length is zero")
    if len(samples_NC) < COMPLETE * expected:
        raise DataError(
            f"{key}: {path} is damaged: it ends after {len(samples_NC):,} of {expected:,} samples"
        )
    if (size := SIZE.search(notes)) and int(size[2]) < int(size[1]) < UNKNOWN_SIZE:
        raise DataError(
            f"{key}: {path} is cut off: it holds {int(size[2]):,} of {int(size[1]):,} bytes of "
            "samples"
        )
    if not np.isfinite(samples_NC).all():
        raise DataError(f"{key}: {path} holds samples that are no finite numbers")
    samples_N = _resample(samples_NC.mean(axis=1), found, rate)
    return Recording(samples_N, found, samples_NC.shape[1], not any(n in notes for n in NO_END))


def _resample(samples_N: np.ndarray, rate: int, to: int) -> np.ndarray:
    """Return the samples at another rate, filtered against aliases."""
    if rate == to:
        return samples_N
    # Imported by name because it takes a second to load.
    resample_poly = import_module("scipy.signal").resample_poly
    common = math.gcd(rate, to)
    return np.asarray(resample_poly(samples_N, to // common, rate // common), np.float32)


def audio_features(samples_N: np.ndarray, rate: int, mels: int) -> np.ndarray:
    """Return the log-mel features (F, M) of samples at `rate`: windows of 25 ms every 10 ms."""
    window, hop = rate // 40, rate // 100
    if len(samples_N) <= window:  # reflected at both ends by half of a window
        samples_N = np.pad(samples_N, (0, window + 1 - len(samples_N)))
    return log_mel(samples_N, rate, mels, window, hop)


def window_features(samples_N: np.ndarray, window: int, config: DataConfig) -> np.ndarray:
    """Return the features (F, M) of a recording as they are with silence up to `window` samples.

    They are those of Whisper's extractor, up to the last one that hears the recording and as many
    more as a vector is made of.
    """
    rate, analysis = config.sample_rate, config.sample_rate // 40
    heard = len(samples_N) + analysis // 2  # half of the analysis' window reads on
    frames = -(-heard * FRAMES_PER_SECOND // rate)
    frames = -(-frames // config.audio_stride) * config.audio_stride
    # What is further behind than that is not heard.
    behind = 2 * analysis + config.audio_stride * rate // FRAMES_PER_SECOND
    silence = max(0, min(behind, window - len(samples_N)))
    return audio_features(np.pad(samples_N, (0, silence)), rate, config.mels)[:frames]


def read_features(path: Path, mels: int, key: str = "data.path") -> np.ndarray:
    """Return the features (F, M) of an .npz or .npy file; raises DataError, prefixed by `key`."""
    if not path.is_file():
        raise DataError(f"{key}: {path} does not exist")
    try:
        loaded = np.load(path, allow_pickle=False)
        arrays = {FEATURES: loaded} if isinstance(loaded, np.ndarray) else dict(loaded.items())
    except Exception as error:  # zip, zlib and numpy raise many types on damaged files
        why = " ".join(str(error).split())[:200]
        raise DataError(f"{key}: {path} cannot be read as an array ({why})") from error
    if FEATURES not in arrays and len(arrays) != 1:
        raise DataError(
            f"{key}: {path} holds {', '.join(arrays) or 'no array'}; it must hold one array, or "
            f"one named {FEATURES}"
        )
    found_FM = arrays.get(FEATURES, next(iter(arrays.values())))
    if found_FM.ndim != 2 or found_FM.dtype.kind not in "fiu" or len(found_FM) == 0:
        raise DataError(
            f"{key}: {path} is {found_FM.dtype} of shape {found_FM.shape}; it must be numbers of "
            "shape (frames, mels), one frame at least"
        )
    if found_FM.shape[1] != mels:
        raise DataError(
            f"{key}: {path} has {found_FM.shape[1]} values a frame, but data.mels={mels}; set "
            f"data.mels={found_FM.shape[1]}"
        )
    if not np.isfinite(found_FM).all():
        raise DataError(f"{key}: {path} holds features that are no finite numbers")
    return np.asarray(found_FM, np.float32)


def load_frames(path: Path, config: DataConfig, key: str = "data.path") -> np.ndarray:
    """Return the features (F, M) of a recording, or of a file of features."""
    return load_with_notes(path, config, key)[0]


def load_with_notes(
    path: Path, config: DataConfig, key: str = "data.path"
) -> tuple[np.ndarray, list[str]]:
    """Return `load_frames`, and what was done to the recording besides."""
    if path.suffix.lower() in ARRAYS:
        return read_features(path, config.mels, key), []
    recording, notes = read_audio(path, config.sample_rate, key), []
    if recording.rate != config.sample_rate:
        notes.append(f"of {recording.rate:,} Hz, resampled to {config.sample_rate:,} Hz")
    if recording.channels > 1:
        notes.append(f"of {recording.channels} channels, mixed down to one")
    if not recording.ends:
        notes.append("without the mark of an Ogg file's end, read as far as they go: cut off?")
    if config.standardize:
        return audio_features(recording.samples_N, config.sample_rate, config.mels), notes
    window = int(config.max_seconds * config.sample_rate)
    return window_features(recording.samples_N, window, config), notes
