"""Token files that shrink, vanish or hold invalid ids raise errors, never a signal."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny

from trainer import data
from trainer.config.train import UserError
from trainer.data.token_file import TokenFile

IDS = np.arange(5000, dtype=np.uint16) % 300


@pytest.fixture
def path(tmp_path: Path) -> Path:
    IDS.tofile(tmp_path / "train.bin")
    return tmp_path / "train.bin"


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_windows_are_those_of_the_file(path: Path, dtype: str) -> None:
    IDS.astype(dtype).tofile(path)
    file = TokenFile(path, dtype, len(IDS), 300)
    assert len(file) == len(IDS)
    for start, stop in ((0, 17), (4990, 5010), (5000, 5017), (7, 7)):
        window = file.read(start, stop)
        assert window.dtype == np.int64
        assert (window == IDS[start:stop]).all()


def test_a_file_of_another_size_or_kind_is_refused(path: Path) -> None:
    with pytest.raises(UserError, match=r"train\.bin has 10000 bytes, but 5001 .* are 10002;"):
        TokenFile(path, "uint16", 5001, 300)
    with pytest.raises(UserError, match=r"train\.bin has 10000 bytes, but 5000 .* are 20000;"):
        TokenFile(path, "uint32", 5000, 300)
    with pytest.raises(UserError, match="holds int16, but token ids are uint16 or uint32"):
        TokenFile(path, "int16", 5000, 300)
    path.unlink()
    with pytest.raises(UserError, match=r"train\.bin cannot be read \(No such file"):
        TokenFile(path, "uint16", 5000, 300)


@pytest.mark.parametrize("bad", [300, 50257])
def test_a_token_beyond_the_vocabulary_is_named_with_its_place(path: Path, bad: int) -> None:
    with path.open("r+b") as file:
        file.seek(2 * 812)
        file.write(np.uint16(bad).tobytes())
    tokens = TokenFile(path, "uint16", len(IDS), 300)
    assert (tokens.read(0, 812) == IDS[:812]).all()
    with pytest.raises(UserError, match=rf"token {bad} at offset 812 is not below .*=300; del"):
        tokens.read(800, 817)


# A mapped file would end the process by SIGBUS, so it runs in a subprocess.
SHRINKS = """
import os, sys
from pathlib import Path
from trainer.config.train import UserError
from trainer.data.token_file import TokenFile
path = Path(sys.argv[1])
tokens = TokenFile(path, "uint16", 5000, 300)
tokens.read(4000, 4100)
os.truncate(path, 100)
try:
    tokens.read(4000, 4100)
except UserError as error:
    sys.exit(str(error))
"""


def test_a_file_that_shrinks_while_it_is_read(path: Path) -> None:
    command = [sys.executable, "-c", SHRINKS, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.returncode
    assert "has shrunk while it was read: bytes 8000 to 8200 were requested" in done.stderr
    assert "it ends at 100;" in done.stderr


def test_a_file_that_vanishes_is_read_on(path: Path) -> None:
    tokens = TokenFile(path, "uint16", len(IDS), 300)
    path.unlink()
    assert (tokens.read(10, 20) == IDS[10:20]).all()


@pytest.mark.parametrize("make", [tiny.text_data, tiny.pairs_data])
def test_a_split_that_shrinks_is_an_error_in_any_kind_of_data(tmp_path: Path, make) -> None:
    config = make(tmp_path)
    data.prepare_data(config)
    split = data.open_split(config, "train")
    last = len(split) - 1
    split.sample(last, None)
    for file in Path(config.cache).glob("*/train*.bin"):
        with file.open("r+b") as opened:
            opened.truncate(2)
    with pytest.raises(UserError, match="has shrunk while it was read"):
        split.sample(last, None)
    with pytest.raises(UserError, match=r"\.bin is damaged: it has 2 bytes, not \d+; .* again"):
        data.open_split(config, "train")
