"""Export a trained model as a Hugging Face folder, one tensor at a time."""

from pathlib import Path

import torch
from safetensors import safe_open

from trainer.atomic_files import new_folder
from trainer.checkpoint.manifest import read_manifest
from trainer.checkpoint.restore import find_newest_valid
from trainer.checkpoint.shards import read_whole
from trainer.config.train import ConfigError, TrainConfig
from trainer.data.record import TOKENIZER
from trainer.data.tokenizer import Tokenizer
from trainer.huggingface.architecture import Architecture
from trainer.huggingface.registry import architecture_for, is_model_folder
from trainer.huggingface.weights import WeightReader, Weights
from trainer.huggingface.writer import (
    read_special_ids,
    write_config,
    write_tokenizer,
    write_weights,
)
from trainer.run.run_dir import EXPORTED, load_config, to_yaml

CARD = """---
library_name: transformers
tags: [samestep]
---

# {name}

`{class_name}`, trained with Samestep{base}: {steps:,} of {all_steps:,} steps of {batch_size:,}
samples, on `{data}` (data.kind={kind}).

```python
from transformers import {class_name}

model = {class_name}.from_pretrained("{name}")
```

`samestep.yaml` is the configuration of the run, with every key.
"""


def export_folder(run_dir: Path, to: Path, dtype: torch.dtype, step: int = 0) -> None:
    """Write a run's checkpoint, an export or a Hugging Face folder as the Hugging Face folder `to`.

    `step` is that of the checkpoint; 0 = the newest. Whole parameters are read one at a time: no
    more than one file of the output is in memory. ConfigError if transformers has no such model.
    """
    config = load_config(run_dir)
    origin = run_dir if is_model_folder(run_dir) else config.init_from
    architecture = architecture_for(config.model, like=origin)
    weights, step = open_weights(run_dir, step)
    with new_folder(to) as partial:
        if (run_dir / TOKENIZER).is_file():
            tokenizer = Tokenizer.load(run_dir / TOKENIZER)
            length = config.model.max_positions
            write_tokenizer(partial, run_dir, tokenizer.eot_id, tokenizer.pad_id, length)
        ids = read_special_ids(partial)
        write_config(partial, architecture, config.model, dtype, ids)
        write_weights(partial, architecture, config.model, weights, dtype)
        (partial / "samestep.yaml").write_text(to_yaml(config), encoding="utf-8")
        card = _format_card(config, architecture, to.name, step)
        (partial / "README.md").write_text(card, encoding="utf-8")


def open_weights(run_dir: Path, step: int = 0) -> tuple[Weights, int]:
    """Return a function that reads a whole parameter by name, and the step of the weights.

    They are those of the newest valid checkpoint (or that of `step`), of an export, or of a Hugging
    Face folder. Raises ConfigError if there are none.
    """
    if is_model_folder(run_dir):
        return WeightReader(run_dir, "run_dir").read_whole, 0
    config = load_config(run_dir)
    if (path := run_dir / EXPORTED).exists():
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
        if about.get("packed", "[]") != "[]":
            raise ConfigError(f"run_dir={run_dir} holds quantized weights; name the run itself")
        return lambda name: _read_tensor(path, name), config.steps
    choice = find_newest_valid(run_dir, step)
    if choice.path is None:
        raise ConfigError(f"run_dir={run_dir} holds no good checkpoint; train it first")
    folder, manifest = choice.path, read_manifest(choice.path)
    return lambda name: read_whole(folder, manifest, f"model.{name}"), manifest.step


def _read_tensor(path: Path, name: str) -> torch.Tensor:
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name)


def _format_card(config: TrainConfig, architecture: Architecture, name: str, step: int) -> str:
    return CARD.format(
        name=name,
        class_name=architecture.class_name,
        base=f" from the weights of `{Path(config.init_from).name}`" if config.init_from else "",
        steps=step,
        all_steps=config.steps,
        batch_size=config.batch_size,
        data=config.data.path,
        kind=config.data.kind,
    )
