"""Odd files of every kind, as strangers have them: `python tests/fuzz/files.py cases=5000 seed=0`.

Each case writes a clean input and an odd one. Reading the odd one must give what the clean one
gives, or say a word (a warning, or an entry in the table of what was read), or be refused with a
message of a few lines that names a key or a file. Never an exception of another kind, a different
number without a word, or more than 30 seconds.
"""

import logging
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from PIL import Image

from trainer import data
from trainer.config import ConfigError, DataConfig

SECONDS = 30
WORDS = [
    "when", "shall", "we", "three", "meet", "again", "in", "thunder", "lightning", "or", "rain",
    "fair", "is", "foul",
]  # fmt: skip
SPLITS = ("train", "valid", "test")
SPELLED = {
    "train": ["train", "Train", "TRAIN", "training", "train_set", "x.train", "train-00000-of-00001",
              "train_1", "TrainSet", "data-train"],
    "valid": ["valid", "val", "dev", "Validation", "eval", "VAL_1", "x.dev", "valid_set",
              "validation-00000-of-00001", "DevSet"],
    "test": ["test", "Test", "testing", "TEST_SET", "x.test", "test-00000-of-00001", "test_2",
             "TestData", "tst", "my-test"],
}  # fmt: skip
Content = dict[str, list]  # of each split what its samples are, in no order
Write = Callable[[Path, random.Random], None]


