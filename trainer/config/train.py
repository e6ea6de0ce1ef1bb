"""The typed configuration of the trainer; free of torch, so that `--help` answers at once.

Each section has a file here and is named after the room that reads it: `optim.lr` is read in
trainer/optim/.
"""

from dataclasses import dataclass, field

from parallel.config_fields import key
from parallel.errors import ConfigError, DataError, StorageError, UserError
from parallel.strategy import StrategyConfig
from trainer.config.audio import audio_settings
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
from trainer.config.lora import LoraConfig
from trainer.config.loss import LossConfig
from trainer.config.metrics import MetricsConfig
from trainer.config.model import (
    ModelConfig,
    attention_biases,
    classes_of,
    fast_turns,
    has_key_bias,
    has_window,
    head_width_of,
    inputs_of,
    is_encoder_decoder,
    is_gated,
    longest_source,
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
    "LoraConfig",
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
    "attention_biases",
    "audio_settings",
    "classes_of",
    "fast_turns",
    "has_key_bias",
    "has_window",
    "head_width_of",
    "inputs_of",
    "is_encoder_decoder",
    "is_gated",
    "longest_source",
    "non_default_options",
    "outputs_of",
    "used_compression",
]

LONGEST_WINDOW = 1024  # losses that the guard against bad steps remembers, at most


@dataclass
class TrainConfig:
    """A training job; read by trainer/loop.py, filled from conf/train.yaml and its groups."""

    strategy: StrategyConfig = field(default_factory=StrategyConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    compress: CompressConfig = field(default_factory=CompressConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    precision: str = key("auto", "Precision to compute in", choices=PRECISIONS)
    device: str = key("auto", "Device to compute on", choices=DEVICES)
    steps: int = key(1000, "Optimizer steps of the run", at_least=1)
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
    seed: int = key(0, "Seed of the initial weights, the sample order and dropout", at_least=0)
    run_dir: str = key("runs", "Folder of this run")
    timeout_seconds: float = key(
        600.0,
        "Time without progress after which a rank is reported and the run ends; ten times as "
        "long while the run starts or saves",
        unit="seconds",
        off=0.0,
        at_least=0,
    )
    on_bad_step: str = key(
        "stop",
        "Action after a step whose loss or gradient is not finite, or whose loss is a spike; its "
        "update is never applied",
        choices={
            "stop": "end the run",
            "skip": "continue without its update",
            "rollback": "return to the last good checkpoint and leave its samples out from then on",
        },
    )
    max_bad_steps: int = key(
        5,
        "Consecutive bad steps, or rollbacks to one checkpoint, that stop the run",
        at_least=1,
    )
    spike_sigma: float = key(
        0.0,
        "Standard deviations above the median of the last losses at which a loss is a spike",
        off=0.0,
        at_least=0,
    )
    spike_window: int = key(
        64,
        "Last losses that define a spike; no spikes are detected before there are as many",
        at_least=8,
        at_most=LONGEST_WINDOW,
    )
    init_from: str = key(
        "",
        "A run, an exported model or a Hugging Face folder to initialise the weights from; the "
        "latter sets model.* and the tokenizer too",
        off="",
        off_means="random weights from the seed",
    )
    resume: str = key(
        "auto",
        "How to resume the run in run_dir",
        choices={
            "auto": "from the newest good checkpoint, if there is one",
            "never": "refuse to",
            "always": "refuse to start at step 0",
            "scratch": "as auto, but restart at step 0 if none is good",
        },
    )
    retry_failed: bool = key(False, "When a sweep is resumed: restart its failed jobs")
    resume_step: int = key(
        0,
        "Resume from this checkpoint, and set newer ones aside",
        off=0,
        off_means="newest good",
        at_least=0,
    )
    resume_changed: list[str] = key(
        [],
        "Keys, or sections, that may differ from those of the run that is resumed, e.g. "
        "[seed,data]",
        off=[],
        off_means="these must be identical: model, compress, lora (and its init_from), data, seed, "
        "precision, batch_size and overfit_steps",
    )
    activation_checkpointing: str = key(
        "none", "Activations recomputed in the backward instead of stored", choices=RECOMPUTED
    )
    compile: bool = key(False, "torch.compile of every block")
    check_memory: bool = key(
        True,
        "Refuse a layout whose tensors take more memory than a device has, by the plan of "
        "launch/plan.py",
        off=False,
        off_means="warn, and let it run out of memory",
    )
    overfit_steps: int = key(
        0,
        "Train on the data of the first overfit_steps steps only, repeatedly: a correct model "
        "can fit them",
        off=0,
        at_least=0,
    )
    detect_anomaly: bool = key(
        False, "torch.autograd.detect_anomaly: report the operation whose gradient is NaN; slow"
    )
    deterministic: bool = key(
        False, "Use deterministic kernels only; an operation without one raises"
    )


def used_compression(run: TrainConfig) -> CompressConfig:
    """Return the compression with which a trained run is used: none, if it merges adapters."""
    return CompressConfig() if run.lora.rank else run.compress
