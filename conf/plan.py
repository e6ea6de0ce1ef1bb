"""A plan of a training job: its keys."""

from dataclasses import dataclass, field, fields

from conf.submit import ClusterConfig
from parallel.config_fields import key
from trainer.config.train import TrainConfig

CALIBRATION = "calibration.json"


@dataclass
class PlanOptions:
    """Output of a plan; read by launch/cli/planned.py."""

    top: int = key(8, "Layouts that are shown beside the proposed one", at_least=1)
    slack: float = key(
        0.1,
        "Share by which a layout may be slower than the fastest and still be proposed, where it is "
        "simpler: predicted times are no better than that",
        off=0.0,
        off_means="the fastest is proposed",
        at_least=0,
        below=1,
    )
    calibration: str = key(
        CALIBRATION,
        "File of what python launch/plan.py calibrate has measured; used where it is of the "
        "planned kind of device and precision",
        off="",
        off_means="data sheets and published runs",
    )
    trace: bool = key(
        True,
        "Behind the plan, trace the real code of the proposed layout on fake tensors, on the "
        "pipeline rank with the most memory: exact memory and traffic, in up to a minute; Ctrl-C "
        "ends it and nothing else",
        off=False,
        off_means="closed forms alone",
    )


@dataclass
class PlanConfig(TrainConfig):
    """A training job, and the cluster that it is planned for."""

    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    plan: PlanOptions = field(default_factory=PlanOptions)
    tokens: float = key(
        0.0,
        "Tokens of the whole run, for its days and its cost",
        off=0.0,
        off_means="those of its steps",
        at_least=0,
    )
    dollars_per_gpu_hour: float = key(
        0.0, "Price of one device for one hour", off=0.0, off_means="not said", at_least=0
    )
    json: str = key(
        "",
        "File that the plan is written to; beside it goes a page with a picture",
        off="",
        off_means="none",
    )


@dataclass
class CalibrateConfig(TrainConfig):
    """A training job whose small steps are measured, to plan with the rates of this machine."""

    calibration: str = key(CALIBRATION, "File that the measured rates are written to")


def planned_training(config: PlanConfig | CalibrateConfig) -> TrainConfig:
    """Return the training configuration of a plan or a calibration."""
    return TrainConfig(**{part.name: getattr(config, part.name) for part in fields(TrainConfig)})
