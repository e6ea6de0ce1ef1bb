"""Sizes of a model that follow its data, as far as keys and bundled sets say them; torch-free."""

from dataclasses import replace

from trainer.config.train import (
    ConfigError,
    DataConfig,
    TrainConfig,
    inputs_of,
    outputs_of,
)

BUNDLED = {
    "bundled:fashion-mnist": {"classes": 10, "image_size": 28, "channels": 1},
    "bundled:fashion-canvas": {"classes": 10, "channels": 1},
    "bundled:trees": {"classes": 1, "channels": 3},
}
CHARACTERS = 64  # entries of a tokenizer of characters, at most


def with_assumed_sizes(config: TrainConfig) -> TrainConfig:
    """Return the configuration with a complete model, without reading the data.

    What only the data know must be given; raises ConfigError naming the keys.
    """
    model, data = config.model, config.data
    known = BUNDLED.get(data.path, {})
    fit_side = data.image_size if data.kind == "detection" else 0
    filled = replace(
        model,
        vocab_size=model.vocab_size or _entries(data),
        max_positions=model.max_positions or data.seq_len,
        classes=model.classes or known.get("classes", 0),
        image_size=model.image_size or known.get("image_size", fit_side),
        channels=model.channels or known.get("channels", 3),
        mels=model.mels or data.mels,
    )
    needed = ["image_size"] if inputs_of(model) == "patches" else []
    needed += ["classes"] if outputs_of(model) in ("classes", "boxes") else []
    if missing := [name for name in needed if not getattr(filled, name)]:
        keys = " ".join(f"model.{name}=N" for name in missing)
        raise ConfigError(
            f"model.{missing[0]}=0 follows the data, which a plan does not read; set {keys}"
        )
    if inputs_of(model) == "patches":
        side = filled.image_size // filled.patch_size
        length = side**2 + (model.pool == "class_token")
        entries = model.queries * model.query_groups
        filled = replace(filled, max_positions=length, vocab_size=entries)
    return replace(config, model=filled)


def _entries(data: DataConfig) -> int:
    """Return the tokens of the data, at most."""
    return CHARACTERS if data.characters else data.vocab_size
