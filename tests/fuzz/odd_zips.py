"""Damage to the bytes of an archive, and members that numpy did not write."""

import struct
import warnings
from collections.abc import Callable
from io import BytesIO
from random import Random
from zipfile import ZipFile, ZipInfo

import numpy as np


def flipped(content: bytes, rng: Random) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        changed[rng.randrange(len(changed))] ^= rng.randint(1, 255)
    return bytes(changed)


def _member(name: str, content: Callable[[Random], bytes]) -> Callable[[bytes, Random], bytes]:
    """A zip with one member that numpy did not write."""

    def change(before: bytes, rng: Random) -> bytes:
        file = BytesIO(before)
        with warnings.catch_warnings(), ZipFile(file, "a") as archive:
            warnings.simplefilter("ignore")  # a name that is there twice is meant
            archive.writestr(ZipInfo(name), content(rng))
        return file.getvalue()

    return change


def _header(text: str) -> bytes:
    header = text.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header


HEADERS = (
    "{'descr': '|u1', 'fortran_order': False, 'shape': (9999999999999, 8, 8), }",
    "{'descr': '|u1', 'fortran_order': False, 'shape': (3000000, 800, 8), }",
    "{'descr': '|u1', 'fortran_order': False, 'shape': (-3, 8, 8), }",
    "{'descr': '|u1', 'fortran_order': False, 'shape': (2**80,), }",
    "{'descr': '|O', 'fortran_order': False, 'shape': (3,), }",
    "{'descr': '|V9', 'fortran_order': False, 'shape': (0,), }",
    "{'descr': ",
    "[]",
    "(",
    "'",
    "",
    "{'descr': 'banana', 'fortran_order': False, 'shape': (3,), }",
    "{'a': 1}",
    "\\",
    "1e999",
)


OTHERS = {
    "cut": lambda content, rng: content[: int(len(content) * rng.random())],
    "clipped": lambda content, rng: content[: -rng.randint(1, 30)],
    "flipped": flipped,
    "zeroed": lambda content, rng: content[: len(content) // 2] + bytes(len(content) // 2),
    "something before": lambda content, rng: b"\0" * rng.randint(1, 50) + content,
    "something behind": lambda content, rng: content + b"more" * rng.randint(1, 20),
    "no archive": lambda content, rng: rng.choice(
        (
            b"",
            b"PK",
            b"PK\3\4",
            b"text",
            b"\x93NUMPY",
            _header("{}"),
            b"\x80\x04N.",
            bytes(99),
            b"PK\5\6" + bytes(18),
            b"\x1f\x8b\x08",
        )
    ),
    "one array": lambda content, rng: _one_array(),
    "a member of text": _member("notes.txt", lambda rng: b"hello"),
    "an odd header": _member("x_more.npy", lambda rng: _header(rng.choice(HEADERS))),
    "an odd header of train": _member("x_train.npy", lambda rng: _header(rng.choice(HEADERS))),
    "an empty member": _member("y_train.npy", lambda rng: b""),
}


def _one_array() -> bytes:
    file = BytesIO()
    np.save(file, np.zeros((9, 8, 8), np.uint8))
    return file.getvalue()
