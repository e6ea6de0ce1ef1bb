"""Pictures of every Pillow mode, decoded to 8 bits by one rule or rejected."""

import struct
import zlib
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from trainer import data
from trainer.config.train import DataConfig, UserError
from trainer.data.pictures import is_grey, open_image, pixels_of
from trainer.tasks.image_classification import read_image

SIDE = 4
ONE_ROW = {  # mode, a colour in it, the decoded pixel
    "1": (1, 255),
    "L": (7, 7),
    "LA": ((7, 0), 255),
    "P": (0, (0, 0, 0)),
    "RGB": ((1, 2, 3), (1, 2, 3)),
    "RGBA": ((1, 2, 3, 0), (255, 255, 255)),
    "RGBa": ((0, 0, 0, 0), (255, 255, 255)),
    "RGBX": ((1, 2, 3, 4), (1, 2, 3)),
    "CMYK": ((0, 0, 0, 255), (0, 0, 0)),
    "YCbCr": ((99, 128, 128), (99, 99, 99)),
    "HSV": ((0, 0, 200), (200, 200, 200)),
    "I;16": (32896, 128),
    "I;16B": (32896, 128),
    "I;16L": (32896, 128),
    "I;16N": (32896, 128),
}


def png(depth: int, colour: int, row: bytes, clear: bytes = b"") -> bytes:
    """Return a PNG of 2 × 1 pixels with a transparent colour, which Pillow does not write."""
    header = struct.pack(">IIBBBBB", 2, 1, depth, colour, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"tRNS", clear), (b"IDAT", zlib.compress(b"\0" + row))]
    written = b"\x89PNG\r\n\x1a\n"
    for name, body in [*chunks, (b"IEND", b"")]:
        if body or name == b"IEND":
            check = struct.pack(">I", zlib.crc32(name + body))
            written += struct.pack(">I", len(body)) + name + body + check
    return written


def decoded(content: bytes, channels: int | None = None) -> np.ndarray:
    with open_image("x.png", content=BytesIO(content)) as image:
        return pixels_of(image, channels or (1 if is_grey(image) else 3))


@pytest.mark.parametrize("mode", ONE_ROW)
def test_every_mode_with_a_range_has_one_meaning(mode):
    colour, expected = ONE_ROW[mode]
    image = Image.new(mode, (SIDE, SIDE), colour)
    channels = 1 if is_grey(image) else 3
    assert pixels_of(image, channels)[0, 0].tolist() == list(np.ravel(expected))
    assert pixels_of(image, 1).shape == (SIDE, SIDE, 1)


@pytest.mark.parametrize("mode", ["I", "F", "LAB"])
def test_modes_without_a_range_are_refused(mode, tmp_path):
    Image.new(mode, (SIDE, SIDE)).save(tmp_path / "x.tif")
    with pytest.raises(UserError, match=rf"x\.tif cannot be read .*mode {mode} .*no stated range"):
        read_image(str(tmp_path / "x.tif"), SIDE, 1)


SIXTEEN = {
    "png": png(16, 0, struct.pack(">HH", 65535, 32896)),
    "pgm": b"P5 2 1 65535 " + struct.pack(">HH", 65535, 32896),
    "pgm of 12 bits": b"P5 2 1 4095 " + struct.pack(">HH", 4095, 2056),
    "pgm in letters": b"P2 2 1 1000 1000 502",
    "transparent": png(16, 0, struct.pack(">HH", 0x1234, 32896), struct.pack(">H", 0x1234)),
}


@pytest.mark.parametrize("name", SIXTEEN)
def test_16_bits_are_scaled_by_their_range(name):
    assert decoded(SIXTEEN[name])[0, :, 0].tolist() == [255, 128]


def test_a_16_bit_tiff_whose_0_is_white():
    content = BytesIO()
    Image.new("I;16", (2, 1), 65535).save(content, "TIFF", tiffinfo={262: 0})
    assert decoded(content.getvalue()).max() == 0


CLEAR = {
    "grey": (png(8, 0, bytes([7, 100]), struct.pack(">H", 7)), [255], [100]),
    "grey of 4 bits": (png(4, 0, bytes([0x5A]), struct.pack(">H", 5)), [255], [170]),
    "grey of 2 bits": (png(2, 0, bytes([0b01100000]), struct.pack(">H", 1)), [255], [170]),
    "colour": (
        png(8, 2, bytes([7, 8, 9, 1, 2, 3]), struct.pack(">HHH", 7, 8, 9)),
        [255] * 3,
        [1, 2, 3],
    ),
}


@pytest.mark.parametrize("name", CLEAR)
def test_a_transparent_colour_is_white(name):
    content, first, second = CLEAR[name]
    assert decoded(content)[0].tolist() == [first, second]


def test_a_transparent_colour_that_pillow_cannot_read_is_rejected():
    content = png(16, 2, struct.pack(">6H", 5, 0, 0, 9, 0, 0), struct.pack(">HHH", 5, 0, 0))
    with pytest.raises(UserError, match="16 bits per channel with a transparent colour"):
        decoded(content)


