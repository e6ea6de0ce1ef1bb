"""Dataset of precomputed top-k teacher logits for every sample of a train split.

N valid targets · K classes per target · B samples of a micro-batch · S tokens of a sample
"""

import json
import os
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from trainer.config.loss import IGNORED
from trainer.config.train import ConfigError
from trainer.data.dataset import Dataset, Sample

NAME = "answers.json"
FORMAT = 1
DTYPES = {"F16": np.float16, "U16": np.uint16, "I32": np.int32, "I64": np.int64}


@dataclass(frozen=True)
class LogitFacts:
    """Identity and shape of precomputed teacher logits."""

    kind: str  # as data.kind
    seq_len: int  # as data.seq_len
    data: str  # fingerprint of the train split
    path: str  # as data.path
    classes: int  # number of classes of the teacher
    k: int  # number of recorded classes per target, the most probable ones
    samples: int
    files: tuple[tuple[str, int, int], ...]  # name, bytes and index of the first sample


def is_logit_folder(folder: str | Path) -> bool:
    """Return whether a folder holds precomputed teacher logits instead of a run."""
    return (Path(folder) / NAME).is_file()


def write_facts(folder: Path, facts: LogitFacts) -> None:
    """Write the metadata file of a folder of teacher logits; raises OSError."""
    (folder / NAME).write_text(json.dumps({"format": FORMAT, **asdict(facts)}), encoding="utf-8")


class RecordedLogits:
    """Precomputed teacher logits in a folder, read sample by sample; thread-safe."""

    def __init__(self, folder: str | Path, key: str = "compress.teacher"):
        """Open the folder that `key` names; raise ConfigError if a file is missing or truncated."""
        self.folder, self._named = Path(folder), f"{key}={folder}"
        try:
            values = json.loads((self.folder / NAME).read_bytes())
            if values.pop("format") != FORMAT:
                raise ConfigError(f"{self._named} has an unsupported format version; {_AGAIN}")
            self.facts = LogitFacts(**values)
            self._firsts = [int(first) for _, _, first in self.facts.files]
            for name, size, _ in self.facts.files:
                if (self.folder / name).stat().st_size != size:
                    raise ValueError(f"{name} does not have {size} bytes")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise self._damaged_error(error) from error
        self._header = lru_cache(maxsize=None)(self._read_header)

    def content_digest(self) -> str:
        """Return a digest that changes whenever the recorded logits change."""
        return blake2b((self.folder / NAME).read_bytes(), digest_size=16).hexdigest()

    def sample_logits(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return a sample's logits minus the largest (N,K), float16, and their classes (N,K).

        Raises ConfigError if they are damaged.
        """
        number = bisect_right(self._firsts, index) - 1
        row = index - self._firsts[number]
        try:
            begin, end = (int(i) for i in self._read_rows(number, "starts", row, row + 2))
            logits_NK, classes_NK = (
                self._read_rows(number, name, begin, end) for name in ("logits", "classes")
            )
            if not np.isfinite(logits_NK).all() or (classes_NK >= self.facts.classes).any():
                raise ValueError(f"sample {index} has a non-finite logit or an invalid class")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise self._damaged_error(error) from error
        return logits_NK, classes_NK.astype(np.int32)

    def _read_rows(self, number: int, name: str, begin: int, end: int) -> np.ndarray:
        """Read rows of a tensor with pread, so that a truncated file raises instead of SIGBUS."""
        start, header = self._header(number)
        about = header[name]
        dtype, row = np.dtype(DTYPES[about["dtype"]]), tuple(about["shape"][1:])
        size = dtype.itemsize * int(np.prod(row))
        data = self._read_bytes(
            number, start + about["data_offsets"][0] + begin * size, (end - begin) * size
        )
        return np.frombuffer(data, dtype).reshape(end - begin, *row)

    def _read_header(self, number: int) -> tuple[int, dict[str, Any]]:
        """Return the offset of the tensor data in a file, and its safetensors header."""
        length = int.from_bytes(self._read_bytes(number, 0, 8), "little")
        return 8 + length, json.loads(self._read_bytes(number, 8, length))

    def _read_bytes(self, number: int, begin: int, count: int) -> bytes:
        path = self.folder / self.facts.files[number][0]
        with path.open("rb", buffering=0) as file:
            data = os.pread(file.fileno(), count, begin)
        if len(data) != count:
            raise ValueError(f"{path.name} ends before byte {begin + count}")
        return data

    def _damaged_error(self, error: Exception) -> ConfigError:
        return ConfigError(f"{self._named} is damaged ({error}); {_AGAIN}")


class DistillationDataset(Dataset):
    """A train split with recorded teacher logits; every epoch has the samples of evaluation.

    A micro-batch also has `answer_logits` (B,S,K) float16 and `answer_classes` (B,S,K) int32, or
    (B,K) for images; both are zero where targets are ignored.
    """

    def __init__(self, dataset: Dataset, answers: RecordedLogits):
        self._dataset, self._answers = dataset, answers
        self.characters, self.targets = dataset.characters, dataset.targets

    def __len__(self) -> int:
        return len(self._dataset)

    def sample_lengths(self) -> np.ndarray | None:
        """Return the size of each sample (len,), or None if all are equal."""
        return self._dataset.sample_lengths()

    def sample(self, index: int, seed: int | None) -> Sample:
        """Return the sample as in evaluation, with its index."""
        return self._dataset.sample(index, None) | {"index": np.array(index)}

    def collate(self, samples: Sequence[Sample]) -> Sample:
        """Return a batch of the split, with the teacher's logits."""
        plain = [{k: v for k, v in sample.items() if k != "index"} for sample in samples]
        batch = self._dataset.collate(plain)
        targets, k = batch["targets"], self._answers.facts.k
        logits = np.zeros((*targets.shape, k), np.float16)
        classes = np.zeros((*targets.shape, k), np.int32)
        for row, sample in enumerate(samples):
            valid = np.asarray(targets[row] != IGNORED)
            logits_NK, classes_NK = self._answers.sample_logits(int(sample["index"]))
            if len(logits_NK) != valid.sum():
                raise ConfigError(
                    f"compress.teacher={self._answers.folder} has logits of {len(logits_NK)} "
                    f"targets for sample {sample['index']}, which has {valid.sum()}; {_AGAIN}"
                )
            logits[row][valid], classes[row][valid] = logits_NK, classes_NK
        return batch | {"answer_logits": logits, "answer_classes": classes}


_AGAIN = "precompute the teacher logits again: launch/teach.py"
