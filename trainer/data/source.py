"""Where data come from: files, folders and what is bundled, found, split and read as UTF-8."""

import codecs
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from typing import Any

from trainer.config import ConfigError, DataConfig

SPLITS = ("train", "valid", "test")
SPELLINGS = {"train": ("train",), "valid": ("valid", "validation", "val", "dev"), "test": ("test",)}
BUNDLED = {
    "shakespeare": ("text", "shakespeare"),
    "fashion-mnist": ("images", "fashion-mnist-6k.npz"),
    "home-assistant": ("pairs", "home-assistant-en-de"),
}
SUFFIXES = {"text": (".txt", ".text", ".md", ".rst"), "pairs": (".tsv", ".txt")}
BLOCK = 1 << 20  # bytes read at once


@dataclass(frozen=True)
class Part:
    """Bytes [start, end) of a file."""

    path: Path
    start: int
    end: int

    def fingerprint(self) -> list[Any]:
        """What changes when the file does."""
        stat = self.path.stat()
        return [str(self.path.resolve()), self.start, self.end, stat.st_size, stat.st_mtime_ns]


@dataclass(frozen=True)
class Listing:  # STUB until merged
    files: dict
    left_out: dict
    notes: list


def read_listing(config, root):
    return Listing({}, {}, [])


def name_of(config: DataConfig) -> str:
    """A file name for the data."""
    stem = Path(config.path.partition(":")[2] or config.path).stem
    return re.sub(r"[^\w.-]+", "-", stem) or "data"


