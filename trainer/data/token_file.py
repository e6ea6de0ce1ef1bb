"""Token files, read window by window: what is gone or damaged is an error with a name."""

import os
from pathlib import Path

import numpy as np

from trainer.config.train import DataError

DTYPES = ("uint16", "uint32")


class TokenFile:
    """The token ids of one prepared file; several threads may read.

    Not mapped into memory: when a mapped file shrinks, or its disk goes away, the process dies by
    signal 7 without a word.
    """

    def __init__(self, path: Path, dtype: str, tokens: int, vocab_size: int):
        """Open a file of so many tokens; raises DataError if it is another."""
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
        """Return the ids [start, stop) as int64, cut at the end.

        Raises DataError if one is damaged.
        """
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
                f"{start * size + wanted} were asked for, and it ends at "
                f"{os.fstat(self._file.fileno()).st_size}; {_AGAIN}"
            )
        ids = np.frombuffer(read, self._dtype)
        if wanted and ids.max() >= self._vocab_size:
            place = int((ids >= self._vocab_size).argmax())
            raise DataError(
                f"{self._path} is damaged: token {ids[place]} at offset {start + place} is not "
                f"below the tokenizer's vocab_size={self._vocab_size}; delete {self._path.parent}, "
                f"and {_AGAIN}"
            )
        return ids.astype(np.int64)


_AGAIN = "start the run again with the same run_dir: the data are prepared anew"
