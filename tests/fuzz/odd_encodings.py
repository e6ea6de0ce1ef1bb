"""The same 8 × 8 picture in every mode and format that Pillow writes, and in some by hand."""

from collections.abc import Callable
from dataclasses import dataclass, field
from io import BytesIO
from random import Random
from typing import Any

import numpy as np
from PIL import Image
from raw_pictures import SIZE, png, tiff


@dataclass(frozen=True)
class Encoded:
    """A picture file, and what reading it gives."""

    content: bytes
    suffix: str
    pixels: np.ndarray  # (H, W) or (H, W, 3)
    tolerance: int = 0
    refused: bool = False  # it may be refused, or left out if that is said


@dataclass(frozen=True)
class Way:
    """One way to save a picture; `draw` says of what kind it is."""

    draw: str  # grey | colour | two (black and white)
    save: Callable[[np.ndarray, Random], Encoded]
    extra: dict[str, Any] = field(default_factory=dict)


def drawn(kind: str, number: int, rng: Random) -> np.ndarray:
    """Return a smooth picture that no other number has: (H, W) or (H, W, 3) uint8."""
    rows, columns = np.mgrid[0:SIZE, 0:SIZE]
    grey = 10 + 18 * (number % 12) + 2 * rows + rng.choice((1, 2, 3)) * columns
    if kind == "two":
        bits = number * 2654435761 % (1 << 16)
        return np.where((rows * 5 + columns * 3 + bits) % 7 < 1 + number % 5, 255, 0).astype("u1")
    if kind == "grey":
        return grey.astype(np.uint8)
    return np.stack([grey, 245 - grey, 40 + grey // 2], 2).astype(np.uint8)


def _bytes(image: Image.Image, form: str, **options: Any) -> bytes:
    file = BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def _saved(
    form: str,
    mode: str,
    suffix: str = "",
    tolerance: int = 0,
    refused: bool = False,
    **options: Any,
) -> Callable[[np.ndarray, Random], Encoded]:
    def save(pixels: np.ndarray, rng: Random) -> Encoded:
        image = Image.fromarray(pixels)
        if mode == "I;16":
            image = Image.fromarray(pixels.astype(np.uint16) * 257)
        elif mode in ("I", "F"):
            image = Image.fromarray(pixels.astype({"I": np.int32, "F": np.float32}[mode]))
        elif mode == "P" and pixels.ndim == 2:
            image = _shuffled(pixels, rng)
        elif mode == "LAB":
            image = Image.merge("LAB", (image.convert("L"),) * 3)
        else:
            image = image.convert(mode)
        content = _bytes(image, form, **options)
        return Encoded(content, suffix or f".{form.lower()}", pixels, tolerance, refused)

    return save


def _shuffled(pixels: np.ndarray, rng: Random) -> Image.Image:
    """A palette in another order than its colours."""
    order = np.array(rng.sample(range(256), 256))
    image = Image.fromarray(np.argsort(order).astype(np.uint8)[pixels], "P")
    image.putpalette(np.repeat(order, 3).astype(np.uint8).tobytes())
    return image


def _turned(form: str, suffix: str, tolerance: int = 0, **options: Any) -> Any:
    """Stored turned or mirrored, with the orientation that puts it right."""

    def save(pixels: np.ndarray, rng: Random) -> Encoded:
        orientation = rng.randint(1, 8)
        # What undoes each of the transpositions that Pillow applies for an orientation.
        undo = {
            2: Image.Transpose.FLIP_LEFT_RIGHT,
            3: Image.Transpose.ROTATE_180,
            4: Image.Transpose.FLIP_TOP_BOTTOM,
            5: Image.Transpose.TRANSPOSE,
            6: Image.Transpose.ROTATE_90,
            7: Image.Transpose.TRANSVERSE,
            8: Image.Transpose.ROTATE_270,
        }.get(orientation)
        image = Image.fromarray(pixels)
        image = image if undo is None else image.transpose(undo)
        exif = Image.Exif()
        exif[0x0112] = orientation
        if form == "TIFF":
            content = _bytes(image, form, tiffinfo={0x0112: orientation}, **options)
        else:
            content = _bytes(image, form, exif=exif.tobytes(), **options)
        return Encoded(content, suffix, pixels, tolerance)

    return save


def _transparent(form: str, suffix: str, mode: str, **options: Any) -> Any:
    """Partly transparent, which is seen on white."""

    def save(pixels: np.ndarray, rng: Random) -> Encoded:
        alpha = np.full((SIZE, SIZE), 255)
        alpha[: rng.randint(1, 7)] = 0
        if mode != "P":
            alpha[:, rng.randint(0, 7)] = rng.choice((0, 64, 128, 254))
        seen = pixels if pixels.ndim == 3 else pixels[..., None]
        share = alpha[..., None] / 255
        on_white = np.rint(seen * share + 255 * (1 - share)).astype(np.uint8)
        clear = np.where(alpha[..., None] == 0, rng.choice((0, 77)), seen).astype(np.uint8)
        image = Image.fromarray(np.concatenate([clear, alpha[..., None].astype(np.uint8)], 2))
        if mode == "P" and form != "GIF":
            image = image.convert("RGBA").quantize(256, Image.Quantize.FASTOCTREE)
            on_white = np.asarray(image.convert("RGBA")).astype(int)
            on_white = np.where(on_white[..., 3:] == 0, 255, on_white[..., :3]).astype(np.uint8)
        content = _bytes(image, form, **options)
        return Encoded(content, suffix, np.squeeze(on_white), tolerance=12 if form == "GIF" else 1)

    return save


def _keyed(pixels: np.ndarray, rng: Random) -> Encoded:
    """One colour of a PNG without alpha is declared transparent (tRNS)."""
    colour = pixels[rng.randrange(SIZE), rng.randrange(SIZE)]
    key = int(colour) if pixels.ndim == 2 else tuple(map(int, colour))
    same = (pixels == colour) if pixels.ndim == 2 else (pixels == colour).all(2, keepdims=True)
    content = _bytes(Image.fromarray(pixels), "PNG", transparency=key)
    return Encoded(content, ".png", np.where(same, 255, pixels).astype(np.uint8))


def _animated(form: str, suffix: str, tolerance: int = 0, **options: Any) -> Any:
    def save(pixels: np.ndarray, rng: Random) -> Encoded:
        first, other = Image.fromarray(pixels), Image.fromarray(255 - pixels)
        content = _bytes(first, form, save_all=True, append_images=[other], **options)
        return Encoded(content, suffix, pixels, tolerance)

    return save


def _deep_png(depth: int, colour: int) -> Any:
    """PNG of other bit depths: 1, 2, 4 (grey) and 16 (grey, RGB, with alpha)."""

    def save(pixels: np.ndarray, rng: Random) -> Encoded:
        pixels = pixels if pixels.ndim == 3 else pixels[..., None]
        top = (1 << depth) - 1
        samples = np.rint(pixels.astype(float) * top / 255).astype(int)
        if colour in (4, 6):
            samples = np.concatenate([samples, np.full((SIZE, SIZE, 1), top)], 2)
        seen = np.rint(samples[..., : pixels.shape[2]] * 255 / top).astype(np.uint8)
        return Encoded(png(samples, depth, colour), ".png", np.squeeze(seen), tolerance=1)

    return save


def _pnm(magic: str, top: int) -> Any:
    """PGM and PPM, as text (P2, P3) or bytes (P5, P6), of any largest number."""

    def save(pixels: np.ndarray, rng: Random) -> Encoded:
        samples = np.rint(pixels.astype(float) * top / 255).astype(int)
        head = f"{magic}\n# a comment\n{SIZE} {SIZE}\n{top}\n".encode()
        if magic in ("P2", "P3"):
            body = " ".join(map(str, samples.ravel())).encode() + b"\n"
        else:
            body = samples.astype(">u2" if top > 255 else "u1").tobytes()
        seen = np.rint(samples * 255 / top).astype(np.uint8)
        suffix = ".pgm" if pixels.ndim == 2 else ".ppm"
        return Encoded(head + body, suffix, seen, tolerance=1)

    return save


def _deep_tiff(bits: int, code: str, photometric: int = 1, kind: int = 1) -> Any:
    """TIFF of 1 to 32 bits, of either byte order, white or black first, unsigned, signed, float."""

    def save(pixels: np.ndarray, rng: Random) -> Encoded:
        top = (1 << min(bits, 16)) - 1 if kind == 1 else 1
        samples = pixels.astype(float) * top / 255
        samples = samples if kind == 3 else np.rint(samples)
        stored = top - samples if photometric == 0 else samples
        seen = np.rint(samples * 255 / top).astype(np.uint8)
        content = tiff(stored, bits, photometric, code, kind)
        return Encoded(content, ".tif", seen, 1, refused=bits > 16 or kind != 1)

    return save


JPEG = {"quality": 100, "subsampling": 0}
WAYS: dict[str, list[Way]] = {
    "plain": [Way("grey", _saved("PNG", "L")), Way("colour", _saved("PNG", "RGB"))],
    "PNG": [
        *(Way("grey", _saved("PNG", m)) for m in ("L", "LA", "RGB", "RGBA", "P", "I;16")),
        *(Way("colour", _saved("PNG", m)) for m in ("RGB", "RGBA")),
        Way("two", _saved("PNG", "1")),
        Way("two", _saved("PNG", "P", bits=8)),
        Way("grey", _saved("PNG", "L", optimize=True)),
        Way("grey", _keyed),
        Way("colour", _keyed),
        Way("two", _keyed),
    ],
    "PNG of any depth": [
        *(Way("two", _deep_png(d, 0)) for d in (1, 2, 4, 8, 16)),
        *(Way("grey", _deep_png(d, 0)) for d in (2, 4, 8, 16)),
        *(Way("grey", _deep_png(d, c)) for d in (8, 16) for c in (4,)),
        *(Way("colour", _deep_png(d, c)) for d in (8, 16) for c in (2, 6)),
    ],
    "alpha": [
        *(Way(d, _transparent("PNG", ".png", "")) for d in ("grey", "colour", "two")),
        Way("colour", _transparent("PNG", ".png", "P")),
        *(Way(d, _transparent("TIFF", ".tiff", "")) for d in ("grey", "colour")),
        Way("colour", _transparent("WEBP", ".webp", "", lossless=True, exact=True)),
        Way("colour", _transparent("GIF", ".gif", "P")),
    ],
    "turned": [
        *(Way(d, _turned("JPEG", s, 8, **JPEG)) for d in ("grey", "colour") for s in (".jpg",)),
        *(Way(d, _turned("PNG", ".png")) for d in ("grey", "colour")),
        *(Way(d, _turned("TIFF", ".tif")) for d in ("grey", "colour")),
        Way("colour", _turned("WEBP", ".webp", 0, lossless=True)),
    ],
    "JPEG": [
        *(
            Way(d, _saved("JPEG", m, s, 8, **JPEG))
            for d, m, s in (
                ("grey", "L", ".jpg"),
                ("grey", "L", ".jpeg"),
                ("grey", "RGB", ".jpg"),
                ("colour", "RGB", ".jpg"),
                ("colour", "CMYK", ".jpg"),
                ("colour", "YCbCr", ".jpeg"),
            )
        ),
        *(
            Way(d, _saved("JPEG", m, ".jpg", 8, progressive=True, **JPEG))
            for d, m in (("grey", "L"), ("colour", "RGB"))
        ),
        Way("colour", _saved("JPEG", "RGB", ".jpg", 30, quality=90)),
    ],
    "TIFF": [
        *(Way("grey", _saved("TIFF", m, ".tif")) for m in ("L", "LA", "RGB", "RGBA", "P", "I;16")),
        *(Way("colour", _saved("TIFF", m, ".tiff")) for m in ("RGB", "RGBA", "CMYK")),
        Way("colour", _saved("TIFF", "YCbCr", ".tif", 8)),
        Way("two", _saved("TIFF", "1", ".tif")),
        *(Way("grey", _saved("TIFF", m, ".tif", refused=True)) for m in ("I", "F", "LAB")),
        *(
            Way(d, _saved("TIFF", m, ".tif", compression=c))
            for d, m in (("grey", "L"), ("colour", "RGB"), ("grey", "I;16"))
            for c in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "tiff_deflate")
        ),
        Way("two", _saved("TIFF", "1", ".tif", compression="group4")),
        Way("colour", _saved("TIFF", "RGB", ".tif", 12, compression="jpeg", quality=100)),
    ],
    "TIFF of any depth": [
        Way("grey", _deep_tiff(8, "<u1")),
        Way("grey", _deep_tiff(8, "<u1", 0)),
        Way("grey", _deep_tiff(16, "<u2")),
        Way("grey", _deep_tiff(16, ">u2")),
        Way("grey", _deep_tiff(16, "<u2", 0)),
        Way("grey", _deep_tiff(12, "packed")),
        Way("grey", _deep_tiff(4, "packed")),
        Way("two", _deep_tiff(1, "packed")),
        Way("two", _deep_tiff(1, "packed", 0)),
        Way("grey", _deep_tiff(4, "packed", 0)),
        Way("grey", _deep_tiff(32, "<u4")),
        Way("grey", _deep_tiff(32, "<f4", kind=3)),
        Way("grey", _deep_tiff(16, "<i2", kind=2)),
        Way("grey", _deep_tiff(32, ">f4", kind=3)),
        Way("grey", _deep_tiff(8, "<i1", kind=2)),
        Way("grey", _deep_tiff(64, "<f8", kind=3)),
    ],
    "PNM": [
        *(Way("grey", _pnm("P5", top)) for top in (255, 65535, 100, 15, 4095, 1023)),
        *(Way("grey", _pnm("P2", top)) for top in (255, 100, 65535, 1000)),
        *(Way("colour", _pnm("P6", top)) for top in (255, 65535, 100)),
        *(Way("colour", _pnm("P3", top)) for top in (255, 63)),
        Way("two", _saved("PPM", "1", ".pgm")),
        Way("grey", _saved("PPM", "I;16", ".pgm")),
        Way("colour", _saved("PPM", "RGBA", ".ppm", refused=True)),
        Way("grey", _saved("PPM", "F", ".ppm", refused=True)),
    ],
    "BMP": [
        *(Way("grey", _saved("BMP", m)) for m in ("L", "P", "RGB", "RGBA")),
        Way("colour", _saved("BMP", "RGB")),
        Way("colour", _saved("BMP", "RGBA")),
        Way("two", _saved("BMP", "1")),
        Way("grey", _saved("DIB", "L", ".bmp")),
    ],
    "GIF": [
        *(Way("grey", _saved("GIF", m)) for m in ("L", "P")),
        Way("two", _saved("GIF", "1")),
        Way("grey", _saved("GIF", "L", interlace=1)),
        Way("grey", _saved("GIF", "RGB")),
    ],
    "WEBP": [
        *(Way("colour", _saved("WEBP", m, lossless=True)) for m in ("RGB", "RGBA")),
        Way("grey", _saved("WEBP", "L", lossless=True)),
        Way("colour", _saved("WEBP", "RGB", tolerance=40, quality=100)),
    ],
    "animated": [
        Way("grey", _animated("GIF", ".gif")),
        Way("grey", _animated("PNG", ".png")),
        Way("colour", _animated("PNG", ".png")),
        Way("grey", _animated("TIFF", ".tif")),
        Way("colour", _animated("WEBP", ".webp", lossless=True)),
        Way("colour", _animated("MPO", ".jpg", 8, **JPEG)),
    ],
    "another suffix": [
        *(
            Way(d, _saved(f, m, s, t, **o))
            for d, f, m, s, t, o in (
                ("colour", "JPEG", "RGB", ".png", 8, JPEG),
                ("colour", "PNG", "RGB", ".jpg", 0, {}),
                ("grey", "PNG", "L", ".bmp", 0, {}),
                ("grey", "BMP", "L", ".gif", 0, {}),
                ("grey", "GIF", "L", ".webp", 0, {}),
                ("colour", "WEBP", "RGB", ".tif", 0, {"lossless": True}),
                ("grey", "TIFF", "L", ".ppm", 0, {}),
            )
        ),
    ],
    "formats of no suffix here": [
        *(
            Way(d, _saved(f, m, s, 40, True))
            for f, m, d in (
                ("TGA", "RGB", "colour"),
                ("TGA", "L", "grey"),
                ("PCX", "L", "grey"),
                ("PCX", "RGB", "colour"),
                ("SGI", "RGB", "colour"),
                ("SGI", "L", "grey"),
                ("IM", "L", "grey"),
                ("IM", "RGB", "colour"),
                ("MSP", "1", "two"),
                ("DDS", "RGB", "colour"),
                ("DDS", "L", "grey"),
                ("XBM", "1", "two"),
                ("SPIDER", "F", "grey"),
                ("ICO", "RGBA", "colour"),
                ("JPEG2000", "RGB", "colour"),
                ("JPEG2000", "L", "grey"),
                ("AVIF", "RGB", "colour"),
                ("QOI", "RGB", "colour"),
                ("PDF", "L", "grey"),
                ("EPS", "L", "grey"),
                ("BLP", "P", "grey"),
                ("PALM", "1", "two"),
                ("IM", "F", "grey"),
            )
            for s in (f".{f.lower()}", ".png")
        ),
    ],
}
