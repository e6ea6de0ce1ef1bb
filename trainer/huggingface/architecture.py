"""Tables of published architectures: the fields of their configs, and the names of tensors."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainer.config.train import ModelConfig
from trainer.huggingface.fields import ConfigFields


@dataclass(frozen=True)
class TensorMap:
    """A tensor of a file, and the parameters here whose rows follow each other in it."""

    theirs: str
    ours: tuple[str, ...]  # empty: theirs must be zero, or `sinusoids`
    transposed: bool = False  # their matrix is (input, output)
    offset: float = 0.0  # added to theirs
    shape: tuple[int, ...] = ()  # of theirs, if it is ours in another form
    sinusoids: bool = False  # theirs is the table that is computed here

    def their_shape(self, shapes: Mapping[str, Sequence[int]]) -> tuple[int, ...]:
        """Return the tensor's shape in a file, from the shapes of the parameters here."""
        if self.shape:
            return self.shape
        first = tuple(shapes[self.ours[0]])
        rows = sum(shapes[name][0] for name in self.ours)
        shape = (rows, *first[1:])
        return shape[::-1] if self.transposed else shape


@dataclass(frozen=True)
class Architecture:
    """An architecture; ARCHITECTURES (registry.py) lists them by `class_name`."""

    model_type: str
    class_name: str  # the class of transformers whose logits these are
    data_kind: str  # value of data.kind that its models read
    read_config: Callable[[ConfigFields], dict[str, Any]]  # -> values of model.*
    write_config: Callable[[ModelConfig], dict[str, Any]]  # -> fields of config.json
    # Whether a model can be written as this architecture; the first that fits is taken.
    fits: Callable[[ModelConfig], bool]
    tensors: Callable[[ModelConfig], Iterator[TensorMap]]
    # Prefix of the names that files of the bare model lack.
    prefix: str = ""
    # Ends of names of tensors that hold nothing learned.
    unlearned: tuple[str, ...] = ()
    # Tensors that files may hold although they are tied: name, and the one that it must equal.
    tied_copies: tuple[tuple[str, str], ...] = ()
    # Ends of names that older files have, and those of the architecture.
    renamed: tuple[tuple[str, str], ...] = ()
