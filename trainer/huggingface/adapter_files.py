"""Adapters in the format of PEFT: factors A and B of each module, in and out."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from parallel.grad_norm import local_tensor
from parallel.parallelize import local_slices
from trainer.checkpoint.weight_digest import check_base
from trainer.config.lora import FACTORS, LAYERS, LoraConfig
from trainer.config.train import ConfigError, ModelConfig
from trainer.huggingface.adapter_config import (
    CONFIG,
    AdapterModule,
    adapter_modules,
    fused_patterns,
    read_adapter_config,
    targeted_modules,
    write_adapter_config,
)
from trainer.huggingface.architecture import Architecture
from trainer.huggingface.weights import parameter_shapes

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
BASE = "base_digests"  # of the frozen weights, in the metadata of our own files
THEIR_FACTORS = ("lora_A", "lora_B")
SHOWN = 4

Factors = Callable[[str], Tensor]  # name of a factor here -> its full values


def write_adapter(
    folder: Path,
    architecture: Architecture,
    model: ModelConfig,
    lora: LoraConfig,
    factors: Factors,
    dtype: torch.dtype,
    base: str,
    digests: Mapping[str, str],
) -> None:
    """Write an adapter that PEFT loads; `base` and `digests` are of the frozen model."""
    held = {}
    for module in targeted_modules(architecture, model, lora):
        a_RI = torch.cat([factors(f"{layer}.lora_a") for layer in module.ours])
        b_OR = torch.block_diag(*(factors(f"{layer}.lora_b") for layer in module.ours))
        for name, factor in zip(THEIR_FACTORS, (a_RI, b_OR), strict=True):
            held[f"{PREFIX}{module.theirs}.{name}.weight"] = factor.to(dtype).contiguous()
    save_file(held, folder / WEIGHTS, {"format": "pt", BASE: json.dumps(dict(digests))})
    fields = write_adapter_config(architecture, model, lora, base)
    (folder / CONFIG).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


class AdapterReader:
    """Reads the factors of an adapter's folder; raises ConfigError if they are of another model."""

    def __init__(self, folder: str | Path, architecture: Architecture, model: ModelConfig):
        self.folder = Path(folder)
        lora, fields = read_adapter_config(folder)
        self.base = str(fields.get("base_model_name_or_path") or "")
        self._tensors, self.digests = _read_tensors(self.folder)
        modules = list(adapter_modules(architecture, model))
        self._places = {layer: module for module in modules for layer in module.ours}
        self._shapes = parameter_shapes(model)
        adapted = self._adapted_modules(modules)
        targets = [kind for kind in LAYERS if any(kind in m.kinds for m in adapted)]
        self.lora = replace(lora, targets=targets)
        expected = targeted_modules(architecture, model, self.lora)
        if missing := [m.theirs for m in expected if m not in adapted]:
            raise ConfigError(
                f"{folder} adapts {targets[0]} and more in some blocks, but not "
                f"{_list_names(missing)}; here a kind of layer has adapters in all blocks"
            )
        patterns = tuple(fields.get(name) or {} for name in ("rank_pattern", "alpha_pattern"))
        if any(patterns) and patterns != fused_patterns(adapted, self.lora):
            raise ConfigError(
                f"{self.folder / CONFIG}: rank_pattern and alpha_pattern give modules ranks of "
                f"their own, but one rank is for all here; train with r={lora.rank} alone"
            )
        for module in adapted:
            self._check_shapes(module)

    def _adapted_modules(self, modules: list[AdapterModule]) -> list[AdapterModule]:
        known = {f"{PREFIX}{m.theirs}.{part}.weight": m for m in modules for part in THEIR_FACTORS}
        if unknown := [name for name in self._tensors if name not in known]:
            raise ConfigError(
                f"{self.folder} has {_list_names(unknown)}, which are no factors of linear layers "
                "in this model's blocks; it is an adapter of another model, or of other layers"
            )
        found = [m for m in modules if any(known[name] == m for name in self._tensors)]
        if not found:
            raise ConfigError(f"{self.folder / WEIGHTS} holds no adapter")
        return found

    def _check_shapes(self, module: AdapterModule) -> None:
        """Raise ConfigError unless the factors of a module fit its layers."""
        a_RI, b_OR = self._factors(module)
        outputs = [self._shapes[f"{layer}.weight"][0] for layer in module.ours]
        inputs, rank = self._shapes[f"{module.ours[0]}.weight"][1], self.lora.rank
        found, parts = (tuple(a_RI.shape), tuple(b_OR.shape)), len(outputs)
        fitting = [((r, inputs), (sum(outputs), r)) for r in (rank, rank * parts)]
        if found not in fitting:
            raise ConfigError(
                f"{self.folder} has factors of {module.theirs} of shapes {found}, but this model "
                f"takes {fitting[0]}: it is an adapter of another model"
            )
        blocks = torch.block_diag(*(torch.ones(size, rank) for size in outputs)) > 0
        if a_RI.shape[0] != rank and b_OR[~blocks].any():
            raise ConfigError(
                f"{self.folder} mixes the layers {', '.join(module.ours)} in the adapter of "
                f"{module.theirs}, but here each has its own; merge it into its model with PEFT"
            )

    def _factors(self, module: AdapterModule) -> tuple[Tensor, Tensor]:
        names = [f"{PREFIX}{module.theirs}.{part}.weight" for part in THEIR_FACTORS]
        if missing := [name for name in names if name not in self._tensors]:
            raise ConfigError(f"{self.folder} lacks {missing[0]}")
        return self._tensors[names[0]], self._tensors[names[1]]

    def read(self, name: str) -> Tensor:
        """Return a factor by its name here."""
        layer, _, factor = name.rpartition(".")
        module, rank = self._places[layer], self.lora.rank
        number, (a_RI, b_OR) = module.ours.index(layer), self._factors(module)
        # Layers of one module share A, or have a diagonal block each.
        own = slice(None) if a_RI.shape[0] == rank else slice(number * rank, (number + 1) * rank)
        if factor == "lora_a":
            return a_RI[own]
        outputs = [self._shapes[f"{other}.weight"][0] for other in module.ours]
        return b_OR.split(outputs)[number][:, own]

    @torch.no_grad()
    def load_factors(self, parameters: Mapping[str, Tensor], base: Mapping[str, str]) -> None:
        """Load the local shards of factors; `base` are the digests of the frozen weights."""
        check_base(f"lora.adapter={self.folder}", self.digests, base)
        for name, parameter in parameters.items():
            if name.endswith(FACTORS):
                local_tensor(parameter).copy_(self.read(name)[local_slices(parameter)])


def _read_tensors(folder: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    path = folder / WEIGHTS
    try:
        with safe_open(path, framework="pt") as file:
            digests = json.loads((file.metadata() or {}).get(BASE, "{}"))
            return {name: file.get_tensor(name) for name in file.keys()}, digests  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise ConfigError(f"lora.adapter={folder}: {WEIGHTS} cannot be read ({error})") from error


def _list_names(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
