"""Validate adapters against model, precision and compression: collect all problems."""

import difflib
from typing import Any

from trainer.config.lora import LAYERS, LoraConfig
from trainer.config.model import is_gated
from trainer.config.train import CompressConfig, ModelConfig, non_default_options
from trainer.config.verify import LORA_FAULTS


def lora_problems(config: Any) -> list[str]:
    """Return the problems of `lora.*` with the rest of a command's configuration."""
    lora, fault = config.lora, getattr(config, "fault", "")
    if not lora.rank:
        if fault in LORA_FAULTS:
            return [f"fault={fault} is one of adapters, but lora.rank=0; set lora.rank=4"]
        return []
    found = _target_problems(lora, config.model) + _compress_problems(config.compress)
    if getattr(config, "precision", "") == "fp8":
        found.append(
            "precision=fp8 multiplies for the gradients of all weights, but lora.rank="
            f"{lora.rank} freezes them; set precision=bf16"
        )
    return found


def _target_problems(lora: LoraConfig, model: ModelConfig) -> list[str]:
    found = []
    for name in lora.targets:
        if name not in LAYERS:
            near = difflib.get_close_matches(name, LAYERS, n=1, cutoff=0.4)
            hint = f"; did you mean {near[0]}?" if near else ""
            found.append(
                f"lora.targets names {name}, which is none of {', '.join(LAYERS)}, the linear "
                f"layers of the blocks{hint}"
            )
    if "gate" in lora.targets and not is_gated(model):
        found.append(
            f"lora.targets names gate, but model.activation={model.activation} has no gate; leave "
            "it out"
        )
    return found


def _compress_problems(compress: CompressConfig) -> list[str]:
    options = non_default_options(compress)
    if compress.bits and not compress.input_bits:
        options = {k: v for k, v in options.items() if k not in ("bits", "group", "input_bits")}
    elif compress.bits:
        return [
            f"compress.input_bits={compress.input_bits} rounds inputs, but with lora.rank "
            f"compress.bits={compress.bits} is for frozen weights alone; set compress.input_bits=0"
        ]
    if not options:
        return []
    given = " and ".join(f"compress.{key}={value}" for key, value in options.items())
    return [
        f"{given} changes weights or what they learn from, but lora.rank freezes them; set "
        "compress=none, and compress the merged model with launch/export.py instead; or lora.rank=0"
    ]
