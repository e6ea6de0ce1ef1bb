"""The keys of metrics: `metrics.*`."""

from dataclasses import dataclass

from parallel.config_fields import key


@dataclass
class MetricsConfig:
    """Metrics and where they go; read by trainer/metrics/recorder.py."""

    every: int = key(
        10, "Interval between lines on the console and in metrics.jsonl", unit="steps", at_least=1
    )
    sample_tokens: int = key(
        120,
        "Length of the text shown at the end of a language-model run",
        unit="tokens",
        off=0,
        at_least=0,
    )
    timeline: bool = key(
        False,
        "Pipeline: plot the 5th step's actions of each rank over time in run_dir/timeline.png",
    )
    profile_steps: int = key(
        0, "Length of a Chrome trace, after 10 steps of warm-up", unit="steps", off=0, at_least=0
    )
    wandb: str = key("off", "Logging to wandb", choices=("off", "offline", "online"))
    wandb_project: str = key("samestep", "Project of the runs on wandb")
    wandb_group: str = key(
        "", "wandb group of the run, e.g. one per sweep", off="", off_means="none"
    )
    wandb_tags: list[str] = key([], "Tags to find the run by", off=[], off_means="none")
    tensorboard: bool = key(False, "Curves for TensorBoard, in run_dir/tensorboard")
    objective: str = key(
        "eval_loss",
        "Objective reported to an optimizing sweeper: a metric of the last evaluation on the "
        "valid split, e.g. eval_loss, bits_per_character or accuracy",
    )
    peak_tflops: float = key(
        0.0,
        "Peak of the device in the chosen precision, for MFU",
        unit="TFLOP/s",
        off=0.0,
        off_means="look it up",
        at_least=0,
    )