def locate(config: DataConfig) -> Path:
    """The file or folder of `data.path`, which is there and readable; ConfigError otherwise."""
    if config.path.startswith("bundled:"):
        return _bundled(config)
    path = Path(config.path).expanduser()
    if not config.path:
        names = ", ".join(f"bundled:{name}" for name in BUNDLED)
        raise ConfigError(f"data.path is empty; it must be a file, a folder or one of {names}")
    if not path.exists():
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        near = get_close_matches(path.name, siblings, 1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise ConfigError(f"data.path={config.path}: no such file or folder{hint}")
    return path


def _bundled(config: DataConfig) -> Path:
    name = config.path.removeprefix("bundled:")
    if name not in BUNDLED:
        near = get_close_matches(name, BUNDLED, 1, 0) or list(BUNDLED)
        raise ConfigError(
            f"data.path={config.path}: bundled are {', '.join(BUNDLED)}; "
            f"set data.path=bundled:{near[0]}"
        )
    kind, path = BUNDLED[name]
    if kind != config.kind:
        raise ConfigError(f"data.kind={config.kind}: {config.path} is data.kind={kind}")
    return Path(str(files("trainer.data"))) / "bundled" / path


def split_entries(folder: Path) -> dict[str, list[Path]]:
    """The entries of a folder that are named after a split: train.txt, valid/, ..."""
    found: dict[str, list[Path]] = {}
    for entry in sorted(folder.iterdir()):
        stem = entry.name.split(".")[0]
        split = next((s for s in SPLITS if stem in SPELLINGS[s]), None)
        if split and not entry.name.endswith("~"):
            found.setdefault(split, []).append(entry)
    return found


def split_parts(config: DataConfig, root: Path) -> dict[str, list[Part]]:
    """The parts of files that make each split; a split that is missing is cut from train's end."""
    suffixes = SUFFIXES[config.kind]
    if root.is_file():
        found = {"train": [root]}
    else:
        entries = split_entries(root)
        found = {s: _expand(config, paths, suffixes) for s, paths in entries.items()}
        if not found:
            found = {"train": _expand(config, [root], suffixes)}
    if "train" not in found:
        raise ConfigError(
            f"data.path={config.path} has {', '.join(found)} but no train split; add "
            f"train{suffixes[0]} or a folder train/"
        )
    splits = {split: [_whole(config, path) for path in paths] for split, paths in found.items()}
    missing = [split for split in ("valid", "test") if split not in splits]
    if missing:
        splits |= _hold_out(config, splits["train"], missing)
    return {split: splits[split] for split in SPLITS}


def _expand(config: DataConfig, paths: list[Path], suffixes: Sequence[str]) -> list[Path]:
    expanded: list[Path] = []
    for path in paths:
        inside = sorted(p for p in path.rglob("*") if p.suffix in suffixes and p.is_file())
        if path.is_dir() and not inside:
            raise ConfigError(
                f"data.path={config.path}: {path} holds no {' or '.join(suffixes)} file, which "
                f"data.kind={config.kind} reads"
            )
        expanded += inside if path.is_dir() else [path]
    return expanded


def _whole(config: DataConfig, path: Path) -> Part:
    if path.suffix in (".npz", ".npy", ".png", ".jpg"):
        raise ConfigError(
            f"data.kind={config.kind} reads UTF-8 text but {path} is a {path.suffix} file; "
            "set data.kind=images or another data.path"
        )
    size = path.stat().st_size
    if size == 0:
        raise ConfigError(f"data.path={config.path}: {path} is empty; it must hold text")
    return Part(path, 0, size)


def _hold_out(config: DataConfig, train: list[Part], missing: list[str]) -> dict[str, list[Part]]:
    """Train without its last `held_out` share, and that share in equal parts for the others."""
    total = sum(part.end for part in train)
    kept = total * (1 - config.held_out)
    step = (total - kept) / len(missing)
    cuts = [0, *(round(kept + i * step) for i in range(len(missing))), total]
    splits = {}
    for split, start, end in zip(["train", *missing], cuts[:-1], cuts[1:], strict=True):
        splits[split] = list(_between(train, start, end))
        if not splits[split]:
            raise ConfigError(
                f"data.held_out={config.held_out}: nothing of the {total} bytes at data.path="
                f"{config.path} is left for {split}; change data.held_out or give more text"
            )
    return splits


def _between(parts: list[Part], start: int, end: int) -> Iterator[Part]:
    """What of the parts lies between two bytes of their concatenation, in whole lines."""
    offset = 0
    for part in parts:
        low, high = (min(max(0, cut - offset), part.end) for cut in (start, end))
        low, high = (_line_start(part.path, cut) if cut < part.end else cut for cut in (low, high))
        if low < high:
            yield Part(part.path, low, high)
        offset += part.end


def _line_start(path: Path, cut: int) -> int:
    """The start of the first line (or, in a long line, character) at or after a byte."""
    if cut == 0:
        return 0
    with path.open("rb") as file:
        file.seek(cut - 1)
        ahead = file.read(1 << 16)
    line_break = ahead.find(b"\n")
    if line_break >= 0:
        return cut + line_break
    continuation = next((i for i, byte in enumerate(ahead[1:]) if byte & 0xC0 != 0x80), 0)
    return cut + continuation


def read_text(part: Part) -> Iterator[str]:
    """The text of a part, block by block, unchanged but for a byte order mark at its start."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    position = part.start
    try:
        with part.path.open("rb") as file:
            file.seek(position)
            while position < part.end:
                pending = len(decoder.getstate()[0])
                block = file.read(min(BLOCK, part.end - position))
                final = position + len(block) >= part.end or not block
                text = decoder.decode(block, final)
                yield text.removeprefix("\ufeff") if position == 0 else text
                position = part.end if final else position + len(block)
    except UnicodeDecodeError as error:
        at = position - pending + error.start
        raise ConfigError(
            f"{part.path} is not UTF-8 at byte {at} (0x{error.object[error.start]:02x}); "
            f"convert it, e.g. `iconv -f latin1 -t utf-8`, or choose another data.path"
        ) from error
    except OSError as error:
        raise ConfigError(f"data.path: {part.path} cannot be read: {error.strerror}") from error
