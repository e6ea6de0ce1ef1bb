"""Who writes which part of a checkpoint, derived from the tensors' placements.

Ranks that hold the same tensors in the same way describe them alike, so that one description per
mesh says where every chunk is: nothing is gathered but the digests of the descriptions.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from itertools import groupby, product
from math import prod
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard as Split
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import Placement, Replicate, _StridedShard

from parallel.store_tree import StoreTree
from trainer.checkpoint.manifest import Grid, TensorEntry, row_number

Ranges = list[list[int]]  # first and last rank of each run of ranks
SPLIT, STRIDED = "split", "strided"


@dataclass(frozen=True)
class Section:
    """Tensors that the same ranks hold: on one mesh, or (`mesh` = ()) whole on each rank.

    A tensor is its name, dtype, shape and placement on each dim of the mesh.
    """

    mesh: tuple[int, ...]  # the mesh's shape
    ranks: tuple[int, ...]  # its ranks, row by row
    tensors: tuple[tuple[str, str, tuple[int, ...], tuple], ...]

    @property
    def digest(self) -> str:
        """Return a short name of what this section says."""
        return blake2b(self.to_json().encode(), digest_size=12).hexdigest()

    def to_json(self) -> str:
        """Return the section as text."""
        return json.dumps([self.mesh, self.ranks, self.tensors])

    @classmethod
    def from_json(cls, text: str | bytes) -> "Section":
        """Return the section that a text says."""
        mesh, ranks, tensors = json.loads(text)
        parsed = tuple((n, d, tuple(s), tuple(map(tuple, p))) for n, d, s, p in tensors)
        return cls(tuple(mesh), tuple(ranks), parsed)


def describe_tensors(tensors: Mapping[str, Tensor], dtypes: Mapping[Any, str]) -> list[Section]:
    """Return this rank's tensors as sections, those that it holds whole last."""
    found: dict[tuple, list] = {}
    for name, tensor in tensors.items():
        mesh: tuple = ((), ())
        placements: tuple = ()
        if isinstance(tensor, DTensor):
            there = tensor.device_mesh.mesh
            mesh = tuple(there.shape), tuple(there.flatten().tolist())
            placements = tuple(map(_placement_words, tensor.placements))
        found.setdefault(mesh, []).append(
            (name, dtypes[tensor.dtype], tuple(tensor.shape), placements)
        )
    found[(), ()] = found.pop(((), ()), [])
    return [Section(shape, ranks, tuple(held)) for (shape, ranks), held in found.items()]


def _placement_words(placement: Placement) -> tuple:
    if isinstance(placement, _StridedShard):
        return STRIDED, placement.dim, placement.split_factor
    return (SPLIT, placement.dim) if isinstance(placement, Split) else ()


def _parse_placement(words: tuple) -> Placement:
    if not words:
        return Replicate()
    if words[0] == STRIDED:
        return _StridedShard(words[1], split_factor=words[2])
    return Split(words[1])


Copies = dict[str, int]  # by tensor name, the number of the copy that is written


def plan_sections(
    sections: Mapping[str, Section], tree: StoreTree
) -> tuple[dict[str, TensorEntry], dict[str, tuple[list[int], Copies]]]:
    """Agree on what each rank writes; a collective call over the tree.

    Returns every tensor of the checkpoint on rank 0, and for each of this rank's sections, which
    are given by digest, its ranks and which copy of each tensor is written.
    """
    for digest, section in sections.items():
        if tree.store.add(f"plan/{digest}/known", 1) == 1:
            tree.store.set(f"plan/{digest}", section.to_json())
    entries: dict[str, TensorEntry] = {}
    if held := tree.gather("plan/held", list(sections)):
        entries = _plan_all(held, tree)
    answers = {}
    for digest, section in sections.items():
        answer = tree.hear(f"plan/{digest}/answer")
        ranks = list(section.ranks) or _expand_ranges(answer["ranks"])
        answers[digest] = ranks, _choose_copies(section, len(ranks), set(answer["elsewhere"]))
    return entries, answers


def plan_save(
    tensors: Mapping[str, Tensor], dtypes: Mapping[Any, str], tree: StoreTree
) -> tuple[dict[str, TensorEntry], list[str]]:
    """Return every tensor of the checkpoint, on rank 0, and the names of those of which this rank
    writes its part.

    A collective call over the tree; every rank has each tensor, or a part of it.
    """
    sections = {section.digest: section for section in describe_tensors(tensors, dtypes)}
    entries, answers = plan_sections(sections, tree)
    parts = []
    for digest, (ranks, copies) in answers.items():
        for name, copy in copies.items():
            if _is_writer(tree.rank, sections[digest], ranks, tensors[name], copy):
                parts.append(name)
    return entries, parts


