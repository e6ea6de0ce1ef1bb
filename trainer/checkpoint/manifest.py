"""The manifest of a checkpoint, and its verification; free of torch.

The manifest begins with a checksum of all its other bytes, in every version of the format. A
checkpoint may be damaged or come from an untrusted source: nothing in it is executed, and no path
in it may point outside the folder.
"""

import hashlib
import json
import math
import os
import re
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise, product
from pathlib import Path
from typing import Any, TypeVar

from trainer.atomic_files import sync_folder

Number = TypeVar("Number", int, float)

FORMAT = 2  # version 1 lists the chunks of every tensor
READS = (1, 2)
NAME = "manifest.json"
_HEAD = b'{"sha256": "'
_DIGITS = 64


class CorruptCheckpointError(Exception):
    """A corrupt checkpoint; the message names the file and the damage."""


class UnsupportedFormatError(CorruptCheckpointError):
    """A checkpoint in the format of another version; it may be intact."""


@dataclass(frozen=True)
class Chunk:
    """A chunk of a tensor, and the file that stores it under the tensor's name."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str


def file_name(rank: int) -> str:
    """Return the file that a rank writes."""
    return f"rank-{rank:05d}.safetensors"


def row_number(place: Sequence[int], shape: Sequence[int]) -> int:
    """Return the number of a place in a grid of this shape, counted row by row."""
    number = 0
    for row, size in zip(place, shape, strict=True):
        number = number * size + row
    return number


@dataclass(frozen=True)
class Grid:
    """The chunks of a tensor as a grid; many tensors share one."""

    cuts: tuple[tuple[int, ...], ...]  # per dim, where its rows of chunks begin
    shape: tuple[int, ...]
    ranks: tuple[int, ...]  # that have written them, row by row

    def __iter__(self) -> Iterator[Chunk]:
        return self.overlapping(tuple(slice(0, size) for size in self.shape))

    def __len__(self) -> int:
        return len(self.ranks)

    def overlapping(self, box: tuple[slice, ...]) -> Iterator[Chunk]:
        """Yield the chunks that have elements in a box of the tensor."""
        if not self.ranks or any(side.start >= side.stop for side in box):
            return
        rows = [
            range(bisect_right(cuts, side.start) - 1, bisect_right(cuts, side.stop - 1))
            for cuts, side in zip(self.cuts, box, strict=True)
        ]
        for place in product(*rows):
            number = row_number(place, [len(cuts) for cuts in self.cuts])
            offsets = tuple(cuts[row] for cuts, row in zip(self.cuts, place, strict=True))
            ends = (
                (*cuts[1:], size)[row]
                for cuts, row, size in zip(self.cuts, place, self.shape, strict=True)
            )
            sizes = tuple(end - begin for begin, end in zip(offsets, ends, strict=True))
            yield Chunk(offsets, sizes, file_name(self.ranks[number]))


@dataclass(frozen=True)
class TensorEntry:
    """A full tensor: its safetensors dtype, and its chunks."""

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...] | Grid

    def overlapping(self, box: tuple[slice, ...]) -> Iterator[Chunk]:
        """Yield the chunks that have elements in a box of the tensor."""
        if isinstance(self.chunks, Grid):
            yield from self.chunks.overlapping(box)
            return
        for chunk in self.chunks:
            sides = zip(chunk.offsets, chunk.sizes, box, strict=True)
            if all(begin < s.stop and s.start < begin + size for begin, size, s in sides):
                yield chunk


@dataclass(frozen=True)
class FileEntry:
    """A file's size in bytes and its digest."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The contents of one checkpoint: run, step, layout, configuration, tensors and files."""

    run: str  # the same for all checkpoints of a run
    step: int
    layout: dict[str, int]  # the degrees, and the number of ranks, that wrote it
    config: dict[str, Any]  # the identity keys of the run (identity.py)
    data: str  # fingerprint of the training data; empty = unknown
    eval_loss: float | None  # on the valid split at this very step, if evaluated and finite
    tensors: dict[str, TensorEntry]
    files: dict[str, FileEntry]
    # Not written by versions that counted the data in steps; None = unknown.
    samples: int | None = None  # samples trained on or skipped so far: the data's position
    order_batch_size: int | None = None  # batch_size when the run started (sampler.py)
    lr: float | None = None  # of the next step, by the schedule of the run that wrote it
    # Digests of frozen weights, by name, which the checkpoint of an adapter does not hold.
    base: dict[str, str] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Return the total size of all files in bytes."""
        return sum(file.size for file in self.files.values())


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write a folder's manifest, and fsync it and the folder."""
    body = json.dumps({"format": FORMAT, **_to_json(manifest)}, allow_nan=False).encode()
    text = _HEAD + b"0" * _DIGITS + b'",\n' + body[1:]
    digest = hashlib.sha256(text).hexdigest().encode()
    with (folder / NAME).open("xb") as file:
        file.write(text.replace(b"0" * _DIGITS, digest, 1))
        file.flush()
        os.fsync(file.fileno())
    sync_folder(folder)


