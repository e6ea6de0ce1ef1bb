"""Comparison of configurations: the keys that identify a training run."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trainer.config.train import OptimConfig, StrategyConfig, TrainConfig

# The identity of a run: these keys must not change on resume. All others may.
BASE = "init_from"  # with adapters alone: no checkpoint holds the frozen weights
IDENTITY = (
    *("model", "compress", "lora", BASE, "data", "seed", "precision", "batch_size"),
    "overfit_steps",
)
FREE = ("data.cache", "data.processor")
# Never changed on resume: the weights belong to one tokenizer.
FIXED = ("data.kind", "data.tokenizer", "data.vocab_size")
PATHS = (
    "data.path",
    "data.tokenizer",
    "compress.teacher",
    "lora.adapter",
    BASE,
)  # compared as absolute paths


@dataclass(frozen=True)
class RunRecord:
    """The record of a run in its checkpoints, compared with the configuration on resume."""

    run_dir: str
    identity: Mapping[str, Any]  # values of the identity keys, by dotted key
    resume_changed: Sequence[str]  # identity keys, or sections, allowed to differ
    data: str  # fingerprint of the training data; empty = not compared
    strategy: StrategyConfig
    steps: int  # of the whole run
    optim: OptimConfig

    def may_change(self, key: str) -> bool:
        """Return whether `resume_changed` names a key of the identity, or its section."""
        return key in self.resume_changed or key.split(".")[0] in self.resume_changed

    def differences(self, before: Mapping[str, Any]) -> list[str]:
        """Return a problem for each identity key whose value differs from `before`.

        Keys named in `resume_changed` are left out.
        """
        changed = [
            (key, before[key], value)
            for key, value in self.identity.items()
            if key in before and not _is_same_value(key, before[key], value)
        ]
        return [
            f"run_dir={self.run_dir} holds a run with {key}={old}, not {new}; set {key}={old}, "
            + (
                f"or begin another run with these weights: init_from={self.run_dir} run_dir=…"
                if key in FIXED
                else f"choose another run_dir, or go on all the same with resume_changed=[{key}]"
            )
            for key, old, new in changed
            if key in FIXED or not self.may_change(key)
        ]


def run_record(config: TrainConfig, data: str = "") -> RunRecord:
    """Return the record of a configured run; `data` is the fingerprint of its training data."""
    identity = {
        key: value
        for key, value in flat_values(asdict(config)).items()
        if key.split(".")[0] in IDENTITY and key not in FREE and (key != BASE or config.lora.rank)
    }
    return RunRecord(
        run_dir=config.run_dir,
        identity=identity,
        resume_changed=config.resume_changed,
        data=data,
        strategy=config.strategy,
        steps=config.steps,
        optim=config.optim,
    )


def absolute_path(path: str) -> str:
    """Return a path independent of the working directory; other values unchanged."""
    if path.startswith("hf:"):
        folder = Path(path.removeprefix("hf:"))
        return f"hf:{folder.absolute()}" if folder.exists() else path
    if not path or path.startswith("bundled:"):
        return path
    with suppress(RuntimeError):  # ~user of an unknown user
        return str(Path(path).expanduser().absolute())
    return str(Path(path).absolute())


def _is_same_value(key: str, old: Any, new: Any) -> bool:
    return old == new or (key in PATHS and absolute_path(str(old)) == absolute_path(str(new)))


def flat_values(values: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of all sections, by dotted key."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= flat_values(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found
