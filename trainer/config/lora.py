"""The keys of low-rank adapters: `lora.*`."""

from dataclasses import dataclass

from parallel.config_fields import key

FACTORS = ("lora_a", "lora_b")  # parameters of an adapter: (rank, inputs) and (outputs, rank)
LAYERS = ("query", "key", "value", "output", "gate", "up", "down")  # the linear layers of a block


@dataclass
class LoraConfig:
    """Low-rank adapters on a frozen model (LoRA); read by trainer/lora/."""

    rank: int = key(
        0,
        "Rank of the trained adapters of linear layers; all other weights are frozen",
        off=0,
        off_means="no adapters: every weight learns",
        at_least=0,
    )
    alpha: float = key(32.0, "An adapter's output is scaled by alpha / rank", above=0)
    rslora: bool = key(
        False, "Scale by alpha / sqrt(rank) instead (rsLoRA), which suits ranks above 64"
    )
    dropout: float = key(
        0.0, "Dropout of the adapters' inputs while training", off=0.0, at_least=0, below=1
    )
    targets: list[str] = key(
        [],
        f"Layers of the blocks that have an adapter: {', '.join(LAYERS)}",
        off=[],
        off_means="all of them",
    )
    adapter: str = key(
        "",
        "Folder of an adapter in PEFT's format, of the model init_from, to begin with; it sets the "
        "other keys but dropout",
        off="",
        off_means="A random, B zero",
    )


def adapter_scale(config: LoraConfig) -> float:
    """Return the factor of an adapter's output."""
    return config.alpha / (config.rank**0.5 if config.rslora else config.rank)