def _to_json(manifest: Manifest) -> dict[str, Any]:
    """Return a manifest's values, each grid once."""
    grids: dict[Grid, int] = {}
    tensors = {}
    for name, entry in manifest.tensors.items():
        held: dict[str, Any] = {"dtype": entry.dtype, "shape": entry.shape}
        if isinstance(entry.chunks, Grid):
            held["grid"] = grids.setdefault(entry.chunks, len(grids))
        else:
            held["chunks"] = [asdict(chunk) for chunk in entry.chunks]
        tensors[name] = held
    plain = {name: getattr(manifest, name) for name in manifest.__dataclass_fields__}
    files = {name: asdict(entry) for name, entry in manifest.files.items()}
    shared = [{"cuts": grid.cuts, "ranks": grid.ranks} for grid in grids]
    return plain | {"tensors": tensors, "files": files, "grids": shared}


def read_manifest(folder: Path) -> Manifest:
    """Return a folder's manifest; raises CorruptCheckpointError or UnsupportedFormatError."""
    path = folder / NAME
    if (folder / ".metadata").exists() and not path.exists():
        raise UnsupportedFormatError(
            ".metadata: this is a checkpoint of torch.distributed.checkpoint, as versions before "
            f"format {FORMAT} wrote them; it holds pickled code and is not read"
        )
    text = _read_bytes(path)
    head = len(_HEAD)
    digest = text[head : head + _DIGITS]
    zeroed = text[:head] + b"0" * _DIGITS + text[head + _DIGITS :]
    if not text.startswith(_HEAD) or hashlib.sha256(zeroed).hexdigest().encode() != digest:
        raise CorruptCheckpointError(f"{NAME} is garbled: it does not fit its own checksum")
    try:
        body = json.loads(text)
        version = body["format"]
        if version not in READS:
            raise UnsupportedFormatError(
                f"{NAME} is of format version {version}, this version reads {READS[0]} to "
                f"{READS[-1]}; use the version that wrote it"
            )
        return _parse_manifest(body)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CorruptCheckpointError(f"{NAME} is not a manifest: {error!r}") from error


def _read_bytes(path: Path) -> bytes:
    problem = _unreadable_message(path)
    if problem:
        raise CorruptCheckpointError(problem)
    try:
        return path.read_bytes()
    except OSError as error:
        raise CorruptCheckpointError(f"{path.name} cannot be read: {error.strerror}") from error


def _unreadable_message(path: Path) -> str:
    if path.is_symlink():
        return f"{path.name} is a link, which is not followed"
    if not path.is_file():
        return f"{path.name} is missing"
    return ""


def _parse_manifest(body: dict[str, Any]) -> Manifest:
    files = {name: FileEntry(int(f["size"]), str(f["sha256"])) for name, f in body["files"].items()}
    grids = [_parse_grid(grid, files) for grid in body.get("grids", [])]
    tensors = {name: _parse_tensor(entry, grids) for name, entry in body["tensors"].items()}
    for name in files:
        if not re.fullmatch(r"[\w.-]+", name) or name.startswith(".") or name == NAME:
            raise ValueError(f"the file name {name!r} is none that a checkpoint has")
    for name, tensor in tensors.items():
        if isinstance(tensor.chunks, Grid):
            continue
        held = sum(math.prod(chunk.sizes) for chunk in tensor.chunks)
        if held != math.prod(tensor.shape) or not all(
            _is_chunk_inside(c, tensor) for c in tensor.chunks
        ):
            raise ValueError(f"the chunks of {name} do not make up {tensor.shape}")
        if not {chunk.file for chunk in tensor.chunks} <= files.keys():
            raise ValueError(f"{name} is in a file that is not listed")
    loss = body["eval_loss"]
    return Manifest(
        str(body["run"]),
        int(body["step"]),
        dict(body["layout"]),
        dict(body["config"]),
        str(body["data"]),
        None if loss is None else float(loss),
        tensors,
        files,
        _parse_number(int, body.get("samples")),
        _parse_number(int, body.get("order_batch_size")),
        _parse_number(float, body.get("lr")),
        {str(name): str(digest) for name, digest in body.get("base", {}).items()},
    )


