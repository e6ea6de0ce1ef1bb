"""Hugging Face folders that cannot be read: one message each, before any rank starts."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from launch.cli.inputs import check_trained, with_imported_model
from parallel.errors import ConfigError
from trainer.config.train import ModelConfig, TrainConfig
from trainer.huggingface.registry import read_model
from trainer.huggingface.weights import WeightReader
from trainer.run.run_dir import load_config

FIELDS = {
    "vocab_size": 50,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}


@pytest.fixture
def folder(tmp_path) -> Path:
    config = transformers.LlamaConfig(**FIELDS)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    return tmp_path


def change_config(folder: Path, **fields) -> None:
    path = folder / "config.json"
    values = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({k: v for k, v in values.items() if v != "absent"}))


def change_tensors(folder: Path, **tensors: torch.Tensor | None) -> None:
    path = folder / "model.safetensors"
    values = load_file(path) | {name.replace("__", "."): t for name, t in tensors.items()}
    kept = {name: t.contiguous() for name, t in values.items() if t is not None}
    save_file(kept, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "lama"}, "model_type=lama is not known here; the nearest known one is lla"),
        ({"model_type": "absent"}, "has no model_type"),
        ({"clip_qkv": 8.0}, "clip_qkv=8.0, but this field is unknown here and could change what"),
        ({"hidden_act": "gelu"}, 'hidden_act="gelu", but silu can be computed here'),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope_type"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5, but all of a head is turned"),
        ({"auto_map": {"AutoModel": "modeling.Model"}}, "auto_map asks for code of the folder"),
        ({"quantization_config": {"bits": 4}}, "the weights are quantized; convert them first"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "has another head than LlamaForC"),
        ({"num_attention_heads": "absent"}, "has no num_attention_heads"),
    ],
)
def test_fields_that_cannot_be_computed_are_refused(folder, fields, message):
    change_config(folder, **fields)
    with pytest.raises(ConfigError) as caught:
        read_model(folder)
    assert message in str(caught.value)


def test_all_problems_of_a_config_are_told_at_once(folder):
    change_config(folder, clip_qkv=8.0, hidden_act="gelu")
    with pytest.raises(ConfigError) as caught:
        read_model(folder)
    assert len(caught.value.problems) == 2


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"model__norm__weight": None}, "lacks model.norm.weight"),
        ({"model__extra": torch.ones(2)}, "has model.extra, unknown to llama here"),
        (
            {"model__norm__weight": torch.ones(63)},
            "has model.norm.weight of shape (63,), but config.json says (64,)",
        ),
        ({"lm_head__weight": torch.ones(50, 64)}, "other numbers than model.embed_tokens.weight"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(folder, tensors, message):
    change_tensors(folder, **tensors)
    with pytest.raises(ConfigError) as caught:
        check_trained(str(folder), "init_from")
    assert message in str(caught.value)


def test_a_copy_of_tied_weights_and_buffers_are_left_out(folder):
    embedding = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    buffer = {"model__layers__0__self_attn__rotary_emb__inv_freq": torch.ones(8)}
    change_tensors(folder, lm_head__weight=embedding.clone(), **buffer)
    assert WeightReader(folder).read_whole("embed.tokens.weight").equal(embedding)


def test_names_without_the_prefix_of_the_body_are_read(folder):
    path = folder / "model.safetensors"
    bare = {name.removeprefix("model."): t for name, t in load_file(path).items()}
    save_file(bare, path, metadata={"format": "pt"})
    assert WeightReader(folder).read_whole("head.norm.weight").equal(bare["norm.weight"])


def test_pickles_and_incomplete_folders_are_refused(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ConfigError, match="is damaged"):
        WeightReader(folder)
    path.rename(folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"as a pickle .*, which can run any code"):
        WeightReader(folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(ConfigError, match=r"holds neither model\.safetensors nor"):
        WeightReader(folder)
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match=r"names model-00001-of-00002\.safetensors, missing"):
        WeightReader(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json cannot be read"):
        read_model(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"holds no run .* and no Hugging Face model"):
        load_config(folder, "init_from")


def test_keys_that_contradict_the_folder_are_refused_with_both_values(folder):
    config = TrainConfig(model=ModelConfig(width=32, heads=2), init_from=str(folder))
    filled = with_imported_model(config, ["init_from=…"])
    assert (filled.model.width, filled.model.heads, filled.model.kv_heads) == (64, 4, 2)
    with pytest.raises(ConfigError, match=r"model\.width=32, but .* model\.width=64"):
        with_imported_model(config, ["model.width=32"])
    with pytest.raises(ConfigError, match=r"model\.heads=2, but .* model\.heads=4"):
        with_imported_model(config, ["model=other"])
