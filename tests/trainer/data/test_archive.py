"""Archives of images in every layout and dtype give the same pixels, or an error."""

import zipfile

import numpy as np
import pytest

from trainer.config.train import DataConfig, UserError
from trainer.data.archive import read_archive

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 6, 6, 3), dtype=np.uint8)
PIXELS.reshape(-1)[:2] = 0, 255
LABELS = np.arange(12) % 3


def read(tmp_path, **arrays):
    np.savez(tmp_path / "own.npz", **{"x_train": PIXELS, "y_train": LABELS, **arrays})
    return read_archive(DataConfig(kind="images", path="own.npz"), tmp_path / "own.npz")


SAME = {
    "uint16": PIXELS.astype(np.uint16) * 257,
    "uint16 of 8 bits": PIXELS.astype(np.uint16),
    "shares": (PIXELS / 255).astype(np.float32),
    "half shares": (PIXELS / 255).astype(np.float16),
    "floats of 8 bits": PIXELS.astype(np.float64),
    "int64": PIXELS.astype(np.int64),
    "channels first": PIXELS.transpose(0, 3, 1, 2),
    "big endian": PIXELS.astype(">i4"),
    "with alpha": np.concatenate([PIXELS, np.full((12, 6, 6, 1), 255, np.uint8)], -1),
}


@pytest.mark.parametrize("name", SAME)
def test_pixels_do_not_depend_on_dtype_and_layout(tmp_path, name):
    found = read(tmp_path, x_train=SAME[name]).tables["train"].pixels
    assert (found == PIXELS).all() and found.dtype == np.uint8


def test_bool_grey_and_alpha(tmp_path):
    grey = read(tmp_path, x_train=PIXELS[..., 0] > 99).tables["train"].pixels
    assert (grey[..., 0] == np.where(PIXELS[..., 0] > 99, 255, 0)).all()
    clear = np.concatenate([PIXELS, np.zeros((12, 6, 6, 1), np.uint8)], -1)
    assert (read(tmp_path, x_train=clear).tables["train"].pixels == 255).all()


