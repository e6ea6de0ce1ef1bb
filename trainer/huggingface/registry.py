"""Registry of published architectures by `model_type`, and the model of a config.json."""

from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path

from trainer.config.train import ConfigError, ModelConfig
from trainer.huggingface.architecture import Architecture
from trainer.huggingface.decoders import DECODERS
from trainer.huggingface.encoder_decoders import ENCODER_DECODERS
from trainer.huggingface.encoders import ENCODERS
from trainer.huggingface.fields import ConfigFields
from trainer.huggingface.normal_form import normal_form
from trainer.huggingface.normed_decoders import NORMED_DECODERS
from trainer.huggingface.speech import SPEECH
from trainer.huggingface.vision import VISION

CONFIG = "config.json"
ARCHITECTURES = {
    architecture.class_name: architecture
    for family in (DECODERS, NORMED_DECODERS, ENCODER_DECODERS, ENCODERS, VISION, SPEECH)
    for architecture in family
}
# Kinds in the order of their first architecture.
KINDS = tuple(dict.fromkeys(architecture.model_type for architecture in ARCHITECTURES.values()))


def is_model_folder(folder: str | Path) -> bool:
    """Return whether a folder holds a Hugging Face model: a config.json, and no run."""
    path = Path(folder)
    return bool(str(folder)) and (path / CONFIG).is_file() and not (path / "config.yaml").exists()


def read_model(folder: str | Path, key: str = "init_from") -> tuple[Architecture, ModelConfig]:
    """Return a folder's architecture and its model, with every size; raises ConfigError.

    `key` is the config key that names the folder.
    """
    fields = ConfigFields.read(Path(folder) / CONFIG, key)
    architecture = _find_architecture(fields)
    values = architecture.read_config(fields)
    fields.check()
    model = replace(ModelConfig(), **values)
    return architecture, model


def architecture_for(model: ModelConfig, like: str | Path = "") -> Architecture:
    """Return the architecture that a model can be written as; raises ConfigError.

    That of the Hugging Face folder `like` is preferred, if there is one.
    """
    first = [read_model(like)[0]] if is_model_folder(like) else []
    for architecture in (*first, *ARCHITECTURES.values()):
        if architecture.fits(model) and _reads_back(architecture, model):
            return architecture
    known = ", ".join(KINDS)
    raise ConfigError(
        "this model is none of the architectures that can be written for transformers "
        f"({known}): model.family={model.family} model.norm={model.norm} model.activation="
        f"{model.activation} model.positions={model.positions} model.bias={model.bias} "
        f"model.norm_placement={model.norm_placement} model.qk_norm={model.qk_norm}; "
        "model=llama-tiny, gpt2 or vit-tiny and their sizes can be"
    )


def _reads_back(architecture: Architecture, model: ModelConfig) -> bool:
    """Return whether the fields that would be written for a model say all of it."""
    fields = ConfigFields(Path(CONFIG), architecture.write_config(model))
    try:
        again = replace(ModelConfig(), **architecture.read_config(fields))
        fields.check()
    except ConfigError:
        return False
    return normal_form(again) == normal_form(model)


def _find_architecture(fields: ConfigFields) -> Architecture:
    kind, values = fields.take("model_type"), fields.values
    if kind not in KINDS:
        near = get_close_matches(kind, KINDS, n=1, cutoff=0)[0]
        raise ConfigError(
            f"{fields.path}: model_type={kind} is not known here; the nearest known one is {near}, "
            f"and all are {', '.join(KINDS)}"
        )
    if values.get("auto_map"):
        raise ConfigError(
            f"{fields.path}: auto_map asks for code of the folder itself, which is never run; if "
            f"the weights are those of transformers' own {kind}, delete auto_map from the file"
        )
    if values.get("quantization_config"):
        raise ConfigError(
            f"{fields.path}: quantization_config says that the weights are quantized; convert them "
            "first: AutoModelForCausalLM.from_pretrained(…).dequantize().save_pretrained(…)"
        )
    of_kind = [a for a in ARCHITECTURES.values() if a.model_type == kind]
    classes = values.get("architectures") or [of_kind[0].class_name]
    found = next((a for a in of_kind if a.class_name in classes), None)
    if found is None:
        known = " or ".join(a.class_name for a in of_kind)
        raise ConfigError(
            f"{fields.path}: architectures={classes} has another head than {known}, "
            f"{'the one that is' if len(of_kind) == 1 else 'those that are'} known of {kind} here"
        )
    return found