def test_half_transparent_pixels_are_blended_with_white():
    assert pixels_of(Image.new("RGBA", (1, 1), (0, 100, 255, 51)), 3).ravel().tolist() == [
        204,
        224,
        255,
    ]
    palette = Image.new("P", (1, 1), 0)
    palette.putpalette([10, 20, 30])
    assert pixels_of(palette, 3).ravel().tolist() == [10, 20, 30]
    palette.info["transparency"] = 0
    assert pixels_of(palette, 3).ravel().tolist() == [255, 255, 255]


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF", "16 bits"])
@pytest.mark.parametrize("orientation, corner", [(1, (0, 0)), (3, (-1, -1)), (6, (0, -1))])
def test_pictures_are_turned_by_their_exif(form, orientation, corner):
    numbers = np.zeros((8, 16), np.uint8)
    numbers[:4, :8] = 200
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(numbers if form != "16 bits" else numbers.astype(np.uint16) * 257)
    content = BytesIO()
    image.save(content, "PNG" if form == "16 bits" else form, exif=exif.tobytes())
    pixels = decoded(content.getvalue(), 1)[..., 0]
    assert pixels.shape == ((16, 8) if orientation == 6 else (8, 16))
    assert abs(int(pixels[corner]) - 200) < 9 and (pixels > 100).mean() == 0.25


def test_invalid_pictures_are_named_in_one_line(tmp_path, monkeypatch):
    whole = BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    Image.fromarray(noise).save(whole, "PNG")
    for content in (b"", b"no", whole.getvalue()[:60], b"P5 0 0 255 ", b"GIF89a" + bytes(7)):
        (tmp_path / "x.png").write_bytes(content)
        with pytest.raises(UserError, match=r"^prompt: .*x\.png cannot be read as an image"):
            read_image(str(tmp_path / "x.png"), SIDE, 3)
    for content in (b"", b"no", b"\x93NUMPY\x01\x00\x08\x00{{{{{{{{"):
        (tmp_path / "x.npy").write_bytes(content)
        with pytest.raises(UserError, match=r"x\.npy cannot be read as an image"):
            read_image(str(tmp_path / "x.npy"), SIDE, 3)
    with (tmp_path / "x.npy").open("wb") as file:
        np.savez(file, x=noise)  # an archive with a wrong suffix
    with pytest.raises(UserError, match=r"x\.npy is <U1"):
        read_image(str(tmp_path / "x.npy"), SIDE, 3)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", SIDE * SIDE - 1)  # Pillow only warns
    with (
        pytest.warns(Image.DecompressionBombWarning),
        pytest.raises(UserError, match="4 × 4 pixels are more than 15"),
    ):
        decoded(whole.getvalue())


def gallery(tmp_path, count: int = 24) -> DataConfig:
    rng = np.random.default_rng(0)
    for number in range(count):
        path = tmp_path / "own" / f"class{number % 2}" / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    return DataConfig(kind="images", path=str(tmp_path / "own"), cache=str(tmp_path / "cache"))


def test_damaged_files_are_reported_together_or_left_out(tmp_path):
    config = gallery(tmp_path)
    for number in (3, 10, 11, 20, 23):
        path = tmp_path / "own" / f"class{number % 2}" / f"{number:02d}.png"
        path.write_bytes(path.read_bytes()[:60])
    message = r"5 images cannot be read: class0/10\.png .* and 2 more; .*data\.on_bad_file=skip"
    with pytest.raises(UserError, match=message):
        data.prepare_data(config)
    config.on_bad_file = "skip"
    facts = data.prepare_data(config)
    assert sum(facts.sample_counts.values()) == 24 - 5 and len(facts.left_out) == 5
    assert all(why.startswith("damaged: ") for why in facts.left_out.values())
    assert str(tmp_path) not in "".join(facts.left_out.values())  # equal reasons are counted
    assert data.prepare_data(config) == facts
    config.on_bad_file = "stop"
    with pytest.raises(UserError, match=message):  # a record of left-out pictures is not reused
        data.prepare_data(config)
    config.on_bad_file = "skip"
    for split in facts.sample_counts:
        dataset = data.open_split(config, split)
        assert all(dataset.sample(i, None) for i in range(len(dataset)))


def test_a_picture_is_the_same_in_training_and_inference(tmp_path):
    config = gallery(tmp_path)
    picture = Image.new("RGBA", (SIDE, SIDE), (9, 8, 7, 128))
    picture.save(tmp_path / "own/class0/odd.png")
    data.prepare_data(config)
    train = [data.open_split(config, split) for split in ("train", "valid", "test")]
    stored = [s.sample(i, None)["images"] for s in train for i in range(len(s))]
    used = read_image(str(tmp_path / "own/class0/odd.png"), SIDE, 3)
    assert any((used == image).all() for image in stored)


def test_the_first_frame_of_an_animated_file_is_read_and_noted(tmp_path):
    config = gallery(tmp_path)
    first, second = (Image.new("RGB", (SIDE, SIDE), colour) for colour in ("red", "blue"))
    first.save(tmp_path / "own/class0/film.gif", save_all=True, append_images=[second])
    facts = data.prepare_data(config)
    assert any("1 animated" in note for note in facts.notes)
    pixels = read_image(str(tmp_path / "own/class0/film.gif"), SIDE, 3)
    assert pixels[:, 0, 0].tolist() == [255, 0, 0]


def test_a_png_whose_check_sums_are_wrong_is_damaged(tmp_path):
    """Pillow decodes such a file to other pixels without an error."""
    pixels = np.random.default_rng(0).integers(0, 255, (32, 32), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    content = bytearray((tmp_path / "x.png").read_bytes())
    content[-22:-16] = bytes(6)  # the end of the pixels and their checksum
    with Image.open(BytesIO(content)) as image:
        assert image.size == (32, 32)
    with pytest.raises(UserError, match=r"x\.png cannot be read as an image: broken PNG"):
        decoded(bytes(content))
