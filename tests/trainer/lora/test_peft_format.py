"""Adapters beside PEFT in float64: forward, gradients and merged weights, in and out."""

import json
from dataclasses import replace

import peft
import pytest
import torch
from reference_models import build_reference, float64_for_float32, reference_loss
from safetensors.torch import load_file, save_file
from tiny import build

from trainer.config.lora import LoraConfig, adapter_scale
from trainer.config.train import ConfigError
from trainer.huggingface.adapter_config import CONFIG
from trainer.huggingface.adapter_files import WEIGHTS, AdapterReader, write_adapter
from trainer.huggingface.weights import WeightReader
from trainer.lora.adapter import add_adapters

LLAMA = {
    "vocab_size": 50,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
GPT2 = {"vocab_size": 50, "n_positions": 64, "n_embd": 64, "n_layer": 2, "n_head": 4}
PHI3 = LLAMA | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
MODELS = {
    "phi3": ("Phi3ForCausalLM", "Phi3Config", PHI3),
    "llama": ("LlamaForCausalLM", "LlamaConfig", LLAMA),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2),
}
# Of each model, the targets as PEFT names them, and as we do.
CASES = {
    "llama, all": ("llama", "all-linear", LoraConfig(4, 8.0)),
    "llama, rslora": (
        "llama",
        ["q_proj", "down_proj"],
        LoraConfig(4, 8.0, rslora=True, targets=["query", "down"]),
    ),
    "gpt2, fused, rslora": (
        "gpt2",
        ["c_attn"],
        LoraConfig(4, 8.0, rslora=True, targets=["query", "key", "value"]),
    ),
    "phi3, fused": (  # in parts of unequal sizes
        "phi3",
        ["qkv_proj", "gate_up_proj", "o_proj"],
        LoraConfig(4, 8.0, targets=["query", "key", "value", "output", "gate", "up"]),
    ),
    "gpt2, fused": (
        "gpt2",
        ["c_attn", "mlp.c_proj"],
        LoraConfig(4, 8.0, targets=["query", "key", "value", "down"]),
    ),
}


def build_theirs(case: str):
    """Their model with an adapter, A and B random; and the folder reader of its base."""
    name, targets, lora = CASES[case]
    theirs = build_reference(MODELS[name][0], MODELS[name][1], **MODELS[name][2])
    config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        use_rslora=lora.rslora,
        target_modules=targets,
        fan_in_fan_out=name == "gpt2",
        task_type="CAUSAL_LM",
    )
    return theirs, config


def with_random_factors(adapted):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return adapted.double().eval()


def build_ours(reader: WeightReader, lora: LoraConfig):
    ours = build(reader.model)
    reader.load_parameters(dict(ours.named_parameters()))
    add_adapters(ours, lora)
    return ours


def batch():
    return torch.randint(50, (2, 3, 20), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("case", CASES)
def test_an_adapter_of_peft_computes_the_same_here(case, tmp_path):
    theirs, config = build_theirs(case)
    theirs.save_pretrained(tmp_path / "base")
    adapted = with_random_factors(peft.get_peft_model(theirs, config))
    adapted.save_pretrained(tmp_path / "adapter")
    reader = WeightReader(tmp_path / "base")
    adapter = AdapterReader(tmp_path / "adapter", reader.architecture, reader.model)
    assert replace(adapter.lora, targets=[]) == replace(CASES[case][2], targets=[])
    ours = build_ours(reader, adapter.lora)
    adapter.load_factors(dict(ours.named_parameters()), {})

    tokens, targets = batch()
    logits = ours({"tokens": tokens})
    with float64_for_float32():
        expected = adapted(input_ids=tokens).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-12)
    reference_loss(logits, targets).backward()
    reference_loss(expected, targets).backward()
    gradients = {n: p.grad for n, p in ours.named_parameters() if p.grad is not None}
    assert all(name.endswith(("lora_a", "lora_b")) for name in gradients)
    for name, parameter in adapted.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            found = their_gradient(name, gradients, reader)
            torch.testing.assert_close(found, parameter.grad, rtol=0, atol=1e-12)

    merged = adapted.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    expected = WeightReader(tmp_path / "merged")
    weights = dict(ours.named_parameters())
    for name in (name for name in weights if f"{name.removesuffix('.weight')}.lora_a" in weights):
        layer = name.removesuffix(".weight")
        update = weights[f"{layer}.lora_b"] @ weights[f"{layer}.lora_a"]
        whole = weights[name] + adapter_scale(adapter.lora) * update
        torch.testing.assert_close(whole, expected.read_whole(name), rtol=0, atol=1e-12)


