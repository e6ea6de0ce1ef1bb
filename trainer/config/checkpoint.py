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
        "Interval between comparisons of weights and moments that several ranks have a copy "
        "of: they must be the same to the bit",
        unit="steps",
        off=0,
        at_least=0,
    )
    keep_best: bool = key(
        False, "Keep also the one with the least loss on the valid split, at its step"
    )
    keep_every: int = key(0, "Keep also the checkpoints of every so many steps", off=0, at_least=0)
    async_save: bool = key(
        True, "Training goes on while files are written, beside a copy in memory"
    )
    on_error: str = key(
        "continue",
        "What follows a save that failed",
        choices={"continue": "the next one tries again", "stop": ""},
    )
    grace_seconds: float = key(
        0.0,
        "Warn if a save takes longer: what a scheduler grants",
        unit="seconds",
        off=0.0,
        at_least=0,
    )
