"""Validate a detector: pure functions that collect what its loss and its boxes do not go with."""

from math import isqrt

from trainer.config.train import CompressConfig, ModelConfig, TrainConfig, inputs_of

SHORTENS = ("merge", "pool_after", "drop")


def detector_problems(model: ModelConfig) -> list[str]:
    """Return the problems of a model with model.outputs=boxes."""
    found, given = [], f"model.queries={model.queries}"
    if inputs_of(model) != "patches" or model.family == "decoder":
        found.append(
            f"model.outputs=boxes is for pictures, but model.family={model.family} reads "
            f"{inputs_of(model)} here; set model.family=encoder and model.inputs=patches"
        )
    if (model.queries > 0) != (model.family == "encoder_decoder"):
        found.append(
            f"{given} are those of a decoder, but model.family={model.family}; set model=detr-tiny "
            "for boxes of queries, or model=detector-tiny for boxes of patches"
        )
    if (near := isqrt(model.queries)) ** 2 != model.queries:
        found.append(
            f"{given} begin at the places of a square grid; set model.queries={near**2} or "
            f"{(near + 1) ** 2}"
        )
    if model.queries and model.positions != "learned":
        found.append(
            f"{given} have no order, but model.positions={model.positions} is one; set "
            "model.positions=learned"
        )
    if model.pool == "class_token":
        found.append(
            "model.outputs=boxes predicts at each patch, but model.pool=class_token adds a vector "
            "that is none; set model.pool=mean"
        )
    return found


def detection_problems(config: TrainConfig) -> list[str]:
    """Return the settings of a cross-entropy, which detection does not learn by."""
    return [
        f"loss.{key}={getattr(config.loss, key)} is of a cross-entropy over classes, but "
        f"model.outputs=boxes learns each class by itself; set loss.{key}={off}"
        for key, off in (("label_smoothing", 0), ("chunks", 1))
        if getattr(config.loss, key) != off
    ]


def detection_compression_problems(compress: CompressConfig, model: ModelConfig) -> list[str]:
    """Return the compression that boxes at each patch leave no room for."""
    found = [
        f"compress.{key}={getattr(compress, key):g} leaves fewer vectors than patches, but "
        f"model.outputs=boxes predicts a box at each; set compress.{key}=0"
        for key in SHORTENS
        if getattr(compress, key)
    ]
    if compress.teacher and model.queries:
        found.append(
            f"compress.teacher={compress.teacher} teaches place by place, but the same of "
            f"model.queries={model.queries} finds another object in two models; set "
            "compress.teacher= for none"
        )
    if compress.match and compress.match_weight:
        found.append(
            f"compress.match={compress.match} weighs a sample by its targets, one for each "
            "position, which model.outputs=boxes does not have; set compress.match=[]"
        )
    return found
