"""Write a folder that `from_pretrained` of transformers reads."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import tokenizers
import torch
from safetensors.torch import save_file

from trainer.config.train import DataConfig, ModelConfig
from trainer.data.tokenizer import MASK_NAMES
from trainer.huggingface.architecture import Architecture
from trainer.huggingface.registry import CONFIG
from trainer.huggingface.tensor_files import INDEX, SINGLE
from trainer.huggingface.weights import Weights, parameter_shapes, their_tensors

SHARD_BYTES = 5 * 10**9  # of one safetensors file, at most
TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
GENERATION_CONFIG = "generation_config.json"
EXTRACTOR = "preprocessor_config.json"
# Copied as they are where a model came with them.
SIDE_FILES = (TOKENIZER_CONFIG, GENERATION_CONFIG, "chat_template.jinja", "special_tokens_map.json")


def write_weights(
    folder: Path,
    architecture: Architecture,
    model: ModelConfig,
    weights: Weights,
    dtype: torch.dtype,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write safetensors of at most `shard_bytes` each, with an index if they are several.

    No more than one file's tensors are in memory.
    """
    shards = _plan_shards(architecture, model, dtype.itemsize, shard_bytes)
    tensors = their_tensors(architecture, model, weights)
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    names = names if len(shards) > 1 else [SINGLE]
    for name, shard in zip(names, shards, strict=True):
        held = {theirs: next(tensors)[1].to(dtype).contiguous() for theirs in shard}
        save_file(held, folder / name, metadata={"format": "pt"})
    if len(shards) > 1:
        total = sum(size for shard in shards for size in shard.values())
        places = {theirs: n for n, s in zip(names, shards, strict=True) for theirs in s}
        index = {"metadata": {"total_size": total}, "weight_map": places}
        _write_json(folder / INDEX, index)


def _plan_shards(
    architecture: Architecture, model: ModelConfig, item_bytes: int, shard_bytes: int
) -> list[dict[str, int]]:
    """Return the tensors of each file, in order, with their bytes."""
    shapes = parameter_shapes(model)
    shards: list[dict[str, int]] = [{}]
    for tensor in architecture.tensors(model):
        size = item_bytes * torch.Size(tensor.their_shape(shapes)).numel()
        if shards[-1] and sum(shards[-1].values()) + size > shard_bytes:
            shards.append({})
        shards[-1][tensor.theirs] = size
    return shards


def write_config(
    folder: Path,
    architecture: Architecture,
    model: ModelConfig,
    dtype: torch.dtype,
    special_ids: dict[str, Any],
) -> None:
    """Write a config.json that versions 4 and 5 of transformers read alike."""
    name = str(dtype).removeprefix("torch.")
    fields = {
        "architectures": [architecture.class_name],
        "model_type": architecture.model_type,
        **special_ids,
        **architecture.write_config(model),
        "dtype": name,  # read by 5
        "torch_dtype": name,  # read by 4
    }
    _write_json(folder / CONFIG, fields)


def write_tokenizer(
    folder: Path, run_dir: Path, end_id: int, pad_id: int, length: int, start_id: int = -1
) -> None:
    """Copy a run's tokenizer and the files that came with it; write those that are missing.

    `end_id` and `pad_id` are its end and padding tokens, `length` the longest sequence, `start_id`
    the token that a decoder begins with (-1 = the end token).
    """
    backend = tokenizers.Tokenizer.from_file(str(run_dir / TOKENIZER))
    shutil.copyfile(run_dir / TOKENIZER, folder / TOKENIZER)
    for name in SIDE_FILES:
        if (run_dir / name).is_file():
            shutil.copyfile(run_dir / name, folder / name)
    if not (folder / TOKENIZER_CONFIG).exists():
        end = backend.id_to_token(end_id)
        fields = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": end,  # the end of a document begins the next one
            "eos_token": end,
            "pad_token": backend.id_to_token(pad_id),
            "model_max_length": length,
            "clean_up_tokenization_spaces": False,
        }
        mask = next((name for name in MASK_NAMES if backend.token_to_id(name) is not None), None)
        fields |= {"mask_token": mask} if mask else {}
        _write_json(folder / TOKENIZER_CONFIG, fields)
    if not (folder / GENERATION_CONFIG).exists():
        ids = {"bos_token_id": end_id, "eos_token_id": end_id, "pad_token_id": pad_id}
        ids |= {"decoder_start_token_id": start_id} if start_id >= 0 else {}
        _write_json(folder / GENERATION_CONFIG, ids)


def write_extractor(folder: Path, data: DataConfig) -> None:
    """Write how frames are made of recordings, as transformers' extractor of Whisper reads it."""
    hop, rate = data.sample_rate // 100, data.sample_rate
    fields = {
        "feature_extractor_type": "WhisperFeatureExtractor",
        "feature_size": data.mels,
        "sampling_rate": rate,
        "hop_length": hop,
        "n_fft": rate // 40,
        "chunk_length": math.ceil(data.max_seconds),
        "n_samples": math.ceil(data.max_seconds) * rate,
        "nb_max_frames": math.ceil(data.max_seconds) * 100,
        "padding_side": "right",
        "padding_value": 0.0,
        "return_attention_mask": False,
    }
    _write_json(folder / EXTRACTOR, fields)


def read_special_ids(folder: Path) -> dict[str, Any]:
    """Return the ids of special tokens in a folder's generation config."""
    path = folder / GENERATION_CONFIG
    values = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return {name: value for name, value in values.items() if name.endswith("_token_id")}


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
