"""Check what the command line asks of a calibration."""

from dataclasses import fields, replace
from pathlib import Path

from hydra.core.hydra_config import HydraConfig

from conf.plan import CalibrateConfig, planned_training
from conf.validation.validate import find_problems
from launch.cli.inputs import with_absolute_paths, with_imported_model
from parallel.errors import ConfigError
from parallel.strategy import StrategyConfig
from trainer.plan.sizes import with_assumed_sizes


def prepare_calibration(config: CalibrateConfig, world_size: int) -> CalibrateConfig:
    """Return the completed configuration; ConfigError for what is wrong with it.

    The data are not read, and the strategy is one rank's: what is measured follows from the ranks.
    """
    given = list(HydraConfig.get().overrides.task)
    if named := [word for word in given if word.lstrip("+").startswith("strategy")]:
        raise ConfigError(
            f"{named[0]}: a calibration measures every axis that its ranks allow; leave it out"
        )
    training = with_imported_model(with_absolute_paths(planned_training(config)), given)
    training = replace(training, strategy=StrategyConfig(), micro_batch_size=0)
    if found := find_problems(training, 1):
        raise ConfigError(*found)
    if config.batch_size % world_size:
        raise ConfigError(
            f"batch_size={config.batch_size} is not divisible by the {world_size} ranks; set "
            f"batch_size={-(-config.batch_size // world_size) * world_size}"
        )
    parent = Path(config.calibration).resolve().parent
    if not config.calibration or not parent.is_dir():
        raise ConfigError(
            f"calibration={config.calibration} is no file in a folder that exists; set "
            "calibration=calibration.json"
        )
    training = with_assumed_sizes(training)
    return replace(config, **{part.name: getattr(training, part.name) for part in fields(training)})
