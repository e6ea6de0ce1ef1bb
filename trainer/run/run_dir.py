"""The folder of a run: its resolved configuration, its checkpoints, and whether it may resume."""

import dataclasses
import difflib
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf._utils import get_omega_conf_dumper, get_yaml_loader  # what OmegaConf itself uses
from omegaconf.errors import OmegaConfBaseException

from parallel.errors import ConfigError, StorageError
from trainer.atomic_files import write_atomically
from trainer.checkpoint.folder import list_checkpoints
from trainer.checkpoint.identity import IDENTITY, flat_values, run_record
from trainer.checkpoint.manifest import CorruptCheckpointError, check_folder
from trainer.config.train import (
    DataConfig,
    TrainConfig,
    audio_settings,
    longest_source,
)
from trainer.huggingface.registry import is_model_folder, read_model
from trainer.run.free_text import escape_text, unescape_text
from trainer.run.lock import hold_lock
from trainer.run.status import read_status

SAMPLES = "samples"  # folder of pictures that a report shows
EXPORTED = "model.safetensors"  # marks the folder of an exported model


class AlreadyFinishedError(Exception):
    """The run has already finished; the message has its last step."""


def claim_folder(run_dir: str | Path) -> Path:
    """Create a folder of this name, with a number appended if it exists; raises OSError.

    For names made from the time: two runs may start in the same second.
    """
    folder, number = Path(run_dir), 1
    folder.parent.mkdir(parents=True, exist_ok=True)
    while True:
        try:
            new = folder if number == 1 else folder.with_name(f"{folder.name}-{number}")
            new.mkdir()
            return new
        except FileExistsError:
            number += 1


