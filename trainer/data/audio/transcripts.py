"""Speech at data.path: the files of transcripts of each split, and their utterances.

Three layouts: TSV files, `path<TAB>transcript` a line; Common Voice's TSV files, whose first line
names the columns; LibriSpeech's folders, with a .trans.txt beside the recordings.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from trainer.config.train import DataConfig, DataError
from trainer.data.files import FilePart, split_parts
from trainer.data.folders import (
    BESIDE,
    DOCUMENT,
    SPLITS,
    Entry,
    Listing,
    scan_folder,
    split_of,
    unique_files,
)
from trainer.data.pairs import lines_before, read_lines

SUFFIXES = (".tsv", ".txt")
TRANSCRIPTS = ".trans.txt"  # of LibriSpeech: `ID TRANSCRIPT` a line, the recording beside it
RECORDINGS = (".flac", ".wav", ".ogg", ".opus", ".mp3")
CLIPS = "clips"  # Common Voice's folder of recordings, beside the TSV files
# Names of the columns, where a first line has them.
PATHS = ("path", "file", "audio")
TEXTS = ("transcript", "sentence", "text", "transcription")


@dataclass(frozen=True)
class Utterance:
    """A recording, or a file of its features, and its transcript."""

    path: Path
    transcript: str
    place: str  # the line that names it, for messages


def list_transcripts(config: DataConfig, root: Path) -> Listing:
    """List the files of transcripts of each split; raises DataError if there are none."""
    if root.is_file():
        return Listing({"train": [root]})
    where = f"data.path={config.path}"
    top, left_out = scan_folder(root)
    files = [file for file in top.iter_files() if not file.is_document]
    found = [file for file in files if file.name.endswith(TRANSCRIPTS)]
    if found:
        named = {file: _split_of_path(file) for file in found}
    else:
        tables = [file for file in files if file.suffix == SUFFIXES[0]]
        depth = min((file.relative.count("/") for file in tables), default=0)
        named = {file: split_of(file.name) for file in tables if file.relative.count("/") == depth}
    if not named:
        raise DataError(
            f"{where} holds no {SUFFIXES[0]} file of `path<TAB>transcript` lines, and no "
            f"{TRANSCRIPTS} file; data.kind={config.kind} reads train.tsv, valid.tsv and test.tsv"
        )
    if any(named.values()):
        for file in [file for file, split in named.items() if split is None]:
            left_out[file.relative] = DOCUMENT if file.is_document else BESIDE
            del named[file]
    splits: dict[str, list[Entry]] = {}
    for file, split in named.items():
        splits.setdefault(split or "train", []).append(file)
    if "train" not in splits:
        raise DataError(f"{where} has {', '.join(splits)} but no train split; add train.tsv")
    roles = [(file, f"the {split} split") for split in splits for file in splits[split]]
    kept = unique_files(where, roles, left_out)
    paths = {s: [file.path for file in splits[s] if file.relative in kept] for s in splits}
    return Listing({s: paths[s] for s in SPLITS if s in paths}, left_out)


def transcript_parts(
    config: DataConfig, root: Path, listing: Listing | None = None
) -> dict[str, list[FilePart]]:
    """Return the parts of files of each split; a missing split is cut from the end of train."""
    listing = listing or list_transcripts(config, root)
    return split_parts(config, root, SUFFIXES, listing)


def _split_of_path(file: Entry) -> str | None:
    """Return the split that a folder around a file is named after, e.g. dev-clean; None = none."""
    folders = file.relative.split("/")[:-1]
    return next((split for name in folders if (split := split_of(name))), None)


def read_utterances(part: FilePart) -> Iterator[Utterance]:
    """Yield the utterances of a part; raises DataError that names a malformed line."""
    by_name = part.path.name.endswith(TRANSCRIPTS)
    columns = None if by_name else _columns(part.path)
    first = lines_before(part) + 1
    for number, line in enumerate(read_lines(part), first):
        if not line.strip() or (number == 1 and columns is not None):
            continue
        place = f"line {number} of {part.path}"
        if by_name:
            name, _, transcript = line.strip().partition(" ")
            path = _find_recording(part.path.parent / name)
        else:
            cells = line.split("\t")
            at_path, at_text, width = columns or (0, 1, 2)
            if len(cells) != width:
                raise DataError(
                    f"data.path: {place} has {len(cells) - 1} tabs, not {width - 1}; every line "
                    "must be `path<TAB>transcript`, or have the columns that the first line names"
                )
            path, transcript = _locate(part.path.parent, cells[at_path].strip()), cells[at_text]
        yield Utterance(path, " ".join(transcript.split()), place)


@lru_cache
def _columns(path: Path) -> tuple[int, int, int] | None:
    """Return the numbers of the columns of path and transcript, and of all; None = no names."""
    with path.open("rb") as file:
        head = file.readline(1 << 16).decode("utf-8", "replace").removeprefix("\ufeff")
    names = [name.strip().lower() for name in head.split("\t")]
    at_path = next((names.index(name) for name in PATHS if name in names), None)
    at_text = next((names.index(name) for name in TEXTS if name in names), None)
    return None if at_path is None or at_text is None else (at_path, at_text, len(names))


def _locate(folder: Path, name: str) -> Path:
    """Return the path of a recording named in a TSV file of this folder."""
    path = folder / Path(name).expanduser()
    clip = folder / CLIPS / name
    return clip if not path.exists() and clip.exists() else path


def _find_recording(stem: Path) -> Path:
    """Return the recording of this name without its suffix; if there is none, the usual one."""
    paths = [stem.with_name(stem.name + suffix) for suffix in RECORDINGS]
    return next((path for path in paths if path.is_file()), paths[0])