def _plan_all(held: Mapping[int, Sequence[str]], tree: StoreTree) -> dict[str, TensorEntry]:
    """Return every tensor, and answer each section: its ranks, and what other sections write."""
    entries: dict[str, TensorEntry] = {}
    holders: dict[str, list[int]] = {}
    for rank in sorted(held):
        for digest in held[rank]:
            holders.setdefault(digest, []).append(rank)
    for digest, ranks in holders.items():
        section = Section.from_json(tree.store.get(f"plan/{digest}"))
        ranks = list(section.ranks) or ranks
        elsewhere = [name for name, *_ in section.tensors if name in entries]
        copies = _choose_copies(section, len(ranks), set(elsewhere))
        for name, dtype, shape, placements in section.tensors:
            if name in copies:
                grid = chunk_grid(section.mesh, tuple(ranks), shape, placements, copies[name])
                entries[name] = TensorEntry(dtype, shape, grid)
        answer = {"ranks": _compress_ranges(ranks), "elsewhere": elsewhere}
        tree.tell(f"plan/{digest}/answer", answer)
    return entries


def _choose_copies(section: Section, ranks: int, elsewhere: set[str]) -> Copies:
    """Map each tensor to the number of the copy that is written: that with the fewest bytes."""
    loads: dict[tuple, list[int]] = {}
    chosen = {}
    for name, _, shape, placements in section.tensors:
        if name in elsewhere:
            continue
        kept = tuple(dim for dim, words in enumerate(placements) if not words)
        count = prod(section.mesh[dim] for dim in kept) if section.mesh else ranks
        load = loads.setdefault(kept, [0] * count)
        chosen[name] = copy = load.index(min(load))
        load[copy] += prod(shape)
    return chosen


@lru_cache(maxsize=4096)
def chunk_grid(
    mesh: tuple[int, ...],
    ranks: tuple[int, ...],
    shape: tuple[int, ...],
    placements: tuple[tuple, ...],
    copy: int,
) -> Grid:
    """Return the chunks of a tensor and the ranks that write them, from its placements alone."""
    if not mesh:
        return Grid(tuple((0,) for _ in shape), shape, (ranks[copy],))
    how = [_parse_placement(words) for words in placements]
    cells: dict[tuple[int, ...], int] = {}
    for coordinate in _writing_coordinates(mesh, placements, copy):
        sizes, offsets = _compute_local_shape_and_global_offset(shape, mesh, list(coordinate), how)
        if all(sizes):
            cells[tuple(offsets)] = ranks[row_number(coordinate, mesh)]
    cuts = tuple(tuple(sorted({place[dim] for place in cells})) for dim in range(len(shape)))
    return Grid(cuts, shape, tuple(cells[place] for place in product(*cuts)))


def _writing_coordinates(mesh: tuple[int, ...], placements: tuple[tuple, ...], copy: int) -> Any:
    """Return the mesh coordinates that hold copy number `copy` of some chunk."""
    kept = [dim for dim, words in enumerate(placements) if not words]
    own = dict(zip(kept, _coordinate(copy, tuple(mesh[dim] for dim in kept)), strict=True))
    return product(*([own[dim]] if dim in own else range(n) for dim, n in enumerate(mesh)))


def _coordinate(number: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    found = []
    for size in reversed(shape):
        number, place = divmod(number, size)
        found.append(place)
    return tuple(reversed(found))


def _is_writer(
    rank: int, section: Section, ranks: Sequence[int], tensor: Tensor, copy: int
) -> bool:
    """Return whether this rank's part of a tensor is that of the chosen copy, and not empty."""
    if not section.mesh:
        return ranks[copy] == rank and all(tensor.shape)
    assert isinstance(tensor, DTensor)
    place = _coordinate(ranks.index(rank), section.mesh)
    kept = [dim for dim, how in enumerate(tensor.placements) if not _placement_words(how)]
    number = row_number([place[dim] for dim in kept], [section.mesh[dim] for dim in kept])
    return number == copy and all(tensor.to_local().shape)


def _compress_ranges(ranks: Sequence[int]) -> Ranges:
    """Return runs of consecutive ranks, in the order of `ranks`."""
    runs = groupby(enumerate(ranks), key=lambda pair: pair[1] - pair[0])
    found = [[rank for _, rank in run] for _, run in runs]
    return [[run[0], run[-1]] for run in found]


def _expand_ranges(ranges: Ranges) -> list[int]:
    return [rank for first, last in ranges for rank in range(first, last + 1)]