class Said(logging.Handler):
    """Counts what is logged as a warning."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.words: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.words.append(record.getMessage())


@contextmanager
def limited(seconds: int = SECONDS):
    """TimeoutError after so many seconds."""

    def late(*_: Any) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@dataclass
class Outcome:
    """What became of a case: equal, said, refused, or one of the three that must never be."""

    kind: str
    name: str
    verdict: str
    detail: str = ""


# ---- reading


def contents(config: DataConfig) -> tuple[Content, list[str]]:
    """Every sample of each split, and the words that were said about them."""
    said = Said()
    logging.getLogger().addHandler(said)
    try:
        facts = data.prepare(config)
        found = {split: list(samples(config, facts, split)) for split in SPLITS}
    finally:
        logging.getLogger().removeHandler(said)
    words = [*said.words, *facts.left_out.values(), *facts.notes]
    words += [why for split in facts.splits.values() for why in split.left_out]
    return found, words


def samples(config: DataConfig, facts: data.DataFacts, split: str):
    dataset = data.open_split(config, split)
    if config.kind == "images":
        for index in range(len(dataset)):
            sample = dataset.sample(index, None)
            yield facts.class_names[int(sample["targets"])], sample["images"]
    elif config.kind == "pairs":
        for index in range(len(dataset)):
            yield dataset.source_text(index), dataset.reference(index)
    else:
        tokenizer = data.open_tokenizer(config)
        assert tokenizer is not None
        ids = [i for n in range(len(dataset)) for i in dataset.sample(n, None)["targets"] if i >= 0]
        yield tokenizer.decode([i for i in ids if i != tokenizer.eot_id])


def same(one: Content, other: Content, tolerance: int) -> bool:
    """Whether splits hold the same samples, pixels up to a tolerance."""
    for split in SPLITS:
        mine, theirs = (sorted(map(key, side[split])) for side in (one, other))
        if len(mine) != len(theirs):
            return False
        for a, b in zip(mine, theirs, strict=True):
            if a[0] != b[0] or not close(a[1], b[1], tolerance):
                return False
    return True


def key(sample: Any) -> tuple[str, tuple]:
    if isinstance(sample, str):
        return sample, ()
    label, value = sample
    if isinstance(value, str):
        return f"{label}\t{value}", ()
    # Ordered by brightness, which no format changes by much; three channels of one are grey.
    value = value[:1] if len(value) == 3 and np.ptp(value.astype(int), axis=0).max() < 12 else value
    return label, tuple(np.sort(value.astype(int).ravel())[::-1]) and tuple(
        value.astype(int).ravel()
    )


def close(one: tuple, other: tuple, tolerance: int) -> bool:
    return len(one) == len(other) and all(
        abs(a - b) <= tolerance for a, b in zip(one, other, strict=True)
    )


def judged(kind: str, name: str, clean: DataConfig, odd: DataConfig, tolerance: int) -> Outcome:
    """Compare what the odd input gives with the clean one."""
    try:
        with limited():
            found, words = contents(odd)
    except ConfigError as error:
        text = str(error)
        named = any(word in text for word in ("data.", Path(odd.path).name, "prompt"))
        if "Traceback" in text or text.count("\n") > 4 or not named or len(text) < 20:
            return Outcome(kind, name, "traceback", f"a bad message: {text}")
        return Outcome(kind, name, "refused", text)
    except TimeoutError:
        return Outcome(kind, name, "hang")
    except Exception as error:
        return Outcome(kind, name, "traceback", f"{type(error).__name__}: {error}")
    if same(contents(clean)[0], found, tolerance):
        return Outcome(kind, name, "equal")
    return Outcome(kind, name, "said" if words else "silent difference", "; ".join(words)[:300])


# ---- pictures


def pixels(rng: random.Random, place: int, base: int) -> np.ndarray:
    """(8, 8) uint8, brighter with each place, so that their order is that of their brightness."""
    noise = np.random.default_rng(rng.getrandbits(32)).integers(0, 6, (8, 8))
    return (base + 12 * place + noise).clip(0, 255).astype(np.uint8)


def gallery(rng: random.Random) -> dict[tuple[str, str, int], np.ndarray]:
    counts = {"train": 5, "valid": 2, "test": 2}
    return {
        (split, name, place): pixels(rng, place, base)
        for split, count in counts.items() for name, base in (("ant", 20), ("bee", 140))
        for place in range(count)
    }  # fmt: skip


def exif(grey: np.ndarray, number: int) -> tuple[Image.Image, dict]:
    """A picture that is upright once it is turned as EXIF says."""
    undo = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
            4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
            6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
            8: Image.Transpose.ROTATE_270}  # fmt: skip
    image = Image.fromarray(grey).convert("RGB").transpose(undo[number])
    tags = image.getexif()
    tags[0x0112] = number
    return image, {"exif": tags.tobytes()}


def coded(grey: np.ndarray, how: str, rng: random.Random) -> tuple[bytes, str, int]:
    """The bytes of a picture, its suffix, and how far its pixels may be from the clean ones."""
    image, options, tolerance = Image.fromarray(grey), {}, 0
    mode, _, form = how.partition("/")
    if mode.startswith("exif"):
        image, options = exif(grey, int(mode[4:]))
    elif mode == "I;16":
        image = Image.fromarray(grey.astype(np.uint16) * 257)
    elif mode == "I":
        image = Image.fromarray(grey.astype(np.int32) * 9000)
    elif mode == "F":
        image = Image.fromarray(grey.astype(np.float32) / 7)
    elif mode in ("LA", "RGBA"):
        alpha = rng.choice([255, 255, 128])
        image = Image.fromarray(grey).convert(mode)
        image.putalpha(alpha)
        tolerance = 0 if alpha == 255 else 255
    elif mode in ("P", "1"):
        image = image.convert(mode) if mode == "P" else image.point(lambda v: 255 * (v > 99), "1")
        tolerance = 0 if mode == "P" else 255
    elif mode != "L":
        image, tolerance = image.convert(mode), 3
    if form in ("JPEG", "WEBP") and "exif" not in mode:
        tolerance = max(tolerance, 24)
        options |= {"quality": 100} if form == "JPEG" else {"lossless": True}
    if "exif" in mode and form in ("JPEG", "WEBP"):
        options["quality"], tolerance = 100, 24
    buffer = BytesIO()
    image.save(buffer, form, **options)
    suffix = {"JPEG": ".jpg", "PPM": ".ppm", "TIFF": ".tif"}.get(form, f".{form.lower()}")
    return buffer.getvalue(), rng.choice([suffix, suffix.upper()]), tolerance


CODED = [
    "L/PNG", "L/BMP", "L/GIF", "L/WEBP", "L/TIFF", "L/PPM", "L/JPEG", "RGB/PNG", "RGB/BMP",
    "RGB/JPEG", "RGB/PPM", "RGB/TIFF", "RGB/WEBP", "RGBA/PNG", "RGBA/WEBP", "RGBA/TIFF", "LA/PNG",
    "P/PNG", "P/GIF", "P/BMP", "1/PNG", "1/BMP", "1/PPM", "1/TIFF", "CMYK/TIFF", "CMYK/JPEG",
    "YCbCr/TIFF", "YCbCr/JPEG", "LAB/TIFF", "I;16/PNG", "I;16/TIFF", "I;16/PPM", "I/TIFF", "F/TIFF",
    *(f"exif{n}/{form}" for n in range(2, 9) for form in ("JPEG", "PNG", "TIFF", "WEBP")),
]  # fmt: skip
DAMAGES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "whole": lambda raw, rng: raw,
    "cut": lambda raw, rng: raw[: rng.randrange(len(raw))],
    "empty": lambda raw, rng: b"",
    "text": lambda raw, rng: b"no picture at all",
    "other": lambda raw, rng: b"GIF89a" + raw[6:],
    "doubled": lambda raw, rng: raw + raw,
}


def picture_case(folder: Path, rng: random.Random) -> Outcome:
    how, damage = rng.choice(CODED), rng.choice(["whole"] * 4 + list(DAMAGES))
    tolerance, images = 0, gallery(rng)
    one = rng.choice([True, False])  # one odd file among clean ones, or all are odd
    marked = rng.choice(sorted(images))
    try:
        for place, grey in images.items():
            raw, suffix, allowed = coded(grey, how, rng)
            clean = coded(grey, "L/PNG", rng)[0]
            if one and place != marked:
                raw, suffix = clean, ".png"
            else:
                tolerance = max(tolerance, allowed)
            if place == marked:
                raw = DAMAGES[damage](raw, rng)
            put(folder / "odd", place, suffix, raw)
            put(folder / "clean", place, ".png", clean)
    except (OSError, KeyError, ValueError):  # Pillow does not write this
        return Outcome("pictures", f"{how} {damage}", "not written")
    odd = config(folder / "odd", "images", on_bad_file=rng.choice(["stop", "skip"]))
    return judged("pictures", f"{how} {damage}", config(folder / "clean", "images"), odd, tolerance)


def put(folder: Path, place: tuple[str, str, int], suffix: str, raw: bytes) -> None:
    split, name, number = place
    path = folder / split / name / f"{number}{suffix}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(raw)


def config(path: Path, kind: str, **keys: Any) -> DataConfig:
    cache = str(path.parent / "cache" / path.name)
    return DataConfig(kind=kind, path=str(path), seq_len=16, vocab_size=270, cache=cache, **keys)


# ---- folders


def spelled(folder: Path, rng: random.Random) -> None:
    for split in SPLITS:
        for entry in [*folder.glob(split), *folder.glob(f"{split}.*")]:
            entry.rename(folder / (rng.choice(SPELLED[split]) + entry.suffix))


def wrapped(folder: Path, rng: random.Random) -> None:
    inner = folder / rng.choice(["my data", "v1.0", "Archive"])
    held = folder.with_name("held")
    folder.rename(held)
    folder.mkdir()
    held.rename(inner)


def linked(folder: Path, rng: random.Random) -> None:
    store = folder.with_name("store")
    store.mkdir(exist_ok=True)
    for entry in sorted(folder.iterdir()):
        target = store / f"{rng.getrandbits(30)}{entry.suffix}"
        entry.rename(target)
        entry.symlink_to(target)


def littered(folder: Path, rng: random.Random) -> None:
    names = [".DS_Store", "Thumbs.db", "README.md", "LICENSE", ".ipynb_checkpoints/train.txt",
             "__MACOSX/._train.txt", "train.txt.bak", "notes~", "gone"]  # fmt: skip
    for name in rng.sample(names, 3):
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        if name == "gone":
            path.symlink_to(folder / "nowhere")
        else:
            path.write_text("litter " * 40)
    inner = [path for path in folder.rglob("*") if path.is_dir() and path.name in ("ant", "bee")]
    for path in inner[:2]:
        (path / "._0.png").write_bytes(b"fork")
        (path / ".ipynb_checkpoints").mkdir()
        shutil.copy(next(p for p in path.iterdir() if p.is_file()), path / ".ipynb_checkpoints")


def looped(folder: Path, rng: random.Random) -> None:
    (folder / rng.choice(["again", "self"])).symlink_to(folder)


def emptied(folder: Path, rng: random.Random) -> None:
    (folder / "nothing").mkdir()


def strange(folder: Path, rng: random.Random) -> None:
    (folder / "extra.xyz").write_bytes(bytes(rng.randrange(256) for _ in range(50)))


def nested(folder: Path, rng: random.Random) -> None:
    """Two sources side by side, each with splits of its own."""
    held = folder.with_name("held")
    folder.rename(held)
    folder.mkdir()
    shutil.copytree(held, folder / "first", symlinks=True)
    held.rename(folder / "second")


def renamed(folder: Path, rng: random.Random) -> None:
    """A split under a name that is none: all else must be refused or said."""
    entry = next(e for e in sorted(folder.iterdir()) if e.name.startswith("test"))
    entry.rename(folder / f"rest{entry.suffix}")


FOLDERS: dict[str, Write] = {
    "spelled": spelled, "wrapped": wrapped, "linked": linked, "littered": littered,
    "looped": looped, "emptied": emptied, "strange": strange, "renamed": renamed, "nested": nested,
}  # fmt: skip


def write_clean(folder: Path, kind: str, rng: random.Random) -> None:
    folder.mkdir(parents=True)
    if kind == "images":
        for place, grey in gallery(rng).items():
            put(folder, place, ".png", coded(grey, "L/PNG", rng)[0])
        return
    suffix = ".txt" if kind == "text" else ".tsv"
    for split in SPLITS:
        (folder / f"{split}{suffix}").write_text(text_of(kind, split, rng))


def text_of(kind: str, split: str, rng: random.Random) -> str:
    lines = 60 if split == "train" else 12
    if kind == "text":
        rows = (" ".join(rng.choices(WORDS, k=6)) for _ in range(lines))
    else:
        rows = ("\t".join(" ".join(rng.choices(WORDS, k=3)) for _ in "st") for _ in range(lines))
    return "\n".join(f"{split} {row}" for row in rows) + "\n"


def folder_case(folder: Path, rng: random.Random) -> Outcome:
    kind = rng.choice(["text", "pairs", "images"])
    names = rng.sample(list(FOLDERS), rng.choice([1, 2, 3]))
    write_clean(folder / "clean", kind, rng)
    shutil.copytree(folder / "clean", folder / "odd")
    for name in names:
        try:
            FOLDERS[name](folder / "odd", rng)
        except StopIteration:
            continue
    name = f"{kind} {' '.join(names)}"
    return judged("folders", name, config(folder / "clean", kind), config(folder / "odd", kind), 0)


# ---- text


def bytes_of(text: str, how: str, rng: random.Random) -> bytes:
    crlf = text.replace("\n", "\r\n")
    odd = text.replace("e", "é")
    return {
        "bom": b"\xef\xbb\xbf" + text.encode(), "crlf": crlf.encode(),
        "cr": text.replace("\n", "\r").encode(), "utf-16": text.encode("utf-16"),
        "utf-16-le": text.encode("utf-16-le"), "utf-16-be": text.encode("utf-16-be"),
        "utf-32": text.encode("utf-32"), "latin1": odd.encode("latin1"),
        "cp1252": text.replace("a", "€").encode("cp1252"), "koi8": text.encode() + b"\xf0\xd2",
        "gb18030": text.replace("w", "中").encode("gb18030"),
        "shift_jis": text.replace("w", "ア").encode("shift_jis"),
        "nul": text.encode().replace(b" ", b" \0", 1), "no end": text.rstrip("\n").encode(),
        "blank lines": text.replace("\n", "\n\n", 3).encode(), "empty": b"", "spaces": b"  \n\n ",
        "cut": text.replace("e", "日").encode()[: rng.choice([-2, -3])] + b"\xe6\x97",
        "form feed": text.replace("\n", "\f\n", 2).encode(),
        "u2028": text.replace(" ", "\u2028", 2).encode(), "binary": rng.randbytes(400),
    }[how]  # fmt: skip


ENCODED = [
    "bom", "crlf", "cr", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin1", "cp1252", "koi8",
    "gb18030", "shift_jis", "nul", "no end", "blank lines", "empty", "spaces", "cut", "form feed",
    "u2028", "binary",
]  # fmt: skip
# These are other texts, which may be read as what they are.
OTHER_TEXT = {"blank lines", "form feed", "u2028", "no end", "spaces"}


def text_case(folder: Path, rng: random.Random) -> Outcome:
    kind, how = rng.choice(["text", "pairs"]), rng.choice(ENCODED)
    write_clean(folder / "clean", kind, rng)
    shutil.copytree(folder / "clean", folder / "odd")
    path = next((folder / "odd").glob(f"{rng.choice(SPLITS)}.*"))
    raw = bytes_of(path.read_text(), how, rng)
    path.write_bytes(raw)
    if how in OTHER_TEXT and raw.strip():
        (folder / "clean" / path.name).write_bytes(raw)
    name = f"{kind} {how}"
    return judged("texts", name, config(folder / "clean", kind), config(folder / "odd", kind), 0)


ROWS: dict[str, tuple[str, str | None]] = {
    # An odd row, and the row that it must be read as; None = it must be refused.
    "spaces": ("  one \t two  ", "one\ttwo"), "quotes": ('"one"\t"two"', '"one"\t"two"'),
    "three": ("a\tb\tc", None), "one": ("alone", None), "empty side": ("one\t", None),
    "blank": ("", None), "only tab": ("\t", None), "nbsp": ("a\u00a0b\tc", "a\u00a0b\tc"),
    "u2028": ("a\u2028b\tc", "a\u2028b\tc"), "vt": ("a\vb\tc", "a\vb\tc"), "nel": ("a\x85b\tc",
    "a\x85b\tc"), "emoji": ("🙂\t👍🏽", "🙂\t👍🏽"), "comment": ("# one\ttwo", "# one\ttwo"),
    "backslash": ("a\\tb\tc", "a\\tb\tc"), "special": ("<|endoftext|>\tx", "<|endoftext|>\tx"),
    "crlf": ("one\ttwo\r", "one\ttwo"), "none": ("None\tnull", "None\tnull"),
}  # fmt: skip


def row_case(folder: Path, rng: random.Random) -> Outcome:
    write_clean(folder / "clean", "pairs", rng)
    shutil.copytree(folder / "clean", folder / "odd")
    split, names = rng.choice(SPLITS), rng.sample(list(ROWS), rng.choice([1, 2]))
    path = folder / "odd" / f"{split}.tsv"
    lines, clean = path.read_text().splitlines(), path.read_text().splitlines()
    for name in names:
        place = rng.randrange(1, len(lines))
        odd, wanted = ROWS[name]
        lines.insert(place, odd)
        clean.insert(place, wanted or "must be\trefused")
    path.write_text("\n".join(lines) + "\n", newline="")
    (folder / "clean" / path.name).write_text("\n".join(clean) + "\n", newline="")
    pair = config(folder / "clean", "pairs"), config(folder / "odd", "pairs")
    return judged("rows", " ".join(names), *pair, 0)


# ---- archives


def archive_case(folder: Path, rng: random.Random) -> Outcome:
    images = gallery(rng)
    arrays: dict[str, Any] = {}
    for split in SPLITS:
        of_split = [(k, v) for k, v in images.items() if k[0] == split]
        arrays[f"x_{split}"] = np.stack([v for _, v in of_split])
        arrays[f"y_{split}"] = np.array([("ant", "bee").index(k[1]) for k, _ in of_split])
    arrays["classes"] = np.array(["ant", "bee"])
    folder.mkdir(exist_ok=True)
    np.savez(folder / "clean.npz", **arrays)
    names = rng.sample(list(MEANING_KEPT), 2)
    if rng.random() < 0.4:
        names = rng.sample(list(MEANING_LOST), 1)
    for name in names:
        arrays = (MEANING_KEPT | MEANING_LOST)[name](dict(arrays), rng)
    np.savez(folder / "odd.npz", allow_pickle=True, **arrays)
    if "cut" in names:
        raw = (folder / "odd.npz").read_bytes()
        (folder / "odd.npz").write_bytes(raw[: rng.randrange(len(raw))])
    both = config(folder / "clean.npz", "images"), config(folder / "odd.npz", "images")
    return judged("archives", " ".join(names), *both, 1)


def opaque(x: np.ndarray) -> np.ndarray:
    """(N, H, W, 4): with an alpha channel that hides nothing."""
    if x.ndim != 3 or x.dtype != np.uint8:
        return x
    full = np.full((*x.shape, 1), 255, np.uint8)
    return np.concatenate([np.repeat(x[..., None], 3, -1), full], -1)


def medmnist(key: str) -> str:
    """A key as MedMNIST's archives have it: val_images, test_labels."""
    role, _, split = key.partition("_")
    if not split:
        return key
    return f"{'val' if split == 'valid' else split}_{'images' if role == 'x' else 'labels'}"


