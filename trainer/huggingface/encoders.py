"""Token encoders: BERT with its masked-language-model head, or with a classifier."""

from collections.abc import Iterator
from typing import Any

from trainer.config.train import ModelConfig, attention_biases, inputs_of, outputs_of
from trainer.huggingface.architecture import Architecture, TensorMap
from trainer.huggingface.fields import ACTIVATIONS, THEIR_ACTIVATION, ConfigFields


def _read_bert(fields: ConfigFields) -> dict[str, Any]:
    fields.expect("position_embedding_type", "absolute")
    return {
        "family": "encoder",
        "inputs": "tokens",
        "layers": fields.take("num_hidden_layers"),
        "width": fields.take("hidden_size"),
        "heads": fields.take("num_attention_heads"),
        "ffn_width": fields.take("intermediate_size"),
        "vocab_size": fields.take("vocab_size"),
        "max_positions": fields.take("max_position_embeddings"),
        "segments": fields.take("type_vocab_size", 2),
        "norm": "layernorm",
        "norm_placement": "post",
        "norm_eps": fields.take("layer_norm_eps", 1e-12),
        "embed_norm": True,
        "head_dense": True,
        "activation": fields.take_choice("hidden_act", ACTIVATIONS, "gelu"),
        "positions": "learned",
        "bias": True,
    }


def _read_masked_bert(fields: ConfigFields) -> dict[str, Any]:
    fields.expect("tie_word_embeddings", True)
    return _read_bert(fields) | {"outputs": "tokens", "tied": True}


def _read_bert_classifier(fields: ConfigFields) -> dict[str, Any]:
    fields.take("tie_word_embeddings", None)  # of the other head
    labels = fields.take("id2label", {0: "LABEL_0", 1: "LABEL_1"})
    kinds = {"outputs": "classes", "classes": len(labels), "pool": "class_token", "tied": False}
    return _read_bert(fields) | kinds


def _write_bert(model: ModelConfig) -> dict[str, Any]:
    return {
        "num_hidden_layers": model.layers,
        "hidden_size": model.width,
        "num_attention_heads": model.heads,
        "intermediate_size": model.ffn_width,
        "vocab_size": model.vocab_size,
        "max_position_embeddings": model.max_positions,
        "type_vocab_size": model.segments,
        "layer_norm_eps": model.norm_eps,
        "hidden_act": THEIR_ACTIVATION[model.activation],
        "hidden_dropout_prob": model.dropout,
        "attention_probs_dropout_prob": 0.0,
        "position_embedding_type": "absolute",
        "tie_word_embeddings": True,
    }


def _write_bert_classifier(model: ModelConfig) -> dict[str, Any]:
    labels = {str(i): f"LABEL_{i}" for i in range(model.classes)}
    return _write_bert(model) | {
        "id2label": labels,
        "label2id": {label: int(i) for i, label in labels.items()},
    }


def _bert_tensors(model: ModelConfig) -> Iterator[TensorMap]:
    """Yield the tensors of BERT without a head."""
    embeddings = {"word": "tokens", "position": "positions", "token_type": "segments"}
    for theirs, ours in embeddings.items():
        name = f"bert.embeddings.{theirs}_embeddings.weight"
        yield TensorMap(name, (f"embed.{ours}.weight",))
    layers = {
        "attention.self.query": "attention.query",
        "attention.self.key": "attention.key",
        "attention.self.value": "attention.value",
        "attention.output.dense": "attention.output",
        "attention.output.LayerNorm": "attention_sum_norm",
        "intermediate.dense": "feed_forward.up",
        "output.dense": "feed_forward.down",
        "output.LayerNorm": "feed_forward_sum_norm",
    }
    for part in ("weight", "bias"):
        yield TensorMap(f"bert.embeddings.LayerNorm.{part}", (f"embed.norm.{part}",))
        for i in range(model.layers):
            for theirs, ours in layers.items():
                name = f"bert.encoder.layer.{i}.{theirs}.{part}"
                yield TensorMap(name, (f"blocks.{i}.{ours}.{part}",))


def _masked_bert_tensors(model: ModelConfig) -> Iterator[TensorMap]:
    yield from _bert_tensors(model)
    head = "cls.predictions"
    for part in ("weight", "bias"):
        yield TensorMap(f"{head}.transform.dense.{part}", (f"head.dense.{part}",))
        yield TensorMap(f"{head}.transform.LayerNorm.{part}", (f"head.dense_norm.{part}",))
    yield TensorMap(f"{head}.bias", ("head.output.bias",))


def _bert_classifier_tensors(model: ModelConfig) -> Iterator[TensorMap]:
    yield from _bert_tensors(model)
    for part in ("weight", "bias"):
        yield TensorMap(f"bert.pooler.dense.{part}", (f"head.dense.{part}",))
        yield TensorMap(f"classifier.{part}", (f"head.output.{part}",))


def _is_bert(model: ModelConfig) -> bool:
    return (
        (model.family, inputs_of(model), model.positions) == ("encoder", "tokens", "learned")
        and (model.norm, model.norm_placement) == ("layernorm", "post")
        and (model.embed_norm, model.head_dense, model.bias) == (True, True, True)
        and attention_biases(model) == (True, True)
        and (model.attention_scale, model.embed_scale, model.output_scale) == (0.0, 1.0, 1.0)
        and model.segments > 0
        and model.activation in THEIR_ACTIVATION
        and not model.kv_heads % model.heads
        and not model.head_width
    )


def _is_masked_bert(model: ModelConfig) -> bool:
    return _is_bert(model) and outputs_of(model) == "tokens" and model.tied


def _is_bert_classifier(model: ModelConfig) -> bool:
    return _is_bert(model) and (outputs_of(model), model.pool) == ("classes", "class_token")


# The first files of BERT name the parts of its norms otherwise.
RENAMED = ((".LayerNorm.gamma", ".LayerNorm.weight"), (".LayerNorm.beta", ".LayerNorm.bias"))
NEXT_SENTENCE = ("cls.seq_relationship.weight", "cls.seq_relationship.bias")
ENCODERS = (
    Architecture(
        "bert",
        "BertForMaskedLM",
        "masked_text",
        _read_masked_bert,
        _write_bert,
        _is_masked_bert,
        _masked_bert_tensors,
        # Of another head, or of none.
        unlearned=(
            *("bert.pooler.dense.weight", "bert.pooler.dense.bias", *NEXT_SENTENCE),
            "embeddings.position_ids",
        ),
        tied_copies=(
            ("cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"),
            ("cls.predictions.decoder.bias", "cls.predictions.bias"),
        ),
        renamed=RENAMED,
    ),
    Architecture(
        "bert",
        "BertForSequenceClassification",
        "labelled_text",
        _read_bert_classifier,
        _write_bert_classifier,
        _is_bert_classifier,
        _bert_classifier_tensors,
        unlearned=("embeddings.position_ids",),
        renamed=RENAMED,
    ),
)
