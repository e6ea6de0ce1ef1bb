"""Image encoders: ViT."""

from collections.abc import Iterator
from typing import Any

from trainer.config.train import ModelConfig, inputs_of, outputs_of
from trainer.huggingface.architecture import Architecture, TensorMap
from trainer.huggingface.fields import ConfigFields

ACTIVATIONS = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}


def _read_vit(fields: ConfigFields) -> dict[str, Any]:
    fields.expect("qkv_bias", True)
    fields.take("encoder_stride", None)  # of another head
    for name in ("pooler_output_size", "pooler_act"):  # the classifier reads no pooler
        fields.take(name, None)
    labels = fields.take("id2label", {0: "LABEL_0", 1: "LABEL_1"})
    image_size = fields.take("image_size")
    patches = (image_size // fields.take("patch_size")) ** 2
    return {
        "family": "encoder",
        "layers": fields.take("num_hidden_layers"),
        "width": fields.take("hidden_size"),
        "heads": fields.take("num_attention_heads"),
        "ffn_width": fields.take("intermediate_size"),
        "image_size": image_size,
        "patch_size": fields.take("patch_size"),
        "channels": fields.take("num_channels", 3),
        "classes": len(labels),
        "max_positions": patches + 1,
        "norm": "layernorm",
        "norm_eps": fields.take("layer_norm_eps"),
        "activation": fields.take_choice("hidden_act", ACTIVATIONS, "gelu"),
        "positions": "learned",
        "pool": "class_token",
        "bias": True,
        "tied": False,
        "init": "vit",
    }


def _write_vit(model: ModelConfig) -> dict[str, Any]:
    names = {ours: theirs for theirs, ours in ACTIVATIONS.items()}
    labels = {str(i): f"LABEL_{i}" for i in range(model.classes)}
    return {
        "num_hidden_layers": model.layers,
        "hidden_size": model.width,
        "num_attention_heads": model.heads,
        "intermediate_size": model.ffn_width,
        "image_size": model.image_size,
        "patch_size": model.patch_size,
        "num_channels": model.channels,
        "layer_norm_eps": model.norm_eps,
        "hidden_act": names[model.activation],
        "qkv_bias": True,
        "id2label": labels,
        "label2id": {label: int(i) for i, label in labels.items()},
    }


def _vit_tensors(model: ModelConfig) -> Iterator[TensorMap]:
    embeddings, patch = "vit.embeddings", model.patch_size
    kernel = (model.width, model.channels, patch, patch)
    places = (1, model.max_positions, model.width)
    token = (1, 1, model.width)
    yield TensorMap(f"{embeddings}.cls_token", ("embed.class_token",), shape=token)
    yield TensorMap(f"{embeddings}.position_embeddings", ("embed.positions.weight",), shape=places)
    projection = f"{embeddings}.patch_embeddings.projection"
    yield TensorMap(f"{projection}.weight", ("embed.patches.weight",), shape=kernel)
    yield TensorMap(f"{projection}.bias", ("embed.patches.bias",))
    layers = {
        "layernorm_before": "attention_norm",
        "attention.attention.query": "attention.query",
        "attention.attention.key": "attention.key",
        "attention.attention.value": "attention.value",
        "attention.output.dense": "attention.output",
        "layernorm_after": "feed_forward_norm",
        "intermediate.dense": "feed_forward.up",
        "output.dense": "feed_forward.down",
    }
    for part in ("weight", "bias"):
        for i in range(model.layers):
            for theirs, ours in layers.items():
                name = f"vit.encoder.layer.{i}.{theirs}.{part}"
                yield TensorMap(name, (f"blocks.{i}.{ours}.{part}",))
        yield TensorMap(f"vit.layernorm.{part}", (f"head.norm.{part}",))
        yield TensorMap(f"classifier.{part}", (f"head.output.{part}",))


def _is_vit(model: ModelConfig) -> bool:
    return (
        (inputs_of(model), outputs_of(model)) == ("patches", "classes")
        and (model.norm, model.pool, model.bias) == ("layernorm", "class_token", True)
        and model.activation in ACTIVATIONS.values()
        and model.attention_bias in ("auto", "all")
        and not model.kv_heads % model.heads
        and not model.head_width
    )


VISION = (
    Architecture(
        "vit",
        "ViTForImageClassification",
        "images",
        _read_vit,
        _write_vit,
        _is_vit,
        _vit_tensors,
        prefix="vit.",
    ),
)
