"""The folder of a run: what may be continued there, its resolved config and its checkpoints."""

import dataclasses
import difflib
import re
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from parallel.config import ConfigError
from trainer.config import TrainConfig
from trainer.lock import hold
from trainer.status import read_status, write_atomically

# What a run is: these keys must not change when it is continued. Everything else may.
IDENTITY = ("model", "data", "seed", "precision", "batch_size")
FREE = ("data.cache",)


class AlreadyFinishedError(Exception):
    """There is nothing left to do in a run's folder; the message says where it ended."""


def open_run_dir(config: TrainConfig, held: ExitStack | None = None) -> None:
    """Makes or re-opens config.run_dir and writes config.yaml; raises ConfigError if it cannot.

    The folder is locked before anything is written there, until `held` ends (None = it is not).
    Raises AlreadyFinishedError if the run has done its steps.
    """
    folder = Path(config.run_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _refuse(config, folder)
        if held is not None:
            held.enter_context(hold(folder))
            _refuse(config, folder)  # what it was a moment ago is another's
        write_atomically(folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.structured(config)))
    except OSError as error:
        raise ConfigError(
            f"run_dir={folder} cannot be written ({error.strerror}); choose another run_dir"
        ) from error


def checkpoint_path(run_dir: str | Path, step: int) -> Path:
    """The folder of the checkpoint at `step`."""
    return Path(run_dir) / "checkpoints" / f"step-{step:08d}"


def checkpoints(run_dir: str | Path) -> list[tuple[int, Path]]:
    """The complete checkpoints of a run as (step, folder), oldest first."""
    folder = Path(run_dir) / "checkpoints"
    named = [(re.fullmatch(r"step-(\d+)", path.name), path) for path in folder.glob("step-*")]
    return sorted((int(match[1]), path) for match, path in named if match and path.is_dir())


def tokenizer_path(run_dir: str | Path) -> Path:
    """The run's own copy of its tokenizer: what it is used with when the data are gone."""
    return Path(run_dir) / "tokenizer.json"


def load_config(run_dir: str | Path) -> TrainConfig:
    """The configuration a run was trained with; raises ConfigError if the folder holds no run."""
    path = Path(run_dir) / "config.yaml"
    if not str(run_dir) or not path.is_file():
        raise ConfigError(_no_run(str(run_dir)))
    try:
        values = OmegaConf.merge(OmegaConf.structured(TrainConfig), OmegaConf.load(path))
    except (OmegaConfBaseException, YAMLError) as error:
        raise ConfigError(
            f"{path} does not fit this version: {str(error).splitlines()[0]}"
        ) from error
    loaded = OmegaConf.to_object(values)
    assert isinstance(loaded, TrainConfig)
    return loaded


def _refuse(config: TrainConfig, folder: Path) -> None:
    problems = _problems(config, folder)
    if problems:
        raise ConfigError(*problems)
    found = checkpoints(folder)
    newest = found[-1][0] if found else 0
    status = read_status(folder)
    # A run that was stopped while it measured the test split goes on with that.
    left = status is not None and status.state != "finished" and newest == config.steps
    if newest >= config.steps and not left:
        raise AlreadyFinishedError(
            f"run_dir={folder} is already finished at step {newest} (steps={config.steps}); "
            "raise steps to go on"
        )


def _problems(config: TrainConfig, folder: Path) -> list[str]:
    if not (folder / "config.yaml").exists():
        if any(not path.name.startswith(".") for path in folder.iterdir()):
            return [f"run_dir={folder} is not empty and holds no run; choose another run_dir"]
        return []
    found = checkpoints(folder)
    newest = found[-1][0] if found else 0
    if found and config.resume == "never":
        return [
            f"run_dir={folder} holds a run at step {newest} and resume=never; "
            "set resume=auto to go on, or choose another run_dir"
        ]
    return _differences(load_config(folder), config)


def _differences(old: TrainConfig, new: TrainConfig) -> list[str]:
    before, after = _flat(dataclasses.asdict(old)), _flat(dataclasses.asdict(new))
    return [
        f"run_dir={new.run_dir} holds a run with {key}={before[key]}, not {after[key]}; "
        f"set {key}={before[key]}, or choose another run_dir"
        for key in after
        if key.split(".")[0] in IDENTITY and key not in FREE and before[key] != after[key]
    ]


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found


def _no_run(run_dir: str) -> str:
    what = f"run_dir={run_dir} holds no run (no config.yaml)" if run_dir else "run_dir is empty"
    parent = Path(run_dir).parent if run_dir else Path("runs")
    runs = [path.parent for path in parent.glob("*/config.yaml")]
    runs.sort(key=lambda run: run.stat().st_mtime)
    names = {run.name: run for run in runs}
    near = difflib.get_close_matches(Path(run_dir).name, names, n=1)
    if near:
        return f"{what}; did you mean run_dir={names[near[0]]}?"
    return (
        f"{what}; the newest run is run_dir={runs[-1]}" if runs else f"{what}; name a run's folder"
    )
