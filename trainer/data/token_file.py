"""Token files, read window by window; a missing or damaged one raises DataError."""

import os
from pathlib import Path

import numpy as np

from trainer.config.train import DataError

DTYPES = ("uint16", "uint32")


class TokenFile:
    """The token ids of one prepared file; `read` is thread-safe.

    The file is not mapped into memory: if a mapped file shrinks or its disk disappears, SIGBUS
    ends the process without a message.
    """

    def __init__(self, path: Path, dtype: str, tokens: int, vocab_size: int):
        """Open a file of `tokens` ids; raises DataError if its dtype or size is another."""
        if dtype not in DTYPES:
            raise DataError(f"{path} holds {dtype}, but token ids are {' or '.join(DTYPES)}")
        self._path, self._dtype = path, np.dtype(dtype)
        self._tokens, self._vocab_size = tokens, vocab_size
        try:
            self._file = path.open("rb", buffering=0)
            found = os.fstat(self._file.fileno()).st_size
        except OSError as error:
            raise DataError(f"{path} cannot be read ({error.strerror}); {_AGAIN}") from error
        if found != tokens * self._dtype.itemsize:
            raise DataError(
                f"{path} has {found} bytes, but {tokens} tokens of {dtype} are "
                f"{tokens * self._dtype.itemsize}; {_AGAIN}"
            )

    def __len__(self) -> int:
        return self._tokens

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return the ids [start, stop) as int64, cut at the end; raises DataError if damaged."""
        size = self._dtype.itemsize
        stop = min(stop, self._tokens)
        wanted = max(0, stop - start) * size
        try:
            read = os.pread(self._file.fileno(), wanted, start * size)
        except OSError as error:
            raise DataError(f"{self._path} cannot be read ({error.strerror})") from error
        if len(read) < wanted:
            raise DataError(
                f"{self._path} has shrunk while it was read: bytes {start * size} to "
                f"{start * size + wanted} were requested, and it ends at "
                f"{os.fstat(self._file.fileno()).st_size}; {_AGAIN}"
            )
        ids = np.frombuffer(read, self._dtype)
        if wanted and ids.max() >= self._vocab_size:
            first = int((ids >= self._vocab_size).argmax())
            raise DataError(
                f"{self._path} is damaged: token {ids[first]} at offset {start + first} is not "
                f"below the tokenizer's vocab_size={self._vocab_size}; delete {self._path.parent}, "
                f"and {_AGAIN}"
            )
        return ids.astype(np.int64)


_AGAIN = "start the run again with the same run_dir: the data are prepared again"
