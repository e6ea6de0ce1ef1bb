"""Weights of a Hugging Face folder, read into the shards of a model, and the way back."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from parallel.grad_norm import local_tensor
from parallel.parallelize import local_slices
from trainer.checkpoint.shards import take_rows
from trainer.checkpoint.vocabulary import BY_ROW
from trainer.config.train import ModelConfig
from trainer.huggingface.architecture import Architecture, TensorMap
from trainer.huggingface.registry import read_model
from trainer.huggingface.tensor_files import TensorFiles, check_tensors, constant_tensor
from trainer.model import Transformer

Shapes = Mapping[str, Sequence[int]]
Weights = Callable[[str], Tensor]  # name -> whole parameter


@dataclass(frozen=True)
class Source:
    """A parameter's place in the files: a tensor, and the parameter's first row there."""

    tensor: TensorMap
    row: int


class WeightReader:
    """Reads parameters of a model from a folder; no rank reads more than it asks for."""

    def __init__(self, folder: str | Path, key: str = "init_from"):
        self.architecture, self.model = read_model(folder, key)
        self.files = TensorFiles(folder, self.architecture)
        self.shapes = parameter_shapes(self.model)
        check_tensors(self.files, self.architecture, self.model, self.shapes)
        self._sources = find_sources(self.architecture, self.model, self.shapes)

    def read(self, name: str, slices: Sequence[slice]) -> Tensor:
        """Return a slice of a parameter, in the dtype of the files."""
        source = self._sources[name]
        tensor, row = source.tensor, source.row
        rows = slice(row + slices[0].start, row + slices[0].stop)
        if tensor.shape:
            found = self.files.read(tensor.theirs).reshape(self.shapes[name])[tuple(slices)]
        elif tensor.transposed:
            found = self.files.read(tensor.theirs, *slices[1:], rows).T
        else:
            found = self.files.read(tensor.theirs, rows, *slices[1:])
        if not tensor.offset:
            return found
        return found.to(torch.promote_types(found.dtype, torch.float32)) + tensor.offset

    def read_whole(self, name: str) -> Tensor:
        """Return a whole parameter, in the dtype of the files."""
        return self.read(name, [slice(0, size) for size in self.shapes[name]])

    @torch.no_grad()
    def load_parameters(self, parameters: Mapping[str, Tensor]) -> None:
        """Load the local shards of parameters, one at a time."""
        for name, parameter in parameters.items():
            held = local_slices(parameter)
            if all(dim.start < dim.stop for dim in held):
                local_tensor(parameter).copy_(self.read(name, held))


def load_folder(
    folder: Path, parameters: Mapping[str, Tensor], rows: list[int] | None = None
) -> None:
    """Load a Hugging Face folder into the local shards of a model's parameters.

    `rows`: for each token or class its row in the folder's model, -1 = none; None = the same rows.
    Raises ConfigError if the folder is damaged or holds another model.
    """
    reader = WeightReader(folder)
    by_row = () if rows is None else BY_ROW
    reader.load_parameters({name: p for name, p in parameters.items() if name not in by_row})
    for name in by_row:
        if rows is not None and name in parameters:
            take_rows(parameters[name], reader.read_whole(name), rows)


def parameter_shapes(model: ModelConfig) -> dict[str, torch.Size]:
    """Return the shape of each parameter of a model, by name."""
    with torch.device("meta"):
        return {name: p.shape for name, p in Transformer(model).named_parameters()}


def find_sources(
    architecture: Architecture, model: ModelConfig, shapes: Shapes
) -> dict[str, Source]:
    """Return where each parameter of a model is in the files of an architecture."""
    found = {}
    for tensor in architecture.tensors(model):
        row = 0
        for name in tensor.ours:
            found[name] = Source(tensor, row)
            row += shapes[name][0]
    assert found.keys() == shapes.keys(), found.keys() ^ shapes.keys()
    return found


def their_tensors(
    architecture: Architecture, model: ModelConfig, weights: Weights
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of an architecture, one at a time, from whole parameters by name."""
    for tensor in architecture.tensors(model):
        if not tensor.ours:
            yield tensor.theirs, constant_tensor(tensor, model)
            continue
        ours = [weights(name) for name in tensor.ours]
        joined = ours[0] if len(ours) == 1 else torch.cat(ours)
        joined = joined - tensor.offset if tensor.offset else joined
        joined = joined.T if tensor.transposed else joined
        yield tensor.theirs, joined.reshape(tensor.shape) if tensor.shape else joined.contiguous()
