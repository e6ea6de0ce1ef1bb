"""Decode pictures of any mode with a defined range to 8-bit grey or RGB pixels.

H rows · W columns · C channels of pixels
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from trainer.config.train import DataError, UserError

GREY = ("1", "L", "LA", "La", "I;16", "I;16L", "I;16B", "I;16N", "I")  # Pillow's mode names
SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N")
CONVERTED = ("P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV")
ORIENTATION = 0x0112  # EXIF tag
PHOTOMETRIC = 262  # TIFF tag: 0 = zero is white
SAMPLE_FORMAT = 339  # TIFF tag: 1 = unsigned integers
BACKGROUND = (255, 255, 255)  # composited under transparent pixels


@contextmanager
def open_image(
    path: str | Path, key: str = "data.path", content: IO[bytes] | None = None
) -> Iterator[Image.Image]:
    """Open a picture without reading its pixels; raises DataError naming it if that fails.

    `content` has its bytes if it is not a file; `path` is then its name in the message.
    """
    source = path if content is None else content
    try:
        with Image.open(source) as image:
            if image.format == "PNG":
                image.verify()  # checksums, which decoding does not verify
        if content is not None:
            content.seek(0)
        with Image.open(source) as image:
            most = Image.MAX_IMAGE_PIXELS or 0
            # Pillow only warns up to twice the limit, and threads share the warning filters.
            if 0 < most < image.size[0] * image.size[1]:
                raise ValueError(f"{_format_size(image.size)} pixels are more than {most:,}")
            yield image
    except UserError:
        raise
    except Exception as error:  # Pillow's readers raise many types on damaged files
        why = str(error) or type(error).__name__
        if isinstance(error, UnidentifiedImageError):
            why = "cannot identify its format"
        raise DataError(f"{key}: {path} cannot be read as an image: {why}") from error


def is_grey(image: Image.Image) -> bool:
    """Return whether a picture has one channel besides transparency."""
    return image.mode in GREY


def is_animated(image: Image.Image) -> bool:
    """Return whether a file holds several frames, of which only the first is read."""
    return getattr(image, "n_frames", 1) > 1


def is_turned(image: Image.Image) -> bool:
    """Return whether EXIF says that a picture is to be turned or mirrored when it is shown."""
    return image.getexif().get(ORIENTATION, 1) in range(2, 9)


def pixels_of(image: Image.Image, channels: int) -> np.ndarray:
    """Return (H, W, channels) uint8: rotated by EXIF, 16 bits scaled to 8, on white.

    Raises ValueError for modes whose values have no defined range.
    """
    plain = ImageOps.exif_transpose(_eight_bit(image))
    if plain.has_transparency_data or plain.mode in ("La", "RGBa"):
        white = Image.new("RGBA", plain.size, (*BACKGROUND, 255))
        premultiplied = {"La": "LA", "RGBa": "RGBA"}.get(plain.mode)
        plain = plain.convert(premultiplied) if premultiplied else plain
        plain = Image.alpha_composite(white, plain.convert("RGBA"))
    plain = plain if plain.mode in ("1", "L") else plain.convert("RGB")
    pixels = np.asarray(plain.convert("L" if channels == 1 else "RGB"))
    return pixels.reshape(*pixels.shape[:2], channels)


def _format_size(size: tuple[int, int]) -> str:
    return f"{size[0]} × {size[1]}"


def _stored_as(image: Image.Image) -> str:
    """Return Pillow's raw mode of a file, e.g. L;4; empty once its pixels are read."""
    tiles = getattr(image, "tile", None)
    arguments = tiles[0].args if tiles else ""
    first = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return first if isinstance(first, str) else ""


def _eight_bit(image: Image.Image) -> Image.Image:
    """Return the picture in a mode of 8 bits per channel, with EXIF and transparent colour."""
    stored, clear = _stored_as(image), image.info.get("transparency")
    if image.mode in SIXTEEN_BIT or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return _scale_to_8_bits(image, 4095 if stored == "I;12" else 65535, clear)
    kinds = getattr(image, "tag_v2", {}).get(SAMPLE_FORMAT, 1)
    if image.mode not in ("1", "L", "LA", "La", *CONVERTED) or set(np.ravel(kinds)) - {1, 4}:
        raise ValueError(
            f"mode {image.mode} has values of no stated range; save it with 8 or 16 bits per "
            "channel"
        )
    if stored == "RGB;16B" and clear is not None:
        raise ValueError("16 bits per channel with a transparent colour; save it as RGBA")
    if stored in ("L;2", "L;4") and isinstance(clear, int):
        image.load()  # Pillow scales the pixels, but not the transparent colour
        image.info["transparency"] = clear * {"L;2": 85, "L;4": 17}[stored]
    return image


def _scale_to_8_bits(image: Image.Image, top: int, clear: object) -> Image.Image:
    """Scale values from 0 to `top` to 8 bits; those equal to `clear` become white."""
    orientation, tags = Image.Exif(), getattr(image, "tag_v2", {})
    orientation[ORIENTATION] = image.getexif().get(ORIENTATION, 1)
    numbers = np.asarray(image).astype(np.int64)
    if tags.get(PHOTOMETRIC) == 0:
        numbers = top - numbers
    eight = ((numbers * 255 + top // 2) // top).astype(np.uint8)
    if isinstance(clear, int):
        eight[numbers == clear] = 255
    scaled = Image.fromarray(eight, "L")
    scaled.info["exif"] = orientation.tobytes()
    return scaled
