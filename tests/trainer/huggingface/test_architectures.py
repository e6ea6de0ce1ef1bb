"""Every architecture beside transformers: logits and all gradients, in and out, in float64."""

from dataclasses import replace

import pytest
import torch
import transformers
from reference_models import (
    build_reference,
    float64_for_float32,
    reference_loss,
    save_gradients,
)
from tiny import build

from trainer.huggingface.registry import architecture_for, read_model
from trainer.huggingface.weights import WeightReader, their_tensors
from trainer.huggingface.writer import write_config, write_weights

LLAMA = {
    "vocab_size": 50,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0},
    "tie_word_embeddings": False,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
GPT2 = {"vocab_size": 50, "n_positions": 64, "n_embd": 64, "n_layer": 2, "n_head": 4}
VIT = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "image_size": 16,
    "patch_size": 4,
    "num_labels": 5,
}
# No padding: transformers gives the embedding of that token no gradient.
DECODER = LLAMA | {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
GEMMA3 = DECODER | {
    "num_hidden_layers": 3,
    "head_dim": 32,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "query_pre_attn_scalar": 24,
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
    },
    "tie_word_embeddings": True,
}


def with_rope(**rope: object) -> tuple[str, str, dict]:
    return "LlamaForCausalLM", "LlamaConfig", LLAMA | {"rope_parameters": rope}


CASES = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", LLAMA),
    "llama, tied": ("LlamaForCausalLM", "LlamaConfig", LLAMA | {"tie_word_embeddings": True}),
    "llama 3.1": (
        "LlamaForCausalLM",
        "LlamaConfig",
        LLAMA | {"rope_parameters": LLAMA3, "max_position_embeddings": 131072},
    ),
    "llama, wide heads": ("LlamaForCausalLM", "LlamaConfig", LLAMA | {"head_dim": 32}),
    "llama, biases": (
        "LlamaForCausalLM",
        "LlamaConfig",
        LLAMA | {"attention_bias": True, "mlp_bias": True},
    ),
    "mistral": ("MistralForCausalLM", "MistralConfig", LLAMA | {"sliding_window": None}),
    "mistral, window": ("MistralForCausalLM", "MistralConfig", LLAMA | {"sliding_window": 8}),
    "llama, linear": with_rope(rope_type="linear", rope_theta=10_000.0, factor=4.0),
    "llama, dynamic": with_rope(rope_type="dynamic", rope_theta=10_000.0, factor=4.0),
    "llama, yarn": with_rope(**YARN),
    "llama, yarn, all set": with_rope(
        **YARN | {"beta_fast": 8.0, "beta_slow": 2.0, "mscale": 0.7, "mscale_all_dim": 0.4}
    ),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", DECODER | {"head_dim": 32}),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", DECODER),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", DECODER | {"sliding_window": 8}),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", GEMMA3),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", LLAMA),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2),
    "gpt2, relu": ("GPT2LMHeadModel", "GPT2Config", GPT2 | {"activation_function": "relu"}),
    "vit": ("ViTForImageClassification", "ViTConfig", VIT),
}


def random_inputs(model) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    if model.family == "encoder":
        images = torch.randn(3, 3, 16, 16, generator=generator, dtype=torch.float64)
        return {"images": images}, torch.randint(5, (3,), generator=generator)
    tokens, targets = torch.randint(50, (2, 3, 40), generator=generator)
    return {"tokens": tokens}, targets


def their_logits(theirs, inputs):
    names = {"tokens": "input_ids", "images": "pixel_values"}
    with float64_for_float32():
        return theirs(**{names[name]: value for name, value in inputs.items()}).logits


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_are_those_of_transformers(case, tmp_path):
    theirs = build_reference(*CASES[case][:2], **CASES[case][2])
    theirs.save_pretrained(tmp_path / "theirs")
    reader = WeightReader(tmp_path / "theirs")
    ours = build(reader.model)
    reader.load_parameters(dict(ours.named_parameters()))
    inputs, targets = random_inputs(reader.model)
    logits, reference = ours(inputs), their_logits(theirs, inputs)
    torch.testing.assert_close(logits, reference, rtol=0, atol=1e-12)

    reference_loss(logits, targets).backward()
    reference_loss(reference, targets).backward()
    save_gradients(theirs, tmp_path / "gradients")
    expected = WeightReader(tmp_path / "gradients")
    parameters = dict(ours.named_parameters())
    architecture = expected.architecture
    for tensor in architecture.tensors(reader.model):
        flat = replace(tensor, offset=0.0)
        ((name, gradient),) = their_tensors(
            replace(architecture, tensors=lambda _, flat=flat: iter([flat])),
            reader.model,
            lambda name: parameters[name].grad,
        )
        torch.testing.assert_close(gradient, expected.files.read(name), rtol=0, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_logits_in_float32_are_those_of_transformers_as_it_is(case, tmp_path):
    build_reference(*CASES[case][:2], **CASES[case][2]).float().save_pretrained(tmp_path)
    theirs = getattr(transformers, CASES[case][0]).from_pretrained(tmp_path, dtype=torch.float32)
    reader = WeightReader(tmp_path)
    ours = build(reader.model, dtype=torch.float32)
    reader.load_parameters(dict(ours.named_parameters()))
    inputs = random_inputs(reader.model)[0]
    if "images" in inputs:
        inputs = {"images": inputs["images"].float()}
    names = {"tokens": "input_ids", "images": "pixel_values"}
    reference = theirs.eval()(**{names[name]: value for name, value in inputs.items()}).logits
    torch.testing.assert_close(ours(inputs), reference, rtol=0, atol=5e-6)


def test_an_offset_is_added_in_float32(tmp_path):
    theirs = build_reference(*CASES["gemma3"][:2], **CASES["gemma3"][2]).bfloat16()
    theirs.save_pretrained(tmp_path)
    weight = WeightReader(tmp_path).read_whole("blocks.0.attention_norm.weight")
    assert weight.equal(1.0 + theirs.model.layers[0].input_layernorm.weight.float())


@pytest.mark.parametrize("case", CASES)
def test_written_folders_are_read_by_transformers(case, tmp_path, caplog):
    theirs = build_reference(*CASES[case][:2], **CASES[case][2])
    theirs.save_pretrained(tmp_path / "theirs")
    reader = WeightReader(tmp_path / "theirs")
    model, folder = reader.model, tmp_path / "ours"
    architecture = architecture_for(model, like=tmp_path / "theirs")
    folder.mkdir()
    write_weights(folder, architecture, model, reader.read_whole, torch.float64, 50_000)
    write_config(folder, architecture, model, torch.float64, {"eos_token_id": 1})
    assert len(list(folder.glob("*.safetensors"))) > 1

    caplog.clear()
    with float64_for_float32():
        again, info = getattr(transformers, CASES[case][0]).from_pretrained(
            folder, dtype=torch.float64, output_loading_info=True
        )
    assert not any(info.values()), info
    assert not caplog.records
    written = again.state_dict()
    for name, tensor in theirs.state_dict().items():
        # 1 is added to the norms of Gemma, and taken away again.
        atol = 1e-15 if case == "gemma3" and "norm" in name else 0
        torch.testing.assert_close(written[name], tensor, rtol=0, atol=atol)
    assert read_model(folder)[1] == model