def open_run_dir(config: TrainConfig, held: ExitStack | None = None) -> None:
    """Create or reopen config.run_dir and write config.yaml; raises ConfigError if it cannot.

    The folder is locked before anything is written, until `held` ends (None = not locked). Raises
    AlreadyFinishedError if the run has taken all its steps.
    """
    folder = Path(config.run_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _refuse_run(config, folder)
        if held is not None:
            held.enter_context(hold_lock(folder))
            _refuse_run(config, folder)  # another process has just changed it
        write_atomically(folder / "config.yaml", to_yaml(config))
    except OSError as error:
        raise StorageError(
            f"run_dir={folder} cannot be written ({error.strerror}); choose another run_dir"
        ) from error


def check_run_dir(config: TrainConfig) -> None:
    """Raise the errors of `open_run_dir`, except for a locked folder, and write nothing."""
    folder = Path(config.run_dir)
    try:
        if folder.exists():
            _refuse_run(config, folder)
    except OSError as error:
        raise StorageError(
            f"run_dir={folder} cannot be read ({error.strerror}); choose another run_dir"
        ) from error


def load_config(run_dir: str | Path, key: str = "run_dir") -> TrainConfig:
    """Return the configuration that a run was trained with.

    Of a Hugging Face folder, only the model is known. `key` is the config key that names the
    folder. Raises ConfigError if the folder holds neither.
    """
    if is_model_folder(run_dir):
        architecture, model = read_model(run_dir, key)
        data = DataConfig(kind=architecture.data_kind)
        for name, value in audio_settings(model).items():
            setattr(data, name, value)
        if model.audio_positions:
            data.max_seconds = longest_source(model) / 100  # frames of 10 ms
        return TrainConfig(model=model, data=data, run_dir=str(run_dir))
    path = _config_path(run_dir, key)
    try:
        values = OmegaConf.merge(OmegaConf.structured(TrainConfig), escape_text(_read_yaml(path)))
    except (OmegaConfBaseException, yaml.YAMLError, OSError, ValueError) as error:
        raise ConfigError(
            f"{path} does not fit this version: {str(error).splitlines()[0]}"
        ) from error
    loaded = unescape_text(OmegaConf.to_object(values))
    assert isinstance(loaded, TrainConfig)
    return loaded


def to_yaml(config: TrainConfig) -> str:
    """Return a configuration as YAML that reads back identically, text such as `${…}` included."""
    values = dataclasses.asdict(config)
    return yaml.dump(
        values,
        Dumper=get_omega_conf_dumper(),
        sort_keys=False,
        allow_unicode=True,
        default_flow_style=False,
    )


def _read_yaml(path: Path) -> Any:
    """Return the contents of a YAML file, with OmegaConf's numbers and without interpolation."""
    return yaml.load(path.read_text(encoding="utf-8"), Loader=get_yaml_loader())


def saved_values(run_dir: str | Path) -> dict[str, Any]:
    """Return the values of config.yaml by dotted key, of any version; raises ConfigError."""
    path = _config_path(run_dir)
    try:
        values = _read_yaml(path)
        if not isinstance(values, dict):
            raise ValueError("it holds no keys")
    except (OmegaConfBaseException, yaml.YAMLError, OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error
    return flat_values(values)


def _config_path(run_dir: str | Path, key: str = "run_dir") -> Path:
    path = Path(run_dir) / "config.yaml"
    if not str(run_dir) or not path.is_file():
        raise ConfigError(_no_run(str(run_dir), key))
    return path


def _refuse_run(config: TrainConfig, folder: Path) -> None:
    problems = _run_problems(config, folder)
    if problems:
        raise ConfigError(*problems)
    found = [c for c in list_checkpoints(folder) if config.resume_step in (0, c[0])]
    done = next((s for s, path in reversed(found) if s >= config.steps and _is_good(path)), 0)
    status = read_status(folder)
    # A run stopped during the test evaluation resumes with it.
    left = status is not None and status.state != "finished" and done == config.steps
    if done and not left:
        raise AlreadyFinishedError(
            f"run_dir={folder} is already finished at step {done} (steps={config.steps}); "
            "raise steps to go on"
        )


def _run_problems(config: TrainConfig, folder: Path) -> list[str]:
    record = run_record(config)
    known = [*IDENTITY, *record.identity]
    if unknown := [key for key in config.resume_changed if key not in known]:
        near = difflib.get_close_matches(unknown[0], known, n=1, cutoff=0.0)[0]
        return [
            f"resume_changed names {unknown[0]}, which is no key that makes a run what it is; "
            f"did you mean {near}?"
        ]
    if (folder / EXPORTED).exists():
        return [f"run_dir={folder} holds an exported model; choose another run_dir"]
    if not (folder / "config.yaml").exists():
        if any(not path.name.startswith(".") for path in folder.iterdir()):
            return [f"run_dir={folder} is not empty and holds no run; choose another run_dir"]
        if config.resume == "always" or config.resume_step:
            return [f"{_no_run(config.run_dir)}, or set resume=auto to begin one"]
        return []
    found = list_checkpoints(folder)
    if found and config.resume == "never":
        return [
            f"run_dir={folder} holds a run at step {found[-1][0]} and resume=never; "
            "set resume=auto to go on, or choose another run_dir"
        ]
    problems = record.differences(run_record(load_config(folder)).identity)
    return problems + _checkpoint_problems(config, folder, [step for step, _ in found])


def _checkpoint_problems(config: TrainConfig, folder: Path, steps: list[int]) -> list[str]:
    if config.resume_step and config.resume_step not in steps:
        there = ", ".join(map(str, steps)) or "none"
        return [
            f"resume_step={config.resume_step}, but run_dir={folder} holds no checkpoint of that "
            f"step; there are: {there}; 0 is the newest"
        ]
    if not steps and config.resume == "always":
        return [
            f"run_dir={folder} holds no checkpoint and resume=always; set resume=auto to begin "
            "at step 0"
        ]
    return []


def _is_good(path: Path) -> bool:
    try:
        check_folder(path)
    except CorruptCheckpointError:
        return False
    return True


def _no_run(run_dir: str, key: str = "run_dir") -> str:
    what = f"{key} is empty"
    if run_dir:
        what = (
            f"{key}={run_dir} holds no run (no config.yaml) and no Hugging Face model (no "
            "config.json)"
        )
    parent = Path(run_dir).parent if run_dir else Path("runs")
    runs = [path.parent for path in parent.glob("*/config.yaml")]
    runs.sort(key=lambda run: run.stat().st_mtime)
    names = {run.name: run for run in runs}
    near = difflib.get_close_matches(Path(run_dir).name, names, n=1)
    if near:
        return f"{what}; did you mean {key}={names[near[0]]}?"
    return f"{what}; the newest run is {key}={runs[-1]}" if runs else f"{what}; name a run's folder"