def their_gradient(name: str, gradients: dict, reader: WeightReader) -> torch.Tensor:
    """The gradient of a factor of theirs from ours; layers of one module share their A."""
    module = name.removeprefix("base_model.model.").split(".lora_")[0]
    tensors = reader.architecture.tensors(reader.model)
    ours = next(t.ours for t in tensors if t.theirs == f"{module}.weight")
    factor = "lora_a" if "lora_A" in name else "lora_b"
    found = [gradients[n.removesuffix("weight") + factor] for n in ours]
    return sum(found) if factor == "lora_a" else torch.cat(found)


@pytest.mark.parametrize("case", CASES)
def test_our_adapter_is_loaded_by_peft_and_by_us(case, tmp_path):
    theirs, _ = build_theirs(case)
    theirs.save_pretrained(tmp_path / "base")
    reader, lora = WeightReader(tmp_path / "base"), CASES[case][2]
    ours = with_random_factors(build_ours(reader, lora))
    weights = {name: p.detach() for name, p in ours.named_parameters()}
    folder = tmp_path / "adapter"
    folder.mkdir()
    write_adapter(
        folder,
        reader.architecture,
        reader.model,
        lora,
        weights.__getitem__,
        torch.float64,
        str(tmp_path / "base"),
        {},
    )
    with float64_for_float32():
        adapted = peft.PeftModel.from_pretrained(theirs, folder).double().eval()
        tokens, _ = batch()
        expected = adapted(input_ids=tokens).logits
    torch.testing.assert_close(ours({"tokens": tokens}), expected, rtol=0, atol=1e-12)
    again = build_ours(reader, lora)
    adapter = AdapterReader(folder, reader.architecture, reader.model)
    adapter.load_factors(dict(again.named_parameters()), {})
    for name, parameter in again.named_parameters():
        assert parameter.equal(weights[name]), name
    assert adapter.base == str(tmp_path / "base")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A base and an adapter, to be broken."""
    folder = tmp_path_factory.mktemp("adapter")
    theirs, config = build_theirs("llama, all")
    theirs.save_pretrained(folder / "base")
    with_random_factors(peft.get_peft_model(theirs, config)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_dora", True),
        ("modules_to_save", ["lm_head"]),
        ("bias", "all"),
        ("lora_bias", True),
        ("megatron_config", {"a": 1}),
        ("trainable_token_indices", [1]),
        ("layer_replication", [[0, 1]]),
        ("corda_config", {"a": 1}),
        ("a_new_field", 3),
        ("rank_pattern", {"q_proj": 2}),
        ("alpha_pattern", {"q_proj": 2}),
        ("peft_type", "IA3"),
        ("init_lora_weights", "pissa"),
        ("layers_to_transform", [0]),
    ],
)
def test_fields_that_change_the_function_are_refused(saved, tmp_path, field, value):
    fields = json.loads((saved / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(fields | {field: value}))
    (tmp_path / WEIGHTS).write_bytes((saved / WEIGHTS).read_bytes())
    reader = WeightReader(saved / "base")
    with pytest.raises(ConfigError, match=field):
        AdapterReader(tmp_path, reader.architecture, reader.model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(next(n for n in t if "q_proj.lora_B" in n)), "lacks"),
        (lambda t: [t.pop(n) for n in list(t) if "layers.1" in n], "in all blocks"),
        (
            lambda t: t.update({"base_model.model.lm_head.lora_A.weight": torch.ones(4)}),
            "no fac",
        ),
        (lambda t: t.update({n: torch.ones(4, 32) for n in t if "o_proj.lora_A" in n}), "shapes"),
    ],
)
def test_tensors_of_another_model_are_refused(saved, tmp_path, change, message):
    tensors = load_file(saved / WEIGHTS)
    change(tensors)
    save_file(tensors, tmp_path / WEIGHTS)
    (tmp_path / CONFIG).write_text((saved / CONFIG).read_text())
    reader = WeightReader(saved / "base")
    with pytest.raises(ConfigError, match=message):
        AdapterReader(tmp_path, reader.architecture, reader.model)


def test_part_of_a_fused_module_is_refused(tmp_path):
    theirs, _ = build_theirs("gpt2, fused")
    theirs.save_pretrained(tmp_path)
    reader = WeightReader(tmp_path)
    lora = LoraConfig(4, targets=["query"])
    with pytest.raises(ConfigError, match="one module for"):
        write_adapter(
            tmp_path, reader.architecture, reader.model, lora, dict, torch.float64, "", {}
        )
