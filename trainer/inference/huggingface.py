"""Export a trained model as a Hugging Face folder, one tensor at a time."""

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import distributed as dist

from parallel.parallel_model import ParallelModel
from parallel.runtime import broadcast_from_rank0
from trainer.atomic_files import new_folder
from trainer.checkpoint.folder import checkpoint_path
from trainer.checkpoint.shards import read_whole
from trainer.config.train import TrainConfig, inputs_of
from trainer.data.record import TOKENIZER
from trainer.data.tokenizer import Tokenizer
from trainer.huggingface.adapter_files import AdapterReader, write_adapter
from trainer.huggingface.architecture import Architecture
from trainer.huggingface.registry import architecture_for, is_model_folder
from trainer.huggingface.weights import Weights
from trainer.huggingface.writer import (
    read_special_ids,
    write_config,
    write_extractor,
    write_tokenizer,
    write_weights,
)
from trainer.inference.weights import newest_checkpoint, open_weights
from trainer.precision import resolve_precision
from trainer.run.run_dir import load_config, to_yaml

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
    more than one file of the output is in memory. All ranks must call it, and the first one writes.
    ConfigError if transformers has no such model.
    """
    config = load_config(run_dir)
    origin = run_dir if is_model_folder(run_dir) else config.init_from
    architecture = architecture_for(config.model, like=origin)
    weights, step = open_weights(run_dir, step)
    if dist.get_rank() == 0:
        _write_folder(config, architecture, weights, to, dtype, step, run_dir)
    broadcast_from_rank0(None)  # the others wait


def _write_folder(
    config: TrainConfig,
    architecture: Architecture,
    weights: Weights,
    to: Path,
    dtype: torch.dtype,
    step: int,
    run_dir: Path,
) -> None:
    with new_folder(to) as partial:
        if (run_dir / TOKENIZER).is_file():
            tokenizer = Tokenizer.load(run_dir / TOKENIZER)
            length, start = config.model.max_positions, config.model.start_token
            write_tokenizer(partial, run_dir, tokenizer.eot_id, tokenizer.pad_id, length, start)
        if inputs_of(config.model) == "audio":
            write_extractor(partial, config.data)
        ids = read_special_ids(partial)
        write_config(partial, architecture, config.model, dtype, ids)
        write_weights(partial, architecture, config.model, weights, dtype)
        (partial / "samestep.yaml").write_text(to_yaml(config), encoding="utf-8")
        card = _format_card(config, architecture, to.name, step)
        (partial / "README.md").write_text(card, encoding="utf-8")


def export_checkpoint(config: TrainConfig, step: int, device: torch.device) -> None:
    """Export the checkpoint of this step, if checkpoint.huggingface_every asks for it.

    All ranks must call it; they wait for the first one. A save that failed has no export.
    """
    every, run_dir = config.checkpoint.huggingface_every, Path(config.run_dir)
    if not every or (step % every and step != config.steps):
        return
    if not broadcast_from_rank0(checkpoint_path(run_dir, step).exists()):
        return
    to = run_dir / "huggingface" / f"step-{step:08d}"
    if dist.get_rank() == 0:
        shutil.rmtree(to, ignore_errors=True)  # of a training that has gone back since
    export_folder(run_dir, to, resolve_precision(config.precision, device).compute, step)


def export_adapter(run_dir: Path, to: Path, dtype: torch.dtype, step: int = 0) -> None:
    """Write the adapters of a run's checkpoint, in PEFT's format, as the folder `to`.

    `step` is that of the checkpoint; 0 = the newest.
    """
    config = load_config(run_dir)
    architecture = architecture_for(config.model, like=config.init_from)
    folder, manifest = newest_checkpoint(run_dir, step)

    def read_factor(name: str) -> torch.Tensor:
        return read_whole(folder, manifest, f"model.{name}")

    with new_folder(to) as partial:
        write_adapter(
            partial,
            architecture,
            config.model,
            config.lora,
            read_factor,
            dtype,
            config.init_from,
            manifest.base,
        )


def load_first_adapter(config: TrainConfig, worker: ParallelModel, base: Mapping[str, str]) -> None:
    """Load the factors of config.lora.adapter; `base` are the digests of the frozen weights."""
    architecture = architecture_for(config.model, like=config.init_from)
    reader = AdapterReader(config.lora.adapter, architecture, config.model)
    reader.load_factors(worker.parameters(), base)


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
