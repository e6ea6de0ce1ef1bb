"""Compare the model with transformers and published sizes; test its contract with parallel/."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from tiny import build
from torch import nn

from trainer.config.train import ModelConfig
from trainer.model import Transformer
from trainer.nn.cache import DecodingCache
from trainer.nn.init import init_rows
from trainer.nn.layers import Dropout, keep_mask
from trainer.nn.sequence import FullContext, FullSequence, SequenceInfo
from trainer.verify.cases import FAMILIES, make_batch, scale_down
from trainer.verify.features import FEATURES

PRESETS = Path(__file__).parents[2] / "conf" / "model"


def preset(name: str, **changes) -> ModelConfig:
    values = yaml.safe_load((PRESETS / f"{name}.yaml").read_text())
    return replace(ModelConfig(**values), **changes)


def copy_weights(ours: Transformer, theirs: nn.Module, names: dict[str, str]) -> None:
    """Copy weights by name; `names` maps parts of our names to parts of the reference's."""
    source = dict(theirs.named_parameters())
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            for mine, other in names.items():
                name = name.replace(mine, other)
            parameter.copy_(source.pop(name).reshape(parameter.shape))


def same_gradients(ours: Transformer, theirs: nn.Module, names: dict[str, str]) -> None:
    source = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        for mine, other in names.items():
            name = name.replace(mine, other)
        theirs_grad = source[name].grad.reshape(parameter.shape)
        torch.testing.assert_close(parameter.grad, theirs_grad, rtol=1e-9, atol=1e-12)


LLAMA_NAMES = {
    "embed.tokens": "model.embed_tokens",
    "head.norm": "model.norm",
    "head.output": "lm_head",
    "blocks.": "model.layers.",
    "attention_norm": "input_layernorm",
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.output": "self_attn.o_proj",
    "feed_forward_norm": "post_attention_layernorm",
    "feed_forward.": "mlp.",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}


@pytest.mark.parametrize("scaling", [1.0, 8.0])
def test_llama_equals_transformers(scaling):
    config = ModelConfig(
        layers=2,
        width=64,
        heads=4,
        kv_heads=2,
        ffn_width=96,
        vocab_size=50,
        tied=False,
        rope_theta=500_000.0,
        rope_scaling=scaling,
    )
    rope = {"rope_type": "default", "rope_theta": 500_000.0}
    if scaling != 1.0:
        rope |= {
            "rope_type": "llama3",
            "factor": scaling,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=50,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            rms_norm_eps=1e-5,
            rope_parameters=rope,
            max_position_embeddings=131072,
            tie_word_embeddings=False,
        )
    ).double()
    ours = build(config)
    copy_weights(ours, theirs, LLAMA_NAMES)
    tokens, targets = torch.randint(50, (2, 3, 40))
    logits = ours({"tokens": tokens})
    reference = theirs(tokens).logits
    # transformers computes rotary frequencies in float32 for any model dtype.
    torch.testing.assert_close(logits, reference, rtol=1e-5, atol=1e-5)
    nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
    nn.functional.cross_entropy(reference.flatten(0, 1), targets.flatten()).backward()
    for name, parameter in ours.named_parameters():
        for mine, other in LLAMA_NAMES.items():
            name = name.replace(mine, other)
        theirs_grad = theirs.get_parameter(name).grad
        torch.testing.assert_close(parameter.grad, theirs_grad, rtol=1e-4, atol=1e-6)


def test_gpt2_equals_transformers():
    config = ModelConfig(
        layers=2,
        width=64,
        heads=4,
        ffn_width=256,
        vocab_size=50,
        max_positions=40,
        norm="layernorm",
        activation="gelu_tanh",
        positions="learned",
        bias=True,
    )
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=50,
            n_positions=40,
            n_embd=64,
            n_layer=2,
            n_head=4,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    ).double()
    ours = build(config)
    with torch.no_grad():  # GPT-2's matrices are transposed, and query, key and value are one
        body = theirs.transformer
        ours.embed.tokens.weight.copy_(body.wte.weight)
        ours.embed.positions.weight.copy_(body.wpe.weight)
        ours.head.norm.load_state_dict(body.ln_f.state_dict())
        for block, other in zip(ours.blocks.values(), body.h, strict=True):
            block.attention_norm.load_state_dict(other.ln_1.state_dict())
            block.feed_forward_norm.load_state_dict(other.ln_2.state_dict())
            joint = zip(
                (block.attention.query, block.attention.key, block.attention.value),
                other.attn.c_attn.weight.T.split(64),
                other.attn.c_attn.bias.split(64),
                strict=True,
            )
            for linear, weight, bias in joint:
                linear.load_state_dict({"weight": weight, "bias": bias})
            for linear, conv in (
                (block.attention.output, other.attn.c_proj),
                (block.feed_forward.up, other.mlp.c_fc),
                (block.feed_forward.down, other.mlp.c_proj),
            ):
                linear.load_state_dict({"weight": conv.weight.T, "bias": conv.bias})
    tokens = torch.randint(50, (3, 40))
    torch.testing.assert_close(ours({"tokens": tokens}), theirs(tokens).logits)
    assert ours.head.output.weight is ours.embed.tokens.weight


