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
    turned = ImageOps.exif_transpose(image)
    plain = _eight_bit(turned, image.format or "")
    if plain.has_transparency_data or plain.mode in ("La", "RGBa"):
        on = Image.new("RGBA", plain.size, (*BACKGROUND, 255))
        premultiplied = {"La": "LA", "RGBa": "RGBA"}.get(plain.mode)
        plain = plain.convert(premultiplied) if premultiplied else plain
        plain = Image.alpha_composite(on, plain.convert("RGBA"))
    pixels = np.asarray(plain.convert("L" if channels == 1 else "RGB"))
    return pixels.reshape(*pixels.shape[:2], channels)


def _eight_bit(image: Image.Image, format: str) -> Image.Image:
    """The picture in a mode of 8 bits a channel; `format`: of its file, where it is from one."""
    sixteen = image.mode in SIXTEEN_BIT or (image.mode == "I" and format in ("PNG", "PPM"))
    if sixteen:
        numbers = np.asarray(image).astype(np.int64)
        return Image.fromarray(((numbers * 255 + 32767) // 65535).astype(np.uint8), "L")
    if image.mode in ("1", "L", "LA", "La", *CONVERTED):
        return image
    raise ValueError(
        f"mode {image.mode} has numbers of no stated range; save it with 8 or 16 bits a channel"
    )
