"""Text sources: find the files of data.path, divide them into splits, read them as UTF-8."""

import codecs
import re
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from typing import Any

from charset_normalizer import from_bytes

from trainer.config.train import ConfigError, DataConfig, DataError
from trainer.data.folders import (
    BESIDE,
    DOCUMENT,
    SPLITS,
    Entry,
    Listing,
    refuse_inner_splits,
    scan_folder,
    split_of,
    splits_of,
    unique_files,
    unwrap_folders,
)

BUNDLED = {
    "shakespeare": ("text", "shakespeare"),
    "fashion-mnist": ("images", "fashion-mnist-6k.npz"),
    "home-assistant": ("pairs", "home-assistant-en-de"),
    "home-assistant-chats": ("chat", "home-assistant-chats"),
    "speech": ("speech", "speech"),
    "fashion-canvas": ("detection", "fashion-mnist-6k.npz"),
    "trees": ("detection", "trees"),
}
READ_AS = {"masked_text": "text"}  # other kinds that read the same files
PICTURES = (".npz", ".npy", ".png", ".jpg", ".jpeg", ".gif", ".webp", ".bmp", ".tif", ".tiff")
OTHER_FORMATS = {
    *PICTURES,
    ".json",
    ".jsonl",
    ".ndjson",
    ".csv",
    ".parquet",
    ".arrow",
    ".feather",
    ".pkl",
    ".gz",
    ".zst",
    ".zip",
    ".xz",
    ".bz2",
    ".7z",
    ".tar",
    ".tgz",
    ".pdf",
    ".docx",
    ".html",
    ".xml",
    ".safetensors",
    ".bin",
    ".h5",
    ".hdf5",
    ".sqlite",
    ".db",
    ".wav",
    ".mp3",
    ".flac",
    ".ogg",
}
ONE_A_LINE = (".jsonl", ".ndjson")  # of these no line is cut, however long it is
Suffixes = tuple[str, ...]  # of the files that a reader takes, the usual one first
BLOCK = 1 << 20  # bytes per read
GUESSED_ON = 1 << 14  # bytes used to guess an encoding
ICONV = {"euc_jis_2004": "euc-jp", "shift_jis_2004": "shift_jis"}  # the names that iconv accepts


@dataclass(frozen=True)
class FilePart:
    """Bytes [start, end) of a file."""

    path: Path
    start: int
    end: int

    def file_fingerprint(self) -> list[Any]:
        """Return path, range, size and modification time, which change when the file does."""
        stat = self.path.stat()
        return [str(self.path.resolve()), self.start, self.end, stat.st_size, stat.st_mtime_ns]


def name_of(config: DataConfig) -> str:
    """Return a name for the data that is safe in file names."""
    stem = Path(config.path.partition(":")[2] or config.path).stem
    return re.sub(r"[^\w.-]+", "-", stem) or "data"


