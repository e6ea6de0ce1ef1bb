"""The safetensors of a model folder: names, shapes, and slices, read where they are needed."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from trainer.config.train import ConfigError, ModelConfig
from trainer.huggingface.architecture import Architecture, TensorMap
from trainer.nn.positions import sinusoids

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHOWN = 4  # names listed in a message
ROUNDING = 2.0**-11  # of a table of float16


class TensorFiles:
    """The tensors of a folder, by the names of their architecture; raises ConfigError."""

    def __init__(self, folder: str | Path, architecture: Architecture):
        self.folder = Path(folder)
        files = _list_files(self.folder)
        self._file_of, self.shapes = {}, {}
        for file in files:
            try:
                with safe_open(file, framework="np") as opened:
                    for name in opened.keys():  # noqa: SIM118
                        self._file_of[name] = file
                        self.shapes[name] = tuple(opened.get_slice(name).get_shape())
            except (SafetensorError, OSError) as error:
                raise ConfigError(f"{file} is damaged ({error}); download it again") from error
        # Names in the files, by the names of the architecture.
        prefix = architecture.prefix
        bare = prefix and not any(name.startswith(prefix) for name in self.shapes)
        self._names = {
            _current_name(f"{prefix}{name}" if bare else name, architecture): name
            for name in self.shapes
        }
        self.shapes = {name: self.shapes[theirs] for name, theirs in self._names.items()}

    def read(self, name: str, *slices: slice) -> Tensor:
        """Return a slice of a tensor, in its own dtype."""
        theirs = self._names[name]
        with safe_open(self._file_of[theirs], framework="pt") as opened:
            return opened.get_slice(theirs)[slices] if slices else opened.get_tensor(theirs)


def check_tensors(
    files: TensorFiles,
    architecture: Architecture,
    model: ModelConfig,
    shapes: Mapping[str, Sequence[int]],
) -> None:
    """Raise ConfigError unless the files hold exactly a model's tensors.

    `shapes` are those of the parameters here.
    """
    expected = {t.theirs: t.their_shape(shapes) for t in architecture.tensors(model)}
    for copy, original in architecture.tied_copies:
        _check_tied_copy(files, copy, original, expected)
    found = {n: s for n, s in files.shapes.items() if not n.endswith(architecture.unlearned)}
    for copy, original in architecture.tied_copies:
        if copy not in expected and original in found:
            found.pop(copy, None)
    problems = []
    if missing := [name for name in expected if name not in found]:
        problems.append(f"lacks {_list_names(missing)}")
    if additional := [name for name in found if name not in expected]:
        problems.append(f"has {_list_names(additional)}, unknown to {architecture.model_type} here")
    for tensor in architecture.tensors(model):
        if not tensor.ours and found.get(tensor.theirs) == expected[tensor.theirs]:
            problems += _check_constant(files.read(tensor.theirs), tensor, model)
    for name in [n for n in expected if n in found and found[n] != expected[n]][:SHOWN]:
        problems.append(f"has {name} of shape {found[name]}, but config.json says {expected[name]}")
    if problems:
        raise ConfigError(*(f"{files.folder} {problem}" for problem in problems))


def constant_tensor(tensor: TensorMap, model: ModelConfig) -> Tensor:
    """Return a tensor of an architecture that nothing here is learned for."""
    if not tensor.sinusoids:
        return torch.zeros(tensor.shape)
    return sinusoids(torch.arange(tensor.shape[0]), model, torch.float64)


def _check_constant(theirs: Tensor, tensor: TensorMap, model: ModelConfig) -> list[str]:
    """Return the problem of a tensor that should be a constant, if it is another one."""
    # Published tables were rounded to float16 once, whatever the dtype of the file.
    rounding = max(ROUNDING, torch.finfo(theirs.dtype).eps / 2) if tensor.sinusoids else 0.0
    if (theirs - constant_tensor(tensor, model)).abs().max() <= rounding:
        return []
    kind = "the table of sinusoids" if tensor.sinusoids else "zero"
    return [f"has {tensor.theirs}, which is not {kind} and cannot be computed here"]


def _current_name(name: str, architecture: Architecture) -> str:
    """Return the architecture's name of a tensor, which older files call otherwise."""
    for old, new in architecture.renamed:
        if name.endswith(old):
            return f"{name.removesuffix(old)}{new}"
    return name


def _check_tied_copy(
    files: TensorFiles, copy: str, original: str, expected: Mapping[str, object]
) -> None:
    """Raise ConfigError for a tensor that is in the files although it is tied, if it differs."""
    if copy in expected or copy not in files.shapes or original not in files.shapes:
        return
    if not files.read(copy).equal(files.read(original)):
        raise ConfigError(
            f"{files.folder} holds {copy} with other numbers than {original}, but config.json "
            "says tie_word_embeddings=true; set it to false to use both, or delete the tensor"
        )


def _list_files(folder: Path) -> list[Path]:
    if (folder / INDEX).is_file():
        try:
            names = set(json.loads((folder / INDEX).read_text())["weight_map"].values())
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise ConfigError(f"{folder / INDEX} is damaged ({error})") from error
        if missing := sorted(name for name in names if not (folder / name).is_file()):
            raise ConfigError(f"{folder / INDEX} names {_list_names(missing)}, missing there")
        return sorted(folder / name for name in names)
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if pickled := sorted(folder.glob("*.bin")) + sorted(folder.glob("*.pt")):
        raise ConfigError(
            f"{folder} holds its weights as a pickle ({pickled[0].name}), which can run any code "
            "when it is read; convert it where you trust it: "
            "AutoModelForCausalLM.from_pretrained(…).save_pretrained(…, safe_serialization=True)"
        )
    raise ConfigError(f"{folder} holds neither {SINGLE} nor {INDEX}")


def _list_names(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
