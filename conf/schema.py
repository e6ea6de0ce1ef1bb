"""The schemas of the YAML values, and the conversion of Hydra's containers to typed objects."""

from collections.abc import Callable, Iterable
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue

from conf.help import help_text
from conf.plan import CalibrateConfig, PlanConfig
from conf.submit import SubmitConfig
from parallel.config_fields import known_keys
from parallel.errors import ConfigError
from trainer.config.train import (
    CompressReportConfig,
    EvaluateConfig,
    ExportConfig,
    GenerateConfig,
    PrepareConfig,
    TeachConfig,
    TrainConfig,
    VerifyConfig,
)
from trainer.run.free_text import escape_text, unescape_text

# Name of a command's YAML file → its dataclass.
SCHEMAS: dict[str, type] = {
    "train": TrainConfig,
    "verify": VerifyConfig,
    "generate": GenerateConfig,
    "evaluate": EvaluateConfig,
    "export": ExportConfig,
    "compress_report": CompressReportConfig,
    "teach": TeachConfig,
    "prepare": PrepareConfig,
    "submit": SubmitConfig,
    "plan": PlanConfig,
    "calibrate": CalibrateConfig,
}


def register_schemas(started: str, scratch: str = "", commands: Iterable[str] = SCHEMAS) -> None:
    """Register the schemas of commands and the resolvers with Hydra.

    `started` is the time stamp of this launch; `scratch` is the folder that Hydra's sweepers write
    to before the sweep's folder exists (empty = no sweep). Hydra copies all schemas that there are
    for each group that `--help` lists, so a launch registers its own alone.
    """
    store = ConfigStore.instance()
    for name in commands:
        store.store(name=f"{name}_schema", node=SCHEMAS[name])
    resolvers: dict[str, Callable[..., str]] = {
        "started": lambda: started,
        "run_name": lambda: f"sweep-{started}" if scratch else run_name(started),
        "scratch": lambda: scratch,
        "help_text": lambda name, _root_: help_text(name, SCHEMAS[name], _root_),
    }
    for key, resolver in resolvers.items():
        OmegaConf.register_new_resolver(key, resolver, replace=True)


def build_config(name: str, values: DictConfig) -> Any:
    """Return the typed configuration of command `name`; ConfigError for unknown keys."""
    known = known_keys(SCHEMAS[name])
    unknown = sorted(_leaf_keys(OmegaConf.to_container(values)) - set(known))
    if unknown:
        raise ConfigError(*(f"{key} does not exist; remove +{key}" for key in unknown))
    try:
        return _to_dataclass(name, OmegaConf.to_container(values, resolve=True))
    except MissingMandatoryValue as error:
        raise ConfigError(f"{error.full_key} needs a value") from error


def to_dataclass(name: str, values: Any) -> Any:
    """Build the dataclass of command `name` from a plain container with decoded text."""
    return _to_dataclass(name, escape_text(values))


def _to_dataclass(name: str, values: Any) -> Any:
    merged = OmegaConf.merge(OmegaConf.structured(SCHEMAS[name]), values)
    return unescape_text(OmegaConf.to_object(merged))


def free_text(name: str) -> set[str]:
    """Return the keys of command `name` whose values are free text: paths, sentences and words."""
    return {key for key, field in known_keys(SCHEMAS[name]).items() if field.type is str}


def run_name(started: str) -> str:
    """Return the name of a new run folder, made of the job and the time."""
    if not HydraConfig.initialized():
        return started
    hydra = HydraConfig.get()
    chosen = hydra.runtime.choices
    by_name = any(override.startswith("experiment=") for override in hydra.overrides.task)
    return f"{chosen['experiment' if by_name else 'model']}-{started}"


def _leaf_keys(values: Any, prefix: str = "") -> set[str]:
    if not isinstance(values, dict) or not values:
        return {prefix[:-1]} if prefix else set()
    return {leaf for key, value in values.items() for leaf in _leaf_keys(value, f"{prefix}{key}.")}
