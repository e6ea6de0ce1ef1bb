"""One picture decoded to 8-bit grey or RGB pixels, whatever its mode, or refused.

H rows · W columns · C channels of pixels
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from trainer.config import ConfigError

GREY = ("1", "L", "LA", "La", "I;16", "I;16L", "I;16B", "I;16N", "I")  # Pillow's names of modes
SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N")
CONVERTED = ("P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV")
BACKGROUND = (255, 255, 255)  # behind what is transparent


@contextmanager
def opened(path: str | Path, key: str = "data.path") -> Iterator[Image.Image]:
    """A picture file, whose pixels are not read yet; ConfigError names it where that fails."""
    try:
        with Image.open(path) as image:
            limit = Image.MAX_IMAGE_PIXELS
            if limit and image.width * image.height > limit:  # Pillow warns, and goes on
                raise ValueError(
                    f"{image.width} × {image.height} pixels are more than {limit:,}: it may be a "
                    "decompression bomb"
                )
            yield image
    except ConfigError:
        raise
    except Exception as error:  # Pillow's readers raise what they like on damaged files
        why = str(error) or type(error).__name__
        raise ConfigError(f"{key}: {path} cannot be read as an image: {why}") from error


def is_grey(image: Image.Image) -> bool:
    """Whether a picture has one channel, not counting transparency."""
    return image.mode in GREY


def is_animated(image: Image.Image) -> bool:
    """Whether a file holds several pictures, of which the first is read."""
    return getattr(image, "n_frames", 1) > 1


def size_of(image: Image.Image) -> tuple[int, int]:
    """Return (width, height) of the picture as it is looked at, by its EXIF orientation."""
    turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
    return (image.size[1], image.size[0]) if turned else image.size


def pixels_of(image: Image.Image, channels: int) -> np.ndarray:
    """Return (H, W, channels) uint8: turned by EXIF, 16 bits scaled to 8, on white.

    Raises ValueError for modes whose numbers have no stated range.
    """
    form, top, white_is_zero = image.format, *_range_of(image)
    plain = _eight_bit(ImageOps.exif_transpose(image), form, top, white_is_zero)
    if plain.has_transparency_data or plain.mode in ("La", "RGBa"):
        on = Image.new("RGBA", plain.size, (*BACKGROUND, 255))
        premultiplied = {"La": "LA", "RGBa": "RGBA"}.get(plain.mode)
        plain = plain.convert(premultiplied) if premultiplied else plain
        plain = Image.alpha_composite(on, plain.convert("RGBA"))
    pixels = np.asarray(plain.convert("L" if channels == 1 else "RGB"))
    return pixels.reshape(*pixels.shape[:2], channels)


def _range_of(image: Image.Image) -> tuple[int, bool]:
    """Return the largest number of a picture of up to 16 bits, and whether zero is white.

    Pillow gives a TIFF's numbers of 9 to 16 bits as they stand in the file.
    """
    if image.format != "TIFF":
        return 65535, False
    tags = getattr(image, "tag_v2", {})
    bits, photometric, kinds = (tags.get(tag) for tag in (258, 262, 339))
    if set(np.ravel(kinds or 1)) - {1, 4}:  # whole numbers without a sign, or nothing said
        raise ValueError(
            f"mode {image.mode} has numbers of no stated range, with a sign or fractions; save it "
            "with 8 or 16 bits a channel"
        )
    return (1 << max(np.ravel(bits or 16))) - 1, photometric == 0


def _eight_bit(image: Image.Image, form: str | None, top: int, white_is_zero: bool) -> Image.Image:
    """The picture, of a file of this format, in a mode of 8 bits a channel."""
    if image.mode in SIXTEEN_BIT or (image.mode == "I" and form in ("PNG", "PPM")):
        numbers = np.asarray(image).astype(np.int64)
        numbers = top - numbers if white_is_zero else numbers
        return Image.fromarray(((numbers * 255 + top // 2) // top).astype(np.uint8), "L")
    if image.mode in ("1", "L", "LA", "La", *CONVERTED):
        return image
    raise ValueError(
        f"mode {image.mode} has numbers of no stated range; save it with 8 or 16 bits a channel"
    )
