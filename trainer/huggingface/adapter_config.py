"""The adapter_config.json of PEFT, and the modules of an architecture that can have adapters."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.config.lora import LAYERS, LoraConfig
from trainer.config.train import ConfigError, ModelConfig
from trainer.huggingface.architecture import Architecture
from trainer.huggingface.fields import ConfigFields

CONFIG = "adapter_config.json"
# Fields that do not change what an adapter computes, given its tensors.
WITHOUT_EFFECT = (
    *("task_type", "auto_mapping", "peft_version", "revision", "inference_mode", "target_modules"),
    *("exclude_modules", "layers_pattern", "fan_in_fan_out", "megatron_core", "qalora_group_size"),
)
TASKS = {"decoder": "CAUSAL_LM", "encoder_decoder": "SEQ_2_SEQ_LM"}


@dataclass(frozen=True)
class AdapterModule:
    """A linear module of an architecture, and the layers here whose outputs follow in its."""

    theirs: str
    ours: tuple[str, ...]
    transposed: bool

    @property
    def kinds(self) -> set[str]:
        """Return which of LAYERS they are."""
        return {layer.rpartition(".")[2] for layer in self.ours}


def adapter_modules(architecture: Architecture, model: ModelConfig) -> Iterator[AdapterModule]:
    """Yield the linear modules of the blocks; raises ConfigError for an unknown naming."""
    if model.family not in TASKS:
        raise ConfigError(
            f"model.family={model.family}: PEFT names the modules of {architecture.class_name} "
            "otherwise than its files do, which is not known here; export the merged model with "
            "format=huggingface"
        )
    for tensor in architecture.tensors(model):
        ours = tuple(name.removesuffix(".weight") for name in tensor.ours)
        kinds = [name.startswith("blocks.") and name.rpartition(".")[2] in LAYERS for name in ours]
        if tensor.theirs.endswith(".weight") and all(kinds):
            yield AdapterModule(tensor.theirs.removesuffix(".weight"), ours, tensor.transposed)


def targeted_modules(
    architecture: Architecture, model: ModelConfig, lora: LoraConfig
) -> list[AdapterModule]:
    """Return the modules that have an adapter; ConfigError if only a part of one has."""
    targets = set(lora.targets or LAYERS)
    found = []
    for module in adapter_modules(architecture, model):
        if module.kinds <= targets:
            found.append(module)
        elif module.kinds & targets:
            raise ConfigError(
                f"lora.targets={lora.targets} adapts {', '.join(sorted(module.kinds & targets))} "
                f"alone, but {architecture.class_name} has one module for "
                f"{', '.join(sorted(module.kinds))}; adapt all of them, or export the merged "
                "model with format=huggingface"
            )
    return found


def write_adapter_config(
    architecture: Architecture, model: ModelConfig, lora: LoraConfig, base: str
) -> dict[str, Any]:
    """Return the fields of an adapter_config.json; `base` names the model that is adapted."""
    modules = targeted_modules(architecture, model, lora)
    ranks, alphas = fused_patterns(modules, lora)
    return {
        "peft_type": "LORA",
        "task_type": TASKS[model.family],
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "use_rslora": lora.rslora,
        "target_modules": _target_names(architecture, model, modules),
        "fan_in_fan_out": any(module.transposed for module in modules),
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "bias": "none",
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "use_dora": False,
        "lora_bias": False,
    }


def fused_patterns(
    modules: list[AdapterModule], lora: LoraConfig
) -> tuple[dict[str, int], dict[str, float]]:
    """Return the ranks and alphas of modules of several layers, whose adapters are diagonal blocks.

    Such a module has the rank of all together, and an alpha that leaves the scale as it is.
    """
    parts = {_short_name(m.theirs): len(m.ours) for m in modules if len(m.ours) > 1}
    ranks = {name: count * lora.rank for name, count in parts.items()}
    growth = {name: count**0.5 if lora.rslora else count for name, count in parts.items()}
    return ranks, {name: lora.alpha * factor for name, factor in growth.items()}


def read_adapter_config(folder: str | Path, key: str = "lora.adapter") -> tuple[LoraConfig, Any]:
    """Return an adapter's settings without their targets, and its fields; raises ConfigError."""
    path = Path(folder) / CONFIG
    values = ConfigFields.read(path, key).values
    # What is off cannot matter: every other field must be known.
    fields = ConfigFields(path, {name: value for name, value in values.items() if value})
    fields.expect("peft_type", "LORA")
    fields.expect("bias", "none")
    fields.expect("init_lora_weights", True, "gaussian")  # others change the frozen weights
    for name in (*WITHOUT_EFFECT, "base_model_name_or_path", "rank_pattern", "alpha_pattern"):
        fields.take(name, None)
    lora = LoraConfig(
        rank=int(fields.take("r")),
        alpha=float(fields.take("lora_alpha")),
        rslora=bool(fields.take("use_rslora", False)),
        dropout=float(fields.take("lora_dropout", 0.0)),
    )
    fields.check()
    return lora, values


def _target_names(
    architecture: Architecture, model: ModelConfig, modules: list[AdapterModule]
) -> list[str]:
    """Return names that match these modules alone: the last part, or the last two."""
    chosen = {module.theirs for module in modules}
    every = {t.theirs.removesuffix(".weight") for t in architecture.tensors(model)}
    found = set()
    for name in chosen:
        last = name.rpartition(".")[2]
        alone = {other for other in every if other.endswith(f".{last}")} <= chosen
        found.add(last if alone else _short_name(name))
    return sorted(found)


def _short_name(module: str) -> str:
    return ".".join(module.split(".")[-2:])
