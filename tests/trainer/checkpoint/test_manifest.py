"""A checkpoint's folder and what it says about itself: nothing wrong is believed, nothing run."""

import hashlib
import json
import math
import os
import pickle
import random
from pathlib import Path

import pytest

from trainer.checkpoint import manifest as module
from trainer.checkpoint.folder import steps_to_keep
from trainer.checkpoint.manifest import (
    NAME,
    Chunk,
    CorruptCheckpointError,
    FileEntry,
    Grid,
    Manifest,
    TensorEntry,
    UnsupportedFormatError,
    check_folder,
    read_manifest,
    write_manifest,
)

CONTENT = bytes(range(200))
FILE = "rank-00000.safetensors"


def written(folder, step=7, file=FILE, shape=(4, 6), eval_loss=None):
    folder.mkdir(parents=True)
    (folder / FILE).write_bytes(CONTENT)
    digest = hashlib.sha256(CONTENT).hexdigest()
    chunks = tuple(Chunk((begin, 0), (2, 6), file) for begin in (0, 2))
    manifest = Manifest(
        run="abc",
        step=step,
        layout={"ranks": 2},
        config={"seed": 0, "lr": 0.1 + 0.2},
        data="d",
        eval_loss=eval_loss,
        tensors={"model.w": TensorEntry("F32", shape, chunks)},
        files={file: FileEntry(len(CONTENT), digest)},
    )
    write_manifest(folder, manifest)
    return manifest


def test_a_manifest_comes_back(tmp_path):
    manifest = written(tmp_path / "step-00000007", eval_loss=1 / 3)
    assert check_folder(tmp_path / "step-00000007") == manifest
    assert manifest.size == 200


def sealed(folder, **changes):
    """Change a manifest as somebody would who knows the format."""
    body = json.loads((folder / NAME).read_bytes())
    body = {"sha256": "0" * 64, **{k: v for k, v in body.items() if k != "sha256"}, **changes}
    text = json.dumps(body).encode()
    digest = hashlib.sha256(text).hexdigest().encode()
    (folder / NAME).write_bytes(text.replace(b"0" * 64, digest, 1))


def refusal(folder):
    with pytest.raises(CorruptCheckpointError) as raised:
        check_folder(folder)
    return str(raised.value)


