"""The keys of the optimizer and its schedule: `optim.*`."""

from dataclasses import dataclass

from parallel.config_fields import key


@dataclass
class OptimConfig:
    """The optimizer and its schedule; read by trainer/optim/."""

    name: str = key(
        "adamw",
        "The optimizer",
        choices={
            "adamw": "",
            "adamw8bit": "both moments of matrices in 8 bits with a scale per block, a quarter of "
            "the memory",
        },
    )
    lr: float = key(1e-3, "Peak learning rate", above=0)
    betas: list[float] = key([0.9, 0.95], "Decay of the two moments", at_least=0, below=1)
    eps: float = key(1e-8, "Added to the root of the second moment", above=0)
    weight_decay: float = key(
        0.1, "Decay of the weights, of matrices only; norms and biases never decay", at_least=0
    )
    schedule: str = key(
        "cosine",
        "Learning rate over the steps",
        choices={"cosine": "", "wsd": "warm-up, stable, decay", "constant": ""},
    )
    warmup_steps: int = key(100, "Length of the warm-up, linear from 0", unit="steps", at_least=0)
    decay_share: float = key(
        0.2, "wsd: fraction of the steps in which lr decays to min_lr_ratio", at_least=0, at_most=1
    )
    min_lr_ratio: float = key(
        0.1, "Final learning rate as a fraction of the peak", at_least=0, at_most=1
    )
    max_grad_norm: float = key(1.0, "Global norm to clip at", off=0.0, at_least=0)
