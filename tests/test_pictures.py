"""Pictures of every mode are the same numbers in training and in use; damaged ones are told."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from trainer import data
from trainer.config import ConfigError, DataConfig
from trainer.data.pictures import is_grey, opened, pixels_of
from trainer.generate import read_image

GREY = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
COLOUR = np.stack([GREY, GREY[::-1], GREY.T], -1)


def read(path, channels=3) -> np.ndarray:
    with opened(path) as image:
        return pixels_of(image, channels)


def saved(tmp_path, image: Image.Image, name="a.png", **options):
    image.save(tmp_path / name, **options)
    return tmp_path / name


def test_sixteen_bits_are_scaled_by_their_range(tmp_path):
    wide = (GREY.astype(np.uint16) * 257)[:, :]
    for name in ("a.png", "a.tif", "a.pgm"):
        path = saved(tmp_path, Image.fromarray(wide), name)
        assert (read(path, 1)[..., 0] == GREY).all(), name
        with opened(path) as image:
            assert is_grey(image)
    ends = np.array([[0, 127, 128, 129, 32767, 65407, 65535, 65535]] * 8, np.uint16)
    found = read(saved(tmp_path, Image.fromarray(ends)), 1)[0, :, 0]
    assert found.tolist() == np.rint(ends[0] / 257).astype(int).tolist()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "RGB"])
def test_what_is_transparent_is_white(tmp_path, mode):
    """An icon: black strokes, and black where nothing is."""
    options = {}
    if mode in ("RGBA", "LA"):
        image = Image.new(mode, (8, 8))
        image.paste(Image.new(mode, (2, 8), (0, 0, 0, 255) if mode == "RGBA" else (0, 255)), (0, 0))
    else:  # tRNS: one colour stands for nothing
        nothing = {"P": 5, "L": 5, "RGB": (5, 5, 5)}[mode]
        image = Image.new(mode, (8, 8), nothing)
        image.paste(Image.new(mode, (2, 8)), (0, 0))
        options["transparency"] = nothing
        if mode == "P":
            image.putpalette([0] * 768)
    found = read(saved(tmp_path, image, **options))
    assert (found[:, :2] == 0).all() and (found[:, 2:] == 255).all()


def test_half_transparent_is_in_between(tmp_path):
    image = Image.fromarray(np.dstack([COLOUR, np.full((8, 8), 128, np.uint8)]), "RGBA")
    expected = COLOUR * (128 / 255) + 255 * (127 / 255)
    assert np.abs(read(saved(tmp_path, image)) - expected).max() <= 1


@pytest.mark.parametrize("number", range(1, 9))
@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.webp", "a.jpg"])
def test_pictures_are_turned_as_exif_says(tmp_path, name, number):
    undo = [None, "FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_90",
            "TRANSVERSE", "ROTATE_270"][number - 1]  # fmt: skip
    image = Image.fromarray(np.kron(COLOUR[:4], np.ones((8, 8, 1), np.uint8)))
    upright = np.asarray(image)
    stored = image.transpose(Image.Transpose[undo]) if undo else image
    tags = stored.getexif()
    tags[0x0112] = number
    options = {"quality": 100, "subsampling": 0} if name == "a.jpg" else {}
    options |= {"lossless": True} if name == "a.webp" else {}
    found = read(saved(tmp_path, stored, name, exif=tags.tobytes(), **options))
    assert found.shape == upright.shape
    assert np.abs(found.astype(int) - upright).mean() < 3


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV"])
def test_modes_with_a_meaning_are_converted(mode):
    plain = Image.fromarray(COLOUR)
    image = Image.frombytes("RGBX", (8, 8), np.dstack([COLOUR, GREY]).tobytes()) \
        if mode == "RGBX" else plain.convert(mode)  # fmt: skip
    assert (pixels_of(image, 3) == np.asarray(image.convert("RGB"))).all()


@pytest.mark.parametrize("mode", ["F", "I"])
def test_numbers_without_a_range_are_refused(tmp_path, mode):
    path = saved(tmp_path, Image.new(mode, (8, 8), 70_000), "a.tif")
    with pytest.raises(ConfigError, match=rf"a\.tif cannot be read as an image: mode {mode}"):
        read(path)


def test_bombs_and_damage_are_one_line(tmp_path, monkeypatch):
    path = saved(tmp_path, Image.fromarray(COLOUR))
    whole = path.read_bytes()
    for content in (b"", b"GIF89a", whole[:40], whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=r"a\.png cannot be read as an image: \S"):
            read(path)
    path.write_bytes(whole)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40)
    with pytest.raises(ConfigError, match=r"decompression bomb"):
        read(path)


def test_use_reads_pictures_as_training_does(tmp_path):
    image = Image.fromarray(np.dstack([COLOUR, GREY]), "RGBA")
    tags = image.getexif()
    tags[0x0112] = 6
    path = saved(tmp_path, image, exif=tags.tobytes())
    assert (read_image(str(path), 8, 3).transpose(1, 2, 0) == read(path)).all()


# ---- kind 17: every file is looked at before the run begins


@pytest.fixture
def pictures(tmp_path) -> DataConfig:
    for split, count in (("train", 70), ("valid", 3), ("test", 70)):
        for name in ("ant", "bee"):
            (tmp_path / "d" / split / name).mkdir(parents=True)
            for i in range(count):
                saved(tmp_path / "d" / split / name, Image.fromarray(COLOUR + i), f"{i:03}.png")
    return DataConfig(kind="images", path=str(tmp_path / "d"), cache=str(tmp_path / "cache"))


def cut(config: DataConfig, *names: str) -> None:
    for name in names:
        path = Path(config.path) / name
        path.write_bytes(path.read_bytes()[:-30])


@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_one_cut_picture_is_found_before_the_run(pictures, split):
    cut(pictures, f"{split}/bee/002.png")
    with pytest.raises(ConfigError, match=rf"1 images cannot be read: {split}/bee/002\.png.*skip"):
        data.prepare(pictures)


def test_several_cut_pictures_are_counted(pictures):
    cut(pictures, *(f"test/bee/{i:03}.png" for i in range(60, 70)))
    with pytest.raises(ConfigError, match=r"10 images cannot be read: .*060\.png.*and 7 more"):
        data.prepare(pictures)


def test_cut_pictures_are_left_out_where_that_is_asked_for(pictures):
    cut(pictures, "test/bee/069.png", "train/ant/000.png")
    pictures.on_bad_file = "skip"
    facts = data.prepare(pictures)
    assert facts.samples == {"train": 139, "valid": 6, "test": 139}
    assert facts.left_out.keys() == {"test/bee/069.png", "train/ant/000.png"}
    test = data.open_split(pictures, "test")
    assert len([test.sample(i, None) for i in range(len(test))]) == 139
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
