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


T5 = {
    "vocab_size": 50,
    "d_model": 64,
    "d_kv": 24,
    "d_ff": 96,
    "num_layers": 2,
    "num_decoder_layers": 1,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 20,
    "decoder_start_token_id": 0,
}
BART = {
    "vocab_size": 50,
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "max_position_embeddings": 64,
}
# Published ones begin with the padding, whose vector gets no gradient there.
MARIAN = BART | {"pad_token_id": 49, "decoder_start_token_id": 3, "scale_embedding": True}
BERT = {
    "vocab_size": 50,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 64,
    "num_labels": 5,
}
WHISPER = {
    **{name: value for name, value in BART.items() if name != "max_position_embeddings"},
    "num_mel_bins": 8,
    "max_source_positions": 15,
    "max_target_positions": 40,
    "decoder_start_token_id": 3,
    "pad_token_id": 49,
}
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
    "t5": ("T5ForConditionalGeneration", "T5Config", T5),
    "t5 v1.1": (
        "T5ForConditionalGeneration",
        "T5Config",
        T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    ),
    "marian": ("MarianMTModel", "MarianConfig", MARIAN),
    "nllb": (
        "M2M100ForConditionalGeneration",
        "M2M100Config",
        BART | {"pad_token_id": 1, "decoder_start_token_id": 2},
    ),
    "whisper": ("WhisperForConditionalGeneration", "WhisperConfig", WHISPER),
    "bert": ("BertForMaskedLM", "BertConfig", BERT),
    "bert, classes": ("BertForSequenceClassification", "BertConfig", BERT),
    "vit": ("ViTForImageClassification", "ViTConfig", VIT),
}


def random_inputs(model) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    # Id 0 and 49 are padding, whose vectors get no gradient there.
    if model.inputs == "tokens":  # auto for the others
        tokens, targets = torch.randint(2, 49, (2, 3, 40), generator=generator)
        valid = torch.arange(40) < torch.tensor([[40], [7], [19]])
        segments = (torch.arange(40) > 5).long().expand(3, -1)
        targets = targets[:, 0] % 5 if model.classes else targets
        return {"tokens": tokens, "source_valid": valid, "segments": segments}, targets
    if model.family == "encoder":
        images = torch.randn(3, 3, 16, 16, generator=generator, dtype=torch.float64)
        return {"images": images}, torch.randint(5, (3,), generator=generator)
    tokens, targets = torch.randint(2, 49, (2, 3, 40), generator=generator)
    if model.family == "decoder":
        return {"tokens": tokens}, targets
    tokens[:, 0] = model.start_token
    if model.inputs == "audio":
        frames = torch.randn(3, 30, model.mels, generator=generator, dtype=torch.float64)
        return {"tokens": tokens, "source": frames}, targets
    source = torch.randint(2, 49, (3, 30), generator=generator)
    valid = torch.arange(30) < torch.tensor([[30], [7], [19]])
    return {"tokens": tokens, "source": source, "source_valid": valid}, targets


def for_transformers(inputs):
    names = {"tokens": "input_ids", "images": "pixel_values"}
    if "segments" in inputs:
        names |= {"segments": "token_type_ids", "source_valid": "attention_mask"}
    if "source" in inputs:
        names |= {"tokens": "decoder_input_ids", "source": "input_ids"}
        names["source_valid"] = "attention_mask"
    if inputs.get("source", torch.empty(0)).dim() == 3:
        inputs = inputs | {"source": inputs["source"].transpose(1, 2)}
        names["source"] = "input_features"
    return {names[name]: value for name, value in inputs.items()}


def their_logits(theirs, inputs):
    with float64_for_float32():
        return theirs(**for_transformers(inputs)).logits


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
        torch.testing.assert_close(gradient.double(), expected.files.read(name), rtol=0, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_logits_in_float32_are_those_of_transformers_as_it_is(case, tmp_path):
    build_reference(*CASES[case][:2], **CASES[case][2]).float().save_pretrained(tmp_path)
    theirs = getattr(transformers, CASES[case][0]).from_pretrained(tmp_path, dtype=torch.float32)
    reader = WeightReader(tmp_path)
    ours = build(reader.model, dtype=torch.float32)
    reader.load_parameters(dict(ours.named_parameters()))
    inputs = random_inputs(reader.model)[0]
    inputs = {k: v.float() if v.is_floating_point() else v for k, v in inputs.items()}
    reference = theirs.eval()(**for_transformers(inputs)).logits
    atol = 5e-6 * max(1.0, reference.abs().max().item())
    torch.testing.assert_close(ours(inputs), reference, rtol=0, atol=atol)


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
    write_config(folder, architecture, model, torch.float64, {"eos_token_id": 1, "pad_token_id": 1})
    assert len(list(folder.glob("*.safetensors"))) > 1

    caplog.clear()
    with float64_for_float32():
        again, info = getattr(transformers, CASES[case][0]).from_pretrained(
            folder, dtype=torch.float64, output_loading_info=True
        )
    assert not any(info.values()), info
    # Version 5 takes the head of every T5 as tied, and says so when a file has another.
    assert not [record for record in caplog.records if "so we will NOT tie them" not in record.msg]
    written = again.state_dict()
    for name, tensor in theirs.state_dict().items():
        # 1 is added to the norms of Gemma, and taken away again.
        atol = 1e-15 if case == "gemma3" and "norm" in name else 0
        torch.testing.assert_close(written[name], tensor, rtol=0, atol=atol)
    assert read_model(folder)[1] == model
