"""Per-tensor differences of two checkpoints."""

from pathlib import Path

import torch
from rich.console import Console
from rich.table import Column, Table
from torch import Tensor

from trainer.checkpoint.inspect import require_valid_checkpoint
from trainer.checkpoint.shards import read_whole
from trainer.metrics.console import print_whole


def print_difference(first: Path, second: Path) -> bool:
    """Print a table of the tensors that differ, with their largest differences; True if none do.

    Each argument is a checkpoint, or a run (its newest checkpoint), of any layout. Raises
    ConfigError if one is damaged.
    """
    (a, a_says), (b, b_says) = require_valid_checkpoint(first), require_valid_checkpoint(second)
    console = Console()
    for name in ("run", "step", "layout", "config", "data"):
        ours, theirs = getattr(a_says, name), getattr(b_says, name)
        if ours != theirs:
            console.print(f"{name}: {ours} and {theirs}", markup=False, soft_wrap=True)
    titles = ("shape", "largest difference", "as a share of the largest entry")
    table = Table(Column("tensor", overflow="fold"), *titles)
    names = {**a_says.tensors, **b_says.tensors}
    for name in names:
        if name not in a_says.tensors or name not in b_says.tensors:
            table.add_row(name, "", f"only in {a if name in a_says.tensors else b}", "")
            continue
        here, there = read_whole(a, a_says, name), read_whole(b, b_says, name)
        if here.shape != there.shape or here.dtype != there.dtype:
            table.add_row(name, f"{_dtype_and_shape(here)} and {_dtype_and_shape(there)}", "", "")
        elif not torch.equal(_raw_bytes(here), _raw_bytes(there)):
            largest, share = largest_difference(here, there)
            table.add_row(name, _dtype_and_shape(here), f"{largest:.3g}", f"{share:.2g}")
    if table.row_count:
        print_whole(table)
    equal = len(names) - table.row_count
    console.print(f"{equal} of {len(names)} tensors are equal to the bit", highlight=False)
    return not table.row_count


def largest_difference(a: Tensor, b: Tensor) -> tuple[float, float]:
    """Return the largest absolute difference of two tensors, and its ratio to the largest entry."""
    wide_a, wide_b = a.double(), b.double()
    largest = (wide_a - wide_b).abs().max().item()
    entry = max(wide_a.abs().max().item(), wide_b.abs().max().item())
    return largest, largest / entry if entry else 0.0


def _dtype_and_shape(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _raw_bytes(tensor: Tensor) -> Tensor:
    """Return the bytes of a tensor, in which identical NaNs are equal and 0.0 differs from -0.0."""
    return tensor.reshape(-1).view(torch.uint8)