def test_any_changed_byte_of_a_manifest_is_found(tmp_path):
    written(tmp_path / "a")
    text = (tmp_path / "a" / NAME).read_bytes()
    draw = random.Random(0)
    for place in [0, 5, 20, len(text) - 1, *(draw.randrange(len(text)) for _ in range(100))]:
        changed = bytearray(text)
        changed[place] ^= 1 << draw.randrange(8)
        (tmp_path / "a" / NAME).write_bytes(changed)
        assert "garbled" in refusal(tmp_path / "a")
    for changed in (b"", text[: len(text) // 2], b"abc", draw.randbytes(len(text)), text + b"\n"):
        (tmp_path / "a" / NAME).write_bytes(changed)
        assert "garbled" in refusal(tmp_path / "a")
    (tmp_path / "a" / NAME).unlink()
    assert refusal(tmp_path / "a") == "manifest.json is missing"


@pytest.mark.parametrize("name", ["../../x", "/etc/passwd", "..", ".hidden", "a/b", "a\\b", NAME])
def test_no_path_leads_out_of_the_folder(tmp_path, name):
    written(tmp_path / "a")
    body = json.loads((tmp_path / "a" / NAME).read_bytes())
    files = {name: next(iter(body["files"].values()))}
    sealed(tmp_path / "a", files=files, tensors={})
    assert "is none that a checkpoint has" in refusal(tmp_path / "a")


def test_links_are_not_followed(tmp_path):
    written(tmp_path / "a")
    (tmp_path / "elsewhere").write_bytes(CONTENT)
    (tmp_path / "a" / FILE).unlink()
    (tmp_path / "a" / FILE).symlink_to(tmp_path / "elsewhere")
    assert "is a link" in refusal(tmp_path / "a")
    (tmp_path / "a" / NAME).rename(tmp_path / "manifest")
    (tmp_path / "a" / NAME).symlink_to(tmp_path / "manifest")
    assert "manifest.json is a link" in refusal(tmp_path / "a")


@pytest.mark.parametrize(
    "changes",
    [
        {"files": []},
        {"step": "many"},
        {"tensors": {"w": 3}},
        {"config": None},
        {"tensors": {"w": {"dtype": "F32", "shape": [4], "chunks": []}}},
        {
            "tensors": {
                "w": {
                    "dtype": "F32",
                    "shape": [2],
                    "chunks": [{"offsets": [1], "sizes": [2], "file": FILE}],
                }
            }
        },
        {
            "tensors": {
                "w": {
                    "dtype": "F32",
                    "shape": [2],
                    "chunks": [{"offsets": [0], "sizes": [2], "file": "other"}],
                }
            }
        },
    ],
)
def test_a_manifest_of_another_shape_is_refused(tmp_path, changes):
    written(tmp_path / "a")
    sealed(tmp_path / "a", **changes)
    assert "is not a manifest" in refusal(tmp_path / "a")


def test_another_format_is_named(tmp_path):
    written(tmp_path / "a")
    sealed(tmp_path / "a", format=3)
    with pytest.raises(UnsupportedFormatError, match="format version 3, this version reads 1 to 2"):
        read_manifest(tmp_path / "a")


def test_a_manifest_of_format_1_is_read(tmp_path):
    manifest = written(tmp_path / "a")
    body = json.loads((tmp_path / "a" / NAME).read_bytes())
    assert "chunks" in body["tensors"]["model.w"]  # as format 1 lists them
    sealed(tmp_path / "a", format=1)
    assert read_manifest(tmp_path / "a") == manifest


def gridded(folder, cuts, ranks):
    grid = Grid(((0, 2), (0, 3)), (4, 6), (0, 0, 0, 0))
    written(folder)
    entry = {"dtype": "F32", "shape": [4, 6], "grid": 0}
    sealed(folder, tensors={"model.w": entry}, grids=[{"cuts": cuts, "ranks": ranks}])
    return grid


def test_a_grid_comes_back_and_finds_what_a_box_needs(tmp_path):
    grid = gridded(tmp_path / "a", [[0, 2], [0, 3]], [0, 0, 0, 0])
    assert read_manifest(tmp_path / "a").tensors["model.w"] == TensorEntry("F32", (4, 6), grid)
    places = [(chunk.offsets, chunk.sizes) for chunk in grid]
    assert places == [(place, (2, 3)) for place in ((0, 0), (0, 3), (2, 0), (2, 3))]
    found = grid.overlapping((slice(1, 2), slice(2, 4)))
    assert [chunk.offsets for chunk in found] == [(0, 0), (0, 3)]
    assert list(grid.overlapping((slice(2, 2), slice(0, 6)))) == []


@pytest.mark.parametrize(
    ("cuts", "ranks"),
    [
        ([[0, 2], [0, 3]], [0, 0, 0]),
        ([[0, 2], [0]], [0, 1]),
        ([[1, 2], [0]], [0, 0]),
        ([[0, 4], [0]], [0, 0]),
        ([[0, 2]], [0, 0]),
    ],
)
def test_a_grid_that_misses_parts_is_refused(tmp_path, cuts, ranks):
    gridded(tmp_path / "a", cuts, ranks)
    assert "is not a manifest" in refusal(tmp_path / "a")


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_pickled_metadata_of_an_old_checkpoint_is_not_opened(tmp_path):
    folder = tmp_path / "step-00000007"
    folder.mkdir()
    (folder / ".metadata").write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
    (folder / "__0_0.distcp").write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
    with pytest.raises(UnsupportedFormatError, match=r"torch\.distributed\.checkpoint"):
        check_folder(folder)
    assert not (tmp_path / "ran").exists()


def test_files_are_compared_byte_by_byte(tmp_path):
    written(tmp_path / "a")
    path = tmp_path / "a" / FILE
    path.write_bytes(CONTENT[:-1])
    assert refusal(tmp_path / "a") == f"{FILE} has 199 bytes, not 200"
    path.write_bytes(CONTENT[:-1] + b"x")
    assert f"{FILE} is not what was saved" in refusal(tmp_path / "a")
    assert check_folder(tmp_path / "a", hashed=()).step == 7  # sizes alone
    path.unlink()
    assert refusal(tmp_path / "a") == f"{FILE} is missing"


def test_a_checkpoint_of_another_step_is_refused(tmp_path):
    written(tmp_path / "step-00000008", step=7)
    assert refusal(tmp_path / "step-00000008") == "manifest.json is that of step 7"


def test_what_is_written_is_on_the_disk_before_it_is_named(tmp_path, monkeypatch):
    synced = []
    fsync = os.fsync

    def note(descriptor):
        synced.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
        fsync(descriptor)

    monkeypatch.setattr(module.os, "fsync", note)
    written(tmp_path / "a")
    assert synced == [str(tmp_path / "a" / NAME), str(tmp_path / "a")]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ((0, False, 0), {10, 20, 30, 40, 50}),
        ((2, False, 0), {40, 50}),
        ((1, False, 20), {20, 40, 50}),
        ((1, True, 0), {20, 50}),
        ((9, True, 7), {10, 20, 30, 40, 50}),
    ],
)
def test_what_is_kept(options, expected):
    losses = {10: 3.0, 20: 1.0, 30: None, 40: 1.0, 50: 2.0}
    assert steps_to_keep(losses, *options) == expected


def test_what_is_not_finite_is_never_the_best():
    losses = {10: math.nan, 20: 3.0, 30: -math.inf, 40: 2.0, 50: math.nan, 60: math.inf}
    assert steps_to_keep(losses, 1, True, 0) == {40, 60}
    assert steps_to_keep({10: math.nan, 20: math.inf}, 1, True, 0) == {20}


@pytest.mark.parametrize("changes", [{"samples": -1}, {"lr": "nan"}, {"order_batch_size": [8]}])
def test_a_position_that_is_none_is_refused(tmp_path, changes):
    folder = tmp_path / "step-00000007"
    manifest = written(folder)
    assert manifest.samples is None  # as an older version's
    sealed(folder, **changes)
    assert "is not a manifest" in refusal(folder)


def test_the_best_of_none_measured():
    assert steps_to_keep({1: None, 2: None}, 1, True, 0) == {2}