def test_a_dark_split_has_the_range_of_train(tmp_path):
    train = PIXELS.astype(np.uint16) * 257
    tables = read(tmp_path, x_train=train, x_test=train // 300, y_test=LABELS).tables
    assert tables["test"].pixels.max() <= 1


LABELLED = {
    "one column": LABELS[:, None],
    "floats": LABELS.astype(np.float32),
    "words": np.array(["ant", "bee", "cat"])[LABELS],
    "bytes": np.array([b"ant", b"bee", b"cat"])[LABELS],
    "uint8": LABELS.astype(np.uint8),
}


@pytest.mark.parametrize("name", LABELLED)
def test_labels_do_not_depend_on_dtype_and_layout(tmp_path, name):
    table = read(tmp_path, y_train=LABELLED[name]).tables["train"]
    assert (table.labels == LABELS).all() and len(table.class_names) == 3
    assert table.class_names in (("0", "1", "2"), ("ant", "bee", "cat"))


def test_names_of_arrays(tmp_path):
    np.savez(
        tmp_path / "own.npz",
        Train_Images=PIXELS,
        train_labels=LABELS,
        X_val=PIXELS,
        Y_val=LABELS,
        x_train_mean=np.zeros(3),
        ids=LABELS,
        classes=np.array(["ä", "b", "c"]).astype("U"),
    )
    found = read_archive(DataConfig(path="own.npz"), tmp_path / "own.npz")
    assert list(found.tables) == ["train", "valid"] and set(found.left_out) == {
        "x_train_mean",
        "ids",
    }
    assert found.tables["train"].class_names == ("ä", "b", "c")
    named = read(tmp_path, classes=np.array(["ä", "b", "c"], "U").astype(object).astype("U"))
    encoded = read(tmp_path, classes=np.char.encode(["ä", "b", "c"], "utf-8"))
    assert named.tables["train"].class_names == encoded.tables["train"].class_names


HOLED = np.where(LABELS == 2, 10**4, LABELS)
REFUSED = [
    ({"x_train": PIXELS.astype(np.float32) - 1}, r"float32 from -1 to 254; pixels must be"),
    ({"x_train": PIXELS.astype(np.int64) - 1}, r"int64 from -1 to 254"),
    ({"x_train": PIXELS.astype(np.int64) * 2}, r"int64 from 0 to 510"),
    ({"x_train": PIXELS.astype(np.uint16) * 16}, r"uint16 from 0 to 4080; .*its whole range"),
    ({"x_train": PIXELS + 0.5}, r"float64 from 0\.5 to 255\.5"),
    ({"x_train": np.where(PIXELS == 7, np.nan, PIXELS / 255)}, r"float64 from nan to nan"),
    ({"x_train": np.where(PIXELS == 7, np.inf, PIXELS / 255)}, r"to inf"),
    ({"x_train": PIXELS.astype(complex)}, r"complex128 of shape"),
    ({"x_train": PIXELS.astype(object)}, r"not an \.npz archive of numbers"),
    ({"x_train": PIXELS[..., :2]}, r"shape \(12, 6, 6, 2\); it must be"),
    ({"x_train": PIXELS.reshape(12, -1)}, r"shape \(12, 108\); it must be"),
    ({"x_train": PIXELS[:0], "y_train": LABELS[:0]}, r"shape \(0, 6, 6, 3\)"),
    ({"x_train": PIXELS[:, :0]}, r"shape \(12, 0, 6, 3\)"),
    ({"y_train": LABELS[:5]}, r"y_train has shape \(5,\); there must be one label"),
    ({"y_train": np.eye(3)[LABELS]}, r"y_train is float64 of shape \(12, 3\); .*one whole number"),
    ({"y_train": LABELS - 1}, r"y_train holds -1 to 1; labels must be"),
    ({"y_train": LABELS + 0.5}, r"y_train is float64"),
    ({"y_train": np.where(LABELS == 1, np.nan, LABELS)}, r"y_train is float64"),
    ({"y_train": HOLED}, r"labels up to 10000 for 12 images; .*renumber them"),
    ({"classes": np.array(["a", "b"])}, r"y_train holds 0 to 2; labels must be .*from 0 to 1"),
    ({"classes": np.array(["a", "b", "a"])}, r"names a class twice"),
    (
        {"y_train": LABELLED["words"], "x_test": PIXELS, "y_test": LABELS},
        r"labels of train are words, those of test numbers",
    ),
    ({"X_train": PIXELS}, r"x_train and X_train, which are both of the train split"),
    ({"x_test": PIXELS / 255, "y_test": LABELS}, r"x_test is float64 from 0 to 1; .*same in all"),
]


@pytest.mark.parametrize("arrays, message", REFUSED)
def test_invalid_archives_are_rejected(tmp_path, arrays, message):
    with pytest.raises(UserError, match=message):
        read(tmp_path, **arrays)


@pytest.mark.parametrize("place", [0.1, 0.4, 0.7, 0.95])
def test_damaged_archives_are_named(tmp_path, place):
    path = tmp_path / "own.npz"
    np.savez_compressed(path, x_train=PIXELS // 9, y_train=LABELS)
    content = bytearray(path.read_bytes())
    at = int(len(content) * place)
    path.write_bytes(
        content[:at] + bytes(b ^ 0x5A for b in content[at : at + 40]) + content[at + 40 :]
    )
    with pytest.raises(UserError, match=r"own\.npz"):
        read_archive(DataConfig(path="own.npz"), path)
    path.write_bytes(content[:at])
    with pytest.raises(UserError, match=r"own\.npz is not an \.npz archive"):
        read_archive(DataConfig(path="own.npz"), path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x_train.npy", b"no array")
    with pytest.raises(UserError, match=r"own\.npz"):
        read_archive(DataConfig(path="own.npz"), path)