def each_x(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[dict, random.Random], dict]:
    return lambda arrays, rng: {k: change(v) if is_x(k) else v for k, v in arrays.items()}


def is_x(key: str) -> bool:
    return key.lower().startswith("x_") or key.endswith("_images")


def each_y(change: Callable[[np.ndarray], Any]) -> Callable[[dict, random.Random], dict]:
    def is_y(key: str) -> bool:
        return key.lower().startswith("y_") or key.endswith("_labels")

    return lambda arrays, rng: {k: change(v) if is_y(k) else v for k, v in arrays.items()}


def one_x(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[dict, random.Random], dict]:
    def changed(arrays: dict, rng: random.Random) -> dict:
        name = rng.choice([k for k in arrays if is_x(k)])
        return arrays | {name: change(arrays[name])}

    return changed


# What leaves the meaning as it is, so that two of them may follow one another.
MEANING_KEPT: dict[str, Callable[[dict, random.Random], dict]] = {
    "uint16": each_x(lambda x: x.astype(np.uint16) * 257 if x.dtype == np.uint8 else x),
    "share": each_x(lambda x: x / 255 if x.dtype == np.uint8 else x),
    "float32": each_x(lambda x: (x / 255).astype(np.float32) if x.dtype == np.uint8 else x),
    "int64": each_x(lambda x: x.astype(int) if x.dtype == np.uint8 else x),
    "whole floats": each_x(lambda x: x.astype(float) if x.dtype == np.uint8 else x),
    "channel": each_x(lambda x: x[..., None] if x.ndim == 3 else x),
    "first": each_x(lambda x: x[:, None] if x.ndim == 3 else x),
    "rgb": each_x(lambda x: np.repeat(x[..., None], 3, -1) if x.ndim == 3 else x),
    "chw": each_x(lambda x: np.repeat(x[:, None], 3, 1) if x.ndim == 3 else x),
    "rgba": each_x(opaque),
    "column": each_y(lambda y: y[:, None]),
    "float labels": each_y(lambda y: y.astype(float)),
    "uint8 labels": each_y(lambda y: y.astype(np.uint8)),
    "bool labels": each_y(lambda y: y.astype(bool)),
    "order": lambda a, rng: dict(sorted(a.items(), reverse=True)),
    "extra": lambda a, rng: a | {"z": np.arange(3), "x": np.arange(4)},
    "medmnist": lambda a, rng: {medmnist(k): v for k, v in a.items()},
    "capitals": lambda a, rng: {k.upper() if k != "classes" else k: v for k, v in a.items()},
    "cut": lambda a, rng: a,
}  # fmt: skip
# What has another meaning, or none: refused, or read as what it is.
MEANING_LOST: dict[str, Callable[[dict, random.Random], dict]] = {
    "negative": each_x(lambda x: x - 300.0),
    "one share": one_x(lambda x: x / 255),
    "one int": one_x(lambda x: x.astype(np.int32)),
    "nan": one_x(lambda x: np.where(x > 60, np.nan, x)),
    "inf": one_x(lambda x: x * np.inf),
    "flat": each_x(lambda x: x.reshape(len(x), -1)),
    "object": one_x(lambda x: x.astype(object)),
    "none": one_x(lambda x: x[:0]),
    "fewer": one_x(lambda x: x[:-1]),
    "complex": one_x(lambda x: x * 1j),
    "text": one_x(lambda x: x.astype(str)),
    "half labels": each_y(lambda y: y + 0.5),
    "shifted": each_y(lambda y: y + 1),
    "minus": each_y(lambda y: y - 1),
    "one hot": each_y(lambda y: np.eye(2)[y]),
    "twice": lambda a, rng: a | {"classes": np.array(["ant", "ant"])},
    "one class": lambda a, rng: a | {"classes": np.array(["ant"])},
    "no labels": lambda a, rng: {k: v for k, v in a.items() if k != "y_valid"},
}  # fmt: skip


