"""Comparing configurations: the keys that make two of them the same training run."""

import dataclasses
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from trainer.config.train import TrainConfig

# What a run is: these keys must not change when it is continued. Everything else may.
IDENTITY = ("model", "compress", "data", "seed", "precision", "batch_size", "overfit_steps")
FREE = ("data.cache", "data.processor")
# A run keeps these for ever: its weights are those of one tokenizer.
FIXED = ("data.kind", "data.tokenizer", "data.vocab_size")
PATHS = ("data.path", "data.tokenizer", "compress.teacher")  # that may be written in several ways


def identity(config: TrainConfig) -> dict[str, Any]:
    """Return the values that make a run what it is, by dotted key."""
    flat = _flat(dataclasses.asdict(config))
    return {
        key: value
        for key, value in flat.items()
        if key.split(".")[0] in IDENTITY and key not in FREE
    }


def differences(config: TrainConfig, before: dict[str, Any]) -> list[str]:
    """Return every key in which the run that `before` is the identity of was another one, as a
    problem.

    Those that config.resume_changed names are none.
    """
    changed = [
        (key, before[key], value)
        for key, value in identity(config).items()
        if key in before and not _alike(key, before[key], value)
    ]
    return [
        f"run_dir={config.run_dir} holds a run with {key}={old}, not {new}; set {key}={old}, "
        + (
            f"or begin another run with these weights: init_from={config.run_dir} run_dir=…"
            if key in FIXED
            else f"choose another run_dir, or go on all the same with resume_changed=[{key}]"
        )
        for key, old, new in changed
        if key in FIXED or not may_change(config, key)
    ]


def absolute(path: str) -> str:
    """Return a path that means the same wherever it is read; other values as they are."""
    if path.startswith("hf:"):
        folder = Path(path.removeprefix("hf:"))
        return f"hf:{folder.absolute()}" if folder.exists() else path
    if not path or path.startswith("bundled:"):
        return path
    with suppress(RuntimeError):  # the home of somebody who is not known here
        return str(Path(path).expanduser().absolute())
    return str(Path(path).absolute())


def _alike(key: str, old: Any, new: Any) -> bool:
    return old == new or (key in PATHS and absolute(str(old)) == absolute(str(new)))


def may_change(config: TrainConfig, key: str) -> bool:
    """Return whether config.resume_changed names a key of the identity, or its section."""
    return key in config.resume_changed or key.split(".")[0] in config.resume_changed


def _flat(values: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found