def test_vit_equals_transformers():
    config = ModelConfig(
        family="encoder",
        layers=2,
        width=64,
        heads=4,
        ffn_width=128,
        norm="layernorm",
        norm_eps=1e-12,
        activation="gelu",
        positions="learned",
        bias=True,
        init="vit",
        image_size=8,
        patch_size=4,
        channels=3,
        classes=5,
        pool="class_token",
    )
    theirs = transformers.ViTForImageClassification(
        transformers.ViTConfig(
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=128,
            image_size=8,
            patch_size=4,
            num_labels=5,
            layer_norm_eps=1e-12,
        )
    ).double()
    nn.init.normal_(theirs.vit.embeddings.cls_token)
    nn.init.normal_(theirs.vit.embeddings.position_embeddings)
    parts = {
        "embed.patches": "vit.embeddings.patch_embeddings.projection",
        "embed.class_token": "vit.embeddings.cls_token",
        "embed.positions.weight": "vit.embeddings.position_embeddings",
        "head.norm": "vit.layernorm",
        "head.output": "classifier",
    }
    block = theirs.vit.layers[0] if hasattr(theirs.vit, "layers") else theirs.vit.encoder.layer[0]
    stem = next(n for n, m in theirs.named_modules() if m is block).removesuffix("0")
    inner = dict(block.named_modules())
    parts |= {"blocks.": stem, "attention_norm": "layernorm_before"}
    parts |= {"feed_forward_norm": "layernorm_after"}
    if "attention.q_proj" in inner:
        parts |= {"attention.query": "attention.q_proj", "attention.key": "attention.k_proj"}
        parts |= {"attention.value": "attention.v_proj", "attention.output": "attention.o_proj"}
        parts |= {"feed_forward.up": "mlp.fc1", "feed_forward.down": "mlp.fc2"}
    else:
        parts |= {f"attention.{p}": f"attention.attention.{p}" for p in ("query", "key", "value")}
        parts |= {"attention.output": "attention.output.dense"}
        parts |= {"feed_forward.up": "intermediate.dense", "feed_forward.down": "output.dense"}
    ours = build(config)
    copy_weights(ours, theirs, parts)
    images, targets = torch.randn(4, 3, 8, 8, dtype=torch.float64), torch.randint(5, (4,))
    logits, reference = ours({"images": images}), theirs(images).logits
    torch.testing.assert_close(logits, reference)
    nn.functional.cross_entropy(logits, targets).backward()
    nn.functional.cross_entropy(reference, targets).backward()
    same_gradients(ours, theirs, parts)