# ---- tokenizers


def tokenizer_case(folder: Path, rng: random.Random) -> Outcome:
    write_clean(folder / "clean", "text", rng)
    models, pre, norms = tokenizers.models, tokenizers.pre_tokenizers, tokenizers.normalizers
    decoders, letters = tokenizers.decoders, sorted(set("".join(WORDS) + "trainvalidtest \n"))
    known = ["train", "valid", "test", "\n", *WORDS][: rng.choice([5, 30])]
    rows = {word: i * rng.choice([1, 3]) for i, word in enumerate([*dict.fromkeys(known), "[UNK]"])}
    vocabulary = {word: i for i, word in enumerate(["[UNK]", *letters])}
    model = rng.choice([
        lambda: models.WordLevel(rows, unk_token=rng.choice(["[UNK]", "?"])),
        lambda: models.WordPiece({**rows, **{f"##{c}": 500 + i for i, c in enumerate(letters)}},
                                 unk_token=rng.choice(["[UNK]", "?"])),
        lambda: models.Unigram([("<unk>", 0.0), *((c, -1.0 - i) for i, c in enumerate(letters))],
                               unk_id=rng.choice([0, None])),
        lambda: models.BPE(vocabulary, [], unk_token=rng.choice(["[UNK]", None])),
        lambda: models.BPE({c: i for i, c in enumerate(sorted(pre.ByteLevel.alphabet()))}, [],
                           dropout=rng.choice([None, 0.3])),
    ])  # fmt: skip
    backend = tokenizers.Tokenizer(model())
    backend.pre_tokenizer = rng.choice([
        pre.Whitespace, pre.WhitespaceSplit, pre.Metaspace, pre.BertPreTokenizer, pre.Digits,
        lambda: pre.ByteLevel(add_prefix_space=rng.choice([True, False])), lambda: None,
    ])()  # fmt: skip
    normalizer = rng.choice([norms.Lowercase, norms.NFKC, norms.Strip, norms.BertNormalizer,
                             lambda: norms.Replace(" ", "▁"), lambda: None])()  # fmt: skip
    decoder = rng.choice([decoders.ByteLevel, decoders.Metaspace, decoders.WordPiece,
                          decoders.Fuse, lambda: None])()  # fmt: skip
    for name, part in (("normalizer", normalizer), ("decoder", decoder)):
        if part is not None:
            setattr(backend, name, part)
    if rng.random() < 0.3:
        backend.enable_truncation(4)
        backend.enable_padding(length=9)
    if rng.random() < 0.3:
        backend.add_tokens([tokenizers.AddedToken("shall", lstrip=rng.choice([True, False]))])
    backend.save(str(folder / "own.json"))
    odd = config(folder / "clean", "text", tokenizer=str(folder / "own.json"))
    odd.cache += "2"
    parts = (type(p).__name__ for p in (backend.model, backend.pre_tokenizer, backend.normalizer,
                                        backend.decoder))  # fmt: skip
    return judged("tokenizers", " ".join(parts), config(folder / "clean", "text"), odd, 0)


