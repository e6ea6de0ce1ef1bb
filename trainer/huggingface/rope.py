"""Rotary settings of a config.json, in the words of transformers, and the way back."""

import math
from typing import Any

from trainer.config.train import ModelConfig, fast_turns
from trainer.huggingface.fields import ConfigFields

# By kind: the settings that it needs, and those that may be missing.
KINDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ("factor", "original_max_position_embeddings")),
    "linear": (("factor",), ("original_max_position_embeddings",)),
    "dynamic": (("factor",), ("original_max_position_embeddings",)),
    "llama3": (
        ("factor", "low_freq_factor", "high_freq_factor"),
        ("original_max_position_embeddings",),
    ),
    "yarn": (
        ("factor",),
        (
            *("original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor"),
            *("mscale", "mscale_all_dim", "truncate"),
        ),
    ),
}
ALWAYS = ("rope_type", "type", "rope_theta", "partial_rotary_factor")


def read_scaling(fields: ConfigFields, rope: dict[str, Any]) -> dict[str, Any]:
    """Return the values of model.rope_* for settings that have `rope_type` and `rope_theta`.

    Settings that are not built are refused.
    """
    name = "rope_parameters" if "rope_parameters" in fields.values else "rope_scaling"
    values = {"rope_theta": float(rope["rope_theta"]), "rope_scaling": 1.0}
    kind = rope["rope_type"]
    if kind not in KINDS:
        fields.refuse(name, f"rope_type can be {', '.join(KINDS)} here")
        return values
    needed, optional = KINDS[kind]
    given = {key for key, value in rope.items() if value is not None}
    if missing := set(needed) - given:
        fields.refuse(name, f"rope_type={kind} needs {', '.join(sorted(missing))}")
        return values
    if unknown := given - {*needed, *optional, *ALWAYS}:
        fields.refuse(name, f"{', '.join(sorted(unknown))} is unknown for rope_type={kind} here")
    if kind == "default" or rope["factor"] == 1.0:
        if rope.get("attention_factor") not in (None, 1.0):
            fields.refuse(name, "attention_factor is for a factor above 1 here")
        return values
    original = fields.take("max_position_embeddings")
    if kind in ("llama3", "yarn"):  # the others know no other number
        original = rope.get("original_max_position_embeddings") or original
    values |= {
        "rope_type": kind,
        "rope_scaling": float(rope["factor"]),
        "rope_original_positions": original,
    }
    if kind == "llama3":
        values["rope_slow_turns"] = float(rope["low_freq_factor"])
        values["rope_fast_turns"] = float(rope["high_freq_factor"])
    return values | _read_yarn(fields, name, rope) if kind == "yarn" else values


def _read_yarn(fields: ConfigFields, name: str, rope: dict[str, Any]) -> dict[str, float]:
    if rope.get("truncate") is False:
        fields.refuse(name, "truncate=false is not built: the ramp is between whole numbers here")
    attention, factor = rope.get("attention_factor"), rope["factor"]
    one, all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
    if attention is None and one and all_dim:
        attention = (0.1 * one * math.log(factor) + 1) / (0.1 * all_dim * math.log(factor) + 1)
    return {
        "rope_slow_turns": float(rope.get("beta_slow") or 1.0),
        "rope_fast_turns": float(rope.get("beta_fast") or 32.0),
        "rope_attention_factor": float(attention or 0.0),
    }


def write_scaling(model: ModelConfig) -> dict[str, Any]:
    """Return a model's rotary settings without the base, in the words of transformers."""
    if model.rope_scaling == 1.0:
        return {"rope_type": "default"}
    values: dict[str, Any] = {"rope_type": model.rope_type, "factor": model.rope_scaling}
    if model.rope_type in ("llama3", "yarn"):
        values["original_max_position_embeddings"] = model.rope_original_positions
        slow, fast = ("low_freq_factor", "high_freq_factor")
        if model.rope_type == "yarn":
            slow, fast = "beta_slow", "beta_fast"
        values |= {slow: model.rope_slow_turns, fast: fast_turns(model)}
    if model.rope_type == "yarn" and model.rope_attention_factor:
        values["attention_factor"] = model.rope_attention_factor
    return values
