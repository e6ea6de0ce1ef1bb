"""Features of all recordings of a data set: computed once, in parallel, and read row by row.

F frames · M mels
"""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from trainer.config.train import DataConfig, DataError
from trainer.data.audio.decode import load_with_notes
from trainer.data.audio.transcripts import Utterance, read_utterances
from trainer.data.cache import Record, progress_bar
from trainer.data.tokenized import Parts

STORED = np.dtype(np.float16)
LARGEST = 6e4  # that STORED holds
WORTH = 256  # recordings for which processes are started
TOGETHER = 16  # recordings that a process computes before it answers


@dataclass(frozen=True)
class Loaded:
    """The features of one utterance; without any, why they cannot be read."""

    utterance: Utterance
    frames_FM: np.ndarray | None
    notes: tuple[str, ...] = ()
    problem: str = ""


def load_utterance(config: DataConfig, utterance: Utterance) -> Loaded:
    """Return the features of an utterance, or its problem."""
    try:
        if not utterance.transcript:
            raise DataError(f"data.path: {utterance.place} has an empty transcript")
        where = f"data.path, {utterance.place}"
        frames_FM, notes = load_with_notes(utterance.path, config, where)
        if np.abs(frames_FM).max() > LARGEST:
            raise DataError(
                f"{where}: {utterance.path} has features up to {np.abs(frames_FM).max():.3g}; they "
                f"must be within ±{LARGEST:.3g}, scale them"
            )
    except DataError as error:
        return Loaded(utterance, None, problem=str(error))
    return Loaded(utterance, frames_FM.astype(STORED), tuple(notes))


@contextmanager
def parallel_map(count: int) -> Iterator[Callable[..., Iterable[Loaded]]]:
    """Yield a `map` in order over processes, if there are enough recordings to start them."""
    workers = min(os.cpu_count() or 1, count // WORTH + 1)
    if workers == 1:
        yield map
        return
    # Not forked: this process may have threads.
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"))
    try:
        yield partial(pool.map, chunksize=TOGETHER)
    finally:
        pool.shutdown(cancel_futures=True)


def write_frames(config: DataConfig, parts: Parts, folder: Path, progress: bool) -> Record:
    """Write the features and transcripts of each split to a folder; return their record.

    Raises DataError at the first recording that cannot be read; with data.on_bad_file=skip they are
    left out.
    """
    found = {
        split: [utterance for part in of_split for utterance in read_utterances(part)]
        for split, of_split in parts.items()
    }
    record: Record = {"splits": {}, "left_out": {}, "notes": {}}
    count = sum(map(len, found.values()))
    with parallel_map(count) as load, progress_bar("Reading audio", count, progress) as advance:
        for split, utterances in found.items():
            loaded = _counted(load(partial(load_utterance, config), utterances), advance)
            record["splits"][split] = _write_split(config, loaded, folder, split, record)
    return record


def _counted(loaded: Iterable[Loaded], advance: Callable[[int], None]) -> Iterator[Loaded]:
    for item in loaded:
        advance(1)
        yield item


def _write_split(
    config: DataConfig, loaded: Iterator[Loaded], folder: Path, split: str, record: Record
) -> Record:
    """Write the features, the lines `path<TAB>transcript`, and where each row starts."""
    starts, notes = [(0, 0)], Counter[str](record["notes"])
    total_M, squares_M = np.zeros(config.mels), np.zeros(config.mels)
    with (
        (folder / f"{split}.frames").open("wb") as frames,
        (folder / f"{split}.tsv").open("wb") as lines,
    ):
        for item in loaded:
            if item.frames_FM is None:
                if config.on_bad_file == "stop":
                    raise DataError(f"{item.problem}; or set data.on_bad_file=skip to leave it out")
                reason = item.problem.partition(": ")[2]
                record["left_out"][f"{item.utterance.path}, {item.utterance.place}"] = reason
                continue
            frames.write(item.frames_FM.tobytes())
            line = f"{item.utterance.path}\t{item.utterance.transcript}\n".encode(
                "utf-8", "surrogateescape"
            )
            lines.write(line)
            starts.append((starts[-1][0] + len(item.frames_FM), starts[-1][1] + len(line)))
            wide_FM = item.frames_FM.astype(np.float64)
            total_M, squares_M = total_M + wide_FM.sum(0), squares_M + (wide_FM**2).sum(0)
            notes.update(item.notes)
    if len(starts) == 1:
        raise DataError(f"data.path={config.path}: the {split} split holds no utterances")
    record["notes"] = dict(notes)
    np.save(folder / f"{split}.npy", np.array(starts, np.int64))
    mean_M = total_M / starts[-1][0]
    std_M = np.sqrt(np.maximum(squares_M / starts[-1][0] - mean_M**2, 0.0))
    std_M = np.where(std_M > 0, std_M, 1.0)  # a constant value has deviation 0
    return {"frames": starts[-1][0], "mean": mean_M.tolist(), "std": std_M.tolist()}


class FrameFile:
    """The features of a prepared split, read row by row; thread-safe, see `TokenFile`."""

    def __init__(self, path: Path, frames: int, mels: int):
        self._path, self._mels = path, mels
        try:
            self._file = path.open("rb", buffering=0)
            found = os.fstat(self._file.fileno()).st_size
        except OSError as error:
            raise DataError(f"{path} cannot be read ({error.strerror}); {_AGAIN}") from error
        if found != (expected := frames * mels * STORED.itemsize):
            raise DataError(f"{path} has {found} bytes, not {expected}; {_AGAIN}")

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return the frames [start, stop) (F, M) float32; raises DataError if they are gone."""
        size = self._mels * STORED.itemsize
        read = os.pread(self._file.fileno(), (stop - start) * size, start * size)
        if len(read) < (stop - start) * size:
            raise DataError(f"{self._path} has shrunk while it was read; {_AGAIN}")
        return np.frombuffer(read, STORED).reshape(-1, self._mels).astype(np.float32)


_AGAIN = "start the run again with the same run_dir: the data are prepared again"