CASES: list[Callable[[Path, random.Random], Outcome]] = [
    picture_case, folder_case, text_case, row_case, archive_case, tokenizer_case,
]  # fmt: skip
NEVER = ("traceback", "silent difference", "hang")


def run(first: int, cases: int, seed: int, progress: bool = False) -> list[Outcome]:
    """Judge cases number first to first + cases - 1; a number always makes the same input."""
    outcomes = []
    for number in range(first, first + cases):
        rng = random.Random(f"{seed}-{number}")
        with tempfile.TemporaryDirectory(prefix="fuzz-") as scratch:
            folder = Path(scratch) / "d"
            folder.mkdir()
            outcome = CASES[number % len(CASES)](folder, rng)
        outcomes.append(outcome)
        if outcome.verdict in NEVER:
            print(f"case {number}: {outcome}")  # noqa: T201
        if progress and (number + 1) % 500 == 0:
            print(f"{number + 1 - first} of {cases}", flush=True)  # noqa: T201
    return outcomes


def main(words: list[str]) -> int:
    """Print a row for each kind of file; 1 if something happened that never must."""
    given = dict(word.split("=", 1) for word in words)
    began = time.monotonic()
    logging.basicConfig(handlers=[logging.NullHandler()], level=logging.WARNING)
    outcomes = run(int(given.get("first", 0)), int(given.get("cases", 5000)),
                   int(given.get("seed", 0)), progress=True)  # fmt: skip
    verdicts = ["equal", "said", "refused", "not written", *NEVER]
    counts = Counter((outcome.kind, outcome.verdict) for outcome in outcomes)
    print("".join(f"{name:>18}" for name in ["kind", "inputs", *verdicts]))  # noqa: T201
    for kind in [*dict.fromkeys(outcome.kind for outcome in outcomes)]:
        row = [counts[kind, verdict] for verdict in verdicts]
        print(f"{kind:>18}{sum(row):>18}" + "".join(f"{n:>18}" for n in row))  # noqa: T201
    print(f"{len(outcomes)} inputs in {time.monotonic() - began:.0f} s")  # noqa: T201
    return int(any(outcome.verdict in NEVER for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