@pytest.mark.parametrize("placement", ["pre", "post"])
def test_decoder_layer_with_memory_equals_torch(placement):
    """Compare cross-attention, padding and places of norms with torch's decoder layer."""
    config = ModelConfig(
        family="encoder_decoder",
        layers=1,
        width=32,
        heads=4,
        ffn_width=64,
        vocab_size=20,
        norm="layernorm",
        norm_placement=placement,
        activation="relu",
        positions="learned",
        max_positions=9,
        bias=True,
    )
    ours = build(config)
    pre = placement == "pre"
    options = {"dropout": 0.0, "norm_first": pre, "batch_first": True, "dtype": torch.float64}
    encoder = nn.TransformerEncoderLayer(32, 4, 64, **options)
    decoder = nn.TransformerDecoderLayer(32, 4, 64, **options)

    def fill(attention, other):
        parts = (attention.query, attention.key, attention.value)
        other.in_proj_weight.copy_(torch.cat([p.weight for p in parts]))
        other.in_proj_bias.copy_(torch.cat([p.bias for p in parts]))
        other.out_proj.load_state_dict(attention.output.state_dict())

    first, second = ours.blocks["0"], ours.blocks["1"]
    with torch.no_grad():
        fill(first.attention, encoder.self_attn)
        fill(second.attention, decoder.self_attn)
        fill(second.cross_attention, decoder.multihead_attn)
        for block, other in ((first, encoder), (second, decoder)):
            other.linear1.load_state_dict(block.feed_forward.up.state_dict())
            other.linear2.load_state_dict(block.feed_forward.down.state_dict())
    source, tokens = torch.randint(20, (3, 7)), torch.randint(20, (3, 9))
    valid = torch.arange(7) < torch.tensor([7, 3, 5])[:, None]
    table, positions = ours.embed.tokens.weight, ours.embed.positions.weight
    memory = encoder(table[source] + positions[:7], src_key_padding_mask=~valid)
    memory = nn.functional.layer_norm(memory, (32,)) if pre else memory
    future = nn.Transformer.generate_square_subsequent_mask(9, dtype=torch.float64)
    x = decoder(table[tokens] + positions, memory, tgt_mask=future, memory_key_padding_mask=~valid)
    reference = (nn.functional.layer_norm(x, (32,)) if pre else x) @ table.T
    logits = ours({"source": source, "source_valid": valid, "tokens": tokens})
    torch.testing.assert_close(logits, reference)
    # A second norm of the same vector would change nothing yet, but it would learn.
    names = {name.removesuffix(".weight") for name, _ in ours.named_parameters()}
    assert {"head.norm", "blocks.0.turn_norm"} & names == (
        {"head.norm", "blocks.0.turn_norm"} if pre else set()
    )


ALL = FAMILIES | FEATURES


@pytest.mark.parametrize("family", ["decoder (Llama)", "decoder (Gemma 3)"])
def test_attention_stays_within_a_document(family):
    config = replace(ALL[family], vocab_size=61, layers=2)
    model = build(config)
    tokens = torch.randint(61, (1, 10))
    documents = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 1, 1]])
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5]])
    packed = model({"tokens": tokens, "documents": documents, "positions": positions})
    alone = torch.cat([model({"tokens": tokens[:, :4]}), model({"tokens": tokens[:, 4:]})], dim=1)
    torch.testing.assert_close(packed, alone)


def described(tensors) -> list[tuple | None]:
    return [None if x is None else (tuple(x.shape), x.dtype) for x in tensors]


@pytest.mark.parametrize("family", ALL)
def test_a_model_split_between_any_two_blocks_is_the_same_model(family):
    config = replace(scale_down(ALL[family]), dropout=0.0)
    batch = make_batch(config, seed=1, step=0)
    whole = build(config)(batch)
    for cut in range(1, len(build(config).blocks)):
        first, second = build(config), build(config)
        first.head, second.embed = None, None
        for name in list(first.blocks):
            del (first if int(name) >= cut else second).blocks[name]
        flow = first(batch)
        assert described(flow) == described(second.flow_like(batch, cut))
        torch.testing.assert_close(second(batch, flow=flow), whole)
        assert described([whole]) == described(second.flow_like(batch, second.depth))


@pytest.mark.parametrize("family", FAMILIES)
def test_consecutive_ranges_of_blocks_equal_the_full_model(family):
    config = replace(scale_down(FAMILIES[family]), dropout=0.0)
    batch, model = make_batch(config, seed=1, step=0), build(config)
    flow = None
    for name in model.blocks:
        flow = model(batch, flow=flow, blocks=[name])
    torch.testing.assert_close(flow, model(batch))


@pytest.mark.parametrize("family", [f for f in ALL if not f.startswith("encoder (")])
def test_decoding_with_a_cache_equals_the_full_forward(family):
    config = replace(scale_down(ALL[family]), dropout=0.0)
    model = build(config).eval()
    batch = {
        k: v for k, v in make_batch(config, 2, 0).items() if k not in ("documents", "positions")
    }
    whole = model(batch)
    cache = DecodingCache(model, capacity=12)
    shared = {k: v for k, v in batch.items() if k.startswith("source")}
    parts = [model(shared | {"tokens": batch["tokens"][:, :7]}, cache=cache)]
    parts += [
        model(shared | {"tokens": batch["tokens"][:, i : i + 1]}, cache=cache) for i in range(7, 12)
    ]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole)


