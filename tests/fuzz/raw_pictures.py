"""Picture files by hand, of whatever depth and kind of numbers."""

import struct
import zlib

import numpy as np

SIZE = 8


def png(samples: np.ndarray, depth: int, colour: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """Return a PNG of samples (H, W, channels) with any bit depth and colour type."""
    height, width = samples.shape[:2]
    rows = []
    for row in samples.reshape(height, -1):
        if depth == 16:
            packed = row.astype(">u2").tobytes()
        else:
            bits = "".join(f"{int(value):0{depth}b}" for value in row)
            bits += "0" * (-len(bits) % 8)
            packed = int(bits, 2).to_bytes(len(bits) // 8, "big")
        rows.append(b"\0" + packed)
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = [(b"IHDR", head), *chunks, (b"IDAT", zlib.compress(b"".join(rows))), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in body
    )


def tiff(samples: np.ndarray, bits: int, photometric: int, code: str, kind: int = 1) -> bytes:
    """Return an uncompressed TIFF of one channel; `code`: as numpy's dtype, or "packed"."""
    order = "<" if code == "packed" else code[0]
    if code == "packed":
        text = "".join(f"{int(v):0{bits}b}" for v in samples.ravel())
        data = int(text, 2).to_bytes(len(text) // 8, "big")
    else:
        data = samples.astype(code).tobytes()
    tags = [
        (256, SIZE),
        (257, SIZE),
        (258, bits),
        (259, 1),
        (262, photometric),
        (273, 8),
        (277, 1),
        (278, SIZE),
        (279, len(data)),
        (339, kind),
    ]
    directory = struct.pack(f"{order}H", len(tags)) + b"".join(
        struct.pack(f"{order}HHI", tag, 4, 1) + struct.pack(f"{order}I", value)
        for tag, value in tags
    )
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, 8 + len(data))
    return head + data + directory + bytes(4)
