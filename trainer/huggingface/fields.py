"""The fields of a config.json: each must be read, or have a value that changes nothing."""

import json
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from trainer.config.train import ConfigError

# Fields that do not change the function of the weights, whatever their value. Dropout is a choice
# of training: model.dropout sets it here.
WITHOUT_EFFECT = frozenset(
    (
        *("_name_or_path", "_model_name_or_path", "name_or_path", "transformers_version"),
        *("architectures", "model_type", "dtype", "torch_dtype", "use_cache", "_from_model_config"),
        *("attn_implementation", "_attn_implementation", "_attn_implementation_autoset"),
        *("initializer_range", "initializer_factor", "init_std", "tokenizer_class", "prefix"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id"),
        *("mask_token_id", "id2label", "label2id", "num_labels", "problem_type"),
        *("attention_dropout", "hidden_dropout", "embd_pdrop", "attn_pdrop", "resid_pdrop"),
        *("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"),
        *("embed_pdrop", "dropout", "activation_dropout", "dropout_rate"),
        *("task_specific_params", "finetuning_task", "gradient_checkpointing", "torchscript"),
        *("output_attentions", "output_hidden_states", "return_dict", "use_return_dict"),
        *("pretraining_tp", "use_bfloat16", "chunk_size_feed_forward", "_commit_hash"),
        *("rope_theta", "rope_scaling", "rope_parameters"),  # read by `rope_of`
    )
)
# Fields whose feature is off at this value.
OFF: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False, None),
    "cross_attention_hidden_size": (None,),
    "is_decoder": (False,),
    "is_encoder_decoder": (False,),
    "pruned_heads": ({}, None),
    "tie_encoder_decoder": (False,),
}
# Activations without a gate, here by theirs, and the way back.
ACTIVATIONS = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
THEIR_ACTIVATION = {"relu": "relu", "gelu": "gelu", "gelu_tanh": "gelu_new"}
REQUIRED = object()


class ConfigFields:
    """The fields of one config.json; remembers those that were read."""

    def __init__(self, path: Path, values: dict[str, Any]):
        self.path, self.values = path, values
        self._read: set[str] = set()
        self._problems: list[str] = []

    @classmethod
    def read(cls, path: Path, key: str) -> "ConfigFields":
        """Return the fields of a file; `key` is the config key that names its folder.

        Raises ConfigError if the file is missing or damaged.
        """
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(values, dict):
                raise ValueError("it holds no fields")
        except (OSError, ValueError) as error:
            message = f"{key}={path.parent}: {path.name} cannot be read ({error})"
            raise ConfigError(message) from error
        return cls(path, values)

    def take(self, name: str, default: Any = REQUIRED) -> Any:
        """Return a field's value; null counts as missing. Raises ConfigError if it is required."""
        self._read.add(name)
        value = self.values.get(name)
        if value is not None:
            return value
        if default is REQUIRED:
            near = get_close_matches(name, self.values, n=1, cutoff=0.6)
            hint = f"; it has {near[0]}" if near else ""
            raise ConfigError(f"{self.path} has no {name}{hint}")
        return default

    def take_choice(self, name: str, meanings: dict[Any, Any], default: Any = REQUIRED) -> Any:
        """Return what a field's value means here; another value is a problem."""
        value = self.take(name, default)
        if value not in meanings:
            self.refuse(name, f"{' or '.join(map(str, meanings))} can be computed here")
            return next(iter(meanings.values()))
        return meanings[value]

    def expect(self, name: str, *values: Any) -> None:
        """Refuse a field unless it is missing, null or has one of these values."""
        self._read.add(name)
        value = self.values.get(name)
        if value is not None and value not in values:
            only = " or ".join(map(str, values)) or "null"
            self.refuse(name, f"only {only} can be computed here")

    def refuse(self, name: str, why: str) -> None:
        """Record a problem with a field."""
        self._problems.append(f"{self.path}: {name}={json.dumps(self.values.get(name))}, but {why}")

    def check(self) -> None:
        """Raise ConfigError for all problems, and for each field that was not read."""
        for name, value in self.values.items():
            if name in self._read or name in WITHOUT_EFFECT or value in OFF.get(name, ()):
                continue
            self.refuse(name, "this field is unknown here and could change what is computed")
        if self._problems:
            raise ConfigError(*self._problems)


def rope_of(fields: ConfigFields) -> dict[str, Any]:
    """Return the rotary settings, of either form of the format, with `rope_theta`, `rope_type`.

    transformers 5 writes `rope_parameters` alone; 4 has `rope_theta` beside `rope_scaling`, whose
    type is in `type` or `rope_type`.
    """
    values = fields.values
    rope = dict(values.get("rope_parameters") or values.get("rope_scaling") or {})
    for name in ("rope_theta", "partial_rotary_factor"):
        if values.get(name) is not None:
            rope.setdefault(name, values[name])
    if rope.setdefault("partial_rotary_factor", 1.0) != 1.0:
        fields.refuse("partial_rotary_factor", "all of a head is turned here")
    rope["rope_type"] = rope.get("rope_type") or rope.get("type") or "default"
    rope.setdefault("rope_theta", 10_000.0)
    return rope
