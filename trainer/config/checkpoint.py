"""The keys of checkpoints: `checkpoint.*`."""

from dataclasses import dataclass

from parallel.config_fields import key


@dataclass
class CheckpointConfig:
    """Checkpoint files; read by trainer/checkpoint/save.py."""

    every: int = key(
        500,
        "Interval between checkpoints",
        unit="steps",
        off=0,
        off_means="only at the end",
        at_least=0,
    )
    keep: int = key(2, "Newest checkpoints kept", off=0, off_means="all", at_least=0)
    check_replicas_every: int = key(
        0,
        "Interval between comparisons of replicated weights and optimizer state across ranks: "
        "they must be bitwise identical",
        unit="steps",
        off=0,
        at_least=0,
    )
    keep_best: bool = key(
        False, "Also keep the checkpoint with the lowest loss on the valid split, at its step"
    )
    keep_every: int = key(
        0, "Also keep the checkpoints at multiples of this many steps", off=0, at_least=0
    )
    huggingface_every: int = key(
        0,
        "Interval between exports as Hugging Face folders, run_dir/huggingface/step-N; a multiple "
        "of checkpoint.every",
        unit="steps",
        off=0,
        at_least=0,
    )
    async_save: bool = key(
        True, "Write files in the background, from a copy in memory, while training continues"
    )
    on_error: str = key(
        "continue",
        "Action after a failed save",
        choices={"continue": "the next one tries again", "stop": ""},
    )
    grace_seconds: float = key(
        0.0,
        "Warn if a save takes longer than this, the scheduler's grace period",
        unit="seconds",
        off=0.0,
        at_least=0,
    )
