"""The typed configuration of the trainer; free of torch, so that `--help` answers at once.

Each section has a file here and is named after the room that reads it: `optim.lr` is read in
trainer/optim/.
"""

from dataclasses import dataclass, field

from parallel.config_fields import key
from parallel.errors import ConfigError, DataError, StorageError, UserError
from parallel.strategy import StrategyConfig
from trainer.config.checkpoint import CheckpointConfig
from trainer.config.choices import DEVICES, PRECISIONS, RECOMPUTED
from trainer.config.compress import CompressConfig, non_default_options
from trainer.config.data import DataConfig, PrepareConfig
from trainer.config.eval import EvalConfig
from trainer.config.inference import (
    CompressReportConfig,
    EvaluateConfig,
    ExportConfig,
    GenerateConfig,
    OtherDataConfig,
    TeachConfig,
)
from trainer.config.launch import LaunchConfig
from trainer.config.loss import LossConfig
from trainer.config.metrics import MetricsConfig
from trainer.config.model import (
    ModelConfig,
    classes_of,
    inputs_of,
    is_encoder_decoder,
    outputs_of,
)
from trainer.config.optim import OptimConfig
from trainer.config.verify import VerifyConfig

__all__ = [
    "CheckpointConfig",
    "CompressConfig",
    "CompressReportConfig",
    "ConfigError",
    "DataConfig",
    "DataError",
    "EvalConfig",
    "EvaluateConfig",
    "ExportConfig",
    "GenerateConfig",
    "LaunchConfig",
    "LossConfig",
    "MetricsConfig",
    "ModelConfig",
    "OptimConfig",
    "OtherDataConfig",
    "PrepareConfig",
    "StorageError",
    "StrategyConfig",
    "TeachConfig",
    "TrainConfig",
    "UserError",
    "VerifyConfig",
    "classes_of",
    "inputs_of",
    "is_encoder_decoder",
    "non_default_options",
    "outputs_of",
]

LONGEST_WINDOW = 1024  # losses that the guard against bad steps remembers, at most


@dataclass
class TrainConfig:
    """A whole training job; read by trainer/loop.py, filled from conf/train.yaml and its groups."""

    strategy: StrategyConfig = field(default_factory=StrategyConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    compress: CompressConfig = field(default_factory=CompressConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    precision: str = key("auto", "Precision to compute in", choices=PRECISIONS)
    device: str = key("auto", "Device to compute on", choices=DEVICES)
    steps: int = key(1000, "Optimizer steps of the whole run", at_least=1)
    batch_size: int = key(
        32, "Samples per optimizer step, over all ranks and micro-batches", at_least=1
    )
    micro_batch_size: int = key(
        0,
        "Samples per forward on one rank",
        off=0,
        off_means="all of the rank's at once",
        at_least=0,
    )
    seed: int = key(0, "Weights, order of the samples and dropout follow from it", at_least=0)
    run_dir: str = key("runs", "Folder of this run")
    timeout_seconds: float = key(
        600.0,
        "A rank that makes no progress for so long ends the run and is named; ten times as "
        "long while the run starts or saves",
        unit="seconds",
        off=0.0,
        at_least=0,
    )
    on_bad_step: str = key(
        "stop",
        "What follows a step whose loss or gradient is not finite, or whose loss is a spike; "
        "it is never learned from",
        choices={
            "stop": "end the run",
            "skip": "go on without its update",
            "rollback": "go back to the last good checkpoint and leave its samples out from then "
            "on",
        },
    )
    max_bad_steps: int = key(
        5,
        "Bad steps in a row, or returns in a row to one checkpoint, that stop the run",
        at_least=1,
    )
    spike_sigma: float = key(
        0.0,
        "A loss so many standard deviations above the median of the last losses is a spike",
        off=0.0,
        at_least=0,
    )
    spike_window: int = key(
        64,
        "Steps whose losses a spike is measured by; none before there are so many",
        at_least=8,
        at_most=LONGEST_WINDOW,
    )
    init_from: str = key(
        "",
        "A run, or an exported model, whose weights this one begins with, e.g. to train them "
        "on under another compression",
        off="",
        off_means="drawn from the seed",
    )
    resume: str = key(
        "auto",
        "How to go on with the run in run_dir",
        choices={
            "auto": "from the newest good checkpoint, if there is one",
            "never": "refuse to",
            "always": "refuse to begin at step 0",
            "scratch": "as auto, but begin again where none is good",
        },
    )
    retry_failed: bool = key(
        False, "In a sweep that is gone on with: start points again that failed"
    )
    resume_step: int = key(
        0,
        "Go on from this checkpoint, and set newer ones aside",
        off=0,
        off_means="newest good",
        at_least=0,
    )
    resume_changed: list[str] = key(
        [],
        "Keys, or whole sections, in which the run that is gone on with may be another one, "
        "e.g. [seed,data]",
        off=[],
        off_means="it must be the same run: model, compress, data, seed, precision, "
        "batch_size and overfit_steps",
    )
    activation_checkpointing: str = key(
        "none", "What the backward computes again in place of keeping it", choices=RECOMPUTED
    )
    compile: bool = key(False, "torch.compile of every block")
    overfit_steps: int = key(
        0,
        "Learn from the data of the first so many steps again and again: a model that cannot "
        "fit them has a fault",
        off=0,
        at_least=0,
    )
    detect_anomaly: bool = key(False, "torch names the operation whose gradient is NaN; slow")
    deterministic: bool = key(False, "Refuse kernels whose result varies from run to run")