def _parse_number(kind: Callable[[Any], Number], value: Any) -> Number | None:
    if value is None:
        return None
    if not kind(value) >= 0:
        raise ValueError(f"{value} is negative")
    return kind(value)


def _parse_grid(grid: dict[str, Any], files: dict[str, FileEntry]) -> Grid:
    """Return a grid, still without its tensor's shape; raises ValueError if a file is missing."""
    cuts, ranks = tuple(_parse_ints(c) for c in grid["cuts"]), _parse_ints(grid["ranks"])
    if math.prod(map(len, cuts)) != len(ranks) or not {file_name(r) for r in ranks} <= files.keys():
        raise ValueError("a grid of chunks is in files that are not listed")
    return Grid(cuts, (), ranks)


def _parse_tensor(entry: dict[str, Any], grids: list[Grid]) -> TensorEntry:
    dtype, shape = str(entry["dtype"]), _parse_ints(entry["shape"])
    if "grid" not in entry:
        chunks = (
            Chunk(_parse_ints(c["offsets"]), _parse_ints(c["sizes"]), c["file"])
            for c in entry["chunks"]
        )
        return TensorEntry(dtype, shape, tuple(chunks))
    if not 0 <= (number := int(entry["grid"])) < len(grids):
        raise ValueError(f"there is no grid {number}")
    grid = replace(grids[number], shape=shape)
    for cuts, size in zip(grid.cuts, shape, strict=True):
        if size and (cuts[:1] != (0,) or any(a >= b for a, b in pairwise((*cuts, size)))):
            raise ValueError(f"the chunks of a tensor do not make up {shape}")
    return TensorEntry(dtype, shape, grid)


def _parse_ints(values: list) -> tuple[int, ...]:
    return tuple(map(int, values))


def _is_chunk_inside(chunk: Chunk, tensor: TensorEntry) -> bool:
    boxes = zip(chunk.offsets, chunk.sizes, tensor.shape, strict=True)
    return all(begin >= 0 < size and begin + size <= whole for begin, size, whole in boxes)


def check_folder(folder: Path, *, hashed: Collection[str] | None = None) -> Manifest:
    """Return the manifest of a folder after checking that all files exist with the right size.

    The contents of the files in `hashed` (None = all) are compared too. Raises
    CorruptCheckpointError for the first problem, as `read_manifest` does.
    """
    manifest = read_manifest(folder)
    problems = file_problems(folder, manifest, manifest.files if hashed is None else hashed)
    if problems:
        raise CorruptCheckpointError(problems[0])
    return manifest


def file_problems(folder: Path, manifest: Manifest, hashed: Collection[str]) -> list[str]:
    """Return the differences between a folder and its manifest, hashing the files in `hashed`."""
    named = re.fullmatch(r"step-(\d+)", folder.name)
    problems = []
    if named and int(named[1]) != manifest.step:
        problems.append(f"{NAME} is that of step {manifest.step}")
    for name, entry in manifest.files.items():
        path = folder / name
        problem = _unreadable_message(path)
        try:
            size = 0 if problem else path.stat().st_size
            if problem:
                problems.append(problem)
            elif size != entry.size:
                problems.append(f"{name} has {size:,} bytes, not {entry.size:,}")
            elif name in hashed and _file_digest(path) != entry.sha256:
                problems.append(
                    f"{name} is not what was saved: its {size:,} bytes have another SHA-256 than "
                    f"{NAME} says"
                )
        except OSError as error:
            problems.append(f"{name} cannot be read: {error.strerror}")
    return problems


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