def test_initial_weights_depend_on_seed_and_name_alone():
    config = replace(FAMILIES["decoder (Llama)"], vocab_size=5000, width=512)
    shape = torch.Size((5000, 512))  # three blocks of rows
    whole = init_rows(config, 0, "embed.tokens.weight", shape, 0, 5000)
    parts = [
        init_rows(config, 0, "embed.tokens.weight", shape, a, b)
        for a, b in ((0, 1), (1, 2047), (2047, 4200), (4200, 5000))
    ]
    assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(init_rows(config, 1, "embed.tokens.weight", shape, 0, 5000), whole)
    assert not torch.equal(init_rows(config, 0, "head.output.weight", shape, 0, 5000), whole)
    assert whole.std().item() == pytest.approx(0.02, rel=0.01)
    assert whole.mean().item() == pytest.approx(0.0, abs=1e-4)


def test_initialisation_per_family():
    gpt = preset("gpt2")
    output = init_rows(gpt, 0, "blocks.3.attention.output.weight", torch.Size((768, 768)), 0, 768)
    assert output.std().item() == pytest.approx(0.02 / math.sqrt(2 * 12), rel=0.01)
    vit = preset("vit-b16")
    query = init_rows(vit, 0, "blocks.3.attention.query.weight", torch.Size((768, 768)), 0, 768)
    assert query.abs().max().item() <= 0.04
    assert (query.abs() > 0.039).any()
    assert not init_rows(vit, 0, "head.output.weight", torch.Size((10, 768)), 0, 10).any()
    patches = init_rows(vit, 0, "embed.patches.weight", torch.Size((768, 768)), 0, 768)
    # Truncation at two standard deviations reduces the standard deviation to 0.88 of it.
    assert patches.std().item() == pytest.approx(0.88 / math.sqrt(768), rel=0.01)


def test_dropout_masks_follow_the_sample():
    seeds = torch.tensor([11, 12, 13])
    places = torch.arange(200)
    mask = keep_mask(seeds, 5, 64, 0.1, places)
    assert mask.float().mean().item() == pytest.approx(0.9, abs=0.003)
    alone = keep_mask(seeds[1:2], 5, 64, 0.1, places)
    assert torch.equal(mask[1:2], alone)
    part = torch.tensor([150, 3, 77])
    assert torch.equal(mask[:, part], keep_mask(seeds, 5, 64, 0.1, part))
    assert not torch.equal(mask[0], mask[1])
    assert not torch.equal(mask, keep_mask(seeds, 6, 64, 0.1, places))
    # Neighbouring seeds, sites and positions are independent: masks agree only by chance.
    flat = keep_mask(torch.arange(64), 5, 64, 0.5, torch.arange(64)).flatten(1).double() * 2 - 1
    correlation = (flat @ flat.T / 4096 - torch.eye(64)).abs().max().item()
    assert correlation < 6 / math.sqrt(4096)
    shifted = (flat[:, 1:] * flat[:, :-1]).mean().item()
    assert abs(shifted) < 5 / math.sqrt(64 * 4096)


def test_dropout_keeps_the_expectation_and_is_off_in_evaluation():
    layer = Dropout(0.25)
    x = torch.ones(8, 50, 64)
    stream = SequenceInfo(
        50,
        50,
        FullSequence(),
        FullContext(),
        causal=True,
        positions_S=torch.arange(50),
        seeds_B=torch.arange(8),
    )
    assert layer(x, stream).mean().item() == pytest.approx(1.0, abs=0.02)
    assert layer(x, stream).unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert torch.equal(layer.eval()(x, stream), x)


def test_every_dropout_of_a_model_has_its_own_masks():
    model = Transformer(scale_down(FAMILIES["encoder-decoder"]))
    sites = [m.site for m in model.modules() if isinstance(m, Dropout)]
    assert len(set(sites)) == len(sites)
    assert 0 not in sites


def test_lower_precision_computes_in_its_dtype_with_float32_weights():
    config = replace(scale_down(FAMILIES["encoder-decoder"]), dropout=0.0)
    exact = build(config, dtype=torch.float64)
    model = Transformer(config, torch.bfloat16)
    model.load_state_dict(exact.state_dict())
    batch = make_batch(config, 0, 0)
    logits = model(batch)
    assert logits.dtype == torch.bfloat16
    logits.float().square().mean().backward()
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}
    error = (logits.double() - exact(batch)).abs().max().item()
    assert 0 < error < 0.05
