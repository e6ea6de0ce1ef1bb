"""Tensors in the files of a checkpoint: one safetensors file per rank, and no pickle.

Which rank writes which chunk of a tensor follows from its placements (save_plan.py); which chunks a
rank of another layout reads, from the manifest.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from parallel.grad_norm import local_tensor
from parallel.parallelize import local_slices
from parallel.runtime import use_device
from parallel.store_tree import StoreTree
from trainer.checkpoint.manifest import Chunk, FileEntry, Manifest
from trainer.checkpoint.save_plan import plan_save

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
TORCH_DTYPES = {name: dtype for dtype, name in DTYPES.items()}
PIECE_BYTES = 1 << 24  # written and hashed at a time


class Shard:
    """This rank's part of a checkpoint, planned once and staged in host memory in file layout.

    Memory is allocated at the first copy and reused by every later one.
    """

    def __init__(self, tensors: Mapping[str, Tensor], tree: StoreTree):
        """Plan, with all other ranks, who writes what; every rank has each tensor or a part."""
        # Every tensor of the full checkpoint, on rank 0.
        self.tensors, names = plan_save(tensors, DTYPES, tree)
        self.total_bytes = sum(
            math.prod(entry.shape) * TORCH_DTYPES[entry.dtype].itemsize
            for entry in self.tensors.values()
        )
        parts = {name: local_tensor(tensors[name].detach()) for name in names}
        # Wide dtypes first, so that every tensor in the file is aligned to its width.
        mine = sorted(parts, key=lambda name: -parts[name].dtype.itemsize)
        self._parts = {name: (parts[name].dtype, parts[name].shape) for name in mine}
        self._buffer: Tensor | None = None
        self._copied: torch.cuda.Event | None = None

    def copy_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy the tensors, which may change as soon as this returns.

        On a GPU the copy is only queued; `write_file` waits for it.
        """
        cuda = any(tensors[name].is_cuda for name in self._parts)
        if self._buffer is None:
            self._buffer = torch.empty(self._part_ends()[-1], dtype=torch.uint8, pin_memory=cuda)
        begin = 0
        for (name, (dtype, sizes)), end in zip(self._parts.items(), self._part_ends(), strict=True):
            tensor = local_tensor(tensors[name].detach())
            assert tensor.shape == sizes and tensor.dtype == dtype, name
            self._buffer[begin:end].view(dtype).view(sizes).copy_(tensor, non_blocking=True)
            begin = end
        if cuda:
            self._copied = torch.cuda.Event()
            self._copied.record()

    def write_file(self, path: Path) -> FileEntry | None:
        """Write and fsync the copy; None if this rank writes nothing. Raises OSError."""
        if not self._parts:
            return None
        if self._copied is not None:
            use_device(self._copied.device)  # this is another thread than the copy's
            self._copied.synchronize()
        digest, size = hashlib.sha256(), 0
        with path.open("xb") as file:
            for piece in self._file_pieces():
                file.write(piece)
                digest.update(piece)
                size += len(piece)
            file.flush()
            os.fsync(file.fileno())
        return FileEntry(size, digest.hexdigest())

    def file_bytes(self) -> int:
        """Return the size of this rank's file in bytes."""
        return sum(map(len, self._file_pieces())) if self._buffer is not None else 0

    def _part_ends(self) -> list[int]:
        """Return the end of each part in the buffer; only 0 if there are none."""
        ends = [0]
        for dtype, sizes in self._parts.values():
            ends.append(ends[-1] + math.prod(sizes) * dtype.itemsize)
        return ends[1:] or ends

    def _file_pieces(self) -> Iterator[bytes | memoryview]:
        """Yield the file: length of the header, header, data
        (https://github.com/huggingface/safetensors).
        """
        assert self._buffer is not None
        begin, header = 0, {}
        for (name, (dtype, sizes)), end in zip(self._parts.items(), self._part_ends(), strict=True):
            header[name] = {
                "dtype": DTYPES[dtype],
                "shape": list(sizes),
                "data_offsets": [begin, end],
            }
            begin = end
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        yield len(text).to_bytes(8, "little") + text
        data = self._buffer.numpy().data
        for start in range(0, len(data), PIECE_BYTES):
            yield data[start : start + PIECE_BYTES]


def read_tensors(folder: Path, manifest: Manifest, tensors: Mapping[str, Tensor]) -> None:
    """Load full tensors, or the local shards of DTensors, from a checkpoint of any layout.

    The checkpoint must have been verified, and its names and shapes must match.
    """
    by_file: dict[str, list[tuple[str, Chunk]]] = {}
    for name, tensor in tensors.items():
        for chunk in manifest.tensors[name].overlapping(local_slices(tensor)):
            by_file.setdefault(chunk.file, []).append((name, chunk))
    for file_path, wanted in by_file.items():
        with safe_open(folder / file_path, framework="pt") as file:
            for name, chunk in wanted:
                there, here = _common_slices(chunk, local_slices(tensors[name]))
                found = file.get_slice(name)[there]
                local_tensor(tensors[name].detach())[here].copy_(found)


def _common_slices(
    chunk: Chunk, box: tuple[slice, ...]
) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Return the part that a chunk and a box share, counted from the chunk and from the box."""
    there, here = [], []
    for begin, size, side in zip(chunk.offsets, chunk.sizes, box, strict=True):
        first, last = max(begin, side.start), min(begin + size, side.stop)
        there.append(slice(first - begin, last - begin))
        here.append(slice(first - side.start, last - side.start))
    return tuple(there), tuple(here)


def read_whole(folder: Path, manifest: Manifest, name: str) -> Tensor:
    """Return one full tensor of a checkpoint, assembled from its chunks."""
    entry = manifest.tensors[name]
    whole = torch.empty(entry.shape, dtype=TORCH_DTYPES[entry.dtype])
    for chunk in entry.chunks:
        with safe_open(folder / chunk.file, framework="pt") as file:
            whole[_box_slices(chunk.offsets, chunk.sizes)] = file.get_tensor(name)
    return whole


def take_rows(parameter: Tensor, source: Tensor, rows: list[int]) -> None:
    """Copy rows of `source` (rows there, …) to the local shard of a parameter.

    `rows` maps each row of the parameter to its row in `source`, -1 = none.
    """
    here = local_slices(parameter)
    own = torch.tensor([*rows, *[-1] * (parameter.shape[0] - len(rows))][here[0]])
    known = own >= 0
    with torch.no_grad():
        part = local_tensor(parameter)
        part[known.to(part.device)] = source[own[known]][:, *here[1:]].to(part)


def _box_slices(offsets: tuple[int, ...], sizes: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(begin, begin + size) for begin, size in zip(offsets, sizes, strict=True))