def locate_data(config: DataConfig) -> Path:
    """Return the file or folder of `data.path`; raises UserError if it does not exist."""
    if config.path.startswith("bundled:"):
        return _bundled_path(config)
    path = Path(config.path).expanduser()
    if not config.path:
        names = ", ".join(f"bundled:{name}" for name in BUNDLED)
        raise DataError(f"data.path is empty; it must be a file, a folder or one of {names}")
    if not path.exists():
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        near = get_close_matches(path.name, siblings, 1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise ConfigError(f"data.path={config.path}: no such file or folder{hint}")
    return path


def _bundled_path(config: DataConfig) -> Path:
    name = config.path.removeprefix("bundled:")
    if name not in BUNDLED:
        near = get_close_matches(name, BUNDLED, 1, 0) or list(BUNDLED)
        raise ConfigError(
            f"data.path={config.path}: bundled are {', '.join(BUNDLED)}; "
            f"set data.path=bundled:{near[0]}"
        )
    kind, path = BUNDLED[name]
    if kind != READ_AS.get(config.kind, config.kind):
        raise ConfigError(f"data.kind={config.kind}: {config.path} is data.kind={kind}")
    return Path(str(files("trainer.data"))) / "bundled" / path


def read_listing(config: DataConfig, root: Path, suffixes: Suffixes) -> Listing:
    """Return the text or pair files of each split at data.path, and what is left out.

    Missing valid and test splits are cut from train by `split_parts`. Raises DataError if there is
    nothing to read, or if the entries can be read in two ways.
    """
    if root.is_file():
        return Listing({"train": [root]})
    where, notes = f"data.path={config.path}", list[str]()
    top, left_out = scan_folder(root)
    inner = _find_text_folder(suffixes, top, left_out)
    if inner is not top:
        notes.append(f"all of it is in {inner.relative}/")
    files = {entry: _text_files(suffixes, entry, left_out) for entry in inner.inside or ()}
    found = [entry for entry in files if files[entry] or split_of(entry.name)]
    named, others = splits_of(where, found, lambda entry: True)
    if not named:
        texts = [entry for entry in others if not entry.is_document] or others
        refuse_inner_splits(where, [file for entry in texts for file in files[entry]], inner)
        named, others = {"train": texts}, [entry for entry in others if entry not in texts]
    for entry in others:
        left_out[entry.relative] = DOCUMENT if entry.is_document else BESIDE
    splits = {
        split: _choose_files(config, suffixes, named[split], files, left_out) for split in named
    }
    if "train" not in splits:
        raise DataError(
            f"{where} has {', '.join(splits)} but no train split; add train{suffixes[0]} or "
            "a folder train/"
        )
    if not splits["train"]:
        raise DataError(f"{where} holds no {' or '.join(suffixes)} file with text")
    roles = [(file, f"the {s} split") for s in SPLITS for file in splits.get(s, ())]
    kept = unique_files(where, roles, left_out)
    paths = {s: [file.path for file in splits[s] if file.relative in kept] for s in splits}
    return Listing({s: paths[s] for s in SPLITS if s in paths}, left_out, notes)


def _find_text_folder(suffixes: Suffixes, top: Entry, left_out: dict[str, str]) -> Entry:
    """Return the innermost folder with all text; record in `left_out` what lies outside it."""

    def with_text(folder: Entry) -> list[Entry]:
        inside = [entry for entry in folder.inside or () if not entry.is_document]
        named = [e for e in inside if any(split_of(file.name) for file in e.iter_files())]
        return [entry for entry in inside if _text_files(suffixes, entry, {})] or named

    *around, inner = unwrap_folders(top, with_text, lambda entry: entry.inside is not None)
    for entry in (entry for folder in around for entry in folder.inside or ()):
        if entry.is_document:
            left_out[entry.relative] = DOCUMENT
        elif entry is not inner and entry not in around:
            _text_files(suffixes, entry, left_out)
    return inner


def _text_files(suffixes: Suffixes, entry: Entry, left_out: dict[str, str]) -> list[Entry]:
    """Return the readable files of an entry; record in `left_out` why others are not read."""
    found = []
    for file in entry.iter_files():
        if file.suffix not in suffixes:
            left_out[file.relative] = f"not a {' or '.join(suffixes)} file"
        elif file.size == 0 and not (file is entry and split_of(file.name)):
            left_out[file.relative] = "empty"
        else:
            found.append(file)
    return found


def _choose_files(
    config: DataConfig,
    suffixes: Suffixes,
    named: list[Entry],
    files: dict[Entry, list[Entry]],
    left_out: dict[str, str],
) -> list[Entry]:
    """Return the files of one split.

    Files of unknown suffix that are named after the split count only if there are no others.
    """
    chosen = [file for entry in named for file in files[entry]]
    if chosen:
        return chosen
    for entry in named:
        if entry.inside is not None:
            raise DataError(
                f"data.path={config.path}: {entry.location} holds no {' or '.join(suffixes)} "
                f"file, "
                f"which data.kind={config.kind} reads"
            )
        left_out.pop(entry.relative, None)
    return named


def split_parts(
    config: DataConfig, root: Path, suffixes: Suffixes, listing: Listing | None = None
) -> dict[str, list[FilePart]]:
    """Return the file parts of each split; a missing split is cut from the end of train."""
    found = (listing or read_listing(config, root, suffixes)).splits
    splits = {
        split: [_whole_file(config, suffixes, path) for path in paths]
        for split, paths in found.items()
    }
    missing = [split for split in ("valid", "test") if split not in splits]
    if missing:
        splits |= _hold_out(config, splits["train"], missing)
    return {split: splits[split] for split in SPLITS}


def _whole_file(config: DataConfig, suffixes: Suffixes, path: Path) -> FilePart:
    suffix = path.suffix.lower()
    if suffix in OTHER_FORMATS and suffix not in suffixes:
        instead = (
            "data.kind=images or another data.path"
            if suffix in PICTURES
            else f"data.path to {' or '.join(suffixes)} files"
        )
        raise DataError(
            f"data.kind={config.kind} reads UTF-8 text but {path} is a {suffix} file; set {instead}"
        )
    size = path.stat().st_size
    if size == 0:
        raise DataError(f"data.path={config.path}: {path} is empty; it must hold text")
    return FilePart(path, 0, size)


def _hold_out(
    config: DataConfig, train: list[FilePart], missing: list[str]
) -> dict[str, list[FilePart]]:
    """Cut the last `held_out` fraction off train and divide it equally among `missing` splits."""
    total = sum(part.end for part in train)
    kept = total * (1 - config.held_out)
    step = (total - kept) / len(missing)
    cuts = [0, *(round(kept + i * step) for i in range(len(missing))), total]
    splits = {}
    for split, start, end in zip(["train", *missing], cuts[:-1], cuts[1:], strict=True):
        splits[split] = list(_parts_between(train, start, end))
        if not splits[split]:
            raise ConfigError(
                f"data.held_out={config.held_out}: none of the {total} bytes at data.path="
                f"{config.path} is left for {split}; change data.held_out or give more text"
            )
    return splits


def _parts_between(parts: list[FilePart], start: int, end: int) -> Iterator[FilePart]:
    """Yield the parts between two bytes of their concatenation, moved on to starts of lines."""
    offset = 0
    for part in parts:
        low, high = (min(max(0, cut - offset), part.end) for cut in (start, end))
        low, high = (_line_start(part.path, cut) if cut < part.end else cut for cut in (low, high))
        if low < high:
            yield FilePart(part.path, low, high)
        offset += part.end


def _line_start(path: Path, cut: int) -> int:
    """Return the start of the first line (or, in a long line, character) at or after a byte."""
    if cut == 0:
        return 0
    with path.open("rb") as file:
        file.seek(cut - 1)
        ahead = file.readline(-1 if path.suffix.lower() in ONE_A_LINE else 1 << 16)
    line_break = ahead.find(b"\n")
    if line_break >= 0:
        return cut + line_break
    continuation = next((i for i, byte in enumerate(ahead[1:]) if byte & 0xC0 != 0x80), 0)
    return cut + continuation


def read_text(part: FilePart) -> Iterator[str]:
    """Yield the text of a part block by block, unchanged except for a leading byte order mark.

    Raises DataError, with the probable encoding, if it is not UTF-8 or contains NUL bytes.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    position, first = part.start, part.start == 0
    try:
        with part.path.open("rb") as file:
            file.seek(position)
            while position < part.end:
                pending = len(decoder.getstate()[0])
                block = file.read(min(BLOCK, part.end - position))
                if (nul := block.find(0)) >= 0 or block.startswith(UTF_16):
                    raise DataError(_not_text(part.path, position + max(0, nul), block))
                final = position + len(block) >= part.end or not block
                text = decoder.decode(block, final)
                if text and first:
                    text, first = text.removeprefix("\ufeff"), False
                yield text
                position = part.end if final else position + len(block)
    except UnicodeDecodeError as error:
        at, byte = position - pending + error.start, error.object[error.start]
        raise DataError(
            f"{part.path} is not UTF-8 at byte {at} (0x{byte:02x}); convert it, "
            f"e.g. {_guess_encoding(error.object, byte)}, or choose another data.path"
        ) from error
    except OSError as error:
        raise DataError(f"data.path: {part.path} cannot be read: {error.strerror}") from error


def _guess_encoding(block: bytes, first: int) -> str:
    """Return a command that converts a text from its probable encoding to UTF-8."""
    letters = [byte for byte in block[:GUESSED_ON] if byte >= 0x80 or chr(byte).isalpha()]
    guess = None
    if 3 * sum(byte >= 0x80 for byte in letters) > len(letters):  # no Latin script
        guess = from_bytes(block[:GUESSED_ON]).best()
    if guess and guess.encoding not in ("ascii", "utf_8"):
        encoding = ICONV.get(guess.encoding, guess.encoding.replace("_", "-"))
        return f"`iconv -f {encoding} -t utf-8` by its looks"
    encoding = "cp1252" if 0x80 <= first < 0xA0 else "latin1"
    return f"`iconv -f {encoding} -t utf-8` for Western European text"


UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def _not_text(path: Path, position: int, block: bytes) -> str:
    """Return the error message for a file with NULs: UTF-16 or UTF-32 text, or no text."""
    zeros = [block[start::4].count(0) * 4 / max(1, len(block)) > 0.2 for start in range(4)]
    order = {
        (False, True, True, True): "utf-32le",
        (True, True, True, False): "utf-32be",
        (False, True, False, True): "utf-16le",
        (True, False, True, False): "utf-16be",
    }.get((zeros[0], zeros[1], zeros[2], zeros[3]), "")
    if block.startswith(UTF_16):  # iconv removes the byte order mark
        order = "utf-32" if order.startswith("utf-32") else "utf-16"
    if order:
        return (
            f"{path} is not UTF-8 but {order.upper()}; convert it, `iconv -f {order} -t utf-8`, or "
            "choose another data.path"
        )
    return f"{path} holds a NUL at byte {position}, so it is not text; choose another data.path"
