"""Whole weights of a run, an export or a Hugging Face folder, read one at a time."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from parallel.grad_norm import local_tensor
from parallel.parallelize import local_slices
from trainer.checkpoint.manifest import Manifest
from trainer.checkpoint.restore import find_newest_valid
from trainer.checkpoint.shards import read_whole, take_rows
from trainer.checkpoint.vocabulary import BY_ROW, map_vocabulary
from trainer.checkpoint.weight_digest import check_base, whole_digest
from trainer.compress.compression import rounded_weight
from trainer.config.lora import LAYERS, adapter_scale
from trainer.config.train import ConfigError, TrainConfig
from trainer.data import open_tokenizer
from trainer.data.record import data_of, read_record
from trainer.huggingface.registry import is_model_folder
from trainer.huggingface.weights import WeightReader, Weights, parameter_shapes
from trainer.nn.init import init_rows
from trainer.run.run_dir import EXPORTED, load_config


def open_weights(run_dir: Path, step: int = 0) -> tuple[Weights, int]:
    """Return a function that reads a whole parameter by name, and the step of the weights.

    They are those of the newest valid checkpoint (or that of `step`), with adapters merged, of an
    export, or of a Hugging Face folder. Raises ConfigError if there are none.
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
    folder, manifest = newest_checkpoint(run_dir, step)
    if config.lora.rank:
        own = replace(config, run_dir=str(run_dir))
        return _merged_weights(own, folder, manifest), manifest.step
    return lambda name: read_whole(folder, manifest, f"model.{name}"), manifest.step


def newest_checkpoint(run_dir: Path, step: int = 0) -> tuple[Path, Manifest]:
    """Return the newest valid checkpoint of a run, or that of `step`; ConfigError if none is."""
    choice = find_newest_valid(run_dir, step)
    if choice.path is None or choice.manifest is None:
        raise ConfigError(f"run_dir={run_dir} holds no good checkpoint; train it first")
    return choice.path, choice.manifest


def _read_tensor(path: Path, name: str) -> Tensor:
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name)


def _merged_weights(run: TrainConfig, folder: Path, manifest: Manifest) -> Weights:
    """Return a function that reads a weight of a run with its adapter of this checkpoint merged.

    Raises ConfigError for a frozen weight that is no longer that of training.
    """
    base, scale = _frozen_weights(run), adapter_scale(run.lora)

    def read_merged(name: str) -> Tensor:
        weight, layer = base(name), name.removesuffix(".weight")
        saved, now = {name: manifest.base[name]}, {name: whole_digest(weight)}
        check_base(f"run_dir={run.run_dir}", saved, now)
        if run.compress.bits and name.removesuffix(".weight").rpartition(".")[2] in LAYERS:
            weight = rounded_weight(weight, run.compress)
        if f"model.{layer}.lora_a" not in manifest.tensors:
            return weight
        a_RI, b_OR = (
            read_whole(folder, manifest, f"model.{layer}.{factor}")
            for factor in ("lora_a", "lora_b")
        )
        return weight.to(a_RI.dtype) + scale * (b_OR @ a_RI)

    return read_merged


def _frozen_weights(run: TrainConfig) -> Weights:
    """Return a function that reads a frozen weight of a run: of its init_from, or from its seed."""
    shapes = parameter_shapes(run.model)

    def drawn(name: str) -> Tensor:
        return init_rows(run.model, run.seed, name, shapes[name], 0, shapes[name][0])

    if not run.init_from:
        return drawn
    theirs, _ = open_weights(Path(run.init_from))
    facts = read_record(run.run_dir)
    assert facts is not None, run.run_dir
    rows = map_vocabulary(run.init_from, facts, open_tokenizer(data_of(run)))

    def with_new_rows(name: str) -> Tensor:
        if rows is None or name not in BY_ROW:
            return theirs(name)
        whole = drawn(name)
        take_rows(whole, theirs(name), rows.theirs)
        return whole

    return with_new_rows


@torch.no_grad()
def load_merged(
    run_dir: Path, parameters: Mapping[str, Tensor], rows: list[int] | None = None
) -> None:
    """Load a run with adapters, merged, into the local shards of a model's parameters.

    `rows` as for `load_run_weights`. All ranks must call it, also those without parameters.
    """
    weights, _ = open_weights(run_dir)
    for name, parameter in parameters.items():
        whole = weights(name)
        if rows is not None and name in BY_ROW:
            take_rows(parameter, whole, rows)
        else:
            local_tensor(parameter).copy_(whole[local_slices(parameter)])
