"""Tensors in the files of a checkpoint: one safetensors file per rank, and no pickle.

torch.distributed.checkpoint plans which rank writes which chunk of a tensor, and which chunks a
rank of another layout reads; the file format is ours.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from torch import distributed as dist
from torch.distributed.checkpoint.default_planner import (
    DefaultSavePlanner,
    create_default_local_load_plan,
    create_default_local_save_plan,
)
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem, SavePlan, WriteItem

from parallel.grad_norm import local_tensor
from parallel.parallelize import local_slices
from trainer.checkpoint.manifest import Chunk, FileEntry, Manifest, TensorEntry

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


def file_name(rank: int) -> str:
    """Return the file that a rank writes."""
    return f"rank-{rank:05d}.safetensors"


class Shard:
    """This rank's part of a checkpoint, planned once and staged in host memory in file layout.

    Memory is allocated at the first copy and reused by every later one.
    """

    def __init__(self, tensors: Mapping[str, Tensor]):
        """Plan, with all other ranks, who writes what; every rank has each tensor or a part."""
        plan = create_default_local_save_plan(dict(tensors), dist.get_rank() == 0)
        # A rank may have no rows of a small tensor.
        plan = replace(
            plan, items=[item for item in plan.items if all(_chunk_metadata(item).sizes)]
        )
        plans: list[SavePlan] = [plan] * dist.get_world_size()
        dist.all_gather_object(plans, plan)
        # A replicated tensor is written by the rank with the fewest bytes to write.
        planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        plans, metadata = planner.create_global_plan(plans)
        self.tensors = _merge_plans(plans, metadata)  # of the full checkpoint
        self.total_bytes = sum(
            math.prod(entry.shape) * TORCH_DTYPES[entry.dtype].itemsize
            for entry in self.tensors.values()
        )
        # Wide dtypes first, so that every tensor in the file is aligned to its width.
        mine = sorted(plans[dist.get_rank()].items, key=lambda i: -_dtype_of(i).itemsize)
        self._parts = {
            item.index.fqn: (_dtype_of(item), _chunk_metadata(item).sizes) for item in mine
        }
        assert len(self._parts) == len(mine), "a rank has one part of a tensor"
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
    wanted = {name: manifest.tensors[name] for name in tensors}
    items = create_default_local_load_plan(dict(tensors), _dcp_metadata(wanted)).items
    by_file: dict[str, list[ReadItem]] = {}
    for item in items:
        chunk = wanted[item.storage_index.fqn].chunks[item.storage_index.index or 0]
        by_file.setdefault(chunk.file, []).append(item)
    for name, wanted_items in by_file.items():
        with safe_open(folder / name, framework="pt") as file:
            for item in wanted_items:
                there = file.get_slice(item.storage_index.fqn)
                found = there[_box_slices(item.storage_offsets, item.lengths)]
                here = local_tensor(tensors[item.dest_index.fqn].detach())
                here[_box_slices(item.dest_offsets, item.lengths)].copy_(found)


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


def _chunk_metadata(item: WriteItem) -> ChunkStorageMetadata:
    assert item.tensor_data is not None and item.tensor_data.chunk is not None
    return item.tensor_data.chunk


def _dtype_of(item: WriteItem) -> torch.dtype:
    assert item.tensor_data is not None
    return item.tensor_data.properties.dtype


def _merge_plans(plans: list[SavePlan], metadata: Metadata) -> dict[str, TensorEntry]:
    """Return the tensors that all ranks write together, by name."""
    chunks: dict[str, list[Chunk]] = {}
    for rank, plan in enumerate(plans):
        for item in plan.items:
            box = Chunk(
                tuple(_chunk_metadata(item).offsets),
                tuple(_chunk_metadata(item).sizes),
                file_name(rank),
            )
            chunks.setdefault(item.index.fqn, []).append(box)
    found = {}
    for name, entry in metadata.state_dict_metadata.items():
        assert isinstance(entry, TensorStorageMetadata), name
        shape, dtype = tuple(entry.size), DTYPES[entry.properties.dtype]
        found[name] = TensorEntry(dtype, shape, tuple(chunks[name]))
        held = sum(math.prod(chunk.sizes) for chunk in chunks[name])
        assert held == math.prod(shape), f"the ranks have {held} numbers of {name} {shape}"
    return found


def _dcp_metadata(tensors: Mapping[str, TensorEntry]) -> Metadata:
    """Return a manifest's tensors as metadata of torch.distributed.checkpoint."""
    return Metadata(
        {
            name: TensorStorageMetadata(
                TensorProperties(TORCH_DTYPES[entry.dtype]),
                torch.Size(entry.shape),
                [
                    ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.sizes))
                    for chunk in entry.chunks
                ],
            )
            for name, entry in tensors.items()
        }
    )
